"""Break runs on purpose: kill -9 anywhere, damage what a run has left, send signals. Never another result, never silence.

    python tests/faults.py --kills=200 --damages=60 --signals=30       # a table; exit code 1 on any difference or silence
    python tests/faults.py --kills=20 --runs="ppo branch,lm" --seed=7

A chain of kills: a command is killed one to four times in the same directory, by the clock or at a crash point (before, after
or in the middle of the n-th fsync, rename, write, backward, optimiser step ...), then given once more. What it leaves must be
what an undisturbed run leaves: the same sha256 of every file, clocks aside. A damage: a run that was killed in its sixth of
eight iterations, one file of it changed; the same command must end as the undisturbed run does and say what it found, or
refuse in one line that names the file. A signal: 128 + n, a checkpoint where it stood, and the same end.

Models have width 32, so a start takes a second or two: each is forked from a server that has imported torch. Two ranks are
two such processes with the variables of torchrun, of which one or both are killed.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import SMALL, TIMEOUT, Done, Running, World, build, group, lines  # noqa: E402

from rlhf.infra import checkpoint, config  # noqa: E402
from rlhf.infra.files import read_lines  # noqa: E402

PPO = {"iterations": 6, "sample_every": 2, "checkpoint_every": 2, "minibatches": 2}
LM = {"epochs": 1, "log_every": 1, "eval_every": 4, "checkpoint_every": 3}
RM = {"epochs": 1, "log_every": 1, "eval_every": 4, "checkpoint_every": 3}
NO_STEPS = dict.fromkeys("batch epochs warmup log_every eval_every checkpoint_every".split())
NO_SHAPE = dict.fromkeys(("width", "layers", "heads"))
LORA = {"lora_rank": 4, "lora_alpha": 8}
DPO = {
    "precision": "fp32",
    "init": "lm",
    "data": "votes",
    "epochs": 1,
    "batch": 8,
    "log_every": 1,
    "eval_every": 4,
    "checkpoint_every": 3,
    "lr": 1e-3,
    "warmup": 2,
}
GROUP = {"samples_per_prompt": 4}


@dataclass(frozen=True)
class Task:
    """A command that is broken: a script, its options beside tiny.SMALL's, and how many ranks run it."""

    script: str
    options: dict
    ranks: int = 1


RUNS = {
    "lm": Task("train_lm.py", LM),
    "lm adapters": Task("train_lm.py", LM | NO_SHAPE | LORA | {"init": "lm", "layout": "adapters"}),
    "rm": Task("train_rm.py", RM),
    "rm frozen": Task("train_rm.py", NO_STEPS | {"trunk": "frozen", "members": 2, "preferences": "votes"}),
    "rm adapters": Task("train_rm.py", RM | {"trunk": "adapters", "depth": 1, "members": 3, "pooling": "attention"}),
    "rm pairs": Task("train_rm.py", RM | {"objective": "pairs", "epochs": 0.05}),
    "dpo": Task("train_dpo.py", DPO),
    "dpo branch": Task("train_dpo.py", DPO | {"layout": "branch", "branch_layers": 1, "loss": "ipo"}),
    "ppo": Task("train_ppo.py", PPO),
    "ppo full": Task("train_ppo.py", PPO | {"layout": "full", "kl_control": "adaptive", "kl_horizon": 300}),
    "ppo branch": Task("train_ppo.py", PPO | {"layout": "branch", "branch_layers": 1}),
    "ppo adapters": Task("train_ppo.py", PPO | LORA | {"layout": "adapters", "micro_batch": 4}),
    "ppo judge": Task(
        "train_ppo.py",
        PPO | {"judge": "rewards.py:shorter", "judge_every": 1, "judge_prompts": 4, "prompt_tokens": 8, "sources": ""},
    ),
    "ppo rloo": Task("train_ppo.py", PPO | {"estimator": "rloo", "target_approxkl": 0.002} | GROUP),
    "ppo grpo": Task("train_ppo.py", PPO | {"estimator": "grpo"} | GROUP),
    "ppo reinforce++": Task("train_ppo.py", PPO | {"estimator": "reinforce++"}),
    "lm, 2 ranks": Task("train_lm.py", LM, ranks=2),
    "rm, 2 ranks": Task("train_rm.py", RM, ranks=2),
    "dpo, 2 ranks": Task("train_dpo.py", DPO, ranks=2),
    "ppo, 2 ranks": Task("train_ppo.py", PPO | {"micro_batch": 2}, ranks=2),
    "iterate": Task("iterate.py", {}),
}
HEAVY = {"iterate": 0.3}  # chances beside the others', whose starts take a tenth of the time


