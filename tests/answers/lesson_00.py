"""Wrong answers to the exercises of lesson 00, and right ones that differ from the solution."""

# %% 00.matmul wrong
shape = (2, 5, 16, 48)
# %% 00.matmul wrong
shape = (5, 48)
# %% 00.matmul wrong
shape = (2, 48, 5)
# %% 00.matmul wrong
shape = 480
# %% 00.matmul wrong
shape = "(2, 5, 48)"
# %% 00.matmul right
shape = [2, 5, 48]
# %% 00.matmul right
shape = (torch.ones(2, 5, 16) @ torch.ones(16, 48)).shape

# %% 00.softmax wrong
total = 1
# %% 00.softmax wrong
total = 4
# %% 00.softmax wrong
total = 12
# %% 00.softmax wrong
total = "3"
# %% 00.softmax right
total = torch.randn(3, 4).softmax(dim=-1).sum()
# %% 00.softmax right
total = 3.0


# %% 00.to_text wrong
def to_text(ids, vocabulary):  # Ġ stays
    tokens = {number: token for token, number in vocabulary.items()}
    return "".join(tokens[number] for number in ids)


# %% 00.to_text wrong
def to_text(ids, vocabulary):  # a space between all tokens
    tokens = {number: token for token, number in vocabulary.items()}
    return " ".join(tokens[number] for number in ids).replace("Ġ", "")


# %% 00.to_text wrong
def to_text(ids, vocabulary):  # the ids as places in the dictionary
    tokens = list(vocabulary)
    return "".join(tokens[number % len(tokens)] for number in ids).replace("Ġ", " ")


# %% 00.to_text wrong
def to_text(ids, vocabulary):  # the space at the start is lost
    tokens = {number: token for token, number in vocabulary.items()}
    return "".join(tokens[number] for number in ids).replace("Ġ", " ").strip()


# %% 00.to_text wrong
def to_text(ids, vocabulary):  # each token only once
    return "".join(t for t, n in vocabulary.items() if n in ids).replace("Ġ", " ")


# %% 00.to_text wrong
def to_text(ids, vocabulary):  # a list
    tokens = {number: token for token, number in vocabulary.items()}
    return [tokens[number].replace("Ġ", " ") for number in ids]


# %% 00.to_text wrong
def to_text(ids, vocabulary):  # fails for an empty text
    tokens = {number: token for token, number in vocabulary.items()}
    text = tokens[ids[0]]
    for number in ids[1:]:
        text += tokens[number]
    return text.replace("Ġ", " ")


# %% 00.to_text right
def to_text(ids, vocabulary):
    text = ""
    for number in ids:
        for token in vocabulary:
            if vocabulary[token] == number:
                text += " " + token[1:] if token[0] == "Ġ" else token
    return text


# %% 00.to_text right
def to_text(ids, vocabulary):
    tokens, numbers = list(vocabulary.keys()), list(vocabulary.values())
    return " ".join("".join(tokens[numbers.index(n)] for n in ids).split("Ġ"))


# %% 00.nats wrong
nothing = math.log2(2048)
a_name = math.log2(24)
# %% 00.nats wrong
nothing = 1 / 2048
a_name = 1 / 24
# %% 00.nats wrong
nothing = math.log(2048)
a_name = math.log(2048) - math.log(24)
# %% 00.nats wrong
nothing = math.log(1 / 2048)
a_name = math.log(1 / 24)
# %% 00.nats wrong
nothing = math.log(2048)
a_name = 24
# %% 00.nats right
nothing = 7.6246
a_name = 3.1781
# %% 00.nats wrong
nothing = 8
a_name = 3
# %% 00.nats right
nothing = 7.6
a_name = 3.2
# %% 00.nats right
nothing = F.cross_entropy(torch.zeros(1, 2048), torch.tensor([5]))
a_name = -math.log(1 / 24)

# %% 00.perplexity wrong
perplexity = (2 + 8) / 2
# %% 00.perplexity wrong
perplexity = 1 / ((1 / 2 + 1 / 8) / 2)
# %% 00.perplexity wrong
perplexity = math.exp(math.log(2) + math.log(8))
# %% 00.perplexity wrong
perplexity = (math.log(2) + math.log(8)) / 2
# %% 00.perplexity wrong
perplexity = 1 / 4
# %% 00.perplexity right
perplexity = 4
# %% 00.perplexity right
perplexity = (2 * 8) ** 0.5


