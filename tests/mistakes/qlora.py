"""Mistakes in qlora.py, and correct files that are written differently."""

from . import mistake, right

LEVELS = "    levels = [-quantile(p) for p in p_negative] + [0.0] + [quantile(p) for p in p_positive[::-1]]\n"
NORMAL = "return torch.tensor(levels, dtype=torch.float32) / quantile(p_positive[0])  # (1)"
POSITIVE = (
    "p_positive = torch.linspace(p_max, 0.5, 9, dtype=torch.float32)[:-1].tolist()  # without 0.5"
)
NEGATIVE = "p_negative = torch.linspace(p_max, 0.5, 8, dtype=torch.float32)[:-1].tolist()"
SIZES = "        sizes = [t.nbytes for t in vars(self).values() if isinstance(t, Tensor)]\n"
BITS = "        return 8 * sum(sizes) / math.prod(self.shape)\n"
ABSMAX = "absmax = chunk.float().abs().amax(dim=1)  # (blocks of this chunk,)"
SCALED = "x = chunk * (1 / absmax.clamp(min=1e-38))[:, None]  # the clamp avoids 1 / 0"
COUNT = """        code, above = torch.zeros_like(x), torch.empty_like(x)  # as floats: that is faster
        for midpoint in NF4_MIDPOINTS:  # (2): count the midpoints below x; faster than bucketize
            code += torch.gt(x, midpoint, out=above)
"""
PACK = "packed.append((code[:, 0::2] * 16 + code[:, 1::2]).to(torch.uint8).view(-1))"
OFFSET = "    offset = absmax.mean()\n"
IN_BLOCKS = "    blocks = in_blocks(absmax - offset, 256)\n"
SECOND = "    scale_scales = blocks.abs().amax(dim=1)\n"
NEAREST = "    nearest = torch.bucketize(blocks / scale_scales.clamp(min=1e-38)[:, None], midpoints)  # (3)\n"
TRIMMED = "return nearest.to(torch.uint8).view(-1)[: len(absmax)].clone(), scale_scales, offset"
MAPPED = "blocks = in_blocks(table[q.scales.int()], 256) * q.scale_scales[:, None]"
ADDED = "absmax = blocks.view(-1)[: len(q.scales)] + q.offset  # (3)"
LOOKED_UP = "        levels = pairs.index_select(0, codes.reshape(-1).int()).view(torch.float32)\n"
PRODUCT = "        torch.mul(levels.view(-1, q.blocksize), scales[:, None], out=part)  # (2)\n"
OUT = "    return out.view(-1)[: math.prod(q.shape)].view(q.shape)\n"
DEQUANTIZE = (
    """    pairs, size = PAIRS.to(q.codes.device), chunk_size(q.codes.device, q.blocksize)
    out = absmax.new_empty((len(absmax), q.blocksize), dtype=dtype or q.dtype)
    chunks = in_blocks(q.codes, q.blocksize // 2).split(size), absmax.split(size), out.split(size)
    for codes, scales, part in zip(*chunks, strict=True):
"""
    + LOOKED_UP
    + PRODUCT
    + OUT
)
GRAD_X = (
    "grad_x = grad @ dequantize_nf4(ctx.q, grad.dtype) if for_x else None  # (…, out) @ (out, in)"
)
GRAD_BIAS = "grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if for_bias else None  # (out,)"
LAYER = """        inputs = x.to(self.compute_dtype or x.dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
"""
APPLY = "return _Linear4bitFunction.apply(inputs, bias, self.quantized).to(x.dtype)"
DROPOUT = "        x = self.lora_dropout(x.to(self.lora_A.weight.dtype))  # (…, in)\n"
FORWARD = "return y + self.lora_B(self.scaling * self.lora_A(x)).to(y.dtype)  # (4)"
MERGED = "return self.base_layer.dequantize(torch.float32) + self.delta()"

