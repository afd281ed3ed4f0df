"""The optimiser step: AdamW, the learning rate as a function of the step, precision, clipping."""

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from rlhf.infra import checkpoint
from rlhf.infra.adamw import AdamW


def make_optimizer(
    module: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> AdamW:
    """AdamW on what is trainable; matrices decay, gains and biases do not.

    torch has the kernel for CPU, CUDA and Apple's GPU, where nobody has run it yet.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not any(map(checkpoint.is_sharded, parameters)):
        keep_freed_memory()
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr, betas, eps)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt


def keep_freed_memory() -> None:
    """From now on the process keeps what it frees for itself, where the C library can be told so (glibc).

    Every step frees its gradients and activations and takes as much again. glibc hands large blocks back to the kernel,
    which must clear each page before it gives it out anew: up to a third of a step's CPU seconds.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """From now on what is freed of 1 MB and more is the system's again at once, where the C library can be told so.

    Under shards layers come and go all the time. Between the holes that they leave something small always lives, so a heap
    grows: to 4.1 GB where 2.4 are used.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)


def schedule(
    step: int,
    total: int,
    warmup: int,
    lr: float,
    kind: Literal["linear", "cosine", "constant"] = "linear",
) -> float:
    """Learning rate of optimiser step `step` in [0, total): linear warm-up, never zero, then down to zero at total."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    left = max(0.0, (total - step) / max(1, total - warmup))  # 1 after the warm-up, 0 at the end
    return lr * {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[kind]


def set_lr(optimizer: AdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision(NamedTuple):
    """What the loop needs to know of precision; in fp32 the first two do nothing."""

    autocast: Callable[[], contextlib.AbstractContextManager]  # `with autocast():` around every forward
    scaler: torch.amp.GradScaler  # `scaler.scale(loss).backward()`; its state_dict() is plain JSON
    dtype: torch.dtype = torch.float32  # of matrix products, and in which frozen weights are stored


def amp(device: torch.device, dtype: Literal["fp32", "bf16", "fp16"] = "fp32") -> Precision:
    """Mixed precision: trained weights and optimiser stay fp32, matrix products run in `dtype`; fp16 scales the loss.

    ValueError where the device has no such mode. A CPU has bf16, and where its products are slow it is right all the same.
    """
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    if dtype == "fp32":
        return Precision(contextlib.nullcontext, scaler)
    if dtype == "fp16" and device.type != "cuda":
        raise ValueError(f"fp16 needs a CUDA device and this run is on {device.type}; use fp32, or bf16")
    if dtype == "bf16" and device.type == "mps":
        raise ValueError("bf16 was never tried on Apple's GPU (mps), which this run is on; use fp32")
    if dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no bf16; use fp16 or fp32")
    return Precision(functools.partial(torch.autocast, device.type, dtype=DTYPES[dtype]), scaler, DTYPES[dtype])


def step(optimizer: AdamW, module: nn.Module, scaler: torch.amp.GradScaler, clip: float) -> float:
    """One optimiser step on the gradients in place; returns their global norm before it was clipped.

    `clip` is the largest norm that passes unchanged, 0 = any. A norm that is not finite says that no step was taken: weights
    and optimiser are as before. In fp16 the loss scale was lowered, so that the next step will do; without a loss scale the
    gradients stay, for whoever looks for the culprit.
    """
    scaler.unscale_(optimizer)
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters])
    norm = checkpoint.whole(norm)  # under shards it is a sum over the ranks
    finite = math.isfinite(norm)
    if not finite and not scaler.is_enabled():
        return float(norm)
    excess = torch.clamp((norm + 1e-6) / clip, min=1.0) if clip > 0 else torch.ones(())
    divisor = None
    if excess != 1 and divides(parameters, scaler):
        divisor = excess  # which spares a pass over memory
    elif excess != 1:
        torch._foreach_div_([p.grad for p in parameters], excess)
    if finite:
        scaler.step(optimizer, divisor=divisor)
    scaler.update()
    optimizer.zero_grad()
    return float(norm)


def divides(parameters: list[nn.Parameter], scaler: torch.amp.GradScaler) -> bool:
    """May the kernel divide them? Parts of a gradient have a type of their own, and nobody has seen Apple's GPU do it."""
    return not scaler.is_enabled() and all(type(p.grad) is torch.Tensor and not p.is_mps for p in parameters)
