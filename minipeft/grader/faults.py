"""The second track: faulty files, to be caught by a test that the student writes.

Each is a reference with some text replaced, and has a fault that real projects had. A test catches
it if an assertion fails on the faulty file, and everything passes on two correct ones: the
reference, and a file that computes the same in another way.
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from minipeft.files import write_text

from .skeleton import reference

Changes = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Fault:
    """A faulty file, and what it breaks."""

    method: str  # the reference that it is made from
    title: str
    contract: str  # what must hold
    faulty: Changes
    correct: Changes  # the second correct file
    more: str = ""  # text at the end of all three files
    names: str = "lora_A, lora_B, base_layer, the methods"  # what tests may use
    renamed: tuple[str, ...] = ("scaling", "merged_weight")  # in the second correct file

    def sources(self) -> tuple[str, str, str]:
        """The faulty file, and two correct ones."""
        text = reference(self.method).read_text(encoding="utf-8")
        text = text[: text.index('if __name__ == "__main__":')] + self.more  # without the demo
        other = replaced(text, self.correct)
        for name in self.renamed:  # tests of such details fail on the second correct file
            other = re.sub(rf"\b{name}\b", f"my_{name}", other)
        return replaced(text, self.faulty), text, other


def replaced(text: str, changes: Changes) -> str:
    for old, new in changes:
        if text.count(old) != 1:
            raise ValueError(f"{text.count(old)} places have {old!r}, must be one")
        text = text.replace(old, new)
    return text


UPDATE = "self.lora_B(self.scaling * self.lora_A(x))"
DELTA = "return self.scaling * (self.lora_B.weight @ self.lora_A.weight)  # (out, r) @ (r, in)"
OTHER_LORA = (
    (UPDATE, "F.linear(x, self.delta())"),
    (DELTA, 'return torch.einsum("or,ri->oi", self.lora_B.weight * self.scaling, '
     "self.lora_A.weight)"),
)  # fmt: skip
FIT = '''
def fit(model: nn.Module, config: AdaLoraConfig, x: Tensor, y: Tensor) -> RankAllocator:
    """Adapt a model, and train it for config.total_step steps on inputs x and goals y."""
    layers = add_adalora(model, config)
    allocator = RankAllocator(layers, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(1, config.total_step + 1):
        loss = F.mse_loss(model(x), y) + config.orth_reg_weight * orthogonality(layers)
        loss.backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
    return allocator
'''

FAULTS = {
    "1": Fault(
        "lora", "a LoRA that is weaker than its config says",
        "The update is s B A with s = α / r, in the forward pass and in delta(), whatever r and α "
        "are.",
        ((UPDATE, "self.lora_B(self.lora_A(x))"),
         (DELTA, "return self.lora_B.weight @ self.lora_A.weight")),
        OTHER_LORA,
    ),
    "2": Fault(
        "lora", "weights that move a little each time",
        "After merge() and unmerge(), however often, the layer is exactly as it was before: the "
        "same weights, and the same output, without any rounding error.",
        (("        self.merged_weight = self.merged().contiguous()",
          "        if self.merged_weight is None:\n"
          "            matrix(self.base_layer).add_(self.delta())\n"
          "            self.merged_weight = matrix(self.base_layer)"),
         ('    def unmerge(self) -> None:\n'
          '        """Discard W\'. Outputs are again exactly those of W plus the adapter."""\n'
          "        self.merged_weight = None",
          "    @torch.no_grad()\n    def unmerge(self) -> None:\n"
          '        """Discard W\'. Outputs are again exactly those of W plus the adapter."""\n'
          "        if self.merged_weight is not None:\n"
          "            matrix(self.base_layer).sub_(self.delta())\n"
          "            self.merged_weight = None")),
        OTHER_LORA,
    ),
    "3": Fault(
        "adalora", "ranks that stay",
        "After fit(), at most target_r × (number of layers) entries of lora_E are not zero, "
        "counted over all layers together. fit() stands at the end of the file.",
        (("        allocator.update_and_allocate(step)\n", ""),),
        (("update = x @ (self.lora_A * self.lora_E).T @ self.lora_B.T",
          "update = ((x @ self.lora_A.T) * self.lora_E[:, 0]) @ self.lora_B.T"),
         ("lora_E.masked_fill_(~kept[:, None], 0.0)", "lora_E.mul_(kept[:, None])")),
        FIT,
        "lora_A, lora_E, lora_B, fit(), and the allocator's layers and ranks()",
        ("kept", "importance"),
    ),
    "4": Fault(
        "qlora", "a merge that forgets",
        "merged() is the dequantized 4-bit weight plus the update, not rounded to 4 bits again: a "
        "small update is not lost when it is merged. (A config is any object with r, lora_alpha, "
        "lora_dropout, use_rslora and target_modules.)",
        (("return self.base_layer.dequantize(torch.float32) + self.delta()",
          "q = self.base_layer.quantized\n"
          "        merged = dequantize_nf4(q, torch.float32) + self.delta()\n"
          "        again = quantize_nf4(merged, q.blocksize, q.offset is not None)\n"
          "        return dequantize_nf4(again)"),),
        (("return self.base_layer.dequantize(torch.float32) + self.delta()",
          "return torch.add(self.delta(), self.base_layer.dequantize(torch.float32))"),),
    ),
    "5": Fault(
        "lora", "an adapter that part of the model does not see",
        "An adapted layer's weight is W' = W + s B A, for models that read it instead of calling "
        "the layer, as a head that is tied to another layer's weight does: F.linear(x, "
        "model.proj.weight). What such a model computes must change with the adapter.",
        (('        return self.merged().t() if type(self.base_layer).__name__ == "Conv1D" else '
          "self.merged()", "        return self.base_layer.weight"),),
        (('        return self.merged().t() if type(self.base_layer).__name__ == "Conv1D" else '
          "self.merged()",
          "        w, update = self.base_layer.weight, self.delta()\n"
          "        return w + (update if w.shape == update.shape else update.t()).to(w.dtype)"),),
    ),
}  # fmt: skip

TEMPLATE = '''"""Fault {number}: {title}.

{contract}

faulty_{number}.py, a copy of {method}.py with a fault, breaks this. Write tests that fail on it by
an assertion, and that pass on correct files. Your tests import the file under test as `subject`.
The grader runs them on faulty_{number}.py and on two correct files, written differently:

    python -m minipeft build check {folder} catch

In all three files you may rely on: {names}. lora_A.weight is (r, in) and lora_B.weight (out, r).
"""

import subject
import torch
from torch import nn


def test_what_must_hold():
    raise NotImplementedError("build a layer or a model, and assert what must hold")
'''


def start(folder: Path) -> Path:
    """Write the faulty files, and a test file for each. Raises ValueError if there are some."""
    into = folder / "catch"
    if into.exists():
        raise ValueError(f"{into} exists already: it is not overwritten")
    into.mkdir(parents=True)
    for number, fault in FAULTS.items():
        contract = textwrap.fill(f"What must hold: {fault.contract}", 100)
        values = {"number": number, "folder": folder, "contract": contract}
        text = TEMPLATE.format(**vars(fault) | values)
        write_text(into / f"faulty_{number}.py", fault.sources()[0])
        write_text(into / f"test_{number}.py", text)
    return into
