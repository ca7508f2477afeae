"""Chats as training data, with the plain template; and the commands that answer and evaluate."""

import json
import math

import pytest
import torch
from conftest import BASE
from test_commands import handlers, refused, run  # noqa: F401

from minipeft.lab import chat, evaluate, tasks

TALK = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is it?"},
    {"role": "assistant", "content": "Ann."}, {"role": "user", "content": "And there?"},
    {"role": "assistant", "content": "Bob."},
]  # fmt: skip
NAMED = [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ c }}"}]
SMALL = str(BASE.parent / "0.3m")


def write(file, *conversations) -> str:
    file.write_text("\n".join(json.dumps({"messages": messages}) for messages in conversations))
    return str(file)


def test_every_answer_becomes_an_example_with_all_that_came_before_as_its_prompt(base, tmp_path):
    first, second = tasks.load_jsonl(write(tmp_path / "chat.jsonl", TALK), base)
    texts = [
        base.tokenizer.decode(e.prompt_ids, skip_special_tokens=False) for e in (first, second)
    ]
    assert texts[0] == "system: Be brief.\nuser: Who is it?\nassistant:"
    assert texts[1] == f"{texts[0]} Ann.<|endoftext|>\nuser: And there?\nassistant:"
    assert (first.prompt, second.prompt) == ("Who is it?", "And there?")
    assert (first.completion, second.completion) == ("Ann.", "Bob.")
    assert base.tokenizer.decode(first.completion_ids[:-1]) == " Ann."
    assert first.completion_ids.count(base.end) == 1
    assert first.completion_ids[-1] == base.end
    assert second.prompt_ids.count(base.end) == 1, "the end of the first answer"


def test_only_the_last_answer_has_labels(base, tmp_path):
    _, second = tasks.load_jsonl(write(tmp_path / "chat.jsonl", TALK), base)
    labels = tasks.collate([second], base.end, "cpu")["labels"][0]
    assert labels[labels != -100].tolist() == second.completion_ids


def test_the_answer_with_its_end_token_is_shown_as_trained_on(base, tmp_path):
    example, _ = tasks.load_jsonl(write(tmp_path / "chat.jsonl", TALK), base)
    prompt, completion = tasks.show_labels(example, base).split("\n")
    assert completion == 'trained on: " An" "n" "." "<|endoftext|>"'
    assert prompt.startswith('not trained on: "s" "y"') or prompt.startswith("not trained on: ")
    assert len(prompt.split('" "')) == len(example.prompt_ids)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], '"messages" must be a list of messages, got \\[\\]'),
        ("hello", '"messages" must be a list'),
        (["hello"], "a message must have a role and a content, and nothing else, got 'hello'"),
        ([TALK[0] | {"name": "x"}], "a message must have a role and a content, and nothing else"),
        (
            [{"role": "robot", "content": "x"}],
            "a role must be one of system, user, assistant, tool",
        ),
        ([{"role": "user", "content": ["x"]}], "a content must be text, got \\['x'\\]"),
        (TALK[:2], "no message is the assistant's"),
    ],
)
def test_a_conversation_that_cannot_be_used_is_refused_with_its_line(
    base, tmp_path, messages, message
):
    file = write(tmp_path / "chat.jsonl", TALK, messages)
    with pytest.raises(ValueError, match=f"chat.jsonl, line 2: {message}"):
        tasks.load_jsonl(file, base)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("chat_template.jinja", "{{ a }}", "{{ a }}"),
        ("tokenizer_config.json", json.dumps({"chat_template": "{{ b }}"}), "{{ b }}"),
        ("tokenizer_config.json", json.dumps({"chat_template": NAMED}), "{{ c }}"),
        ("tokenizer_config.json", json.dumps({"chat_template": 3}), None),
        ("tokenizer_config.json", "{}", None),
    ],
)  # fmt: skip
def test_a_chat_template_is_found_where_transformers_writes_it(tmp_path, name, text, found):
    assert chat.find_template(tmp_path) is None
    (tmp_path / name).write_text(text)
    assert chat.find_template(tmp_path) == found


def test_a_message_is_answered_in_the_template(monkeypatch, capfd, base):
    prompts = []

    def answer(model, base, ids, mask, **options):
        prompts.append(base.tokenizer.decode(ids[0].tolist(), skip_special_tokens=False))
        return torch.tensor([base.tokenizer.encode(" Ann.").ids + [base.end]])

    monkeypatch.setattr(evaluate, "continue_ids", answer)
    run(monkeypatch, "generate", "--base", SMALL, "--chat", "Who is it?")
    run(monkeypatch, "generate", "--base", SMALL, "--prompt", "It is")
    assert capfd.readouterr().out == "Ann.\nIt is Ann.\n"
    assert prompts == ["user: Who is it?\nassistant:", "It is"]


def test_evaluate_prints_losses_perplexities_and_answers(monkeypatch, capfd, base, tmp_path):
    file, text = tmp_path / "test.jsonl", tmp_path / "text.txt"
    lines = [{"prompt": "The names: Ann, Bob. The names:", "completion": " Ann, Bob."}] * 2
    file.write_text("\n".join(map(json.dumps, lines)))
    text.write_text("The cook is Sam Hill. " * 40)
    run(monkeypatch, "evaluate", "--base", str(BASE), "--test", str(file), "--text", str(text))
    first, second, third, _, *sample = capfd.readouterr().out.splitlines()
    examples = tasks.load_jsonl(file, base)
    loss = evaluate.task_loss(base.pretrained, examples, base.end)["loss"]
    assert second == f"{file}: loss {loss:.3f}, perplexity {math.exp(loss):.2f} (2 examples)"
    assert first.startswith(f"{text}: loss ")
    assert first.endswith("00 tokens)")
    assert third.startswith("exact match ")
    assert sample[:2] == ["prompt     The names: Ann, Bob. The names:", "reference  Ann, Bob."]


def test_what_evaluate_and_generate_need(monkeypatch, capfd):
    for words, message in (
        ("evaluate", "give --test examples, --text, or both"),
        ("generate", "give a --prompt to continue, or a --chat message to answer"),
        ("generate --prompt a --chat b", "--prompt cannot be used with --chat"),
    ):
        assert message in refused(monkeypatch, capfd, *words.split(), status=2)


@pytest.mark.slow
def test_an_adapter_trained_on_chats_says_so_and_generate_warns(monkeypatch, capfd, tmp_path):
    file, out = write(tmp_path / "chat.jsonl", TALK), str(tmp_path / "out")
    words = f"finetune --base {SMALL} --train {file} --validation {file} --steps 1 --output {out}"
    run(monkeypatch, *words.split())
    found = json.loads((tmp_path / "out" / "minipeft.json").read_text())
    assert (found["base"], found["bits"], found["chat_template"]) == (SMALL, None, "plain")
    capfd.readouterr()
    answer = f"generate --base {SMALL} --adapter {out} --max-new-tokens 2".split()
    run(monkeypatch, *answer, "--chat", "Who is it?")
    assert capfd.readouterr().err == ""
    run(monkeypatch, *answer, "--prompt", "Who is it?")
    warning = (
        f"warning: the adapter in {out} is used in another way: it was trained on chats (--chat)\n"
    )
    assert capfd.readouterr().err == warning
    run(monkeypatch, *answer, "--4bit", "--chat", "Who is it?")
    assert capfd.readouterr().err.endswith("it was trained on a base that was not quantized\n")
    (tmp_path / "out" / "minipeft.json").write_text('{"base": 3}')
    error = refused(monkeypatch, capfd, *answer, "--chat", "x")
    assert error.endswith("minipeft.json: base must be there, got 3")
