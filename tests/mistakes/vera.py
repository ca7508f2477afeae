"""Mistakes in vera.py, and correct files that are written differently."""

from . import mistake, right

DRAW_A = "A = nn.init.kaiming_uniform_(torch.empty(config.r, max(ins)), generator=generator)"
DRAW_B = "B = nn.init.kaiming_uniform_(torch.empty(max(outs), config.r), generator=generator)"
DRAW = f"        {DRAW_A}\n        {DRAW_B}\n"
BUFFERS = (
    "self.vera_A, self.vera_B = nn.Buffer(A, persistent=False), nn.Buffer(B, persistent=False)"
)
WHERE = "self.to(w.device, torch.promote_types(w.dtype, torch.float32))"
D = "self.vera_lambda_d = nn.Parameter(pair.vera_A.new_full((config.r,), config.d_initial))"
B = "self.vera_lambda_b = nn.Parameter(pair.vera_A.new_zeros(self.out_features))"
SHARED = "return p.vera_A[:, : self.in_features], p.vera_B[: self.out_features]"
H = "h = self.vera_lambda_d * F.linear(self.vera_dropout(x.to(A.dtype)), A)  # (…, r)"
Y = "return (y + self.vera_lambda_b * F.linear(h, B)).to(y.dtype)  # (1)"
BASE = "        y, (A, B) = self.base_layer(x), self.shared()  # y (…, out)\n"
UPDATE = "update = (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)"
MERGED = "return (w + update).to(w.dtype)  # (2)"
LAYERS = """    projections = Projections(list(targets.values()), config)  # one pair, shared by all layers
    layers = {name: VeraLinear(layer, config, projections) for name, layer in targets.items()}
"""
OWN = "    layers = {n: VeraLinear(layer, config, Projections([layer], config)) for n, layer in targets.items()}\n"

