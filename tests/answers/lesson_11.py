"""Wrong answers to the exercises of lesson 11, and right ones that differ from the solution."""

# %% 11.numbers wrong
numbers = 8 * 128
# %% 11.numbers wrong
numbers = 8 * 128 * 384
# %% 11.numbers wrong
numbers = 128 * 384
# %% 11.numbers wrong
numbers = 16 * (128 + 384)
# %% 11.numbers wrong
numbers = "4096"
# %% 11.numbers right
numbers = 4096.0
# %% 11.numbers right
numbers = torch.empty(8, 128).numel() + torch.empty(384, 8).numel()

# %% 11.alpha wrong
alpha = 16
# %% 11.alpha wrong
alpha = 32
# %% 11.alpha wrong
alpha = 4
# %% 11.alpha wrong
alpha = 16 * 2.0
# %% 11.alpha right
alpha = 2 * 32
# %% 11.alpha right
alpha = torch.tensor(64.0)

# %% 11.rslora wrong
same_scaling = 16
# %% 11.rslora wrong
same_scaling = 16 / math.sqrt(8)
# %% 11.rslora wrong
same_scaling = 128
# %% 11.rslora wrong
same_scaling = 2
# %% 11.rslora wrong
same_scaling = "16 √8"
# %% 11.rslora right
same_scaling = 45.25
# %% 11.rslora right
same_scaling = 16 * 8**0.5


# %% 11.plus_groups wrong
def plus_groups(named, lr, ratio):  # no ratio
    b = [p for name, p in named if "lora_B" in name]
    others = [p for name, p in named if "lora_B" not in name]
    return [{"params": others, "lr": lr}, {"params": b, "lr": lr}]


# %% 11.plus_groups wrong
def plus_groups(named, lr, ratio):  # swapped
    b = [p for name, p in named if "lora_B" in name]
    others = [p for name, p in named if "lora_B" not in name]
    return [{"params": b, "lr": ratio * lr}, {"params": others, "lr": lr}]


# %% 11.plus_groups wrong
def plus_groups(named, lr, ratio):  # pairs instead of parameters
    b = [pair for pair in named if "lora_B" in pair[0]]
    others = [pair for pair in named if "lora_B" not in pair[0]]
    return [{"params": others, "lr": lr}, {"params": b, "lr": ratio * lr}]


# %% 11.plus_groups wrong
def plus_groups(named, lr, ratio):  # any capital B
    b = [p for name, p in named if "B" in name]
    others = [p for name, p in named if "B" not in name]
    return [{"params": others, "lr": lr}, {"params": b, "lr": ratio * lr}]


# %% 11.plus_groups wrong
def plus_groups(named, lr, ratio):  # A slower instead of B faster
    b = [p for name, p in named if "lora_B" in name]
    others = [p for name, p in named if "lora_B" not in name]
    return [{"params": others, "lr": lr / ratio}, {"params": b, "lr": lr}]


# %% 11.plus_groups wrong
def plus_groups(named, lr, ratio):  # only A, and not all others
    a = [p for name, p in named if "lora_A" in name]
    b = [p for name, p in named if "lora_B" in name]
    return [{"params": a, "lr": lr}, {"params": b, "lr": ratio * lr}]


# %% 11.plus_groups right
def plus_groups(named, lr, ratio):
    groups = [{"params": [], "lr": lr}, {"params": [], "lr": ratio * lr}]
    for name, parameter in named:
        groups["lora_B" in name]["params"].append(parameter)
    return groups


# %% 11.plus_groups right
def plus_groups(named, lr, ratio):
    named = dict(named)
    b = {name for name in named if ".lora_B." in name}
    return (
        {"params": (named[name] for name in named if name not in b), "lr": lr},
        {"params": [named[name] for name in b], "lr": lr * ratio},
    )


# %% 11.pissa_start wrong
def pissa_start(w, r, s):  # not divided by s
    u, sizes, vh = torch.linalg.svd(w, full_matrices=False)
    root = sizes[:r].sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


