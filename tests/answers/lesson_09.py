"""Wrong answers to the exercises of lesson 09, and right ones that differ from the solution."""

# %% 09.scaling wrong
scaling = 16
# %% 09.scaling wrong
scaling = 8 / 16
# %% 09.scaling wrong
scaling = 8 * 16
# %% 09.scaling wrong
scaling = "2"
# %% 09.scaling right
scaling = 2
# %% 09.scaling right
scaling = torch.tensor(2.0)

# %% 09.split wrong
split = "test"
# %% 09.split wrong
split = "training"
# %% 09.split wrong
split = ["validation", "test"]
# %% 09.split wrong
split = True
# %% 09.split right
split = "Validation"
# %% 09.split right
split = " validation "


# %% 09.best_rate wrong
def best_rate(losses):  # no edges
    return min(losses, key=losses.get)


# %% 09.best_rate wrong
def best_rate(losses):  # the edges of the list as it is written
    rates = list(losses)
    best = min(losses, key=losses.get)
    return None if best in (rates[0], rates[-1]) else best


# %% 09.best_rate wrong
def best_rate(losses):  # only the upper edge
    best = min(losses, key=losses.get)
    return None if best == max(losses) else best


# %% 09.best_rate wrong
def best_rate(losses):  # the loss
    best = min(losses, key=losses.get)
    return None if best in (min(losses), max(losses)) else losses[best]


# %% 09.best_rate wrong
def best_rate(losses):  # the best of the inner rates
    inner = sorted(losses)[1:-1]
    return min(inner, key=losses.get) if inner else None


# %% 09.best_rate wrong
def best_rate(losses):  # hard-coded
    return 0.002


# %% 09.best_rate wrong
def best_rate(losses):  # a run that diverged is no edge, it thinks
    finite = {rate: loss for rate, loss in losses.items() if loss < float("inf")}
    best = min(finite, key=finite.get)
    return None if best in (min(finite), max(finite)) else best


# %% 09.best_rate right
def best_rate(losses):
    rates = sorted(losses)
    i = min(range(len(rates)), key=lambda i: losses[rates[i]])
    return rates[i] if 0 < i < len(rates) - 1 else None


# %% 09.best_rate right
def best_rate(losses):
    loss, rate = min((loss, rate) for rate, loss in losses.items())
    if any(other < rate for other in losses) and any(other > rate for other in losses):
        return rate


# %% 09.front wrong
def front(points):  # better in both only
    return [p for p in points if not any(q[0] > p[0] and q[1] < p[1] for q in points)]


# %% 09.front wrong
def front(points):  # each point beats itself
    return [p for p in points if not any(q[0] >= p[0] and q[1] <= p[1] for q in points)]


# %% 09.front wrong
def front(points):  # high forgetting taken for good
    return [p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]


# %% 09.front wrong
def front(points):  # only the best score
    best = max(points, default=None)
    return [p for p in points if p == best]


# %% 09.front wrong
def front(points):  # hard-coded
    return [(0.9, 1.0), (0.8, 0.5), (0.95, 3.0)]


# %% 09.front wrong
def front(points):  # whether, not which
    return [not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points) for p in points]


# %% 09.front wrong
def front(points):  # the empty list
    max(points)
    return [p for p in points if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points)]


# %% 09.front right
def front(points):  # a generator
    return (p for p in points if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points))


# %% 09.front right
def front(points):  # sorted, each point once, as lists
    kept, least = [], float("inf")
    for score, forgetting in sorted(set(points), key=lambda p: (-p[0], p[1])):
        if forgetting < least:
            kept.append([score, forgetting])
            least = forgetting
    return kept


# %% 09.front right
def front(points):  # a set
    return {p for p in points if all(q == p or q[0] < p[0] or q[1] > p[1] for q in points)}


# %% 09.choose wrong
def choose(validation, test):  # by the test score
    best = max(test, key=test.get)
    return best, test[best]


# %% 09.choose wrong
def choose(validation, test):  # the validation score
    best = max(validation, key=validation.get)
    return best, validation[best]


