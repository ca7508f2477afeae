"""Wrong answers to the exercises of lesson 03, and right ones that differ from the solution."""

# %% 03.lora_rank wrong
lora_rank = 128
# %% 03.lora_rank wrong
lora_rank = 384
# %% 03.lora_rank wrong
lora_rank = 16
# %% 03.lora_rank wrong
lora_rank = 4096
# %% 03.lora_rank right
lora_rank = 8.0
# %% 03.lora_rank right
lora_rank = torch.randn(384, 8).shape[1]

# %% 03.forgets_less wrong
forgets_less = "rank"
# %% 03.forgets_less wrong
forgets_less = "steps"
# %% 03.forgets_less wrong
forgets_less = "decay"
# %% 03.forgets_less wrong
forgets_less = True
# %% 03.forgets_less right
forgets_less = "weight decay"
# %% 03.forgets_less right
forgets_less = "Weight decay "


# %% 03.update wrong
def update(P, E, Q, s):
    return P @ torch.diag(E) @ Q


# %% 03.update wrong
def update(P, E, Q, s):
    return s * P @ Q


# %% 03.update wrong
def update(P, E, Q, s):
    return s * (P @ Q) * E.sum()


# %% 03.update wrong
def update(P, E, Q, s):
    return s * Q.T @ torch.diag(E) @ P.T


# %% 03.update wrong
def update(P, E, Q, s):
    return s * P @ torch.diag(E.abs()) @ Q


# %% 03.update wrong
def update(P, E, Q, s):  # works for the shapes of the toy only
    return s * sum(E[i] * P[:, i : i + 1] @ Q[i : i + 1] for i in range(3))


# %% 03.update wrong
def update(P, E, Q, s):
    P *= E
    return s * P @ Q


# %% 03.update right
def update(P, E, Q, s):
    return (P * E) @ (s * Q)


# %% 03.update right
def update(P, E, Q, s):
    return sum(s * E[i] * torch.outer(P[:, i], Q[i]) for i in range(len(E)))


# %% 03.update right
def update(P, E, Q, s):
    return torch.einsum("or,r,ri->oi", P, E, Q) * s


# %% 03.stays wrong
only_e_zero = ["p", "q"]
all_zero = []
# %% 03.stays wrong
only_e_zero = []
all_zero = []
# %% 03.stays wrong
only_e_zero = ["e", "p", "q"]
all_zero = []
# %% 03.stays wrong
only_e_zero = ["e"]
all_zero = ["e"]
# %% 03.stays wrong
only_e_zero = ["e"]
all_zero = ["p", "q"]
# %% 03.stays wrong
only_e_zero = True
all_zero = False
# %% 03.stays right
only_e_zero = {"e"}
all_zero = ()
# %% 03.stays right
only_e_zero = "E"
all_zero = ""


# %% 03.importance wrong
def importance(values, beta):  # the average before the value
    average, deviation = 0.0, 0.0
    for value in values:
        deviation = beta * deviation + (1 - beta) * abs(value - average)
        average = beta * average + (1 - beta) * value
    return average, deviation


# %% 03.importance wrong
def importance(values, beta):  # swapped
    average, deviation = 0.0, 0.0
    for value in values:
        average = (1 - beta) * average + beta * value
        deviation = (1 - beta) * deviation + beta * abs(value - average)
    return average, deviation


# %% 03.importance wrong
def importance(values, beta):  # no abs
    average, deviation = 0.0, 0.0
    for value in values:
        average = beta * average + (1 - beta) * value
        deviation = beta * deviation + (1 - beta) * (value - average)
    return average, deviation


# %% 03.importance wrong
def importance(values, beta):  # starts at the first value
    average, deviation = values[0], 0.0
    for value in values[1:]:
        average = beta * average + (1 - beta) * value
        deviation = beta * deviation + (1 - beta) * abs(value - average)
    return average, deviation


# %% 03.importance wrong
def importance(values, beta):  # a standard deviation
    average = sum(values) / len(values)
    return average, (sum((v - average) ** 2 for v in values) / len(values)) ** 0.5


# %% 03.importance wrong
def importance(values, beta):  # hard-coded β
    average, deviation = 0.0, 0.0
    for value in values:
        average = 0.85 * average + 0.15 * value
        deviation = 0.85 * deviation + 0.15 * abs(value - average)
    return average, deviation


# %% 03.importance wrong
def importance(values, beta):  # the product
    average, deviation = 0.0, 0.0
    for value in values:
        average = beta * average + (1 - beta) * value
        deviation = beta * deviation + (1 - beta) * abs(value - average)
    return average * deviation


