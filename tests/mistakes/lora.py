"""Mistakes in lora.py, and correct files that are written differently."""

from . import mistake, right

SCALING = "self.scaling = config.lora_alpha / divisor  # s, (1) or (2)"
FORWARD = "return (y + self.lora_B(self.scaling * self.lora_A(x))).to(y.dtype)  # (1)"
DROPOUT = "x = self.lora_dropout(x.to(self.lora_A.weight.dtype))  # (…, in)\n"
FACTORS = """        self.lora_A = nn.Linear(self.in_features, self.r, bias=False)
        self.lora_B = nn.Linear(self.r, self.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        for factor in (self.lora_A, self.lora_B):  # at least float32: small steps need precision
            factor.to(w.device, torch.promote_types(w.dtype, torch.float32))
"""
DELTA = "return self.scaling * (self.lora_B.weight @ self.lora_A.weight)  # (out, r) @ (r, in)"
MERGED = "return (w + self.delta()).to(w.dtype)  # (3): W + s B A"
MERGE = "self.merged_weight = self.merged().contiguous()"
UNMERGE = "        self.merged_weight = None\n"
FREEZE = (
    "    model.requires_grad_(False)  # first freeze: the LoRA layers made next stay trainable\n"
)
MAKE = "    layers = {name: LoraLinear(layer, config) for name, layer in targets.items()}\n"
REPLACE = "        model.set_submodule(name, layer.train(model.training))\n"
ENDS = """    ends = tuple(f".{ending}" for ending in targets or [])  # "proj" must not match "q_proj"
    return {name: module for name, module in linear.items() if f".{name}".endswith(ends)}
"""

PARAMETERS = """        kind = {'dtype': torch.promote_types(w.dtype, torch.float32), 'device': w.device}
        self.lora_A = nn.Parameter(torch.randn(self.r, self.in_features, **kind) / 10)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, self.r, **kind))
"""
WITH_PARAMETERS = (
    (FACTORS, PARAMETERS),
    (DROPOUT, "x = self.lora_dropout(x.to(self.lora_A.dtype))\n"),
    (FORWARD, 'update = torch.einsum("...i,ri,or->...o", x, self.lora_A, self.lora_B)\n'
     "        return (y + self.scaling * update).to(y.dtype)"),
    (DELTA, 'return self.scaling * torch.einsum("or,ri->oi", self.lora_B, self.lora_A)'),
)  # fmt: skip