# %% 00.my_loss wrong
def my_loss(logits, ids):  # not shifted
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


# %% 00.my_loss wrong
def my_loss(logits, ids):  # shifted in the wrong direction
    return F.cross_entropy(logits[:, 1:].flatten(0, 1), ids[:, :-1].flatten())


# %% 00.my_loss wrong
def my_loss(logits, ids):  # the sum
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


# %% 00.my_loss wrong
def my_loss(logits, ids):  # one per label
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


# %% 00.my_loss wrong
def my_loss(logits, ids):  # the first text only
    return F.cross_entropy(logits[0, :-1], ids[0, 1:])


# %% 00.my_loss wrong
def my_loss(logits, ids):  # not flattened
    return F.cross_entropy(logits[:, :-1], ids[:, 1:])


# %% 00.my_loss wrong
def my_loss(logits, ids):  # rolled: the last position is asked for the first token
    return F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())


# %% 00.my_loss wrong
def my_loss(logits, ids):  # flattened, then shifted
    return F.cross_entropy(logits.flatten(0, 1)[:-1], ids.flatten()[1:])


# %% 00.my_loss wrong
def my_loss(logits, ids):  # view mixes up positions and vocabulary
    logits = logits[:, :-1].mT
    return F.cross_entropy(logits.reshape(-1, logits.shape[1]), ids[:, 1:].flatten())


# %% 00.my_loss right
def my_loss(logits, ids):
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    return -log_p.mean()


# %% 00.my_loss right
def my_loss(logits, ids):
    losses = []
    for row, labels in zip(logits.softmax(-1).tolist(), ids.tolist(), strict=True):
        losses += [-math.log(p[label]) for p, label in zip(row, labels[1:], strict=False)]
    return sum(losses) / len(losses)


# %% 00.my_loss right
def my_loss(logits, ids):
    return F.cross_entropy(logits[:, :-1].mT, ids[:, 1:])


# %% 00.mlp wrong
mlp = 2 * 128 * 512
# %% 00.mlp wrong
mlp = 128 * 512 + 512
# %% 00.mlp wrong
mlp = 4 * (128 * 512 + 512 + 512 * 128 + 128)
# %% 00.mlp wrong
mlp = 128 * 512 * 128
# %% 00.mlp right
mlp = sum(p.numel() for p in gpt.MLP(GPTConfig(n_embd=128, n_head=4)).parameters())
# %% 00.mlp right
mlp = 131712.0


# %% 00.attention wrong
def attention_weights(q, k):  # no mask
    return (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)


# %% 00.attention wrong
def attention_weights(q, k):  # no scale
    scores = q @ k.transpose(1, 2)
    ahead = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)


# %% 00.attention wrong
def attention_weights(q, k):  # masked after softmax
    return (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1).tril()


# %% 00.attention wrong
def attention_weights(q, k):  # positions may not look at themselves
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    ahead = torch.ones_like(scores[0], dtype=torch.bool).triu(0)
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)


# %% 00.attention wrong
def attention_weights(q, k):  # the mask is zero
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    return scores.tril().softmax(-1)


# %% 00.attention wrong
def attention_weights(q, k):  # scaled by a fixed length of key
    scores = q @ k.transpose(1, 2) / math.sqrt(32)
    ahead = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)


# %% 00.attention wrong
def attention_weights(q, k):  # softmax over the wrong dimension
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    ahead = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(ahead, -torch.inf).softmax(1)


# %% 00.attention wrong
def attention_weights(q, k):  # no gradient
    with torch.no_grad():
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        ahead = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        return scores.masked_fill(ahead, -torch.inf).softmax(-1)


# %% 00.attention right
def attention_weights(q, k):  # by hand
    e = (torch.einsum("hik,hjk->hij", q, k) / q.shape[2] ** 0.5).exp().tril()
    return e / e.sum(-1, keepdim=True)


# %% 00.attention right
def attention_weights(q, k):  # row by row
    rows, t = [], q.shape[1]
    for i in range(t):
        scores = (q[:, i : i + 1] * k[:, : i + 1]).sum(-1) * q.shape[-1] ** -0.5
        rows.append(F.pad(scores.softmax(-1), (0, t - i - 1)))
    return torch.stack(rows, dim=1)


