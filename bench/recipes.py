"""Reward-model recipes side by side: pooling x objective x initialisation, several seeds each, on the human ratings.

    python bench/recipes.py --init=out/scratch/lm --data=out/scratch/data

Every run is train_rm.py in a process of its own, then its report card (evaluate.py rm) on the whole test split. All recipes
of the from-scratch trunk read the same number of texts: a step of pairs reads two per pair, and there are more pairs than
sentences. Accuracy at a rating gap above 1: mean over the seeds, least and most of them, and the mean of their 95% bootstrap
intervals over sentences; then CPU seconds and the largest resident memory of a training process. What is finished is kept
and not run again; a run of other options in its place is refused.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from data.loader import open_data  # noqa: E402
from data.pairs import MOST_TRAINING_PAIRS, SomeAnswers  # noqa: E402
from rlhf.infra import config  # noqa: E402
from rlhf.infra.files import write_json  # noqa: E402

RECIPES: dict[str, dict[str, object]] = {
    "regression, mean": {},
    "regression, last": {"pooling": "last"},
    "regression, attention": {"pooling": "attention"},
    "pairs, mean": {"objective": "pairs"},
    "joint, mean": {"objective": "joint"},
    "regression, mean, random weights": {"reset": True},
}


@dataclass(frozen=True)
class Config:
    init: str = "out/scratch/lm"  # language model that the trunks start from
    data: str = "out/scratch/data"  # directory made by data.prepare
    out: str = "out/recipes"  # the runs; finished ones are kept
    seeds: tuple[int, ...] = (1, 2, 3)  # of each recipe
    epochs: float = 1.0  # passes over the ratings, of the recipes that read ratings

    def __post_init__(self):
        config.at_least(self, epochs=0)


def main() -> None:
    cfg = config.parse(Config)
    ratings = SomeAnswers(open_data(cfg.data, "train"), most_pairs=MOST_TRAINING_PAIRS)
    # texts per step and epoch: a rating is one text, a pair two
    share = {"regression": 1.0, "pairs": len(ratings) / (2 * ratings.pairs)}
    share["joint"] = share["pairs"]
    found = {name: [] for name in RECIPES}
    for seed in cfg.seeds:  # the outer loop: an interrupted study has all recipes
        for name, options in RECIPES.items():
            epochs = cfg.epochs * share[str(options.get("objective", "regression"))]
            found[name].append(measure(cfg, name, {**options, "epochs": epochs, "seed": seed}))
            print(f"{name}, seed {seed}: {json.dumps(found[name][-1])}", flush=True)
    table(found)


def measure(cfg: Config, name: str, options: dict[str, object]) -> dict[str, float]:
    """One run of one recipe: accuracy at gap > 1 with its interval, CPU seconds and peak GB of its training."""
    out = Path(cfg.out) / f"{name.replace(', ', '_').replace(' ', '_')}_{options['seed']}"
    options = {"init": cfg.init, "data": cfg.data, **options}
    if (finished := out / "measured.json").exists():
        ran = json.loads((out / "run.json").read_text())
        for key, value in options.items():
            if ran[key] != value:
                raise ValueError(f"{out} was run with {key}={ran[key]}, this study has {value}: choose another --out")
        return json.loads(finished.read_text())
    given = [f"--{key}={config.show(value)}" for key, value in options.items()]
    command = [sys.executable, "train_rm.py", f"--out={out}", *given]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise ValueError(f"{' '.join(command[1:])} ended with {code}")
    command = [sys.executable, "evaluate.py", "rm", f"--model={out}", f"--data={cfg.data}"]
    if code := subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode:
        raise ValueError(f"{' '.join(command[1:])} ended with {code}")
    accuracy = json.loads((out / "card.json").read_text())["accuracy"]["1"]
    found = {name: accuracy[name] for name in ("value", "low", "high")}
    found |= {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_gb": usage.ru_maxrss * 1024 / 1e9}
    write_json(finished, found)
    return found


def table(found: dict[str, list[dict[str, float]]]) -> None:
    print("\n| recipe | gap > 1 | seeds | 95% interval | CPU s | peak GB |\n|---|---|---|---|---|---|")
    for name, runs in found.items():
        mean = {key: np.mean([row[key] for row in runs]) for key in runs[0]}
        seeds = [row["value"] for row in runs]
        print(
            f"| {name} | {mean['value']:.3f} | {min(seeds):.3f} to {max(seeds):.3f} | "
            f"[{mean['low']:.3f}, {mean['high']:.3f}] | {mean['cpu_seconds']:.0f} | {mean['peak_gb']:.2f} |"
        )


if __name__ == "__main__":
    config.run(main)
