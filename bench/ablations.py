"""What the field argues about, one change at a time: PPO on the small from-scratch model, several seeds each.

    python bench/ablations.py                              # about five minutes of one core; what is finished is kept
    python bench/ablations.py --only=baseline,critic       # those whose name begins so

Every run is train_ppo.py's loop in this process on the models of bench/small.py: PPO maximises a reward model of one half of
the raters, and the held-out prompts are then judged by a reward model of the other half (`gold`). The same prompts and random
numbers for all, so each variant is compared with the baseline prompt by prompt and seed by seed; the interval resamples
seeds and prompts. What is no option of train_ppo.py replaces one function of its loop, and stands here.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import small  # noqa: E402
from torch import Tensor  # noqa: E402

import train_ppo  # noqa: E402
from evaluation.words import markdown_table  # noqa: E402
from rlhf import rewards  # noqa: E402
from rlhf.infra import config  # noqa: E402
from rlhf.infra.files import read_json, read_lines, write_json, write_text  # noqa: E402
from rlhf.ppo import update  # noqa: E402
from rlhf.ppo.rollout import Experience  # noqa: E402

BASELINE = {"critic": "separate", "kl_coef": 0.1, "batch": 32, "lr": 1e-3}  # and the defaults of train_ppo.py
LAST = 10  # iterations that the training's own numbers are means of


def unwhitened(advantages: Tensor, mask: Tensor) -> Tensor:
    return advantages


def whitened_scores(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """Mean 0 and deviation 1 in every batch, after the penalty."""
    scores = rewards.missing_eos(scores, finished, penalty)
    return (scores - scores.mean()) / (scores.std() + 1e-8)


def per_response(output, batch: Experience, objective: update.Objective) -> tuple[Tensor, dict[str, Tensor]]:
    """Every response counts the same: the mean over its tokens, then over the responses, as GRPO's paper has it."""
    lengths = batch.mask.sum(1, keepdim=True)
    return LOSS(output, replace(batch, advantages=batch.advantages * lengths.float().mean() / lengths), objective)


LOSS = update.ppo_loss
NEW = contextlib.nullcontext


@dataclass(frozen=True)
class Variant:
    options: dict  # of train_ppo.py, beside BASELINE
    patch: Callable[[], contextlib.AbstractContextManager] = NEW  # around the run


def patch(module, **new) -> Callable[[], contextlib.AbstractContextManager]:
    return lambda: small.replaced(module, **new)


VARIANTS = {
    "baseline": Variant({}),
    "whitening: none": Variant({}, patch(train_ppo, whiten=unwhitened)),
    "value clip: none": Variant({"value_clip": None}),
    "critic: shared trunk": Variant({"critic": "shared"}),
    "values: on the reward's score": Variant({"value_base": "reward"}),
    "KL: k2 in the reward": Variant({"kl_estimator": "k2"}),
    "KL: k3 in the reward": Variant({"kl_estimator": "k3"}),
    "normalisation: per response": Variant({}, patch(update, ppo_loss=per_response)),
    "epochs: 1": Variant({"epochs": 1}),
    "epochs: 4": Variant({"epochs": 4}),
    "minibatches: 1": Variant({"minibatches": 1}),
    "minibatches: 16": Variant({"minibatches": 16}),
    "reward: times 3": Variant({"reward_scale": 3.0}),
    "reward and kl_coef: times 3": Variant({"reward_scale": 3.0, "kl_coef": 0.3}),
    "reward: whitened per batch": Variant({}, patch(train_ppo, missing_eos=whitened_scores)),
    "EOS penalty: 1": Variant({"eos_penalty": 1.0}),
}


@dataclass(frozen=True)
class Config:
    place: str = "out/tiny"  # the small models; made where they are missing
    out: str = "out/ablations"  # the runs, results.md and results.json; what is finished is kept
    seeds: tuple[int, ...] = (1, 2, 3)  # of each variant
    iterations: int = 20  # of a run, 32 responses each
    prompts: int = 128  # held out
    only: tuple[str, ...] = ()  # variants whose name begins so; none given = all

    def __post_init__(self):
        config.at_least(self, iterations=LAST, prompts=2)
        for start in self.only:
            if not any(name.startswith(start) for name in VARIANTS):
                raise ValueError(f"--only={start}: no variant begins so; they are {', '.join(VARIANTS)}")