# %% 00.attention right
def attention_weights(q, k):  # a large negative number, added
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores + torch.full_like(scores, -1e9).triu(1)).softmax(-1)


# %% 00.looks_back wrong
def looks_back(weights):  # itself
    return weights.diagonal(dim1=1, dim2=2).mean(-1)


# %% 00.looks_back wrong
def looks_back(weights):  # ahead
    return weights.diagonal(1, dim1=1, dim2=2).mean(-1)


# %% 00.looks_back wrong
def looks_back(weights):  # divided by t
    return weights.diagonal(-1, dim1=1, dim2=2).sum(-1) / weights.shape[1]


# %% 00.looks_back wrong
def looks_back(weights):  # the median
    return weights.diagonal(-1, dim1=1, dim2=2).median(-1).values


# %% 00.looks_back wrong
def looks_back(weights):  # how often it is the largest
    before = torch.arange(weights.shape[1] - 1)
    return (weights[:, 1:].argmax(-1) == before).float().mean(-1)


# %% 00.looks_back wrong
def looks_back(weights):  # one number for all heads
    return weights.diagonal(-1, dim1=1, dim2=2).mean()


# %% 00.looks_back wrong
def looks_back(weights):  # only where it is the largest
    before = weights.diagonal(-1, dim1=1, dim2=2)
    return (before * (before == weights[:, 1:].amax(-1))).mean(-1)


# %% 00.looks_back right
def looks_back(weights):  # a list
    t = weights.shape[1]
    return [sum(w[i, i - 1].item() for i in range(1, t)) / (t - 1) for w in weights]


# %% 00.looks_back right
def looks_back(weights):  # a generator
    for w in weights:
        yield w[1:, :-1].diag().mean()


# %% 00.looks_back right
def looks_back(weights):
    return torch.einsum("hii->h", weights[:, 1:, :-1]) / (weights.shape[-1] - 1)


# %% 00.follow wrong
def follow(tokens):  # the last token only
    for start in range(len(tokens) - 2, -1, -1):
        if tokens[start] == tokens[-1]:
            return tokens[start + 1]
    return None


# %% 00.follow wrong
def follow(tokens):  # the first place
    for length in range(len(tokens) - 1, 0, -1):
        for start in range(len(tokens) - length):
            if tokens[start : start + length] == tokens[-length:]:
                return tokens[start + length]
    return None


# %% 00.follow wrong
def follow(tokens):  # the end finds itself
    for length in range(len(tokens), 0, -1):
        for start in range(len(tokens) - length, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                return tokens[start + length]
    return None


# %% 00.follow wrong
def follow(tokens):  # runs of at most two
    for length in range(min(2, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                return tokens[start + length]
    return None


# %% 00.follow wrong
def follow(tokens):  # runs of at most five
    for length in range(min(5, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                return tokens[start + length]
    return None


# %% 00.follow wrong
def follow(tokens):  # the shortest run
    for length in range(1, len(tokens)):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                return tokens[start + length]
    return None


# %% 00.follow wrong
def follow(tokens):  # the two must not overlap
    for length in range(len(tokens) // 2, 0, -1):
        for start in range(len(tokens) - 2 * length, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                return tokens[start + length]
    return None


# %% 00.follow wrong
def follow(tokens):  # -1 instead of None
    for length in range(len(tokens) - 1, 0, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                return tokens[start + length]
    return -1


# %% 00.follow wrong
def follow(tokens):  # changes its input
    last = tokens.pop()
    return tokens[len(tokens) - tokens[::-1].index(last)] if last in tokens[:-1] else None


# %% 00.follow wrong
def follow(tokens):  # hard-coded
    return {1: 2}.get(tokens[-1])


# %% 00.follow right
def follow(tokens):  # how long the match is that ends at each place
    best, found = 0, None
    for end in range(1, len(tokens)):
        length = 0
        while length < end and tokens[end - 1 - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        if length and length >= best:
            best, found = length, tokens[end]
    return found


# %% 00.follow right
def follow(tokens):  # all candidates, and their maximum
    n = len(tokens)
    places = [
        (length, start + length)
        for length in range(1, n)
        for start in range(n - length)
        if tokens[start : start + length] == tokens[n - length :]
    ]
    return tokens[max(places)[1]] if places else None
