"""One interface for all methods: put an adapter on a model, train it, switch it, save it, merge it.

A weight method (LoRA, so far) makes a set of layers, each around the layer it adapts. An adapter is
such a set with its config. One set at a time is in place; switching takes it out and puts another
in, and with none in place the model is the base, to the bit. Files are Hugging Face peft's:
`adapter_config.json` and `adapter_model.safetensors` with peft's keys.

A new method is one file beside this one and one line in METHODS.
"""

import abc
import copy
import enum
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minipeft.lora import LoraConfig, lora_layers

# peft_type: the config's class, and the function that makes an adapter's layers for a model.
METHODS = {"LORA": (LoraConfig, lora_layers)}

# Keys of a peft config that we have no use for: free ones, and those with a default that is not
# empty. Any other key that we do not know has to be null, false or empty, as it is by default.
FREE_KEYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "peft_version",
    "revision",
}
DEFAULTS = {
    "bias": "none",
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}


class TaskType(str, enum.Enum):
    """What a model is used for; peft's names."""

    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"


class PeftConfig(abc.ABC):
    """The class that every method's config belongs to: `isinstance(config, PeftConfig)`."""

    @staticmethod
    def from_pretrained(path: str | Path):
        """The config in a folder that peft or minipeft wrote.

        Raises ValueError for a file that cannot be read, a method that is not here, and a setting
        that we do not implement, by name.
        """
        file = Path(path) / "adapter_config.json"
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        peft_type = found.get("peft_type") if isinstance(found, dict) else None
        if peft_type not in METHODS:
            raise ValueError(f"{file}: peft_type is {peft_type!r}; here are {', '.join(METHODS)}")
        config_class = METHODS[peft_type][0]
        names = {field.name for field in fields(config_class) if field.init}
        others = {k: v for k, v in found.items() if k not in names and k != "peft_type"}
        for key, value in others.items():
            if (
                key in FREE_KEYS
                or value == DEFAULTS.get(key)
                or (key not in DEFAULTS and not value)
            ):
                continue
            raise ValueError(f"{file}: {key} is {value!r}, and that is not implemented here")
        try:
            config = config_class(**{k: v for k, v in found.items() if k in names})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
        config.other_keys = others  # written back by save_pretrained
        return config


for _config_class, _ in METHODS.values():
    PeftConfig.register(_config_class)


@dataclass
class Adapter:
    """A config and the layers that belong to it, in place or not."""

    config: PeftConfig
    layers: dict[str, nn.Module]  # by the name of the layer that each adapts

    def tensors(self) -> dict[str, Tensor]:
        """What is trained and saved, under peft's keys; nothing of the base."""
        return {
            f"base_model.model.{name}.{key}": tensor
            for name, layer in self.layers.items()
            for key, tensor in layer.state_dict().items()
            if not key.startswith("base_layer.")
        }


