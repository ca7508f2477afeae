"""Wrong answers to the exercises of lesson 05, and right ones that differ from the solution."""

# %% 05.larger wrong
larger = "embeddings"
# %% 05.larger wrong
larger = "both"
# %% 05.larger wrong
larger = 1
# %% 05.larger wrong
larger = ["noise"]
# %% 05.larger right
larger = "Noise"
# %% 05.larger right
larger = " noise "

# %% 05.mergeable wrong
mergeable = ["prompt tuning"]
# %% 05.mergeable wrong
mergeable = ["LoRA", "prompt tuning"]
# %% 05.mergeable wrong
mergeable = []
# %% 05.mergeable wrong
mergeable = ["P-tuning"]
# %% 05.mergeable right
mergeable = ("lora",)
# %% 05.mergeable right
mergeable = "LoRA"

# %% 05.count wrong
trained = 3 * (768 * 768 + 768)
kept = 20 * 768
# %% 05.count wrong
trained = 20 * 768 + 3 * 768 * 768
kept = 20 * 768
# %% 05.count wrong
trained = 20 * 768 + 3 * (768 * 768 + 768)
kept = trained
# %% 05.count wrong
trained = 20 * 768 + 3 * (768 * 768 + 768)
kept = 2 * 20 * 768
# %% 05.count wrong
trained = 20 * (768 + 3 * (768 * 768 + 768))
kept = 20 * 768
# %% 05.count right
trained = 1_787_136.0
kept = 15_360
# %% 05.count right
trained = 20 * 768 + sum(p.numel() for _ in range(3) for p in nn.Linear(768, 768).parameters())
kept = torch.empty(20, 768).numel()


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # no ReLU
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.randn(p, d))
        self.network = nn.Sequential(nn.Linear(d, w), nn.Linear(w, w), nn.Linear(w, d))

    def forward(self):
        return self.network(self.H)


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # no return
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.randn(p, d))
        self.network = nn.Sequential(
            nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)
        )

    def forward(self):
        self.network(self.H)


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # a ReLU at the end
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.randn(p, d))
        layers = [nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)]
        self.network = nn.Sequential(*layers, nn.ReLU())

    def forward(self):
        return self.network(self.H)


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # the hidden width is ignored
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.randn(p, d))
        self.network = nn.Sequential(
            nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d)
        )

    def forward(self):
        return self.network(self.H)


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # H is not trained
    def __init__(self, p, d, w):
        super().__init__()
        self.H = torch.randn(p, d)
        self.network = nn.Sequential(
            nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)
        )

    def forward(self):
        return self.network(self.H)


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # H is detached
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.randn(p, d))
        self.network = nn.Sequential(
            nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)
        )

    def forward(self):
        return self.network(self.H.detach())


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # no biases
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.randn(p, d))
        self.network = nn.Sequential(
            nn.Linear(d, w, bias=False), nn.ReLU(), nn.Linear(w, w, bias=False), nn.ReLU(),
            nn.Linear(w, d, bias=False),
        )  # fmt: skip

    def forward(self):
        return self.network(self.H)


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # two layers
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.randn(p, d))
        self.network = nn.Sequential(nn.Linear(d, w), nn.ReLU(), nn.Linear(w, d))

    def forward(self):
        return self.network(self.H)


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # a part of the network is frozen
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.randn(p, d))
        self.network = nn.Sequential(
            nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)
        )
        self.network[2].requires_grad_(False)

    def forward(self):
        return self.network(self.H)


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # H is added, as in a residual connection
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.randn(p, d))
        self.network = nn.Sequential(
            nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)
        )

    def forward(self):
        return self.H + self.network(self.H)


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # all rows start equal
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.zeros(p, d))
        self.network = nn.Sequential(
            nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)
        )

    def forward(self):
        return self.network(self.H)


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # one random row, p times
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.randn(1, d).repeat(p, 1))
        self.network = nn.Sequential(
            nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)
        )

    def forward(self):
        return self.network(self.H)


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # numbers that were never set
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.empty(p, d))
        self.network = nn.Sequential(
            nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)
        )

    def forward(self):
        return self.network(self.H)


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # the same start each time
    def __init__(self, p, d, w):
        super().__init__()
        torch.manual_seed(0)
        self.H = nn.Parameter(torch.randn(p, d))
        self.network = nn.Sequential(
            nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)
        )

    def forward(self):
        return self.network(self.H)


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # not noise
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.arange(1.0, p * d + 1).view(p, d))
        self.network = nn.Sequential(
            nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)
        )

    def forward(self):
        return self.network(self.H)


