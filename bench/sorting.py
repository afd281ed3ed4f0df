"""RL on a checkable task: PPO, GRPO and RLOO from one start and one budget of samples, beside more fine-tuning, several seeds.

    python bench/sorting.py --init=out/chat/base --out=out/sorting
    python bench/sorting.py --task=larger --init=out/chat/base --out=out/larger

Sorting starts from a short fine-tuning on 256 examples, which gives the form of the answer; `larger` from the model as it is.
Every run is train_ppo.py (or, for the control, train_lm.py on as many gold answers as RL samples responses) in a process of
its own; evaluate.py then asks all of them the same held-out prompts with the same random numbers.
What is finished is kept and not run again. The tables are printed and written to results.md; --threads=2 uses two cores.
In float32 everywhere, so that CPUs differ in rounding alone.
"""

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.words import markdown_table, show  # noqa: E402
from rlhf.infra import config  # noqa: E402
from rlhf.infra.files import read_json, read_lines, write_text  # noqa: E402

REWARD = "rewards/verify.py:exact"


@dataclass(frozen=True)
class Task:
    """What a study runs; the options are those of the scripts."""

    start: tuple[str, ...]  # train_lm.py's, none = the model as it is
    rl: tuple[str, ...]  # train_ppo.py's, of every method
    methods: dict[str, tuple[str, ...]]  # what a method has beside them
    response_tokens: int


RL = ("--layout=branch", "--branch_layers=8", "--kl_coef=0.01", "--epochs=1", "--lr=2e-4", "--warmup=3")
TASKS = {
    "sorting": Task(
        start=("--batch=16", "--epochs=0.0865", "--lr=1e-5", "--warmup=2"),
        rl=(*RL, "--samples_per_prompt=8"),
        methods={
            "PPO": ("--lam=1",),
            "GRPO": ("--estimator=grpo",),
            "RLOO": ("--estimator=rloo",),
        },
        response_tokens=12,
    ),
    "larger": Task(
        start=(), rl=(*RL, "--samples_per_prompt=4"), methods={"RLOO": ("--estimator=rloo",)}, response_tokens=6
    ),
}


@dataclass(frozen=True)
class Config:
    init: str = "out/chat/base"  # chat model
    task: Literal["sorting", "larger"] = "sorting"  # three numbers to sort; is a larger than b?
    out: str = "out/sorting"  # the data, the runs and results.md; what is finished is kept
    seeds: tuple[int, ...] = (1, 2, 3)  # of each method
    iterations: int = 30  # of each run, 64 responses each
    control: int = 120  # steps of the control, 16 gold answers each: as many as 30 iterations have responses
    prompts: int = 128  # held out
    samples: int = 4  # to each of them
    threads: int = 1  # of every process

    def __post_init__(self):
        config.at_least(self, iterations=1, control=1, prompts=1, samples=1, threads=1)


def main() -> None:
    cfg = config.parse(Config)
    out, task = Path(cfg.out), TASKS[cfg.task]
    data, start = out / "data", out / "start" if task.start else Path(cfg.init)
    if not (data / "manifest.json").exists():
        run(cfg, "-m", "data.prepare", cfg.task, f"--tokenizer={cfg.init}", f"--out={data}")
    if task.start:
        run(cfg, "train_lm.py", f"--init={cfg.init}", f"--data={data}", f"--out={start}", *task.start)
    runs = {}
    for seed in cfg.seeds:  # the outer loop: an interrupted study has all methods
        for method, options in task.methods.items():
            runs[f"{method}, seed {seed}"] = place = out / f"{method.lower()}_{seed}"
            tokens = f"--response_tokens={task.response_tokens}"
            given = (f"--reward={REWARD}", f"--iterations={cfg.iterations}", tokens, *task.rl, *options)
            run(cfg, "train_ppo.py", f"--init={start}", f"--data={data}", f"--out={place}", *given, f"--seed={seed}")
        if task.start and seed == cfg.seeds[0]:
            runs[f"more SFT, seed {seed}"] = place = out / f"sft_{seed}"
            epochs = (cfg.control + 0.5) / (read_json(data / "card.json")["splits"]["train"]["rows"] // 16)
            given = (f"--epochs={epochs:.5f}", *task.start[:1], *task.start[2:], f"--seed={seed}")
            run(cfg, "train_lm.py", f"--init={start}", f"--data={data}", f"--out={place}", *given)
    given = (f"--prompts={cfg.prompts}", f"--samples={cfg.samples}", "--greedy=true", "--best_of=1", "--human_texts=32")
    tuned = ",".join(map(str, runs.values()))
    which = (f"--base={start}", f"--tuned={tuned}", f"--data={data}", f"--reward={REWARD}", f"--out={out}/evaluation")
    run(cfg, "evaluate.py", *which, *given, f"--response_tokens={task.response_tokens}")
    found = table(cfg, runs)
    write_text(out / "results.md", found)
    print(found)


def run(cfg: Config, *command: str) -> None:
    """A script to its end; it resumes by itself, and does nothing where it was finished."""
    print(" ".join(("python", *command)), flush=True)
    if command[0].endswith(".py"):
        command = (*command, "--precision=fp32")
    environment = os.environ | {"OMP_NUM_THREADS": str(cfg.threads)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with {done.returncode}")


def table(cfg: Config, runs: dict[str, Path]) -> str:
    """The held-out accuracy of every run beside the start's, and what the runs themselves say of their groups."""
    out = Path(cfg.out)
    summary = read_json(out / "evaluation" / "summary.json")
    found = summary["verifiable"]["reward"]
    names = {"start": "base"} | {name: spec for name, spec in zip(runs, evaluated(runs))}
    rows = []
    for name, spec in names.items():
        x, metrics = found[spec], read_lines(runs[name] / "metrics.jsonl") if name in runs else []
        groups = [1 - row["group/flat"] for row in metrics if "group/flat" in row]
        seconds = read_json(runs[name] / "report.json")["seconds"] if name in runs else None
        rows.append(
            [
                name,
                show(x["accuracy"]),
                show(x.get("rise")),
                show(x["greedy"]),
                f"{summary['rows'][spec]['kl']:.1f}",
                f"{statistics.mean(groups[:5]):.2f}, {statistics.mean(groups[-5:]):.2f}" if groups else "",
                f"{seconds:.0f}" if seconds else "",
            ]
        )
    header = ["run", "sampled", "rise", "greedy", "KL, nats", "mixed groups, first and last 5", "seconds"]
    return markdown_table(header, rows) + "\n\n" + means(runs, found)


def evaluated(runs: dict[str, Path]) -> list[str]:
    """The names that evaluate.py's tables give them."""
    return ["tuned"] if len(runs) == 1 else [*map(str, runs.values())]


def means(runs: dict[str, Path], found: dict[str, dict]) -> str:
    """Of every method the mean over its seeds, least and most of them."""
    by = {}
    for name, spec in zip(runs, evaluated(runs)):
        by.setdefault(name.rsplit(", ", 1)[0], []).append(found[spec])
    rows = []
    for method, seeds in by.items():
        row = [method]
        for what in ("accuracy", "greedy"):
            values = [x[what]["mean"] for x in seeds]
            row.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        rows.append(row)
    return markdown_table(["method", "sampled, mean of the seeds (least to most)", "greedy"], rows)


if __name__ == "__main__":
    config.run(main)
