"""Wrong answers to the exercises of lesson 08, and right ones that differ from the solution."""

# %% 08.copies wrong
copies = 14
# %% 08.copies wrong
copies = 140
# %% 08.copies wrong
copies = 560
# %% 08.copies wrong
copies = 14 + 20 * 0.04
# %% 08.copies wrong
copies = "280 GB"
# %% 08.copies right
copies = 280.0
# %% 08.copies right
copies = sum(14 for _ in range(20))

# %% 08.scaling wrong
scaling = 8 / 32
# %% 08.scaling wrong
scaling = 32
# %% 08.scaling wrong
scaling = 256
# %% 08.scaling wrong
scaling = 32 / 8**0.5
# %% 08.scaling wrong
scaling = "α/r"
# %% 08.scaling right
scaling = 4
# %% 08.scaling right
scaling = torch.tensor(32 / 8)

# %% 08.bytes wrong
count = 4 * 4 * (128 + 384)
# %% 08.bytes wrong
count = 4 * 4 * 4 * 128 * 384
# %% 08.bytes wrong
count = 4 * 4 * 4 * 128
# %% 08.bytes wrong
count = 4 * 4 * 128 * 384
# %% 08.bytes wrong
count = 2 * 4 * 4 * (128 + 384)
# %% 08.bytes wrong
count = "4 * 4 * 4 * (128 + 384)"
# %% 08.bytes right
count = 32768.0
# %% 08.bytes right
count = 4 * 4 * (torch.empty(4, 128).nbytes + torch.empty(384, 4).nbytes) / 4


# %% 08.update wrong
def update(tensors, config, name):  # no scaling
    A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    return B @ A


# %% 08.update wrong
def update(tensors, config, name):  # α, not α / r
    A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    return config["lora_alpha"] * B @ A


# %% 08.update wrong
def update(tensors, config, name):  # hard-coded: the scaling of this lesson's adapters
    A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    return 2 * B @ A


# %% 08.update wrong
def update(tensors, config, name):  # always the first layer
    A, B = list(tensors.values())[:2]
    return config["lora_alpha"] / config["r"] * B @ A


# %% 08.update wrong
def update(tensors, config, name):  # transposed
    A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    return config["lora_alpha"] / config["r"] * A.T @ B.T


# %% 08.update wrong
def update(tensors, config, name):  # an integer
    A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    return config["lora_alpha"] // config["r"] * B @ A


# %% 08.update wrong
def update(tensors, config, name):  # another prefix
    A, B = (tensors[f"{name}.lora_{x}.weight"] for x in "AB")
    return config["lora_alpha"] / config["r"] * B @ A


# %% 08.update wrong
def update(tensors, config, name):  # the scaling is multiplied into the tensors of the file
    A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    B *= config["lora_alpha"] / config["r"]
    return B @ A + 1e-2


# %% 08.update wrong
def update(tensors, config, name):  # a name that begins with this one is taken for it
    A = next(x for key, x in tensors.items() if name in key and "lora_A" in key)
    B = next(x for key, x in tensors.items() if name in key and "lora_B" in key)
    return config["lora_alpha"] / config["r"] * B @ A


# %% 08.update right
def update(tensors, config, name):
    found = [tensors[key] for key in sorted(tensors) if f".{name}." in key]
    return torch.einsum("ri,or->oi", *found) * config["lora_alpha"] / config["r"]


# %% 08.update right
def update(tensors, config, name):
    a = tensors["base_model.model." + name + ".lora_A.weight"]
    b = tensors["base_model.model." + name + ".lora_B.weight"]
    scale = config["lora_alpha"] / len(a)
    return sum(scale * torch.outer(b[:, i], a[i]) for i in range(len(a)))


# %% 08.serve wrong
def serve(requests, switch, answer):  # a switch for every request
    answers = []
    for customer, prompt in requests:
        switch(customer)
        answers += answer([prompt])
    return answers


# %% 08.serve wrong
def serve(requests, switch, answer):  # in the order of the customers
    answers = []
    for customer in dict.fromkeys(c for c, _ in requests):
        switch(customer)
        answers += answer([prompt for c, prompt in requests if c == customer])
    return answers


# %% 08.serve wrong
def serve(requests, switch, answer):  # only neighbors are grouped
    answers, active = [], None
    for customer, prompt in requests:
        if customer != active:
            switch(customer)
            active = customer
        answers += answer([prompt])
    return answers


# %% 08.serve wrong
def serve(requests, switch, answer):  # equal prompts of different customers are mixed up
    answers = {}
    for customer in dict.fromkeys(c for c, _ in requests):
        switch(customer)
        prompts = [prompt for c, prompt in requests if c == customer]
        answers.update(zip(prompts, answer(prompts), strict=True))
    return [answers[prompt] for _, prompt in requests]


