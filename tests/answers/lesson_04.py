"""Wrong answers to the exercises of lesson 04, and right ones that differ from the solution."""

# %% 04.label wrong
label = 0
# %% 04.label wrong
label = -1
# %% 04.label wrong
label = 100
# %% 04.label wrong
label = "ignored"
# %% 04.label right
label = -100.0
# %% 04.label right
label = torch.tensor(-100)

# %% 04.worse wrong
worse = []
# %% 04.worse wrong
worse = ["disabled"]
# %% 04.worse wrong
worse = ["enabled", "disabled"]
# %% 04.worse wrong
worse = ["merged"]
# %% 04.worse wrong
worse = True
# %% 04.worse right
worse = ("Enabled",)
# %% 04.worse right
worse = "enabled"

# %% 04.count wrong
trained = 12 * 100 * 768
room = 924
# %% 04.count wrong
trained = 100 * 768
room = 1024
# %% 04.count wrong
trained = 768
room = 924
# %% 04.count wrong
trained = 100 * 768
room = 1124
# %% 04.count wrong
trained = 924
room = 100 * 768
# %% 04.count right
trained = 76800.0
room = torch.tensor(924)
# %% 04.count right
trained = torch.empty(100, 768).numel()
room = len(range(100, 1024))

# %% 04.seen wrong
after = [0, 1, 2, 3, 4, 5]
between = [4, 5]
# %% 04.seen wrong
after = []
between = [0, 1, 2, 3, 4, 5]
# %% 04.seen wrong
after = []
between = [3, 4, 5]
# %% 04.seen wrong
after = []
between = [0, 1, 2, 3]
# %% 04.seen wrong
after = [5]
between = [4, 5]
# %% 04.seen wrong
after = []
between = [4]
# %% 04.seen wrong
after = []
between = []
# %% 04.seen wrong
after = 0
between = [4, 5]
# %% 04.seen right
after = set()
between = range(4, 6)
# %% 04.seen right
after = ()
between = (5, 4)


# %% 04.prepend wrong
def prepend(P, x, mask, labels):  # after the text
    b, p = len(x), len(P)
    x = torch.cat([x, P.expand(b, -1, -1)], dim=1)
    mask = torch.cat([mask, mask.new_ones(b, p)], dim=1)
    return x, mask, torch.cat([labels, labels.new_full((b, p), -100)], dim=1)


# %% 04.prepend wrong
def prepend(P, x, mask, labels):  # hidden
    b, p = len(x), len(P)
    x = torch.cat([P.expand(b, -1, -1), x], dim=1)
    mask = torch.cat([mask.new_zeros(b, p), mask], dim=1)
    return x, mask, torch.cat([labels.new_full((b, p), -100), labels], dim=1)


# %% 04.prepend wrong
def prepend(P, x, mask, labels):  # label 0
    b, p = len(x), len(P)
    x = torch.cat([P.expand(b, -1, -1), x], dim=1)
    mask = torch.cat([mask.new_ones(b, p), mask], dim=1)
    return x, mask, torch.cat([labels.new_zeros(b, p), labels], dim=1)


# %% 04.prepend wrong
def prepend(P, x, mask, labels):  # detached
    b, p = len(x), len(P)
    x = torch.cat([P.detach().expand(b, -1, -1), x], dim=1)
    mask = torch.cat([mask.new_ones(b, p), mask], dim=1)
    return x, mask, torch.cat([labels.new_full((b, p), -100), labels], dim=1)


# %% 04.prepend wrong
def prepend(P, x, mask, labels):  # labels become floats
    b, p = len(x), len(P)
    x = torch.cat([P.expand(b, -1, -1), x], dim=1)
    mask = torch.cat([torch.ones(b, p), mask], dim=1)
    return x, mask, torch.cat([torch.full((b, p), -100.0), labels], dim=1)


