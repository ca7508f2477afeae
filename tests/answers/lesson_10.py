"""Wrong answers to the exercises of lesson 10, and right ones that differ from the solution."""

# %% 10.shrinks wrong
lora_shrinks = ["weights", "gradients", "optimizer state"]
qlora_shrinks = ["weights"]
# %% 10.shrinks wrong
lora_shrinks = ["gradients", "optimizer state"]
qlora_shrinks = ["optimizer state"]
# %% 10.shrinks wrong
lora_shrinks = ["gradients"]
qlora_shrinks = ["weights"]
# %% 10.shrinks wrong
lora_shrinks = ["gradients", "optimizer state"]
qlora_shrinks = []
# %% 10.shrinks wrong
lora_shrinks = ["gradients", "optimizer state"]
qlora_shrinks = ["weights", "gradients", "optimizer state"]
# %% 10.shrinks wrong
lora_shrinks = 2
qlora_shrinks = 1
# %% 10.shrinks right
lora_shrinks = {"optimizer state", "gradients"}
qlora_shrinks = {"weights"}
# %% 10.shrinks right
lora_shrinks = ("Gradients", "Optimizer state")
qlora_shrinks = "weights"

# %% 10.label wrong
ignored = 0
# %% 10.label wrong
ignored = -1
# %% 10.label wrong
ignored = 100
# %% 10.label wrong
ignored = "-100"
# %% 10.label right
ignored = torch.tensor(-100)
# %% 10.label right
ignored = torch.nn.CrossEntropyLoss().ignore_index

# %% 10.bytes wrong
lora_bytes = 3e9 * 2
# %% 10.bytes wrong
lora_bytes = 3e9 * 16
# %% 10.bytes wrong
lora_bytes = 3e9 * 2 + 10e6 * 4
# %% 10.bytes wrong
lora_bytes = 3e9 * 4 + 10e6 * 16
# %% 10.bytes wrong
lora_bytes = 10e6 * 16
# %% 10.bytes wrong
lora_bytes = 3e9 * 2 + 10e6 * 12
# %% 10.bytes wrong
lora_bytes = (3e9 * 2 + 10e6 * 16) / 1e9  # in GB
# %% 10.bytes wrong
lora_bytes = (3e9 * 2 + 10e6 * 16) / 2**30  # in GiB
# %% 10.bytes right
lora_bytes = 6_160_000_000
# %% 10.bytes right
lora_bytes = torch.tensor(6.16e9, dtype=torch.float64)

# %% 10.blocks wrong
blocks = 32
# %% 10.blocks wrong
blocks = 24
# %% 10.blocks wrong
blocks = 0
# %% 10.blocks wrong
blocks = 1
# %% 10.blocks right
blocks = 8.0
# %% 10.blocks right
blocks = len(range(24, 32))

# %% 10.matched wrong
matched = ["attention.dense", "mlp.dense_h_to_4h"]
# %% 10.matched wrong
matched = ["attention.query_key_value", "attention.dense"]
# %% 10.matched wrong
matched = []
# %% 10.matched wrong
matched = ["q_proj", "v_proj", "dense"]
# %% 10.matched wrong
matched = 1
# %% 10.matched right
matched = {"attention.dense"}
# %% 10.matched right
matched = "dense"


# %% 10.examples wrong
def examples(messages):  # the last answer only
    return [(messages[:-1], messages[-1]["content"])]


# %% 10.examples wrong
def examples(messages):  # earlier messages are lost
    return [
        ([messages[i - 1]], m["content"])
        for i, m in enumerate(messages)
        if m["role"] == "assistant"
    ]


# %% 10.examples wrong
def examples(messages):  # the answer is in the prompt
    return [
        (messages[: i + 1], m["content"])
        for i, m in enumerate(messages)
        if m["role"] == "assistant"
    ]


# %% 10.examples wrong
def examples(messages):  # answers of the user too
    return [(messages[:i], m["content"]) for i, m in enumerate(messages)]


