"""Wrong answers to the exercises of lesson 06, and right ones that differ from the solution."""

# %% 06.prompt wrong
n_trained = 20
# %% 06.prompt wrong
n_trained = 128
# %% 06.prompt wrong
n_trained = 2 * 20 * 128
# %% 06.prompt wrong
n_trained = 20 * 128 * 4
# %% 06.prompt right
n_trained = 2560.0
# %% 06.prompt right
n_trained = torch.empty(20, 128).numel()

# %% 06.causal wrong
pairs = 25
# %% 06.causal wrong
pairs = 10
# %% 06.causal wrong
pairs = 5
# %% 06.causal wrong
pairs = "fifteen"
# %% 06.causal right
pairs = sum(range(6))
# %% 06.causal right
pairs = torch.ones(5, 5).tril().sum()

# %% 06.count wrong
count = 20 * 768
# %% 06.count wrong
count = 20 * 12 * 768
# %% 06.count wrong
count = 2 * 20 * 768
# %% 06.count wrong
count = 2 * 20 * 12 * 12 * 768
# %% 06.count wrong
count = 2 * 12 * 768
# %% 06.count right
count = 368640.0
# %% 06.count right
count = sum(2 * 20 * 12 * 64 for _ in range(12))


# %% 06.mask wrong
def prefix_mask(p, t):  # is_causal=True
    return torch.ones(t, p + t, dtype=torch.bool).tril()


# %% 06.mask wrong
def prefix_mask(p, t):  # numbers
    return torch.ones(t, p + t).tril(p)


# %% 06.mask wrong
def prefix_mask(p, t):  # queries for the prefix
    return torch.ones(p + t, p + t, dtype=torch.bool).tril()


# %% 06.mask wrong
def prefix_mask(p, t):  # nobody sees itself
    return torch.ones(t, p + t, dtype=torch.bool).tril(p - 1)


# %% 06.mask wrong
def prefix_mask(p, t):  # for one size only
    return torch.ones(t, p + t, dtype=torch.bool).tril(3)


# %% 06.mask wrong
def prefix_mask(p, t):  # transposed
    return torch.ones(p + t, t, dtype=torch.bool).triu(-p)


# %% 06.mask wrong
def prefix_mask(p, t):  # True where it is hidden
    return ~torch.ones(t, p + t, dtype=torch.bool).tril(p)


# %% 06.mask right
def prefix_mask(p, t):
    return torch.arange(p + t) <= p + torch.arange(t)[:, None]


# %% 06.mask right
def prefix_mask(p, t):
    return [[j <= p + i for j in range(p + t)] for i in range(t)]


# %% 06.mask right
def prefix_mask(p, t):
    seen = torch.ones(t, p, dtype=torch.bool)
    return torch.cat((seen, torch.ones(t, t, dtype=torch.bool).tril()), dim=1)


# %% 06.attend wrong
def attend(q, k, v, K_P, V_P):  # no scaling
    keys, values = torch.cat((K_P, k)), torch.cat((V_P, v))
    mask = torch.ones(len(q), len(keys)).tril(len(K_P)).bool()
    return (q @ keys.T).masked_fill(~mask, -torch.inf).softmax(-1) @ values


# %% 06.attend wrong
def attend(q, k, v, K_P, V_P):  # no mask
    keys, values = torch.cat((K_P, k)), torch.cat((V_P, v))
    return (q @ keys.T / q.shape[1] ** 0.5).softmax(-1) @ values


# %% 06.attend wrong
def attend(q, k, v, K_P, V_P):  # the mask of is_causal=True
    keys, values = torch.cat((K_P, k)), torch.cat((V_P, v))
    return nn.functional.scaled_dot_product_attention(q, keys, values, is_causal=True)


# %% 06.attend wrong
def attend(q, k, v, K_P, V_P):  # the prefix comes last
    keys, values = torch.cat((k, K_P)), torch.cat((v, V_P))
    mask = torch.ones(len(q), len(keys)).tril(len(K_P)).bool()
    return nn.functional.scaled_dot_product_attention(q, keys, values, mask)


