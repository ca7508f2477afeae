"""Chats: conversations become prompts and completions.

A line of a chat file is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant",
"content": "…"}, …]}. Every answer of the assistant becomes an example: its prompt is all that comes
before the answer, its completion is the answer with the end token. So the loss is taken on the
assistant's tokens only.

How messages become one text is the job of a chat template. Most tokenizers of chat models have one,
a small program in the language Jinja, which transformers runs. For all others we use this one:

    system: You answer in one sentence.
    user: What is a tide?
    assistant: It is the sea, which rises and falls twice a day.<|endoftext|>
"""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minipeft import files

PLAIN = "plain"  # the name of the template above
ROLES = ("system", "user", "assistant", "tool")
LONGEST = 2**16  # characters of a template
SECONDS = 5  # for one conversation: a template is a program, and could run forever


def find_template(folder: Path) -> str | None:
    """The chat template in a tokenizer's folder."""
    if (file := folder / "chat_template.jinja").is_file():
        return files.read_text(file, LONGEST)
    if not (file := folder / "tokenizer_config.json").is_file():
        return None
    found = files.read_json(file, largest=10**40).get("chat_template")
    if isinstance(found, list):  # several, each with a name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def render(base, messages: list[dict], answer_follows: bool) -> str:
    """Messages as one text. If an answer follows, the text ends where the answer begins.

    Raises ValueError for messages that the base's template does not accept.
    """
    if base.template is None:
        end = base.tokenizer.id_to_token(base.end)
        lines = [f"{m['role']}: {m['content']}" for m in messages]
        lines = [x + end * (m["role"] == "assistant") for x, m in zip(lines, messages, strict=True)]
        return "\n".join([*lines, "assistant:"] if answer_follows else [*lines, ""])
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        raise ValueError(
            "this base has a chat template, and transformers runs it: pip install 'minipeft[real]'"
        ) from error
    try:
        with time_limit(SECONDS):
            (text,), _ = render_jinja_template(
                [messages], chat_template=base.template, add_generation_prompt=answer_follows,
                **base.special_tokens,
            )  # fmt: skip
    except Exception as error:  # jinja2 has many, and a template may raise its own
        raise ValueError(f"the chat template: {files.one_line(error)}") from error
    return text


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block after some seconds. Works in the main thread only."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_):
        raise TimeoutError(f"it takes longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_messages(messages) -> None:
    """Raises ValueError for anything but a list of messages with an answer of the assistant."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"messages" must be a list of messages, got {files.show(messages)}')
    for message in messages:
        keys = set(message) if isinstance(message, dict) else set()
        if keys != {"role", "content"}:
            raise ValueError(
                f"a message must have a role and a content, and nothing else, got "
                f"{files.show(message)}"
            )
        if message["role"] not in ROLES:
            known = ", ".join(ROLES)
            raise ValueError(f"a role must be one of {known}, got {files.show(message['role'])}")
        if not isinstance(message["content"], str):
            raise ValueError(f"a content must be text, got {files.show(message['content'])}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is the assistant's, so there is nothing to learn")


def turns(base, messages: list[dict]) -> Iterator[tuple[list[dict], str, str]]:
    """For every answer of the assistant: the messages up to it, and the prompt and the completion
    as the template writes them."""
    check_messages(messages)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(base, messages[:i], answer_follows=True)
        text = render(base, messages[: i + 1], answer_follows=False)
        if not text.startswith(prompt):
            raise ValueError(
                "the chat template changes earlier messages when an answer follows: "
                f"{json.dumps(prompt[-60:])} is not how the text with the answer goes on"
            )
        yield messages[: i + 1], prompt, text[len(prompt) :]
