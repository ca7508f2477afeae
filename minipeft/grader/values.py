"""Values from Hugging Face peft and bitsandbytes, which a student's file must reproduce.

python -m minipeft.grader.values  # writes values/*.json; needs the extra `conformance`

The grader compares with these files. Where the libraries are installed, it asks them for values
with other numbers instead.
"""

import importlib.util
import json
import os

from minipeft.files import write_text

from .symptoms import Draw

NEEDED = {
    "training": ["transformers"],
    "lora": ["peft"],
    "prompt_tuning": ["peft", "transformers"],
    "prefix_tuning": ["peft", "transformers"],
    "qlora": ["bitsandbytes", "peft"],
    "dora": ["peft"],
    "vera": ["peft"],
    "ia3": ["peft"],
    "pissa": ["peft"],
}  # packages, by method


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


def virtual_tokens(draw: Draw, configs: dict) -> dict:
    """Logits and losses of a tiny GPT-2 with virtual tokens of peft's: the P of each config, by the
    config's name, and the results. Weights are rounded, to keep the file small."""
    import torch
    from peft import get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"vocab_size": 11, "n_positions": 16, "n_embd": 6, "n_layer": 2, "n_head": 2}
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    weights = {}
    for name, w in GPT2LMHeadModel(GPT2Config(**size)).named_parameters():
        weights[name] = (0.5 * draw.normal(*w.shape)).mul(100).round() / 100
    ids, mask = draw.tokens(11, 2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0  # padding, which predicts nothing
    labels = ids.where(mask.bool(), -100)
    weight_lists = {name: (w * 100).round().int().tolist() for name, w in weights.items()}
    found = {"size": size, "hundredths": weight_lists, "ids": ids, "mask": mask, "labels": labels}
    for end, config in configs.items():
        net = GPT2LMHeadModel(GPT2Config(**size, **dropout))
        net.load_state_dict(weights, strict=False)
        model = get_peft_model(net, config).eval()
        encoder = model.prompt_encoder["default"]
        for name, w in encoder.named_parameters():
            w.data = draw.normal(*w.shape)
            found[name.replace("embedding.weight", "P") + end] = w.detach()
        out = model(ids, attention_mask=mask, labels=labels)
        found["logits" + end] = out.logits.detach()[:, -5:][mask.bool()]
        found["loss" + end] = out.loss.item()
    return found


def prompt_tuning(draw: Draw) -> dict:
    from peft import PromptTuningConfig

    return virtual_tokens(
        draw, {"": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")}
    )


def prefix_tuning(draw: Draw) -> dict:
    """Without and with the network."""
    from peft import PrefixTuningConfig

    options = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    network = {"prefix_projection": True, "encoder_hidden_size": 5}
    return virtual_tokens(
        draw,
        {"": PrefixTuningConfig(**options), "_network": PrefixTuningConfig(**options, **network)},
    )


def qlora(draw: Draw) -> dict:
    """What bitsandbytes quantizes and dequantizes; the output of peft's layer on top of it."""
    import bitsandbytes as bnb
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from peft import LoraConfig, get_peft_model
    from torch import nn

    options = {"blocksize": 64, "quant_type": "nf4"}
    w, bias = draw.normal(6, 100), draw.normal(6)  # 9 blocks, and one that is not complete
    codes, state = quantize_4bit(w, compress_statistics=False, **options)
    found = {"w": w, "codes": codes.view(-1), "scales": state.absmax, "bias": bias}
    found["back"] = dequantize_4bit(codes, state)
    absmax = 1 + draw.normal(300).abs()
    blocks = torch.zeros(300, 64)
    blocks[:, 0] = absmax
    codes, state = quantize_4bit(blocks, compress_statistics=True, **options)
    found |= {"absmax": absmax, "scale_codes": state.absmax, "offset": state.offset}
    found["scale_scales"] = state.state2.absmax
    found["scales_back"] = dequantize_4bit(codes, state)[:, 0]

    base = bnb.nn.Linear4bit(100, 6, compress_statistics=False, quant_type="nf4")
    weight = bnb.nn.Params4bit(w.clone(), False, compress_statistics=False, quant_type="nf4")
    base.weight, base.bias = weight.to("cpu"), nn.Parameter(bias.clone())
    base.support_avx512bf16_for_cpu = False  # else it computes in bfloat16 on some processors
    net = nn.Sequential(base)
    net.is_loaded_in_4bit = True
    alpha = draw.integer(5, 20)
    layer = get_peft_model(net, LoraConfig(r=3, lora_alpha=alpha, target_modules=["0"]))
    a, b = (part["default"].weight for part in (layer.base_model.model[0].lora_A,
                                                layer.base_model.model[0].lora_B))  # fmt: skip
    a.data, b.data = draw.normal(*a.shape), draw.normal(*b.shape)
    x = draw.normal(4, 100).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return found | {"alpha": alpha, "A": a.detach(), "B": b.detach(), "x": x.detach(), "y": y,
                    "grad": x.grad}  # fmt: skip


def dora(draw: Draw) -> dict:
    """The output of peft's DoRA layer, and the weight that it merges."""
    from peft import LoraConfig

    alpha = draw.integer(5, 20)
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"], use_dora=True)
    net, (w, b) = adapted(draw, config, (6, 5))
    (layer,) = net
    found = {"alpha": alpha, "W": w, "b": b, "x": draw.normal(4, 6)}
    for name, module in (("A", layer.lora_A), ("B", layer.lora_B),
                         ("m", layer.lora_magnitude_vector)):  # fmt: skip
        found[name] = drawn(module["default"].weight, draw)
    found["y"] = layer(found["x"])
    layer.merge()
    return found | {"merged": layer.base_layer.weight}


def vera(draw: Draw) -> dict:
    """Outputs of two layers of peft's VeRA, and the A and B that they share."""
    from peft import VeraConfig

    key = draw.integer(0, 1000)
    config = VeraConfig(r=3, target_modules=["0", "1"], projection_prng_key=key)
    net, (w0, b0, w1, b1) = adapted(draw, config, (6, 5), (4, 7))
    found = {"key": key, "W0": w0, "bias0": b0, "W1": w1, "bias1": b1}
    found |= {"A": net[0].vera_A["default"], "B": net[0].vera_B["default"]}
    for i, layer in enumerate(net):
        found[f"x{i}"] = draw.normal(3, layer.in_features)
        found[f"d{i}"] = drawn(layer.vera_lambda_d["default"], draw)
        found[f"b{i}"] = drawn(layer.vera_lambda_b["default"], draw)
        found[f"y{i}"] = layer(found[f"x{i}"])
        layer.merge()
        found[f"merged{i}"] = layer.base_layer.weight
    return found


def pissa(draw: Draw) -> dict:
    """What peft's PiSSA leaves of the weight, and its layer's output with other factors."""
    from peft import LoraConfig

    alpha = draw.integer(5, 20)
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"], init_lora_weights="pissa")
    net, (w, b) = adapted(draw, config, (6, 5))
    (layer,) = net
    found = {"alpha": alpha, "W": w, "b": b, "x": draw.normal(4, 6)}
    found["W_res"] = layer.base_layer.weight.detach().clone()
    for name, module in (("A", layer.lora_A), ("B", layer.lora_B)):
        found[name] = drawn(module["default"].weight, draw)
    found["y"] = layer(found["x"])
    layer.merge()
    return found | {"merged": layer.base_layer.weight}


def ia3(draw: Draw) -> dict:
    """Outputs of peft's (IA)³ layers; the second is a feed-forward layer."""
    from peft import IA3Config

    config = IA3Config(target_modules=["0", "1"], feedforward_modules=["1"])
    net, (w0, b0, w1, b1) = adapted(draw, config, (6, 5), (4, 3))
    found = {"W0": w0, "b0": b0, "W1": w1, "b1": b1}
    for i, layer in enumerate(net):
        found[f"x{i}"] = draw.normal(3, layer.in_features)
        found[f"l{i}"] = drawn(layer.ia3_l["default"], draw)
        found[f"y{i}"] = layer(found[f"x{i}"])
        layer.merge()
        found |= {f"merged{i}": layer.base_layer.weight, f"bias{i}": layer.base_layer.bias}
    return found


def adapted(draw: Draw, config, *sizes: tuple[int, int]) -> tuple:
    """peft's layers on top of linear ones of these sizes, and the W and b of each."""
    from peft import get_peft_model
    from torch import nn

    net, numbers = nn.Sequential(*(nn.Linear(*size) for size in sizes)), []
    for linear in net:
        for parameter in (linear.weight, linear.bias):
            parameter.data = draw.normal(*parameter.shape)
            numbers.append(parameter.detach().clone())
    return get_peft_model(net, config).base_model.model.eval(), numbers


def drawn(parameter, draw: Draw):
    """Give a parameter random numbers."""
    parameter.data = draw.normal(*parameter.shape)
    return parameter.detach().clone()


def training(draw: Draw) -> dict:
    """The loss of transformers' models, and the cosine of its schedule. The warm-up of its schedule
    starts at 0, so that the rates are compared after it."""
    import torch
    from transformers import get_cosine_schedule_with_warmup
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, labels = draw.normal(3, 6, 8), draw.tokens(8, 3, 6)
    labels[0, :3] = labels[1, :2] = labels[2, 4:] = -100
    n = int((labels[:, 1:] != -100).sum())
    loss = ForCausalLMLoss(logits, labels, 8, num_items_in_batch=n)
    steps, warmup, peak = draw.integer(10, 14), draw.integer(2, 4), 0.5
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])  # of steps 1, 2, …
        optimizer.step()
        schedule.step()
    return {
        "how": "ForCausalLMLoss and get_cosine_schedule_with_warmup of transformers",
        "logits": logits, "labels": labels, "n": n, "loss": loss, "steps": steps, "peak": peak,
        "warmup": warmup, "first_step": warmup + 1, "rates": rates[warmup:],
    }  # fmt: skip


def installed(method: str) -> bool:
    return all(importlib.util.find_spec(name) for name in NEEDED.get(method, ["no values"]))


def compute(method: str, seed: int) -> dict:
    """A method's values, as lists of numbers."""
    found = globals()[method](Draw(seed))
    return {name: v.tolist() if hasattr(v, "tolist") else v for name, v in found.items()}


def send(pipe, method: str, seed: int) -> None:
    """The work of a process: the libraries stay out of the one that has a student's file."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # they print what they cannot load
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
