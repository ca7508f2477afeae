"""The grader: skeletons, verdicts on right and wrong files, and processes that end or hang."""

import ast
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from mistakes import __main__ as mistakes
from mistakes import variants
from mistakes.catch import CATCH, MISSED

from minipeft import grader
from minipeft.grader import METHODS, commands, faults, grading, judge, skeleton
from minipeft.grader.symptoms import Draw, Wrong, same
from minipeft.lab import cli

LORA = skeleton.reference("lora").read_text()


@pytest.fixture
def open_judge(tmp_path, monkeypatch):
    """A judge of this source, in this process."""

    def opened(method: str, source: str) -> judge.Judge:
        (tmp_path / f"{method}.py").write_text(source)
        found = judge.Judge(method, tmp_path, 0)
        found.open()
        return found

    before = set(sys.modules)
    yield opened
    for name in set(sys.modules) - before:
        if not getattr(sys.modules[name], "__spec__", None):  # those that `load` made
            del sys.modules[name]


def skeleton_of(method: str) -> str:
    return skeleton.cut(skeleton.reference(method).read_text(), *skeleton.load(method))[0]


def pieces(found: judge.Judge) -> dict[str, dict]:
    checks = judge.checks_of(found.method).CHECKS.found["pieces"]
    return {name: found.result(name, check) for name, check in checks.items()}


# --- skeletons ---


@pytest.mark.parametrize("method", METHODS)
def test_a_skeleton_is_the_reference_outside_its_holes(method):
    source, (holes, given) = skeleton.reference(method).read_text(), skeleton.load(method)
    text, cut = skeleton.cut(source, holes, given)
    assert skeleton.fill(text, cut, holes, given) == source
    for hole in holes:
        assert text.count(hole.equation) == 1, hole.name
        assert len(hole.hints) == 3
    kept = source
    for piece in cut:
        assert piece in kept
        kept = kept.replace(piece, "\n", 1)
    lines = set(kept.splitlines())
    marks = [line.strip() for mark in [h.text() for h in holes] + [g.text for g in given]
             for line in mark.splitlines()]  # fmt: skip
    new = [line for line in text.splitlines() if line not in lines and line.strip() not in marks]
    assert not new


@pytest.mark.parametrize("method", METHODS)
def test_a_skeleton_imports_and_every_hole_raises(method, open_judge):
    found = open_judge(method, skeleton_of(method))
    holes = {hole.name for hole in skeleton.load(method)[0]}
    assert holes == set(judge.checks_of(method).CHECKS.found["pieces"]), "every hole has a check"
    statuses = {result["status"] for result in pieces(found).values()}
    assert statuses <= {"not done yet", "blocked"}
    assert "not done yet" in statuses


@pytest.mark.parametrize("method", METHODS)
def test_a_reference_has_every_piece(method, open_judge):
    results = pieces(open_judge(method, skeleton.reference(method).read_text()))
    assert {result["status"] for result in results.values()} == {"done"}, results


def test_a_hole_that_is_not_in_the_source_is_an_error():
    (hole, *_), _ = skeleton.load("lora")
    with pytest.raises(ValueError, match="0 places start with 'divisor ='"):
        skeleton.spans(LORA.replace("divisor", "factor"), [hole], [])


def test_start_writes_a_file_and_never_overwrites_it(tmp_path):
    file = grader.start("lora", tmp_path / "my")
    assert file.read_text() == skeleton_of("lora")
    with pytest.raises(ValueError, match=r"lora\.py exists already"):
        grader.start("lora", tmp_path / "my")
    with pytest.raises(ValueError, match="no skeleton of 'adalora'; there are"):
        grader.start("adalora", tmp_path)