class PeftModel(nn.Module):
    """A model with adapters, one of them in place. Make it with `get_peft_model`.

    The base's weights are never written to, except by `merge_and_unload(inplace=True)`.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None = None,
        adapter_name: str = "default",
    ):
        super().__init__()
        if isinstance(model, PeftModel):
            raise ValueError("this model is a PeftModel already: use its add_adapter")
        self.base_model = model
        self.adapters: dict[str, Adapter] = {}  # a plain dict: sets not in place are not submodules
        self.active_adapter: str | None = None
        self.in_place = False
        self.train(model.training)
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config)

    # --- running ---

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values=None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
    ):
        """What the base returns, with the active adapter at work. None is not handed on."""
        named = {
            "attention_mask": attention_mask,
            "labels": labels,
            "inputs_embeds": inputs_embeds,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
            "use_cache": use_cache,
        }
        first = () if input_ids is None else (input_ids,)
        return self.base_model(*first, **{k: v for k, v in named.items() if v is not None})

    def generate(self, *args, **kwargs) -> Tensor:
        """The base's own `generate`, with the active adapter at work."""
        return self.base_model.generate(*args, **kwargs)

    # --- adapters ---

    def add_adapter(self, adapter_name: str, config: PeftConfig) -> None:
        """Make a new adapter. The first one is put in place, a later one waits for
        `set_adapter`."""
        if getattr(config, "peft_type", None) not in METHODS:
            raise TypeError(
                f"{config!r} is not a config of a method; those are: {', '.join(METHODS)}"
            )
        self._register(adapter_name, lambda: Adapter(config, _make_layers(self.base_model, config)))

    def load_adapter(self, path: str | Path, adapter_name: str, is_trainable: bool = False) -> None:
        """Read an adapter's folder, ours or peft's; frozen unless `is_trainable`.

        Raises ValueError, before anything is changed, for a damaged file, an adapter of another
        model, tensors that are missing, surplus or of another shape.
        """
        self._register(
            adapter_name, lambda: _read_adapter(self.base_model, Path(path), is_trainable)
        )

    def set_adapter(self, adapter_name: str) -> None:
        """Take the adapter that is in place out and put another one in."""
        self._check_name(adapter_name)
        self._take_out()
        self.active_adapter = adapter_name
        self._put_in()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Deleting the active one activates the first that is left."""
        self._check_name(adapter_name)
        if len(self.adapters) == 1:
            raise ValueError(f"{adapter_name!r} is the only adapter: use unload() to get the base")
        if adapter_name == self.active_adapter:
            self.set_adapter(next(name for name in self.adapters if name != adapter_name))
        del self.adapters[adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within `with model.disable_adapter():` the model is the base, to the bit."""
        with self._taken_out():
            yield

    def merge_adapter(self) -> None:
        """Let the active adapter's layers compute with W' = W + ΔW. Nothing of the base changes."""
        for layer in self._active.layers.values():
            layer.merge()

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`, to the bit."""
        for layer in self._active.layers.values():
            layer.unmerge()

    def merge_and_unload(self, inplace: bool = False) -> nn.Module:
        """A plain model of the base's class whose layers hold W'.

        It is a copy, and this model stays as it is. `inplace` saves the copy: the base's weights
        are overwritten, and the adapters, made for the old ones, are gone.
        """
        names = list(self._active.layers)
        model = self.base_model if inplace else copy.deepcopy(self.base_model)
        for name in names:
            model.set_submodule(name, model.get_submodule(name).merge_into_base())
        if inplace:
            self.adapters, self.active_adapter, self.in_place = {}, None, False
        return model

    def unload(self) -> nn.Module:
        """The base, without any adapter."""
        self._take_out()
        self.adapters, self.active_adapter = {}, None
        return self.base_model

    # --- counting, saving ---

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, the base's and the active adapter's; a shared one once."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print the counts in peft's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write every adapter as peft does: the first into the folder, others into subfolders."""
        for i, (name, adapter) in enumerate(self.adapters.items()):
            folder = Path(path) / name if i else Path(path)
            folder.mkdir(parents=True, exist_ok=True)
            config = asdict(adapter.config) | getattr(adapter.config, "other_keys", {})
            text = json.dumps(config | {"inference_mode": True}, indent=2, sort_keys=True) + "\n"
            tensors = {key: tensor.contiguous() for key, tensor in adapter.tensors().items()}

            def write_tensors(file: str, tensors: dict = tensors) -> None:
                save_file(tensors, file, metadata={"format": "pt"})

            def write_config(file: str, text: str = text) -> None:
                Path(file).write_text(text)

            write_file(folder / "adapter_model.safetensors", write_tensors)
            write_file(folder / "adapter_config.json", write_config)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> "PeftModel":
        """Put an adapter from a folder on a model; see `load_adapter`."""
        peft_model = cls(model)
        peft_model.load_adapter(path, adapter_name, is_trainable)
        return peft_model

    # --- what a trainer asks of a model ---

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.get_input_embeddings()

    def gradient_checkpointing_enable(self) -> None:
        self.base_model.gradient_checkpointing_enable()

    @property
    def config(self):
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        return next(self.base_model.parameters()).device

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return {name: adapter.config for name, adapter in self.adapters.items()}

    # --- the machinery ---

    @property
    def _active(self) -> Adapter:
        if self.active_adapter is None:
            raise RuntimeError("there is no adapter any more: it was merged or unloaded")
        return self.adapters[self.active_adapter]

    def _check_name(self, adapter_name: str) -> None:
        if adapter_name not in self.adapters:
            raise ValueError(f"no adapter {adapter_name!r}; there are: {', '.join(self.adapters)}")

    def _put_in(self) -> None:
        for name, layer in self._active.layers.items():
            layer.train(self.training)
            self.base_model.set_submodule(name, layer)
        self.in_place = True

    def _take_out(self) -> None:
        if self.in_place:
            for name, layer in self._active.layers.items():
                self.base_model.set_submodule(name, layer.base_layer)
        self.in_place = False

    @contextmanager
    def _taken_out(self) -> Iterator[None]:
        was_in_place = self.in_place
        self._take_out()
        try:
            yield
        finally:
            if was_in_place and not self.in_place:
                self._put_in()

    def _register(self, name: str, make: Callable[[], Adapter]) -> None:
        """Make an adapter for the bare base; put it in place if it is the first."""
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name!r} already")
        with self._taken_out():
            self.adapters[name] = make()
        if self.active_adapter is None:
            self.base_model.requires_grad_(False)
            self.active_adapter = name
            self._put_in()

    def _apply(self, fn: Callable, recurse: bool = True):
        """`.to()`, `.half()`, … reach the adapters that are not in place as well."""
        for name, adapter in self.adapters.items():
            if recurse and not (self.in_place and name == self.active_adapter):
                for layer in adapter.layers.values():
                    layer._apply(fn)
        return super()._apply(fn, recurse)


def get_peft_model(
    model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default"
) -> PeftModel:
    """Freeze a model, put a new adapter on it, and return the two as one.

    >>> model = get_peft_model(GPT.from_pretrained("data/base/1m"),
    LoraConfig(target_modules=["c_attn"]))
    """
    return PeftModel(model, peft_config, adapter_name)


def _make_layers(model: nn.Module, config: PeftConfig) -> dict[str, nn.Module]:
    return METHODS[config.peft_type][1](model, config)


def _read_adapter(model: nn.Module, folder: Path, is_trainable: bool) -> Adapter:
    """An adapter's folder as an Adapter for `model`, which is not changed."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = not is_trainable
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"there is no {file} (pickled files, adapter_model.bin, are never read)")
    try:
        found = load_file(file)
    except Exception as error:  # safetensors raises a class of its own for damaged files
        raise ValueError(f"{file} is damaged: {error}") from error
    state = torch.random.get_rng_state()  # what is drawn here is overwritten: leave no trace
    adapter = Adapter(config, _make_layers(model, config))
    torch.random.set_rng_state(state)
    wanted = adapter.tensors()
    wrong = [f"{key} is missing" for key in wanted if key not in found]
    wrong += [f"{key} has no place in this model" for key in found if key not in wanted]
    wrong += [
        f"{key} is {tuple(tensor.shape)} of {tensor.dtype}, not {tuple(wanted[key].shape)} floats"
        for key, tensor in found.items()
        if key in wanted and not (tensor.shape == wanted[key].shape and tensor.is_floating_point())
    ]
    if wrong:
        raise ValueError(f"{file} does not fit: {'; '.join(wrong[:3])} ({len(wrong)} in all)")
    for key, tensor in wanted.items():
        tensor.copy_(found[key])
    return adapter


# --- write_file: the same lines stand in gpt.py and peft_model.py (tests/test_copy_alone.py)
def write_file(path: Path, write: Callable[[str], object]) -> None:
    """Have `write` fill a file beside `path`, then rename it: a crash leaves the old or the new."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(beside)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


# --- end of write_file
