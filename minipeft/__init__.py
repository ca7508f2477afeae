"""Parameter-efficient fine-tuning from scratch, one readable file per method.

Names are loaded when they are first used, because importing torch takes seconds.
"""

from importlib import import_module

__version__ = "0.2.0"

_METHOD_FILES = (
    "lora", "adalora", "qlora", "paged_adamw", "prompt_tuning", "p_tuning", "prefix_tuning",
    "bitfit", "bottleneck", "dora", "ia3", "vera", "pissa", "lora_plus",
)  # fmt: skip
_NAMES = {
    "gpt": ("GPT", "GPTConfig"),
    "peft_model": ("PeftModel", "get_peft_model"),
    "base_model": ("quantize_model", "prepare_model_for_kbit_training"),
    "saving": ("PeftConfig", "TaskType"),
    "methods.lora": ("LoraConfig", "LoraLinear", "add_lora"),
    "methods.adalora": ("AdaLoraConfig", "RankAllocator", "SVDLinear", "add_adalora"),
    "methods.qlora": (
        "Linear4bit", "QLoraLinear", "add_qlora", "quantize_nf4", "dequantize_nf4"
    ),
    "methods.paged_adamw": ("PagedAdamW",),
    "methods.prompt_tuning": ("PromptEmbedding", "PromptTuningConfig"),
    "methods.p_tuning": ("PromptEncoder", "PromptEncoderConfig"),
    "methods.prefix_tuning": ("PrefixEncoder", "PrefixTuningConfig"),
    "methods.bitfit": ("BitFitConfig", "BitFitLayer", "add_bitfit"),
    "methods.bottleneck": ("BottleneckConfig", "BottleneckLayer", "add_bottleneck"),
    "methods.dora": ("DoraLinear", "add_dora"),
    "methods.ia3": ("IA3Config", "IA3Linear", "add_ia3"),
    "methods.vera": ("VeraConfig", "VeraLinear", "add_vera"),
    "methods.pissa": ("PissaLinear", "add_pissa"),
    "methods.lora_plus": ("lora_plus_groups",),
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [*_HOME, *_METHOD_FILES]


def __getattr__(name: str):
    if name in _METHOD_FILES:
        return import_module(f"minipeft.methods.{name}")
    if name in _HOME:
        return getattr(import_module(f"minipeft.{_HOME[name]}"), name)
    raise AttributeError(f"module 'minipeft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