# %% 09.choose wrong
def choose(validation, test):  # the best test score
    return max(validation, key=validation.get), max(test.values())


# %% 09.choose wrong
def choose(validation, test):  # the mean decides
    best = max(validation, key=lambda s: validation[s] + test[s])
    return best, test[best]


# %% 09.choose wrong
def choose(validation, test):  # only the score
    return test[max(validation, key=validation.get)]


# %% 09.choose wrong
def choose(validation, test):  # takes the orders for the same
    i = max(range(len(validation)), key=lambda i: list(validation.values())[i])
    return list(validation)[i], list(test.values())[i]


# %% 09.choose right
def choose(validation, test):
    score, best = max((score, name) for name, score in validation.items())
    return [best, test[best]]


# %% 09.choose right
def choose(validation, test):
    best = sorted(validation, key=validation.get)[-1]
    return best, test.get(best)


# %% 09.differs wrong
def differs(a, b):  # not paired
    return abs(sum(a) / len(a) - sum(b) / len(b)) > report.interval(a) + report.interval(b)


# %% 09.differs wrong
def differs(a, b):  # only one direction
    d = [x - y for x, y in zip(a, b, strict=True)]
    return sum(d) / len(d) > report.interval(d)


# %% 09.differs wrong
def differs(a, b):  # the means differ
    return sum(a) != sum(b)


# %% 09.differs wrong
def differs(a, b):  # the sign of the question
    d = [x - y for x, y in zip(a, b, strict=True)]
    return abs(sum(d) / len(d)) < report.interval(d)


# %% 09.differs wrong
def differs(a, b):  # a standard deviation is no interval of the mean
    d = torch.tensor([x - y for x, y in zip(a, b, strict=True)])
    return bool(d.mean().abs() > d.std())


# %% 09.differs wrong
def differs(a, b):  # all seeds agree
    d = [x - y for x, y in zip(a, b, strict=True)]
    return all(x > 0 for x in d) or all(x < 0 for x in d)


# %% 09.differs wrong
def differs(a, b):  # the interval itself
    d = [x - y for x, y in zip(a, b, strict=True)]
    return sum(d) / len(d) - report.interval(d), sum(d) / len(d) + report.interval(d)


# %% 09.differs right
def differs(a, b):
    d = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    return d.mean().abs() > report.interval(d.tolist())


# %% 09.differs right
def differs(a, b):
    d = [y - x for x, y in zip(a, b, strict=True)]
    mean, half = sum(d) / len(d), report.interval(d)
    return not mean - half <= 0 <= mean + half


# %% 09.alpha wrong
alpha_lora = 16
alpha_rslora = 16
# %% 09.alpha wrong
alpha_lora = 64
alpha_rslora = 64
# %% 09.alpha wrong
alpha_lora = 32
alpha_rslora = 32
# %% 09.alpha wrong
alpha_lora = 4
alpha_rslora = 8
# %% 09.alpha wrong
alpha_lora = 2
alpha_rslora = 2
# %% 09.alpha right
alpha_lora = 2 * 32
alpha_rslora = 16 * (32 / 8) ** 0.5
# %% 09.alpha right
alpha_lora = torch.tensor(64.0)
alpha_rslora = 16 / 8**0.5 * 32**0.5


# %% 09.intruders wrong
def intruders(before, after, k, below):  # the sign of a vector counts
    old = torch.linalg.svd(before, full_matrices=False)[0]
    new = torch.linalg.svd(after, full_matrices=False)[0][:, :k]
    return int(((old.T @ new).amax(0) < below).sum())


# %% 09.intruders wrong
def intruders(before, after, k, below):  # also vectors that W does not use
    old, new = torch.linalg.svd(before)[0], torch.linalg.svd(after)[0][:, :k]
    return int(((old.T @ new).abs().amax(0) < below).sum())


# %% 09.intruders wrong
def intruders(before, after, k, below):  # only the vector of equal number
    old = torch.linalg.svd(before, full_matrices=False)[0]
    new = torch.linalg.svd(after, full_matrices=False)[0][:, :k]
    return int(((old[:, : new.shape[1]] * new).sum(0).abs() < below).sum())


