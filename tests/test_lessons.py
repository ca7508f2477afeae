"""The notebooks are what their sources make, and keep the house rules. `.ci/run` runs them."""

import importlib.util
import json
import re

import pytest

from minipeft.lab import tasks

LESSONS = tasks.DATA.parent / "lessons"
SOURCES = sorted((LESSONS / "src").glob("*.py"))


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
    assert 3 <= sum("exercise" in tags for tags in lesson) <= 5
    assert not any("solution" in tags for tags in lesson)
    assert not any("exercise" in tags for tags in twin)
    for path, said in ((LESSONS, "not done yet"), (LESSONS / "solutions", "right")):
        for cell in cells(path / f"{source.stem}.ipynb"):
            if "check" in cell["metadata"].get("tags", []):
                assert "".join(cell["outputs"][0]["text"]).startswith(said)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_each_exercise_has_two_wrong_answers_that_the_build_tries(source):
    jupytext = pytest.importorskip("jupytext", reason="the lessons need the extra `lessons`")
    wrong = 0
    for cell in jupytext.read(source, fmt="py:percent").cells:
        tags = cell.metadata.get("tags", [])
        wrong += "wrong" in tags
        if "check" in tags:
            assert wrong >= 2, cell.source
            wrong = 0


def made(build, check_says: list[tuple[list[str], dict]]):
    """A notebook of one exercise whose checks have these tags and last outputs."""
    cells = []
    for tags, output in check_says:
        cells.append(build.nbformat.v4.new_code_cell("answer"))
        check = build.nbformat.v4.new_code_cell("check", metadata={"tags": ["check", *tags]})
        kind = "error" if "ename" in output else "stream"
        check.outputs = [build.nbformat.v4.new_output(kind, **output)]
        cells.append(check)
    return build.nbformat.v4.new_notebook(cells=cells)


def test_the_build_refuses_a_check_that_takes_a_wrong_answer(build):
    stub = ([], {"text": "not done yet\n"})
    caught = (["wrong"], {"ename": "AssertionError", "evalue": "α / r is missing"})
    right = (["solution"], {"text": "right: well done\n"})
    build.judge(made(build, [stub, caught, right]), "toy")
    for bad in (
        [([], {"text": "right\n"})],
        [(["wrong"], {"text": "right\n"})],
        [(["wrong"], {"ename": "NameError", "evalue": "no such name"})],
        [(["wrong"], {"ename": "AssertionError", "evalue": ""})],
        [(["solution"], {"text": "not done yet\n"})],
        [(["solution"], {"ename": "AssertionError", "evalue": "it is wrong"})],
    ):
        with pytest.raises(ValueError, match="toy: the check says"):
            build.judge(made(build, bad), "toy")


def test_copies_for_a_class_hold_neither_outputs_nor_solutions(build, tmp_path):
    build.write_student_copies(["02_lora"], tmp_path / "class")
    copied = cells(tmp_path / "class" / "02_lora.ipynb")
    assert not any(cell.get("outputs") for cell in copied)
    kinds = {tag for cell in copied for tag in cell["metadata"].get("tags", [])}
    assert "exercise" in kinds
    assert not kinds & {"solution", "wrong"}


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
# %% tags=["wrong"]
raise ValueError("a wrong answer is not run")
# %% tags=["check"]
print("right")
""")
    assert build.with_other_seeds(source, 3) == ["AssertionError: this claim needs its seed"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_lesson_keeps_the_house_rules(source):
    lesson = cells(LESSONS / f"{source.stem}.ipynb")
    code = [cell for cell in lesson if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(lesson) <= 45
    assert (LESSONS / f"{source.stem}.ipynb").stat().st_size < 300_000
    assert sum("image/png" in output.get("data", {}) for output in outputs) <= 4
    assert not any("widget" in kind for o in outputs for kind in o.get("data", {}))
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    for cell in lesson:
        if cell["cell_type"] == "markdown":  # measured numbers are printed, never typed
            text = re.sub(r"arXiv \d{4}\.\d{5}", "", "".join(cell["source"]))
            assert not re.search(r"\d\.\d|\d ?%", text), text