# %% 05.my_p_tuning wrong
class MyPTuning(nn.Module):  # no gradients
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.randn(p, d))
        self.network = nn.Sequential(
            nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)
        )

    def forward(self):
        with torch.no_grad():
            return self.network(self.H)


# %% 05.my_p_tuning right
class MyPTuning(nn.Module):  # an embedding, as in minipeft
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Embedding(p, d)
        sizes = [(d, w), (w, w), (w, d)]
        self.network = nn.ModuleList(nn.Linear(*size) for size in sizes)

    def forward(self):
        one, two, three = self.network
        return three(two(one(self.H.weight).relu()).relu())


# %% 05.my_p_tuning right
class MyPTuning(nn.Module):  # ReLU as a function
    class Network(nn.Module):
        def __init__(self, d, w):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(d, w), nn.Linear(w, w), nn.Linear(w, d)

        def forward(self, x):
            x = torch.clamp(self.one(x), min=0)
            return self.three(nn.functional.relu(self.two(x)))

    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.rand(p, d) - 0.5)
        self.network = self.Network(d, w)

    def forward(self):
        return torch.stack([self.network(row) for row in self.H])


# %% 05.keep wrong
def keep(H, network):
    return H.detach()


# %% 05.keep wrong
def keep(H, network):
    return network(H)


# %% 05.keep wrong
def keep(H, network):
    return network(H).detach()


# %% 05.keep wrong
def keep(H, network):
    network.eval()
    return network(H)


# %% 05.keep wrong
def keep(H, network):
    network.eval()
    return nn.Parameter(network(H))


# %% 05.keep wrong
def keep(H, network):
    network.eval()
    return (H + network(H)).detach()


# %% 05.keep right
def keep(H, network):
    with torch.no_grad():
        return network.eval()(H)


# %% 05.keep right
def keep(H, network):
    network.train(False)
    return nn.Parameter(network(H).clone(), requires_grad=False)


# %% 05.rows wrong
mlp_rows = [0, 1, 2, 3, 4]
lstm_rows = [0, 1, 2, 3, 4]
# %% 05.rows wrong
mlp_rows = [4]
lstm_rows = [4]
# %% 05.rows wrong
mlp_rows = [5]
lstm_rows = [1, 2, 3, 4, 5]
# %% 05.rows wrong
mlp_rows = []
lstm_rows = [0, 1, 2, 3]
# %% 05.rows wrong
mlp_rows = 4
lstm_rows = [0, 1, 2, 3, 4]
# %% 05.rows right
mlp_rows = {4}
lstm_rows = range(5)
# %% 05.rows right
mlp_rows = (4,)
lstm_rows = (4, 3, 2, 1, 0)


# %% 05.paired wrong
def paired(a, b):
    return sum(a) / len(a) - sum(b) / len(b), sum(x >= y for x, y in zip(a, b, strict=True))


# %% 05.paired wrong
def paired(a, b):
    differences = [y - x for x, y in zip(a, b, strict=True)]
    return sum(differences) / len(differences), sum(d > 0 for d in differences)


# %% 05.paired wrong
def paired(a, b):
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return sum(differences), sum(d > 0 for d in differences)


# %% 05.paired wrong
def paired(a, b):
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return sum(differences) / len(differences), sum(d > 0 for d in differences)


# %% 05.paired wrong
def paired(a, b):  # a share
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return sum(differences) / len(a), sum(d > 0 for d in differences) / len(a)


# %% 05.paired wrong
def paired(a, b):  # every seed of a against every seed of b
    differences = [x - y for x in a for y in b]
    return sum(differences) / len(differences), sum(d > 0 for d in differences)


# %% 05.paired wrong
def paired(a, b):  # changes its input, and forgets the pairs
    a.sort()
    b.sort()
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return sum(differences) / len(differences), sum(d > 0 for d in differences)


# %% 05.paired wrong
def paired(a, b):  # hard-coded: four seeds
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return sum(differences) / 4, sum(d > 0 for d in differences)


# %% 05.paired right
def paired(a, b):
    differences = torch.tensor(a) - torch.tensor(b)
    return differences.mean(), (differences > 0).sum()


# %% 05.paired right
def paired(a, b):
    return [sum(a) / len(a) - sum(b) / len(b), len([1 for x, y in zip(a, b, strict=True) if x > y])]