# %% 09.intruders wrong
def intruders(before, after, k, below):  # only the first k of W
    old = torch.linalg.svd(before, full_matrices=False)[0][:, :k]
    new = torch.linalg.svd(after, full_matrices=False)[0][:, :k]
    return int(((old.T @ new).abs().amax(0) < below).sum())


# %% 09.intruders wrong
def intruders(before, after, k, below):  # right singular vectors
    old = torch.linalg.svd(before, full_matrices=False)[2]
    new = torch.linalg.svd(after, full_matrices=False)[2][:k]
    return int(((old @ new.T).abs().amax(0) < below).sum())


# %% 09.intruders wrong
def intruders(before, after, k, below):  # those that are no intruders
    old = torch.linalg.svd(before, full_matrices=False)[0]
    new = torch.linalg.svd(after, full_matrices=False)[0][:, :k]
    return int(((old.T @ new).abs().amax(0) >= below).sum())


# %% 09.intruders wrong
def intruders(before, after, k, below):  # all directions
    old = torch.linalg.svd(before, full_matrices=False)[0]
    new = torch.linalg.svd(after, full_matrices=False)[0]
    return int(((old.T @ new).abs().amax(0) < below).sum())


# %% 09.intruders wrong
def intruders(before, after, k, below):  # the largest over the wrong axis
    old = torch.linalg.svd(before, full_matrices=False)[0]
    new = torch.linalg.svd(after, full_matrices=False)[0][:, :k]
    return int(((old.T @ new).abs().amax(1) < below).sum())


# %% 09.intruders wrong
def intruders(before, after, k, below):  # a fixed number instead of `below`
    old = torch.linalg.svd(before, full_matrices=False)[0]
    new = torch.linalg.svd(after, full_matrices=False)[0][:, :k]
    return int(((old.T @ new).abs().amax(0) < 0.6).sum())


# %% 09.intruders right
def intruders(before, after, k, below):  # a loop
    old = torch.linalg.svd(before, full_matrices=False).U
    new = torch.linalg.svd(after, full_matrices=False).U
    count = 0
    for vector in new.T[:k]:
        if max(abs(float(vector @ other)) for other in old.T) < below:
            count += 1
    return count


# %% 09.intruders right
def intruders(before, after, k, below):  # eigenvectors
    def left(w):
        n = min(w.shape)
        return torch.linalg.eigh(w.double() @ w.double().T)[1].flip(1)[:, :n]

    return ((left(before).T @ left(after)[:, :k]).abs().max(0).values < below).sum()


# %% 09.floor wrong
everywhere = 16 / 48
at_the_top = 4 / 48
# %% 09.floor wrong
everywhere = 31 / 48
at_the_top = 20 / 48
# %% 09.floor wrong
everywhere = 32 / 48
at_the_top = 19 / 48
# %% 09.floor wrong
everywhere = 32 / 48
at_the_top = (4 + 4) / 48
# %% 09.floor wrong
everywhere = 32 / 48
at_the_top = 32 / 48
# %% 09.floor wrong
everywhere = 1.0
at_the_top = 20 / 48
# %% 09.floor wrong
everywhere = 32
at_the_top = 20
# %% 09.floor right
everywhere = 2 / 3
at_the_top = 5 / 12
# %% 09.floor right
everywhere = 0.67
at_the_top = 0.42
# %% 09.floor right
everywhere = 1 - 16 / 48
at_the_top = torch.tensor(20 / 48)


# %% 09.groups wrong
def groups(model, rate, ratio):  # the wrong way round
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "lora_B" in n], "lr": rate},
        {"params": [p for n, p in named if "lora_A" in n], "lr": ratio * rate},
    ]


# %% 09.groups wrong
def groups(model, rate, ratio):  # frozen weights in the first group
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "lora_B" not in n], "lr": rate},
        {"params": [p for n, p in named if "lora_B" in n], "lr": ratio * rate},
    ]


