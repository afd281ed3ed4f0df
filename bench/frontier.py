"""DPO beside PPO and best-of-n on one frontier of reward against KL (the form of figure 2 of arXiv:2305.18290).

    python bench/frontier.py --base=out/demo/base --data=out/demo/data --reward=out/demo/rm --out=out/frontier

The reward is the one judge of all: it decides pairs of the base's own answers to training prompts, as a Bradley-Terry rater
with the noise that was fitted to people (DPO learns from these, `--betas`), it is what PPO maximises (`--kl_coefs`), and it
chooses among the base's samples (best-of-n). The judge of the data saw none of it. All answer the same held-out prompts with
the same random numbers. What is finished is kept and not run again; python evaluate.py report --run=OUT draws the curves.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import iterate  # noqa: E402
from rlhf.feedback.store import FeedbackStore  # noqa: E402
from rlhf.infra import config  # noqa: E402

SHARED = {"layout": "branch", "branch_layers": 4, "warmup": 5}


@dataclass(frozen=True)
class Config:
    base: str = "out/demo/base"  # language model: the reference of both, and what is sampled from
    data: str = "out/demo/data"  # directory made by data.prepare, which brings a judge
    reward: str = "out/demo/rm"  # decides the pairs, and is maximised
    out: str = "out/frontier"  # the runs and evaluation/results.md; what is finished is kept
    sources: tuple[str, ...] = ("film",)  # prompts from these sources of the data alone; none given = all
    pairs: int = 1024  # of the base's answers, to different prompts
    betas: tuple[float, ...] = (0.02, 0.1, 0.5)  # of DPO, a run each
    kl_coefs: tuple[float, ...] = (0.02, 0.05, 0.2)  # of PPO, a run each
    iterations: int = 21  # of PPO, 32 responses each
    epochs: float = 2.0  # of DPO
    lr: float = 1e-4  # of DPO
    prompts: int = 256  # held out
    best_of: int = 16  # of the base
    seed: int = 1  # of prompts, samples, votes and training

    def __post_init__(self):
        config.at_least(self, pairs=32, iterations=1, epochs=0, lr=0, prompts=1, best_of=1, seed=0)
        if not (self.betas and self.kl_coefs):
            raise ValueError("name at least one of --betas and one of --kl_coefs")


def main() -> None:
    cfg = config.parse(Config)
    out = Path(cfg.out)
    pairs, runs = preferences(cfg), []
    same = {"init": cfg.base, "seed": cfg.seed, **SHARED}
    for beta in cfg.betas:
        runs.append(out / f"dpo_{beta}")
        options = {"data": pairs, "out": runs[-1], "beta": beta, "epochs": cfg.epochs, "lr": cfg.lr}
        iterate.stage(f"DPO, beta {beta}", runs[-1], iterate.script("train_dpo.py", same | options))
    for coef in cfg.kl_coefs:
        runs.append(out / f"ppo_{coef}")
        options = {"data": cfg.data, "out": runs[-1], "reward": cfg.reward, "sources": cfg.sources}
        options |= {"kl_coef": coef, "iterations": cfg.iterations, "batch": 32}
        iterate.stage(f"PPO, kl_coef {coef}", runs[-1], iterate.script("train_ppo.py", same | options))
    options = {"base": cfg.base, "tuned": ",".join(map(str, runs)), "reward": cfg.reward, "data": cfg.data}
    options |= {"out": out / "evaluation", "sources": cfg.sources, "prompts": cfg.prompts, "best_of": cfg.best_of}
    iterate.stage("evaluation", out / "evaluation", iterate.script("evaluate.py", options))
    print((out / "evaluation" / "results.md").read_text())


def preferences(cfg: Config) -> Path:
    """Prepared pairs of the base's answers, which the reward has decided."""
    here = Path(cfg.out) / "round_1"
    here.mkdir(parents=True, exist_ok=True)
    asked = {"sources": cfg.sources, "pairs": cfg.pairs, "seed": cfg.seed, "rater": cfg.reward}
    loop = iterate.Config(init=cfg.base, data=cfg.data, out=cfg.out, **asked)
    iterate.sample_pairs(loop, 1, cfg.base)
    iterate.collect(loop, 1, FeedbackStore(Path(cfg.out) / "feedback.sqlite", cfg.seed))
    iterate.stage("pairs", here / "data", iterate.votes_command(loop, here))
    return here / "data"


if __name__ == "__main__":
    config.run(main)