# %% 03.importance right
def importance(values, beta):
    n, averages = len(values), []
    for k in range(1, n + 1):
        averages.append(sum((1 - beta) * beta ** (k - 1 - i) * values[i] for i in range(k)))
    jumps = [abs(v - a) for v, a in zip(values, averages, strict=True)]
    return averages[-1], sum((1 - beta) * beta ** (n - 1 - i) * jumps[i] for i in range(n))


# %% 03.importance right
def importance(values, beta):
    average = deviation = torch.zeros(())
    for value in values:
        average = torch.lerp(torch.as_tensor(value), average + 0 * value, beta)
        deviation = beta * deviation + (1 - beta) * (value - average).abs()
    return [average, deviation]


# %% 03.scores wrong
def triplet_scores(smooth, jumps):
    p, e, q = (smooth[k] * jumps[k] for k in "PEQ")
    return e + p.sum(0) + q.sum(1)


# %% 03.scores wrong
def triplet_scores(smooth, jumps):
    p, e, q = (smooth[k] * jumps[k] for k in "PEQ")
    return e + p.mean(1) + q.mean(1)


# %% 03.scores wrong
def triplet_scores(smooth, jumps):
    p, e, q = (smooth[k] * jumps[k] for k in "PEQ")
    return e[:, None] + p.mean(0) + q.mean(1)


# %% 03.scores wrong
def triplet_scores(smooth, jumps):
    return smooth["E"] * jumps["E"]


# %% 03.scores wrong
def triplet_scores(smooth, jumps):
    return smooth["E"] + smooth["P"].mean(0) + smooth["Q"].mean(1)


# %% 03.scores wrong
def triplet_scores(smooth, jumps):
    p, q = smooth["P"].mean(0) * jumps["P"].mean(0), smooth["Q"].mean(1) * jumps["Q"].mean(1)
    return smooth["E"] * jumps["E"] + p + q


# %% 03.scores wrong
def triplet_scores(smooth, jumps):
    p, e, q = (smooth[k] * jumps[k] for k in "PEQ")
    return e.mean() + p.mean() + q.mean()


# %% 03.scores right
def triplet_scores(smooth, jumps):
    p, e, q = (smooth[k] * jumps[k] for k in "PEQ")
    return [float(e[i] + p[:, i].mean() + q[i].mean()) for i in range(len(e))]


# %% 03.scores right
def triplet_scores(smooth, jumps):
    p, e, q = (smooth[k] * jumps[k] for k in "PEQ")
    return (e[i] + p[:, i].mean() + q[i].mean() for i in range(len(e)))


# %% 03.scores right
def triplet_scores(smooth, jumps):
    p, e, q = (smooth[k] * jumps[k] for k in "PEQ")
    for i in range(len(e)):
        yield e[i] + p[:, i].sum() / len(p) + q[i].sum() / q.shape[1]


# %% 03.budget wrong
still_to_prune = 32
# %% 03.budget wrong
still_to_prune = 136
# %% 03.budget wrong
still_to_prune = 56
# %% 03.budget wrong
still_to_prune = 64
# %% 03.budget wrong
still_to_prune = 16
# %% 03.budget right
still_to_prune = 8
# %% 03.budget right
still_to_prune = 128 + 64 * 0.125 - 128


