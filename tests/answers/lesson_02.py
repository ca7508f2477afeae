"""Wrong answers to the exercises of lesson 02, and right ones that differ from the solution."""

# %% 02.bytes wrong
bytes_per_parameter = 4
# %% 02.bytes wrong
bytes_per_parameter = 8
# %% 02.bytes wrong
bytes_per_parameter = 12
# %% 02.bytes wrong
bytes_per_parameter = "16"
# %% 02.bytes right
bytes_per_parameter = 16.0
# %% 02.bytes right
bytes_per_parameter = torch.tensor(16)

# %% 02.clearest wrong
clearest = "loss"
# %% 02.clearest wrong
clearest = "template loss"
# %% 02.clearest wrong
clearest = "accuracy"
# %% 02.clearest wrong
clearest = 0.9
# %% 02.clearest right
clearest = "slot accuracy"
# %% 02.clearest right
clearest = " Slot accuracy"

# %% 02.count wrong
count = 8 * 128 * 384
# %% 02.count wrong
count = 128 * 384
# %% 02.count wrong
count = 8 * 128
# %% 02.count wrong
count = 128 + 384
# %% 02.count wrong
count = 8 + 128 + 384
# %% 02.count right
count = 4096.0
# %% 02.count right
count = torch.empty(8, 128).numel() + torch.empty(384, 8).numel()

# %% 02.zero wrong
first_step = ["A"]
both_zero = []
# %% 02.zero wrong
first_step = ["A", "B"]
both_zero = []
# %% 02.zero wrong
first_step = ["B"]
both_zero = ["A", "B"]
# %% 02.zero wrong
first_step = []
both_zero = []
# %% 02.zero wrong
first_step = True
both_zero = False
# %% 02.zero right
first_step = {"B"}
both_zero = ()
# %% 02.zero right
first_step = "B"
both_zero = ""


# %% 02.my_lora wrong
class MyLora(nn.Module):  # both start at zero
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.zeros(r, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.scaling = alpha / r

    def forward(self, x):
        return self.layer(x) + self.scaling * (x @ self.A.T @ self.B.T)


# %% 02.my_lora wrong
class MyLora(nn.Module):  # the layer is not frozen
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer
        self.A = nn.Parameter(torch.randn(r, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.scaling = alpha / r

    def forward(self, x):
        return self.layer(x) + self.scaling * (x @ self.A.T @ self.B.T)


# %% 02.my_lora wrong
class MyLora(nn.Module):  # no scaling
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))

    def forward(self, x):
        return self.layer(x) + x @ self.A.T @ self.B.T


# %% 02.my_lora wrong
class MyLora(nn.Module):  # the bias is not frozen
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer
        self.layer.weight.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.scaling = alpha / r

    def forward(self, x):
        return self.layer(x) + self.scaling * (x @ self.A.T @ self.B.T)


# %% 02.my_lora wrong
class MyLora(nn.Module):  # A is zero, and B random
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.zeros(r, layer.in_features))
        self.B = nn.Parameter(torch.randn(layer.out_features, r))
        self.scaling = alpha / r

    def forward(self, x):
        return self.layer(x) + self.scaling * (x @ self.A.T @ self.B.T)


# %% 02.my_lora wrong
class MyLora(nn.Module):  # B is detached, so it never trains
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.scaling = alpha / r

    def forward(self, x):
        return self.layer(x) + self.scaling * (x @ self.A.T @ self.B.detach().T)


# %% 02.my_lora wrong
class MyLora(nn.Module):  # the bias of the layer is left out
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.scaling = alpha / r

    def forward(self, x):
        return x @ self.layer.weight.T + self.scaling * (x @ self.A.T @ self.B.T)


# %% 02.my_lora wrong
class MyLora(nn.Module):  # W is changed when the layer is made
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.randn(layer.out_features, r))
        self.layer.weight -= alpha / r * (self.B @ self.A).detach()
        self.scaling = alpha / r

    def forward(self, x):
        return self.layer(x) + self.scaling * (x @ self.A.T @ self.B.T)


# %% 02.my_lora wrong
class MyLora(nn.Module):  # A is too large
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.scaling = alpha / r

    def forward(self, x):
        return self.layer(x) + self.scaling * (x @ self.A.T @ self.B.T)


# %% 02.my_lora wrong
class MyLora(nn.Module):  # earlier layers get no gradient through the frozen one
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.scaling = alpha / r

    def forward(self, x):
        with torch.no_grad():
            y = self.layer(x)
        return y + self.scaling * (x @ self.A.T @ self.B.T)


# %% 02.my_lora wrong
class MyLora(nn.Module):  # as in the equation, but the rows of x are the inputs
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.scaling = alpha / r

    def forward(self, x):
        return self.layer(x) + self.scaling * self.B @ self.A @ x


