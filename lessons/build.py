"""Build the notebooks from their sources: run each once, write the lesson and its solved twin.

python lessons/build.py                     # all lessons
python lessons/build.py 02_lora             # one
python lessons/build.py --check             # run them, and compare with the files that are here
python lessons/build.py --student class     # copies for a class: no outputs, no solutions
python lessons/build.py --figures slides    # the figures of the built lessons as PNG files
python lessons/build.py --seed 3            # run them with other seeds: which claims still hold?

A source is `src/NN_topic.py` in jupytext's percent format. An exercise is three cells, by their
tags: `exercise` (the stub), `solution`, and `check`, which runs after each of these: it must print
"not done yet", and then "right". The lesson gets the stub with its check, the twin the solution
with its check. (tests/answers/ has wrong answers, and other right ones.) A cell tagged `timing`
prints seconds, so `--check` does not compare its output.
"""

import argparse
import ast
import base64
import copy
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def parse(source: Path):
    """The notebook as it is run: stub, check, solution, check."""
    notebook, cells, solution = jupytext.read(source, fmt="py:percent"), [], None
    for cell in notebook.cells:
        if tags(cell) == ["solution"]:
            solution = cell
        elif tags(cell) == ["check"]:
            again = copy.deepcopy(cell)
            again.metadata.tags = ["check", "solution"]
            cells += [cell, solution, again]
            solution = None
        else:
            cells.append(cell)
    if solution is not None:
        raise ValueError(f"{source.name}: a solution has no `check` after it")
    notebook.cells = cells
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return notebook


def judge(notebook, name: str) -> None:
    """Raises ValueError where a check does not say what it should of a stub or a solution."""
    for answer, check in zip(notebook.cells, notebook.cells[1:], strict=False):
        if "check" not in tags(check):
            continue
        said = "".join(output.get("text", "") for output in check.outputs)
        if not said.startswith("right" if "solution" in tags(check) else "not done yet"):
            raise ValueError(f"{name}: the check says {said!r} of\n{answer.source}")


def run_cells(notebook, **options) -> None:
    # one thread: how many there are moves the seventh digit, and the bytes should be the same
    os.environ.pop("MPLBACKEND", None)  # or figures would not reach the notebook
    os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1", PYDEVD_DISABLE_FILE_VALIDATION="1")
    os.environ["MINIPEFT_BUILD"] = "1"  # claims that do not hold are errors
    NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,  # a busy machine cuts one print into two outputs
        resources={"metadata": {"path": str(HERE)}},
        **options,
    ).execute()
    for cell in notebook.cells:  # progress bars do not belong into a file
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if "widget" not in str(list(o.get("data", {})))]


def lesson_and_twin(source: Path, run: bool = True) -> dict[Path, str]:
    """The two files that a source makes, as texts by path."""
    notebook = parse(source)
    if run:
        run_cells(notebook)
        judge(notebook, source.stem)
    files = {}
    for path, drop in (
        (HERE / f"{source.stem}.ipynb", lambda cell: "solution" in tags(cell)),
        (
            HERE / "solutions" / f"{source.stem}.ipynb",
            lambda cell: tags(cell) in (["exercise"], ["check"]),
        ),
    ):
        part = copy.deepcopy(notebook)
        part.cells = [cell for cell in part.cells if not drop(cell)]
        if path.parent != HERE:  # links are relative to the lesson
            for cell in part.cells:
                if cell.cell_type == "markdown":
                    cell.source = re.sub(r"\]\((?!http|#)", "](../", cell.source)
        count = 0
        for i, cell in enumerate(part.cells):
            cell.id = f"cell-{i:02d}"
            cell.metadata = {"tags": tags(cell)} if tags(cell) else {}
            if cell.cell_type == "code":
                count += 1
                cell.execution_count = count if run else None
                for output in cell.outputs:
                    if "execution_count" in output:
                        output.execution_count = count
        files[path] = nbformat.writes(part) + "\n"
    return files