# %% 06.attend wrong
def attend(q, k, v, K_P, V_P):  # the prefix's values are detached
    keys, values = torch.cat((K_P, k)), torch.cat((V_P.detach(), v))
    mask = torch.ones(len(q), len(keys)).tril(len(K_P)).bool()
    return nn.functional.scaled_dot_product_attention(q, keys, values, mask)


# %% 06.attend wrong
def attend(q, k, v, K_P, V_P):  # scaled by the width, not by its root
    keys, values = torch.cat((K_P, k)), torch.cat((V_P, v))
    mask = torch.ones(len(q), len(keys)).tril(len(K_P)).bool()
    return (q @ keys.T / q.shape[1]).masked_fill(~mask, -torch.inf).softmax(-1) @ values


# %% 06.attend wrong
def attend(q, k, v, K_P, V_P):  # the boolean mask is added, so it hides nothing
    keys, values = torch.cat((K_P, k)), torch.cat((V_P, v))
    mask = torch.ones(len(q), len(keys)).tril(len(K_P)).bool()
    return (q @ keys.T / q.shape[1] ** 0.5 + mask).softmax(-1) @ values


# %% 06.attend right
def attend(q, k, v, K_P, V_P):
    keys, values = torch.cat((K_P, k)), torch.cat((V_P, v))
    mask = torch.ones(len(q), len(keys), dtype=torch.bool).tril(len(K_P))
    return nn.functional.scaled_dot_product_attention(q, keys, values, mask)


# %% 06.attend right
def attend(q, k, v, K_P, V_P):
    rows = []
    for i in range(len(q)):
        keys, values = torch.cat((K_P, k[: i + 1])), torch.cat((V_P, v[: i + 1]))
        rows.append((keys @ q[i] / q.shape[1] ** 0.5).softmax(0) @ values)
    return torch.stack(rows)


# %% 06.my_prefix wrong
class MyPrefix(nn.Module):  # zeros: all virtual tokens are equal
    def __init__(self, config, p):
        super().__init__()
        width = config.n_embd // config.n_head
        self.P = nn.Parameter(torch.zeros(config.n_layer, 2, config.n_head, p, width))

    def past(self, b):
        return tuple((k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)) for k, v in self.P)


# %% 06.my_prefix wrong
class MyPrefix(nn.Module):  # all virtual tokens start with the same random numbers
    def __init__(self, config, p):
        super().__init__()
        width = config.n_embd // config.n_head
        one = torch.randn(config.n_layer, 2, config.n_head, 1, width)
        self.P = nn.Parameter(one.repeat(1, 1, 1, p, 1))

    def past(self, b):
        return tuple((k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)) for k, v in self.P)


# %% 06.my_prefix wrong
class MyPrefix(nn.Module):  # values are frozen
    def __init__(self, config, p):
        super().__init__()
        shape = config.n_layer, config.n_head, p, config.n_embd // config.n_head
        self.keys = nn.Parameter(torch.randn(shape))
        self.values = nn.Parameter(torch.randn(shape), requires_grad=False)

    def past(self, b):
        pairs = zip(self.keys, self.values, strict=True)
        return tuple((k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)) for k, v in pairs)


# %% 06.my_prefix wrong
class MyPrefix(nn.Module):  # values are detached
    def __init__(self, config, p):
        super().__init__()
        width = config.n_embd // config.n_head
        self.P = nn.Parameter(torch.randn(config.n_layer, 2, config.n_head, p, width))

    def past(self, b):
        return tuple((k.expand(b, -1, -1, -1), v.detach().expand(b, -1, -1, -1)) for k, v in self.P)


# %% 06.my_prefix wrong
class MyPrefix(nn.Module):  # values are detached, and look as if they had a gradient
    def __init__(self, config, p):
        super().__init__()
        width = config.n_embd // config.n_head
        self.P = nn.Parameter(torch.randn(config.n_layer, 2, config.n_head, p, width))

    def past(self, b):
        pairs = [(k, v.detach() + 0 * k) for k, v in self.P]
        return tuple((k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)) for k, v in pairs)


# %% 06.my_prefix wrong
class MyPrefix(nn.Module):  # one prefix for all layers
    def __init__(self, config, p):
        super().__init__()
        self.layers = config.n_layer
        width = config.n_embd // config.n_head
        self.P = nn.Parameter(torch.randn(2, config.n_head, p, width))

    def past(self, b):
        k, v = (part.expand(b, -1, -1, -1) for part in self.P)
        return ((k, v),) * self.layers


