"""minipeft with transformers: a script written for peft, the Trainer, GPT-2, Llama and T5."""

import contextlib
import copy
import io

import pytest
import torch
from conftest import BASE
from test_adapters import checksum
from test_conformance import ALL, close, copy_trainable, near, theirs, trainable  # noqa: F401
from test_conformance_methods import METHODS, TASK, configs, logits
from test_lora import filled

import minipeft
from minipeft import (
    GPT,
    BitFitConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
    quantize_model,
)

pytestmark = pytest.mark.conformance
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
PROMPTS = [name for name in METHODS if name != "adalora"]

EXAMPLE = r"""
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import LoraConfig, get_peft_model, TaskType
import torch

# 1. Load a pre-trained model and tokenizer (e.g., GPT-2)
# In a real scenario, you'd load a much larger model like Llama-2
model_name = "gpt2"
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name)

# Ensure tokenizer has a pad_token, crucial for batching
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token

# 2. Define LoRA Configuration
# target_modules are typically the attention projection layers (query, key, value)
# lora_alpha is a scaling factor, r is the rank
lora_config = LoraConfig(
    task_type=TaskType.CAUSAL_LM, # Specify the task (e.g., Causal Language Modeling)
    inference_mode=False,         # Set to True for inference, False for training
    r=8,                          # LoRA rank. Lower values mean fewer parameters.
    lora_alpha=32,                # Scaling factor for LoRA weights
    lora_dropout=0.1,             # Dropout probability for LoRA layers
    target_modules=["c_attn", "c_proj", "c_fc"] # Modules to apply LoRA to.
)

# 3. Get the PEFT model
# This wraps the base model, injecting LoRA adapters
peft_model = get_peft_model(model, lora_config)

# Print trainable parameters to see the significant reduction
print("Trainable parameters after applying LoRA:")
peft_model.print_trainable_parameters()

# Verify that only a small fraction of parameters are now trainable
# Example of a forward pass (not actual training loop)
input_text = "The quick brown fox jumps over the lazy"
inputs = tokenizer(input_text, return_tensors="pt")

with torch.no_grad():
    outputs = peft_model(**inputs)
    logits = outputs.logits

print(f"\nModel class after PEFT: {type(peft_model)}")
print("PEFT model successfully created and ready for training (e.g., with Trainer).")

# To save the adapter weights only:
# peft_model.save_pretrained("./my_lora_adapters")

# To load adapters onto a base model later:
# base_model = AutoModelForCausalLM.from_pretrained(model_name)
# loaded_peft_model = PeftModel.from_pretrained(base_model, "./my_lora_adapters")
"""


@pytest.mark.parametrize("ours", [False, True])
def test_a_script_written_for_peft_runs_with_one_word_changed(
    theirs,  # noqa: F811
    tmp_path,
    monkeypatch,
    ours,
):
    """It prints what it prints with peft, except the class. With our GPT, two words are changed.

    Its commented lines, which save and load the adapter, run too.
    """
    theirs.resize_token_embeddings(2048).requires_grad_(True)
    theirs.save_pretrained(tmp_path / "gpt2")
    tokenizer = transformers.GPT2TokenizerFast(tokenizer_file=str(BASE / "tokenizer.json"))
    tokenizer.save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    changed = EXAMPLE.replace("from peft import", "from minipeft import")
    if ours:
        changed = changed.replace("AutoModelForCausalLM.from", "GPT.from")
    printed, reference, mine = [], {}, {"GPT": GPT, "PeftModel": PeftModel}
    for code, names in ((EXAMPLE, reference), (changed, mine)):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, names)
        printed.append(out.getvalue())
    assert "trainable params: 6,144 || all params: 70,560 || trainable%: 8.7075\n" in printed[0]
    class_names = "peft.peft_model.PeftModelForCausalLM", str(PeftModel)[8:-2]
    assert printed[1] == printed[0].replace(*class_names)
    assert close(mine["logits"], reference["logits"])
    model, inputs = mine["peft_model"], mine["inputs"]
    filled(model.adapters["default"].layers)
    lines = [line[2:] for line in changed.splitlines() if line.startswith("# ") and "(" in line]
    commented = [line for line in lines if "my_lora" in line or line.startswith("base_model =")]
    assert len(commented) == 3
    exec("\n".join(commented), mine)
    loaded = mine["loaded_peft_model"]
    assert close(loaded(**inputs).logits, model(**inputs).logits)
    assert not close(loaded(**inputs).logits, mine["logits"])
    again = peft.PeftModel.from_pretrained(theirs, "my_lora_adapters")
    assert close(again(**inputs).logits, model(**inputs).logits)


