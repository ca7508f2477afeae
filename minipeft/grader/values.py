"""Values from Hugging Face peft and bitsandbytes, which a student's file must reproduce.

python -m minipeft.grader.values  # writes values/*.json; needs the extra `conformance`

The grader compares with these files. Where the libraries are installed, it asks them for values
with other numbers instead.
"""

import importlib.util
import json

from minipeft.files import write_text

from .symptoms import Draw

NEEDED = {"lora": ["peft"]}  # packages, by method


def lora(draw: Draw) -> dict:
    """Outputs of peft's LoRA layer, and the weight that it merges."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    torch.manual_seed(draw.integer(0, 1000))
    n_in, n_out, r, alpha = 6, 5, 3, draw.integer(5, 20)
    x = draw.normal(4, n_in)
    found = {"alpha": alpha, "x": x}
    for rslora in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(n_in, n_out))
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], use_rslora=rslora)
        layer = get_peft_model(net, config).base_model.model[0]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if not rslora:
            w, bias = layer.base_layer.weight.detach().clone(), layer.base_layer.bias.detach()
            factors = draw.normal(*a.shape), draw.normal(*b.shape)
        a.data, b.data = factors
        found["y_rslora" if rslora else "y"] = layer(x)
        if not rslora:
            found |= {"W": w, "b": bias, "A": a.detach().clone(), "B": b.detach().clone()}
            layer.merge()
            found["merged"] = layer.base_layer.weight
    return found


def installed(method: str) -> bool:
    return all(importlib.util.find_spec(name) for name in NEEDED.get(method, ["no values"]))


def compute(method: str, seed: int) -> dict:
    """A method's values, as lists of numbers."""
    found = globals()[method](Draw(seed))
    return {name: v.tolist() if hasattr(v, "tolist") else v for name, v in found.items()}


def send(pipe, method: str, seed: int) -> None:
    """The work of a process: the libraries stay out of the one that has a student's file."""
    try:
        pipe.send(compute(method, seed))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    from .skeleton import HERE

    for method in NEEDED:
        text = json.dumps(compute(method, 0), indent=None) + "\n"
        write_text(HERE / "values" / f"{method}.json", text)
        print(f"wrote {method}.json")
