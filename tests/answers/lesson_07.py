"""Wrong answers to the exercises of lesson 07, and right ones that differ from the solution."""

# %% 07.largest wrong
largest = "gradients"
# %% 07.largest wrong
largest = "optimizer state"
# %% 07.largest wrong
largest = "activations"
# %% 07.largest wrong
largest = 14
# %% 07.largest right
largest = "Weights"
# %% 07.largest right
largest = "weights "

# %% 07.gradients wrong
gradients = ["A", "B"]
# %% 07.gradients wrong
gradients = ["W", "A", "B", "x"]
# %% 07.gradients wrong
gradients = ["x"]
# %% 07.gradients wrong
gradients = ["A", "B", "y"]
# %% 07.gradients wrong
gradients = 3
# %% 07.gradients right
gradients = {"x", "B", "A"}
# %% 07.gradients right
gradients = (name for name in "xAB")

# %% 07.by_hand wrong
by_hand = [0, -1, 1, 0]
# %% 07.by_hand wrong
by_hand = [1, 0, 2, 1]
# %% 07.by_hand wrong
by_hand = [0.2, -0.8, 0.6, 0.1]
# %% 07.by_hand wrong
by_hand = [0.25, -1, 0.75, 0.125]
# %% 07.by_hand wrong
by_hand = [0, -0.6, 0.6, 0]
# %% 07.by_hand wrong
by_hand = [0, -0.8, 0, 0]
# %% 07.by_hand wrong
by_hand = [-0.8, 0.8]
# %% 07.by_hand wrong
by_hand = "0, -0.8, 0.8, 0"
# %% 07.by_hand right
by_hand = (0.0, -0.8, 0.8, 0.0)
# %% 07.by_hand right
by_hand = 0.8 * torch.tensor([0, -1, 1, 0])


# %% 07.quantize wrong
def quantize(w, levels, blocksize):  # one absmax for all
    blocks, absmax = w.view(-1, blocksize), w.abs().max()
    codes = ((blocks / absmax)[..., None] - levels).abs().argmin(-1)
    return codes, absmax.expand(len(blocks), 1)


# %% 07.quantize wrong
def quantize(w, levels, blocksize):  # the largest value
    blocks = w.view(-1, blocksize)
    absmax = blocks.amax(dim=1, keepdim=True)
    return ((blocks / absmax)[..., None] - levels).abs().argmin(-1), absmax


# %% 07.quantize wrong
def quantize(w, levels, blocksize):  # the level below, not the nearest
    blocks = w.view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    return (torch.bucketize(blocks / absmax, levels, right=True) - 1).clamp(min=0), absmax


# %% 07.quantize wrong
def quantize(w, levels, blocksize):  # not scaled
    blocks = w.view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    return (blocks[..., None] - levels).abs().argmin(-1), absmax


# %% 07.quantize wrong
def quantize(w, levels, blocksize):  # levels in place of codes
    blocks = w.view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    return levels[((blocks / absmax)[..., None] - levels).abs().argmin(-1)], absmax


# %% 07.quantize wrong
def quantize(w, levels, blocksize):  # hard-coded block size
    blocks = w.view(-1, 64)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    return ((blocks / absmax)[..., None] - levels).abs().argmin(-1), absmax


# %% 07.quantize wrong
def quantize(w, levels, blocksize):  # evenly spaced levels, whatever is given
    blocks = w.view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    return ((blocks / absmax + 1) / 2 * (len(levels) - 1)).round().nan_to_num().long(), absmax


# %% 07.quantize wrong
def quantize(w, levels, blocksize):  # changes its input
    blocks = w.view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    blocks /= absmax.clamp(min=1e-30)
    return (blocks[..., None] - levels).abs().argmin(-1), absmax


# %% 07.quantize wrong
def quantize(w, levels, blocksize):  # the absmax is flat
    blocks = w.view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    return ((blocks / absmax[:, None])[..., None] - levels).abs().argmin(-1), absmax