# %% 04.prepend wrong
def prepend(P, x, mask, labels):  # a batch of one only
    p = len(P)
    x = torch.cat([P[None], x], dim=1)
    mask = torch.cat([mask.new_ones(1, p), mask], dim=1)
    return x, mask, torch.cat([labels.new_full((1, p), -100), labels], dim=1)


# %% 04.prepend wrong
def prepend(P, x, mask, labels):  # x only
    return torch.cat([P.expand(len(x), -1, -1), x], dim=1), mask, labels


# %% 04.prepend wrong
def prepend(P, x, mask, labels):  # the order of what is returned
    b, p = len(x), len(P)
    x = torch.cat([P.expand(b, -1, -1), x], dim=1)
    mask = torch.cat([mask.new_ones(b, p), mask], dim=1)
    return x, torch.cat([labels.new_full((b, p), -100), labels], dim=1), mask


# %% 04.prepend wrong
def prepend(P, x, mask, labels):  # hard-coded: three virtual tokens
    b = len(x)
    x = torch.cat([P.expand(b, -1, -1), x], dim=1)
    mask = torch.cat([mask.new_ones(b, 3), mask], dim=1)
    return x, mask, torch.cat([labels.new_full((b, 3), -100), labels], dim=1)


# %% 04.prepend wrong
def prepend(P, x, mask, labels):  # the mask of the text is lost
    b, p = len(x), len(P)
    x = torch.cat([P.expand(b, -1, -1), x], dim=1)
    return x, torch.ones(x.shape[:2]), torch.cat([labels.new_full((b, p), -100), labels], dim=1)


# %% 04.prepend right
def prepend(P, x, mask, labels):
    pad = nn.functional.pad
    x = torch.cat((P.repeat(len(x), 1, 1), x), 1)
    return [x, pad(mask, (len(P), 0), value=1), pad(labels, (len(P), 0), value=-100)]


# %% 04.prepend right
def prepend(P, x, mask, labels):
    rows = torch.stack([torch.vstack([P, row]) for row in x])
    b, p = len(x), len(P)
    mask = torch.hstack([torch.ones(b, p), mask])
    return rows, mask, torch.hstack([torch.full((b, p), -100), labels])


# %% 04.prepend right
def prepend(P, x, mask, labels):  # a mask of booleans
    b, p = len(x), len(P)
    x = torch.cat([P.expand(b, -1, -1), x], dim=1)
    labels = torch.cat([labels.new_full((b, p), -100), labels], dim=1)
    return x, torch.cat([mask.new_ones(b, p), mask], dim=1).bool(), labels


# %% 04.moves wrong
noise = 0.01
embeddings = 1
# %% 04.moves wrong
noise = 0.2
embeddings = 0.2
# %% 04.moves wrong
noise = 0.2
embeddings = 0.04
# %% 04.moves wrong
noise = 5
embeddings = 1
# %% 04.moves wrong
noise = 1
embeddings = 0.2
# %% 04.moves right
noise = 1 / 5
embeddings = 1
# %% 04.moves right
noise = torch.tensor(0.2)
embeddings = 20 * 0.01 * 5


# %% 04.mixed wrong
def mixed(model, prompts, which, ids):  # nothing dropped
    x = torch.cat([prompts[which], model.get_input_embeddings()(ids)], dim=1)
    return model(inputs_embeds=x).logits


# %% 04.mixed wrong
def mixed(model, prompts, which, ids):  # after the text
    x = torch.cat([model.get_input_embeddings()(ids), prompts[which]], dim=1)
    return model(inputs_embeds=x).logits[:, : ids.shape[1]]


# %% 04.mixed wrong
def mixed(model, prompts, which, ids):  # one prompt for all
    same = prompts[which[0]].expand(len(ids), -1, -1)
    x = torch.cat([same, model.get_input_embeddings()(ids)], dim=1)
    return model(inputs_embeds=x).logits[:, prompts.shape[1] :]