# --- the Trainer ---


class Allocate(transformers.TrainerCallback):
    """AdaLoRA moves its ranks after every optimizer step."""

    def on_optimizer_step(self, args, state, control, model, **_):
        model.update_and_allocate(state.global_step + 1)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("name", ["lora", "qlora", *METHODS])
def test_the_trainer_trains_the_adapter_and_nothing_else(theirs, ids, tmp_path, name, ours):  # noqa: F811
    theirs.save_pretrained(tmp_path)
    base = GPT.from_pretrained(tmp_path) if ours else theirs
    if name == "qlora":
        quantize_model(base)
    if name in METHODS:
        config = configs(name)[1]
    else:
        config = LoraConfig(target_modules=ALL, lora_dropout=0.1, **TASK)
    before = checksum(base)
    model = get_peft_model(base, config)
    start = {key: tensor.clone() for key, tensor in model.adapters["default"].tensors().items()}
    steps = 20 if name == "adalora" else 8
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=steps, learning_rate=1e-2, use_cpu=True,
        per_device_train_batch_size=3, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    rows = [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids
    ]
    trainer = transformers.Trainer(
        model, settings, train_dataset=rows, eval_dataset=rows, callbacks=[Allocate()]
    )
    first = trainer.evaluate()["eval_loss"]
    assert trainer.train().global_step == steps
    assert trainer.evaluate()["eval_loss"] < first - 0.01
    if name == "adalora":
        assert sum(model.ranks().values()) == 3 * 8
    end = model.adapters["default"].tensors()
    assert all(not torch.equal(tensor, start[key]) for key, tensor in end.items())
    assert checksum(model.unload()) == before


# --- families ---

SMALL = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **SMALL, n_positions=32, n_embd=24, n_layer=2, n_head=3, embd_pdrop=0.0,
            attn_pdrop=0.0, resid_pdrop=0.0,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SMALL, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            **SMALL, d_model=24, d_kv=6, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ),
}  # fmt: skip
TARGETS = {
    "gpt2": ALL,
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "t5": ["q", "v", "o", "wi", "wo"],
}


def family(kind: str):
    torch.manual_seed(0)
    model = (
        FAMILIES[kind]().eval().requires_grad_(False)
    )  # kernels depend on what requires gradients
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    return model


