"""Does the working tree compute what another revision computed, bit by bit? For a change that moves code and no number.

    python tests/same_bits.py --rev=main                      # a table; exit code 1 on a difference
    python tests/same_bits.py --rev=main --out=/tmp/bits      # keeps both sides; the revision's runs are not repeated

Tiny data is prepared once, by the revision, which must know the same options. Each side then pretrains a language model,
trains reward models and runs PPO on its own files with its own code, and everything that the runs leave is compared:
metrics (clocks aside), samples, weights, optimiser, configs, states, run.json, reports, and what they printed. About a
minute and a half.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import SMALL, World, write_pins  # noqa: E402

from rlhf.infra import config  # noqa: E402

PPO = {"iterations": 4, "minibatches": 2, "micro_batch": 4, "lr": 0.003, "warmup": 0, "sample_every": 2}
LORA = {"lora_rank": 4, "lora_alpha": 8}
RUNS = {  # directory -> (script, options beside tiny.SMALL's), in this order
    "lm": ("train_lm.py", {}),
    "rm": ("train_rm.py", {}),
    "rm-frozen": (
        "train_rm.py",
        {"trunk": "frozen", "members": 2, "depths": "1,2", "preferences": "votes"}
        | dict.fromkeys("batch epochs warmup log_every eval_every checkpoint_every".split()),
    ),
    "rm-adapters": (
        "train_rm.py",
        {"trunk": "adapters", "depth": 1, "members": 2, "objective": "joint", "epochs": 0.3, "micro_batch": 4}
        | {"preferences": "votes", "pooling": "attention"},
    ),
    "rm-average": (
        "train_rm.py",
        {"average": "rm,rm"} | dict.fromkeys("batch epochs warmup log_every eval_every checkpoint_every".split()),
    ),
    "ppo": ("train_ppo.py", PPO),
    "ppo-branch": (
        "train_ppo.py",
        PPO | {"layout": "branch", "branch_layers": 1, "reward": "rm-frozen"},
    ),
    "ppo-adapters": (
        "train_ppo.py",
        PPO
        | LORA
        | {"layout": "adapters", "reward": "rm-adapters", "kl_control": "adaptive", "kl_horizon": 300}
        | {"weak_reward": True},
    ),
    "ppo-judge": (
        "train_ppo.py",
        PPO
        | {"reward": "rewards.py:longer", "judge": "rewards.py:shorter", "iterations": 8}
        | {"judge_every": 1, "judge_patience": 2, "judge_prompts": 4, "prompt_tokens": 12, "sources": ""},
    ),
    "ppo-max-kl": ("train_ppo.py", PPO | {"max_kl": 0.05, "iterations": 8, "layout": "full"}),
    "ppo-rloo": ("train_ppo.py", PPO | {"estimator": "rloo", "samples_per_prompt": 2, "target_approxkl": 0.01}),
    "ppo-reinforce": (
        "train_ppo.py",
        PPO | {"estimator": "reinforce++", "judge": "data", "judge_prompts": 4, "prompt_tokens": 12, "sources": ""},
    ),
}
STOPPED = ("ppo-judge", "ppo-max-kl")  # runs that must have ended early, or they show nothing
CLOCKS = ("time/", "perf/", "seconds", "peak_memory_gb")
CLOCK_WORDS = re.compile(r"peak memory.*|[\d.]+ s ->|tokens_per_s.*")
REWARDS = """
def longer(prompts, responses):
    return [len(response) / 10 for response in responses]

def shorter(prompts, responses):
    return [-len(response) for response in responses]
