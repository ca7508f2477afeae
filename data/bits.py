"""How coarse may a base be? Its linear weights in ever fewer bits, against the unquantized base.

python data/bits.py  # results/bits.json, bits.png and the table of the README; a minute

Loss hides the harm: it can even fall. What is shown is how far the predictions move, on held-out
pretraining text: the Kullback-Leibler divergence KL(base ‖ quantized), in nats a token, and how
often the likeliest token stays the same.
"""

import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from minipeft.lab import finetune, tasks
from minipeft.peft_model import write_file
from minipeft.qlora import NF4_CODEBOOK, find_targets, in_blocks

RESULTS = tasks.DATA / "results" / "bits.json"
BLOCK = 64


def integers(bits: int) -> Tensor:
    """The levels of symmetric integers, -1 to 1: 2^bits - 1 of them, even steps, a zero."""
    most = 2 ** (bits - 1) - 1
    return torch.arange(-most, most + 1) / most


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6  # E2M1: sign, two bits of exponent, one more
CODES = {  # bits a code, and its levels
    "NF4": (4, NF4_CODEBOOK),
    "FP4": (4, torch.cat((-FP4[1:].flip(0), FP4))),
    "int4": (4, integers(4)),
    "int3": (3, integers(3)),
    "int2": (2, integers(2)),
}


def rounded(weight: Tensor, levels: Tensor, blocksize: int | None) -> Tensor:
    """A weight's nearest values absmax · level, with an absmax a block, or one for all."""
    rows = in_blocks(weight.reshape(-1), blocksize or weight.numel())
    absmax = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)
    nearest = torch.bucketize(rows / absmax, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * absmax).view(-1)[: weight.numel()].view(weight.shape)


@torch.no_grad()
def log_probabilities(model: nn.Module, rows: Tensor) -> Tensor:
    """Of every next token of windows (n, t): (n, t, v)."""
    return torch.cat([model(part).logits.log_softmax(-1) for part in rows.split(16)])


@torch.no_grad()
def measure(folder: Path) -> list[dict]:
    """A record for every code, with blocks and with one scale a tensor, on one base."""
    base = finetune.load_base(folder)
    rows, records = base.held_out[:64], []
    truth = log_probabilities(base.model().eval(), rows)
    for name, (bits, levels) in CODES.items():
        for blocksize in (BLOCK, None):
            model = base.model().eval()
            for layer in find_targets(model, "all-linear").values():
                layer.weight.copy_(rounded(layer.weight, levels, blocksize))
            found = log_probabilities(model, rows)
            divergence = (truth.exp() * (truth - found)).sum(-1).mean()
            agreement = (truth.argmax(-1) == found.argmax(-1)).float().mean()
            loss = -found[:, :-1].gather(-1, rows[:, 1:, None]).mean()
            records.append(
                {
                    "base": folder.name,
                    "code": name,
                    "blocksize": blocksize,
                    "bits": bits + (8 / BLOCK + 32 / (BLOCK * 256) if blocksize else 0),
                    "divergence": round(divergence.item(), 6),
                    "agreement": round(agreement.item(), 4),
                    "loss": round(loss.item(), 4),
                }
            )
    return records


def table(records: list[dict], base: str = "3m") -> str:
    """A Markdown table of one base, a line a code."""
    lines = ["| code | scales | bits a weight | KL from the base | same likeliest token | loss |"]
    lines.append("|" + "---|" * 6)
    for r in [r for r in records if r["base"] == base]:
        scales = f"one a block of {r['blocksize']}" if r["blocksize"] else "one a matrix"
        lines.append(
            f"| {r['code']} | {scales} | {r['bits']:.3f} | {r['divergence']:.5f} | "
            f"{r['agreement']:.3f} | {r['loss']:.3f} |"
        )
    return "\n".join(lines)


def picture(records: list[dict]) -> Figure:
    """Divergence and agreement by code, a line a base; filled: blocks, hollow: one scale."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(CODES)
    colors = {"0.3m": "#2e7d32", "1m": "#d1741f", "3m": "#1b4f8f"}
    for axis, key in ((left, "divergence"), (right, "agreement")):
        for base, color in colors.items():
            for blocksize, style, fill, how in (
                (BLOCK, "o-", color, f"blocks of {BLOCK}"),
                (None, "o:", "white", "one scale a matrix"),
            ):
                values = [
                    r[key] for r in records if (r["base"], r["blocksize"]) == (base, blocksize)
                ]
                axis.plot(names, values, style, color=color, mfc=fill, label=f"{base}, {how}")
        axis.spines[["top", "right"]].set_visible(False)
    left.set(yscale="log", ylabel="KL(base ‖ quantized), nats a token")
    right.set(ylim=(0, 1.03), ylabel="share of tokens with the same likeliest next")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip
    return figure


if __name__ == "__main__":
    found = [r for name in ("0.3m", "1m", "3m") for r in measure(tasks.DATA / "base" / name)]
    text = "[\n" + ",\n".join(json.dumps(record) for record in found) + "\n]\n"
    write_file(RESULTS, lambda file: Path(file).write_text(text))
    image = picture(found)
    write_file(RESULTS.with_suffix(".png"), lambda file: image.savefig(file, format="png", dpi=80))
    print(table(found))