@dataclass(frozen=True)
class Config:
    kills: int = 20  # SIGKILLs, over all runs
    damages: int = 0  # changed files, of the table below, then at random; 0 = none
    signals: int = 0  # SIGINT, SIGTERM and SIGHUP, one a run
    runs: tuple[str, ...] = ()  # these alone; none given = all
    seed: int = 1  # of what is broken, where and when
    out: str | None = None  # where the runs are made; none = a directory that goes away

    def __post_init__(self):
        config.at_least(self, kills=0, damages=0, signals=0, seed=0)
        if unknown := set(self.runs) - RUNS.keys():
            raise ValueError(f"--runs: no {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")


def main() -> None:
    cfg = config.parse(Config)
    with contextlib.ExitStack() as stack:
        place = Path(cfg.out or stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))).resolve()
        lab = Lab(prepared(place), random.Random(cfg.seed))
        bad = lab.kill(cfg.kills, cfg.runs) + lab.damage(cfg.damages) + lab.signal(cfg.signals, cfg.runs)
    if bad:
        raise SystemExit(1)


def prepared(place: Path) -> World:
    """The tiny world of the tests, with votes; one that an earlier call has left is used again."""
    if not (place / "votes").exists():
        world = build(place)
        (place / "rewards.py").write_text((place / "rewards.py").read_text() + LONGER)
        rows = [
            {"prompt": f"The plot of film {i}", "chosen": f" was lovely, sharp {i}.", "rejected": " was dull."}
            for i in range(80)
        ]
        (place / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = world.start(["data.prepare", "votes.jsonl", "--tokenizer=data", "--out=votes"]).wait()
        assert done.code == 0, done
    return World(place)


LONGER = "\ndef longer(prompts, responses):\n    return [len(response) / 10 for response in responses]\n"


# ---- what a run leaves

CLOCKS = re.compile(r"(time/|perf/|seconds|peak_memory_gb|tokens_per_s).*")
GUARDS = ("sha256", "bytes")  # of files that hold clocks


def without_clocks(value):
    if isinstance(value, dict):
        return {name: without_clocks(x) for name, x in value.items() if not CLOCKS.fullmatch(name)}
    return [*map(without_clocks, value)] if isinstance(value, list) else value


def left(out: Path) -> dict[str, str]:
    """{file: sha256 of what it says} of everything below `out`, hidden files too; clocks and what was set aside left out."""
    found = {}
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(file.relative_to(out))
        if name.startswith((".damaged-", "feedback.sqlite-")):
            continue
        content = file.read_bytes()
        if file.name == "feedback.sqlite":
            content = repr(votes(file)).encode()
        elif file.suffix == ".jsonl":
            content = json.dumps(without_clocks([json.loads(line) for line in content.splitlines()])).encode()
        elif file.suffix == ".json":
            value = without_clocks(json.loads(content))
            if file.name == "config.json" and "files" in value:  # its own digest covers the clocks of state.json
                value = {"config": value["config"], "files": sorted(value["files"])}
            content = json.dumps(value).encode()
        elif file.name == "rounds.md":
            content = re.sub(rb"\d+ \|$", b"", content, flags=re.MULTILINE)  # its last column is seconds
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def votes(file: Path) -> list[tuple]:
    from rlhf.feedback.store import FeedbackStore

    store = FeedbackStore(file)
    try:
        return [tuple(j) for j in store.judgements()]
    finally:
        store.close()


def compared(found: dict[str, str], wanted: dict[str, str]) -> str:
    """What differs, in a few words; "" where nothing does."""
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return f"{len(names)} files differ: {', '.join(names[:4])}" if names else ""


# ---- crash points: SIGKILL from within

POINTS = {  # name -> (module or class, attribute)
    "fsync": ("os", "fsync"),
    "rename": ("os", "rename"),
    "replace": ("os", "replace"),
    "rmtree": ("shutil", "rmtree"),
    "unlink": ("pathlib.Path", "unlink"),
    "copyfile": ("shutil", "copyfile"),
    "write_text": ("pathlib.Path", "write_text"),
    "save_file": ("rlhf.infra.checkpoint", "save_file"),
    "line": ("rlhf.infra.metrics", "write_line"),
    "optimiser": ("rlhf.infra.adamw.AdamW", "step"),
    "backward": ("torch.Tensor", "backward"),
}
HALVES = ("write_text", "save_file", "line", "copyfile")


def owner_of(point: str):
    module, attribute = POINTS[point]
    try:
        return importlib.import_module(module), attribute
    except ModuleNotFoundError:
        module, _, name = module.rpartition(".")
        return getattr(importlib.import_module(module), name), attribute


def half(point: str, args) -> None:
    """Half of what the call would have written."""
    if point == "write_text":
        with open(args[0], "w") as file:
            file.write(args[1][: len(args[1]) // 2])
    elif point == "line":
        text = json.dumps(args[1])
        args[0].write(text[: len(text) // 2])
        args[0].flush()
    else:
        target = Path(args[1])
        if point == "save_file":
            checkpoint.save_file(*args)
            content = target.read_bytes()
        else:
            content = Path(args[0]).read_bytes()
        target.write_bytes(content[: len(content) // 2])


def watch(counts: str, point: str | None = None, wanted: int = 0, when: str = "before") -> None:
    """In the process to be killed: count the calls of every point, one byte each, and die at one of them."""
    for name in POINTS:
        owner, attribute = owner_of(name)
        setattr(owner, attribute, watched(name, getattr(owner, attribute), counts, wanted * (name == point), when))


def watched(name: str, real: Callable, counts: str, wanted: int, when: str) -> Callable:
    file, calls, inside = os.open(f"{counts}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 0, False

    @functools.wraps(real)
    def call(*args, **kwargs):
        nonlocal calls, inside
        if inside:  # of half()
            return real(*args, **kwargs)
        calls += 1
        os.write(file, b"x")
        if calls == wanted and when != "after":
            inside = True
            if when == "half":
                half(name, args)
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if calls == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


@dataclass(frozen=True)
class Kill:
    """When to die: at a crash point of one rank, or, without a point, at a share of the undisturbed run's seconds."""

    point: str | None = None
    wanted: int = 0
    when: str = "before"
    share: float = 0.0
    rank: int = 0
    group: bool = True  # all ranks, or one: the others have to notice

    def __str__(self) -> str:
        at = f"{self.when} {self.point} {self.wanted}" if self.point else f"at {self.share:.0%}"
        return at + ("" if self.group else f" of rank {self.rank} alone")


# ---- the laboratory


@dataclass
class Reference:
    """An undisturbed run."""

    files: dict[str, str]
    seconds: float
    counts: dict[str, int]  # calls of every crash point
    lines: int  # of metrics.jsonl


@dataclass
class Lab:
    world: World
    draw: random.Random
    references: dict[str, Reference] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.world.path / "broken"

    @property
    def counts(self) -> Path:
        return self.world.path / "counts"

    # -- processes

    def command(self, name: str) -> list[str]:
        task = RUNS[name]
        if task.script == "iterate.py":
            from test_iterate import LOOP

            options = LOOP | {"rounds": 1}
        else:
            options = SMALL.get(task.script, {}) | task.options
        given = {option: value for option, value in (options | {"out": "broken"}).items() if value is not None}
        return [task.script, *(f"--{option}={value}" for option, value in given.items())]

    def start(self, name: str, kill: Kill | None = None, watching: bool = False) -> list[Running]:
        """The ranks of the command; one that dies at a crash point is told so before it begins."""
        command, ranks = self.command(name), RUNS[name].ranks
        started = []
        for rank, env in enumerate(group(ranks) if ranks > 1 else [None]):
            before = None
            if kill and kill.point and kill.rank == rank:
                before = functools.partial(watch, str(self.counts), kill.point, kill.wanted, kill.when)
            elif watching and rank == 0:
                before = functools.partial(watch, str(self.counts))
            started.append(self.world.start(command, env, before))
        return started

    def ended(self, name: str, **how) -> list[Done]:
        if name == "iterate":
            return [self.world.spawn(self.command(name))]
        return [running.wait() for running in self.start(name, **how)]

    def fresh(self) -> None:
        for place in (self.out, self.counts):
            shutil.rmtree(place, ignore_errors=True)
        self.counts.mkdir()

    def reference(self, name: str) -> Reference:
        if name not in self.references:
            self.fresh()
            began = time.monotonic()
            done = self.ended(name, watching=True) if name != "iterate" else self.ended(name)
            assert all(one.code == 0 for one in done), (name, done)
            seconds = time.monotonic() - began
            counts = {file.name: file.stat().st_size for file in self.counts.iterdir() if file.stat().st_size}
            self.references[name] = Reference(left(self.out), seconds, counts, len(lines(self.out / "metrics.jsonl")))
        return self.references[name]

    # -- kills

    def kill(self, count: int, names: tuple[str, ...] = ()) -> int:
        """Chains of kills until `count` have hit; prints the table, -> how many chains differ."""
        names = names or tuple(RUNS)
        hits, chains, differ, points = Counter(), Counter(), Counter(), Counter()
        order = self.draw.sample(names, len(names))  # each once, then at random
        while hits.total() < count:
            weights = [HEAVY.get(name, 1.0) for name in names]
            name = order.pop() if order else self.draw.choices(names, weights)[0]
            wanted, problem, died = self.reference(name), "", []
            self.fresh()
            for _ in range(min(self.draw.randint(1, 4), count - hits.total())):
                kill = self.drawn(name, wanted)
                problem, hit = self.killed(name, kill, wanted)
                if hit:
                    died.append(str(kill))
                    hits[name] += 1
                    points[kill.point or "clock"] += 1
                if problem:
                    break
            if not problem:
                done = self.again(name)
                problem = next((f"ended with {one.code}: {one.err[-300:]}" for one in done if one.code), "")
                problem = problem or compared(left(self.out), wanted.files)
            chains[name] += 1
            differ[name] += bool(problem)
            print(f"{name:<18}{'; '.join(died) or 'no kill hit':<70} {problem or 'exact'}", flush=True)
            if problem:
                shutil.copytree(self.out, self.world.path / f"differs-{chains.total()}", symlinks=True)
        if count:
            print("\n| run | kills | chains | differ |\n|---|---|---|---|")
            for name in names:
                print(f"| {name} | {hits[name]} | {chains[name]} | {differ[name]} |")
            print(f"| all | {hits.total()} | {chains.total()} | {differ.total()} |")
            print("killed at: " + ", ".join(f"{name} {n}" for name, n in points.most_common()) + "\n", flush=True)
        return differ.total()

    def drawn(self, name: str, wanted: Reference) -> Kill:
        ranks = RUNS[name].ranks
        group = ranks == 1 or self.draw.random() < 0.5
        rank = self.draw.randrange(ranks)
        if wanted.counts and self.draw.random() < 0.6:
            # only rank 0 writes files
            own = [point for point in wanted.counts if not rank or point in ("optimiser", "backward")]
            point = self.draw.choice(own)
            when = self.draw.choice(("before", "after", "half") if point in HALVES else ("before", "after"))
            return Kill(point, self.draw.randint(1, wanted.counts[point]), when, rank=rank, group=group)
        return Kill(share=self.draw.uniform(0.15, 1.0), rank=rank, group=group)

    def killed(self, name: str, kill: Kill, wanted: Reference) -> tuple[str, bool]:
        """Start the command, and kill it so; -> (what is wrong with how it ended, did the kill hit?)."""
        if name == "iterate":
            return self.killed_loop(kill.share * wanted.seconds)
        running = self.start(name, kill)
        victim = running[kill.rank]
        if kill.point:
            victim.process.join(TIMEOUT)
        else:
            victim.process.join(kill.share * wanted.seconds)
            victim.process.kill()
        if kill.group:  # as a scheduler does
            for one in running:
                one.process.kill()
        done = [one.wait() for one in running]
        hit = done[kill.rank].code == -signal.SIGKILL
        if hit and not kill.group:
            for one in done[: kill.rank] + done[kill.rank + 1 :]:
                clear = one.code == 0 or one.code == 2 and "lost another rank of this run" in one.err
                if not clear or "Traceback" in one.err:
                    return f"the other rank ended with {one.code}: {one.err[-300:]}", hit
        if not hit and any(one.code for one in done):
            return f"not killed, and ended with {[one.code for one in done]}: {done[0].err[-300:]}", hit
        return "", hit

    def killed_loop(self, seconds: float) -> tuple[str, bool]:
        """iterate.py with all that it started, or its leader alone: then its command goes on, and is waited for."""
        process = self.world.popen(self.command("iterate"))
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        hit = process.poll() is None
        if hit and self.draw.random() < 0.3:
            process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "", hit

    def again(self, name: str) -> list[Done]:
        """The same command, to the end; while what a killed leader has started still runs, it has to be refused."""
        end = time.monotonic() + TIMEOUT
        while True:
            done = self.ended(name)
            if not (done[0].code == 2 and "is held" in done[0].err) or time.monotonic() > end:
                return done
            time.sleep(0.5)

    # -- damages

    def damage(self, count: int, every: int = 1) -> int:
        """Damages to a run that was killed in its sixth iteration; prints the table, -> how many were not told."""
        if not count:
            return 0
        task = Task("train_ppo.py", PPO | {"iterations": 8})
        RUNS["damaged"] = task
        wanted = self.reference("damaged")
        self.fresh()
        per_step = wanted.counts["backward"] // 8
        self.killed("damaged", Kill("backward", 5 * per_step + 1), wanted)
        template = self.world.path / "template"
        shutil.rmtree(template, ignore_errors=True)
        shutil.move(self.out, template)
        assert [path.name for path in checkpoint.steps(template)] == ["step_000002", "step_000004"]
        damages = list(DAMAGES.items())[:count]
        damages += [(f"random {i}", at_random(self.draw)) for i in range(count - len(damages))]
        verdicts = Counter()
        print("| damage | exit | outcome | verdict |\n|---|---|---|---|")
        for label, damage in damages[::every]:
            self.fresh()
            shutil.copytree(template, self.out, symlinks=True)
            expected = damage(self.out) or TOLD
            command = expected.command(self.command("damaged"))
            done = self.world.start(command).wait()
            differs = compared(left(self.out), wanted.files) if done.code == 0 else ""
            outcome, verdict = expected.judge(done, differs)
            verdicts[verdict] += 1
            print(f"| {label} | {done.code} | {outcome} | {verdict} |", flush=True)
        del RUNS["damaged"]
        print(
            f"{sum(verdicts.values())} damages: " + ", ".join(f"{k} {n}" for k, n in verdicts.items()) + "\n",
            flush=True,
        )
        return sum(n for verdict, n in verdicts.items() if verdict != "OK")

    # -- signals

    def signal(self, count: int, names: tuple[str, ...] = ()) -> int:
        """A signal in the middle of a run: it saves where it stands, says so, and the same command ends as if nothing had
        been; -> how many did not.
        """
        names = [name for name in names or RUNS if name not in ("iterate", "rm frozen")]
        bad, order = 0, []
        for _ in range(count):
            order = order or self.draw.sample(names, len(names))
            name, number = order.pop(), self.draw.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
            wanted = self.reference(name)
            self.fresh()
            running = self.start(name)
            at = self.draw.randint(1, wanted.lines // 2)
            while len(lines(self.out / "metrics.jsonl")) < at and running[0].process.is_alive():
                time.sleep(0.002)
            for one in running:  # as torchrun passes it on
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.process.pid, number)
            done, problem = [one.wait() for one in running], ""
            codes = {one.code for one in done}
            newest = checkpoint.latest(self.out)
            if codes == {128 + number}:
                state = checkpoint.verify(newest).state if newest else {"done": 0}
                if state["done"] < at or len(read_lines(self.out / "metrics.jsonl")) != state["done"]:
                    problem = (
                        f"{len(read_lines(self.out / 'metrics.jsonl'))} lines, and a checkpoint of {state['done']}"
                    )
            elif codes != {0}:  # 0: the signal came after the last step
                problem = f"ended with {codes}: {done[0].err[-300:]}"
            if not problem:
                again = self.ended(name)
                problem = next((f"again: {one.code}: {one.err[-300:]}" for one in again if one.code), "")
                problem = problem or compared(left(self.out), wanted.files)
            bad += bool(problem)
            word = signal.Signals(number).name
            print(f"{name:<18}{word:<8} after {at} lines: {sorted(codes)} {problem or 'saved, exact'}", flush=True)
        return bad


# ---- what may be damaged, and what has to follow


@dataclass(frozen=True)
class Expected:
    """What the same command has to do with a damaged run."""

    names: tuple[str, ...] = ()  # one of them must be named in what it says
    exact: bool = True  # it may end with 0, as the undisturbed run
    harmless: bool = False  # nothing that the run needs: no word is due
    more: tuple[str, ...] = ()  # further options of the command
    lines: bool = False  # lines are gone for good: the files with them differ in the end, as the run itself says

    def command(self, command: list[str]) -> list[str]:
        names = [word.partition("=")[0] for word in self.more]
        return [*(word for word in command if word.partition("=")[0] not in names), *self.more]

    def judge(self, done: Done, differs: str) -> tuple[str, str]:
        """(what happened, the verdict)"""
        said = [line for line in (done.out + "\n" + done.err).splitlines() if WORDS.search(line)]
        told = [line for line in said if any(name in line for name in self.names)] if self.names else said
        if "Traceback" in done.err:
            return done.err.strip().splitlines()[-1], "TRACEBACK"
        if done.code == 2:
            one_line = done.err.startswith("error: ") and done.err.count("\n") == 1
            named = any(name in done.err for name in self.names) or not self.names
            return done.err.strip()[:200], "OK" if one_line and named else "UNCLEAR"
        if done.code:
            return done.err.strip()[-200:], f"CODE {done.code}"
        if differs and not (told and self.lines):
            return differs, "BROKEN" if told else "SILENT"
        if told or self.harmless:
            return ": ".join([differs or "exact", *(line.strip()[:200] for line in told[:1])]), "OK"
        return "exact, without a word", "SILENT"


WORDS = re.compile("damaged|lost|set aside|starts again|is gone|is not|says|error")
TOLD, HARMLESS = Expected(), Expected(harmless=True)
NEWEST, BEFORE = "step_000004", "step_000002"


def edit(name: str, change: Callable[[bytes], bytes], step: str = NEWEST) -> Callable[[Path], Expected]:
    """Change the bytes of a file of a checkpoint; the line that tells it names the checkpoint."""

    def damage(out: Path) -> Expected:
        file = out / step / name
        file.write_bytes(change(file.read_bytes()))
        return Expected((step,))

    return damage


def flip(at: float) -> Callable[[bytes], bytes]:
    """One bit, at this share of the file."""

    def change(content: bytes) -> bytes:
        i = min(len(content) - 1, int(at * len(content)))
        return content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]

    return change


def replace_json(name: str, change: Callable[[dict], object], step: str = NEWEST):
    """Change what a JSON file says."""
    return edit(name, lambda content: json.dumps(change(json.loads(content)), indent=1).encode(), step)


def remove_file(name: str, step: str = NEWEST):
    def damage(out: Path) -> Expected:
        (out / step / name).unlink()
        return Expected((step,))

    return damage


def act(do: Callable[[Path], object], expected: Expected) -> Callable[[Path], Expected]:
    def damage(out: Path) -> Expected:
        do(out)
        return expected

    return damage


def poison(content: bytes) -> bytes:
    """NaN in the last weight."""
    return content[:-4] + b"\x00\x00\xc0\x7f"


def rows_of(out: Path) -> list[str]:
    return (out / "metrics.jsonl").read_text().splitlines(keepends=True)


def write_rows(out: Path, rows: list[str]) -> None:
    (out / "metrics.jsonl").write_text("".join(rows))


def both_cut(out: Path) -> None:
    for step in (BEFORE, NEWEST):
        os.truncate(out / step / "model.safetensors", 99)


def older_beside(out: Path, name: str, link: bool = False) -> None:
    file = out / NEWEST / name
    file.unlink()
    (file.symlink_to if link else functools.partial(shutil.copyfile, dst=file))(out / BEFORE / name)


def dangling(out: Path) -> None:
    shutil.rmtree(out / NEWEST)
    (out / NEWEST).symlink_to("nowhere")


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def drop_run_json(out: Path) -> None:
    (out / "run.json").unlink()


STORED = ("model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.model")
DAMAGES: dict[str, Callable[[Path], Expected | None]] = {}
for _name in STORED:
    DAMAGES |= {
        f"{_name} truncated": edit(_name, lambda content: content[: len(content) // 2]),
        f"{_name} empty": edit(_name, lambda content: b""),
        f"{_name} deleted": remove_file(_name),
        f"{_name} zeros": edit(_name, lambda content: bytes(len(content))),
        f"{_name} one bit in the middle": edit(_name, flip(0.5)),
        f"{_name} last bit": edit(_name, flip(1.0)),
    }
DAMAGES |= {
    "NaN in a weight": edit("model.safetensors", poison),
    "NaN in a moment": edit("optimizer.safetensors", poison),
    "a name in the header": edit("model.safetensors", lambda content: content.replace(b"embed", b"embe$", 1)),
    "the header's length": edit("model.safetensors", lambda content: b"\xff" * 8 + content[8:]),
    "state.json done 5": replace_json("state.json", lambda state: state | {"done": 5}),
    "state.json done 3": replace_json("state.json", lambda state: state | {"done": 3}),
    "state.json []": replace_json("state.json", lambda state: []),
    "config.json files a list": replace_json("config.json", lambda config: config | {"files": [*config["files"]]}),
    "config.json format a text": replace_json("config.json", lambda config: config | {"format": "2"}),
    "config.json files ../../lm": replace_json(
        "config.json", lambda config: config | {"files": config["files"] | {"../../lm/report.json": {"bytes": 3}}}
    ),
    "config.json without its sha256": replace_json(
        "config.json", lambda config: {name: value for name, value in config.items() if name != "sha256"}
    ),
    "weights of step 2": act(lambda out: older_beside(out, "model.safetensors"), Expected((NEWEST,))),
    "a link to the weights of step 2": act(
        lambda out: older_beside(out, "model.safetensors", link=True), Expected((NEWEST,))
    ),
    "moments of step 2": act(lambda out: older_beside(out, "optimizer.safetensors"), Expected((NEWEST,))),
    "state of step 2": act(lambda out: older_beside(out, "state.json"), Expected((NEWEST,))),
    "a pipe in place of the weights": act(lambda out: pipe(out / NEWEST / "model.safetensors"), Expected((NEWEST,))),
    "a dangling link in place of step 4": act(dangling, Expected((NEWEST,))),
    "run.json cut": act(lambda out: os.truncate(out / "run.json", 50), Expected(("run.json",))),
    "run.json []": act(lambda out: (out / "run.json").write_text("[]"), Expected(("run.json",))),
    "run.json a pipe": act(lambda out: pipe(out / "run.json"), Expected(("run.json",))),
    "run.json deleted, another lr": act(drop_run_json, Expected(("lr",), more=("--lr=0.5",))),
    "run.json deleted": act(drop_run_json, Expected(("run.json",))),
    "run.json of another lr": act(
        lambda out: (out / "run.json").write_text(json.dumps(json.loads((out / "run.json").read_text()) | {"lr": 0.5})),
        Expected(("lr",), more=("--lr=0.5",)),
    ),
    "metrics.jsonl deleted": act(
        lambda out: (out / "metrics.jsonl").unlink(), Expected(("metrics.jsonl",), lines=True)
    ),
    "metrics.jsonl its first two lines": act(
        lambda out: write_rows(out, rows_of(out)[:2]), Expected(("metrics.jsonl",), lines=True)
    ),
    "metrics.jsonl a line without step": act(
        lambda out: write_rows(out, [rows_of(out)[0], "{}\n", *rows_of(out)[2:]]), Expected(("metrics.jsonl, line 2",))
    ),
    "metrics.jsonl 3": act(
        lambda out: write_rows(out, [rows_of(out)[0], "3\n", *rows_of(out)[2:]]), Expected(("metrics.jsonl, line 2",))
    ),
    "metrics.jsonl a broken line": act(
        lambda out: write_rows(out, [rows_of(out)[0][:-9] + "\n", *rows_of(out)[1:]]),
        Expected(("metrics.jsonl, line 1",)),
    ),
    "metrics.jsonl a line twice": act(
        lambda out: write_rows(out, [rows_of(out)[0], *rows_of(out)]), Expected(("metrics.jsonl",), lines=True)
    ),
    "samples.jsonl deleted": act(
        lambda out: (out / "samples.jsonl").unlink(), Expected(("samples.jsonl",), lines=True)
    ),
    "samples.jsonl a broken line": act(
        lambda out: (out / "samples.jsonl").write_text("{\n" + (out / "samples.jsonl").read_text()),
        Expected(("samples.jsonl, line 1",)),
    ),
    "both checkpoints cut": act(both_cut, Expected((NEWEST,))),
    "the config.json of both": act(
        lambda out: [os.truncate(out / step / "config.json", 30) for step in (BEFORE, NEWEST)], Expected((NEWEST,))
    ),
    "step_999999 empty": act(lambda out: (out / "step_999999").mkdir(), Expected(("step_999999",))),
    "step_000009 a file": act(lambda out: (out / "step_000009").write_text("mine"), Expected(("step_000009",))),
    "step_abc": act(lambda out: (out / "step_abc").mkdir(), HARMLESS),
    "the newest deleted": act(lambda out: shutil.rmtree(out / NEWEST), HARMLESS),  # as if it had been killed earlier
    "what a kill leaves": act(
        lambda out: [(out / name).write_text("{") for name in (".run.json.tmp-7", ".report.json.tmp-8")], HARMLESS
    ),
}


def at_random(draw: random.Random) -> Callable[[Path], Expected]:
    """One to three changes to the bytes of one file of a checkpoint, the newest or the one before."""
    name, edits = draw.choice(STORED), [(draw.choice("bit cut zero".split()), draw.random()) for _ in range(3)]

    def change(content: bytes) -> bytes:
        for kind, at in edits[: math.ceil(3 * edits[0][1])]:
            i = int(at * len(content))
            if kind == "bit":
                content = flip(at)(content) if content else content
            elif kind == "cut":
                content = content[:i]
            else:
                content = content[:i] + bytes(min(64, len(content) - i)) + content[i + 64 :]
        return content

    return edit(name, change)


if __name__ == "__main__":
    config.run(main, stopped="stopped")
