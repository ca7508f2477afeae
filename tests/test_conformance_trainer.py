"""transformers' Trainer with its default settings: it trains, saves and resumes adapters."""

import contextlib
import copy
import io
from pathlib import Path

import pytest
import torch
from conftest import BASE
from safetensors.torch import load_file
from test_conformance_transformers import EXAMPLE, Allocate, family
from torch import nn

import minipeft
from minipeft import GPT, LoraConfig, PeftModel, get_peft_model, quantize_model

pytestmark = pytest.mark.conformance
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

BASES = ["gpt2", "llama", "ours"]
TARGETS = {"gpt2": ["c_attn"], "ours": ["c_attn"], "llama": ["q_proj", "v_proj"]}
METHODS = {
    "lora": lambda targets: LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"),
    "qlora": lambda targets: LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"),
    "adalora": lambda targets: minipeft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=1, total_step=6, target_modules=targets
    ),
    "prompt": lambda targets: minipeft.PromptTuningConfig(
        num_virtual_tokens=4, task_type="CAUSAL_LM"
    ),
}


def base_model(kind: str, folder) -> nn.Module:
    if kind != "ours":
        return family(kind)
    family("gpt2").save_pretrained(folder)
    return GPT.from_pretrained(folder)


def adapted(kind: str, method: str, folder) -> PeftModel:
    base = base_model(kind, folder)
    if method == "qlora":
        quantize_model(base)
    torch.manual_seed(0)
    model = get_peft_model(base, METHODS[method](TARGETS[kind]))
    for p in model.parameters():
        if p.requires_grad:  # so that every factor gets a gradient
            nn.init.normal_(p, std=0.1)
    return model


def rows(labelled: list[int]) -> list[dict]:
    """Texts of 10 tokens, of which the given numbers have labels."""
    random, found = torch.Generator().manual_seed(3), []
    for n in labelled:
        ids = torch.randint(1, 61, (10,), generator=random)
        labels = torch.where(torch.arange(10) < n, ids, -100)
        found.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return found


def trainer(model, folder, data=None, **changes):
    """A Trainer for 6 steps that saves and evaluates every second one."""
    callbacks = changes.pop("callbacks", [])
    metrics = changes.pop("compute_metrics", None)
    settings = {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, "use_cpu": True}
    quiet = {"report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 2}
    arguments = transformers.TrainingArguments(str(folder), **(settings | quiet | changes))
    data = data or rows([10, 3, 10, 3, 7, 5])
    return transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=metrics,
        callbacks=[Allocate(), *callbacks],
    )  # fmt: skip


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_hold_the_adapter_and_a_resumed_run_ends_like_an_uninterrupted_one(
    kind, method, tmp_path
):
    whole = adapted(kind, method, tmp_path / "base")
    trainer(whole, tmp_path / "out").train()
    saved = load_file(tmp_path / "out" / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == whole.state_dict().keys()
    assert all(key.startswith("default.") for key in saved)
    resumed = adapted(kind, method, tmp_path / "base")
    checkpoint = str(tmp_path / "out" / "checkpoint-4")
    trainer(resumed, tmp_path / "again").train(resume_from_checkpoint=checkpoint)
    start = adapted(kind, method, tmp_path / "base").state_dict()
    for key, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor)
        assert key not in start or not torch.equal(start[key], tensor)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_no_parameter(kind, method, tmp_path):
    ends = []
    for checkpointing in (False, True):
        model = adapted(kind, method, tmp_path / "base")
        trainer(model, tmp_path / "out", gradient_checkpointing=checkpointing).train()
        ends.append(model.state_dict())
    for key, tensor in ends[0].items():
        assert torch.allclose(ends[1][key], tensor, rtol=1e-5, atol=1e-6), key


