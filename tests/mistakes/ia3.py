"""Mistakes in ia3.py, and correct files that are written differently."""

from . import mistake, right

SHAPE = "shape = (1, self.in_features) if is_feedforward else (self.out_features, 1)"
L = "self.ia3_l = nn.Parameter(torch.ones(shape, dtype=dtype, device=w.device))"
IN = "return self.base_layer((x * self.ia3_l[0]).to(x.dtype))  # (2)"
OUT = "        y = self.base_layer(x)\n        return (y * self.ia3_l[:, 0]).to(y.dtype)  # (1)\n"
FORWARD = f"        if self.is_feedforward:\n            {IN}\n{OUT}"
BIAS = "return b if b is None or self.is_feedforward else (b * self.ia3_l[:, 0]).to(b.dtype)"
MERGED = "return (w * self.ia3_l).to(w.dtype)"
MERGE = """        self.merged_weight = self.merged().contiguous()
        self.merged_bias = None if self.bias is None else self.bias.detach()  # may be a Parameter
"""

VARIANTS = [
    mistake("l starts at zero", "start", "starts at 0", (L, L.replace("ones", "zeros"))),
    mistake("l starts at random", "start", "", (L, L.replace("ones", "randn"))),
    mistake("inputs and outputs swapped", "start", "swapped?",
            (SHAPE, "shape = (self.out_features, 1) if is_feedforward else (1, self.in_features)")),
    mistake("always the outputs", "start", "swapped?", (SHAPE, "shape = (self.out_features, 1)")),
    mistake("one dimension", "start", "two dimensions",
            (SHAPE, "shape = (self.in_features if is_feedforward else self.out_features,)")),
    mistake("one number per layer", "start", "expected", (SHAPE, "shape = (1, 1)")),
    mistake("l is frozen", "start", "not trainable", (L, L.replace("device=w.device)", "device=w.device), requires_grad=False"))),
    mistake("l is no parameter", "start", "must be an nn.Parameter", (L, "self.ia3_l = torch.ones(shape, dtype=dtype, device=w.device)")),
    mistake("l in bfloat16", "start", "in torch.bfloat16", (L, L.replace("dtype=dtype", "dtype=w.dtype"))),
    mistake("l on the CPU", "start", "device of the base", (L, L.replace(", device=w.device", ""))),
    mistake("the bias is not multiplied", "forward", "b is not multiplied by l",
            (OUT, "        y = F.linear(x, matrix(self.base_layer)) * self.ia3_l[:, 0]\n"
             "        b = self.base_layer.bias\n        return (y if b is None else y + b).to(x.dtype)\n")),
    mistake("the bias is lost", "forward", "b is missing",
            (OUT, "        return (F.linear(x, matrix(self.base_layer)) * self.ia3_l[:, 0]).to(x.dtype)\n")),
    mistake("a column times the outputs", "forward", "the tokens, and not the outputs",
            (OUT, OUT.replace("self.ia3_l[:, 0]", "self.ia3_l"))),
    mistake("l is added", "forward", "added to the outputs", (OUT, OUT.replace("y * self", "y + self"))),
    mistake("the outputs are divided", "forward", "divided by l", (OUT, OUT.replace("y * self", "y / self"))),
    mistake("a residual", "forward", "W x + b is added", (OUT, OUT.replace("(y * self.ia3_l[:, 0])", "(y + y * self.ia3_l[:, 0])"))),
    mistake("l is not used in (1)", "forward", "l is not used", (OUT, "        return self.base_layer(x)\n")),
    mistake("l is not used in (2)", "forward", "l is not used", (IN, "return self.base_layer(x)")),
    mistake("the outputs in (2)", "forward", "it multiplies the inputs",
            (IN, "return self.base_layer(x) * self.ia3_l[0]")),
    mistake("the outputs of a square feed-forward layer", "forward", "it multiplies the inputs",
            (IN, "if self.in_features == self.out_features:\n                return self.base_layer(x) * self.ia3_l[0]\n            " + IN)),
    mistake("F.linear with a Conv1D's weight", "forward", "call the base layer",
            (IN, "w = self.base_layer.weight\n            w = w if w.shape[1] == x.shape[-1] else w.T\n"
             "            return F.linear((x * self.ia3_l[0]).to(x.dtype), w, self.base_layer.bias)")),
    mistake("b' is b in (1)", "bias", "l multiplies the bias too", (BIAS, "return b")),
    mistake("b' has two dimensions", "bias", "l is (out, 1)", (BIAS, BIAS.replace("self.ia3_l[:, 0]", "self.ia3_l"))),
    mistake("b' is multiplied in (2)", "bias", "l multiplies only x",
            (BIAS, "return b if b is None else (b * self.ia3_l.flatten()).to(b.dtype)")),
    mistake("b' of a layer without a bias", "bias", "must be None",
            (BIAS, "b = b if b is not None else matrix(self.base_layer)[:, 0] * 0\n"
             "        return b if self.is_feedforward else (b * self.ia3_l[:, 0]).to(b.dtype)")),
    mistake("b is changed", "bias", "must not",
            (BIAS, "if b is None or self.is_feedforward:\n            return b\n        b.data *= self.ia3_l[:, 0]\n        return b.data")),
    mistake("the other side of W", "merged", "l multiplies the", (MERGED, "return (w * self.ia3_l.T).to(w.dtype)")),
    mistake("the columns of a square W", "merged", "it must multiply the rows",
            (MERGED, "return (w * (self.ia3_l if w.shape[0] != w.shape[1] else self.ia3_l.view(1, -1))).to(w.dtype)")),
    mistake("l[:, 0] without a dimension", "merged", "l multiplies the columns",
            (MERGED, "return (w * (self.ia3_l[0] if self.is_feedforward else self.ia3_l[:, 0])).to(w.dtype)")),
    mistake("W' is W", "merged", "l is not used", (MERGED, "return w.clone()")),
    mistake("W is added", "merged", "W is added", (MERGED, "return (w + w * self.ia3_l).to(w.dtype)")),
    mistake("a diagonal matrix on the wrong side", "merged", "l multiplies the columns",
            (MERGED, "return (w @ self.ia3_l.flatten().diag().to(w.dtype)).to(w.dtype)")),
    mistake("W is changed", "merged", "must not", (MERGED, "with torch.no_grad():\n            w *= self.ia3_l\n        return w.clone()")),
    mistake("a Conv1D's weight", "merged", "stores W transposed", ("        w = matrix(self.base_layer)\n        return", "        w = self.base_layer.weight\n        return")),
    mistake("merge forgets the bias", "merge", "b is missing", (MERGE, MERGE.splitlines()[0] + "\n")),
    mistake("merge takes b", "merge", "b is not multiplied by l", (MERGE, MERGE.splitlines()[0] + "\n        b = self.base_layer.bias\n"
            "        self.merged_bias = None if b is None else b.detach()\n")),
    mistake("merge registers the base's bias", "merge", "detach b'", (MERGE, MERGE.splitlines()[0] + "\n        self.merged_bias = self.bias\n")),
    mistake("merge changes W", "merge", "must not", (MERGE, "        matrix(self.base_layer).copy_(self.merged())\n"
            "        self.merged_weight = matrix(self.base_layer)\n" + MERGE.splitlines()[1] + "\n")),
    mistake("merging twice multiplies twice", "merge", "after merging again", (MERGE,
            "        w = matrix(self.base_layer) if self.merged_weight is None else self.merged_weight\n"
            "        self.merged_weight = w * self.ia3_l\n" + MERGE.splitlines()[1] + "\n")),
    mistake("a float32 output", "a base in bfloat16 or float64", "the output of a torch.bfloat16 base",
            (OUT, "        return self.base_layer(x) * self.ia3_l[:, 0]\n")),
    mistake("a float32 W'", "a base in bfloat16 or float64", "merged() of a torch.bfloat16 base", (MERGED, "return w * self.ia3_l")),
    right("W' and b' in forward", (FORWARD, "        return F.linear(x, self.merged(), self.bias)\n")),
    right("einsum and a diagonal matrix",
          (MERGED, "d = torch.diag(self.ia3_l.flatten()).to(w.dtype)\n        return w @ d if self.is_feedforward else d @ w"),
          (BIAS, "if b is None or self.is_feedforward:\n            return b\n        return torch.einsum('o,oi->o', b, self.ia3_l.to(b.dtype))"),
          (L, "self.ia3_l = nn.Parameter(w.new_ones(shape).to(dtype))")),
    right("helpers, and copies",
          (OUT, "        y = self.base_layer(x)\n        return y * numbers(self).type_as(y)\n"),
          (IN, "return self.base_layer(x * numbers(self).type_as(x))"),
          (MERGE, "        self.merged_weight = self.merged().clone()\n"
           "        self.merged_bias = self.bias.clone().detach() if self.bias is not None else None\n"),
          ("class IA3Linear", "def numbers(layer):\n    return layer.ia3_l.view(-1)\n\n\nclass IA3Linear")),
]  # fmt: skip