# %% 09.groups wrong
def groups(model, rate, ratio):  # A is slower, instead of B faster
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "lora_A" in n], "lr": rate / ratio},
        {"params": [p for n, p in named if "lora_B" in n], "lr": rate},
    ]


# %% 09.groups wrong
def groups(model, rate, ratio):  # a fixed ratio
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "lora_A" in n], "lr": rate},
        {"params": [p for n, p in named if "lora_B" in n], "lr": 16 * rate},
    ]


# %% 09.groups wrong
def groups(model, rate, ratio):  # a generator that is used up by the first group
    named = model.named_parameters()
    return [
        {"params": [p for n, p in named if "lora_A" in n], "lr": rate},
        {"params": [p for n, p in named if "lora_B" in n], "lr": ratio * rate},
    ]


# %% 09.groups wrong
def groups(model, rate, ratio):  # only the first adapter
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "lora_A" in n][:1], "lr": rate},
        {"params": [p for n, p in named if "lora_B" in n][:1], "lr": ratio * rate},
    ]


# %% 09.groups right
def groups(model, rate, ratio):  # generators
    def named(part):
        return (p for n, p in model.named_parameters() if part in n)

    yield {"params": named("lora_A"), "lr": rate}
    yield {"params": named("lora_B"), "lr": ratio * rate}


# %% 09.groups right
def groups(model, rate, ratio):  # a tuple, from the layers
    a = [m.weight for n, m in model.named_modules() if n.endswith("lora_A")]
    b = [m.weight for n, m in model.named_modules() if n.endswith("lora_B")]
    return {"params": a, "lr": rate}, {"params": b, "lr": rate * ratio, "weight_decay": 0}


# %% 09.dora wrong
class MyDora(nn.Module):  # m starts at one
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer, self.scaling = layer.requires_grad_(False), alpha / r
        self.A = nn.Parameter(torch.randn(r, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.m = nn.Parameter(torch.ones(layer.out_features))

    def forward(self, x):
        v = self.layer.weight + self.scaling * self.B @ self.A
        w = self.m[:, None] * v / v.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, w, self.layer.bias)


# %% 09.dora wrong
class MyDora(nn.Module):  # A and B are both random
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer, self.scaling = layer.requires_grad_(False), alpha / r
        self.A = nn.Parameter(torch.randn(r, layer.in_features))
        self.B = nn.Parameter(torch.randn(layer.out_features, r))
        self.m = nn.Parameter(layer.weight.norm(dim=1))

    def forward(self, x):
        v = self.layer.weight + self.scaling * self.B @ self.A
        w = self.m[:, None] * v / v.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, w, self.layer.bias)