# %% 06.my_prefix wrong
class MyPrefix(nn.Module):  # no Parameter
    def __init__(self, config, p):
        super().__init__()
        width = config.n_embd // config.n_head
        self.P = torch.randn(config.n_layer, 2, config.n_head, p, width)

    def past(self, b):
        return tuple((k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)) for k, v in self.P)


# %% 06.my_prefix wrong
class MyPrefix(nn.Module):  # (b, p, heads, width)
    def __init__(self, config, p):
        super().__init__()
        width = config.n_embd // config.n_head
        self.P = nn.Parameter(torch.randn(config.n_layer, 2, p, config.n_head, width))

    def past(self, b):
        return tuple((k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)) for k, v in self.P)


# %% 06.my_prefix wrong
class MyPrefix(nn.Module):  # another prefix for each text of the batch
    def __init__(self, config, p):
        super().__init__()
        width = config.n_embd // config.n_head
        self.P = nn.Parameter(torch.randn(config.n_layer, 2, config.n_head, p, width))

    def past(self, b):
        scale = torch.arange(1, b + 1)[:, None, None, None]
        return tuple((k * scale, v * scale) for k, v in self.P)


# %% 06.my_prefix wrong
class MyPrefix(nn.Module):  # computed once: a step changes nothing
    def __init__(self, config, p):
        super().__init__()
        width = config.n_embd // config.n_head
        self.P = nn.Parameter(torch.randn(config.n_layer, 2, config.n_head, p, width))
        self.pairs = [(1.0 * k, 1.0 * v) for k, v in self.P]

    def past(self, b):
        return tuple((k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)) for k, v in self.pairs)


# %% 06.my_prefix right
class MyPrefix(nn.Module):  # as minipeft stores it
    def __init__(self, config, p):
        super().__init__()
        self.embedding = nn.Embedding(p, 2 * config.n_layer * config.n_embd)
        self.shape = 2 * config.n_layer, config.n_head, config.n_embd // config.n_head

    def past(self, b):
        kv = self.embedding.weight.expand(b, -1, -1).unflatten(2, self.shape)
        kv = kv.permute(2, 0, 3, 1, 4)
        return tuple(zip(kv[0::2], kv[1::2], strict=True))


# %% 06.my_prefix right
class MyPrefix(nn.Module):  # a parameter for each layer; a generator
    def __init__(self, config, p):
        super().__init__()
        shape = 2, 1, config.n_head, p, config.n_embd // config.n_head
        self.layers = nn.ParameterList(torch.rand(shape) for _ in range(config.n_layer))

    def past(self, b):
        return (list(layer.repeat(1, b, 1, 1, 1)) for layer in self.layers)


# %% 06.my_prefix right
class MyPrefix(nn.Module):  # small keys and values; pairs as one tensor
    def __init__(self, config, p):
        super().__init__()
        self.P = nn.Parameter(torch.randn(config.n_layer, 2, p, config.n_embd) * 0.02)
        self.heads = config.n_head

    def past(self, b):
        P = self.P.unflatten(3, (self.heads, -1)).transpose(2, 3)
        return [torch.stack([layer] * b, dim=1) for layer in P]


# %% 06.share wrong
def share(scores, p):
    return p / (p + len(scores))


# %% 06.share wrong
def share(scores, p):
    return 0.0


# %% 06.share wrong
def share(scores, p):
    return p / (p + scores.sum())


# %% 06.share wrong
def share(scores, p):
    return scores.exp().sum() / (p + scores.exp().sum())


# %% 06.share wrong
def share(scores, p):
    return 1 / (p + scores.exp().sum())


# %% 06.share wrong
def share(scores, p):  # one zero key
    return 1 / (1 + scores.exp().sum())


# %% 06.share right
def share(scores, p):
    return torch.cat((torch.zeros(p), scores)).softmax(0)[:p].sum()


# %% 06.share right
def share(scores, p):
    return 1 / (1 + sum(2.718281828459045**s for s in scores.tolist()) / p)