# %% 10.examples wrong
def examples(messages):  # always user, assistant, user, assistant
    return [(messages[:i], messages[i]["content"]) for i in range(1, len(messages), 2)]


# %% 10.examples wrong
def examples(messages):  # no earlier answers
    found, before = [], []
    for m in messages:
        if m["role"] == "assistant":
            found.append((list(before), m["content"]))
        else:
            before.append(m)
    return found


# %% 10.examples wrong
def examples(messages):  # the same list again and again
    found, before = [], []
    for m in messages:
        if m["role"] == "assistant":
            found.append((before, m["content"]))
        before.append(m)
    return found


# %% 10.examples wrong
def examples(messages):  # a message, not its content
    return [(messages[:i], m) for i, m in enumerate(messages) if m["role"] == "assistant"]


# %% 10.examples right
def examples(messages):
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            yield messages[:i], m["content"]


# %% 10.examples right
def examples(messages):
    found, before = [], []
    for m in messages:
        if m["role"] == "assistant":
            found.append([tuple(before), m["content"]])
        before.append(m)
    return tuple(found)


# %% 10.remedies wrong
remedies = ["lower the rate", "check the template", "stop earlier"]
# %% 10.remedies wrong
remedies = ["check the template", "stop earlier", "lower the rate"]
# %% 10.remedies wrong
remedies = ["stop earlier", "lower the rate", "check the template"]
# %% 10.remedies wrong
remedies = ["stop earlier", "lower the rate", "lower the rate"]
# %% 10.remedies wrong
remedies = "stop earlier"
# %% 10.remedies right
remedies = ("Stop earlier", "check the template ", "lower the rate")
# %% 10.remedies right
remedies = dict(zip("ABC", ("stop earlier", "check the template", "lower the rate"), strict=True))

# %% 10.error wrong
error = 0.4 * 0.6 / 20
# %% 10.error wrong
error = (0.4 * 0.6) ** 0.5
# %% 10.error wrong
error = (0.4 / 20) ** 0.5
# %% 10.error wrong
error = 20 * (0.4 * 0.6 / 20) ** 0.5
# %% 10.error wrong
error = 0.1
# %% 10.error wrong
error = "0.11"
# %% 10.error right
error = 0.11
# %% 10.error right
error = torch.tensor([1.0] * 8 + [0.0] * 12).std() / 20**0.5

# %% 10.serve wrong
as_merged = 20 * 14
as_adapters = 14 + 20 * 40
# %% 10.serve wrong
as_merged = 14
as_adapters = 14.8
# %% 10.serve wrong
as_merged = 280
as_adapters = 0.8
# %% 10.serve wrong
as_merged = 280
as_adapters = 14 + 0.04
# %% 10.serve wrong
as_merged = 20 * 14 + 20 * 0.04
as_adapters = 14.8
# %% 10.serve wrong
as_merged = 280
as_adapters = 20 * (14 + 0.04)
# %% 10.serve right
as_merged = 280.0
as_adapters = 14.8
# %% 10.serve right
as_merged = torch.tensor(280)
as_adapters = 14 + 20 * 40 / 1024  # a GB of 1,024 MB


# %% 10.again wrong
class Again(torch.autograd.Function):  # the parameters get nothing
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        return torch.autograd.grad(y, x, grad)[0], None


# %% 10.again wrong
class Again(torch.autograd.Function):  # nothing is recorded
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        ctx.block(x).backward(grad)
        return x.grad, None


# %% 10.again wrong
class Again(torch.autograd.Function):  # no detach(): a chain of blocks crashes
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x.requires_grad_()
            x.retain_grad()
            y = ctx.block(x)
        y.backward(grad)
        return x.grad, None


# %% 10.again wrong
class Again(torch.autograd.Function):  # no detach(), and right for a single block
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        before = None if x.grad is None else x.grad.clone()
        with torch.enable_grad():
            y = ctx.block(x)
        y.backward(grad)
        found, x.grad = x.grad, before
        return found, None


