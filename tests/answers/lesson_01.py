"""Wrong answers to the exercises of lesson 01, and right ones that differ from the solution."""

# %% 01.target wrong
target = 9
# %% 01.target wrong
target = 5
# %% 01.target wrong
target = 7
# %% 01.target wrong
target = [2]
# %% 01.target right
target = 2.0
# %% 01.target right
target = torch.tensor([5, 9, 2, 7])[1 + 1]

# %% 01.uniform wrong
uniform = 2048
# %% 01.uniform wrong
uniform = math.log2(2048)
# %% 01.uniform wrong
uniform = -math.log(2048)
# %% 01.uniform wrong
uniform = 1 / 2048
# %% 01.uniform right
uniform = -math.log(1 / 2048)
# %% 01.uniform right
uniform = 7.62


# %% 01.make_labels wrong
def make_labels(prompt_ids, completion_ids, end, length):
    labels = prompt_ids + completion_ids + [end]
    return labels + [-100] * (length - len(labels))


# %% 01.make_labels wrong
def make_labels(prompt_ids, completion_ids, end, length):
    labels = [-100] * len(prompt_ids) + completion_ids
    return labels + [-100] * (length - len(labels))


# %% 01.make_labels wrong
def make_labels(prompt_ids, completion_ids, end, length):
    labels = [-100] * len(prompt_ids) + completion_ids
    return labels + [end] * (length - len(labels))


# %% 01.make_labels wrong
def make_labels(prompt_ids, completion_ids, end, length):
    return [-100] * len(prompt_ids) + completion_ids + [end]


# %% 01.make_labels wrong
def make_labels(prompt_ids, completion_ids, end, length):
    prompt_ids[:] = [-100] * len(prompt_ids)
    labels = prompt_ids + completion_ids[:2] + [end]
    return labels + [-100] * (length - len(labels))


# %% 01.make_labels right
def make_labels(prompt_ids, completion_ids, end, length):
    ids = [*prompt_ids, *completion_ids, end]
    for i in range(length):
        yield ids[i] if len(prompt_ids) <= i < len(ids) else -100


# %% 01.make_labels right
def make_labels(prompt_ids, completion_ids, end, length):
    labels = torch.full((length,), -100)
    labels[len(prompt_ids) : len(prompt_ids) + len(completion_ids) + 1] = torch.tensor(
        completion_ids + [end]
    )
    return labels


# %% 01.masked_loss wrong
def masked_loss(logits, labels):
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


# %% 01.masked_loss wrong
def masked_loss(logits, labels):
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    return losses.mean()


# %% 01.masked_loss wrong
def masked_loss(logits, labels):
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )


# %% 01.masked_loss wrong
def masked_loss(logits, labels):
    losses = nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
    )
    keep = labels[:, 1:] != -100
    return ((losses * keep).sum(1) / keep.sum(1)).mean()


# %% 01.masked_loss wrong
def masked_loss(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()


# %% 01.masked_loss wrong
def masked_loss(logits, labels):  # not flattened
    return nn.functional.cross_entropy(logits[:, :-1], labels[:, 1:])


# %% 01.masked_loss right
def masked_loss(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])


# %% 01.masked_loss right
def masked_loss(logits, labels):
    log_probs = logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    keep = targets != -100
    picked = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(picked * keep).sum() / keep.sum()


# %% 01.first_move wrong
move_of_5 = 5 / 100
move_of_5000 = 50
# %% 01.first_move wrong
move_of_5 = 1
move_of_5000 = 1
# %% 01.first_move wrong
move_of_5 = 0.01
move_of_5000 = 10
# %% 01.first_move wrong
move_of_5 = 0.001
move_of_5000 = 0.001
# %% 01.first_move right
move_of_5 = -0.01
move_of_5000 = -0.01
# %% 01.first_move right
move_of_5 = 0.1 * 0.1
move_of_5000 = 0.01 * 5000 / (5000**2) ** 0.5

# %% 01.gigabytes wrong
gigabytes = 14
# %% 01.gigabytes wrong
gigabytes = 28
# %% 01.gigabytes wrong
gigabytes = 7e9 * 12
# %% 01.gigabytes wrong
gigabytes = 112
# %% 01.gigabytes wrong
gigabytes = 7e9 * 12 / 2**30
# %% 01.gigabytes right
gigabytes = 7e9 * 12 / 1e9
# %% 01.gigabytes right
gigabytes = 14 + 14 + 56


# %% 01.whole_value wrong
def whole_value(loss, n):
    return math.exp(-loss)


# %% 01.whole_value wrong
def whole_value(loss, n):
    return n * math.exp(-loss)


# %% 01.whole_value wrong
def whole_value(loss, n):
    return math.exp(-loss / n)


# %% 01.whole_value wrong
def whole_value(loss, n):
    return 2 ** (-loss * n)


# %% 01.whole_value wrong
def whole_value(loss, n):
    return math.prod(math.exp(-loss) for _ in range(round(n)))