SIMPLE = """    codes = torch.stack((q.codes >> 4, q.codes & 15), 1).view(-1).int()
    n = math.prod(q.shape)
    levels = NF4_CODEBOOK[codes][:n]
    w = levels * absmax.repeat_interleave(q.blocksize)[:n]
    return w.to(dtype or q.dtype).view(q.shape)
"""

VARIANTS = [
    mistake("8 negative and 8 positive levels, no zero", "levels", "0 is none of",
            (NEGATIVE, "p_negative = torch.linspace(p_max, 0.5, 9)[:-1].tolist()"),
            (LEVELS, "    levels = [-quantile(p) for p in p_negative] + [quantile(p) for p in p_positive[::-1]]\n")),
    mistake("8 negative and 7 positive levels", "levels", "other way round",
            (POSITIVE, "p_positive = torch.linspace(p_max, 0.5, 8)[:-1].tolist()"),
            (NEGATIVE, "p_negative = torch.linspace(p_max, 0.5, 9)[:-1].tolist()")),
    mistake("levels not normalised", "levels", "not divided by it",
            (NORMAL, "return torch.tensor(levels, dtype=torch.float32)")),
    mistake("levels in the order of p", "levels", "ascending",
            (LEVELS, "    levels = [-quantile(p) for p in p_negative] + [0.0] + [quantile(p) for p in p_positive]\n")),
    mistake("evenly spaced levels", "levels", "0 is none of", (NORMAL, "return torch.linspace(-1, 1, 16)")),
    mistake("0 is a level twice", "levels", "twice",
            (POSITIVE, "p_positive = torch.linspace(p_max, 0.5, 8).tolist()")),
    mistake("the table instead of the levels", "levels", "returns the table", (NORMAL, "return NF4_CODEBOOK"),
            ("NF4_CODEBOOK = nf4_levels()\n", "NF4_CODEBOOK = torch.linspace(-1, 1, 16)\n")),
    mistake("bytes per weight", "bits", "8 bits", (BITS, "        return sum(sizes) / math.prod(self.shape)\n")),
    mistake("bits without the scales", "bits", "codes alone", (SIZES, "        sizes = [self.codes.nbytes]\n")),
    mistake("uint8 scales counted as 32 bits", "bits", "a uint8 scale has 8 bits",
            (SIZES, SIZES + "        if self.offset is not None:\n            sizes.append(3 * len(self.scales))\n")),
    mistake("signed absmax", "quantize", "largest entry",
            (ABSMAX, "absmax = chunk.float().amax(dim=1)")),
    mistake("absmax with its sign", "quantize", "sign of the entry",
            (ABSMAX, "flat = chunk.float()\n        absmax = flat.gather(1, flat.abs().argmax(1, keepdim=True))[:, 0]"),
            (SCALED, "x = chunk / absmax[:, None]")),
    mistake("one scale for the tensor", "quantize", "whole tensor",
            (ABSMAX, "absmax = chunk.float().abs().max().expand(len(chunk))")),
    mistake("the level below", "quantize", "level below",
            ("    for midpoint in NF4_MIDPOINTS:", "    for midpoint in NF4_CODEBOOK[1:].tolist():"),
            ("torch.gt(x, midpoint, out=above)", "x >= midpoint")),
    mistake("the level above", "quantize", "level above",
            ("    for midpoint in NF4_MIDPOINTS:", "    for midpoint in NF4_CODEBOOK[:-1].tolist():")),
    mistake("x is not divided", "quantize", "not divided by absmax", (SCALED, "x = chunk.float()")),
    mistake("a block of zeros is 0 / 0", "quantize", "0 / 0", (SCALED, "x = chunk / absmax[:, None]")),
    mistake("x in bfloat16", "quantize", "bfloat16",
            (SCALED, "x = (chunk / absmax.to(chunk.dtype).clamp(min=1e-38)[:, None]).float()")),
    mistake("16 even steps", "quantize", "evenly spaced",
            (COUNT, "        code = ((x + 1) * 7.5).round()\n")),
    mistake("mean instead of the maximum", "quantize", "mean of |w|",
            (ABSMAX, "absmax = chunk.float().abs().mean(dim=1)")),
    mistake("the sign is lost", "quantize", "sign of w",
            (COUNT, "        code = torch.bucketize(x.abs(), torch.tensor(NF4_MIDPOINTS))\n")),
    mistake("absmax in the dtype of w", "quantize", "torch.bfloat16", (ABSMAX, "absmax = chunk.abs().amax(dim=1)")),
    mistake("codes from 1 to 16", "quantize", "too large by 1",
            (COUNT, COUNT + "        code = (code + 1).clamp(max=15)\n")),
    mistake("nibbles swapped", "pack", "swapped",
            (PACK, "packed.append((code[:, 1::2] * 16 + code[:, 0::2]).to(torch.uint8).view(-1))")),
    mistake("halves of a block share a byte", "pack", "halves",
            (PACK, "half = code.shape[1] // 2\n        packed.append((code[:, :half] * 16 + code[:, half:]).to(torch.uint8).view(-1))")),
    mistake("one code per byte", "pack", "one code", (PACK, "packed.append(code.to(torch.uint8).view(-1))")),
    mistake("bytes not uint8", "pack", "uint8",
            (PACK, "packed.append((code[:, 0::2] * 16 + code[:, 1::2]).long().view(-1))")),
    mistake("times 15", "pack", "not by 15",
            (PACK, "packed.append((code[:, 0::2] * 15 + code[:, 1::2]).to(torch.uint8).view(-1))")),
    mistake("only the last chunk", "pack", "bytes, expected",
            (PACK, "packed = [(code[:, 0::2] * 16 + code[:, 1::2]).to(torch.uint8).view(-1)]")),
    mistake("scales without the offset", "quantize_scales", "offset is not subtracted",
            (IN_BLOCKS, "    blocks = in_blocks(absmax, 256)\n")),
    mistake("scales in blocks of 64", "quantize_scales", "per 256",
            (IN_BLOCKS, "    blocks = in_blocks(absmax - offset, 64)\n")),
    mistake("padding before the offset", "quantize_scales", "padding",
            (IN_BLOCKS, "    blocks = in_blocks(absmax, 256) - offset\n")),
    mistake("padding of the codes kept", "quantize_scales", "padding",
            (TRIMMED, "return nearest.to(torch.uint8).view(-1), scale_scales, offset")),
    mistake("scale codes evenly spaced", "quantize_scales", "evenly spaced",
            (NEAREST, "    nearest = ((blocks / scale_scales.clamp(min=1e-38)[:, None] + 1) * 127.5).round()\n")),
    mistake("scale code below", "quantize_scales", "value below",
            (NEAREST, "    nearest = torch.bucketize(blocks / scale_scales.clamp(min=1e-38)[:, None], DYNAMIC_MAP, right=True) - 1\n")),
    mistake("signed absmax₂", "quantize_scales", "largest |scale - offset|",
            (SECOND, "    scale_scales = blocks.amax(dim=1)\n")),
    mistake("the smallest scale as offset", "quantize_scales", "smallest", (OFFSET, "    offset = absmax.min()\n")),
    mistake("one absmax₂ for all", "quantize_scales", "all blocks",
            (SECOND, "    scale_scales = blocks.abs().amax().expand(len(blocks))\n")),
    mistake("not divided by absmax₂", "quantize_scales", "not divided",
            (NEAREST, "    nearest = torch.bucketize(blocks, midpoints)\n")),
    mistake("offset forgotten", "dequantize_scales", "not added",
            (ADDED, "absmax = blocks.view(-1)[: len(q.scales)]")),
    mistake("offset added twice", "dequantize_scales", "twice",
            (ADDED, "absmax = blocks.view(-1)[: len(q.scales)] + 2 * q.offset")),
    mistake("uint8 as an index", "dequantize_scales", "mask",
            (MAPPED, "blocks = in_blocks(table[q.scales], 256) * q.scale_scales[:, None]")),
    mistake("scale codes without the map", "dequantize_scales", "the code itself",
            (MAPPED, "blocks = in_blocks(q.scales.float(), 256) * q.scale_scales[:, None]")),
    mistake("absmax₂ forgotten", "dequantize_scales", "not multiplied by absmax₂",
            (MAPPED, "blocks = in_blocks(table[q.scales.int()], 256)")),
    mistake("absmax₂ multiplies the offset", "dequantize_scales", "also multiplies",
            (MAPPED, "blocks = in_blocks(table[q.scales.int()] + q.offset, 256) * q.scale_scales[:, None]"),
            (ADDED, "absmax = blocks.view(-1)[: len(q.scales)]")),
    mistake("nibbles swapped in dequantize", "dequantize", "swapped",
            (DEQUANTIZE, SIMPLE.replace("(q.codes >> 4, q.codes & 15)", "(q.codes & 15, q.codes >> 4)"))),
    mistake("nibbles one after the other", "dequantize", "alternate",
            (DEQUANTIZE, SIMPLE.replace("torch.stack((q.codes >> 4, q.codes & 15), 1).view(-1)",
                                        "torch.cat((q.codes >> 4, q.codes & 15))"))),
    mistake("padding of the weights kept", "dequantize", "the shape",
            (OUT, "    return out.view(-1)\n")),
    mistake("dtype not restored", "dequantize", "torch.bfloat16",
            (DEQUANTIZE, SIMPLE.replace(".to(dtype or q.dtype)", ""))),
    mistake("only the argument's dtype", "dequantize", "torch.bfloat16",
            ("dtype=dtype or q.dtype)", "dtype=dtype or torch.float32)")),
    mistake("computed in bfloat16", "dequantize", "convert last",
            (PRODUCT, "        part.copy_(levels.view(-1, q.blocksize).to(part.dtype) * scales[:, None].to(part.dtype))\n")),
    mistake("levels without absmax", "dequantize", "not multiplied by absmax",
            (PRODUCT, "        part.copy_(levels.view(-1, q.blocksize))\n")),
    mistake("backward with Wᵀ", "backward", "transposed",
            (GRAD_X, "grad_x = grad @ dequantize_nf4(ctx.q, grad.dtype).T if for_x else None")),
    mistake("bias gradient is the mean", "backward", "mean",
            (GRAD_BIAS, "grad_bias = grad.reshape(-1, grad.shape[-1]).mean(0) if for_bias else None")),
    mistake("bias gradient is one number", "backward", "has the shape",
            (GRAD_BIAS, "grad_bias = grad.sum() if for_bias else None")),
    mistake("bias gradient without a bias", "backward", "must be None",
            (GRAD_BIAS, "grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)")),
    mistake("bias gradient only with one of x", "backward", "only the bias",
            (GRAD_BIAS, "grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if for_x and for_bias else None")),
    mistake("no gradient of x", "backward", "x gets no gradient", (GRAD_X, "grad_x = None")),
    mistake("backward in the dtype of W", "backward", "dtype of grad",
            (GRAD_X, "grad_x = grad @ dequantize_nf4(ctx.q).to(grad.dtype) if for_x else None")),
    mistake("W kept for the backward pass", "linear4bit", "kept for the backward pass",
            (APPLY, "return F.linear(inputs, self.dequantize(inputs.dtype), bias).to(x.dtype)")),
    mistake("bias lost", "linear4bit", "bias is missing",
            (LAYER, "        inputs = x.to(self.compute_dtype or x.dtype)\n        bias = None\n")),
    mistake("compute_dtype ignored", "linear4bit", "compute_dtype is ignored",
            ("inputs = x.to(self.compute_dtype or x.dtype)", "inputs = x")),
    mistake("output in compute_dtype", "linear4bit", "dtype",
            (APPLY, "return _Linear4bitFunction.apply(inputs, bias, self.quantized)")),
    mistake("x detached", "linear4bit", "no gradient",
            ("inputs = x.to(self.compute_dtype or x.dtype)", "inputs = x.detach().to(self.compute_dtype or x.dtype)")),
    mistake("LoRA scaling missing", "forward", "scaling s missing",
            (FORWARD, "return y + self.lora_B(self.lora_A(x)).to(y.dtype)")),
    mistake("LoRA scaling twice", "forward", "twice",
            (FORWARD, "return y + self.scaling * self.lora_B(self.scaling * self.lora_A(x)).to(y.dtype)")),
    mistake("no dropout", "forward", "no effect", (DROPOUT, "        x = x.to(self.lora_A.weight.dtype)\n")),
    mistake("dropout on the base path", "forward", "with B = 0 and dropout",
            ("        y = self.base_layer(x)  # (…, out)\n" + DROPOUT,
             "        x = self.lora_dropout(x.to(self.lora_A.weight.dtype))\n        y = self.base_layer(x)\n")),
    mistake("output in float32", "forward", "bfloat16",
            (FORWARD, "return y + self.lora_B(self.scaling * self.lora_A(x))")),
    mistake("merged is quantized again", "merged", "quantized again",
            (MERGED, "w = self.base_layer.dequantize(torch.float32) + self.delta()\n"
             "        return dequantize_nf4(quantize_nf4(w, self.base_layer.blocksize, False))")),
    mistake("merged in the layer's dtype", "merged", "dtype of the layer",
            (MERGED, "return self.base_layer.weight + self.delta()")),
    mistake("merged without the update", "merged", "without the update",
            (MERGED, "return self.base_layer.dequantize(torch.float32)")),
    mistake("merged in bfloat16", "merged", "dtype",
            (MERGED, "return (self.base_layer.dequantize(torch.float32) + self.delta()).to(self.base_layer.dtype)")),
    mistake("mirrored negative levels", "levels", "mirrored positive ones",
            (NEGATIVE, "p_negative = p_positive[:7]")),
    mistake("small blocks are taken for zeros", "quantizing loses 9.2% of normal weights", "of size 1e-09",
            (SCALED, "x = chunk.float() / absmax.clamp(min=1e-8)[:, None]")),
    mistake("small absmax₂ are taken for zeros", "quantizing loses 9.2% of normal weights", "of size 1e-09",
            (NEAREST, NEAREST.replace("1e-38", "1e-8"))),
    mistake("W is kept in ctx", "W is not kept for the backward pass", "kept for the backward pass",
            ("        return F.linear(x, dequantize_nf4(q, x.dtype), bias)",
             "        ctx.w = dequantize_nf4(q, x.dtype)\n        return F.linear(x, ctx.w, bias)")),
    mistake("merged is quantized again in blocks of 64", "merged", "quantized again, in blocks of 64",
            ("return self.base_layer.dequantize(torch.float32) + self.delta()",
             "return dequantize_nf4(quantize_nf4(self.base_layer.dequantize(torch.float32) + self.delta()))")),
    right("simple, with argmin",
          (COUNT, "        code = (x[..., None] - NF4_CODEBOOK).abs().argmin(-1)\n"),
          (PACK, "packed.append((code[:, 0::2] << 4 | code[:, 1::2]).byte().flatten())"),
          (SCALED, "x = chunk.float() / absmax.where(absmax > 0, torch.ones(()))[:, None]"),
          (DEQUANTIZE, SIMPLE)),
    right("bucketize, and absmax of the two ends",
          (ABSMAX, "chunk = chunk.float()\n        absmax = torch.maximum(chunk.amax(1), -chunk.amin(1))"),
          (COUNT, "        code = torch.bucketize(x, torch.tensor(NF4_MIDPOINTS)).byte()\n"),
          (SCALED, "x = chunk / (absmax[:, None] + 1e-12)")),
    right("levels with erfinv in float64",
          (POSITIVE, "p = torch.linspace(p_max, 0.5, 9, dtype=torch.float64)[:-1].flip(0)"),
          (NEGATIVE, "n = torch.linspace(p_max, 0.5, 8, dtype=torch.float64)[:-1]"),
          (LEVELS, "    levels = torch.cat((-torch.erfinv(2 * n - 1), torch.zeros(1), torch.erfinv(2 * p - 1)))\n"),
          (NORMAL, "return (levels / levels.max()).float()")),
    right("scales: argmin, repeat_interleave",
          (NEAREST, "    nearest = (blocks[..., None] / scale_scales.clamp(min=1e-20)[:, None, None] - DYNAMIC_MAP).abs().argmin(-1)\n"),
          (MAPPED, "blocks = table[q.scales.long()] * q.scale_scales.repeat_interleave(256)[: len(q.scales)]"),
          (ADDED, "absmax = torch.add(blocks, q.offset)")),
    right("many at once, with parameters and einsum",
          (SIZES + BITS, "        bits = 4 * 2 * len(self.codes)\n        bits += self.scales.element_size() * 8 * len(self.scales)\n"
           "        if self.offset is not None:\n            bits += 32 * len(self.scale_scales) + 32\n"
           "        return bits / self.shape.numel()\n"),
          (DEQUANTIZE, SIMPLE),
          (GRAD_X, 'grad_x = torch.einsum("...o,oi->...i", grad, dequantize_nf4(ctx.q, dtype=grad.dtype))'),
          (GRAD_BIAS, "grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None"),
          ("        self.lora_A = nn.Linear(self.in_features, self.r, bias=False).to(device)\n"
           "        self.lora_B = nn.Linear(self.r, self.out_features, bias=False).to(device)\n"
           "        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))\n"
           "        nn.init.zeros_(self.lora_B.weight)\n",
           "        self.lora_A = nn.Parameter(torch.randn(self.in_features, self.r, device=device) / 10)\n"
           "        self.lora_B = nn.Parameter(torch.zeros(self.r, self.out_features, device=device))\n"),
          (DROPOUT, "        x = self.lora_dropout(x.to(self.lora_A.dtype))\n"),
          (FORWARD, "return y + self.scaling * (x @ self.lora_A @ self.lora_B).to(y.dtype)"),
          ("return self.scaling * (self.lora_B.weight @ self.lora_A.weight)  # (out, r) @ (r, in)",
           "return self.scaling * (self.lora_A @ self.lora_B).T"),
          (MERGED, "return torch.add(self.delta(), self.base_layer.dequantize(torch.float32))")),
    right("NaN replaced, searchsorted in float64",
          (SCALED, "x = (chunk.double() / absmax[:, None]).nan_to_num(0)"),
          (COUNT, "        middle = (NF4_CODEBOOK[1:] + NF4_CODEBOOK[:-1]).double() / 2\n"
           "        code = torch.searchsorted(middle, x.contiguous(), right=True)\n")),
    right("loops in Python",
          (ABSMAX, "absmax = torch.tensor([block.abs().max().item() for block in chunk])"),
          (DEQUANTIZE, """    codes = [code for byte in q.codes.tolist() for code in (byte >> 4, byte & 15)]
    out = []
    for i, scale in enumerate(absmax):
        part = codes[i * q.blocksize : (i + 1) * q.blocksize]
        out.append(NF4_CODEBOOK[torch.tensor(part)] * scale)
    return torch.cat(out)[: math.prod(q.shape)].reshape(q.shape).to(dtype or q.dtype)
""")),
    right("scales split in parts, and addmm",
          (OFFSET + IN_BLOCKS + SECOND,
           "    offset = absmax.sum() / len(absmax)\n    parts = (absmax - offset).split(256)\n"
           "    scale_scales = torch.stack([part.abs().max() for part in parts])\n"
           "    blocks = in_blocks(absmax - offset, 256)\n"),
          (FORWARD, "return y + F.linear(x, self.delta()).to(y.dtype)"),
          (GRAD_BIAS, "grad_bias = grad.sum(tuple(range(grad.dim() - 1))) if for_bias else None"),
          (MERGED, "w = self.base_layer.dequantize(torch.float32)\n"
           "        return torch.addmm(w, self.lora_B.weight, self.lora_A.weight, alpha=self.scaling)")),
]  # fmt: skip