def test_a_task_has_three_hints():
    texts = [grader.hint("lora", "forward", n) for n in (1, 2, 3)]
    assert len(set(texts)) == 3
    assert texts[1].startswith("LoraLinear.forward: (1): y = W x + b")
    assert "\nhint 2 of 3: Dropout acts on the input of A" in texts[1]
    assert grader.hint("lora", 3) == texts[0]
    with pytest.raises(ValueError, match="no task 'loss' with hints; it has 1 scaling, 2 factors"):
        grader.hint("lora", "loss")
    with pytest.raises(ValueError, match="there are three hints, got 4"):
        grader.hint("lora", 1, 4)


def test_the_page_for_students_counts_holes_and_tasks():
    page = (Path(__file__).parents[1] / "lessons" / "BUILD.md").read_text()
    for method in METHODS:
        found = judge.checks_of(method).CHECKS.found
        assert f"| {len(found['pieces'])} | {sum(map(len, found.values()))} |" in next(
            line for line in page.splitlines() if line.startswith(f"| `{method}` |")
        )


# --- verdicts ---


def test_a_mistake_is_named_and_the_other_pieces_are_done(open_judge):
    wrong = LORA.replace("config.lora_alpha / divisor", "config.lora_alpha")
    results = pieces(open_judge("lora", wrong))
    assert results.pop("scaling")["message"] == (
        "self.scaling is 2 times too large, and r is 2: is α divided by r?"
    )
    assert {result["status"] for result in results.values()} == {"done"}


def test_a_piece_is_right_inside_the_reference_while_others_are_missing(open_judge):
    hole = next(hole for hole in skeleton.load("lora")[0] if hole.name == "forward")
    _, (piece,) = skeleton.cut(LORA, [hole], [])
    source = skeleton_of("lora").replace(hole.text().replace("\n", "\n        "), piece.strip())
    results = pieces(open_judge("lora", source))
    assert results.pop("forward")["status"] == "done"
    assert "done" not in {result["status"] for result in results.values()}


def test_a_helper_of_the_students_comes_along(open_judge):
    source = LORA.replace("return self.scaling * (self.lora_B", "return product(self)  # (", 1)
    source = "from __future__ import annotations\n" + source  # no other file may have it later on
    source += "\n\ndef product(self):\n    return self.scaling * self.scale_free()\n"
    source = source.replace(
        "    def merged(self)",
        "    def scale_free(self):\n        return self.lora_B.weight @ self.lora_A.weight\n\n"
        "    def merged(self)",
    ).replace("config.lora_alpha / divisor", "1")  # so that the file as a whole is wrong
    ast.parse(source)
    results = pieces(open_judge("lora", source))
    assert results["scaling"]["status"] == "wrong"
    assert results["delta"]["status"] == "done"


def test_an_error_has_the_line_of_the_students_file(open_judge):
    source = LORA.replace("y = self.base_layer(x)", "y = self.base_lair(x)")
    line = source[: source.index("base_lair")].count("\n") + 1
    message = pieces(open_judge("lora", source))["forward"]["message"]
    start = "AttributeError, with a Linear: 'LoraLinear' object has no attribute 'base_lair'"
    assert message.startswith(start)
    assert message.endswith(f"(line {line} of lora.py)")


def with_parameters(*changes: tuple[str, str]) -> str:
    """lora.py with parameters instead of linear layers, and some more changes."""
    source = next(v for v in variants("lora") if v.name == "parameters and einsum").source("lora")
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    return source


def test_an_error_is_that_of_the_students_file_and_not_of_the_second_try(open_judge):
    source = with_parameters(("x.to(self.lora_A.dtype)", "x"))  # a bfloat16 x meets float32
    message = pieces(open_judge("lora", source))["forward"]["message"]
    assert "Linear" not in message
    assert message.startswith("RuntimeError, with a bfloat16 layer: ")


def test_a_file_that_does_not_fit_the_reference_waits_for_its_first_mistake(open_judge):
    source = with_parameters(("config.lora_alpha / divisor", "config.lora_alpha"))
    results = pieces(open_judge("lora", source))
    assert results["scaling"]["status"] == "wrong"
    assert (results["forward"]["status"], results["forward"]["message"]) == (
        "blocked",
        "by scaling",
    )


