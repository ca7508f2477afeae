"""Mistakes in training.py, and correct files that are written differently."""

from . import mistake, right

PAD = "    return torch.tensor([row + [value] * (t - len(row)) for row in rows])  # (b, t)\n"
LABELS = "    labels = [[-100] * len(prompt) + completion for prompt, completion in examples]\n"
PADDED = "pad_right(labels, -100)"
MASK = "pad_right([[1] * len(row) for row in rows], 0)"
SHIFT = "logits, labels = logits[:, :-1], labels[:, 1:]"
FLAT = (
    "    logits, labels = logits.flatten(0, 1), labels.flatten()  # (b (t - 1), v), (b (t - 1))\n"
)
LOSS = '    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")\n'
WARM = """    if step <= warmup:
        return peak * step / warmup
"""
DONE = "    done = (step - 1 - warmup) / (steps - warmup)\n"
COSINE = "    return peak * (1 + math.cos(math.pi * done)) / 2  # (2)\n"
COUNT = """    n = sum((batch["labels"][:, 1:] != -100).sum().item() for batch in micro_batches)
"""
ZERO = "    optimizer.zero_grad()\n"
TOTAL = "    total = 0.0\n"
FOR = "    for batch in micro_batches:\n"
CALL = """        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
"""
SUM = '        loss = summed_loss(logits, batch["labels"]) / n  # (1)\n'
BACKWARD = "        loss.backward()  # gradients add up\n"
ADD = "        total += loss.item()\n"
CLIP = (
    "    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)\n"
)
STEP = "    optimizer.step()\n"
RETURN = "    return total\n"
BODY = COUNT + ZERO + TOTAL + FOR + CALL + SUM + BACKWARD + ADD + CLIP + STEP + RETURN
ADAMW = "    optimizer = torch.optim.AdamW(trainable, weight_decay=0.0)\n"
TRAINABLE = "    trainable = [p for p in model.parameters() if p.requires_grad]\n"
MODE = "    model.train()\n"
LOSSES = "    losses = []\n"
EACH = "    for step, micro_batches in zip(range(1, n + 1), steps, strict=False):\n"
RATE = """        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n, peak, warmup)
"""
APPEND = "        losses.append(training_step(model, optimizer, micro_batches))\n"
TRAIN = TRAINABLE + ADAMW + MODE + LOSSES + EACH + RATE + APPEND + "    return losses\n"
NORM = "nn.utils.clip_grad_norm_(model.parameters(), max_norm)\n"

