"""A tiny world for the tests of the scripts: made-up ratings, a language model and a reward model, by the real commands.

`spawn` starts a command line as a user would. A fresh interpreter needs three seconds of a core to import torch, and torchrun
needs them once more for itself, so `run`, `start` and `together` fork a server that has imported it instead; the script and
every module of ours are still loaded anew in each process.
"""

import hashlib
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fake_ratings

from data import vader
from data.fetch import sha256

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds; a hang fails, a busy machine does not
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the server starts: results must not depend on the cores
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "numpy",
        "sentencepiece",
        "safetensors.torch",
        "tqdm",
        "pytest",
    ]
)

SMALL = {  # what makes a script small enough for a test; paths are relative to the world
    "data.prepare": {"out": "data", "vocab_size": 400},
    "train_lm.py": {
        "data": "data", "out": "lm", "width": 32, "layers": 2, "heads": 2, "batch": 16, "epochs": 4, "lr": 0.01,
        "warmup": 2, "log_every": 4, "eval_every": 12, "checkpoint_every": 12,
    },
    "train_rm.py": {
        "init": "lm", "data": "data", "out": "rm", "batch": 16, "epochs": 1, "warmup": 2, "log_every": 2,
        "eval_every": 4, "checkpoint_every": 4, "reference_samples": 32, "response_tokens": 8, "sources": "film",
    },
    "train_ppo.py": {
        "init": "lm", "reward": "rm", "data": "data", "out": "ppo", "batch": 16, "iterations": 4, "response_tokens": 8,
        "warmup": 1, "kl_coef": 0.1, "minibatches": 1, "sample_every": 2, "checkpoint_every": 2, "sources": "film",
    },
    "sample.py": {"checkpoint": "lm", "tokens": 8},
    "evaluate.py": {
        "base": "lm", "tuned": "lm", "reward": "rm", "data": "data", "out": "evaluation", "prompts": 5,
        "response_tokens": 8, "best_of": 4, "sources": "film",
    },
    "evaluate.py rm": {"model": "rm", "data": "data", "out": "card", "probe_texts": 6},
}  # fmt: skip
# float32 is what exactness is promised in; tests/test_precision.py has the others
SMALL |= {name: {"precision": "fp32"} | options for name, options in SMALL.items() if ".py" in name}

REWARDS = """
def shorter(prompts, responses):
    return [-len(response) for response in responses]

def nan(prompts, responses):
    return [float("nan")] * len(responses)

def too_few(prompts, responses):
    return [1.0]

def words(prompts, responses):
    return responses

def nothing(prompts, responses):
    return None
"""