# %% 11.pissa_start wrong
def pissa_start(w, r, s):  # no root
    u, sizes, vh = torch.linalg.svd(w, full_matrices=False)
    return sizes[:r, None] / s * vh[:r], u[:, :r] * sizes[:r]


# %% 11.pissa_start wrong
def pissa_start(w, r, s):  # V is not transposed
    u, sizes, v = torch.linalg.svd(w, full_matrices=False)
    root = (sizes[:r] / s).sqrt()
    return root[:, None] * v[:, :r].T, u[:, :r] * root


# %% 11.pissa_start wrong
def pissa_start(w, r, s):  # B and A swapped
    u, sizes, vh = torch.linalg.svd(w, full_matrices=False)
    root = (sizes[:r] / s).sqrt()
    return u[:, :r] * root, root[:, None] * vh[:r]


# %% 11.pissa_start wrong
def pissa_start(w, r, s):  # everything in B
    u, sizes, vh = torch.linalg.svd(w, full_matrices=False)
    return vh[:r], u[:, :r] * sizes[:r] / s


# %% 11.pissa_start wrong
def pissa_start(w, r, s):  # the smallest ones
    u, sizes, vh = torch.linalg.svd(w, full_matrices=False)
    root = (sizes[-r:] / s).sqrt()
    return root[:, None] * vh[-r:], u[:, -r:] * root


# %% 11.pissa_start right
def pissa_start(w, r, s):
    u, sizes, vh = torch.linalg.svd(w)
    root = torch.diag((sizes[:r] / s) ** 0.5)
    return root @ vh[:r], u[:, :r] @ root


# %% 11.pissa_start right
def pissa_start(w, r, s):
    u, sizes, v = torch.svd(w)
    a = torch.stack([(sizes[i] / s).sqrt() * v[:, i] for i in range(r)])
    b = torch.stack([(sizes[i] / s).sqrt() * u[:, i] for i in range(r)], dim=1)
    return a, b


# %% 11.dora_weight wrong
def dora_weight(w, m, a, b, s):  # not scaled to length 1
    return m[:, None] * (w + s * b @ a)


# %% 11.dora_weight wrong
def dora_weight(w, m, a, b, s):  # the lengths of W
    return m[:, None] * (w + s * b @ a) / w.norm(dim=1, keepdim=True)


# %% 11.dora_weight wrong
def dora_weight(w, m, a, b, s):  # no s
    v = w + b @ a
    return m[:, None] * v / v.norm(dim=1, keepdim=True)


# %% 11.dora_weight wrong
def dora_weight(w, m, a, b, s):  # one norm for all
    v = w + s * b @ a
    return m[:, None] * v / v.norm()


# %% 11.dora_weight wrong
def dora_weight(w, m, a, b, s):  # columns
    v = w + s * b @ a
    return m[:, None] * v / v.norm(dim=0, keepdim=True)


# %% 11.dora_weight right
def dora_weight(w, m, a, b, s):
    v = w + s * (b @ a)
    return v * (m / v.square().sum(1).sqrt()).unsqueeze(1)


# %% 11.dora_weight right
def dora_weight(w, m, a, b, s):
    rows = [row / row.square().sum().sqrt() for row in w + s * torch.mm(b, a)]
    return torch.stack([length * row for length, row in zip(m, rows, strict=True)])


# %% 11.vectors wrong
vera_numbers, ia3_numbers = 256 * (128 + 384), 384
# %% 11.vectors wrong
vera_numbers, ia3_numbers = 256, 384
# %% 11.vectors wrong
vera_numbers, ia3_numbers = 640, 128
# %% 11.vectors wrong
vera_numbers, ia3_numbers = 256 + 128, 384
# %% 11.vectors right
vera_numbers, ia3_numbers = 640, 384.0
# %% 11.vectors right
vera_numbers, ia3_numbers = len(torch.ones(256)) + len(torch.ones(384)), 3 * 128