# %% 06.equal wrong
different = 20
# %% 06.equal wrong
different = 0
# %% 06.equal wrong
different = 2
# %% 06.equal wrong
different = "all"
# %% 06.equal right
different = 1.0
# %% 06.equal right
different = len({0.0, -0.0})


# %% 06.first_tokens wrong
def first_tokens(cache, p):  # heads
    return tuple((k[:, :p], v[:, :p]) for k, v in cache)


# %% 06.first_tokens wrong
def first_tokens(cache, p):  # texts
    return tuple((k[:p], v[:p]) for k, v in cache)


# %% 06.first_tokens wrong
def first_tokens(cache, p):  # the last tokens
    return tuple((k[:, :, -p:], v[:, :, -p:]) for k, v in cache)


# %% 06.first_tokens wrong
def first_tokens(cache, p):  # layers
    return cache[:p]


# %% 06.first_tokens wrong
def first_tokens(cache, p):  # values twice
    return tuple((v[:, :, :p], v[:, :, :p]) for k, v in cache)


# %% 06.first_tokens wrong
def first_tokens(cache, p):  # the first layer for all
    return tuple((cache[0][0][:, :, :p], cache[0][1][:, :, :p]) for _ in cache)


# %% 06.first_tokens right
def first_tokens(cache, p):
    return [[kv.narrow(2, 0, p) for kv in pair] for pair in cache]


# %% 06.first_tokens right
def first_tokens(cache, p):
    for pair in cache:
        yield torch.stack(pair)[..., :p, :]


# %% 06.bytes wrong
cache_bytes = 2 * 20 * 32 * 4096
# %% 06.bytes wrong
cache_bytes = 2 * 20 * 32 * 4096 * 4
# %% 06.bytes wrong
cache_bytes = 2 * 20 * 4096 * 2
# %% 06.bytes wrong
cache_bytes = 20 * 4096 * 2
# %% 06.bytes wrong
cache_bytes = 14e9
# %% 06.bytes right
cache_bytes = 20 * 2**19
# %% 06.bytes right
cache_bytes = 10.48576e6


# %% 06.gated wrong
def gated(q, K_P, V_P, K, V):
    on_prefix, on_text = K_P @ q, K @ q
    a = on_prefix.exp().sum() / (on_prefix.exp().sum() + on_text.exp().sum())
    return (1 - a) * on_text.softmax(0) @ V + a * on_prefix.softmax(0) @ V_P


# %% 06.gated wrong
def gated(q, K_P, V_P, K, V):
    on_prefix, on_text = K_P @ q / len(q) ** 0.5, K @ q / len(q) ** 0.5
    return on_text.softmax(0) @ V + on_prefix.softmax(0) @ V_P


# %% 06.gated wrong
def gated(q, K_P, V_P, K, V):
    on_prefix, on_text = K_P @ q / len(q) ** 0.5, K @ q / len(q) ** 0.5
    a = len(K_P) / (len(K_P) + len(K))
    return (1 - a) * on_text.softmax(0) @ V + a * on_prefix.softmax(0) @ V_P


# %% 06.gated wrong
def gated(q, K_P, V_P, K, V):
    on_prefix, on_text = K_P @ q / len(q) ** 0.5, K @ q / len(q) ** 0.5
    a = on_prefix.exp().sum() / (on_prefix.exp().sum() + on_text.exp().sum())
    return a * on_text.softmax(0) @ V + (1 - a) * on_prefix.softmax(0) @ V_P


# %% 06.gated wrong
def gated(q, K_P, V_P, K, V):
    on_text = K @ q / len(q) ** 0.5
    a = len(K_P) / (len(K_P) + on_text.exp().sum())
    return (1 - a) * on_text.softmax(0) @ V


# %% 06.gated right
def gated(q, K_P, V_P, K, V):
    return (torch.cat((K_P, K)) @ q / len(q) ** 0.5).softmax(0) @ torch.cat((V_P, V))


# %% 06.gated right
def gated(q, K_P, V_P, K, V):
    on_prefix, on_text = K_P @ q / len(q) ** 0.5, K @ q / len(q) ** 0.5
    a = torch.sigmoid(on_prefix.logsumexp(0) - on_text.logsumexp(0))
    return torch.lerp(on_text.softmax(0) @ V, on_prefix.softmax(0) @ V_P, a)
