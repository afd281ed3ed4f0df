"""Which precision a command computes in: the one that is named, that of the run it resumes, or the device's fastest.

`--precision=auto` is bf16 where that is fast: on CUDA where the GPU has it, on a CPU where it is among the flags (AMX,
AVX512-BF16) and a product takes clearly less time than in float32. Elsewhere, and for fp16, somebody has to ask.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from rlhf.infra import checkpoint, optim
from rlhf.infra.distributed import Dist
from rlhf.infra.files import read_json
from rlhf.infra.metrics import say
from rlhf.infra.run import has_lines

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
SamplingPrecision = Literal["auto", "fp32", "bf16", "fp16", "int8"]  # int8: of an export, see rlhf/lm/int8.py
NAMES = (None, "fp32", "bf16", "fp16")
FLAGS = ("amx_bf16", "avx512_bf16")  # of a CPU, as Linux names them
CAPABLE = ("AVX512", "AMX")  # what torch may use of them: ATEN_CPU_CAPABILITY=avx2 takes it away
FASTER = 1.5  # times a CPU's product in float32, or the casts around it eat up what bf16 gains
SHAPE = (256, 512, 1024)  # of that product: 3 ms in float32


def settled(cfg, dist: Dist):
    """`cfg` with the precision of its run in place of "auto": what run.json says of a run that has begun, or the device's.

    The same on every rank. ValueError where the run computes in bf16 of its own choice and this device would be slow at it.
    """
    if cfg.precision != "auto":
        return cfg
    slow = int(dist.max(torch.tensor(int(not has_fast_bf16(dist.device)))))  # on one rank at least
    stored = NAMES.index(stored_precision(cfg.out)) if dist.is_main else 0
    stored = NAMES[int(dist.max(torch.tensor(stored)))]
    if stored == "bf16" and slow:
        raise ValueError(
            f"the run in {cfg.out} computes in bf16, which {dist.device} has not, or is slow at: resume it on a device like "
            "its own, or all the same with --precision=bf16"
        )
    found = stored or ("fp32" if slow else "bf16")
    say(f"precision: {found}, {'as the run began' if stored else 'the fastest here'}", dist.is_main)
    return dataclasses.replace(cfg, precision=found)


def stored_dtype(cfg, precision: optim.Precision) -> torch.dtype:
    """In what a trainer stores what is frozen: as it is multiplied, but in float32 what --shard=true cuts up by its type."""
    return torch.float32 if cfg.shard else precision.dtype


def chosen(cfg, device: torch.device, quiet: bool = False) -> tuple:
    """`settled` for a command that trains nothing, and so has no run to keep to; also its dtype. int8 is the precision of an
    export's weights, and the rest is as with auto. ValueError where the device has it not.
    """
    if cfg.precision in ("auto", "int8"):
        found = "bf16" if has_fast_bf16(device) else "fp32"
        said = f"{found}, the fastest here" if cfg.precision == "auto" else f"int8 weights, all else in {found}"
        say(f"precision: {said}", not quiet)
        cfg = dataclasses.replace(cfg, precision=found)
    return cfg, optim.amp(device, cfg.precision).dtype


def stored_precision(out: str) -> str | None:
    """What the run in `out` computes in; None where nothing has begun there. `begin` sees to what is damaged."""
    newest = checkpoint.latest(out)
    if newest is None and not has_lines(out):
        return None
    for file, options in (
        (Path(out, "run.json"), lambda x: x),
        (Path(newest or out, "state.json"), lambda x: x["options"]),
    ):
        try:
            found = options(read_json(file)).get("precision", "fp32")  # older runs knew no other
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        return found if found in NAMES else None
    return None


def has_fast_bf16(device: torch.device) -> bool:
    """Does bf16 save time on this device?"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capable = torch.backends.cpu.get_cpu_capability() in CAPABLE
    return device.type == "cpu" and capable and bool(cpu_flags().intersection(FLAGS)) and times_as_fast() > FASTER


def cpu_flags() -> set[str]:
    """What Linux says that the CPU can do; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")), ()))


def times_as_fast() -> float:
    """A bf16 product against the same in float32 on one core."""
    rows, inputs, outputs = SHAPE
    wide = torch.ones(rows, inputs), torch.ones(outputs, inputs)
    half, threads = tuple(x.bfloat16() for x in wide), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sides = {name: partial(torch.nn.functional.linear, *x) for name, x in (("fp32", wide), ("bf16", half))}
        best = quickest(sides, rounds=30, enough=lambda best: best["fp32"] > 1.5 * FASTER * best["bf16"])
    finally:
        torch.set_num_threads(threads)
    return best["fp32"] / best["bf16"]


def quickest(
    sides: dict[str, Callable[[], object]],
    rounds: int = 10,
    enough: Callable[[dict[str, float]], bool] = lambda best: False,
) -> dict[str, float]:
    """Seconds of each side, the least of some rounds in turns, after one that builds kernels.

    Where one is far quicker a few rounds show it, and it is `enough`. On a busy machine all of a few may be disturbed.
    """
    best = dict.fromkeys(sides, math.inf)
    for i in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if i > 0:
                best[name] = min(best[name], time.perf_counter() - start)
        if i >= 3 and enough(best):
            break
    return best