# %% 11.unfair wrong
def unfair(lora, best):  # LoRA at its best
    rate = max(lora, key=lora.get)
    return rate, best - lora[rate]


# %% 11.unfair wrong
def unfair(lora, best):  # the smallest rate
    rate = min(lora)
    return rate, best - lora[rate]


# %% 11.unfair wrong
def unfair(lora, best):  # sign
    rate = min(lora, key=lora.get)
    return rate, lora[rate] - best


# %% 11.unfair wrong
def unfair(lora, best):  # order
    rate = min(lora, key=lora.get)
    return best - lora[rate], rate


# %% 11.unfair right
def unfair(lora, best):
    leads = {rate: best - score for rate, score in lora.items()}
    return max(leads.items(), key=lambda pair: pair[1])


# %% 11.unfair right
def unfair(lora, best):
    score, rate = sorted((score, rate) for rate, score in lora.items())[0]
    return [rate, best - score]


# %% 11.verdict wrong
def verdict(differences, t):  # the mean alone
    mean = statistics.mean(differences)
    return "better" if mean > 0 else "worse"


# %% 11.verdict wrong
def verdict(differences, t):  # no √n
    mean = statistics.mean(differences)
    half = t * statistics.stdev(differences)
    return "better" if mean > half else "worse" if mean < -half else "not shown"


# %% 11.verdict wrong
def verdict(differences, t):  # 1.96
    mean = statistics.mean(differences)
    half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return "better" if mean > half else "worse" if mean < -half else "not shown"


# %% 11.verdict wrong
def verdict(differences, t):  # "better" or not
    mean = statistics.mean(differences)
    half = t * statistics.stdev(differences) / math.sqrt(len(differences))
    return "better" if mean > half else "not shown"


# %% 11.verdict right
def verdict(differences, t):
    d = torch.tensor(differences)
    half = t * d.std() / len(d) ** 0.5
    low, high = d.mean() - half, d.mean() + half
    return "not shown" if low <= 0 <= high else ("worse", "better")[int(low > 0)]


# %% 11.verdict right
def verdict(differences, t):
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return {True: "not shown", False: "better" if mean > 0 else "worse"}[
        abs(mean) <= t * math.sqrt(variance / n)
    ]


# %% 11.ln_tuning wrong
def add_ln_tuning(model):  # nothing frozen
    return [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)]


# %% 11.ln_tuning wrong
def add_ln_tuning(model):  # by name
    model.requires_grad_(False)
    names = [name for name, _ in model.named_modules() if "ln_" in name]
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    return names


# %% 11.ln_tuning wrong
def add_ln_tuning(model):  # top level only
    model.requires_grad_(False)
    names = [name for name, m in model.named_children() if isinstance(m, nn.LayerNorm)]
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    return names


# %% 11.ln_tuning wrong
def add_ln_tuning(model):  # the weights alone
    model.requires_grad_(False)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    for norm in norms.values():
        norm.weight.requires_grad_(True)
    return list(norms)


# %% 11.ln_tuning wrong
def add_ln_tuning(model):  # reset
    model.requires_grad_(False)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    for norm in norms.values():
        norm.requires_grad_(True)
        nn.init.zeros_(norm.weight)
    return list(norms)


# %% 11.ln_tuning right
def add_ln_tuning(model):
    names = set()
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            p.requires_grad = type(module) is nn.LayerNorm
        if type(module) is nn.LayerNorm:
            names.add(name)
    return names


# %% 11.ln_tuning right
def add_ln_tuning(model):
    for p in model.parameters():
        p.requires_grad_(False)
    for m in (found := [m for m in model.modules() if isinstance(m, nn.LayerNorm)]):
        m.weight.requires_grad_(), m.bias.requires_grad_()
    return [name for name, m in model.named_modules() if m in found]
