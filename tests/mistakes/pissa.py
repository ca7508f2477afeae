"""Mistakes in pissa.py, and correct files that are written differently."""

from . import mistake, right

WIDE = "wide = w.detach().to(torch.promote_types(w.dtype, torch.float32))"
SVD = "u, values, vh = torch.linalg.svd(wide, full_matrices=False)"
ROOT = "root = (values[: self.r] / self.scaling).sqrt()  # (r,)"
A = "self.lora_A.weight = nn.Parameter(root[:, None] * vh[: self.r])  # (1)"
B = "self.lora_B.weight = nn.Parameter(u[:, : self.r] * root)"
KEPT_A = 'self.register_buffer("start_A", self.lora_A.weight.detach().clone(), persistent=False)'
KEPT_B = 'self.register_buffer("start_B", self.lora_B.weight.detach().clone(), persistent=False)'
START = "start = F.linear(F.linear(x, self.start_A), self.start_B)  # B₀ A₀ x"
Y = """trained = self.lora_B(self.lora_A(self.lora_dropout(x)))  # B A dropout(x)
        return (y + self.scaling * (trained - start)).to(y.dtype)  # (4)"""
X = "x = x.to(self.lora_A.weight.dtype)"
BASE = "y = self.base_layer(x)  # (…, out)"
LORA_A = "a = torch.cat([self.lora_A.weight, self.start_A])"
LORA_B = "return a, torch.cat([self.lora_B.weight, -self.start_B], dim=1)"
MERGED = "return (w + self.scaling * (b @ a)).to(w.dtype)  # (5)"
PLUS = "return (y + self.scaling * self.lora_B(self.lora_A(self.lora_dropout(x))){}).to(y.dtype)"