VARIANTS = [
    mistake("padding on the left", "pad_right", "on the left", (PAD, PAD.replace("row + [value] * (t - len(row))", "[value] * (t - len(row)) + row"))),
    mistake("padding is always 0", "pad_right", "0, not", (PAD, PAD.replace("[value]", "[0]"))),
    mistake("rows are extended in place", "pad_right", "has changed the rows",
            (PAD, "    for row in rows:\n        row += [value] * (t - len(row))\n    return torch.tensor(rows)\n")),
    mistake("rows are cut to the shortest", "pad_right", "has the shape",
            ("    t = max(len(row)", "    t = min(len(row)"), (PAD, "    return torch.tensor([row[:t] for row in rows])\n")),
    mistake("float tensor", "pad_right", "dtype", (PAD, PAD.replace("])  #", "], dtype=torch.float32)  #"))),
    mistake("prompt not masked", "collate", "prompt must be -100", (LABELS, "    labels = rows\n")),
    mistake("padding not masked", "collate", "padding must be -100, not `pad`", (PADDED, "pad_right(labels, pad)")),
    mistake("nothing masked", "collate", "neither the prompt nor the padding",
            (LABELS, "    labels = rows\n"), (PADDED, "pad_right(labels, pad)")),
    mistake("padding of labels is 0", "collate", "not 0", (PADDED, "pad_right(labels, 0)")),
    mistake("end token masked away", "collate", "last token of each completion", (LABELS, LABELS.replace("+ completion ", "+ completion[:-1] + [-100] "))),
    mistake("every pad token masked away", "collate", "would never stop",
            (LABELS, LABELS + "    labels = [[-100 if i == pad else i for i in row] for row in labels]\n")),
    mistake("labels shifted twice", "collate", "shifts them again",
            (LABELS, LABELS + "    labels = [row[1:] + [-100] for row in labels]\n")),
    mistake("mask of ones", "collate", "1 for the padding too", (MASK, "pad_right([[1] * len(row) for row in rows], 1)")),
    mistake("mask inverted", "collate", "0 for tokens", (MASK, "pad_right([[0] * len(row) for row in rows], 1)")),
    mistake("mask from the pad token", "collate", "may end with one", (MASK, "(pad_right(rows, pad) != pad).long()")),
    mistake("mask hides the prompt", "collate", "which the model must see", (MASK, "(pad_right(labels, -100) != -100).long()")),
    mistake("completion before prompt", "collate", "before the prompt", ("rows = [prompt + completion for", "rows = [completion + prompt for")),
    mistake("-100 as padding of the input", "collate", "for labels only", ("pad_right(rows, pad)", "pad_right(rows, -100)")),
    mistake("not shifted", "summed_loss", "not shifted", (SHIFT, "logits, labels = logits, labels")),
    mistake("shifted by two", "summed_loss", "shifted twice", (SHIFT, "logits, labels = logits[:, :-2], labels[:, 2:]")),
    mistake("shifted the wrong way", "summed_loss", "wrong way", (SHIFT, "logits, labels = logits[:, 1:], labels[:, :-1]")),
    mistake("mean", "summed_loss", "the mean, not the sum", (LOSS, LOSS.replace("sum", "mean"))),
    mistake("-100 counts as token 0", "summed_loss", "counts as token 0", (FLAT, FLAT + "    labels = labels.clamp(min=0)\n")),
    mistake("-100 becomes token 0, and token 0 is ignored", "summed_loss", "token 0 is ignored",
            (FLAT, FLAT + "    labels = labels.clamp(min=0)\n"), (LOSS, LOSS.replace("-100", "0"))),
    mistake("labels are changed", "summed_loss", "must not",
            (SHIFT, "labels[labels == -100] = 0\n    " + SHIFT), (LOSS, LOSS.replace("-100", "0"))),
    mistake("loss without its graph", "summed_loss", "graph", (LOSS, LOSS.replace('"sum")', '"sum").detach()'))),
    mistake("a softmax before the cross-entropy", "summed_loss", "softmax before it", (FLAT, FLAT + "    logits = logits.softmax(-1)\n")),
    mistake("log of softmax overflows", "summed_loss", "",
            (LOSS, "    keep = labels != -100\n    p = logits.exp() / logits.exp().sum(-1, keepdim=True)\n"
             "    return -p[keep].gather(1, labels[keep][:, None]).log().sum()\n")),
    mistake("flattened before the shift", "summed_loss", "before you flatten",
            (SHIFT + "  # position i predicts token i + 1\n" + FLAT,
             "logits, labels = logits.flatten(0, 1)[:-1], labels.flatten()[1:]\n")),
    mistake("divided by the rows", "summed_loss", "number of rows", (LOSS, LOSS.replace('"sum")', '"sum") / rows')),
            (SHIFT, "rows = len(labels)\n    " + SHIFT)),
    mistake("reshape instead of transpose", "summed_loss", "not reshaped",
            (FLAT, "    logits = logits.reshape(logits.shape[0], logits.shape[2], logits.shape[1])\n")),
    mistake("the opposite sign", "summed_loss", "opposite sign", (LOSS, LOSS.replace("return F", "return -F"))),
    mistake("warm-up from 0", "learning_rate", "starts at 0", (WARM, WARM.replace("step / warmup", "(step - 1) / warmup"))),
    mistake("warm-up reaches the peak late", "learning_rate", "one step too late", (WARM, WARM.replace("step / warmup", "step / (warmup + 1)"))),
    mistake("no warm-up", "learning_rate", "no warm-up", (WARM, "    if step <= warmup:\n        return peak\n")),
    mistake("cosine one step ahead", "learning_rate", "one step ahead", (DONE, DONE.replace("step - 1 - warmup", "step - warmup"))),
    mistake("cosine from step 0", "learning_rate", "counts from step 0", (DONE, "    done = step / steps\n")),
    mistake("cosine from step 1", "learning_rate", "counts from step 1", (DONE, "    done = (step - 1) / steps\n")),
    mistake("no decay", "learning_rate", "no decay", (COSINE, "    return peak\n")),
    mistake("no decay to the end", "learning_rate", "S - w steps", (DONE, DONE.replace("(steps - warmup)", "steps"))),
    mistake("linear decay", "learning_rate", "linear", (COSINE, "    return peak * (1 - done)\n")),
    mistake("half missing", "learning_rate", "half of it", (COSINE, COSINE.replace(" / 2", ""))),
    mistake("π missing", "learning_rate", "π is missing", (COSINE, COSINE.replace("math.pi * ", ""))),
    mistake("decay to a tenth", "learning_rate", "", (COSINE, "    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)\n")),
    mistake("step < warmup", "learning_rate", "step w belongs", (WARM, WARM.replace("<=", "<"))),
    mistake("warm-up in whole steps", "learning_rate", "", (WARM, WARM.replace("step / warmup", "(step // warmup)"))),
    mistake("peak missing in the cosine", "learning_rate", "missing in the cosine", (COSINE, COSINE.replace("peak * ", ""))),
    mistake("division by a warm-up of 0", "learning_rate", "ZeroDivisionError",
            (WARM, "    factor = min(1, step / warmup)\n    if factor < 1:\n        return peak * factor\n")),
    mistake("mask missing in the call of the model", "training_step", "without the attention_mask",
            (CALL, '        logits = model(batch["input_ids"]).logits\n')),
    mistake("mask of ones in the call", "training_step", "batch's attention_mask",
            (CALL, CALL.replace('batch["attention_mask"]', 'torch.ones_like(batch["input_ids"])'))),
    mistake("mean per micro-batch", "training_step", "mean counts the same",
            (SUM, '        here = (batch["labels"][:, 1:] != -100).sum()\n        loss = summed_loss(logits, batch["labels"]) / here / len(micro_batches)\n')),
    mistake("means added", "training_step", "are added",
            (SUM, '        here = (batch["labels"][:, 1:] != -100).sum()\n        loss = summed_loss(logits, batch["labels"]) / here\n')),
    mistake("not divided", "training_step", "number of labelled tokens", (SUM, SUM.replace(" / n", ""))),
    mistake("n counts the first column", "training_step", "first position", (COUNT, COUNT.replace("[:, 1:]", ""))),
    mistake("n counts the prompt", "training_step", "n counts all tokens",
            (COUNT, '    n = sum(batch["attention_mask"].sum().item() for batch in micro_batches)\n')),
    mistake("divided by the examples", "training_step", "not of examples",
            (COUNT, '    n = sum(len(batch["labels"]) for batch in micro_batches)\n')),
    mistake("divided by n and by the micro-batches", "training_step", "once more", (SUM, SUM.replace("/ n", "/ n / len(micro_batches)"))),
    mistake("only the first micro-batch", "training_step", "first micro-batch",
            (FOR, "    for batch in micro_batches[:1]:\n")),
    mistake("labels as the mask", "training_step", "batch's attention_mask",
            (CALL, CALL.replace('batch["attention_mask"]', '(batch["labels"] != -100).long()'))),
    mistake("no gradient", "training_step", "RuntimeError", (CALL, "        with torch.no_grad():\n    " + CALL)),
    mistake("gradient ascent", "training_step", "opposite", (BACKWARD, "        (-loss).backward()\n")),
    mistake("the largest entry as norm", "training_step", "", (CLIP, CLIP.replace("max_norm)", "max_norm, norm_type=math.inf)"))),
    mistake("always scaled to the norm", "training_step", "must stay as it is",
            (CLIP, "    ps = [p for p in model.parameters() if p.requires_grad]\n    norm = sum((p.grad**2).sum() for p in ps) ** 0.5\n"
             "    for p in ps:\n        p.grad.mul_(max_norm / norm)\n")),
    mistake("zero_grad missing", "training_step", "zero_grad() is missing", (ZERO, "")),
    mistake("zero_grad between micro-batches", "training_step", "between micro-batches",
            (ZERO, ""), (BACKWARD, "        optimizer.zero_grad()\n" + BACKWARD)),
    mistake("zero_grad after backward", "training_step", "between backward() and step()", (ZERO, ""), (CLIP, ZERO + CLIP)),
    mistake("step before backward", "training_step", "before backward()",
            (CLIP + STEP, CLIP), (BACKWARD, "        optimizer.step()\n" + BACKWARD)),
    mistake("step per micro-batch", "training_step", "times for", (CLIP + STEP, CLIP), (ADD, ADD + "        optimizer.step()\n")),
    mistake("no step", "training_step", "not called", (CLIP + STEP, CLIP)),
    mistake("no backward", "training_step", "backward() is not called", (BACKWARD, "")),
    mistake("no clipping", "training_step", "not clipped", (CLIP, "")),
    mistake("clipping after the step", "training_step", "not clipped", (CLIP + STEP, STEP + CLIP)),
    mistake("clipping per micro-batch", "training_step", "per micro-batch", (BACKWARD, BACKWARD + "        " + NORM), (CLIP, "")),
    mistake("clipping of values", "training_step", "each entry is clipped", (CLIP, CLIP.replace("clip_grad_norm_", "clip_grad_value_"))),
    mistake("clipping per parameter", "training_step", "each parameter is clipped by itself",
            (CLIP, "    for p in model.parameters():\n        nn.utils.clip_grad_norm_([p], max_norm)\n")),
    mistake("max_norm ignored", "training_step", "max_norm is not used", (CLIP, CLIP.replace("max_norm)", "1.0)"))),
    mistake("loss keeps the graph", "training_step", "keeps the whole graph", (ADD, "        total = total + loss\n")),
    mistake("loss after the update", "training_step", "after the update",
            (STEP + RETURN, STEP + '    total = 0.0\n    with torch.no_grad():\n        for batch in micro_batches:\n'
             '            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits\n'
             '            total += summed_loss(logits, batch["labels"]).item() / n\n' + RETURN)),
    mistake("loss of the last micro-batch", "training_step", "last micro-batch", (ADD, "        total = loss.item()\n")),
    mistake("loss divided once more", "training_step", "once more", (RETURN, "    return total / len(micro_batches)\n")),
    mistake("learning rate set after the step", "train", "set after the step", (RATE + APPEND, APPEND + RATE)),
    mistake("learning rate never set", "train", "the same in all steps", (RATE, "")),
    mistake("learning rate of step 0", "train", "one step behind", (RATE, RATE.replace("(step,", "(step - 1,"))),
    mistake("weight decay left at 0.01", "train", "0.01", (ADAMW, ADAMW.replace(", weight_decay=0.0", ""))),
    mistake("SGD instead of AdamW", "train", "SGD", (ADAMW, ADAMW.replace("AdamW", "SGD"))),
    mistake("frozen parameters in the optimizer", "train", "frozen parameter is given", (ADAMW, ADAMW.replace("trainable", "model.parameters()"))),
    mistake("everything is unfrozen", "train", "frozen parameter",
            (TRAINABLE, "    model.requires_grad_(True)\n" + TRAINABLE)),
    mistake("model left in eval mode", "train", "evaluation mode", (MODE, "")),
    mistake("all steps of the iterable", "train", "more than n", (EACH, "    for step, micro_batches in enumerate(steps, 1):\n")),
    mistake("only the last loss", "train", "list", ("    return losses\n", "    return losses[-1]\n")),
    mistake("a new optimizer per step", "train", "lost AdamW's state", (RATE, "    " + ADAMW + RATE)),
    mistake("training mode too late", "train", "evaluation mode", (MODE, ""), (APPEND, APPEND + "    model.train()\n")),
    mistake("one step too few", "train", "n = 3 losses", (EACH, EACH.replace("n + 1", "n"))),
    mistake("peak and warm-up swapped", "train", "", (RATE, RATE.replace("peak, warmup", "warmup, peak"))),
    mistake("other betas", "train", "", (ADAMW, ADAMW.replace("weight_decay", "betas=(0.9, 0.95), weight_decay"))),
    mistake("another max_norm", "train", "", (APPEND, APPEND.replace("micro_batches)", "micro_batches, 0.1)"))),
    mistake("no clipping in train", "train", "not clipped", (APPEND, APPEND.replace("micro_batches)", "micro_batches, math.inf)"))),
    mistake("the constant peak", "train", "same in all steps", (ADAMW, ADAMW.replace("trainable,", "trainable, lr=peak,")), (RATE, "")),
    mistake("only some parameters", "train", "all parameters", (ADAMW, ADAMW.replace("trainable,", "trainable[:1],"))),
    mistake("prompt changed in place", "collate", "changed the examples",
            ("    rows = [prompt + completion for prompt, completion in examples]\n",
             "    for prompt, completion in examples:\n        prompt += completion\n    rows = [prompt for prompt, _ in examples]\n")),
    mistake("last token of the prompt not masked", "collate", "last token of each prompt",
            (LABELS, LABELS.replace("[-100] * len(prompt)", "[-100] * (len(prompt) - 1) + prompt[-1:]"))),
    mistake("first token of the completion masked", "collate", "first token of each completion",
            (LABELS, LABELS.replace("len(prompt) + completion for", "(len(prompt) + 1) + completion[1:] for"))),
    mistake("n so far", "training_step", "", (COUNT, "    n = 0\n"),
            (SUM, '        n += (batch["labels"][:, 1:] != -100).sum().item()\n' + SUM)),
    mistake("clipped before the division", "training_step", "", (SUM, SUM.replace(" / n", "")),
            (STEP, "    for p in model.parameters():\n        if p.grad is not None:\n            p.grad.div_(n)\n" + STEP),
            (RETURN, "    return total / n\n")),
    mistake("the returned loss is not divided", "training_step", "not divided", (RETURN, "    return total * n\n")),
    mistake("half of the graph is cut", "summed_loss", "0.5 of what it must be",
            (FLAT, FLAT + "    logits = logits / 2 + logits.detach() / 2\n")),
    mistake("all steps in a list", "train", "more than n", (EACH, EACH.replace("steps, strict", "list(steps), strict"))),
    mistake("a second optimizer.step", "train", "6 times in n = 3", (APPEND, APPEND + "        optimizer.step()\n")),
    mistake("Adam with its own weight decay", "train", "",
            (ADAMW, "    optimizer = torch.optim.Adam(trainable, weight_decay=0.01)\n")),
    mistake("only the first micro-batch in train", "train", "", (APPEND, APPEND.replace("micro_batches)", "micro_batches[:1])"))),
    right("tensors and pad_sequence, booleans as the mask",
          ("    t = max(len(row) for row in rows)\n" + PAD, "    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]\n"
           "    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)\n"),
          (MASK, "pad_right([[True] * len(row) for row in rows], False).bool()")),
    right("loops that fill tensors in collate",
          (LABELS, "    t = max(len(row) for row in rows)\n    ids = torch.full((len(rows), t), pad)\n"
           "    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)\n"
           "    for i, (prompt, completion) in enumerate(examples):\n        end = len(prompt) + len(completion)\n"
           "        ids[i, :end] = torch.tensor(rows[i])\n        mask[i, :end] = 1\n"
           "        labels[i, len(prompt):end] = torch.tensor(completion)\n"),
          ("pad_right(rows, pad)", "ids"), (MASK, "mask"), (PADDED, "labels")),
    right("log-softmax and gather",
          (FLAT + LOSS, "    keep = labels != -100\n    logp = logits.log_softmax(-1)\n"
           "    return -logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0][keep].sum()\n")),
    right("-100 as the last label, (b, v, t), in float32",
          (SHIFT, "labels = F.pad(labels[:, 1:], (0, 1), value=-100)"),
          (FLAT + LOSS, '    return F.cross_entropy(logits.float().mT, labels, reduction="sum")\n')),
    right("a squared cosine", (WARM + DONE + COSINE,
          "    if step > warmup:\n        angle = math.pi / 2 * (step - 1 - warmup) / (steps - warmup)\n"
          "        return peak * math.cos(angle) ** 2\n    return step / warmup * peak\n")),
    right("zero_grad at the end, clipping by hand, the sum divided after backward",
          (BODY, "    total, n = 0.0, 0\n" + FOR + CALL + '        loss = summed_loss(logits, batch["labels"])\n'
           "        loss.backward()\n        total += loss.item()\n        n += int((batch['labels'][:, 1:] != -100).sum())\n"
           "    grads = [p.grad for p in model.parameters() if p.grad is not None]\n    for g in grads:\n        g.div_(n)\n"
           "    norm = sum((g**2).sum() for g in grads) ** 0.5\n    if norm > max_norm:\n        for g in grads:\n            g.mul_(max_norm / norm)\n"
           "    optimizer.step()\n    model.zero_grad()\n    return total / n\n")),
    right("LambdaLR and islice",
          (TRAIN, TRAINABLE + "    from itertools import islice\n\n    optimizer = torch.optim.AdamW(trainable, lr=1.0, weight_decay=0)\n"
           "    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s + 1, n, peak, warmup) if s < n else 0.0)\n"
           "    model.train(True)\n    losses = []\n    for micro_batches in islice(steps, n):\n" + APPEND + "        schedule.step()\n    return losses\n")),
    right("one formula for warm-up and cosine", (WARM + DONE + COSINE,
          "    rise = min(1.0, step / max(warmup, 1))\n    done = max(0, step - 1 - warmup) / max(1, steps - warmup)\n"
          "    return 0.5 * peak * rise * (1 + torch.cos(torch.tensor(math.pi * done, dtype=torch.float64)).item())\n")),
    right("labels by positions", ("pad_right(rows, pad)", "ids"),
          (LABELS, "    ids = pad_right(rows, pad)\n    at = torch.arange(ids.shape[1])[None]\n"
           "    start = torch.tensor([len(prompt) for prompt, _ in examples])[:, None]\n"
           "    end = torch.tensor([len(row) for row in rows])[:, None]\n"
           "    labels = torch.where((at >= start) & (at < end), ids, torch.tensor(-100))\n"),
          (MASK, "(at < end).int()"), (PADDED, "labels")),
    right("one backward, and set_to_none=False",
          (ZERO, "    optimizer.zero_grad(set_to_none=False)\n"), (TOTAL, "    losses = []\n"),
          (BACKWARD + ADD, "        losses.append(loss)\n"),
          (CLIP, "    total = sum(losses)\n    total.backward()\n    for group in optimizer.param_groups:\n"
           "        nn.utils.clip_grad_norm_(group['params'], max_norm)\n"),
          (RETURN, "    return total.item()\n")),
    right("one-hot rows, and a loop over the examples",
          (SHIFT + "  # position i predicts token i + 1\n" + FLAT + LOSS,
           "total = logits.new_zeros(())\n    for row, wanted in zip(logits, labels, strict=True):\n"
           "        for i, label in enumerate(wanted[1:].tolist()):\n            if label != -100:\n"
           "                total = total + row[i].logsumexp(0) - row[i, label]\n    return total\n")),
    right("nearly everything different, with helpers and a loop without training_step",
          (PAD, "    found = torch.empty(len(rows), t, dtype=torch.long).fill_(value)\n    for target, row in zip(found, rows, strict=True):\n"
           "        target[: len(row)] = torch.as_tensor(row, dtype=torch.long)\n    return found\n"),
          (MASK, "pad_right([[1 for _ in row] for row in rows], 0)"),
          (FLAT + LOSS, '    return F.nll_loss(logits.log_softmax(-1).permute(0, 2, 1), labels, reduction="none").sum()\n'),
          ("def training_step(", "def labelled(step):\n    return sum(int(batch['labels'][:, 1:].ne(-100).sum()) for batch in step)\n\n\n"
           "def accumulate(model, step, n):\n    found = []\n    for batch in reversed(step):\n"
           "        out = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'].bool())\n"
           "        part = summed_loss(out.logits, batch['labels']).div(n)\n        part.backward()\n        found.append(float(part.detach()))\n"
           "    return math.fsum(found)\n\n\ndef training_step("),
          (BODY, "    model.zero_grad()\n    total = accumulate(model, micro_batches, labelled(micro_batches))\n"
           "    " + NORM + STEP + RETURN),
          (TRAIN, "    optimizer = torch.optim.AdamW([{'params': [p]} for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)\n"
           "    for module in model.modules():\n        module.training = True\n    losses, steps = [], iter(steps)\n"
           "    for step in range(n):\n        rate = learning_rate(step + 1, n, peak, warmup)\n"
           "        for group in optimizer.param_groups:\n            group['lr'] = rate\n        step = next(steps)\n"
           "        losses += [accumulate(model, step, labelled(step))]\n"
           "        " + NORM.replace("max_norm", "1.0") + "        optimizer.step()\n        optimizer.zero_grad()\n    return losses\n")),
    right("a mask of floats, and the mode restored", (MASK, MASK + ".float()"), (MODE, "    was = model.training\n" + MODE),
          ("    return losses\n", "    model.train(was)\n    return losses\n")),
    right("while, next and fsum", (TOTAL, "    found = []\n"), (ADD, "        found.append(loss.item())\n"),
          (RETURN, "    return math.fsum(found)\n"),
          (TRAIN, TRAINABLE + ADAMW + MODE + "    losses, it = [], iter(steps)\n    while len(losses) < n:\n"
           "        step, micro_batches = len(losses) + 1, next(it)\n" + RATE + APPEND + "    return losses\n")),
    right("logsumexp of the labelled rows",
          (SHIFT, "targets = labels[:, 1:].reshape(-1)\n    logits = logits[:, :-1].reshape(-1, logits.shape[-1])"),
          (FLAT + LOSS, "    keep = targets >= 0\n"
           "    return (logits[keep].logsumexp(1) - logits[keep, targets[keep]]).sum()\n")),
    right("Adam, filter and a break",
          (TRAIN, "    optimizer = torch.optim.Adam(filter(lambda p: p.requires_grad, model.parameters()), lr=peak)\n"
           "    model.train()\n    losses, step = [], 0\n    for micro_batches in steps:\n        step += 1\n        if step > n:\n            break\n"
           + RATE + APPEND + "    return losses\n")),
]  # fmt: skip