def write_student_copies(names: list[str], folder: Path) -> None:
    """The lessons alone, without outputs or solutions."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        text = lesson_and_twin(HERE / "src" / f"{name}.py", run=False)[HERE / f"{name}.ipynb"]
        (folder / f"{name}.ipynb").write_text(text)
        print(f"wrote {folder / name}.ipynb")


def write_figures(names: list[str], folder: Path) -> None:
    """The figures of the built lessons as numbered PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        cells = nbformat.read(HERE / f"{name}.ipynb", as_version=4).cells
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
        for i, picture in enumerate(pictures, 1):
            (folder / f"{name}_{i}.png").write_bytes(base64.b64decode(picture))
            print(f"wrote {folder / name}_{i}.png")


class DefaultSeed(ast.NodeTransformer):
    """Gives every `RunConfig(…)` without a seed this one."""

    def __init__(self, seed: int):
        self.seed = ast.keyword("seed", ast.Constant(seed))

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name == "RunConfig" and all(keyword.arg != "seed" for keyword in node.keywords):
            node.keywords.append(self.seed)
        return node


def with_other_seeds(source: Path, n: int) -> list[str]:
    """Run the solutions with n added to the seeds; returns the message of each cell that failed.

    Moved are the numbers after the words of `seeds` below, and the seed of every RunConfig that
    names none. A seed given by position, as in `shuffled(…, 0)`, stays.
    """
    notebook = parse(source)
    notebook.cells = [
        c
        for c in notebook.cells
        if c.cell_type == "code" and tags(c) not in (["exercise"], ["check"])
    ]
    seeds = re.compile(r"(manual_seed\(|seed=|Random\(|for seed in \()([\d, ]+)")
    for cell in notebook.cells:
        moved = seeds.sub(
            lambda m: m[1] + re.sub(r"\d+", lambda d: str(int(d[0]) + n), m[2]), cell.source
        )
        cell.source = ast.unparse(DefaultSeed(n).visit(ast.parse(moved)))
    run_cells(notebook, allow_errors=True)
    errors = [o for cell in notebook.cells for o in cell.outputs if o.output_type == "error"]
    plain = [re.sub(r"\x1b\[[\d;]*m", "", "\n".join(o.traceback)) for o in errors]
    lines = [re.findall(r"^-+> \d+ (.*)", text, re.M) for text in plain]  # where it stopped
    return [f"{o.ename}: {o.evalue or at[0].strip()}" for o, at in zip(errors, lines, strict=True)]


def masked(text: str) -> str:
    """A notebook as text, without the outputs of its timing cells."""
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        if "timing" in tags(cell):
            cell.outputs = []
    return nbformat.writes(notebook)


def sources(text: str) -> list[str]:
    return [cell.source for cell in nbformat.reads(text, as_version=4).cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="*", help="names of sources (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--student", metavar="FOLDER", type=Path, help="copies for a class")
    parser.add_argument("--figures", metavar="FOLDER", type=Path, help="figures as files")
    parser.add_argument("--seed", metavar="N", type=int, help="run with N added to the seeds")
    args = parser.parse_args()
    known = {path.stem: path for path in sorted((HERE / "src").glob("*.py"))}
    for name in args.lessons:
        if name not in known:
            sys.exit(f"error: there is no lesson {name!r}; there are: {', '.join(known)}")
    names, stale = args.lessons or list(known), []
    if args.student:
        write_student_copies(names, args.student)
    if args.figures:
        write_figures(names, args.figures)
    if args.student or args.figures:
        return
    if args.seed is not None:
        failed = []
        for name in names:
            errors = with_other_seeds(known[name], args.seed)
            print(f"{name}, seeds moved by {args.seed}:", *(errors or ["all holds"]), sep="\n  ")
            failed += errors
        sys.exit(1 if failed else 0)
    for name in names:
        for path, text in lesson_and_twin(known[name]).items():
            shown = path.relative_to(HERE)
            if not args.check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
                print(f"wrote {shown}", flush=True)
            elif sources(path.read_text()) != sources(text):
                stale.append(str(shown))
            else:
                same = masked(path.read_text()) == masked(text)
                print(f"{shown}: ran, outputs {'the same' if same else 'other'}", flush=True)
    if stale:
        sys.exit(f"error: out of date: {', '.join(stale)}; run lessons/build.py")


if __name__ == "__main__":
    main()