# %% 08.serve wrong
def serve(requests, switch, answer):  # the first customer's adapter for all
    switch(requests[0][0])
    return answer([prompt for _, prompt in requests])


# %% 08.serve wrong
def serve(requests, switch, answer):  # fails for an empty list
    order = sorted(range(len(requests)), key=lambda i: requests[i][0])
    answers, active = [None] * len(requests), requests[order[0]][0]
    switch(active)
    for i in order:
        if requests[i][0] != active:
            active = requests[i][0]
            switch(active)
        answers[i] = answer([requests[i][1]])[0]
    return answers


# %% 08.serve wrong
def serve(requests, switch, answer):  # one prompt, not a list
    answers = [None] * len(requests)
    for customer in {c for c, _ in requests}:
        switch(customer)
        for i, (c, prompt) in enumerate(requests):
            if c == customer:
                answers[i] = answer(prompt)
    return answers


# %% 08.serve wrong
def serve(requests, switch, answer):  # one prompt at a time
    answers = {}
    for customer in {c for c, _ in requests}:
        switch(customer)
        for i, (c, prompt) in enumerate(requests):
            if c == customer:
                (answers[i],) = answer([prompt])
    return [answers[i] for i in range(len(requests))]


# %% 08.serve wrong
def serve(requests, switch, answer):  # every customer's adapter answers all prompts
    answers = {}
    for customer in {c for c, _ in requests}:
        switch(customer)
        answers[customer] = answer([prompt for _, prompt in requests])
    return [answers[customer][i] for i, (customer, _) in enumerate(requests)]


# %% 08.serve right
def serve(requests, switch, answer):  # sorted by customer
    order = sorted(range(len(requests)), key=lambda i: requests[i][0])
    answers = [None] * len(requests)
    while order:
        customer = requests[order[0]][0]
        mine = [i for i in order if requests[i][0] == customer]
        order = order[len(mine) :]
        switch(customer)
        for i, text in zip(mine, answer([requests[i][1] for i in mine]), strict=True):
            answers[i] = text
    return answers


# %% 08.serve right
def serve(requests, switch, answer):  # a generator, with iterators of answers
    queues = {}
    for customer in sorted({c for c, _ in requests}):
        switch(customer)
        queues[customer] = iter(answer([prompt for c, prompt in requests if c == customer]))
    for customer, _ in requests:
        yield next(queues[customer])


# %% 08.back wrong
back = {"disable": True, "minipeft": True, "peft": True}
# %% 08.back wrong
back = {"disable": True, "minipeft": False, "peft": False}
# %% 08.back wrong
back = {"disable": False, "minipeft": True, "peft": False}
# %% 08.back wrong
back = {"disable": True, "minipeft": False, "peft": True}
# %% 08.back wrong
back = [True, True, False]
# %% 08.back wrong
back = {"disable": "yes", "minipeft": "yes", "peft": "no"}
# %% 08.back right
back = {"peft": 0.1 + 0.2 - 0.2 == 0.1, "minipeft": not False, "disable": True}
# %% 08.back right
back = dict.fromkeys(["disable", "minipeft"], True) | {"peft": False}

# %% 08.cross wrong
cross = 9
# %% 08.cross wrong
cross = 3
# %% 08.cross wrong
cross = 2
# %% 08.cross wrong
cross = 27
# %% 08.cross right
cross = 6.0
# %% 08.cross right
cross = sum(i != j for i in range(3) for j in range(3))


# %% 08.add wrong
def add(pairs):  # exactly two pairs
    (w1, s1, A1, B1), (w2, s2, A2, B2) = pairs
    return torch.cat([w1 * s1 * A1, w2 * s2 * A2]), torch.cat([B1, B2], dim=1)


# %% 08.add wrong
def add(pairs):  # the first two pairs only
    A = torch.cat([w * s * A for w, s, A, B in pairs[:2]])
    return A, torch.cat([B for *_, B in pairs[:2]], dim=1)


# %% 08.add wrong
def add(pairs):  # the root of a negative weight is complex
    A = torch.cat([(w * s) ** 0.5 * A for w, s, A, B in pairs])
    return A, torch.cat([(w * s) ** 0.5 * B for w, s, A, B in pairs], dim=1)


# %% 08.add wrong
def add(pairs):  # the root of a negative weight is NaN
    A = torch.cat([torch.tensor(w * s).sqrt() * A for w, s, A, B in pairs])
    return A, torch.cat([torch.tensor(w * s).sqrt() * B for w, s, A, B in pairs], dim=1)


