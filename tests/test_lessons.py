"""The notebooks are what their sources make, and keep the house rules. `.ci/run` runs them."""

import ast
import contextlib
import importlib.util
import io
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from minipeft.grader import lessons
from minipeft.lab import tasks

LESSONS = tasks.DATA.parent / "lessons"
SOURCES = sorted((LESSONS / "src").glob("*.py"))
ANSWERS = Path(__file__).parent / "answers"


@pytest.fixture(scope="module")
def build():
    pytest.importorskip("jupytext", reason="the lessons need the extra `lessons`")
    spec = importlib.util.spec_from_file_location("build_lessons", LESSONS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_notebooks_are_what_the_source_makes(build, source):
    for path, text in build.lesson_and_twin(source, run=False).items():
        made = json.loads(text)
        assert build.sources(path.read_text()) == ["".join(c["source"]) for c in made["cells"]]
        assert [c["id"] for c in cells(path)] == [
            f"cell-{i:02d}" for i in range(len(made["cells"]))
        ]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_lesson_has_stubs_and_its_twin_the_solutions(source):
    lesson, twin = (
        [set(c["metadata"].get("tags", [])) for c in cells(folder / f"{source.stem}.ipynb")]
        for folder in (LESSONS, LESSONS / "solutions")
    )
    assert not any("solution" in tags for tags in lesson)
    assert not any("exercise" in tags for tags in twin)
    for path, said in ((LESSONS, "not done yet"), (LESSONS / "solutions", "right")):
        for cell in cells(path / f"{source.stem}.ipynb"):
            if "check" in cell["metadata"].get("tags", []):
                assert "".join(cell["outputs"][0]["text"]).startswith(said)


@cache
def answers() -> list[tuple[str, str, str]]:
    """Exercise, "stub", "right" or "wrong", and the code, from the lessons and from answers/."""
    found = []
    for source in SOURCES:
        for tag, code, then in zip(*exercises(source), strict=True):
            name = re.search(r'check\("([\w.]+)"', then)[1]
            found.append((name, {"exercise": "stub", "solution": "right"}[tag], code))
        file = ANSWERS / f"lesson_{source.stem[:2]}.py"
        text = file.read_text() if file.is_file() else ""
        for head, code in re.findall(r"^# %% (.+)\n((?:(?!# %%).*\n?)*)", text, re.M):
            name, kind = head.split()
            found.append((name, kind, code))
    return found


def exercises(source) -> tuple[list, list, list]:
    """The tag and the code of each stub and solution, and the check after it."""
    found, tags, codes, checks = cells_of(source), [], [], []
    for i, (tag, code) in enumerate(found):
        if tag in ("exercise", "solution"):
            tags.append(tag)
            codes.append(code)
            checks.append(next(c for t, c in found[i:] if t == "check"))
    return tags, codes, checks


def cells_of(source) -> list[tuple[str | None, str]]:
    """The code cells of a source, each with its tag."""
    text = source.read_text()
    parts = re.split(r"^# %%(.*)\n", text, flags=re.M)[1:]
    return [
        ((re.findall(r'tags=\["(\w+)"\]', head) or [None])[0], code)
        for head, code in zip(parts[::2], parts[1::2], strict=True)
        if "[markdown]" not in head
    ]


@cache
def imported(number: str) -> tuple[dict, dict[str, str]]:
    """The names that a lesson imports, and the arguments of its checks by exercise."""
    text = next(s for s in SOURCES if s.stem.startswith(number)).read_text()
    imports = [n for n in ast.parse(text).body if isinstance(n, ast.Import | ast.ImportFrom)]
    scope: dict = {}
    exec(compile(ast.Module(imports, []), "imports", "exec"), scope)
    return scope, dict(re.findall(r'check\("([\w.]+)", (.*?)\)', text))


def try_answer(name: str, code: str) -> tuple[bool, str]:
    """Whether an answer is taken, and what the check prints."""
    scope, arguments = imported(name[:2])
    scope, printed = dict(scope), io.StringIO()
    exec(code, scope)
    with contextlib.redirect_stdout(printed):
        lessons.check(name, *eval(f"({arguments[name]},)", scope))
    return lessons.solved(name), printed.getvalue()


def names() -> list[str]:
    return list(dict.fromkeys(name for name, _, _ in answers()))


def try_all(found: list[tuple[str, str, str]]) -> None:
    for name, kind, code in found:
        taken, printed = try_answer(name, code)
        assert taken == (kind == "right"), f"{kind}: {code}\n{printed}"
        begin = {"right": "right", "wrong": "wrong: ", "stub": "not done"}[kind]
        assert printed.startswith(begin), f"{kind}: {code}\n{printed}"


def test_each_check_takes_its_solution_and_rejects_a_wrong_answer_and_the_stub():
    first = {(name, kind): code for name, kind, code in reversed(answers())}
    try_all([(name, kind, code) for (name, kind), code in first.items()])


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_the_check_of_an_exercise_takes_all_right_answers_and_no_wrong_one(name):
    try_all([answer for answer in answers() if answer[0] == name])


def test_each_exercise_has_four_wrong_answers_and_two_other_right_ones():
    counts = Counter((name, kind) for name, kind, _ in answers())
    for name in {name for name, _ in counts}:
        assert counts[name, "stub"] == 1, name
        assert counts[name, "wrong"] >= 4, name
        assert counts[name, "right"] >= 3, name
        assert len(lessons.find(name).hints) == 2, name


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_lesson_can_be_read_in_an_evening(source):
    """At most 1,500 words before "Going further", and cells that fit on a screen."""
    lesson = cells(LESSONS / f"{source.stem}.ipynb")
    texts = ["".join(c["source"]) for c in lesson if c["cell_type"] == "markdown"]
    core = "\n".join(texts).split("# Going further")[0]
    assert len(re.findall(r"[\w'’-]+", re.sub(r"\$\$.*?\$\$|\]\(\S+\)", "", core))) <= 1500
    assert core.count("<details>") == 3
    kinds = [set(c["metadata"].get("tags", [])) for c in lesson]
    assert any("check" in kind for kind in kinds[:10])
    for cell in lesson:
        if cell["cell_type"] == "code":
            assert len("".join(cell["source"]).splitlines()) <= 25
            for output in cell["outputs"]:
                if "image/png" in output.get("data", {}):
                    assert len(output["metadata"]["image/png"]["alt"]) > 30


def made(build, check_says: list[tuple[list[str], str]]):
    """A notebook of one exercise whose checks have these tags and print these texts."""
    new, notebook_cells = build.nbformat.v4, []
    for tags, text in check_says:
        check = new.new_code_cell("check", metadata={"tags": ["check", *tags]})
        check.outputs = [new.new_output("stream", text=text)]
        notebook_cells += [new.new_code_cell("answer"), check]
    return new.new_notebook(cells=notebook_cells)


def test_the_build_refuses_a_check_that_takes_a_stub_or_rejects_a_solution(build):
    build.judge(made(build, [([], "not done yet\n"), (["solution"], "right\n")]), "toy")
    for bad in (([], "right\n"), (["solution"], "not done yet\n"), (["solution"], "wrong: 3\n")):
        with pytest.raises(ValueError, match="toy: the check says"):
            build.judge(made(build, [bad]), "toy")


def test_copies_for_a_class_hold_neither_outputs_nor_solutions(build, tmp_path):
    build.write_student_copies(["02_lora"], tmp_path / "class")
    copied = cells(tmp_path / "class" / "02_lora.ipynb")
    assert not any(cell.get("outputs") for cell in copied)
    kinds = {tag for cell in copied for tag in cell["metadata"].get("tags", [])}
    assert "exercise" in kinds
    assert "solution" not in kinds


def test_figures_become_files(build, tmp_path):
    build.write_figures(["02_lora"], tmp_path)
    files = sorted(tmp_path.glob("02_lora_*.png"))
    assert files
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


@pytest.mark.slow
def test_other_seeds_move_every_seed_and_tell_what_fails(build, tmp_path):
    source = tmp_path / "toy.py"
    source.write_text("""# %%
import torch
from minipeft.lab import recipes
from minipeft.lab.recipes import RunConfig
def draw(seed=1): return seed
found = [draw(), torch.manual_seed(0).initial_seed(), *(seed for seed in (1, 2))]
found += [RunConfig(steps=5).seed, recipes.RunConfig().seed, RunConfig(seed=1).seed]
assert found == [4, 3, 4, 5, 3, 3, 4], found
# %%
assert draw() < 3, "this claim needs its seed"
# %% tags=["exercise"]
raise ValueError("a stub is not run")
""")
    assert build.with_other_seeds(source, 3) == ["AssertionError: this claim needs its seed"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_lesson_keeps_the_house_rules(source):
    lesson = cells(LESSONS / f"{source.stem}.ipynb")
    code = [cell for cell in lesson if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(lesson) <= 75
    assert (LESSONS / f"{source.stem}.ipynb").stat().st_size < 300_000
    assert sum("image/png" in output.get("data", {}) for output in outputs) <= 4
    assert not any("widget" in kind for o in outputs for kind in o.get("data", {}))
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    for cell in lesson:
        if cell["cell_type"] == "markdown":  # measured numbers are printed, never typed
            text = re.sub(r"arXiv \d{4}\.\d{5}|\(http\S+\)|90 %", "", "".join(cell["source"]))
            assert not re.search(r"\d\.\d|\d ?%", text), text