# %% 04.mixed wrong
def mixed(model, prompts, which, ids):  # the last p are dropped
    x = torch.cat([prompts[which], model.get_input_embeddings()(ids)], dim=1)
    return model(inputs_embeds=x).logits[:, : -prompts.shape[1]]


# %% 04.mixed wrong
def mixed(model, prompts, which, ids):  # which is ignored
    front = prompts[torch.arange(len(ids)) % len(prompts)]
    x = torch.cat([front, model.get_input_embeddings()(ids)], dim=1)
    return model(inputs_embeds=x).logits[:, prompts.shape[1] :]


# %% 04.mixed wrong
def mixed(model, prompts, which, ids):  # hard-coded: four virtual tokens
    x = torch.cat([prompts[which], model.get_input_embeddings()(ids)], dim=1)
    return model(inputs_embeds=x).logits[:, 4:]


# %% 04.mixed wrong
def mixed(model, prompts, which, ids):  # added to the text
    x = model.get_input_embeddings()(ids) + prompts[which].mean(1, keepdim=True)
    return model(inputs_embeds=x).logits


# %% 04.mixed right
def mixed(model, prompts, which, ids):
    rows = []
    for row, i in zip(ids, which, strict=True):
        x = torch.cat([prompts[i], model.get_input_embeddings()(row)])[None]
        rows.append(model(inputs_embeds=x).logits[0, len(prompts[i]) :])
    return torch.stack(rows)


# %% 04.mixed right
def mixed(model, prompts, which, ids):
    chosen = nn.functional.one_hot(which, len(prompts)).float()
    front = torch.einsum("bn,npd->bpd", chosen, prompts)
    x = torch.cat([front, model.transformer.wte(ids)], dim=1)
    return model(inputs_embeds=x).logits[:, -ids.shape[1] :]


# %% 04.fill wrong
def fill(ids, p):
    return ids[:p]


# %% 04.fill wrong
def fill(ids, p):
    return ids * p


# %% 04.fill wrong
def fill(ids, p):
    return (ids + ids[-1:] * p)[:p]


# %% 04.fill wrong
def fill(ids, p):
    return [i for i in ids for _ in range(p)][:p]


# %% 04.fill wrong
def fill(ids, p):
    return (ids * p)[-p:]


# %% 04.fill wrong
def fill(ids, p):
    return ids * (p // len(ids))


# %% 04.fill wrong
def fill(ids, p):  # twice at most
    return (ids + ids)[:p]


# %% 04.fill right
def fill(ids, p):
    return torch.tensor(ids).repeat(p)[:p]


# %% 04.fill right
def fill(ids, p):
    import itertools

    return itertools.islice(itertools.cycle(ids), p)


# %% 04.nearest wrong
def nearest(P, E):
    return (P @ E.T).argmax(dim=1)


# %% 04.nearest wrong
def nearest(P, E):
    return torch.cdist(P, E).argmin(dim=1)


# %% 04.nearest wrong
def nearest(P, E):
    unit = torch.nn.functional.normalize
    return (unit(P, dim=1) @ unit(E, dim=1).T).max(dim=1)


# %% 04.nearest wrong
def nearest(P, E):
    unit = torch.nn.functional.normalize
    return (unit(P, dim=0) @ unit(E, dim=0).T).argmax(dim=1)


# %% 04.nearest wrong
def nearest(P, E):
    unit = torch.nn.functional.normalize
    return (unit(P, dim=1) @ unit(E, dim=1).T).argmax(dim=0)


# %% 04.nearest wrong
def nearest(P, E):  # a large cosine, of either sign
    unit = torch.nn.functional.normalize
    return (unit(P, dim=1) @ unit(E, dim=1).T).abs().argmax(dim=1)


# %% 04.nearest right
def nearest(P, E):
    return nn.functional.cosine_similarity(P[:, None], E[None], dim=-1).argmax(1)


# %% 04.nearest right
def nearest(P, E):
    return [max(range(len(E)), key=lambda j: (p @ E[j] / E[j].norm()).item()) for p in P]