VARIANTS = [
    mistake("A and B of the smallest layer", "projections", "expected (20", (DRAW, DRAW.replace("max", "min"))),
    mistake("A and B of the first layer", "projections", "of the first layer", (DRAW, DRAW.replace("max(ins)", "ins[0]").replace("max(outs)", "outs[0]"))),
    mistake("ins and outs swapped", "projections", "the largest in and out", (DRAW, DRAW.replace("max(ins)", "X").replace("max(outs)", "max(ins)").replace("X", "max(outs)"))),
    mistake("A and B transposed", "projections", "expected (20", (DRAW, DRAW.replace("config.r, max(ins)", "max(ins), config.r").replace("max(outs), config.r", "config.r, max(outs)"))),
    mistake("A and B are trained", "projections", "are Parameters", (BUFFERS, "self.vera_A, self.vera_B = nn.Parameter(A), nn.Parameter(B)")),
    mistake("A and B are no buffers", "projections", "register_buffer", (BUFFERS, "self.vera_A, self.vera_B = A, B")),
    mistake("the bound of the rows", "projections", "instead of that of columns?", (DRAW, DRAW.replace(", generator", ", mode='fan_out', generator"))),
    mistake("the bound of a linear layer", "projections", "factor 6 missing?", (DRAW, DRAW.replace(", generator", ", a=5**0.5, generator"))),
    mistake("a bound of one", "projections", "in ±1?", (DRAW, DRAW.replace("nn.init.kaiming_uniform_(", "nn.init.uniform_(").replace(", generator", ", -1, 1, generator"))),
    mistake("positive numbers", "projections", "is from", (DRAW, DRAW.replace("generator=generator)", "generator=generator).abs_()"))),
    mistake("normal numbers", "projections", "", (DRAW, DRAW.replace("kaiming_uniform_", "kaiming_normal_"))),
    mistake("without the generator", "projections", "another A", (DRAW, DRAW.replace(", generator=generator", ""))),
    mistake("a fixed seed", "projections", "the same A", (DRAW_A, DRAW_A.replace("generator=generator", "generator=torch.Generator().manual_seed(5)"))),
    mistake("A and B from the same numbers", "projections", "seed it once", (DRAW_B, "generator.manual_seed(config.projection_prng_key)\n        " + DRAW_B)),
    mistake("A and B in the base's dtype", "projections", "use self.to(", (WHERE, "self.to(w.device, w.dtype)")),
    mistake("A and B on the CPU", "projections", "use self.to(", (WHERE, WHERE.replace("w.device, ", ""))),
    mistake("B is drawn first", "the A and B that Hugging Face peft draws", "draw A, and then B",
            (DRAW, f"        {DRAW_B}\n        {DRAW_A}\n")),
    mistake("b starts at one", "vectors", "starts at 1", (B, B.replace("new_zeros(self.out_features)", "new_ones(self.out_features)"))),
    mistake("b starts at d_initial", "vectors", "which is for d", (B, B.replace("new_zeros(self.out_features)", "new_full((self.out_features,), config.d_initial)"))),
    mistake("d and b are zero", "vectors", "neither of them gets a gradient", (D, D.replace("new_full((config.r,), config.d_initial)", "new_zeros(config.r)"))),
    mistake("d starts at one", "vectors", "starts at 1, and not", (D, D.replace("config.d_initial", "1.0"))),
    mistake("d_initial ignored", "vectors", "starts at 0.1, and not", (D, D.replace("config.d_initial", "0.1"))),
    mistake("d and b swapped in size", "vectors", "they are swapped", (D, D.replace("config.r,", "self.out_features,")), (B, B.replace("self.out_features", "config.r"))),
    mistake("d starts at zero, and b at d_initial", "vectors", "which is for d", (D, D.replace("config.d_initial", "0.0")),
            (B, B.replace("new_zeros(self.out_features)", "new_full((self.out_features,), config.d_initial)"))),
    mistake("b has an entry per input", "vectors", "expected", (B, B.replace("out_features", "in_features"))),
    mistake("d is frozen", "vectors", "not trainable", (D, D.replace("config.d_initial))", "config.d_initial), requires_grad=False)"))),
    mistake("b is no parameter", "vectors", "must be an nn.Parameter", (B, "self.vera_lambda_b = pair.vera_A.new_zeros(self.out_features)")),
    mistake("b on the CPU", "vectors", "device of the base", (B, B.replace("pair.vera_A.new_zeros(self.out_features)", "torch.zeros(self.out_features, dtype=pair.vera_A.dtype)"))),
    mistake("the rows of A", "shared", "it is all of A", (SHARED, SHARED.replace("p.vera_A[:, : self.in_features]", "p.vera_A[: self.in_features]"))),
    mistake("the columns of B", "shared", "it is all of B", (SHARED, SHARED.replace("p.vera_B[: self.out_features]", "p.vera_B[:, : self.out_features]"))),
    mistake("no slices", "shared", "it is all of A", (SHARED, "return p.vera_A, p.vera_B")),
    mistake("the last columns", "shared", "use the first ones", (SHARED, SHARED.replace(": self.in_features", "-self.in_features :"))),
    mistake("the last rows", "shared", "use the first ones", (SHARED, SHARED.replace(": self.out_features", "-self.out_features :"))),
    mistake("B and A", "shared", "they are swapped", (SHARED, "return p.vera_B[: self.out_features], p.vera_A[:, : self.in_features]")),
    mistake("d is missing", "forward", "d is missing", (H, H.replace("self.vera_lambda_d * ", ""))),
    mistake("b is missing", "forward", "b is missing", (Y, Y.replace("self.vera_lambda_b * ", ""))),
    mistake("no vectors", "forward", "d and b are missing", (H, H.replace("self.vera_lambda_d * ", "")), (Y, Y.replace("self.vera_lambda_b * ", ""))),
    mistake("d twice", "forward", "d is applied twice", (H, H.replace("self.vera_lambda_d *", "self.vera_lambda_d**2 *"))),
    mistake("d and b swapped", "forward", "", (H, H.replace("vera_lambda_d", "vera_lambda_b")), (Y, Y.replace("vera_lambda_b", "vera_lambda_d"))),
    mistake("b multiplies everything", "forward", "also multiplies W x", (Y, "return (self.vera_lambda_b * (y + F.linear(h, B))).to(y.dtype)")),
    mistake("b is added", "forward", "b is added", (Y, Y.replace("b * F", "b + F"))),
    mistake("d is added", "forward", "d is added", (H, H.replace("d * F", "d + F"))),
    mistake("the base is left out", "forward", "without W x", (Y, Y.replace("(y + self", "(self"))),
    mistake("b multiplies x", "forward", "b multiplies x, and", (H, H.replace("x.to(A.dtype)", "self.vera_lambda_b * x.to(A.dtype)")), (Y, Y.replace("self.vera_lambda_b * ", ""))),
    mistake("no dropout", "forward", "no effect", (H, H.replace("self.vera_dropout(x.to(A.dtype))", "x.to(A.dtype)"))),
    mistake("dropout on W's input", "forward", "input of W too", (BASE, "        x = self.vera_dropout(x)\n" + BASE), (H, H.replace("self.vera_dropout(x.to(A.dtype))", "x.to(A.dtype)"))),
    mistake("dropout after A", "forward", "it must act on x", (H, "h = self.vera_lambda_d * self.vera_dropout(F.linear(x.to(A.dtype), A))")),
    mistake("F.linear with a Conv1D's weight", "forward", "call the base layer",
            (BASE, "        w, (A, B) = self.base_layer.weight, self.shared()\n        y = F.linear(x, w if w.shape[1] == x.shape[-1] else w.T, self.bias)\n")),
    mistake("merged without d", "merged", "d is missing", (UPDATE, "update = (self.vera_lambda_b[:, None] * B) @ A")),
    mistake("merged without b", "merged", "b is missing", (UPDATE, "update = B @ (self.vera_lambda_d[:, None] * A)")),
    mistake("d on A's columns", "merged", "", (UPDATE, "update = (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d * A)")),
    mistake("b on the columns", "merged", "b multiplies the columns", (UPDATE, "update = (B @ (self.vera_lambda_d[:, None] * A)) * self.vera_lambda_b")),
    mistake("only the update", "merged", "without W", (MERGED, "return update.to(w.dtype)")),
    mistake("W is changed", "merged", "must not", (MERGED, "with torch.no_grad():\n            w += update\n        return w.clone()")),
    mistake("b multiplies W", "merged", "b also multiplies W", (MERGED, "return (w * self.vera_lambda_b[:, None] + update).to(w.dtype)")),
    mistake("A and B per layer", "add_vera", "make Projections once", (LAYERS, OWN)),
    mistake("A and B per layer, from a new seed", "add_vera", "make Projections once",
            (LAYERS, "    layers = {}\n    for name, layer in targets.items():\n        config = dataclass_replace(config, projection_prng_key=len(layers))\n"
             "        layers[name] = VeraLinear(layer, config, Projections(list(targets.values()), config))\n"),
            ("from dataclasses import dataclass, field", "from dataclasses import dataclass, field\nfrom dataclasses import replace as dataclass_replace")),
    mistake("A and B of the first layer only", "add_vera", "the list of all layers", (LAYERS, LAYERS.replace("list(targets.values())", "list(targets.values())[:1]"))),
    mistake("a list of layers", "add_vera", "must return a dict", ("    return layers\n", "    return list(layers.values())\n")),
    mistake("a float32 output", "a base in bfloat16 or float64", "the output of a torch.bfloat16 base", (Y, Y.replace("return (", "return ").replace(").to(y.dtype)", ""))),
    right("matrix products, and the vectors in the matrices",
          (H, "h = self.vera_dropout(x.to(A.dtype)) @ (self.vera_lambda_d[:, None] * A).T"),
          (Y, "return y + ((h @ B.T) * self.vera_lambda_b).to(y.dtype)"),
          (UPDATE, "update = torch.einsum('o,or,r,ri->oi', self.vera_lambda_b, B, self.vera_lambda_d, A)")),
    right("uniform_ and loops",
          (DRAW, "        A, B = torch.empty(config.r, max(ins)), torch.empty(max(outs), config.r)\n        for part in (A, B):\n"
           "            part.uniform_(-((6 / part.shape[1]) ** 0.5), (6 / part.shape[1]) ** 0.5, generator=generator)\n"),
          (LAYERS, "    every, found = [layer for _, layer in targets.items()], {}\n    shared = Projections(every, config)\n"
           "    for name in targets:\n        found[name] = VeraLinear(targets[name], config, shared)\n    layers = found\n")),
    right("rand, narrow and diag",
          (DRAW_A, "A = (2 * torch.rand(config.r, max(ins), generator=generator) - 1) * (6 / max(ins)) ** 0.5"),
          (BUFFERS, "for name, part in (('vera_A', A), ('vera_B', B)):\n            self.register_buffer(name, part, persistent=False)"),
          (SHARED, "return p.vera_A.narrow(1, 0, self.in_features), p.vera_B.narrow(0, 0, self.out_features)"),
          (UPDATE, "update = self.vera_lambda_b.diag() @ B @ self.vera_lambda_d.diag() @ A"),
          (D, "self.vera_lambda_d = nn.Parameter(torch.full_like(pair.vera_A[:, 0], config.d_initial))"),
          (B, "self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_features, dtype=pair.vera_A.dtype, device=pair.vera_A.device))")),
]  # fmt: skip
