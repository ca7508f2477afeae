"""Mistakes in dora.py, and correct files that are written differently."""

from . import mistake, right

M = "nn.Parameter(w.detach().to(dtype).norm(dim=1))  # m"
V = "return matrix(self.base_layer) + self.scaling * (self.lora_B.weight @ self.lora_A.weight)"
NORM = "norm = self.directions().detach().norm(dim=1)"
OVER = "self.lora_magnitude_vector / norm.clamp(min=1e-12)"
WX = "wx = y if self.bias is None else y - self.bias"
DROPOUT = "x = self.lora_dropout(x.to(self.lora_A.weight.dtype))  # (…, in)"
LORA = "lora = self.lora_B(self.scaling * self.lora_A(x))"
Y = "return (y + (ratio - 1) * wx + ratio * lora).to(y.dtype)  # (3); at the start exactly y"
MERGED = "return (self.ratio()[:, None] * v).to(matrix(self.base_layer).dtype)  # (2)"
FORWARD = f"""        y = self.base_layer(x)  # (…, out)
        {WX}
        {DROPOUT}
        {LORA}
        ratio = self.ratio()
        {Y}
"""


def forward(text: str) -> tuple[str, str]:
    return FORWARD, "".join(f"        {line}\n" for line in text.splitlines())


VARIANTS = [
    mistake("m starts at one", "magnitude", "starts at 1", (M, "nn.Parameter(torch.ones(self.out_features, dtype=dtype))")),
    mistake("m starts at zero", "magnitude", "starts at 0", (M, "nn.Parameter(torch.zeros(self.out_features, dtype=dtype))")),
    mistake("m of the columns", "magnitude", "norms of the columns", (M, "nn.Parameter(w.detach().to(dtype).norm(dim=0))")),
    mistake("m squared", "magnitude", "squares", (M, "nn.Parameter(w.detach().to(dtype).square().sum(1))")),
    mistake("one norm of all of W", "magnitude", "expected", (M, "nn.Parameter(w.detach().to(dtype).norm())")),
    mistake("m as a column", "magnitude", "expected (3,)", (M, "nn.Parameter(w.detach().to(dtype).norm(dim=1, keepdim=True))")),
    mistake("sums of absolute values", "magnitude", "absolute values", (M, "nn.Parameter(w.detach().to(dtype).abs().sum(1))")),
    mistake("m is no parameter", "magnitude", "must be an nn.Parameter", (M, "w.detach().to(dtype).norm(dim=1)")),
    mistake("m is frozen", "magnitude", "not trainable", (M, "nn.Parameter(w.detach().to(dtype).norm(dim=1), requires_grad=False)")),
    mistake("m in bfloat16", "magnitude", "in torch.bfloat16", (M, "nn.Parameter(w.detach().norm(dim=1))")),
    mistake("m on the CPU", "magnitude", "device of the base", (M, "nn.Parameter(torch.empty(self.out_features, dtype=dtype))\n"
            "        if w.device.type == 'cpu':\n            self.lora_magnitude_vector.data = w.detach().to(dtype).norm(dim=1)")),
    mistake("V without W", "directions", "without W", (V, "return self.scaling * (self.lora_B.weight @ self.lora_A.weight)")),
    mistake("V without scaling", "directions", "scaling s missing", (V, V.replace("self.scaling * ", ""))),
    mistake("V without the update", "directions", "W without the update", (V, "return matrix(self.base_layer)")),
    mistake("V scaled as a whole", "directions", "s also multiplies W",
            (V, "w = matrix(self.base_layer)\n        return self.scaling * (w + self.lora_B.weight @ self.lora_A.weight)")),
    mistake("A B instead of B A", "directions", "transposed", (V, V.replace("self.lora_B.weight @ self.lora_A.weight", "self.lora_A.weight.T @ self.lora_B.weight.T"))),
    mistake("V with unit rows", "directions", "divided by their lengths",
            (V, V.replace("return matrix", "v = matrix") + "\n        return F.normalize(v)")),
    mistake("a Conv1D's weight", "directions", "stores W transposed", (V, V.replace("matrix(self.base_layer)", "self.base_layer.weight"))),
    mistake("the norms of the columns", "ratio", "V's columns", (NORM, NORM.replace("dim=1", "dim=0"))),
    mistake("a gradient through the norm", "ratio", "must count as a constant", (NORM, NORM.replace(".detach()", ""))),
    mistake("all detached", "ratio", "m gets no gradient", (OVER, OVER.replace("vector /", "vector.detach() /"))),
    mistake("the inverse ratio", "ratio", "the inverse", (OVER, "norm / self.lora_magnitude_vector")),
    mistake("the norm of W", "ratio", "that of W", (NORM, NORM.replace("self.directions()", "matrix(self.base_layer)"))),
    mistake("m without the norm", "ratio", "‖V‖ is not used", (OVER, "self.lora_magnitude_vector")),
    mistake("the norm without m", "ratio", "m is not used", (OVER, "1 / norm.clamp(min=1e-12)")),
    mistake("the norm of all of V", "ratio", "per row", (NORM, "norm = self.directions().detach().norm()")),
    mistake("a squared norm", "ratio", "squared", (NORM, "norm = self.directions().detach().square().sum(1)")),
    mistake("0 / 0", "ratio", "not finite", (OVER, "self.lora_magnitude_vector / norm")),
    mistake("the bias is scaled", "forward", "b is multiplied by m / ‖V‖ too", (WX, "wx = y")),
    mistake("the bias is added twice", "forward", "multiplied, and added again",
            forward("x_a = self.lora_dropout(x.to(self.lora_A.weight.dtype))\nlora = self.lora_B(self.scaling * self.lora_A(x_a))\n"
                    "y = self.ratio() * (self.base_layer(x) + lora)\nreturn y if self.bias is None else y + self.bias")),
    mistake("the bias is lost", "forward", "b is missing", (Y, "return (ratio * (wx + lora)).to(y.dtype)")),
    mistake("only the LoRA is scaled", "forward", "only the update", (Y, "return (y + ratio * lora).to(y.dtype)")),
    mistake("only W x is scaled", "forward", "only W x", (Y, "return (y + (ratio - 1) * wx + lora).to(y.dtype)")),
    mistake("plain LoRA", "forward", "this is LoRA", (Y, "return (y + lora).to(y.dtype)")),
    mistake("W x twice", "forward", "W x is added twice", (Y, "return (y + ratio * wx + ratio * lora).to(y.dtype)")),
    mistake("W x is left out", "forward", "W x is missing", (Y, "return (y - wx + ratio * lora).to(y.dtype)")),
    mistake("no scaling", "forward", "scaling s is missing", (LORA, "lora = self.lora_B(self.lora_A(x))")),
    mistake("scaling twice", "forward", "applied twice", (LORA, LORA.replace("lora = ", "lora = self.scaling * "))),
    mistake("dropout on W's input", "forward", "input of W too",
            forward(f"x = self.lora_dropout(x.to(self.lora_A.weight.dtype))\ny = self.base_layer(x)\n{WX}\n{LORA}\nratio = self.ratio()\n{Y}")),
    mistake("no dropout", "forward", "no effect", (DROPOUT, "x = x.to(self.lora_A.weight.dtype)")),
    mistake("dropout after A", "forward", "it must act on x", (DROPOUT, "x = x.to(self.lora_A.weight.dtype)"),
            (LORA, "lora = self.lora_B(self.lora_dropout(self.scaling * self.lora_A(x)))")),
    mistake("the merged weight without dropout", "forward", "no effect", forward("return F.linear(x, self.merged(), self.bias)")),
    mistake("F.linear with a Conv1D's weight", "forward", "call the base layer",
            forward(f"w = self.base_layer.weight\nw = w if w.shape[1] == x.shape[-1] else w.T\ny = F.linear(x, w, self.bias)\n{WX}\n{DROPOUT}\n{LORA}\nratio = self.ratio()\n{Y}")),
    mistake("V is returned", "merged", "m / ‖V‖ is missing", (MERGED, "return v.to(matrix(self.base_layer).dtype)")),
    mistake("the columns are multiplied", "merged", "it must multiply the rows", (MERGED, MERGED.replace("self.ratio()[:, None]", "self.ratio()"))),
    mistake("V / ‖V‖ without m", "merged", "m is missing", (MERGED, "return F.normalize(v).to(matrix(self.base_layer).dtype)")),
    mistake("the ratio times W", "merged", "W instead of V", (MERGED, MERGED.replace(" * v)", " * matrix(self.base_layer))"))),
    mistake("W is added", "merged", "W is added", (MERGED, MERGED.replace(" * v)", " * v + matrix(self.base_layer))"))),
    mistake("W is changed", "merged", "must not", (MERGED, "with torch.no_grad():\n            matrix(self.base_layer).copy_(self.ratio()[:, None] * v)\n"
            "        return matrix(self.base_layer).clone()")),
    mistake("a float32 output", "a base in bfloat16 or float64", "the output of a torch.bfloat16 base", (Y, "return y + (ratio - 1) * wx + ratio * lora")),
    mistake("a float32 W'", "a base in bfloat16 or float64", "merged() of a torch.bfloat16 base", (MERGED, "return self.ratio()[:, None] * v")),
    right("equation (3) as it is written", forward(
        "bias = self.bias\nxd = self.lora_dropout(x.to(self.lora_A.weight.dtype))\nwx = x @ matrix(self.base_layer).T\n"
        "y = self.ratio() * (wx + self.scaling * self.lora_B(self.lora_A(xd)))\nreturn (y if bias is None else y + bias).to(x.dtype)")),
    right("V in forward, with a helper",
          (OVER, "self.lora_magnitude_vector / lengths(self.directions().detach())"),
          ("class DoraLinear", "def lengths(v):\n    return v.pow(2).sum(-1).sqrt() + 1e-12\n\n\nclass DoraLinear")),
    right("parameters, and F.normalize",
          ("        self.lora_A = nn.Linear(self.in_features, self.r, bias=False)\n        self.lora_B = nn.Linear(self.r, self.out_features, bias=False)\n"
           "        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))\n        nn.init.zeros_(self.lora_B.weight)\n",
           "        kind = {'device': w.device, 'dtype': torch.promote_types(w.dtype, torch.float32)}\n"
           "        self.lora_A = nn.Parameter(torch.randn(self.r, self.in_features, **kind) / 9)\n"
           "        self.lora_B = nn.Parameter(torch.zeros(self.out_features, self.r, **kind))\n"),
          ("        for factor in (self.lora_A, self.lora_B):\n            factor.to(w.device, dtype)\n", ""),
          (M, "nn.Parameter(torch.linalg.vector_norm(w.detach().to(dtype), dim=-1))"),
          (V, "return matrix(self.base_layer) + self.scaling * torch.einsum('or,ri->oi', self.lora_B, self.lora_A)"),
          (DROPOUT, "x = self.lora_dropout(x.to(self.lora_A.dtype))"),
          (LORA, "lora = self.scaling * (x @ self.lora_A.T @ self.lora_B.T)"),
          (MERGED, "return (self.lora_magnitude_vector[:, None] * F.normalize(v)).to(matrix(self.base_layer).dtype)")),
    right("the norm computed from W and the update", (NORM,
          "update = self.scaling * self.lora_B.weight @ self.lora_A.weight\n        v = matrix(self.base_layer) + update.detach()\n"
          "        norm = torch.where(v.any(1), v.norm(dim=1), 1.0)")),
]  # fmt: skip