"""


@dataclass(frozen=True)
class Config:
    rev: str = "main"  # git revision to compare the working tree with
    out: str | None = None  # where both sides' runs are kept; what is there of the revision is used again
    runs: tuple[str, ...] | None = None  # these runs alone, on what an earlier call left in --out; none = all


def main() -> None:
    cfg = config.parse(Config)
    chosen = cfg.runs or tuple(RUNS)
    if unknown := set(chosen) - RUNS.keys():
        raise ValueError(f"--runs: no {', '.join(unknown)}; there are {', '.join(RUNS)}")
    with contextlib.ExitStack() as stack:
        out = Path(cfg.out or stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        names = ("before", "after")
        before, after = sides = [out / name for name in names]
        code = out / "code"
        if not code.exists():
            git("worktree", "add", "--detach", "--force", str(code), cfg.rev)
        if not cfg.out:
            stack.callback(git, "worktree", "remove", "--force", str(code))
        for side, root in zip(sides, (code, ROOT)):
            prepare(side, code)
            for name in chosen:
                script, options = RUNS[name]
                if side == after or not (side / f"{name}.txt").exists():
                    run(side, root, script, options, name)
        results = {name: differences(before, after, name) for name in chosen}
    for name, found in results.items():
        print(f"{name:<14}{'same' if not found else 'DIFFERENT'}")
        for line in found[:8]:
            print(f"    {line}")
    if any(results.values()):
        raise SystemExit(1)


def git(*words: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True)


def prepare(side: Path, root: Path) -> None:
    """Data and votes, by the code in `root`; what an earlier call left of the working tree's runs is removed."""
    if (side / "data").exists():
        return
    write_pins(side)
    (side / "rewards.py").write_text(REWARDS)
    with open(side / "votes.jsonl", "w", encoding="utf-8") as file:
        for i in range(60):
            vote = {"prompt": f"The plot of film {i}", "chosen": f" was lovely, sharp {i}.", "rejected": " was dull."}
            file.write(json.dumps(vote) + "\n")
    python(side, root, "-m", *World(side).command("data.prepare"))
    python(side, root, *"-m data.prepare votes.jsonl --tokenizer=data --out=votes".split())


def run(side: Path, root: Path, script: str, options: dict, name: str) -> None:
    for file in (side / name).rglob("*"):
        if file.is_file():
            file.unlink()  # the command would resume, or find a finished run
    options = SMALL[script] | options | {"out": name}
    words = [f"--{option}={value}" for option, value in options.items() if value is not None]
    printed = python(side, root, str(root / script), *words)
    (side / f"{name}.txt").write_text(printed)


def python(side: Path, root: Path, *words: str) -> str:
    """What `python words` prints, in the directory `side`, with the code in `root`."""
    env = {**World(side).environment(), "PYTHONPATH": f"{side / 'pins'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=side, env=env, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{side.name}: {' '.join(words)} ended with {done.returncode}: {done.stderr[-600:]}")
    return done.stdout


def differences(before: Path, after: Path, name: str) -> list[str]:
    """What the run `name` left on one side and not on the other, or other than there."""
    ours, theirs = facts(after, name), facts(before, name)
    found = [f"{key}: only {'before' if key in theirs else 'after'}" for key in sorted(ours.keys() ^ theirs.keys())]
    for key in sorted(ours.keys() & theirs.keys()):
        if isinstance(ours[key], torch.Tensor):
            if ours[key].dtype != theirs[key].dtype or not torch.equal(ours[key], theirs[key]):
                found.append(f"{key}: other numbers")
        elif json.dumps(ours[key]) != json.dumps(theirs[key]):  # NaN equals itself there, and 1 is not 1.0
            found.append(f"{key}: {str(theirs[key])[:60]} before, {str(ours[key])[:60]} after")
    if name in STOPPED and not theirs.get(f"{name}/report.json stopped"):
        found.append("the run did not stop early: it shows nothing")
    return found


def facts(side: Path, name: str) -> dict:
    """Everything that a run left, {file and place: value}, without clocks."""
    found = {f"printed, line {i}": line for i, line in enumerate(CLOCK_WORDS.sub("", text(side, name)).splitlines())}
    for file in sorted(path for path in (side / name).rglob("*") if path.is_file()):
        label = str(file.relative_to(side))
        if file.suffix == ".safetensors":
            found |= {f"{label} {key}": tensor for key, tensor in load_file(file).items()}
        elif file.suffix == ".jsonl":
            for i, line in enumerate(file.read_text().splitlines(), 1):
                found |= {f"{label}:{i} {key}": value for key, value in json.loads(line).items()}
        elif file.suffix == ".json":
            content = json.loads(file.read_text())
            if file.name == "config.json":  # names the sizes of files that hold clocks
                content = content["config"] | {"files": sorted(content["files"])}
            found |= {f"{label} {key}": value for key, value in content.items()}
        else:
            found[label] = file.read_bytes().hex()
    return {key: value for key, value in found.items() if not key.rpartition(" ")[2].startswith(CLOCKS)}


def text(side: Path, name: str) -> str:
    return (side / f"{name}.txt").read_text()


if __name__ == "__main__":
    config.run(main)