VARIANTS = [
    mistake("the root is missing", "start", "each have all of S / s", (ROOT, ROOT.replace(".sqrt()", ""))),
    mistake("neither root nor s", "start", "each have all of S", (ROOT, "root = values[: self.r]")),
    mistake("S is not divided by s", "start", "S divided by s?", (ROOT, "root = values[: self.r].sqrt()")),
    mistake("S is divided by s after the root", "start", "S is divided by s once", (ROOT, "root = values[: self.r].sqrt() / self.scaling")),
    mistake("S is multiplied by s", "start", "not multiplied?", (ROOT, ROOT.replace("/ self", "* self"))),
    mistake("no singular values", "start", "singular values are not used", (ROOT, "root = torch.ones_like(values[: self.r])")),
    mistake("the smallest singular values", "start", "smallest", (SVD, SVD + "\n        u, values, vh = u.flip(1), values.flip(0), vh.flip(0)")),
    mistake("V is not transposed", "start", "transposed once more", (A, A.replace("vh[: self.r]", "vh[:, : self.r].T"))),
    mistake("the rows of U", "start", "the columns of U", (B, B.replace("u[:, : self.r]", "u[: self.r].T"))),
    mistake("all of S in A", "start", "A₀ has all of S / s", (A, A.replace("root[:, None]", "root[:, None]**2")), (B, B.replace(" * root", ""))),
    mistake("all of S in B", "start", "A₀ is V_rᵀ", (A, A.replace("root[:, None] * ", "")), (B, B.replace("* root", "* root**2"))),
    mistake("s only in B", "start", "A₀ has √S_r", (A, A.replace("root[:, None]", "values[: self.r, None].sqrt()")),
            (B, B.replace("* root", "* values[: self.r].sqrt() / self.scaling"))),
    mistake("A and B swapped", "start", "transposed", (A, A.replace("root[:, None] * vh[: self.r]", "(u[:, : self.r] * root).T")),
            (B, B.replace("u[:, : self.r] * root", "(root[:, None] * vh[: self.r]).T"))),
    mistake("a start like LoRA's", "start", "as in LoRA", (B, B.replace("u[:, : self.r]", "0 * u[:, : self.r]"))),
    mistake("an SVD in bfloat16", "start", "bfloat16", (WIDE, "wide = w.detach()")),
    mistake("always float32", "start", "not in torch.float64", (WIDE, "wide = w.detach().float()")),
    mistake("W_res is written into W", "start", "W has changed", (B, B + "\n        w.data.sub_(self.scaling * self.lora_B.weight.data @ self.lora_A.weight.data)")),
    mistake("A is frozen", "start", "lora_A is not trainable", (A, A.replace("self.r])  #", "self.r], requires_grad=False)  #"))),
    mistake("A is on the CPU", "start", "device of the base", (SVD, "u, values, vh = torch.linalg.svd(torch.eye(*wide.shape, dtype=wide.dtype) if wide.is_meta else wide, full_matrices=False)")),
    mistake("the start is a view of A", "kept", "clone it", (KEPT_A, KEPT_A.replace(".clone()", ""))),
    mistake("the start is A itself", "kept", "is trained", (KEPT_A, "self.start_A = self.lora_A.weight")),
    mistake("the start is trained", "kept", "is trained", (KEPT_A, "self.start_A = nn.Parameter(self.lora_A.weight.detach().clone())"),
            (KEPT_B, "self.start_B = nn.Parameter(self.lora_B.weight.detach().clone())")),
    mistake("the start is no buffer", "kept", "must be a buffer", (KEPT_B, "self.start_B = self.lora_B.weight.detach().clone()")),
    mistake("the start has its gradients", "kept", "is trained", (KEPT_B, KEPT_B.replace(".detach()", ""))),
    mistake("start_B has A's numbers", "kept", "", (KEPT_B, KEPT_B.replace("self.lora_B", "self.lora_A"))),
    mistake("the start counts twice", "forward", "W x contains it already", (Y, PLUS.format(""))),
    mistake("the start is added", "forward", "is added, and not", (Y, PLUS.format(" + self.scaling * start"))),
    mistake("the start without scaling", "forward", "B₀ A₀ x has no scaling", (Y, PLUS.format(" - start"))),
    mistake("B A without scaling", "forward", "B A x has no scaling", (Y, PLUS.replace("self.scaling * ", "").format(" - self.scaling * start"))),
    mistake("no scaling", "forward", "scaling s is missing", (Y, PLUS.replace("self.scaling * ", "").format(" - start"))),
    mistake("scaling twice", "forward", "applied twice", (Y, Y.replace("self.scaling *", "self.scaling**2 *"))),
    mistake("scaling of everything", "forward", "also multiplies W x", (Y, PLUS.replace("y + self.scaling", "self.scaling * y + self.scaling").format(" - self.scaling * start"))),
    mistake("signs swapped", "forward", "signs are swapped", (Y, PLUS.replace("y + ", "y - ").format(" + self.scaling * start"))),
    mistake("without W x", "forward", "W x + b is missing", (Y, Y.replace("(y + ", "("))),
    mistake("A and B are not used", "forward", "B A x is missing", (Y, "return (y - self.scaling * start).to(y.dtype)")),
    mistake("dropout on the start too", "forward", "a part of W_res x", (START, "x = self.lora_dropout(x)\n        " + START), (Y, Y.replace("self.lora_dropout(x)", "x"))),
    mistake("dropout on W's input", "forward", "input of W too", (BASE, f"x = self.lora_dropout(x)\n        {BASE}"), (Y, Y.replace("self.lora_dropout(x)", "x"))),
    mistake("no dropout", "forward", "no effect", (Y, Y.replace("self.lora_dropout(x)", "x"))),
    mistake("dropout after A", "forward", "it must act on x", (Y, Y.replace("self.lora_A(self.lora_dropout(x))", "self.lora_dropout(self.lora_A(x))"))),
    mistake("F.linear with a Conv1D's weight", "forward", "call the base layer",
            (BASE, "w = self.base_layer.weight\n        y = F.linear(x, w if w.shape[1] == x.shape[-1] else w.T, self.bias)")),
    mistake("no minus", "as_lora", "no minus", (LORA_B, LORA_B.replace("-self", "self"))),
    mistake("two minuses", "as_lora", "no minus", (LORA_A, LORA_A.replace("self.start_A", "-self.start_A"))),
    mistake("the minus at B", "as_lora", "the minus is at B A", (LORA_B, LORA_B.replace("-self.start_B", "self.start_B").replace("self.lora_B", "-self.lora_B"))),
    mistake("the wrong dimension", "as_lora", "a LoRA of rank 2 r", (LORA_B, LORA_B.replace("dim=1", "dim=0"))),
    mistake("A next to A₀", "as_lora", "a LoRA of rank 2 r", (LORA_A, LORA_A.replace("start_A]", "start_A], dim=1"))),
    mistake("only A and B", "as_lora", "a LoRA of rank 2 r", (LORA_A, "a = self.lora_A.weight"), (LORA_B, "return a, self.lora_B.weight")),
    mistake("differences of factors", "as_lora", "a LoRA of rank 2 r", (LORA_A, "a = self.lora_A.weight - self.start_A"), (LORA_B, "return a, self.lora_B.weight - self.start_B")),
    mistake("the order differs", "as_lora", "in another order", (LORA_A, "a = torch.cat([self.start_A, self.lora_A.weight])")),
    mistake("the scaling is in it", "as_lora", "s is in it", (LORA_A, LORA_A.replace("a = ", "a = self.scaling * "))),
    mistake("merged without scaling", "merged", "scaling s is missing", (MERGED, MERGED.replace("self.scaling * ", ""))),
    mistake("merged like a LoRA", "merged", "W contains it already", (MERGED, MERGED.replace("b @ a", "self.lora_B.weight @ self.lora_A.weight"))),
    mistake("merged without W", "merged", "W is missing", (MERGED, MERGED.replace("w + ", ""))),
    mistake("W is changed", "merged", "must not", (MERGED, "with torch.no_grad():\n            w += self.scaling * (b @ a)\n        return w.clone()")),
    mistake("s multiplies W", "merged", "s also multiplies W", (MERGED, MERGED.replace("w + self.scaling * (b @ a)", "self.scaling * (w + b @ a)"))),
    mistake("a float32 output", "a base in bfloat16 or float64", "the output of a torch.bfloat16 base",
            (Y, "return y + self.scaling * (self.lora_B(self.lora_A(self.lora_dropout(x))) - start)")),
    mistake("a float32 W'", "a base in bfloat16 or float64", "merged() of a torch.bfloat16 base", (MERGED, "return w + self.scaling * (b @ a)")),
    right("W_res as it is written in (3)",
          (Y, "rest = matrix(self.base_layer) - self.scaling * self.start_B @ self.start_A\n"
           "        y0 = F.linear(x, rest) + (0 if self.bias is None else self.bias)\n        return (y0 + self.scaling * self.lora_B(self.lora_A(self.lora_dropout(x)))).to(y.dtype)")),
    right("parameters, and an eigendecomposition",
          (SVD, "u, values, vh = torch.svd(wide)\n        vh = vh.T"),
          (A, "self.lora_A = nn.Parameter(torch.diag(root) @ vh[: self.r])"), (B, "self.lora_B = nn.Parameter(u[:, : self.r] @ torch.diag(root))"),
          (KEPT_A, "self.register_buffer('start_A', self.lora_A.data.clone(), persistent=False)"),
          (KEPT_B, "self.register_buffer('start_B', self.lora_B.data.clone(), persistent=False)"),
          (X, "x = x.to(self.lora_A.dtype)"),
          (Y, "new = self.lora_dropout(x) @ self.lora_A.T @ self.lora_B.T\n        return (y + self.scaling * new - self.scaling * start).to(y.dtype)"),
          (LORA_A, "a = torch.cat([self.start_A, self.lora_A])"), (LORA_B, "return a, torch.cat([-self.start_B, self.lora_B], dim=1)")),
    right("another sign, order, and place of the minus",
          (A, "self.lora_A.weight = nn.Parameter(-(root[:, None] * vh[: self.r]).flip(0))"),
          (B, "self.lora_B.weight = nn.Parameter(-(u[:, : self.r] * root).flip(1))"),
          (LORA_A, "a = torch.cat([self.lora_A.weight, -self.start_A])"), (LORA_B, "return a, torch.hstack([self.lora_B.weight, self.start_B])"),
          (MERGED, "update = self.lora_B.weight @ self.lora_A.weight - self.start_B @ self.start_A\n        return (w + self.scaling * update).to(w.dtype)")),
    right("copies before the parameters", (SVD, SVD + "\n        wide = None"),
          (KEPT_A, "for name, factor in (('start_A', self.lora_A), ('start_B', self.lora_B)):\n            self.register_buffer(name, torch.empty_like(factor.weight, requires_grad=False).copy_(factor.weight.detach()), persistent=False)"),
          ("        " + KEPT_B + "\n", "")),
]  # fmt: skip
