"""Two published shapes on the small from-scratch model: a KL pinned at its target, and a proxy followed too far.

    python bench/reproductions.py                          # both; what is finished is kept
    python bench/reproductions.py --only=kl

kl: the adaptive coefficient of Ziegler et al. 2019 (arXiv:1909.08593, section 2.2), target 6 nats, as many seeds as asked for.
    n / horizon is theirs, 512 / 10,000 an update, and so are 4 epochs of 1 minibatch, the first coefficient, .15, and a reward
    at mean 0 and deviation 1 on the language model's own samples.
proxy: the curves of Gao et al. 2022 (arXiv:2210.10760). The proxy is a linear head on the frozen language model, fitted to few
    sentences of one half of the raters; gold is a whole model that learned all sentences from the other half. PPO without a KL
    penalty and best-of-n maximise the proxy; evaluate.py overoptimisation measures and fits both.
"""

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import small  # noqa: E402

import iterate  # noqa: E402
from evaluation.words import markdown_table  # noqa: E402
from rlhf.infra import config  # noqa: E402
from rlhf.infra.files import write_text  # noqa: E402

SHOWN = ("objective/kl", "objective/kl_coef", "objective/scores", "policy/approxkl", "policy/clipfrac")


@dataclass(frozen=True)
class Config:
    only: tuple[Literal["kl", "proxy"], ...] = ("kl", "proxy")  # what is run
    place: str = "out/tiny"  # the small models; made where they are missing
    out: str = "out/reproductions"  # the runs and tables; what is finished is kept
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # of the adaptive KL
    iterations: int = 300  # of these runs
    lr: float = 2e-4  # where their rate begins, which falls to 0
    target: float = 6.0  # nats per response
    labels: tuple[int, ...] = (64, 512)  # sentences that a proxy has seen
    proxy_iterations: int = 40  # of the run that follows it
    proxy_lr: float = 1e-3  # where its rate begins, which falls to 0

    def __post_init__(self):
        config.at_least(self, iterations=10, lr=0, target=0, proxy_iterations=8, proxy_lr=0)


def main() -> None:
    cfg = config.parse(Config)
    small.settle(Path(cfg.out), asdict(cfg), free=("only", "out", "seeds", "labels"))  # the last two name their runs
    small.prepare(Path(cfg.place))
    if "kl" in cfg.only:
        adaptive(cfg)
    for labels in cfg.labels if "proxy" in cfg.only else ():
        followed(cfg, labels)


def adaptive(cfg: Config) -> None:
    """A run a seed, and the mean [least, most] of the seeds along the way."""
    options = {
        "kl_control": "adaptive",
        "kl_target": cfg.target,
        "kl_horizon": 625,
        "batch": 32,
        "kl_coef": 0.15,
        "epochs": 4,
    }
    options |= {"minibatches": 1, "lr": cfg.lr, "critic": "separate", "iterations": cfg.iterations}
    place, out, curves = Path(cfg.place), Path(cfg.out), []
    for seed in cfg.seeds:
        rows = small.ppo(place, out / f"kl_{seed}", options | {"seed": seed})
        curves.append([[row[name] for name in SHOWN] for row in rows])
        tail = np.array(curves[-1])[-50:].mean(0)
        print(f"seed {seed}: KL {tail[0]:.2f}, kl_coef {tail[1]:.3f} over the last 50", flush=True)
    x = np.array(curves)  # (seeds, iterations, names)
    rows = []
    for end in [n for n in (10, 20, 30, 50, 75, 100, 150, 200, 300) if n <= cfg.iterations]:
        means = x[:, end - 10 : end].mean(1)  # (seeds, names)
        spread = zip(means.mean(0), means.min(0), means.max(0), (".2f", ".3f", ".2f", ".1e", ".1e"))
        rows.append([f"{end - 9} to {end}", *(f"{m:{f}} [{a:{f}}, {b:{f}}]" for m, a, b, f in spread)])
    text = markdown_table(["updates", *SHOWN], rows)
    write_text(out / "kl.md", text + "\n")
    print(text)


def followed(cfg: Config, labels: int) -> None:
    """A proxy of so many sentences, PPO against it with all checkpoints kept, and the fitted curves."""
    place, out = Path(cfg.place), Path(cfg.out)
    same = {"init": place / "lm", "data": place / "data", "precision": "fp32"}
    proxy, ppo, found = (out / f"{name}_{labels}" for name in ("proxy", "ppo", "overoptimisation"))
    options = {"trunk": "frozen", "sentences": labels, "labels": "half_a", "depths": (1, 2), "out": proxy}
    iterate.stage("proxy", proxy, iterate.script("train_rm.py", same | options))
    options = {
        "reward": proxy,
        "weak_reward": True,
        "kl_coef": 0.0,
        "critic": "separate",
        "lr": cfg.proxy_lr,
        "out": ppo,
    }
    options |= {"iterations": cfg.proxy_iterations, "checkpoint_every": 4, "keep_checkpoints": None}
    iterate.stage("PPO", ppo, iterate.script("train_ppo.py", same | options))
    options = {"run": ppo, "base": place / "lm", "proxy": proxy, "gold": place / "gold", "data": place / "data"}
    options |= {"out": found, "precision": "fp32", "plots": False, "prompts": 128}
    if not (found / "overoptimisation.md").exists():
        command = iterate.script("evaluate.py", options)
        command.insert(2, "overoptimisation")
        iterate.stage("measured", found, command)
    print(f"\nproxy of {labels} sentences\n{(found / 'overoptimisation.md').read_text()}")


if __name__ == "__main__":
    config.run(main, stopped="stopped; the same command keeps what is finished")