# %% 09.dora wrong
class MyDora(nn.Module):  # one norm for the whole matrix
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer, self.scaling = layer.requires_grad_(False), alpha / r
        self.A = nn.Parameter(torch.randn(r, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.m = nn.Parameter(layer.weight.norm(dim=1))

    def forward(self, x):
        v = self.layer.weight + self.scaling * self.B @ self.A
        return nn.functional.linear(x, self.m[:, None] * v / v.norm(), self.layer.bias)


# %% 09.dora wrong
class MyDora(nn.Module):  # divides by the norm of W
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer, self.scaling = layer.requires_grad_(False), alpha / r
        self.A = nn.Parameter(torch.randn(r, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.m = nn.Parameter(layer.weight.norm(dim=1))

    def forward(self, x):
        v = self.layer.weight + self.scaling * self.B @ self.A
        w = self.m[:, None] * v / self.layer.weight.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, w, self.layer.bias)


# %% 09.dora wrong
class MyDora(nn.Module):  # no scaling
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.m = nn.Parameter(layer.weight.norm(dim=1))

    def forward(self, x):
        v = self.layer.weight + self.B @ self.A
        w = self.m[:, None] * v / v.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, w, self.layer.bias)


# %% 09.dora wrong
class MyDora(nn.Module):  # A and B are both zero
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer, self.scaling = layer.requires_grad_(False), alpha / r
        self.A = nn.Parameter(torch.zeros(r, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.m = nn.Parameter(layer.weight.norm(dim=1))

    def forward(self, x):
        v = self.layer.weight + self.scaling * self.B @ self.A
        w = self.m[:, None] * v / v.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, w, self.layer.bias)


# %% 09.dora wrong
class MyDora(nn.Module):  # all rows of A are equal, so the update stays at rank 1
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer, self.scaling = layer.requires_grad_(False), alpha / r
        self.A = nn.Parameter(torch.full((r, layer.in_features), 0.1))
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.m = nn.Parameter(layer.weight.norm(dim=1))

    def forward(self, x):
        v = self.layer.weight + self.scaling * self.B @ self.A
        w = self.m[:, None] * v / v.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, w, self.layer.bias)


# %% 09.dora wrong
class MyDora(nn.Module):  # the direction gets no gradient
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer, self.scaling = layer.requires_grad_(False), alpha / r
        self.A = nn.Parameter(torch.randn(r, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.m = nn.Parameter(layer.weight.norm(dim=1))

    def forward(self, x):
        v = (self.layer.weight + self.scaling * self.B @ self.A).detach()
        w = self.m[:, None] * v / v.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, w, self.layer.bias)


# %% 09.dora wrong
class MyDora(nn.Module):  # the layer is not frozen
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer, self.scaling = layer, alpha / r
        self.A = nn.Parameter(torch.randn(r, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.m = nn.Parameter(layer.weight.detach().norm(dim=1))

    def forward(self, x):
        v = self.layer.weight + self.scaling * self.B @ self.A
        w = self.m[:, None] * v / v.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, w, self.layer.bias)


# %% 09.dora wrong
class MyDora(nn.Module):  # the norm of columns; it would crash or be wrong
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer, self.scaling = layer.requires_grad_(False), alpha / r
        self.A = nn.Parameter(torch.randn(r, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.m = nn.Parameter(layer.weight.norm(dim=0))

    def forward(self, x):
        v = self.layer.weight + self.scaling * self.B @ self.A
        w = self.m * v / v.norm(dim=0)
        return nn.functional.linear(x, w, self.layer.bias)


# %% 09.dora right
class MyDora(nn.Module):  # normalize, and the bias by hand
    def __init__(self, layer, r, alpha):
        super().__init__()
        for p in layer.parameters():
            p.requires_grad = False
        self.layer, self.r, self.alpha = layer, r, alpha
        self.A = nn.Parameter(torch.rand(r, layer.in_features) - 0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.m = nn.Parameter(torch.linalg.vector_norm(layer.weight, dim=1))

    def forward(self, x):
        v = self.layer.weight + self.alpha / self.r * (self.B @ self.A)
        y = (x @ nn.functional.normalize(v, dim=1).T) * self.m
        return y if self.layer.bias is None else y + self.layer.bias


# %% 09.dora right
class MyDora(nn.Module):  # the norm is a constant in the backward pass, as in the paper
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer, self.scaling = layer.requires_grad_(False), alpha / r
        self.A = nn.Parameter(torch.randn(r, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.m = nn.Parameter(layer.weight.norm(dim=1).clone())

    def forward(self, x):
        norm = (self.layer.weight + self.scaling * self.B @ self.A).detach().norm(dim=1)
        b = 0 if self.layer.bias is None else self.layer.bias
        y = self.layer(x) - b + self.scaling * (x @ self.A.T @ self.B.T)
        return self.m / norm * y + b


# %% 09.dora right
class MyDora(nn.Module):  # B is random and A zero
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer, self.scaling = layer.requires_grad_(False), alpha / r
        self.A = nn.Parameter(torch.zeros(r, layer.in_features))
        self.B = nn.Parameter(torch.randn(layer.out_features, r))
        self.m = nn.Parameter(layer.weight.norm(dim=1))

    def forward(self, x):
        v = self.layer.weight + self.scaling * self.B @ self.A
        w = self.m[:, None] * v / v.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, w, self.layer.bias)
