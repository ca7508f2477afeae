"""Opening a base: its weights, tokenizer, end token and held-out text; and the data folder."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import BASE, tiny_config
from tokenizers.processors import TemplateProcessing

from minipeft import GPT
from minipeft.lab import DATA, real
from minipeft.lab.base import (
    copy_tokenizer,
    encode_prompt,
    find,
    load_base,
    load_tokenizer,
    read_text,
    windows,
)

SMALL = BASE.parent / "0.3m"


@pytest.fixture
def folder(tmp_path):
    """A copy of the smallest base, without held-out text."""
    return shutil.copytree(SMALL, tmp_path / "base")


def change_config(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_base_without_an_end_token_is_refused(folder):
    change_config(folder, eos_token_id=None)
    with pytest.raises(ValueError, match="eos_token_id is None, which is not a token"):
        load_base(folder)


@pytest.mark.parametrize("named", ["<|endoftext|>", {"content": "<|endoftext|>"}])
def test_the_tokenizer_config_may_name_the_end_token(folder, named):
    change_config(folder, eos_token_id=50256)  # GPT-2's, which this vocabulary does not have
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    base = load_base(folder)
    assert base.end == base.pretrained.config.eos_token_id == 0


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder):
    GPT(tiny_config()).save_pretrained(folder)
    with pytest.raises(ValueError, match="a token with id 2047, but the model has only 61"):
        load_base(folder)


def test_a_missing_or_damaged_tokenizer_is_refused(folder):
    file = folder / "tokenizer.json"
    for text, message in (
        ("{}", r"tokenizer\.json cannot be used: "), ("[]", "must be a JSON object"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        load_tokenizer(folder)


GPT_4 = (  # and others like it: repeated groups only seem to be there, in a character class
    r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[()*+^\s\p{L}]+[\r\n]*|\s*[\r\n]+|\s+"
)


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        (GPT_4, True), (r"(a|b)?c", True), (r"\w+\w*\w{2}", True), (r"\)+a*\(*", True),
        (r"(a+)+$", False), (r"(a|b)*", False), (r"(ab){3}", False), (r"a*b*c*d*", False),
        (r"[)]+(x)+", False),
    ],
)  # fmt: skip
def test_a_tokenizer_whose_patterns_could_hang_is_refused(folder, pattern, allowed):
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text())
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    found["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, found["pre_tokenizer"]]}
    file.write_text(json.dumps(found))
    if allowed:
        load_tokenizer(folder)
        return
    with pytest.raises(ValueError, match=r"tokenizer\.json: the pattern '.*' may take too long"):
        load_tokenizer(folder)


def test_held_out_text_comes_in_windows_of_100_tokens(base):
    assert base.held_out.shape == (4, 100)
    assert base.held_out[0, 0] != base.end


def test_held_out_text_is_read_from_the_base_or_from_the_folder_above(folder):
    assert load_base(folder).held_out is None
    words = "The cook is Sam Hill and the clerk is Ann Mills. " * 20
    (folder.parent / "held_out.txt").write_text(words * 2)
    two = load_base(folder).held_out
    (folder / "held_out.txt").write_text(words)
    one = load_base(folder).held_out
    assert 1 <= len(one) < len(two)


def test_windows_of_a_small_context_are_shorter(folder):
    (folder / "held_out.txt").write_text("The cook is Sam Hill. " * 20)
    model = GPT(tiny_config(vocab_size=2048))
    model.save_pretrained(folder)
    assert load_base(folder).held_out.shape[1] == 32


def test_a_copy_of_the_model_shares_nothing_with_the_base(base):
    copied, weight = base.model(), base.pretrained.lm_head.weight
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert weight.any()


def test_windows_start_with_a_document_where_possible():
    rows = windows([[1] * 3, [2] * 3, [3] * 9, [4]], 4, 0)
    assert rows.tolist() == [[1, 1, 1, 0], [2, 2, 2, 0], [3] * 4, [3] * 4]


def test_text_that_fills_no_window_is_refused():
    assert windows([[1] * 3], 4, 0).tolist() == [[1, 1, 1, 0]]
    with pytest.raises(ValueError, match="the text has fewer than 4 tokens"):
        windows([[1] * 2], 4, 0)


def test_documents_are_separated_by_the_end_token(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one\n<|endoftext|>\n two <|endoftext|>\n")
    assert read_text(file) == ["one", "two"]
    file.write_text("\n<|endoftext|> \n")
    with pytest.raises(ValueError, match="contains no text"):
        read_text(file)


def test_a_plain_checkout_finds_its_data_folder():
    """Without an installation there is no package minipeft.data."""
    code = "import minipeft.lab; print(minipeft.lab.DATA)"
    # -S ignores site-packages, and with it an installed minipeft
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(DATA.parent)}, cwd="/", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == str(DATA), done.stderr


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>", "<s> $A", "$A"])
def test_no_end_token_stands_between_a_prompt_and_its_completion(template):
    """Special tokens that the tokenizer puts in front stay, and those that the text names too."""
    tokenizer = load_tokenizer(SMALL)
    plain = tokenizer.encode("The name is<|endoftext|>").ids
    special = [("<s>", 5), ("</s>", 0)]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    front = [5] if "<s>" in template.split() else []
    assert encode_prompt(tokenizer, "The name is<|endoftext|>") == front + plain


@pytest.mark.parametrize(("ends", "written"), [(50256, 0), (0, 0), ([7, 0], [7, 0]), (None, 0)])
def test_chat_template_and_generation_settings_are_copied_with_a_valid_end(
    folder, tmp_path, ends, written
):
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    settings = {"temperature": 0.7, "eos_token_id": ends}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    merged = tmp_path / "merged"
    merged.mkdir()
    copy_tokenizer(load_base(folder), merged)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (folder / name).read_bytes()
    found = json.loads((merged / "generation_config.json").read_text())
    assert found == {"temperature": 0.7, "eos_token_id": written}


def test_a_tokenizer_config_of_transformers_names_the_end_token(folder):
    change_config(folder, eos_token_id=50256)
    settings = {"model_max_length": 10**30, "eos_token": "<|endoftext|>"}  # 10³⁰: no limit
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_base(folder).end == 0


def test_only_what_looks_like_a_name_on_the_hub_is_downloaded(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("minipeft.pretrained.download", lambda name: asked.append(name) or tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name in ("model", "out/model", "a/b/c", "../model", str(tmp_path / "model")):
        assert str(find(name)) == name
    assert asked == []
    assert find("someone/model-1.5B") == tmp_path
    assert asked == ["someone/model-1.5B"]


def test_a_base_from_the_hub_keeps_its_name_there(monkeypatch, folder):
    monkeypatch.setattr("minipeft.pretrained.download", lambda name: folder)
    base = load_base("someone/model-1.5B")
    assert (base.name, base.folder) == ("model-1.5B", str(folder))
    assert base.pretrained.name_or_path == "someone/model-1.5B", (
        "not a cache folder of this machine"
    )


def test_a_base_that_is_given_away_keeps_its_checksum(folder):
    base = load_base(folder)
    before = base.digest()
    base.given_away = True
    model = base.model()
    assert model is base.pretrained
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert base.digest() == before


@pytest.mark.parametrize(
    ("kind", "needed"), [("llama", True), ("gpt2", False), (None, False), (3, False)]
)
def test_transformers_is_needed_for_models_that_are_no_gpt2(folder, kind, needed):
    change_config(folder, model_type=kind)
    assert real.is_for_transformers(folder) == needed
    assert real.is_for_transformers(folder / "model.gguf")
    assert not real.is_for_transformers(folder / "nothing")


def test_without_transformers_the_error_says_how_to_install_it(folder, monkeypatch):
    change_config(folder, model_type="llama")
    monkeypatch.setitem(sys.modules, "transformers", None)  # its import fails
    with pytest.raises(ValueError, match=r"needs transformers: pip install 'minipeft\[real\]'"):
        load_base(folder)
