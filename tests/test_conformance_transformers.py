"""With transformers: the document's own example, the Trainer, and three families of models."""

import contextlib
import io

import pytest
import torch
from conftest import BASE
from test_adapters import checksum
from test_conformance import ALL, close, theirs  # noqa: F401
from test_conformance_methods import METHODS, TASK, configs
from test_lora import filled

from minipeft import GPT, LoraConfig, PeftModel, get_peft_model
from minipeft.peft_model import quantize_model

pytestmark = pytest.mark.conformance
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

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
def test_the_documents_example_runs_with_one_word_changed(
    theirs,  # noqa: F811
    tmp_path,
    monkeypatch,
    ours,
):
    """It prints what it prints with peft, but for the class; on our GPT two words are changed.

    Then the lines that it leaves out are run: saving and loading.
    """
    theirs.resize_token_embeddings(2048).requires_grad_(True)
    theirs.save_pretrained(tmp_path / "gpt2")
    tokenizer = transformers.GPT2TokenizerFast(tokenizer_file=str(BASE / "tokenizer.json"))
    tokenizer.save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    changed = EXAMPLE.replace("from peft import", "from minipeft import")
    if ours:
        changed = changed.replace("AutoModelForCausalLM.from", "GPT.from")
    told, reference, mine = [], {}, {"GPT": GPT, "PeftModel": PeftModel}
    for code, names in ((EXAMPLE, reference), (changed, mine)):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, names)
        told.append(out.getvalue())
    assert "trainable params: 6,144 || all params: 70,560 || trainable%: 8.7075\n" in told[0]
    assert told[1] == told[0].replace("peft.peft_model.PeftModelForCausalLM", str(PeftModel)[8:-2])
    assert close(mine["logits"], reference["logits"])
    model, inputs = mine["peft_model"], mine["inputs"]
    filled(model.adapters["default"].layers)
    lines = [line[2:] for line in changed.splitlines() if line.startswith("# ") and "(" in line]
    left_out = [line for line in lines if "my_lora" in line or line.startswith("base_model =")]
    assert len(left_out) == 3
    exec("\n".join(left_out), mine)
    loaded = mine["loaded_peft_model"]
    assert close(loaded(**inputs).logits, model(**inputs).logits)
    assert not close(loaded(**inputs).logits, mine["logits"])
    again = peft.PeftModel.from_pretrained(theirs, "my_lora_adapters")
    assert close(again(**inputs).logits, model(**inputs).logits)


# --- the Trainer ---


class Allocate(transformers.TrainerCallback):
    """What AdaLoRA needs: its ranks are moved after every optimizer step."""

    def on_optimizer_step(self, args, state, control, model, **_):
        model.update_and_allocate(state.global_step + 1)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("name", ["lora", "qlora", *METHODS])
def test_the_trainer_trains_an_adapter_and_nothing_else(theirs, ids, tmp_path, name, ours):  # noqa: F811
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
        per_device_train_batch_size=3, save_strategy="no", report_to=[], disable_tqdm=True,
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
    moved = model.adapters["default"].tensors()
    assert all(not torch.equal(tensor, start[key]) for key, tensor in moved.items())
    assert checksum(model.unload()) == before
