"""Trains every method for two steps on an accelerator that does not exist: see test_accelerator.py.

Arguments: pairs of a folder that contains minipeft and a case. Prints a JSON list with the error of
each case, or null.

PyTorch reserves a device type for accelerators from outside (PrivateUse1). Here it gets a name and
nothing else. Under `FakeTensorMode` tensors have shapes and devices but no values: nothing has to
be computed there, and an operation on tensors of two devices raises as it would on a GPU.

What this cannot detect:
- a CPU tensor without dimensions, a copy from one device to another, an index on the CPU: PyTorch
  allows them on a GPU too;
- a table on the CPU with an index on the device: a GPU refuses it at once, while here it only fails
  when the CPU's result meets the device. `torch._foreach_…` across devices is never detected;
- what only CUDA has (`pin_memory`, fused kernels), and autocast;
- values, and code that reads them: `generate`, validation, reports. `item()` and `tolist()` are
  stubbed, and the check for NaN before quantizing is removed.
"""

import importlib
import json
import os
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration

NAME = "pretended"
LORA = {"r": 2, "lora_dropout": 0.1, "target_modules": "all-linear"}
ADALORA = {"init_r": 3, "target_r": 2, "total_step": 4, "target_modules": "all-linear"}
PROMPT = {"num_virtual_tokens": 4}
LSTM = {"encoder_reparameterization_type": "LSTM"}
METHODS = {
    "lora": ("LoraConfig", LORA),
    "lora_tokens": ("LoraConfig", LORA | {"trainable_token_indices": [3, 5]}),
    "adalora": ("AdaLoraConfig", ADALORA),
    "prompt_tuning": ("PromptTuningConfig", PROMPT),
    "prompt_tuning_vocab": ("PromptTuningConfig", PROMPT | {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "p_tuning": ("PromptEncoderConfig", PROMPT),
    "p_tuning_lstm": ("PromptEncoderConfig", PROMPT | LSTM),
    "prefix_tuning": ("PrefixTuningConfig", PROMPT),
    "prefix_tuning_projection": ("PrefixTuningConfig", PROMPT | {"prefix_projection": True}),
    "bitfit": ("BitFitConfig", {}),
    "bottleneck": ("BottleneckConfig", {"target_modules": ["c_proj"], "bottleneck_size": 2}),
    "qlora": ("LoraConfig", LORA),
    "qlora_paged": ("LoraConfig", LORA),
}
CASES = [
    # everything is created on the CPU, then moved
    *(f"{name}-moved" for name in ("gpt", "gpt_checkpointed", *METHODS)),
    # the GPT is moved, then quantized and adapted there
    *(f"{name}-adapted_there" for name in METHODS if name != "qlora_paged"),
    # everything is created under `with torch.device(…)`, except what belongs on the CPU
    *(f"{name}-created_there" for name in ("gpt", "adalora", "prompt_tuning_vocab", "qlora_paged")),
    # an adapter is moved while another one is attached
    *(f"{name}-moved_while_detached" for name in ("lora", "prompt_tuning")),
]


def register() -> None:
    """Register the accelerator with PyTorch, once per process."""

    class Module(backend_registration._DummyBackendModule):
        """The part of what `torch.cuda` is for CUDA that gradient checkpointing needs."""

        def device(self, index: int):
            return nullcontext()

        def get_rng_state(self) -> Tensor:
            return torch.empty(0, dtype=torch.uint8, device="cpu")

        def set_rng_state(self, state: Tensor) -> None:
            pass

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())


class Pretending(FakeTensorMode):
    avoid_device_init = True  # constants are not computed there either


def read_on_the_host(tensor: Tensor) -> float:
    """`item()` for the step count, which is on the CPU so that nothing waits for the device."""
    assert tensor.device.type == "cpu", f"item() waits for {tensor.device}"
    return 1.0


@contextmanager
def pretending():
    """Fake tensors, with stubs for operations that need values."""
    FakeTensor.item = read_on_the_host
    FakeTensor.tolist = lambda tensor: [True] * len(tensor)  # AdaLoRA's report of the ranks
    swap = torch.utils.swap_tensors
    with Pretending(allow_non_fake_inputs=True) as mode:  # for qlora's tables, created at import

        def forget_and_swap(a: Tensor, b: Tensor) -> None:
            """What `.to` does to a parameter; it refuses one that is referenced elsewhere."""
            mode.fake_tensor_converter.meta_converter.tensor_memo.clear()
            swap(a, b)

        torch.utils.swap_tensors = forget_and_swap
        try:
            yield
        finally:
            torch.utils.swap_tensors = swap


def load(folder: str):
    """Import minipeft from a folder, completely, and remove its checks of values."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "minipeft"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    minipeft = importlib.import_module("minipeft")
    for name in minipeft.__all__:  # now: tables created while pretending would be fake tensors
        getattr(minipeft, name)
    sys.path.remove(folder)
    assert Path(minipeft.__file__).is_relative_to(folder)
    minipeft.qlora.check_finite = lambda tensor: None
    return minipeft


def build(minipeft, name: str, way: str) -> nn.Module:
    """The model of a case, on the accelerator."""
    shape = {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 1, "n_head": 3}
    model = minipeft.GPT(minipeft.GPTConfig(**shape))
    if name == "gpt_checkpointed":
        model.gradient_checkpointing_enable()
    if way == "adapted_there":
        model.to(NAME)
    if name.startswith("qlora"):
        minipeft.quantize_model(model)
    if name in METHODS:
        config, settings = METHODS[name]
        model = minipeft.get_peft_model(model, getattr(minipeft, config)(**settings))
        if way == "moved_while_detached":
            model.add_adapter("other", getattr(minipeft, config)(**settings))
    if way.startswith("moved"):
        model.to(NAME)
    if way == "moved_while_detached":
        model.set_adapter("other")
    return model.train()


def train(minipeft, name: str, model: nn.Module) -> None:
    """Two steps: tokens only, then with a mask and positions."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "qlora_paged":
        optimizer = minipeft.PagedAdamW(parameters, page_bytes=2048, device_budget_bytes=4096)
    else:
        optimizer = torch.optim.AdamW(parameters)
    ids = torch.zeros(3, 10, dtype=torch.long, device=NAME)
    batch = {"input_ids": ids, "labels": ids}
    for step, more in enumerate(({}, {"attention_mask": ids, "position_ids": ids}), 1):
        out = model(**batch, **more)
        out.loss.backward()
        optimizer.step()
        if hasattr(model, "update_and_allocate"):
            model.update_and_allocate(step)
        check_places(dict(tensors(model, out, optimizer)))
        optimizer.zero_grad()
    if name == "qlora_paged":
        state = optimizer.state_dict()
        check_places({f"saved {k}": t for s in state["state"].values() for k, t in s.items()})
        optimizer.load_state_dict(state)
        check_places({f"host of page {i}": p.host for i, p in enumerate(optimizer.pages)})


def tensors(model: nn.Module, out, optimizer: torch.optim.Optimizer):
    """Every tensor that exists after a step, by name."""
    yield "loss", out.loss
    yield "logits", out.logits
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, p in model.named_parameters():
        if p.requires_grad:
            yield f"gradient of {name}", p.grad
    for i, state in enumerate(optimizer.state.values()):
        held = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        yield from ((f"{key} of parameter {i}", value) for key, value in held.items())
    for i, page in getattr(optimizer, "resident", {}).items():
        yield f"page {i}", page
    for i, page in enumerate(getattr(optimizer, "pages", [])):
        yield f"host of page {i}", page.host
    adapter = getattr(model, "adapters", {}).get("default")
    allocator = getattr(adapter, "allocator", None)
    for key in ("importance", "uncertainty", "kept") if allocator else ():
        for name, tensor in getattr(allocator, key).items():
            yield f"{key} of {name}", tensor


def check_places(found: dict[str, Tensor]) -> None:
    """Raises AssertionError for a tensor on the wrong device."""
    for name, tensor in found.items():
        on_the_host = name.startswith(("step of", "host of", "saved"))
        place = "cpu" if on_the_host else NAME
        assert tensor.device.type == place, f"{name} is on {tensor.device}, not on {place}"


def run(minipeft, case: str) -> str | None:
    name, way = case.split("-")
    try:
        with pretending(), torch.device(NAME) if way == "created_there" else nullcontext():
            train(minipeft, name, build(minipeft, name, way))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


if __name__ == "__main__":
    register()
    loaded, results = None, []
    for folder, case in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        if folder != loaded:
            minipeft, loaded = load(folder), folder
        results.append(run(minipeft, case))
    print(json.dumps(results), flush=True)
    os._exit(0)  # the accelerator's thread would abort when Python ends