def gradient(model, folder, batch_size: int, accumulation: int) -> torch.Tensor:
    """What one step of SGD with learning rate 1 subtracts."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten() for p in trained])
    steps = trainer(
        model, folder, rows([10, 3, 10, 3]), max_steps=1, optim="sgd", learning_rate=1.0,
        lr_scheduler_type="constant", max_grad_norm=0, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    steps.callback_handler.callbacks = [
        c for c in steps.callback_handler.callbacks if not isinstance(c, Allocate)
    ]
    steps.train()
    return before - torch.cat([p.detach().flatten() for p in trained])


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_accumulated_gradients_are_those_of_the_whole_batch(kind, method, tmp_path):
    """Rows with 10 and with 3 labels: the mean over rows would be another gradient."""
    whole, parts = (
        gradient(adapted(kind, method, tmp_path / "base"), tmp_path / "out", *shape)
        for shape in ((4, 1), (1, 4))
    )
    assert (whole - parts).norm() <= 1e-5 * whole.norm()


def test_the_gradient_is_that_of_the_mean_loss_per_token(tmp_path):
    """By hand, for LoRA on our GPT: the Trainer's count of labels is that of the model."""
    found = gradient(adapted("ours", "lora", tmp_path / "base"), tmp_path / "out", 2, 2)
    model, batch = adapted("ours", "lora", tmp_path / "base"), rows([10, 3, 10, 3])
    batch = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
    model.train()(**batch).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_the_best_model_is_loaded_and_metrics_see_the_logits(kind, method, tmp_path):
    """Here the "best" loss is the highest, so the best model is the first and not the last."""
    shapes = set()

    def metrics(prediction) -> dict:
        shapes.add((prediction.predictions.shape, prediction.label_ids.shape))
        return {}

    model = adapted(kind, method, tmp_path / "base")
    run = trainer(
        model, tmp_path / "out", eval_strategy="steps", eval_steps=2, compute_metrics=metrics,
        load_best_model_at_end=True, greater_is_better=True,
    )  # fmt: skip
    run.train()
    losses = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert len(losses) == 3
    assert max(losses) > losses[-1]
    assert run.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-5)
    assert shapes == {((6, 10, 61), (6, 10))}
    without = [{"input_ids": row["input_ids"]} for row in rows([10, 10])]
    assert run.predict(without).predictions.shape == (2, 10, 61)


