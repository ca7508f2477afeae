"""What checks the exercises of the lessons: its messages, hints, solutions and claims."""

import sys

import pytest
import torch

from minipeft.grader import lessons
from minipeft.grader.lessons import __main__
from minipeft.grader.symptoms import Wrong
from minipeft.lab import DATA


@pytest.fixture(autouse=True)
def nothing_checked(monkeypatch):
    monkeypatch.setattr(lessons, "last", [])
    monkeypatch.setattr(lessons, "right", set())


def test_a_wrong_answer_shows_the_input_both_values_and_the_mistake(capsys):
    lessons.check("02.merge", lambda W, A, B, alpha, r: W + B @ A)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["input", "got", "expected", "likely"]
    assert lines[0].startswith("wrong: ")
    assert lines[4].endswith("the scaling α / r is missing")
    assert lines[5] == "Try again, or run hint(1), hint(2), solution()."
    assert not lessons.solved("02.merge")


def test_an_error_in_a_library_is_shown_at_the_line_of_the_student_who_called_it(capsys):
    def my_loss(logits, ids):
        return torch.nn.functional.cross_entropy(logits[:, :-1], ids[:, 1:])

    lessons.check("00.my_loss", my_loss)
    out = capsys.readouterr().out
    assert "in line   return torch.nn.functional.cross_entropy(logits[:, :-1], ids[:, 1:])" in out
    assert "likely    cross_entropy wants the classes second" in out


def test_a_right_answer_is_remembered_until_it_is_checked_again():
    lessons.check("02.count", 4096)
    assert lessons.solved("02.count")
    lessons.check("02.count", None)
    assert not lessons.solved("02.count")


def test_hints_are_about_the_exercise_that_was_checked_last(capsys):
    with pytest.raises(ValueError, match="first run a cell with check"):
        lessons.hint(1)
    lessons.check("02.count", None)
    lessons.hint(2)
    assert "A is r × in" in capsys.readouterr().out
    for n in (0, 3):
        with pytest.raises(ValueError, match=f"02.count has hints 1 to 2, not {n}"):
            lessons.hint(n)


def test_solutions_are_those_of_the_solved_notebooks(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(DATA.parent / "lessons")
    lessons.check("02.merge", None)
    lessons.solution()
    assert "return W + alpha / r * (B @ A)" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)  # a student's copy
    lessons.solution()
    assert "ask your teacher" in capsys.readouterr().out


def test_a_claim_that_does_not_hold_is_an_error_in_the_build_and_a_note_elsewhere(
    monkeypatch, capsys
):
    monkeypatch.delenv("MINIPEFT_BUILD", raising=False)
    lessons.claim(1 + 1 == 2, "sums are right")
    assert capsys.readouterr().out == ""
    lessons.claim(1 + 1 == 3, "sums are wrong")
    assert "sums are wrong" in capsys.readouterr().out
    monkeypatch.setenv("MINIPEFT_BUILD", "1")
    with pytest.raises(AssertionError, match="sums are wrong"):
        lessons.claim(1 + 1 == 3, "sums are wrong")


def test_an_exercise_that_does_not_exist_is_named():
    for name in ("02.nothing", "99.merge", "merge"):
        with pytest.raises(ValueError, match=f"there is no exercise '{name}'"):
            lessons.check(name, 1)


def test_a_function_may_not_change_its_inputs():
    def adds(value):
        value += value
        return 1

    for value in (torch.ones(2), [1, 2]):
        with pytest.raises(Wrong, match="adds changes its input"):
            lessons.call(adds, value)


def test_an_error_in_a_students_function_names_the_error_and_the_input():
    with pytest.raises(Wrong, match=r"<lambda> raises ZeroDivisionError: .*\n  input     3"):
        lessons.call(lambda x: x / 0, 3)


def test_a_stub_is_not_done_yet_and_a_function_without_return_is_wrong():
    def stub(x): ...

    def no_return(x):
        x + 1

    for function in (stub, lambda x: ...):
        with pytest.raises(lessons.NotDone):
            lessons.call(function, 2)
    with pytest.raises(Wrong, match="no_return returns None: is a `return`"):
        lessons.call(no_return, 2)
    assert lessons.call(no_return, 2, may_be_none=True) is None


def test_a_check_leaves_torchs_random_state_as_it_was():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    lessons.check("02.my_lora", torch.nn.Linear)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("got", "expected", "equal"),
    [
        (torch.ones(2), torch.ones(2) + 1e-7, True),
        (torch.ones(2), torch.ones(2) + 1e-3, False),
        (torch.ones(2), torch.ones(1, 2), False),
        ([1.0, 1.0], torch.ones(2), False),
        (torch.ones(2), [1, 1], True),
        (torch.tensor([True]), torch.tensor([True]), True),
        (torch.tensor([True]), torch.tensor([False]), False),
        ((1, 2), [1, 2], True),
        ([1, 2, 3], [1, 2], False),
        (1.0, 1, True),
        (True, 1, False),
        (1, True, False),
        ("1", 1, False),
        (" Loss ", "loss", True),
        ({"a": 1.0}, {"a": 1}, True),
        ({"a": 1, "b": 1}, {"a": 1}, False),
        (None, None, True),
        (0, None, False),
        (0.0, 1e-12, True),
        (float("nan"), 1.0, False),
    ],
)
def test_values_are_equal_up_to_rounding_and_to_the_kind_of_sequence(got, expected, equal):
    assert lessons.is_close(got, expected, 1e-5) == equal


@pytest.mark.parametrize(("code", "status"), [("count = 4096", 0), ("count = 1", 1), ("", 1)])
def test_answers_in_a_file_can_be_checked_on_the_command_line(monkeypatch, tmp_path, code, status):
    file = tmp_path / "answers.py"
    file.write_text(code)
    monkeypatch.setattr(sys, "argv", ["lessons", "02.count", str(file)])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == status


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["02.count"], "usage: "),
        (["02.count", "nowhere.py"], "error: .*No such file"),
        (["02.nothing", "nowhere.py"], "error: there is no exercise"),
    ],
)
def test_the_command_line_says_what_is_wrong(monkeypatch, words, error):
    monkeypatch.setattr(sys, "argv", ["lessons", *words])
    with pytest.raises(SystemExit, match=error):
        __main__.main()
