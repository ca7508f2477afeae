"""Make the notebooks from their sources: run each once, write the lesson and its solved twin.

python lessons/build.py             # all lessons
python lessons/build.py 02_lora     # one
python lessons/build.py --check     # run them, and compare with what lies here

A source is `src/NN_topic.py` in jupytext's percent format. An exercise is three cells, by their
tags: `exercise` (the stub), `solution`, and `check`, which is run after each of the two. The lesson
gets the stub with its check, the twin the solution with its check. A cell tagged `timing` prints
seconds, so `--check` does not compare its output.
"""

import argparse
import copy
import os
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
    """The notebook in the order in which it is run: stub, check, solution, check."""
    notebook, cells, waiting = jupytext.read(source, fmt="py:percent"), [], []
    for cell in notebook.cells:
        if "solution" in tags(cell):
            waiting.append(cell)
        elif "check" in tags(cell):
            cells += [cell, *waiting]
            if waiting:
                again = copy.deepcopy(cell)
                again.metadata.tags = ["check", "solution"]
                cells.append(again)
            waiting = []
        else:
            cells.append(cell)
    if waiting:
        raise ValueError(f"{source.name}: a cell tagged `solution` has no `check` after it")
    notebook.cells = cells
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return notebook


def lesson_and_twin(source: Path, run: bool = True) -> dict[Path, str]:
    """The two files that a source makes, as texts by path."""
    notebook = parse(source)
    if run:
        # one thread: how many there are moves the seventh digit, and the bytes should be the same
        os.environ.pop("MPLBACKEND", None)  # or figures would not reach the notebook
        os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1", PYDEVD_DISABLE_FILE_VALIDATION="1")
        NotebookClient(
            notebook,
            timeout=600,
            record_timing=False,
            coalesce_streams=True,  # a busy machine cuts one print into two outputs
            resources={"metadata": {"path": str(HERE)}},
        ).execute()
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
        count = 0
        for i, cell in enumerate(part.cells):
            cell.id = f"cell-{i:02d}"
            cell.metadata = {"tags": tags(cell)} if tags(cell) else {}
            if cell.cell_type == "code":
                count += 1
                cell.execution_count = count
                for output in cell.outputs:
                    if "execution_count" in output:
                        output.execution_count = count
        files[path] = nbformat.writes(part) + "\n"
    return files


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
    args = parser.parse_args()
    known = {path.stem: path for path in sorted((HERE / "src").glob("*.py"))}
    for name in args.lessons:
        if name not in known:
            sys.exit(f"error: there is no lesson {name!r}; there are: {', '.join(known)}")
    stale = []
    for name in args.lessons or known:
        for path, text in lesson_and_twin(known[name]).items():
            shown = path.relative_to(HERE)
            if not args.check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
                print(f"wrote {shown}")
            elif sources(path.read_text()) != sources(text):
                stale.append(str(shown))
            else:
                same = masked(path.read_text()) == masked(text)
                print(f"{shown}: ran, outputs {'the same' if same else 'not the same'}")
    if stale:
        sys.exit(f"error: not what the source makes: {', '.join(stale)}; run lessons/build.py")


if __name__ == "__main__":
    main()
