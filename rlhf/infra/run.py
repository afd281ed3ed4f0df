"""A run directory: the options it was started with, its checkpoints, and the seconds that it has used."""

import json
import os
import resource
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from rlhf.infra import checkpoint
from rlhf.infra.distributed import Dist
from rlhf.infra.files import read_json, strict, write_json


def process_age() -> float:
    """Seconds since this process began, the import of torch included; since now where the system does not tell."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - began
    except OSError:
        return 0.0


STARTED = time.perf_counter() - process_age()


def begin(out: str, options: dict, dist: Dist) -> None:
    """Start the run in `out`, or find that it was started with the same options.

    Raises ValueError if `out` holds a run with other options: going on would mix two experiments.
    """
    path = Path(out) / "run.json"
    # a command that failed before its first step must not hold the directory against the corrected one
    if dist.is_main and not (path.exists() and has_begun(out)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, options)
    dist.barrier()
    started_with = read_json(path)
    for name in sorted({*options, *started_with} - {"out"}):  # a run may be moved
        ours, theirs = options.get(name), started_with.get(name)
        if json.dumps(strict(ours)) != json.dumps(theirs):
            raise ValueError(
                f"{out} holds a run started with {name}={theirs}, this command says {name}={ours}: "
                "repeat its options to resume it, choose another --out, or delete the directory"
            )


def has_begun(out: str) -> bool:
    """Has a run left anything in `out` that other options would spoil?"""
    metrics = Path(out) / "metrics.jsonl"
    return checkpoint.latest(out) is not None or metrics.exists() and metrics.stat().st_size > 0


class Run:
    """A run directory and what trains in it: where it stands, and how it is saved.

    Opening it is `begin`, and loads the newest checkpoint, if there is one, into module, optimizer and scaler. `done` steps
    were behind it then; `state` is what `save` was told, {} in a new run. `config` and `files` go into every checkpoint.
    """

    def __init__(
        self,
        out: str,
        options: dict,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        dist: Dist,
        config: dict,
        files: list[str | Path],
        keep: int | None = 2,
    ):
        begin(out, options, dist)
        self.out, self.module, self.optimizer, self.scaler, self.dist = out, module, optimizer, scaler, dist
        self.config, self.files, self.keep = config, files, keep
        self.done, self.seconds_before, self.state = 0, 0.0, {}
        if newest := checkpoint.latest(out):
            saved = checkpoint.load(newest)
            checkpoint.load_weights(module, saved.tensors, newest)
            checkpoint.load_optimizer(optimizer, module, saved.optimizer)
            scaler.load_state_dict(saved.state["scaler"])
            self.state, self.done, self.seconds_before = saved.state, saved.state["done"], saved.state["seconds"]

    def steps(self, total: int, name: str) -> tqdm:
        """The steps that are left of `total`."""
        return steps(self.done, total, name, self.dist)

    @property
    def seconds(self) -> float:
        """Wall seconds that the run has used, in all its sessions."""
        return seconds_used(self.seconds_before)

    def save(self, done: int, **state) -> None:
        """Rank 0 writes the checkpoint after `done` steps and keeps the newest; everybody waits for it."""
        if self.dist.is_main:
            checkpoint.save_step(
                self.out,
                done,
                tensors=checkpoint.trained_state(self.module),
                config=self.config,
                state={"done": done, "seconds": self.seconds, **state, "scaler": self.scaler.state_dict()},
                optimizer=checkpoint.optimizer_tensors(self.optimizer, self.module),
                files=self.files,
                keep=self.keep,
            )
        self.dist.barrier()

    def save_best(self, state: dict) -> None:
        """Rank 0 writes the weights alone to out/best, in place of those before."""
        if self.dist.is_main:
            weights = checkpoint.trained_state(self.module)
            checkpoint.save(f"{self.out}/best", weights, self.config, state, files=self.files)


def steps(first: int, total: int, name: str, dist: Dist) -> tqdm:
    """The steps that are left, with a progress bar on rank 0 if somebody watches."""
    return tqdm(range(first, total), initial=first, total=total, desc=name, disable=None if dist.is_main else True)


def seconds_used(before: float = 0.0) -> float:
    """Wall seconds of this process since it began, on top of those of the sessions before."""
    return before + time.perf_counter() - STARTED


class Clock:
    """Wall seconds of the named steps of one iteration."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self.start = self.now = time.perf_counter()

    def lap(self, name: str) -> None:
        before, self.now = self.now, time.perf_counter()
        self.laps[name] = self.now - before

    def times(self, tokens: float, device: torch.device) -> dict[str, float]:
        """The laps, their total, `tokens` per second of it, and the peak memory of this process so far."""
        total = self.now - self.start
        return self.laps | {
            "time/total": total,
            "perf/tokens_per_s": tokens / total,
            "perf/peak_memory_gb": peak_memory_gb(device),
        }


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def resident_bytes() -> int:
    """Memory of this process now: the interpreter and the libraries, before a model is loaded."""
    import torch._dynamo  # noqa: F401  the optimiser would, at its first step: 75 MB

    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
