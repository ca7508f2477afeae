"""Parameter-efficient fine-tuning from scratch, one readable file a method."""

from minipeft.gpt import GPT, GPTConfig
from minipeft.lora import LoraConfig
from minipeft.peft_model import PeftConfig, PeftModel, TaskType, get_peft_model

__all__ = [
    "GPT",
    "GPTConfig",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "TaskType",
    "get_peft_model",
]