# %% 03.ranks wrong
def ranks(scores, budget):  # the same for each
    return {name: budget // len(scores) for name in scores}


# %% 03.ranks wrong
def ranks(scores, budget):  # one too few
    threshold = sorted((float(s) for v in scores.values() for s in v), reverse=True)[budget - 1]
    return {name: sum(float(s) > threshold for s in v) for name, v in scores.items()}


# %% 03.ranks wrong
def ranks(scores, budget):  # the lowest
    threshold = sorted(float(s) for v in scores.values() for s in v)[budget - 1]
    return {name: sum(float(s) <= threshold for s in v) for name, v in scores.items()}


# %% 03.ranks wrong
def ranks(scores, budget):  # the budget is pruned
    order = sorted(((float(s), n) for n, v in scores.items() for s in v), reverse=True)
    kept = [n for _, n in order[: len(order) - budget]]
    return {name: kept.count(name) for name in scores}


# %% 03.ranks wrong
def ranks(scores, budget):  # a matrix that loses everything is missing
    kept = [n for _, n in sorted((float(s), n) for n, v in scores.items() for s in v)[-budget:]]
    return {name: kept.count(name) for name in set(kept)}


# %% 03.ranks wrong
def ranks(scores, budget):  # each matrix
    return {name: min(len(v), budget) for name, v in scores.items()}


# %% 03.ranks wrong
def ranks(scores, budget):  # the numbers of values above the mean
    mean = torch.cat(list(scores.values())).mean()
    return {name: int((v > mean).sum()) for name, v in scores.items()}


# %% 03.ranks right
def ranks(scores, budget):
    everything = torch.cat(list(scores.values()))
    mask = torch.zeros(len(everything), dtype=torch.bool)
    mask[everything.topk(budget).indices] = True
    parts = mask.split([len(v) for v in scores.values()])
    return {name: part.sum() for name, part in zip(scores, parts, strict=True)}


# %% 03.ranks right
def ranks(scores, budget):
    order = sorted(((float(s), n) for n, v in scores.items() for s in v), reverse=True)
    found = dict.fromkeys(scores, 0)
    for _, name in order[:budget]:
        found[name] += 1
    return found


# %% 03.gpt2 wrong
gpt2 = 12 * 8 * (768 + 3 * 768 + 1)
# %% 03.gpt2 wrong
gpt2 = 12 * 16 * (768 + 3 * 768)
# %% 03.gpt2 wrong
gpt2 = 16 * (768 + 3 * 768 + 1)
# %% 03.gpt2 wrong
gpt2 = 12 * (768 + 3 * 768 + 1)
# %% 03.gpt2 wrong
gpt2 = 12 * 16 * (2 * 768 + 1)
# %% 03.gpt2 wrong
gpt2 = "590016"
# %% 03.gpt2 right
gpt2 = 590016.0
# %% 03.gpt2 right
gpt2 = sum(16 * 768 + 16 + 16 * 3 * 768 for _ in range(12))


# %% 03.angles wrong
def angles(layers):  # rows of lora_B
    total, matrices = 0.0, [m for s in layers.values() for m in (s.lora_A, s.lora_B)]
    for m in matrices:
        square = m @ m.T
        total = total + (square - torch.diag(square.diagonal())).norm()
    return total / len(matrices)


# %% 03.angles wrong
def angles(layers):  # the lengths too
    total, matrices = 0.0, [m for s in layers.values() for m in (s.lora_A, s.lora_B.T)]
    for m in matrices:
        total = total + (m @ m.T - torch.eye(len(m))).norm()
    return total / len(matrices)


# %% 03.angles wrong
def angles(layers):  # the mean over the layers
    total = 0.0
    for s in layers.values():
        for m in (s.lora_A, s.lora_B.T):
            square = m @ m.T
            total = total + (square - torch.diag(square.diagonal())).norm()
    return total / len(layers)


# %% 03.angles wrong
def angles(layers):  # detached
    total, matrices = 0.0, [m for s in layers.values() for m in (s.lora_A, s.lora_B.T)]
    for m in matrices:
        square = m @ m.T
        total = total + (square - torch.diag(square.diagonal())).norm()
    return (total / len(matrices)).detach()


# %% 03.angles wrong
def angles(layers):  # half of the gradient
    total, matrices = 0.0, [m for s in layers.values() for m in (s.lora_A, s.lora_B.T)]
    for m in matrices:
        square = m @ m.detach().T
        total = total + (square - torch.diag(square.diagonal())).norm()
    return total / len(matrices)


# %% 03.angles wrong
def angles(layers):  # each pair once
    total, matrices = 0.0, [m for s in layers.values() for m in (s.lora_A, s.lora_B.T)]
    for m in matrices:
        total = total + (m @ m.T).triu(1).norm()
    return total / len(matrices)


# %% 03.angles wrong
def angles(layers):  # the gradient is NaN at right angles
    total, matrices = 0.0, [m for s in layers.values() for m in (s.lora_A, s.lora_B.T)]
    for m in matrices:
        square = m @ m.T
        total = total + (square - torch.diag(square.diagonal())).square().sum().sqrt()
    return total / len(matrices)


# %% 03.angles wrong
def angles(layers):  # only lora_A
    products = [s.lora_A @ s.lora_A.T for s in layers.values()]
    return sum((p - torch.diag(p.diagonal())).norm() for p in products) / len(products)


# %% 03.angles right
def angles(layers):
    total, matrices = 0.0, [m for s in layers.values() for m in (s.lora_A, s.lora_B.T)]
    for m in matrices:
        square = m @ m.T
        off = square - torch.diag(square.diagonal())
        total = total + (off.square().sum() + 1e-12).sqrt()
    return total / len(matrices)


# %% 03.angles right
def angles(layers):
    norms = []
    for s in layers.values():
        for m in (s.lora_A, s.lora_B.T):
            norms.append(2**0.5 * (m @ m.T).triu(1).norm())
    return torch.stack(norms).mean()


# %% 03.angles right
def angles(layers):
    def off(m):
        keep = 1 - torch.eye(len(m))
        return torch.linalg.matrix_norm((m @ m.T) * keep)

    return sum((off(s.lora_A) + off(s.lora_B.T)) / 2 for s in layers.values()) / len(layers)
