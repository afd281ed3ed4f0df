"""A run directory: the options it was started with, its checkpoints, and the seconds that it has used."""

import contextlib
import fcntl
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from rlhf.infra import checkpoint
from rlhf.infra.adamw import AdamW
from rlhf.infra.distributed import Dist
from rlhf.infra.files import strict, write_json
from rlhf.infra.metrics import read_rows, say
from rlhf.infra.screen import printable
from rlhf.infra.signals import Stop, name_of


def process_age() -> float:
    """Seconds since this process began, the import of torch included; since now where the system does not tell."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - began
    except OSError:
        return 0.0


STARTED = time.perf_counter() - process_age()


# the options of a run

REPORT = (
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "eval_every",
    "micro_batch",
    "micro_batch_tokens",
    "recompute",
    "offload",
    "weak_reward",
    "shard",
    "replicas",
    "sampler",
    "sampler_dir",
    "sampler_push",
    "sampler_timeout",
)
FREE = (*REPORT, "out", "plan", "override")  # change no number of a run; a run may be moved


def begin(out: str, options: dict, dist: Dist, defaults: dict | None = None) -> dict[str, list]:
    """Start the run in `out`, or find that it was started with the same options; -> those that changed, {name: [old, new]},
    which options["override"] has to name.

    Rank 0 holds the directory for this process, sets damaged checkpoints aside, and says so. A path may change where what
    lies there has the same sha256 ("init" and "init_sha256"). An option that did not exist then was at its default, see
    config.defaults. ValueError if another process holds `out`, or if it holds a run with other options: going on would mix
    two experiments.
    """
    path, override = Path(out) / "run.json", options.get("override") or ()
    if dist.is_main:
        Path(out).mkdir(parents=True, exist_ok=True)
        hold(out)
        remove_halves(out)
        newest, damaged = checkpoint.newest_intact(out)
        for line in damaged:
            say(line)
        if damaged:
            say(f"going on from {newest}" if newest else f"no checkpoint of {out} is whole: it starts again, at step 0")
        if newest is None and not has_lines(out):
            write_json(path, options)  # a command that failed before its first step must not hold the directory
    dist.barrier()
    started_with, repaired = options_of(out, options, defaults or {})
    say(repaired, dist.is_main and bool(repaired))
    changed = differences(started_with, options)
    refused = {name: pair for name, pair in changed.items() if name.removesuffix("_sha256") not in override}
    if refused:
        theirs, ours = (", ".join(f"{name}={pair[i]}" for name, pair in refused.items()) for i in (0, 1))
        names = ",".join(dict.fromkeys(name.removesuffix("_sha256") for name in refused))
        raise ValueError(
            f"{out} holds a run started with {theirs}; this command says {ours}: repeat its options to resume it, accept the "
            f"change with --override={names}, choose another --out, or delete the directory"
        )
    dist.barrier()  # before rank 0 writes what the others compare with
    if dist.is_main:
        newest = checkpoint.latest(out)
        record = {"step": checkpoint.step_number(newest) if newest else 0, "changed": changed}
        overrides = started_with.get("overrides", []) + [record] * bool(changed)
        write_json(path, options | ({"overrides": overrides} if overrides else {}))
    return changed


def options_of(out: str, options: dict, defaults: dict) -> tuple[dict, str]:
    """What the run in `out` was started with: run.json, which must agree with the newest checkpoint, or that alone, which
    is then told in the second value.
    """
    path, newest = Path(out) / "run.json", checkpoint.latest(out)
    stored = checkpoint.load(newest).state.get("options") if newest else None
    stored = None if stored is None else defaults | stored
    try:
        started_with = checkpoint.read_json(path)
        if not isinstance(started_with, dict):
            raise ValueError(f"{path} holds no options")
        started_with = defaults | started_with
    except (FileNotFoundError, ValueError) as error:
        if newest is None:
            return options, ""  # nothing is left of it
        if stored is None:
            raise ValueError(
                f"{error}, and {newest} does not say its options: put it back, or choose another --out"
            ) from None
        gone = "is gone" if isinstance(error, FileNotFoundError) else "is damaged"
        return stored, f"{path} {gone}: the options that {newest.name} was made with are taken"
    replayed = dict(stored or started_with)
    for record in started_with.get("overrides", []):
        replayed |= {name: pair[1] for name, pair in record["changed"].items()}
    if strange := differences(replayed, started_with):
        name, (theirs, ours) = next(iter(strange.items()))
        says = printable(f"{name}={ours}, {newest.name} was made with {name}={theirs}")  # a damaged one says anything
        raise ValueError(f"{path} says {says}: put the old run.json back")
    return started_with, ""


def differences(theirs: dict, ours: dict) -> dict[str, list]:
    """{name: [theirs, ours]} of the options that differ and matter."""
    found = {}
    for name in sorted({*theirs, *ours} - {*FREE, "overrides"}):
        pair = [theirs.get(name), ours.get(name)]
        if json.dumps(strict(pair[0])) != json.dumps(strict(pair[1])) and not moved(name, pair, theirs, ours):
            found[name] = pair
    return found


def moved(name: str, pair: list, theirs: dict, ours: dict) -> bool:
    """Are these two paths of what is byte for byte the same, and of the same function where it is a file of Python?"""
    digests = [side.get(f"{name}_sha256") for side in (theirs, ours)]
    function = [str(path).rpartition(".py:")[2] if ".py:" in str(path) else "" for path in pair]
    return digests[0] is not None and digests[0] == digests[1] and function[0] == function[1]


HELD = []  # the directories that this process holds, until it ends


def hold(out: str | Path, inherit: bool = False) -> None:
    """Be the only run in this directory until the process ends, with the commands that it starts where they `inherit` it.

    The kernel lets go when the last of them ends, however it ends. ValueError where somebody else holds it.
    """
    place = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(place, inherit)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(place)
        raise ValueError(f"{out} is held: a run in it, or a command that it started, is still running") from None
    except OSError as error:  # a network file system without locks
        say(f"{out} cannot be locked ({error.strerror}): see to it that no second run writes there")
    HELD.append(place)


def remove_halves(out: str | Path) -> None:
    """What was killed while it wrote: half files and checkpoints, and the old one where the new one is whole."""
    checkpoint.remove([*Path(out).glob(".*.tmp-*"), *Path(out, "bad").glob(".*.tmp-*")])
    for old in [*Path(out).glob(".*.old-*"), *Path(out, "bad").glob(".*.old-*")]:
        if checkpoint.is_complete(old.with_name(old.name[1:].rpartition(".old-")[0])):
            checkpoint.remove([old])


def has_lines(out: str | Path) -> bool:
    """Has a run without a checkpoint left lines that other options would spoil?"""
    metrics = Path(out) / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


# the run itself

LINES = {"lines": "metrics.jsonl", "sample_lines": "samples.jsonl"}  # what a checkpoint's state counts


class Run:
    """A run directory and what trains in it: where it stands, and how it is saved.

    Opening it is `begin`, and loads the newest checkpoint, if there is one, into module, optimizer and scaler. `done` steps
    were behind it then; `state` is what `save` was told, {} in a new run. `config` and `files` go into every checkpoint.
    `changed` is what `override` let change since.
    """

    def __init__(
        self,
        out: str,
        options: dict,
        module: nn.Module,
        optimizer: AdamW,
        scaler: torch.amp.GradScaler,
        dist: Dist,
        config: dict,
        files: list[str | Path],
        keep: int | None = 2,
        defaults: dict | None = None,
    ):
        if dist.mesh and scaler.is_enabled():
            raise ValueError(
                "--precision=fp16 with --shard=true: every rank would find a loss scale of its own; use bf16"
            )
        self.changed = begin(out, options, dist, defaults)
        self.out, self.module, self.optimizer, self.scaler, self.dist = out, module, optimizer, scaler, dist
        self.config, self.files, self.keep = config, files, keep
        self.options = {name: value for name, value in options.items() if name not in FREE}
        self.done, self.seconds_before, self.state = 0, 0.0, {}
        self.stop, self.wanted, self.scheduled = Stop(), 0, True
        self.awake: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # around what a save reads
        self.extra: Path | None = None  # a checkpoint that the schedule does not know: it goes when the next is written
        if newest := checkpoint.latest(out):
            saved = checkpoint.load(newest)
            checkpoint.load_weights(module, saved.one_by_one("model.safetensors"), newest)
            checkpoint.load_optimizer(optimizer, module, saved.one_by_one("optimizer.safetensors"))
            try:
                scaler.load_state_dict(saved.state["scaler"])
                self.state, self.done, self.seconds_before = (
                    saved.state,
                    saved.state["done"],
                    float(saved.state["seconds"]),
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{newest}/state.json is damaged ({error!r}); delete {newest.name}") from None
            self.extra = newest if saved.state.get("off_schedule") else None
            self.miss_lines()
            if dist.is_main:
                checkpoint.prune(out, keep)  # a kill between a save and this leaves one too many

    def miss_lines(self) -> None:
        """Say where metrics.jsonl or samples.jsonl have lost lines since the checkpoint was written, or got more."""
        for key, file in LINES.items() if self.dist.is_main else ():
            wrote, found = self.state.get(key), self.lines(file, self.done)
            if wrote is not None and found < wrote:
                say(f"{self.out}/{file} has lost {wrote - found} of {wrote} lines: curves and report lack them")
            elif wrote is not None and found > wrote:
                say(f"{self.out}/{file} is damaged: {found} lines of the steps so far, {wrote} were written")

    def lines(self, file: str, done: int) -> int:
        """How many lines metrics.jsonl or samples.jsonl has of the first `done` steps."""
        return sum(row["step"] < done for row in read_rows(f"{self.out}/{file}"))

    def steps(self, total: int, name: str) -> Iterator[int]:
        """The steps that are left of `total`. After a signal no further one: the run ends with 128 + its number."""
        with self.stop:
            for step in steps(self.done, total, name, self.dist):
                yield step
                self.leave_if_wanted(step + 1)

    def leave_if_wanted(self, done: int) -> None:
        """End the process with 128 + the number of the signal that came before the checkpoint after `done` steps."""
        if self.wanted:
            stopped = f"stopped by {name_of(self.wanted)} after step {done}"
            say(f"{stopped}: the same command goes on from there", self.dist.is_main)
            self.dist.close(128 + self.wanted)

    def due(self, done: int, every: int, total: int) -> bool:
        """Is it time for a checkpoint after `done` steps: by the schedule, at the end, or since a signal came to some rank?

        Every rank has to ask after every step, and all get the same answer.
        """
        self.wanted = int(self.dist.max(torch.tensor(self.stop.number)))
        self.scheduled = done % every == 0 or done == total
        return self.scheduled or self.wanted > 0

    @property
    def seconds(self) -> float:
        """Wall seconds that the run has used, in all its sessions."""
        return seconds_used(self.seconds_before)

    def save(self, done: int, **state) -> None:
        """Rank 0 writes the checkpoint after `done` steps, with shards every rank its part, and the newest are kept;
        everybody waits for it.
        """
        together = self.dist.together
        if self.dist.is_main or together:
            with self.awake():
                path = checkpoint.save_step(
                    self.out,
                    done,
                    tensors=checkpoint.trained_state(self.module),
                    config=self.config,
                    state=self.remembered(done, state) if self.dist.is_main else None,
                    optimizer=checkpoint.optimizer_tensors(self.optimizer, self.module),
                    files=self.files,
                    keep=None,
                    together=together,
                )
            if self.dist.is_main:
                checkpoint.prune(self.out, self.keep, [self.extra] if self.extra and self.extra != path else [])
            self.extra, self.scheduled = None if self.scheduled else path, True
        self.dist.barrier()

    def remembered(self, done: int, state: dict) -> dict:
        """state.json of the checkpoint after `done` steps."""
        state = {"done": done, "seconds": self.seconds, **state, "scaler": self.scaler.state_dict()}
        state |= {"options": self.options, **{key: self.lines(file, done) for key, file in LINES.items()}}
        return state if self.scheduled else state | {"off_schedule": True}

    def save_best(self, state: dict) -> None:
        """Rank 0 writes the weights alone to out/best, in place of those before; with shards every rank its part."""
        together = self.dist.together
        if self.dist.is_main or together:
            weights = checkpoint.trained_state(self.module)
            checkpoint.save(f"{self.out}/best", weights, self.config, state, files=self.files, together=together)


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
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what a step has asked of the GPU is its own work, not the next one's
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
    return peak_resident_bytes() / 1e9


def resident_bytes(compiler: bool = False) -> int:
    """Memory of this process now: the interpreter and the libraries, before a model is loaded.

    compiler: with torch's, 75 MB, which DDP, FSDP and activation checkpoints import.
    """
    if compiler:
        import torch._dynamo  # noqa: F401

    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
