"""How an int8 export is multiplied: as int8, or as bfloat16 or float32 weights that are made of it once, what is faster here.

    int8 = stays_int8(opened.model, opened.spec, "auto", torch.bfloat16, (1, 32))
    model = to_compute_with(opened.model, int8, torch.bfloat16)

Which it is depends on the CPU and on how many rows decode together, so it is met when a command starts.
"""

import copy
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from model.half import to_sample_with
from model.quantize import SmallEmbedding, dequantize
from model.transformer import Transformer
from rlhf.infra.metrics import say
from rlhf.infra.precision import quickest

TIMED = 2**24  # numbers in the layers whose products are timed: as float32 they leave a core's caches
SHORT = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def stays_int8(
    model: Transformer, spec: str, precision: str, dtype: torch.dtype, rows: Sequence[int], quiet: bool = False
) -> bool:
    """Whether the model that `spec` named multiplies int8 weights, as --precision says; dtype: what `chosen` made of that.

    auto: an int8 export does where they are no slower than dtype's at so many rows, the ratios' geometric mean. ValueError
    for precision int8 of a model that is no int8 export.
    """
    if not is_int8(model):
        if precision == "int8":
            raise ValueError(
                f"--precision=int8: {spec} has no int8 weights; export some, python export.py --init={spec} "
                "--format=int8"
            )
        return False
    if model.embed_tokens.weight.device.type == "mps":
        if precision == "int8":
            raise ValueError("--precision=int8 was never tried on Apple's GPU (mps), which this command uses; use fp32")
        return False
    if precision != "auto":
        return precision == "int8"
    ratios = [speed(model, dtype, n) for n in rows]
    stays, name = math.prod(ratios) >= 1, SHORT[dtype]
    found = " and ".join(f"{ratio:.2f} times with {n}" for n, ratio in zip(rows, ratios))
    say(f"int8 weights {'stay int8' if stays else f'become {name}'}: of {name}'s speed {found} rows", not quiet)
    return stays


def is_int8(model: Transformer) -> bool:
    return isinstance(model.embed_tokens, SmallEmbedding)


def to_compute_with(model: Transformer, int8: bool, dtype: torch.dtype) -> Transformer:
    """The model to sample with: int8 weights as they are or as dtype's, all others as dtype's, see `to_sample_with`."""
    if is_int8(model):
        return model if int8 else to_sample_with(dequantize(model, dtype), dtype)
    return to_sample_with(model, dtype)


@torch.no_grad()
def speed(model: Transformer, dtype: torch.dtype, rows: int) -> float:
    """Of a step of `rows` tokens through some of its blocks, as int8, in that of the same blocks as `dtype`."""
    size = sum(x.numel() for x in model.layers[0].buffers())
    few, device = copy.copy(model), model.embed_tokens.weight.device
    nobody_reads = SmallEmbedding(model.embed_tokens.weight[:1].to(torch.bfloat16), None, model.embed_tokens.dtype)
    few._modules = dict(model._modules) | {"embed_tokens": nobody_reads, "lm_head": None}
    few.layers = nn.ModuleList(model.layers[: max(1, TIMED // size)])
    other, ids = copy.deepcopy(few), torch.zeros(rows, 1, dtype=torch.int64, device=device)
    models = {"int8": few, "other": to_sample_with(dequantize(other, dtype), dtype)}

    def step(model: Transformer) -> None:
        model.trunk(ids)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = quickest({name: partial(step, model) for name, model in models.items()})
    return seconds["other"] / seconds["int8"]