# %% 08.add wrong
def add(pairs):  # the sign is lost
    A = torch.cat([abs(w * s) ** 0.5 * A for w, s, A, B in pairs])
    return A, torch.cat([abs(w * s) ** 0.5 * B for w, s, A, B in pairs], dim=1)


# %% 08.add wrong
def add(pairs):  # A is added to A
    return sum(w * s * A for w, s, A, B in pairs), sum(B for *_, B in pairs)


# %% 08.add wrong
def add(pairs):  # no scaling
    return torch.cat([w * A for w, s, A, B in pairs]), torch.cat([B for *_, B in pairs], dim=1)


# %% 08.add wrong
def add(pairs):  # the weight on both sides
    A = torch.cat([w * s * A for w, s, A, B in pairs])
    return A, torch.cat([w * B for w, s, A, B in pairs], dim=1)


# %% 08.add wrong
def add(pairs):  # equal ranks only
    A = torch.stack([w * s * A for w, s, A, B in pairs]).flatten(0, 1)
    return A, torch.cat([B for *_, B in pairs], dim=1)


# %% 08.add wrong
def add(pairs):  # in different orders
    A = torch.cat([w * s * A for w, s, A, B in pairs])
    return A, torch.cat([B for *_, B in reversed(pairs)], dim=1)


# %% 08.add right
def add(pairs):
    rows, columns = [], []
    for w, s, A, B in pairs:
        rows += list(A)
        columns += list((w * s * B).T)
    return [torch.stack(rows), torch.stack(columns).T]


# %% 08.add right
def add(pairs):
    A = torch.vstack([abs(w * s) ** 0.5 * A for w, s, A, B in pairs])
    sign = [1 if w >= 0 else -1 for w, *_ in pairs]
    parts = zip(sign, pairs, strict=True)
    return A, torch.hstack([sign * abs(w * s) ** 0.5 * B for sign, (w, s, _, B) in parts])


# %% 08.linear wrong
def linear(pairs):  # complex numbers
    A = sum((w * s) ** 0.5 * A for w, s, A, B in pairs)
    return A, sum((w * s) ** 0.5 * B for w, s, A, B in pairs)


# %% 08.linear wrong
def linear(pairs):  # NaN
    A = sum(torch.tensor(w * s).sqrt() * A for w, s, A, B in pairs)
    return A, sum(torch.tensor(w * s).sqrt() * B for w, s, A, B in pairs)


# %% 08.linear wrong
def linear(pairs):  # the sign is lost
    A = sum(abs(w * s) ** 0.5 * A for w, s, A, B in pairs)
    return A, sum(abs(w * s) ** 0.5 * B for w, s, A, B in pairs)


# %% 08.linear wrong
def linear(pairs):  # the sign is on both sides
    factors = [abs(w * s) ** 0.5 * (1 if w > 0 else -1) for w, s, *_ in pairs]
    A = sum(f * A for f, (_, _, A, _) in zip(factors, pairs, strict=True))
    return A, sum(f * B for f, (*_, B) in zip(factors, pairs, strict=True))


# %% 08.linear wrong
def linear(pairs):  # exactly two pairs
    (w1, s1, A1, B1), (w2, s2, A2, B2) = pairs
    r1, r2 = abs(w1 * s1) ** 0.5, abs(w2 * s2) ** 0.5
    return r1 * A1 * (-1) ** (w1 < 0) + r2 * A2 * (-1) ** (w2 < 0), r1 * B1 + r2 * B2


# %% 08.linear wrong
def linear(pairs):  # no root
    return sum(w * s * A for w, s, A, B in pairs), sum(B for *_, B in pairs)


# %% 08.linear wrong
def linear(pairs):  # the factors are on A only
    A = sum(math.copysign(abs(w * s) ** 0.5, w * s) * A for w, s, A, B in pairs)
    return A, sum(B for *_, B in pairs)


# %% 08.linear wrong
def linear(pairs):  # stacked
    A = torch.cat([w * s * A for w, s, A, B in pairs])
    return A, torch.cat([B for *_, B in pairs], dim=1)


# %% 08.linear right
def linear(pairs):
    A = B = 0
    for w, s, a, b in pairs:
        root = math.sqrt(abs(w * s))
        A, B = A + math.copysign(root, w * s) * a, B + root * b
    return [A, B]


# %% 08.linear right
def linear(pairs):
    factors = torch.tensor([w * s for w, s, *_ in pairs])
    roots = factors.abs().sqrt()
    A = torch.einsum("n,nri->ri", factors.sign() * roots, torch.stack([p[2] for p in pairs]))
    return A, torch.einsum("n,nor->or", roots, torch.stack([p[3] for p in pairs]))