def step(model, ids) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Take an optimizer step. Returns the loss and the adapter's gradients."""
    parameters = trainable(model)
    loss = model.train()(input_ids=ids, labels=ids)[0]
    loss.backward()
    gradients = [p.grad.clone() for p in parameters]
    torch.optim.AdamW(parameters, lr=0.1).step()
    model.eval()
    return loss.detach(), gradients


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["LoraConfig", "AdaLoraConfig", "qlora"])
def test_a_weight_method_on_a_family_of_models_matches_peft_and_merges(ids, kind, name):
    """A training step matches peft, merging keeps the logits, and the base is unchanged."""
    model = family(kind)
    named = {"decoder_input_ids": ids[:, :4]} if kind == "t5" else {}
    settings = {"target_modules": TARGETS[kind], "lora_alpha": 12}
    settings["task_type"] = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    if name == "AdaLoraConfig":
        settings |= {"init_r": 4, "target_r": 2, "total_step": 1}
    reference = None
    if name == "qlora":
        quantize_model(model)
    else:
        reference = peft.get_peft_model(family(kind), getattr(peft, name)(**settings))
    own = LoraConfig if name == "qlora" else getattr(minipeft, name)
    before, plain = checksum(model), model(ids, **named).logits
    mine = get_peft_model(model, own(**settings))
    if reference is not None:
        copy_trainable(reference, mine)
    first, gradients = step(mine, ids)
    assert any(gradient.any() for gradient in gradients)
    if reference is not None:
        expected = step(reference, ids)
        assert near(first, expected[0])
        assert all(map(near, gradients, expected[1]))
        assert near(mine(ids, **named).logits, reference(input_ids=ids, **named).logits)
    mine.update_and_allocate(1)
    adapted = mine(ids, **named).logits
    assert not near(adapted, plain, 1e-4)
    mine.merge_adapter()
    assert near(mine(ids, **named).logits, adapted)
    mine.unmerge_adapter()
    assert torch.equal(mine(ids, **named).logits, adapted)
    merged = mine.merge_and_unload()
    assert type(merged) is type(model)
    assert near(merged(ids, **named).logits, adapted)
    new = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(merged.generate(ids, **new), mine.generate(ids, **new))
    assert checksum(mine.unload()) == before
    assert torch.equal(model(ids, **named).logits, plain)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_method_on_a_family_of_models_matches_peft(ids, kind, name):
    """A training step matches peft, and the base is unchanged. T5 is refused, with the reason."""
    model, (their_config, own_config) = family(kind), configs(name)
    before = checksum(model)
    if kind == "t5":
        with pytest.raises(ValueError, match="need a decoder; this is an encoder-decoder model"):
            get_peft_model(model, own_config)
        assert checksum(model) == before
        return
    plain, another = model(ids).logits, family(kind)
    torch.manual_seed(3)
    reference = peft.get_peft_model(another, their_config)
    torch.manual_seed(3)
    mine = get_peft_model(model, own_config)
    first, gradients = step(mine, ids)
    expected = step(reference, ids)
    assert near(first, expected[0])
    assert all(map(near, gradients, expected[1]))
    assert near(logits(mine, ids), logits(reference, ids))
    assert not near(logits(mine, ids), plain, 1e-2)
    with pytest.raises(ValueError, match="it changes the input, not the weights"):
        mine.merge_and_unload()
    assert checksum(mine.unload()) == before
    assert torch.equal(model(ids).logits, plain)


# --- what goes into a quantized model comes out again ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_merged_quantized_model_is_of_the_bases_classes_and_survives_saving(
    kind, bits, prepared, dtype, ids, tmp_path
):
    """The reference is the adapted model in float32, within the precision of the model's dtype."""
    base = family(kind)
    for p in base.parameters():  # like from_pretrained(dtype=…), which keeps buffers in float32
        p.data = p.data.to(dtype)
    named = {"decoder_input_ids": ids[:, :4]} if kind == "t5" else {}
    classes = {name: type(module) for name, module in base.named_modules()}
    quantize_model(base, bits)
    if prepared:
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    with pytest.raises(ValueError, match="save the adapter with PeftModel"):
        base.save_pretrained(tmp_path)
    if bits == 8:  # for inference: no method but BitFit trains on it
        config = BitFitConfig(target_modules=None if kind == "gpt2" else TARGETS[kind])
        model = get_peft_model(base, config) if kind == "gpt2" else PeftModel(base)
    else:
        model = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS[kind]))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.05)
    with pytest.raises(ValueError, match="save the adapter with PeftModel"):
        model.base_model.save_pretrained(tmp_path)
    if model.active_adapter is None:
        return
    exact = copy.deepcopy(model).float().eval()(ids, **named).logits
    merged = model.merge_and_unload().eval()
    wanted = torch.float32 if prepared else dtype
    assert {p.dtype for p in merged.parameters()} == {wanted}
    assert {name: type(module) for name, module in merged.named_modules()} == classes
    found = merged(ids, **named).logits
    assert near(found.float(), exact, 40 * torch.finfo(wanted).eps)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, dtype=wanted).eval()
    assert again.state_dict().keys() == merged.state_dict().keys()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[key]), key
    assert near(again(ids, **named).logits.float(), found.float(), 40 * torch.finfo(wanted).eps)