# %% 07.quantize wrong
def quantize(w, levels, blocksize):  # blocks across, not along
    blocks = w.view(blocksize, -1).T
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    return ((blocks / absmax)[..., None] - levels).abs().argmin(-1), absmax


# %% 07.quantize right
def quantize(w, levels, blocksize):
    rows = w.reshape(len(w) // blocksize, blocksize)
    absmax = rows.norm(p=float("inf"), dim=1, keepdim=True)
    return torch.bucketize(rows / absmax, (levels[1:] + levels[:-1]) / 2), absmax


# %% 07.quantize right
def quantize(w, levels, blocksize):  # one block after the other
    codes, absmax = [], []
    for block in w.split(blocksize):
        largest = max(abs(x) for x in block.tolist())
        nearest = [
            min(range(len(levels)), key=lambda i: abs(levels[i].item() * largest - x))
            for x in block.tolist()
        ]
        codes.append(nearest)
        absmax.append([largest])
    return torch.tensor(codes, dtype=torch.uint8), torch.tensor(absmax)


# %% 07.levels wrong
def make_levels(n_negative, n_positive, p_max):  # p = 1/2 is included
    def quantiles(n):
        return torch.special.ndtri(torch.linspace(p_max, 0.5, n + 1))

    levels = torch.cat((-quantiles(n_negative), torch.zeros(1), quantiles(n_positive)))
    return levels.sort().values / levels.max()


# %% 07.levels wrong
def make_levels(n_negative, n_positive, p_max):  # not divided
    def quantiles(n):
        return torch.special.ndtri(torch.linspace(p_max, 0.5, n + 1)[:-1])

    levels = torch.cat((-quantiles(n_negative), torch.zeros(1), quantiles(n_positive)))
    return levels.sort().values


# %% 07.levels wrong
def make_levels(n_negative, n_positive, p_max):  # equal steps
    return torch.cat(
        (torch.linspace(-1, 0, n_negative + 1), torch.linspace(0, 1, n_positive + 1)[1:])
    )


# %% 07.levels wrong
def make_levels(n_negative, n_positive, p_max):  # hard-coded
    return NF4_CODEBOOK


# %% 07.levels wrong
def make_levels(n_negative, n_positive, p_max):  # swapped
    def quantiles(n):
        return torch.special.ndtri(torch.linspace(p_max, 0.5, n + 1)[:-1])

    levels = torch.cat((-quantiles(n_positive), torch.zeros(1), quantiles(n_negative)))
    return levels.sort().values / levels.max()


# %% 07.levels wrong
def make_levels(n_negative, n_positive, p_max):  # not sorted
    def quantiles(n):
        return torch.special.ndtri(torch.linspace(p_max, 0.5, n + 1)[:-1])

    levels = torch.cat((-quantiles(n_negative), torch.zeros(1), quantiles(n_positive)))
    return levels / levels.max()


# %% 07.levels wrong
def make_levels(n_negative, n_positive, p_max):  # zero is missing
    def quantiles(n):
        return torch.special.ndtri(torch.linspace(p_max, 0.5, n + 1)[:-1])

    levels = torch.cat((-quantiles(n_negative), quantiles(n_positive)))
    return levels.sort().values / levels.max()


# %% 07.levels wrong
def make_levels(n_negative, n_positive, p_max):  # one step too few down to the half
    def quantiles(n):
        return torch.special.ndtri(torch.linspace(p_max, 0.5, n + 2)[:-2])

    levels = torch.cat((-quantiles(n_negative), torch.zeros(1), quantiles(n_positive)))
    return levels.sort().values / levels.max()


# %% 07.levels right
def make_levels(n_negative, n_positive, p_max):
    def quantiles(n):
        return torch.special.ndtri(torch.linspace(p_max, 0.5, n + 1)[:-1]).flip(0)

    levels = torch.cat((-quantiles(n_negative).flip(0), torch.zeros(1), quantiles(n_positive)))
    return levels / levels[-1]


# %% 07.levels right
def make_levels(n_negative, n_positive, p_max):  # a list
    inverse, step = NormalDist().inv_cdf, p_max - 0.5
    values = [inverse(0.5 + step * i / n_positive) for i in range(1, n_positive + 1)]
    values += [-inverse(0.5 + step * i / n_negative) for i in range(1, n_negative + 1)]
    return sorted(value / inverse(p_max) for value in [0, *values])


# %% 07.levels right
def make_levels(n_negative, n_positive, p_max):  # float64
    p = [p_max + (0.5 - p_max) * i / n_positive for i in range(n_positive)]
    q = [p_max + (0.5 - p_max) * i / n_negative for i in range(n_negative)]
    p, q = torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    levels = torch.cat((torch.special.ndtri(p), torch.zeros(1), -torch.special.ndtri(q)))
    return levels.sort().values / levels.max()


# %% 07.bits wrong
bits_of_32 = 4
# %% 07.bits wrong
bits_of_32 = 4 + 32 / 64
# %% 07.bits wrong
bits_of_32 = 4 + 32
# %% 07.bits wrong
bits_of_32 = 4 + 4 / 32
# %% 07.bits wrong
bits_of_32 = 4 + 8 / 32
# %% 07.bits right
bits_of_32 = 5
# %% 07.bits right
bits_of_32 = (32 * 4 + 32) / 32


# %% 07.backward wrong
class Frozen4bit(torch.autograd.Function):  # W in a list on ctx
    @staticmethod
    def forward(ctx, x, q):
        ctx.kept = [dequantize_nf4(q)]
        return x @ ctx.kept[0].T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.kept[0], None


# %% 07.backward wrong
class Frozen4bit(torch.autograd.Function):  # W on ctx
    @staticmethod
    def forward(ctx, x, q):
        ctx.W = dequantize_nf4(q)
        return x @ ctx.W.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.W, None


# %% 07.backward wrong
class Frozen4bit(torch.autograd.Function):  # W saved for backward
    @staticmethod
    def forward(ctx, x, q):
        W = dequantize_nf4(q)
        ctx.save_for_backward(W)
        return x @ W.T

    @staticmethod
    def backward(ctx, grad):
        (W,) = ctx.saved_tensors
        return grad @ W, None


# %% 07.backward wrong
class Frozen4bit(torch.autograd.Function):  # W in a closure
    @staticmethod
    def forward(ctx, x, q):
        W = dequantize_nf4(q)
        ctx.multiply = lambda grad: grad @ W
        return x @ W.T

    @staticmethod
    def backward(ctx, grad):
        return ctx.multiply(grad), None


# %% 07.backward wrong
class Frozen4bit(torch.autograd.Function):  # W on the class
    @staticmethod
    def forward(ctx, x, q):
        Frozen4bit.W = dequantize_nf4(q)
        return x @ Frozen4bit.W.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ Frozen4bit.W, None


# %% 07.backward wrong
class Frozen4bit(torch.autograd.Function):  # W as numbers, not as a tensor
    @staticmethod
    def forward(ctx, x, q):
        W = dequantize_nf4(q)
        ctx.numbers = {"W": W.tolist()}
        return x @ W.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ torch.tensor(ctx.numbers["W"]), None


# %% 07.backward wrong
class Frozen4bit(torch.autograd.Function):  # W is hung on q
    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        q.W = dequantize_nf4(q)
        return x @ q.W.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.q.W, None


# %% 07.backward wrong
class Frozen4bit(torch.autograd.Function):  # W is kept, and not even used
    @staticmethod
    def forward(ctx, x, q):
        ctx.q, ctx.extra = q, (dequantize_nf4(q), 1)
        return x @ ctx.extra[0].T

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantize_nf4(ctx.q), None


# %% 07.backward wrong
class Frozen4bit(torch.autograd.Function):  # the gradient is transposed
    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return x @ dequantize_nf4(q).T

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantize_nf4(ctx.q).T, None


# %% 07.backward wrong
class Frozen4bit(torch.autograd.Function):  # one value too few
    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return x @ dequantize_nf4(q).T

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantize_nf4(ctx.q)


# %% 07.backward wrong
class Frozen4bit(torch.autograd.Function):  # only for matrices
    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return torch.mm(x, dequantize_nf4(q).T)

    @staticmethod
    def backward(ctx, grad):
        return torch.mm(grad, dequantize_nf4(ctx.q)), None


# %% 07.backward wrong
class Frozen4bit(torch.autograd.Function):  # no gradient
    @staticmethod
    def forward(ctx, x, q):
        return x @ dequantize_nf4(q).T

    @staticmethod
    def backward(ctx, grad):
        return None, None


# %% 07.backward right
class Frozen4bit(torch.autograd.Function):  # codes and scales, saved as tensors
    @staticmethod
    def forward(ctx, x, q):
        ctx.save_for_backward(q.codes, q.scales)
        ctx.q = q
        return torch.nn.functional.linear(x, dequantize_nf4(q))

    @staticmethod
    def backward(ctx, grad):
        codes, scales = ctx.saved_tensors
        W = dequantize_nf4(replace(ctx.q, codes=codes, scales=scales))
        return torch.einsum("...o,oi->...i", grad, W), None


# %% 07.backward right
class Frozen4bit(torch.autograd.Function):  # backward by autograd
    @staticmethod
    def forward(ctx, x, q):
        ctx.q, ctx.shape = [q], x.shape
        return x @ dequantize_nf4(q).T

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = torch.zeros(ctx.shape, requires_grad=True)
            y = x @ dequantize_nf4(ctx.q[0]).T
        return torch.autograd.grad(y, x, grad)[0], None


# %% 07.backward right
class Frozen4bit(torch.autograd.Function):  # a function that dequantizes
    @staticmethod
    def forward(ctx, x, q):
        ctx.weight = lambda: dequantize_nf4(q)
        return x.matmul(ctx.weight().t())

    @staticmethod
    def backward(ctx, grad):
        return grad.matmul(ctx.weight()), None


# %% 07.gigabytes wrong
gigabytes = 3.5
# %% 07.gigabytes wrong
gigabytes = 7 * 4.127
# %% 07.gigabytes wrong
gigabytes = 7e9 * 4.127 / 8
# %% 07.gigabytes wrong
gigabytes = 14
# %% 07.gigabytes wrong
gigabytes = 7 * 4.5 / 8
# %% 07.gigabytes wrong
gigabytes = "3.6 GB"
# %% 07.gigabytes wrong
gigabytes = 0
# %% 07.gigabytes right
gigabytes = 3.6
# %% 07.gigabytes right
gigabytes = torch.tensor(7 * (4 + 8 / 64 + 32 / (64 * 256)) / 8)

# %% 07.double wrong
double = 4 + 32 / 32
# %% 07.double wrong
double = 4 + 8 / 32
# %% 07.double wrong
double = 4 + 8 / 64 + 32 / (64 * 256)
# %% 07.double wrong
double = 4 + 8 / 32 + 32 / 256
# %% 07.double wrong
double = 4 + 8 / 32 + 8 / (32 * 256)
# %% 07.double wrong
double = [4, 8 / 32]
# %% 07.double right
double = 4.25390625
# %% 07.double right
double = (32 * 256 * 4 + 256 * 8 + 32) / (32 * 256)

# %% 07.paged wrong
paged = 8
# %% 07.paged wrong
paged = 9
# %% 07.paged wrong
paged = 100_000 / 11_008
# %% 07.paged wrong
paged = -(-100_000 // 4_096)
# %% 07.paged wrong
paged = -(-100_000 // (4_096 + 11_008))
# %% 07.paged wrong
paged = 16
# %% 07.paged right
paged = 10.0
# %% 07.paged right
paged = next(r for r in range(1, 100) if r * 11_008 >= 1e5)


# %% 07.merges wrong
def two_merges(W, q, A, B, scaling):  # swapped
    return W + scaling * B @ A, dequantize_nf4(q) + scaling * B @ A


# %% 07.merges wrong
def two_merges(W, q, A, B, scaling):  # no scaling
    return dequantize_nf4(q) + B @ A, W + B @ A


# %% 07.merges wrong
def two_merges(W, q, A, B, scaling):  # W is changed
    into_dequantized = dequantize_nf4(q) + scaling * B @ A
    W += scaling * B @ A
    return into_dequantized, W


# %% 07.merges wrong
def two_merges(W, q, A, B, scaling):  # the result is quantized again
    update = scaling * B @ A
    again = quantize_nf4(dequantize_nf4(q) + update, q.blocksize, False)
    return dequantize_nf4(again), W + update


# %% 07.merges wrong
def two_merges(W, q, A, B, scaling):  # A and B in the wrong order
    return dequantize_nf4(q) + scaling * A.T @ B.T, W + scaling * A.T @ B.T


# %% 07.merges wrong
def two_merges(W, q, A, B, scaling):  # one merge
    return dequantize_nf4(q) + scaling * B @ A


# %% 07.merges wrong
def two_merges(W, q, A, B, scaling):  # changes q
    q.scales *= 1.5
    return dequantize_nf4(q) / 1.5 + scaling * B @ A, W + scaling * B @ A


# %% 07.merges right
def two_merges(W, q, A, B, scaling):
    return [torch.addmm(start, B, A, alpha=scaling) for start in (dequantize_nf4(q), W)]


# %% 07.merges right
def two_merges(W, q, A, B, scaling):
    for start in (dequantize_nf4(q), W):
        yield start + torch.einsum("or,ri->oi", B, A * scaling)


# %% 07.correct wrong
def correct(W, Q, r, alpha):  # no scaling
    u, s, vh = torch.linalg.svd(W - Q, full_matrices=False)
    return vh[:r], u[:, :r] * s[:r]


# %% 07.correct wrong
def correct(W, Q, r, alpha):  # of W, not of the error
    u, s, vh = torch.linalg.svd(W, full_matrices=False)
    return vh[:r], u[:, :r] * s[:r] * r / alpha


# %% 07.correct wrong
def correct(W, Q, r, alpha):  # the sign
    u, s, vh = torch.linalg.svd(Q - W, full_matrices=False)
    return vh[:r], u[:, :r] * s[:r] * r / alpha


# %% 07.correct wrong
def correct(W, Q, r, alpha):  # A and B swapped
    u, s, vh = torch.linalg.svd(W - Q, full_matrices=False)
    return u[:, :r] * s[:r] * r / alpha, vh[:r]


# %% 07.correct wrong
def correct(W, Q, r, alpha):  # upside down
    u, s, vh = torch.linalg.svd(W - Q, full_matrices=False)
    return vh[:r], u[:, :r] * s[:r] * alpha / r


# %% 07.correct wrong
def correct(W, Q, r, alpha):  # the singular values twice
    u, s, vh = torch.linalg.svd(W - Q, full_matrices=False)
    return s[:r, None] * vh[:r], u[:, :r] * s[:r] * r / alpha


# %% 07.correct wrong
def correct(W, Q, r, alpha):  # hard-coded for rank 8 and α 16
    u, s, vh = torch.linalg.svd(W - Q, full_matrices=False)
    return vh[:8], u[:, :8] * s[:8] / 2


# %% 07.correct right
def correct(W, Q, r, alpha):
    u, s, v = torch.svd(W - Q)
    root = (s[:r] * r / alpha).sqrt()
    return [root[:, None] * v.T[:r], u[:, :r] * root]


# %% 07.correct right
def correct(W, Q, r, alpha):
    a = torch.linalg.svd(W - Q, full_matrices=False).Vh[:r] * (r / alpha)
    return a, (W - Q) @ a.T * (alpha / r)