def test_a_missing_function_is_said(open_judge):
    source = LORA.replace("def delta(self)", "def update(self)")
    assert pieces(open_judge("lora", source))["delta"]["message"] == "there is no LoraLinear.delta"


A = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]])


@pytest.mark.parametrize(
    ("got", "says"),
    [
        (None, "y must be a tensor, got NoneType"),
        (A.T, r"has the shape \(3, 2\), expected \(2, 3\): it is transposed"),
        (A.half(), "has the dtype torch.float16, not torch.float32"),
        (A / 0, "not finite"),
        (A * 0, "is zero everywhere"),
        (-A, "has the opposite sign"),
        (3 * A, "is 3 times too large"),
        (A / 4, r"is 0.25 of what it must be, and 1 / r is 0.25: is r missing\?"),
        (A.flip(0), "reverse order along dimension 0"),
        (A.roll(1, 1), "shifted by 1 along dimension 1"),
        (A + torch.eye(2, 3), r"wrong in 2 of 6 entries: entry \[0, 0\] is 2, expected 1 \(r 4\)"),
        (A.exp(), "is wrong: the exponential is taken"),
    ],
)
def test_a_difference_is_described_by_its_symptom(got, says):
    factors = {"1 / r": (0.25, "is r missing?")}
    with pytest.raises(Wrong, match=says):
        same(
            "y", got, A, factors=factors, guesses={"the exponential is taken": A.exp()}, case="r 4"
        )


def test_rounding_is_no_difference():
    same("y", A * (1 + 1e-6), A)
    with pytest.raises(Wrong):
        same("y", A * (1 + 1e-4), A)


def test_a_variant_has_other_numbers():
    assert torch.equal(Draw(5).normal(3), Draw(5).normal(3))
    assert not torch.equal(Draw(5).normal(3), Draw(6).normal(3))


# --- processes ---


@pytest.mark.slow
def test_a_process_that_ends_or_hangs_is_wrong_and_the_rest_is_graded(tmp_path):
    source = LORA.replace(
        "return self.scaling * (self.lora_B", "import os; os._exit(0)\n        (self.lora_B"
    )
    source = source.replace('"""Discard W\'', '"""W\'').replace(
        "        self.merged_weight = None\n", "        while True: pass\n"
    )
    (tmp_path / "lora.py").write_text(source)
    results = grading.run_level("lora", tmp_path, "pieces", 0, seconds=3)
    statuses = {r.task: (r.status, r.message) for r in results}
    assert statuses["delta"] == ("wrong", "the process ended before the check did (status 0)")
    assert statuses["unmerge"] == ("wrong", "takes longer than 3 s")
    assert statuses["find_targets"] == statuses["add_lora"] == ("done", "")


@pytest.mark.slow
def test_it_also_works_where_processes_cannot_be_forked(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "get_all_start_methods", lambda: ["spawn"])  # as on Windows
    (tmp_path / "lora.py").write_text(LORA)
    results = grading.run_level("lora", tmp_path, "layer", 0)
    assert {r.status for r in results} == {"done"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import minipeft", "ImportError: importing minipeft is blocked"),
        ("import importlib; importlib.import_module('peft.tuners')", "importing peft is blocked"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", "importing the file: the process ended"),
        ("def f(:", "importing the file: SyntaxError: invalid syntax (line 1 of lora.py)"),
    ],
)
def test_a_file_that_cannot_be_imported_has_no_task_done(tmp_path, code, says):
    (tmp_path / "lora.py").write_text(f"{code}\n{LORA}")
    results = grading.run_level("lora", tmp_path, "layer", 0)
    assert {r.status for r in results[1:]} == {"blocked"}
    assert results[0].status == "wrong"
    assert says in results[0].message


# --- commands ---


def run(*words) -> None:
    cli.run(cli.parser().parse_args(["build", *map(str, words)]))