@pytest.mark.parametrize("kind", ["llama", "ours"])
@pytest.mark.parametrize("method", METHODS)
def test_smoothed_labels_are_shifted(kind, method, tmp_path):
    """With almost no smoothing, the Trainer's own loss is the model's.

    (transformers' GPT-2 alone gets 9/10 of it: the Trainer divides by all 10 labels of a row.)
    """
    model, data = adapted(kind, method, tmp_path / "base").eval(), rows([10, 10])
    found = trainer(model, tmp_path / "out", data, label_smoothing_factor=1e-9).evaluate()
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert found["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


class SaveAdapter(transformers.TrainerCallback):
    """Write peft's folder next to each checkpoint."""

    def on_save(self, args, state, control, model, **_):
        model.save_pretrained(f"{args.output_dir}/checkpoint-{state.global_step}")


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_a_callback_writes_pefts_folder_and_peft_reads_it(method, tmp_path):
    model = adapted("llama", method, tmp_path / "base")
    trainer(model, tmp_path / "out", callbacks=[SaveAdapter()]).train()
    reference = peft.PeftModel.from_pretrained(family("llama"), tmp_path / "out" / "checkpoint-6")
    ids = rows([10])[0]["input_ids"][None]
    with torch.no_grad():
        expected = reference.eval()(input_ids=ids).logits[:, -10:]
        assert torch.allclose(model.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_model_whose_forward_has_other_names_is_trained_and_saved(tmp_path):
    """nanoGPT's `forward(idx, targets)`, which returns (logits, loss)."""

    class Nano(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.fc = nn.Embedding(61, 24), nn.Linear(24, 61)

        def forward(self, idx, targets=None):
            logits = self.fc(self.wte(idx))
            if targets is None:
                return {"logits": logits}
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            return {"loss": loss, "logits": logits}

    model = get_peft_model(Nano(), LoraConfig(r=2, target_modules=["fc"]))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    data = [{"idx": row["input_ids"], "targets": row["input_ids"]} for row in rows([10] * 4)]
    run = trainer(model, tmp_path / "out", data, label_names=["targets"])
    run.train()
    saved = load_file(tmp_path / "out" / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == before.keys()
    assert all(not torch.equal(saved[key], before[key]) for key in saved)
    assert run.evaluate()["eval_loss"] > 0


def test_a_vision_model_is_trained_and_saved(tmp_path):
    size = {"image_size": 8, "patch_size": 4, "hidden_size": 24, "intermediate_size": 48}
    config = transformers.ViTConfig(
        **size, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    torch.manual_seed(0)
    model = get_peft_model(
        transformers.ViTForImageClassification(config),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    random = torch.Generator().manual_seed(0)
    data = [
        {"pixel_values": torch.randn(3, 8, 8, generator=random), "labels": i % 3} for i in range(6)
    ]
    run = trainer(model, tmp_path / "out", data)
    first = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < first
    saved = load_file(tmp_path / "out" / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()


@pytest.mark.parametrize("ours", [False, True])
def test_the_documents_example_trains_with_default_arguments_saves_loads_in_peft_and_merges(
    ours, tmp_path, monkeypatch
):
    base = family("gpt2")
    base.resize_token_embeddings(2048)
    base.save_pretrained(tmp_path / "gpt2")
    tokenizer = transformers.GPT2TokenizerFast(tokenizer_file=str(BASE / "tokenizer.json"))
    tokenizer.save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    example = EXAMPLE.replace("from peft import", "from minipeft import")
    if ours:
        example = example.replace("AutoModelForCausalLM.from", "GPT.from")
    names = {"GPT": GPT}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(example, names)
    model = names["peft_model"]
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    transformers.Trainer(
        model, transformers.TrainingArguments("out"), train_dataset=rows([10] * 16)
    ).train()
    model.eval().save_pretrained("my_lora_adapters")
    ids = rows([10])[0]["input_ids"][None]
    assert all(not torch.equal(tensor, start[key]) for key, tensor in model.state_dict().items())
    logits = model(ids).logits
    base = transformers.GPT2LMHeadModel.from_pretrained("gpt2")
    theirs = peft.PeftModel.from_pretrained(base, "my_lora_adapters").eval()
    assert torch.allclose(theirs(ids).logits, logits, rtol=1e-5, atol=1e-5)
    model.merge_and_unload().save_pretrained("merged")
    merged = transformers.GPT2LMHeadModel.from_pretrained("merged").eval()
    assert torch.allclose(merged(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_the_example_with_the_trainer_runs_and_peft_reads_its_checkpoint(tmp_path, monkeypatch):
    family("gpt2").save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[1] / "lessons" / "COMMANDS.md"
    blocks = [block.split("```")[0] for block in page.read_text().split("```python\n")[1:]]
    (block,) = [block for block in blocks if "TrainerCallback" in block]
    names = {"dataset": rows([10] * 8)}
    exec(block, names)
    (folder,) = (tmp_path / "out").iterdir()
    base = transformers.GPT2LMHeadModel.from_pretrained("gpt2")
    theirs, ids = peft.PeftModel.from_pretrained(base, folder).eval(), torch.tensor([[1, 2, 3]])
    assert torch.allclose(theirs(ids).logits, names["model"].eval()(ids).logits, atol=1e-5)


@pytest.mark.parametrize("kind", BASES)
def test_a_model_trained_in_bfloat16_can_be_copied_unwrapped_and_pickled(kind, tmp_path):
    model = adapted(kind, "lora", tmp_path / "base")
    run = trainer(model, tmp_path / "out", bf16=True)
    run.train()
    ids = rows([10])[0]["input_ids"][None]
    other = copy.deepcopy(model.eval())
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not other(input_ids=ids).logits.any()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    plain = run.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    expected = plain(input_ids=ids).logits  # in float32 again
    assert expected.any()
    assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-5)
