"""kill -9 in the middle, the same command again: what is left in the end is what an undisturbed run leaves, bit for bit."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import TIMEOUT, lines

from rlhf.infra import checkpoint

pytestmark = pytest.mark.bits

PPO = {"iterations": 12, "checkpoint_every": 2, "sample_every": 3, "minibatches": 2, "batch": 32, "decay": "cosine"}
LM = {"epochs": 2, "log_every": 1, "checkpoint_every": 3, "eval_every": 4}
RM = {"epochs": 2, "log_every": 1, "checkpoint_every": 3, "eval_every": 4}
RUNS = {
    "ppo": ("train_ppo.py", PPO),
    "ppo adaptive": ("train_ppo.py", PPO | {"kl_control": "adaptive", "kl_horizon": 300, "critic": "separate"}),
    "ppo value base": ("train_ppo.py", PPO | {"value_base": "reward"}),
    "ppo rloo": ("train_ppo.py", PPO | {"estimator": "rloo", "samples_per_prompt": 2, "target_approxkl": 0.002}),
    "lm": ("train_lm.py", LM),
    "rm": ("train_rm.py", RM),
    "rm pairs": ("train_rm.py", RM | {"objective": "pairs", "epochs": 0.1}),
    "rm adapters": ("train_rm.py", RM | {"trunk": "adapters", "depth": 1, "members": 3, "pooling": "attention"}),
}


def numbers(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock and the machine."""
    rows = lines(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def without_times(report: Path) -> dict:
    content = json.loads(report.read_text()) if report.exists() else {}
    return {name: value for name, value in content.items() if name not in ("seconds", "time/total", "peak_memory_gb")}


def assert_equal_runs(run: Path, undisturbed: Path) -> None:
    assert numbers(run) == numbers(undisturbed)
    assert lines(run / "samples.jsonl") == lines(undisturbed / "samples.jsonl")
    assert without_times(run / "report.json") == without_times(undisturbed / "report.json")
    ours, theirs = checkpoint.resolve(run), checkpoint.resolve(undisturbed)
    assert ours.name == theirs.name
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(ours / file), load_file(theirs / file)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), file


def wait_for(condition, alive) -> bool:
    """Poll until the condition holds; False when the process has ended before."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        if not alive():
            return False
        if time.monotonic() > end:
            raise TimeoutError("the run neither goes on nor ends")
        time.sleep(0.004)
    return True


def killed_after(world, run: Path, at_least: int, command: list[str]) -> bool:
    """Start the command, kill -9 it once metrics.jsonl has so many lines; False if it was quicker than the killer."""
    running = world.start(command)
    wait_for(lambda: len(lines(run / "metrics.jsonl")) >= at_least, running.process.is_alive)
    running.process.kill()
    return running.wait().code == -signal.SIGKILL


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("lm", "ppo"))) for n in RUNS])
def test_killed_twice(world, tmp_path, name):
    """Once before the first checkpoint, so that it starts anew, and once in the middle."""
    script, options = RUNS[name]
    world.ok(script, out=tmp_path / "undisturbed", **options)
    total = len(lines(tmp_path / "undisturbed/metrics.jsonl"))
    for attempt in range(5):  # a busy machine may look too late: then the run has ended, and nothing was tested
        run = tmp_path / f"killed{attempt}"
        command = world.command(script, out=run, **options)
        early = killed_after(world, run, 1, command)
        middle = early and killed_after(world, run, total // 2, command)
        if middle and total // 2 <= len(lines(run / "metrics.jsonl")) < total:
            break
    else:
        pytest.fail("could not kill a run in the middle in five attempts")
    assert not (run / "report.json").exists()
    before = numbers(run)
    done = world.run(script, out=run, **options)
    assert (done.code, done.err) == (0, "")
    assert_equal_runs(run, tmp_path / "undisturbed")
    assert before == numbers(run)[: len(before)]  # what was reported before the kill was true as well


def test_a_finished_run_stays_as_it_is(world, tmp_path):
    world.ok("train_ppo.py", out=tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and file.name != "report.json"}
    world.ok("train_ppo.py", out=tmp_path)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.name != "report.json"} == before


@pytest.mark.parametrize(
    "script, other",
    [
        ("train_ppo.py", {"kl_coef": 0.2}),
        ("train_ppo.py", {"iterations": 5}),
        ("train_ppo.py", {"reward": "rewards.py:shorter"}),
        ("train_lm.py", {"lr": 0.02}),
        ("train_rm.py", {"objective": "pairs"}),
    ],
)
def test_other_options_are_refused(world, tmp_path, script, other):
    """Going on would mix two experiments. The message says which option, and both values."""
    world.ok(script, out=tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    done = world.run(script, out=tmp_path, **other)
    name, value = next(iter(other.items()))
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert f"{name}={value}" in done.err and str(tmp_path) in done.err
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_run_that_never_began_does_not_hold_its_directory(world, tmp_path):
    """The first command had a mistake that showed only after the start: the corrected one must not be refused."""
    done = world.run("train_lm.py", out=tmp_path / "lm", batch=100_000)
    assert done.code == 2 and "100000" in done.err
    world.ok("train_lm.py", out=tmp_path / "lm", epochs=1)


def killed_in_the_middle(world, place: Path, ranks: int, options: dict) -> tuple[Path, list[str]]:
    """A run of PPO under torchrun whose process group died at once after its third iteration; and its command."""
    for attempt in range(5):
        run = place / f"killed{attempt}"
        command = world.command("train_ppo.py", out=run, **options)
        with world.popen(command, ranks) as torchrun:
            wait_for(lambda run=run: len(lines(run / "metrics.jsonl")) >= 3, lambda p=torchrun: p.poll() is None)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(torchrun.pid, signal.SIGKILL)
        if 3 <= len(lines(run / "metrics.jsonl")) < options["iterations"]:
            return run, command
    pytest.fail("could not kill a run in the middle in five attempts")


@pytest.mark.slow
def test_killed_under_torchrun(world, tmp_path):
    """The whole process group dies at once; two processes resume, and the numbers are those of two undisturbed ones."""
    options = {"iterations": 8, "checkpoint_every": 2, "micro_batch": 4}
    done = world.together(world.command("train_ppo.py", out=tmp_path / "undisturbed", **options), 2)
    assert done.code == 0, done.err
    run, command = killed_in_the_middle(world, tmp_path, 2, options)
    done = world.spawn(command, ranks=2)
    assert done.code == 0, done.err
    assert_equal_runs(run, tmp_path / "undisturbed")


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_killed(world, tmp_path):
    """A checkpoint knows nothing of how many wrote it: metrics agree to rounding, as they do without a kill."""
    options = {"iterations": 6, "checkpoint_every": 2}
    world.ok("train_ppo.py", out=tmp_path / "undisturbed", **options)
    for attempt in range(5):
        run = tmp_path / f"killed{attempt}"
        command = world.command("train_ppo.py", out=run, **options)
        if killed_after(world, run, 3, command) and checkpoint.latest(run):
            break
    else:
        pytest.fail("could not kill a run in the middle in five attempts")
    done = world.together(command, 2)
    assert done.code == 0, done.err
    ours, theirs = numbers(run), numbers(tmp_path / "undisturbed")
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs):
        assert a["objective/scores"] == pytest.approx(b["objective/scores"], rel=1e-3, abs=1e-4)
        assert a["response/length"] == b["response/length"]