# %% 01.whole_value wrong
def whole_value(loss, n):
    return (1 - loss) ** n


# %% 01.whole_value wrong
def whole_value(loss, n):
    return 1 - (1 - math.exp(-loss)) ** n


# %% 01.whole_value right
def whole_value(loss, n):
    return (1 / math.e**loss) ** n


# %% 01.whole_value right
def whole_value(loss, n):
    return torch.tensor(-loss * n).double().exp()


# %% 01.pick wrong
def pick(points):
    return min(points, key=lambda p: p["slot_loss"])["learning_rate"]


# %% 01.pick wrong
def pick(points):
    best = min(points, key=lambda p: p["slot_loss"])
    return "edge" if best in (points[0], points[-1]) else best["learning_rate"]


# %% 01.pick wrong
def pick(points):
    rates = [p["learning_rate"] for p in points]
    best = max(points, key=lambda p: p["score"])["learning_rate"]
    return "edge" if best in (min(rates), max(rates)) else best


# %% 01.pick wrong
def pick(points):
    best = min(points, key=lambda p: p["slot_loss"])["learning_rate"]
    return "edge" if best == max(p["learning_rate"] for p in points) else best


# %% 01.pick wrong
def pick(points):
    return 0.001


# %% 01.pick wrong
def pick(points):
    points.sort(key=lambda p: p["learning_rate"])
    best = min(points, key=lambda p: p["slot_loss"])
    return "edge" if best in (points[0], points[-1]) else best


# %% 01.pick right
def pick(points):
    ordered = sorted(points, key=lambda p: p["learning_rate"])
    losses = [p["slot_loss"] for p in ordered]
    i = losses.index(min(losses))
    return ordered[i]["learning_rate"] if 0 < i < len(ordered) - 1 else "edge"


# %% 01.pick right
def pick(points):
    by_loss = {p["slot_loss"]: p["learning_rate"] for p in points}
    rate = by_loss[min(by_loss)]
    smaller = any(p["learning_rate"] < rate for p in points)
    larger = any(p["learning_rate"] > rate for p in points)
    return rate if smaller and larger else "edge"


# %% 01.chance wrong
def chance(a, b):
    pool, seen = [*a, *b], statistics.mean(b) - statistics.mean(a)
    splits = list(itertools.combinations(range(len(pool)), len(a)))
    count = 0
    for chosen in splits:
        left = statistics.mean(pool[i] for i in chosen)
        right = statistics.mean(pool[i] for i in range(len(pool)) if i not in chosen)
        count += right - left >= seen - 1e-9
    return count / len(splits)


# %% 01.chance wrong
def chance(a, b):
    pool, seen = [*a, *b], abs(statistics.mean(a) - statistics.mean(b))
    splits = list(itertools.combinations(pool, len(a)))
    count = 0
    for left in splits:
        right = [value for value in pool if value not in left]
        count += abs(statistics.mean(left) - statistics.mean(right)) >= seen - 1e-9
    return count / len(splits)


# %% 01.chance wrong
def chance(a, b):
    pool, seen = [*a, *b], abs(statistics.mean(a) - statistics.mean(b))
    splits = list(itertools.combinations(range(len(pool)), len(pool) // 2))
    count = 0
    for chosen in splits:
        left = statistics.mean(pool[i] for i in chosen)
        right = statistics.mean(pool[i] for i in range(len(pool)) if i not in chosen)
        count += abs(left - right) >= seen - 1e-9
    return count / len(splits)


# %% 01.chance wrong
def chance(a, b):
    pool, seen = [*a, *b], abs(statistics.mean(a) - statistics.mean(b))
    splits = list(itertools.combinations(range(len(pool)), len(a)))
    count = 0
    for chosen in splits:
        left = statistics.mean(pool[i] for i in chosen)
        right = statistics.mean(pool[i] for i in range(len(pool)) if i not in chosen)
        count += abs(left - right) > seen + 1e-9
    return count / len(splits)


# %% 01.chance wrong
def chance(a, b):
    return 2 / 70


# %% 01.chance right
def chance(a, b):
    pool = torch.tensor([*a, *b], dtype=torch.float64)
    n, total = len(a), pool.sum()

    def apart(left):
        return abs(left / n - (total - left) / (len(pool) - n))

    seen = apart(pool[:n].sum())
    lefts = [pool[list(c)].sum() for c in itertools.combinations(range(len(pool)), n)]
    return torch.stack([apart(left) >= seen - 1e-9 for left in lefts]).double().mean()


# %% 01.chance right
def chance(a, b):
    from fractions import Fraction

    pool = [Fraction(value).limit_denominator(10**6) for value in [*a, *b]]
    total, n = sum(pool), len(a)
    gap = {
        c: abs(sum(pool[i] for i in c) / n - (total - sum(pool[i] for i in c)) / len(b))
        for c in itertools.combinations(range(len(pool)), n)
    }
    return sum(g >= gap[tuple(range(n))] for g in gap.values()) / len(gap)