# %% 10.again wrong
class Again(torch.autograd.Function):  # grad is not sent in
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
            y.sum().backward()
        return x.grad, None


# %% 10.again wrong
class Again(torch.autograd.Function):  # the graph is kept, and nothing is computed again
    @staticmethod
    def forward(ctx, x, block):
        ctx.x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.y = block(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, grad):
        ctx.y.backward(grad)
        return ctx.x.grad, None


# %% 10.again wrong
class Again(torch.autograd.Function):  # gradients are replaced, not added
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        trained = [p for p in ctx.block.parameters() if p.requires_grad]
        with torch.enable_grad():
            y = ctx.block(x)
        first, *others = torch.autograd.grad(y, [x, *trained], grad)
        for p, g in zip(trained, others, strict=True):
            p.grad = g
        return first, None


# %% 10.again wrong
class Again(torch.autograd.Function):  # frozen parameters are trained
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block.requires_grad_()
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        y.backward(grad)
        return x.grad, None


# %% 10.again right
class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        trained = [p for p in ctx.block.parameters() if p.requires_grad]
        with torch.enable_grad():
            y = ctx.block(x)
        first, *others = torch.autograd.grad(y, [x, *trained], grad)
        for p, g in zip(trained, others, strict=True):
            p.grad = g if p.grad is None else p.grad + g
        return first, None


# %% 10.again right
class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block):
        ctx.x, ctx.block = x.detach(), block
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.x.clone().requires_grad_()
            (ctx.block(x) * grad).sum().backward()
        return x.grad, None