# %% 02.my_lora right
class MyLora(nn.Module):  # linear layers
    def __init__(self, layer, r, alpha):
        super().__init__()
        layer.requires_grad_(False)
        self.base = layer
        self.A = nn.Linear(layer.in_features, r, bias=False)
        self.B = nn.Linear(r, layer.out_features, bias=False)
        nn.init.zeros_(self.B.weight)
        self.r, self.alpha = r, alpha

    def forward(self, x):
        return self.base(x) + self.B(self.A(x)) * self.alpha / self.r


# %% 02.my_lora right
class MyLora(nn.Module):  # parameters
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.scaling = alpha / r

    def forward(self, x):
        return self.layer(x) + self.scaling * (x @ self.A.T @ self.B.T)


# %% 02.my_lora right
class MyLora(nn.Module):  # one matrix for both
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.A = nn.Parameter((torch.rand(r, layer.in_features) - 0.5) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.w, self.b, self.s = layer.weight.detach(), layer.bias, alpha / r
        layer.requires_grad_(False)

    def forward(self, x):
        return nn.functional.linear(x, self.w + self.s * self.B @ self.A, self.b)


# %% 02.merge wrong
def merge(W, A, B, alpha, r):
    return W + B @ A


# %% 02.merge wrong
def merge(W, A, B, alpha, r):
    return W + alpha * B @ A


# %% 02.merge wrong
def merge(W, A, B, alpha, r):
    W += alpha / r * B @ A
    return W


# %% 02.merge wrong
def merge(W, A, B, alpha, r):
    return alpha / r * B @ A


# %% 02.merge wrong
def merge(W, A, B, alpha, r):
    return W + alpha / r * A @ B


# %% 02.merge wrong
def merge(W, A, B, alpha, r):
    return W + alpha // r * B @ A


# %% 02.merge right
def merge(W, A, B, alpha, r):
    return torch.addmm(W, B, A, alpha=alpha / r)


# %% 02.merge right
def merge(W, A, B, alpha, r):
    return W + torch.einsum("or,ri->oi", B, A * (alpha / r))


# %% 02.gpt2 wrong
gpt2 = 4 * (768 + 3 * 768)
# %% 02.gpt2 wrong
gpt2 = 12 * 4 * 768 * 3 * 768
# %% 02.gpt2 wrong
gpt2 = 12 * 4 * 2 * 768
# %% 02.gpt2 wrong
gpt2 = 12 * 4 * (768 * 3)
# %% 02.gpt2 right
gpt2 = 147456.0
# %% 02.gpt2 right
gpt2 = sum(4 * 4 * 768 for _ in range(12))


# %% 02.without_alpha wrong
def without_alpha(A, B, alpha, r):
    return A, B


# %% 02.without_alpha wrong
def without_alpha(A, B, alpha, r):
    return alpha / r * A, alpha / r * B


# %% 02.without_alpha wrong
def without_alpha(A, B, alpha, r):
    B *= alpha / r
    return A, B


# %% 02.without_alpha wrong
def without_alpha(A, B, alpha, r):
    return alpha / r * B @ A


# %% 02.without_alpha wrong
def without_alpha(A, B, alpha, r):
    return alpha / r * B, A


# %% 02.without_alpha right
def without_alpha(A, B, alpha, r):
    return [alpha / r * A, B]


# %% 02.without_alpha right
def without_alpha(A, B, alpha, r):
    root = (alpha / r) ** 0.5
    return root * A, root * B


# %% 02.extract wrong
def extract(delta, r):
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return vh[:r], u[:, :r]


# %% 02.extract wrong
def extract(delta, r):
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return s[:r, None] * vh[:r], u[:, :r] * s[:r]


# %% 02.extract wrong
def extract(delta, r):
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :r] * s[:r], vh[:r]


# %% 02.extract wrong
def extract(delta, r):
    return delta[:r], torch.eye(delta.shape[0])[:, :r]


# %% 02.extract wrong
def extract(delta, r):
    u, s, v = torch.svd(delta)
    return v[:r], u[:, :r] * s[:r]


# %% 02.extract wrong
def extract(delta, r):  # V is transposed once too often
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return vh[:, :r].T, u[:, :r] * s[:r]


# %% 02.extract right
def extract(delta, r):
    u, s, v = torch.svd(delta)
    root = s[:r].sqrt()
    return root[:, None] * v.T[:r], u[:, :r] * root


# %% 02.extract right
def extract(delta, r):
    a = torch.linalg.svd(delta, full_matrices=False).Vh[:r]
    return a, delta @ a.T