@dataclass(frozen=True)
class Done:
    """A process that has ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Running:
    process: multiprocessing.Process
    log: Path

    def wait(self) -> Done:
        self.process.join(TIMEOUT)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {TIMEOUT} s: {(self.log / 'err').read_text()}")
        return Done(self.process.exitcode, *((self.log / name).read_text(errors="replace") for name in ("out", "err")))


@dataclass(frozen=True)
class World:
    """A directory with `data`, `lm`, `rm` and `rewards.py`, or an empty one; every command runs in it."""

    path: Path

    def environment(self, **changes: str) -> dict[str, str]:
        """A cache that holds the fake archive, Python told to expect its hashes, and the CPU."""
        ours = {"XDG_CACHE_HOME": str(self.path / "cache"), "PYTHONPATH": f"{self.path / 'pins'}{os.pathsep}{ROOT}"}
        return {**os.environ, **ours, "CUDA_VISIBLE_DEVICES": "", **changes}

    def command(self, script: str, **changes) -> list[str]:
        """The script's small options with `changes`; None leaves one out."""
        options = {name: value for name, value in (SMALL[script] | changes).items() if value is not None}
        job = ["vader"] if script == "data.prepare" else []
        return [*script.split(), *job, *(f"--{name}={value}" for name, value in options.items())]

    def start(self, command: list[str], env: dict[str, str] | None = None, before: Callable | None = None) -> Running:
        """A process of its own that runs the command; `before()` is called in it first."""
        log = self.path / "logs" / str(time.perf_counter_ns())
        log.mkdir(parents=True)
        for name in ("out", "err"):  # a process may be killed before it opens them
            (log / name).touch()
        process = SERVER.Process(target=child, args=(command, self.path, self.environment(**env or {}), log, before))
        process.start()
        return Running(process, log)

    def run(self, script: str, /, env: dict[str, str] | None = None, before: Callable | None = None, **changes) -> Done:
        return self.start(self.command(script, **changes), env, before).wait()

    def ok(self, script: str, /, **changes) -> str:
        """What the script printed; fails unless it succeeded without a word on stderr."""
        done = self.run(script, **changes)
        assert (done.code, done.err) == (0, ""), done
        return done.out

    def together(self, command: list[str], ranks: int, env: dict[str, str] | None = None) -> Done:
        """The processes that torchrun would start, each a fork; 0: one that belongs to no group. All that they said, and a
        code that is not 0 if one of them failed.
        """
        running = [self.start(command, {**(env or {}), **who}) for who in group(ranks) or [{}]]
        ended = [one.wait() for one in running]
        code = next((one.code for one in ended if one.code), 0)
        return Done(code, "".join(one.out for one in ended), "".join(one.err for one in ended))

    def popen(self, command: list[str], ranks: int = 0, **kwargs) -> subprocess.Popen:
        """`python script ...`, or torchrun with this many processes, in a process group of its own."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        script = command[:1] if command[0] == "-m" else [str(ROOT / command[0])]
        return subprocess.Popen(
            [sys.executable, *launcher, *script, *command[1:]], cwd=self.path, env=self.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **kwargs,
        )  # fmt: skip

    def spawn(self, command: list[str], ranks: int = 0, stdin: str | None = None) -> Done:
        process = self.popen(command, ranks, stdin=subprocess.PIPE)
        out, err = process.communicate(stdin, timeout=TIMEOUT)
        return Done(process.returncode, out, err)


def group(ranks: int) -> list[dict[str, str]]:
    """For each rank the variables by which torchrun tells it who it is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    every = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    every |= {"PLAIN_RLHF_TIMEOUT": TIMEOUT / 2}  # nobody ends the ranks that wait for one that has failed
    return [{name: str(x) for name, x in (every | {"RANK": i, "LOCAL_RANK": i}).items()} for i in range(ranks)]


def child(command: list[str], directory: Path, env: dict[str, str], log: Path, before: Callable | None) -> None:
    """Become `python command` in `directory`."""
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(env)
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = list(command)
    if (pins := directory / "pins" / "sitecustomize.py").exists():
        runpy.run_path(str(pins))
    if before:
        before()
    if command[0].endswith(".py"):
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def write_pins(path: Path) -> None:
    """A cache with the fake archive in it, and what tells Python to expect its hashes."""
    sdist = fake_ratings.fake_sdist(path / "cache" / "plain-rlhf" / vader.SDIST)
    rules = {name: hashlib.sha256(blob).hexdigest() for name, blob in fake_ratings.RULES.items()}
    (path / "pins").mkdir(exist_ok=True)  # a build that was stopped goes on
    (path / "pins" / "sitecustomize.py").write_text(
        f"from data import vader\nvader.SDIST_SHA256 = {sha256(sdist)!r}\nvader.RULES = {rules!r}\n"
    )


def build(path: Path) -> World:
    """Prepare the data and train both models; about ten seconds, once per session."""
    world = World(path)
    write_pins(path)
    (path / "rewards.py").write_text(REWARDS)
    for script in ("data.prepare", "train_lm.py", "train_rm.py"):
        done = world.run(script)
        assert (done.code, done.err) == (0, ""), done
    return world


def lines(file: Path) -> list[dict]:
    """The complete lines of a .jsonl file that may still be growing."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]