# %% 10.cards wrong
def cards(divided, activations, card):  # activations are divided too
    return -(-(divided + activations) // card)


# %% 10.cards wrong
def cards(divided, activations, card):  # rounded down
    return max(divided // (card - activations), 0) if card > activations else 0


# %% 10.cards wrong
def cards(divided, activations, card):  # exactly full does not fit
    return divided // (card - activations) + 1 if card > activations else 0


# %% 10.cards wrong
def cards(divided, activations, card):  # no 0, and a division by zero
    return -(-divided // (card - activations))


# %% 10.cards wrong
def cards(divided, activations, card):  # powers of two
    if activations >= card:
        return 0
    n = 1
    while divided / n + activations > card:
        n *= 2
    return n


# %% 10.cards wrong
def cards(divided, activations, card):
    return 4


# %% 10.cards right
def cards(divided, activations, card):
    if activations >= card:
        return 0
    n = 1
    while divided / n + activations > card:
        n += 1
    return n


# %% 10.cards right
def cards(divided, activations, card):
    free = card - activations
    return float((divided + free - 1) // free) if free > 0 else 0.0


# %% 10.pieces wrong
def loss_in_pieces(hidden, head, labels, n):  # the mean of the means
    def mean_of(h, y):
        return F.cross_entropy(h @ head.T, y)

    pieces = zip(hidden.chunk(n), labels.chunk(n), strict=True)
    return sum(checkpoint(mean_of, h, y, use_reentrant=False) for h, y in pieces) / n


# %% 10.pieces wrong
def loss_in_pieces(hidden, head, labels, n):  # no checkpoint
    pieces = zip(hidden.chunk(n), labels.chunk(n), strict=True)
    total = sum(F.cross_entropy(h @ head.T, y, reduction="sum") for h, y in pieces)
    return total / (labels != -100).sum()


# %% 10.pieces wrong
def loss_in_pieces(hidden, head, labels, n):  # n is ignored
    def mean_of(h, y):
        return F.cross_entropy(h @ head.T, y)

    return checkpoint(mean_of, hidden, labels, use_reentrant=False)


# %% 10.pieces wrong
def loss_in_pieces(hidden, head, labels, n):  # n is ignored: always two pieces
    def sum_of(h, y):
        return F.cross_entropy(h @ head.T, y, reduction="sum")

    pieces = zip(hidden.chunk(2), labels.chunk(2), strict=True)
    total = sum(checkpoint(sum_of, h, y, use_reentrant=False) for h, y in pieces)
    return total / (labels != -100).sum()


# %% 10.pieces wrong
def loss_in_pieces(hidden, head, labels, n):  # divided by all positions
    def sum_of(h, y):
        return F.cross_entropy(h @ head.T, y, reduction="sum")

    pieces = zip(hidden.chunk(n), labels.chunk(n), strict=True)
    total = sum(checkpoint(sum_of, h, y, use_reentrant=False) for h, y in pieces)
    return total / len(labels)


# %% 10.pieces wrong
def loss_in_pieces(hidden, head, labels, n):  # the head gets no gradient
    def sum_of(h, y):
        return F.cross_entropy(h @ head.detach().T, y, reduction="sum")

    pieces = zip(hidden.chunk(n), labels.chunk(n), strict=True)
    total = sum(checkpoint(sum_of, h, y, use_reentrant=False) for h, y in pieces)
    return total / (labels != -100).sum()


# %% 10.pieces wrong
def loss_in_pieces(hidden, head, labels, n):  # all logits at once, and then pieces of them
    def sum_of(h, y):
        logits = (h @ head.T).chunk(n)
        return sum(
            F.cross_entropy(a, b, reduction="sum") for a, b in zip(logits, y.chunk(n), strict=True)
        )

    total = checkpoint(sum_of, hidden, labels, use_reentrant=False)
    return total / (labels != -100).sum()


# %% 10.pieces right
def loss_in_pieces(hidden, head, labels, n):  # only where there are labels
    def sum_of(h, y):
        logits, kept = h @ head.T, y != -100
        right = logits.gather(1, y.clamp(min=0)[:, None])[:, 0]
        return ((logits.logsumexp(1) - right) * kept).sum()

    total = 0.0
    for h, y in zip(hidden.tensor_split(n), labels.tensor_split(n), strict=True):
        total = total + checkpoint(sum_of, h, y, use_reentrant=False)
    return total / (labels >= 0).sum()


# %% 10.pieces right
def loss_in_pieces(hidden, head, labels, n):
    size = -(-len(labels) // n)
    count = (labels != -100).sum()

    def share(i, w):
        part = slice(i, i + size)
        logits = F.linear(hidden[part], w)
        return F.cross_entropy(logits, labels[part], reduction="sum") / count

    starts = range(0, len(labels), size)
    shares = [checkpoint(share, i, head, use_reentrant=False) for i in starts]
    return torch.stack(shares).sum()


# %% 10.pieces right
class Sums(torch.autograd.Function):  # gradients are computed in the forward pass
    @staticmethod
    def forward(ctx, hidden, head, labels, n):
        total, of_hidden, of_head = 0.0, [], torch.zeros_like(head)
        for h, y in zip(hidden.chunk(n), labels.chunk(n), strict=True):
            kept = (y != -100).float()[:, None]
            log_p = (h @ head.T).log_softmax(1)
            right = y.clamp(min=0)[:, None]
            total = total - (log_p.gather(1, right) * kept).sum()
            d = log_p.exp().scatter_add(1, right, -torch.ones(len(y), 1)) * kept
            of_hidden.append(d @ head)
            of_head += d.T @ h
        ctx.save_for_backward(torch.cat(of_hidden), of_head)
        return total

    @staticmethod
    def backward(ctx, grad):
        of_hidden, of_head = ctx.saved_tensors
        return grad * of_hidden, grad * of_head, None, None


def loss_in_pieces(hidden, head, labels, n):
    return Sums.apply(hidden, head, labels, n) / (labels != -100).sum()


# %% 10.again right
class Again(torch.autograd.Function):  # without detach(), but nothing goes beyond x
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        trained = [p for p in ctx.block.parameters() if p.requires_grad]
        with torch.enable_grad():
            y = ctx.block(x)
        torch.autograd.backward(y, grad, inputs=trained, retain_graph=True)
        return torch.autograd.grad(y, x, grad)[0], None
