"""Keep a run of ours for others to compare with: its curves, its evaluation, and what it was made by and on.

    make quick SEED=1 QUICK=out/quick-1
    python bench/reference.py --run=out/quick-1 --command="make quick SEED=1" --out=results/quick/seed_1

Right after the run, on its machine and at its commit. python evaluate.py compare RUN results/quick reads it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import figures  # noqa: E402

from evaluation.band import run_of  # noqa: E402
from rlhf.infra import config  # noqa: E402
from rlhf.infra.files import read_json, write_json, write_lines  # noqa: E402

LEFT_OUT = ("time/", "perf/")  # metrics of the machine
DIGITS = 5  # significant, of every number


@dataclass(frozen=True)
class Config:
    run: str  # directory with one PPO run, and the evaluation of it
    command: str  # that made it
    out: str  # where it is kept, under results/NAME/


def main() -> None:
    cfg = config.parse(Config)
    source, summary = run_of(cfg.run)
    if not summary:
        raise ValueError(f"--run={cfg.run} has no summary.json: evaluate the run first")
    out, options = Path(cfg.out), source.files["run.json"]
    for file in sorted(out.parent.glob("*/run.json")):
        kept = read_json(file)
        if file.parent != out and all(kept.get(name) == options.get(name) for name in ("seed", "precision")):
            raise ValueError(
                f"{file.parent} is seed {options.get('seed')} already, and a band needs different ones: another --seed"
            )
    rows = source.files["metrics.jsonl"]
    kept = [{name: x for name, x in row.items() if not name.startswith(LEFT_OUT)} for row in rows]
    write_lines(out / "metrics.jsonl", map(short, kept))
    write_json(out / "run.json", options)
    write_json(out / "summary.json", short(summary))
    write_json(out / "machine.json", {"command": cfg.command, **figures.machine(), "seconds": summary["seconds"]})
    print(f"{len(rows)} iterations, {sum(x.stat().st_size for x in out.iterdir()) / 1000:.0f} kB -> {out}")


def short(x):
    """Numbers of DIGITS digits."""
    if isinstance(x, dict):
        return {name: short(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [short(value) for value in x]
    return float(f"{x:.{DIGITS}g}") if isinstance(x, float) else x


if __name__ == "__main__":
    config.run(main)