# %% 05.deep_prompt wrong
def deep_prompt(model, P, ids):  # a view alone
    layers, _, p, d = P.shape
    h = model.config.n_head
    past = P.view(layers, 2, 1, h, p, d // h).expand(-1, -1, len(ids), -1, -1, -1)
    return model(ids, past_key_values=[(k, v) for k, v in past]).logits


# %% 05.deep_prompt wrong
def deep_prompt(model, P, ids):  # one row only
    layers, _, p, d = P.shape
    h = model.config.n_head
    past = P.view(layers, 2, 1, p, h, d // h).transpose(3, 4)
    return model(ids, past_key_values=[(k, v) for k, v in past]).logits


# %% 05.deep_prompt wrong
def deep_prompt(model, P, ids):  # values first
    layers, _, p, d = P.shape
    h = model.config.n_head
    past = P.view(layers, 2, 1, p, h, d // h).transpose(3, 4)
    past = past.expand(-1, -1, len(ids), -1, -1, -1)
    return model(ids, past_key_values=[(k, v) for v, k in past]).logits


# %% 05.deep_prompt wrong
def deep_prompt(model, P, ids):  # upside down
    layers, _, p, d = P.shape
    h = model.config.n_head
    past = P.flip(0).view(layers, 2, 1, p, h, d // h).transpose(3, 4)
    past = past.expand(-1, -1, len(ids), -1, -1, -1)
    return model(ids, past_key_values=[(k, v) for k, v in past]).logits


# %% 05.deep_prompt wrong
def deep_prompt(model, P, ids):  # not used
    return model(ids).logits


# %% 05.deep_prompt wrong
def deep_prompt(model, P, ids):  # hard-coded: two heads
    layers, _, p, d = P.shape
    past = P.view(layers, 2, 1, p, 2, d // 2).transpose(3, 4)
    past = past.expand(-1, -1, len(ids), -1, -1, -1)
    return model(ids, past_key_values=[(k, v) for k, v in past]).logits


# %% 05.deep_prompt wrong
def deep_prompt(model, P, ids):  # P cannot be trained
    layers, _, p, d = P.shape
    h = model.config.n_head
    past = P.detach().view(layers, 2, 1, p, h, d // h).transpose(3, 4)
    past = past.expand(-1, -1, len(ids), -1, -1, -1)
    return model(ids, past_key_values=[(k, v) for k, v in past]).logits


# %% 05.deep_prompt wrong
def deep_prompt(model, P, ids):  # the values cannot be trained
    layers, _, p, d = P.shape
    h = model.config.n_head
    past = P.view(layers, 2, 1, p, h, d // h).transpose(3, 4)
    past = past.expand(-1, -1, len(ids), -1, -1, -1)
    return model(ids, past_key_values=[(k, v.detach()) for k, v in past]).logits


# %% 05.deep_prompt right
def deep_prompt(model, P, ids):
    h, past = model.config.n_head, []
    for pair in P:
        split = [torch.stack(each.chunk(h, dim=-1)) for each in pair]
        past.append(tuple(each[None].repeat(len(ids), 1, 1, 1) for each in split))
    return model(ids, past_key_values=past).logits


# %% 05.deep_prompt right
def deep_prompt(model, P, ids):
    layers, _, p, d = P.shape
    h = model.config.n_head
    past = P.reshape(layers, 2, p, h, d // h).permute(0, 1, 3, 2, 4)
    rows = [
        model(row[None], past_key_values=tuple((k[None], v[None]) for k, v in past)).logits
        for row in ids
    ]
    return torch.cat(rows)


# %% 05.smallest_rank wrong
def smallest_rank(d, layers, p):
    return (p * d + 3 * (d * d + d)) // (layers * 8 * d)


# %% 05.smallest_rank wrong
def smallest_rank(d, layers, p):
    return (p * d + 3 * (d * d + d)) / (layers * 8 * d)


# %% 05.smallest_rank wrong
def smallest_rank(d, layers, p):
    return math.ceil((p * d + 3 * d * d) / (layers * 8 * d))


# %% 05.smallest_rank wrong
def smallest_rank(d, layers, p):
    return math.ceil((p * d + 3 * (d * d + d)) / (layers * 4 * d))


# %% 05.smallest_rank wrong
def smallest_rank(d, layers, p):
    return (p * d + 3 * (d * d + d)) // (layers * 8 * d) + 1


# %% 05.smallest_rank wrong
def smallest_rank(d, layers, p):
    return math.ceil((p * d + 3 * (d * d + d)) / (8 * d))


# %% 05.smallest_rank wrong
def smallest_rank(d, layers, p):  # GPT-2 only
    return 25


# %% 05.smallest_rank right
def smallest_rank(d, layers, p):
    return math.ceil((p + 3 * (d + 1)) / (8 * layers))


# %% 05.smallest_rank right
def smallest_rank(d, layers, p):
    import itertools

    total = p * d + sum(n.numel() for n in nn.Linear(d, d, device="meta").parameters()) * 3
    return next(r for r in itertools.count(1) if layers * 4 * r * 2 * d >= total)
