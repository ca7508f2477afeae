"""Parameter-efficient fine-tuning from scratch, one readable file a method."""

from minipeft import qlora
from minipeft.adalora import AdaLoraConfig
from minipeft.bitfit import BitFitConfig
from minipeft.bottleneck import BottleneckConfig
from minipeft.gpt import GPT, GPTConfig
from minipeft.lora import LoraConfig
from minipeft.p_tuning import PromptEncoderConfig
from minipeft.paged_adamw import PagedAdamW
from minipeft.peft_model import PeftConfig, PeftModel, TaskType, get_peft_model
from minipeft.prefix_tuning import PrefixTuningConfig
from minipeft.prompt_tuning import PromptTuningConfig
from minipeft.qlora import (
    QLoraConfig,
    prepare_model_for_kbit_training,
    quantize_model,
)

__all__ = [
    "GPT",
    "AdaLoraConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "GPTConfig",
    "LoraConfig",
    "PagedAdamW",
    "PeftConfig",
    "PeftModel",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "QLoraConfig",
    "TaskType",
    "get_peft_model",
    "prepare_model_for_kbit_training",
    "quantize_model",
]

qlora.PagedAdamW = PagedAdamW  # where it stood until it had a file of its own
