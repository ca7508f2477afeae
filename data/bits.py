"""How coarsely can a base be quantized? Linear weights in fewer and fewer bits, against the base.

python -m data.bits  # results/bits.json, bits.png and the table of results/README.md

The loss hides the damage: it can even fall. So we measure how far the predictions move, on held-out
pretraining text: the Kullback-Leibler divergence KL(base ‖ quantized), in nats per token, and how
often the most likely token stays the same.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from minipeft.files import write_text
from minipeft.lab import DATA, report
from minipeft.lab.base import load_base
from minipeft.methods.qlora import NF4_CODEBOOK, in_blocks
from minipeft.targets import find_targets

RESULTS = DATA / "results" / "bits.json"
BLOCK = 64


def integers(bits: int) -> Tensor:
    """The levels of symmetric integers from -1 to 1: 2^bits - 1 equal steps, including zero."""
    most = 2 ** (bits - 1) - 1
    return torch.arange(-most, most + 1) / most


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6  # E2M1: sign, two bits of exponent, one more
CODES = {  # bits per code, and the levels
    "NF4": (4, NF4_CODEBOOK),
    "FP4": (4, torch.cat((-FP4[1:].flip(0), FP4))),
    "int4": (4, integers(4)),
    "int3": (3, integers(3)),
    "int2": (2, integers(2)),
}


def rounded(weight: Tensor, levels: Tensor, blocksize: int | None) -> Tensor:
    """A weight's nearest values absmax · level, with one absmax per block, or one for all."""
    rows = in_blocks(weight.reshape(-1), blocksize or weight.numel())
    absmax = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)
    nearest = torch.bucketize(rows / absmax, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * absmax).view(-1)[: weight.numel()].view(weight.shape)


@torch.no_grad()
def log_probabilities(model: nn.Module, rows: Tensor) -> Tensor:
    """Log-probabilities of every next token of windows (n, t): (n, t, v)."""
    return torch.cat([model(part).logits.log_softmax(-1) for part in rows.split(16)])


@torch.no_grad()
def measure(folder: Path, names: Iterable[str] = CODES) -> list[dict]:
    """A record for every code, with blocks and with one scale per tensor, on one base."""
    base = load_base(folder)
    rows, records = base.held_out, []
    truth = log_probabilities(base.model().eval(), rows)
    for name in names:
        bits, levels = CODES[name]
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
    """A Markdown table of one base, with one line per code."""
    head = ["code", "scales", "bits per weight", "KL from the base", "same top token", "loss"]
    lines = []
    for r in [r for r in records if r["base"] == base]:
        scales = f"one per block of {r['blocksize']}" if r["blocksize"] else "one per matrix"
        lines.append([r["code"], scales, f"{r['bits']:.3f}", f"{r['divergence']:.5f}",
                      f"{r['agreement']:.3f}", f"{r['loss']:.3f}"])  # fmt: skip
    return report.markdown_table(head, lines)


if __name__ == "__main__":
    found = [r for name in ("0.3m", "1m", "3m") for r in measure(DATA / "base" / name)]
    text = "[\n" + ",\n".join(json.dumps(record) for record in found) + "\n]\n"
    write_text(RESULTS, text)
    report.save_figure(report.bits_figure(found), RESULTS.with_suffix(".png"), dpi=80)
    print(table(found))