def main() -> None:
    cfg = config.parse(Config)
    place, out = Path(cfg.place), Path(cfg.out)
    small.prepare(place)
    names = [name for name in VARIANTS if not cfg.only or any(map(name.startswith, cfg.only))]
    names = ["baseline", *(name for name in names if name != "baseline")]
    judges = small.Judges(place, cfg.prompts)
    for seed in cfg.seeds:  # the outer loop: an interrupted study has all variants
        for name in names:
            found = measured(cfg, judges, name, seed)
            print(f"{name}, seed {seed}: gold {np.mean(found['gold']):.3f}, KL {np.mean(found['kl']):.2f}", flush=True)
    base = judges.measure(place / "lm")
    rows = {name: [measured(cfg, judges, name, seed) for seed in cfg.seeds] for name in names}
    text = table(base, rows)
    write_text(out / "results.md", text + "\n")
    write_json(out / "results.json", {name: summary(rows["baseline"], runs) for name, runs in rows.items()})
    print(text)


def measured(cfg: Config, judges: small.Judges, name: str, seed: int) -> dict:
    """What a run came to, of a finished one from its files: per held-out prompt, and its own last iterations."""
    place, variant = Path(cfg.place), VARIANTS[name]
    run = Path(cfg.out) / f"{''.join(c if c.isalnum() else '_' for c in name)}_{seed}"
    options = {**BASELINE, "iterations": cfg.iterations, "seed": seed, **variant.options}
    if scale := options.pop("reward_scale", None):
        options["reward"] = f"{place / 'proxy'}:{scale}"
    if (kept := run / "options.json").exists() and (old := read_json(kept)) != options:
        name = next(name for name in {*options, *old} if old.get(name) != options.get(name))
        raise ValueError(f"{run} ran with {name}={old.get(name)}, this is {options.get(name)}: choose another --out")
    if not kept.exists():
        with variant.patch():
            small.ppo(place, run, options)
        write_json(kept, options)
    last = read_lines(run / "metrics.jsonl")[-LAST:]
    own = {key: np.mean([row[key] for row in last]) for key in ("value/explained_var", "policy/clipfrac")}
    own |= {"ends": np.mean([row["response/eos_rate"] for row in last])}
    return judges.measure(run) | own


def summary(baseline: list[dict], runs: list[dict]) -> dict:
    """Means over seeds and prompts, the seeds' own, and gold's difference to the baseline with its 95% interval."""
    gold, theirs = (np.stack([run["gold"] for run in x]) for x in (runs, baseline))  # (S, P)
    found = {key: float(np.mean([np.mean(run[key]) for run in runs])) for key in runs[0]}
    low, high = interval(gold - theirs)
    return found | {
        "gold_seeds": gold.mean(1).tolist(),
        "difference": float((gold - theirs).mean()),
        "low": low,
        "high": high,
    }


def interval(difference: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """95% of the mean of (S, P), seeds and prompts both drawn with replacement."""
    rng, (seeds, prompts) = np.random.default_rng(0), difference.shape
    which = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds  # (R, S)
    weight = rng.multinomial(prompts, np.full(prompts, 1 / prompts), resamples) / prompts  # (R, P)
    return tuple(np.quantile(((which @ difference) * weight).sum(1), [0.025, 0.975]).tolist())


def table(base: dict, rows: dict[str, list[dict]]) -> str:
    head = [
        "variant",
        "gold (seeds, least to most)",
        "to the baseline",
        "proxy",
        "judge",
        "KL, nats",
        "ends",
        "EV",
        "clipped",
    ]
    start = [f"{base[key].mean():.3f}" for key in ("gold", "proxy", "judge")]
    cells = [["the language model", start[0], "", *start[1:], "0", "", "", ""]]
    for name, runs in rows.items():
        x = summary(rows["baseline"], runs)
        least, most = min(x["gold_seeds"]), max(x["gold_seeds"])
        against = "" if name == "baseline" else f"{x['difference']:+.3f} [{x['low']:+.3f}, {x['high']:+.3f}]"
        cells.append(
            [name, f"{x['gold']:.3f} ({least:.3f} to {most:.3f})", against, f"{x['proxy']:.3f}", f"{x['judge']:.3f}"]
            + [f"{x['kl']:.2f}", f"{x['ends']:.2f}", f"{x['value/explained_var']:.2f}", f"{x['policy/clipfrac']:.3f}"]
        )
    return markdown_table(head, cells)


if __name__ == "__main__":
    config.run(main, stopped="stopped; the same command keeps what is finished")