def test_results_are_written_for_gradescope_and_as_junit(tmp_path, capsys, monkeypatch):
    found = [grading.Result("lora", "pieces", "scaling", "done"),
             grading.Result("lora", "pieces", "forward", "wrong", "it is <zero>")]  # fmt: skip
    monkeypatch.setattr(grading, "check", lambda *args, **options: found)
    files = tmp_path / "r.json", tmp_path / "r.xml"
    with pytest.raises(SystemExit):
        run("check", tmp_path, "--json", files[0], "--junit", files[1])
    tests = json.loads(files[0].read_text())["tests"]
    assert [test["score"] for test in tests] == [1.0, 0.0]
    assert tests[1]["output"] == "wrong: it is <zero>"
    suite = ElementTree.parse(files[1]).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert suite[1][0].get("message") == "wrong: it is <zero>"


def test_an_export_is_a_students_own_variant(tmp_path, capsys):
    run("export", tmp_path / "ada", "lora", "--secret", "s", "--student", "ada")
    seed = json.loads((tmp_path / "ada" / "variant.json").read_text())["seed"]
    assert seed == commands.seed_of("s", "ada")
    assert len({seed, commands.seed_of("s", "bob"), commands.seed_of("t", "ada")}) == 3
    options = cli.parser().parse_args(["build", "check", str(tmp_path / "ada")])
    assert commands.variant_of(options) == seed
    options.secret = "t"
    with pytest.raises(ValueError, match="must be given together"):
        commands.variant_of(options)
    options.student = "ada"
    assert commands.variant_of(options) == commands.seed_of("t", "ada")
    (tmp_path / "ada" / "variant.json").write_text('{"seed": "x"}')
    options.secret = options.student = None
    with pytest.raises(ValueError, match="no valid seed, got 'x'"):
        commands.variant_of(options)


def test_check_says_what_there_is_to_check(tmp_path):
    with pytest.raises(ValueError, match=r"has none of training\.py, lora\.py"):
        run("check", tmp_path)
    with pytest.raises(ValueError, match=r"has no lora\.py: python -m minipeft build start lora"):
        run("check", tmp_path, "lora")
    with pytest.raises(ValueError, match="there is no 'adalora' to check; there are training,"):
        run("check", tmp_path, "adalora")


# --- every mistake, and the second track ---


@pytest.mark.slow
def test_the_readme_shows_how_many_mistakes_are_caught_and_right_solutions_accepted(open_judge):
    page = (Path(__file__).parents[1] / "lessons" / "README.md").read_text()
    assert mistakes.table() in page, "run python -m tests.mistakes"


@pytest.mark.slow
def test_a_skeleton_has_nothing_done_and_a_reference_everything(tmp_path):
    for method in METHODS:
        file = grader.start(method, tmp_path)
        assert "done" not in {r.status for r in grading.grade_method(method, tmp_path)}
        file.write_text(skeleton.reference(method).read_text())
        assert {r.status for r in grading.grade_method(method, tmp_path)} == {"done"}


def test_every_faulty_file_is_different_from_two_correct_ones():
    for fault in faults.FAULTS.values():
        assert len(set(fault.sources())) == 3
        for source in fault.sources():
            ast.parse(source)


@pytest.mark.slow
def test_tests_that_catch_a_fault_are_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grader.start("catch", ".")  # a relative folder, as on the command line
    results = grading.grade_method("catch", Path("."))
    assert {r.status for r in results} == {"not done yet"}
    for number, source in CATCH.items():
        Path("catch", f"test_{number}.py").write_text(source)
    results = grading.grade_method("catch", Path("."))
    assert {(r.status, r.message) for r in results} == {("done", "")}


@pytest.mark.slow
@pytest.mark.parametrize(("source", "says"), MISSED.values(), ids=MISSED)
def test_tests_that_catch_nothing_are_wrong(tmp_path, source, says):
    grader.start("catch", tmp_path)
    Path(tmp_path, "catch", "test_1.py").write_text(source)
    result = grading.grade_method("catch", tmp_path)[0]
    assert result.status == "wrong"
    assert says in result.message