VARIANTS = [
    mistake("α without dividing by r", "scaling", "α divided by r",
            (SCALING, "self.scaling = config.lora_alpha")),
    mistake("r / α", "scaling", "r / α", (SCALING, "self.scaling = config.r / config.lora_alpha")),
    mistake("√r always", "scaling", "√r", (SCALING, "self.scaling = config.lora_alpha / self.r**0.5")),
    mistake("use_rslora ignored", "scaling", "√r", (SCALING, "self.scaling = config.lora_alpha / self.r")),
    mistake("A and B swapped in size", "factors", "expected",
            ("self.lora_A = nn.Linear(self.in_features, self.r, bias=False)",
             "self.lora_A = nn.Linear(self.r, self.out_features, bias=False)"),
            ("self.lora_B = nn.Linear(self.r, self.out_features, bias=False)",
             "self.lora_B = nn.Linear(self.in_features, self.r, bias=False)")),
    mistake("both zero", "factors", "neither of them ever gets a gradient",
            ("nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))",
             "nn.init.zeros_(self.lora_A.weight)")),
    mistake("both random", "factors", "start at zero", ("        nn.init.zeros_(self.lora_B.weight)\n", "")),
    mistake("A and B with biases", "factors", "no bias",
            ("self.lora_B = nn.Linear(self.r, self.out_features, bias=False)",
             "self.lora_B = nn.Linear(self.r, self.out_features)")),
    mistake("bfloat16 factors", "factors", "in torch.bfloat16, not in torch.float32",
            ("torch.promote_types(w.dtype, torch.float32)", "w.dtype")),
    mistake("scaling missing in forward", "forward", "scaling s missing",
            (FORWARD, "return (y + self.lora_B(self.lora_A(x))).to(y.dtype)")),
    mistake("scaling twice in forward", "forward", "twice",
            (FORWARD, "return (y + self.scaling * self.lora_B(self.scaling * self.lora_A(x))).to(y.dtype)")),
    mistake("scaling multiplies everything", "forward", "also multiplies W x + b",
            (FORWARD, "return (self.scaling * (y + self.lora_B(self.lora_A(x)))).to(y.dtype)")),
    mistake("the base is left out", "forward", "without W x + b",
            (FORWARD, "return self.lora_B(self.scaling * self.lora_A(x)).to(y.dtype)")),
    mistake("the update is left out", "forward", "zero everywhere", (FORWARD, "return y")),
    mistake("dropout on the base path", "forward", "applied to the input of the base layer?",
            ("        y = self.base_layer(x)  # (…, out)\n        " + DROPOUT,
             "        x = self.lora_dropout(x.to(self.lora_A.weight.dtype))\n"
             "        y = self.base_layer(x)\n")),
    mistake("dropout after A", "forward", "it must act on x",
            (DROPOUT, "x = x.to(self.lora_A.weight.dtype)\n"),
            (FORWARD, "a = self.lora_dropout(self.lora_A(x))\n"
             "        return (y + self.lora_B(self.scaling * a)).to(y.dtype)")),
    mistake("no dropout", "forward", "no effect", (DROPOUT, "x = x.to(self.lora_A.weight.dtype)\n")),
    mistake("float32 output", "forward", "bfloat16",
            (FORWARD, "return y + self.lora_B(self.scaling * self.lora_A(x))")),
    mistake("A B instead of B A", "delta", "", (DELTA, "return self.scaling * (self.lora_A.weight.T @ self.lora_B.weight.T)")),
    mistake("delta without scaling", "delta", "scaling s missing",
            (DELTA, "return self.lora_B.weight @ self.lora_A.weight")),
    mistake("merged forgets W", "merged", "without W", (MERGED, "return self.delta().to(w.dtype)")),
    mistake("merged writes into W", "merged", "must not",
            (MERGED, "with torch.no_grad():\n            w += self.delta()\n        return w")),
    mistake("Conv1D transposed", "merged", "Conv1D",
            ("    w = matrix(self.base_layer)\n        return", "    w = self.base_layer.weight\n        return")),
    mistake("merge adds each time", "merge", "second merge",
            (MERGE, "start = self.merged_weight\n        w = matrix(self.base_layer) if start is None else start\n"
             "        self.merged_weight = (w + self.delta()).contiguous()")),
    mistake("merge changes W", "merge", "must not",
            (MERGE, "matrix(self.base_layer).add_(self.delta())\n        self.merged_weight = matrix(self.base_layer)")),
    mistake("unmerge subtracts", "unmerge", "",
            (UNMERGE, "        if self.merged_weight is not None:\n"
             "            self.merged_weight = self.merged_weight - self.delta().detach()\n")),
    mistake("'proj' matches 'q_proj'", "find_targets", "must not select",
            (ENDS, "    return {n: m for n, m in linear.items() if n.endswith(tuple(targets or []))}\n")),
    mistake("only full names", "find_targets", "must select",
            (ENDS, "    return {n: m for n, m in linear.items() if n in (targets or [])}\n")),
    mistake("base not frozen", "add_lora", "not frozen", (FREEZE, "")),
    mistake("everything frozen", "add_lora", "must require a gradient",
            (MAKE, MAKE + "    model.requires_grad_(False)\n    for layer in layers.values():\n        layer.requires_grad_(False)\n")),
    mistake("only targets frozen", "add_lora", "not frozen",
            (FREEZE, "    for layer in targets.values():\n        layer.requires_grad_(False)\n")),
    mistake("nothing replaced", "add_lora", "not replaced", (REPLACE, "        layer.train(model.training)\n")),
    mistake("mode forgotten", "add_lora", "evaluation mode",
            (REPLACE, "        model.set_submodule(name, layer)\n")),
    mistake("F.linear with a Conv1D's weight", "forward", "call the base layer",
            ("y = self.base_layer(x)  # (…, out)", "w = self.base_layer.weight\n"
             "        y = F.linear(x, w if w.shape[1] == x.shape[-1] else w.T, self.base_layer.bias)")),
    mistake("the last part of a name", "find_targets", "must select deep.block.out",
            (ENDS, "    found = set(targets or [])\n"
             "    return {n: m for n, m in linear.items() if n in found or n.split('.')[-1] in found}\n")),
    mistake("any part of a name", "find_targets", "must not select",
            (ENDS, "    found = set(targets or [])\n    return {n: m for n, m in linear.items() "
             "if n in found or found & set(n.split('.')) or any(n.endswith('.' + t) for t in found)}\n")),
    mistake("α r", "scaling", "multiplied by r", (SCALING, "self.scaling = config.lora_alpha * self.r")),
    mistake("factors on the CPU", "factors", "on the device of the layer",
            ("factor.to(w.device, torch.promote", "factor.to(torch.promote")),
    mistake("always float32", "factors", "not in torch.float64",
            ("torch.promote_types(w.dtype, torch.float32)", "torch.float32")),
    mistake("a uniform A", "factors", "one sign",
            ("nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))",
             "nn.init.uniform_(self.lora_A.weight)")),
    mistake("bfloat16 arithmetic", "forward", "rounded to bfloat16",
            (DROPOUT, "x = self.lora_dropout(x)\n"),
            (FORWARD, "a, b = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)\n"
             "        return y + self.scaling * (x @ a.T @ b.T)")),
    mistake("delta without gradients", "delta", "no gradient", (DELTA, DELTA.replace(
        "(self.lora_B.weight @ self.lora_A.weight)", "(self.lora_B.weight @ self.lora_A.weight).detach()"))),
    right("parameters and einsum", *WITH_PARAMETERS),
    right("A and B stored transposed",
          (FACTORS, PARAMETERS.replace("(self.r, self.in_features,", "(self.in_features, self.r,")
           .replace("(self.out_features, self.r,", "(self.r, self.out_features,")),
          (DROPOUT, "x = self.lora_dropout(x.to(self.lora_A.dtype))\n"),
          (FORWARD, "return (y + self.scaling * (x @ self.lora_A @ self.lora_B)).to(y.dtype)"),
          (DELTA, "return self.scaling * (self.lora_A @ self.lora_B).T")),
    right("the delta's matrix in forward, with a helper",
          (FORWARD, "return (y + apply(x, self.delta())).to(y.dtype)"),
          ("class LoraLinear", "def apply(x, w):\n    return x.matmul(w.transpose(0, 1))\n\n\nclass LoraLinear")),
    right("a Gaussian A, and the scaling in B's output",
          ("nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))",
           "nn.init.normal_(self.lora_A.weight, std=1 / self.r)"),
          (FORWARD, "update = self.lora_B(self.lora_A(x)) * self.scaling\n        return y + update.to(y.dtype)")),
    right("loops, and setattr on the parent",
          (MAKE + "    for name, layer in layers.items():\n" + REPLACE,
           "    layers = {}\n    for name, old in targets.items():\n"
           "        parent, _, child = name.rpartition('.')\n        new = LoraLinear(old, config)\n"
           "        new.train(model.training)\n        setattr(model.get_submodule(parent), child, new)\n"
           "        layers[name] = new\n"),
          (ENDS, "    found = {}\n    for name, module in linear.items():\n"
           "        for t in targets or []:\n            if name == t or name.endswith('.' + t):\n"
           "                found[name] = module\n    return found\n")),
]  # fmt: skip
