"""Over-optimisation, measured (Gao et al. 2022, arXiv:2210.10760): what a reward still means after it has been maximised.

PPO and best-of-n maximise the proxy; the gold reward, which neither of them saw, says what that was worth, against
d = sqrt(KL(policy || base)). Train the two on disjoint halves of the raters, and let PPO keep its checkpoints:

python train_rm.py --labels=half_a --out=out/rm_a
python train_rm.py --labels=half_b --out=out/rm_b
python train_ppo.py --reward=out/rm_a --kl_coef=0.02 --keep_checkpoints=none --out=out/ppo
python evaluate.py overoptimisation --run=out/ppo --proxy=out/rm_a --gold=out/rm_b --out=out/overoptimisation
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from data.tokenizer import check_fingerprint, load_tokenizer
from evaluation.card import can_draw
from evaluation.held_out import held_out_prompts, measured, sample_groups
from evaluation.words import Table, as_json, markdown_table, show
from model.generate import Sampling
from model.half import store
from rlhf.infra import checkpoint, config, distributed, run
from rlhf.infra.files import read_json, write_json, write_text
from rlhf.infra.precision import PrecisionName, chosen
from rlhf.lm.pretrained import open_pretrained
from rlhf.overoptimisation import CURVES, resampled_means
from rlhf.ppo.roles import logprobs_of, reference_on
from rlhf.reward.scorer import open_scorer, scorer_of
from rlhf.statistics import best_of_n, best_of_n_kl


@dataclass(frozen=True)
class Config:
    run: str = "out/ppo"  # PPO run; all its checkpoints are measured (train_ppo.py --keep_checkpoints=none keeps all)
    base: str = "out/lm"  # language model that it started from; best-of-n chooses among its samples
    proxy: str = "out/rm_a"  # the reward that PPO maximised and best-of-n chooses by: a directory, or file.py:function
    gold: str = "out/rm_b"  # the reward that says what it was worth: a reward model, data, or file.py:function
    data: str = "out/data/vader"  # directory made by data.prepare
    split: Literal["validation", "test"] = "test"  # where the prompts come from
    out: str = "out/overoptimisation"  # directory for overoptimisation.json, .md and .png
    prompts: int = 256  # held-out prompts, of the kind that the run was trained on
    best_of: int = 64  # samples per prompt of the base; best-of-n is reported for n = 2, 4, 8 ... up to this
    seed: int = 7  # of prompts and samples; all models draw with the same random numbers
    precision: PrecisionName = "auto"  # of matrix products; auto = bf16 where that is fast, else fp32
    plots: bool | None = None  # draw the plot, which needs matplotlib; none = if it is installed

    def __post_init__(self):
        config.at_least(self, prompts=2, best_of=4, seed=0)


def main() -> None:
    cfg = config.parse(Config)
    device = distributed.setup().device
    torch.set_grad_enabled(False)
    drawn = can_draw(cfg.plots)

    # 1. read: base and rewards, and how the run sampled
    steps, settings = checkpoint.steps(cfg.run), read_settings(cfg)
    tokenizer = load_tokenizer(cfg.data)
    opened = open_pretrained(cfg.base, device)
    check_fingerprint(tokenizer.fingerprint, opened.tokenizer.fingerprint, cfg.base)
    check_same(cfg, settings, opened.digest, len(steps))
    cfg, dtype = chosen(cfg, device)
    base = store(opened.model.eval().requires_grad_(False), dtype)
    how = {name: settings[name] for name in PROMPTS} | {"context": base.config.context}
    asked = held_out_prompts(cfg.data, cfg.split, cfg.prompts, cfg.seed, tokenizer, **how)
    opening = dict(tokenizer=tokenizer, device=device, base=opened, records=asked.records, template=asked.template)
    temperature, stop_ids = settings["temperature"], tuple(sorted({*opened.stop_ids, *asked.stop_ids}))
    reference, frozen = reference_on(base, temperature)
    opening |= {"dtype": dtype, "frozen": frozen}
    judges = {"proxy": open_scorer(cfg.proxy, **opening), "gold": open_scorer(cfg.gold, **opening, data=cfg.data)}
    judges = {name: scorer.score for name, scorer in judges.items()}
    prompts = asked.prompts.to(device), asked.lengths.to(device)
    sampling = Sampling(settings["response_tokens"], stop_ids, tokenizer.pad, temperature)

    # 2. best-of-n: one pool of samples of the base gives every n
    pool = sample_groups(base, *prompts, cfg.best_of, sampling, cfg.seed)
    pool, _ = measured(pool, judges, asked.rows, cfg.best_of)
    points = []
    for n in powers_of_two(cfg.best_of):
        means = {name: best_of_n(pool["proxy"], x, n) for name, x in pool.items()}  # (P,) each
        gains = {f"{name}_gain": x - pool[name].mean(1) for name, x in means.items()}
        kl = np.full(len(pool["proxy"]), best_of_n_kl(n))
        points.append({"curve": "best_of_n", "name": f"best of {n}", "kl": kl, **means, **gains})

    # 3. PPO: every checkpoint answers the same prompts, with the random numbers of the pool's first samples
    for path in tqdm(steps, desc="checkpoints", leave=False, disable=None):
        opened = open_pretrained(path, device, near=(cfg.base,)).model.eval()
        policy = store(opened.requires_grad_(False), dtype)
        groups = sample_groups(policy, *prompts, 1, sampling, cfg.seed)
        earned, moved = measured(groups, judges, asked.rows, logprobs=(logprobs_of(policy, temperature), reference))
        means = {name: x[:, 0] for name, x in earned.items()}
        gains = {f"{name}_gain": x - pool[name][:, 0] for name, x in means.items()}
        done = checkpoint.load(path).state["done"]
        points.append({"curve": "ppo", "name": f"PPO, {done} iterations", "kl": moved["kl"], **means, **gains})

    # 4. fit, and report
    before = {name: x.mean(1) for name, x in pool.items()}
    rows = [
        point(row) for row in [{"curve": None, "name": "base", "kl": np.zeros(len(pool["gold"])), **before}, *points]
    ]
    result = {
        "rows": rows,
        "fits": {name: fit(name, [row for row in points if row["curve"] == name]) for name in CURVES},
        "prompts": len(pool["gold"]),
        "options": asdict(cfg),
        "sampling": settings,
        "seconds": run.seconds_used(),
    }
    write(Path(cfg.out), result, drawn)
    if not drawn and cfg.plots is None:
        print("no plot: matplotlib is not installed (the extra plot has it)")


PROMPTS = ("sources", "prompt_tokens", "max_prompt", "long_prompts", "response_tokens")  # options of train_ppo.py


def read_settings(cfg: Config) -> dict:
    """What run.json says about the run's prompts and samples, and by which reward and base it was trained."""
    path = Path(cfg.run) / "run.json"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: --run is the directory of a PPO run, see train_ppo.py")
    options, names = read_json(path), (*PROMPTS, "temperature", "kl_coef", "init_sha256", "reward_sha256")
    if missing := [name for name in names if name not in options]:
        raise ValueError(
            f"{path} says nothing about {missing[0]}: --run is the directory of a PPO run, see train_ppo.py"
        )
    return {name: options[name] for name in names}


def check_same(cfg: Config, settings: dict, base_digest: str, checkpoints: int) -> None:
    """ValueError unless base and proxy are those of the run, and a curve can go through its checkpoints."""
    for option, ours, theirs in (
        ("base", base_digest, settings["init_sha256"]),
        ("proxy", scorer_of(cfg.proxy).digest, settings["reward_sha256"]),
    ):
        if ours != theirs:
            spec = getattr(cfg, option)
            raise ValueError(f"--{option}={spec} has sha256 {ours[:12]}, {cfg.run} was trained with {theirs[:12]}")
    if checkpoints < 2:
        raise ValueError(
            f"{cfg.run} has {checkpoints} checkpoint(s), a curve needs at least 2: train it with --keep_checkpoints=none"
        )


def powers_of_two(most: int) -> list[int]:
    """2, 4, 8 ... up to `most`."""
    return [2**k for k in range(1, most.bit_length())]


def distance(kl: np.ndarray) -> np.ndarray:
    """d = sqrt(KL). The mean of k1 may be a little below 0 where the policy has hardly moved: that counts as 0."""
    return np.sqrt(np.maximum(kl, 0))


def point(row: dict) -> dict:
    """A row of the table: means over prompts, each with its 95% bootstrap interval."""
    names = [name for name in ("kl", "proxy", "gold", "proxy_gain", "gold_gain") if name in row]
    means = resampled_means(np.stack([row[name] for name in names]))
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    cells = {name: as_json(row[name].mean(), a, b, "value") for name, a, b in zip(names, low, high)}
    return {"curve": row["curve"], "name": row["name"], "d": float(distance(row["kl"].mean())), **cells}


def fit(name: str, measured: list[dict]) -> dict | None:
    """The curve's alpha and beta through the gold gains, where it peaks, with 95% bootstrap intervals over prompts.

    Every resample of the prompts moves KL and gain of all points together, and is fitted anew; one in which fewer than two
    points have a KL of their own fits nothing and is left out. None where that is so of the points themselves.
    """
    curve = CURVES[name]
    kl, gain = (np.stack([row[key] for row in measured]) for key in ("kl", "gold_gain"))  # (K, P) each
    d, gains = distance(kl.mean(1)), gain.mean(1)
    alpha, beta = curve.fit(d, gains)
    if np.isnan(alpha):  # the run has hardly learned
        return None
    means = resampled_means(np.concatenate([kl, gain]))  # (B, 2K)
    alphas, betas = curve.fit(distance(means[:, : len(kl)]), means[:, len(kl) :])
    alphas, betas = alphas[~np.isnan(alphas)], betas[~np.isnan(alphas)]
    peak, peaks = curve.peak_of(alpha, beta), curve.peak_of(alphas, betas)
    rms = np.sqrt(np.mean((curve.gain(d, alpha, beta) - gains) ** 2))
    return {
        "alpha": with_interval(alpha, alphas),
        "beta": with_interval(beta, betas),
        "peak_d": with_interval(peak, peaks),  # null: no end of it, R(d) does not fall
        "peak_kl": finite(peak**2),
        "peak_gain": float(curve.gain(peak, alpha, beta)) if np.isfinite(peak) else None,
        "largest_d": float(d.max()),  # a peak beyond it is an extrapolation
        "rms_error": float(rms),
    }


def with_interval(value: np.ndarray, resampled: np.ndarray) -> dict:
    """Quantiles that are some resample's value: infinity has no mean with its neighbour."""
    low, high = np.quantile(resampled, [0.025, 0.975], method="inverted_cdf")
    return as_json(value, low, high, "value")


def finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def write(out: Path, result: dict, drawn: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    files = ["overoptimisation.json", "overoptimisation.md"]
    if drawn:
        draw(result, out / "overoptimisation.png")
        files.append("overoptimisation.png")
    tables = points_table(result["rows"]), fits_table(result["fits"])
    text = "\n\n".join(markdown_table(*table, rule="---") for table in tables)
    write_json(out / files[0], result)
    write_text(out / files[1], text + "\n")
    print(text)
    print(f"\n{result['seconds']:.0f} s -> {out}: {', '.join(files)}")


def points_table(points: list[dict]) -> Table:
    rows = []
    for row in points:
        sign = "<= " if row["curve"] == "best_of_n" else ""
        cells = [f"{sign}{row['kl']['value']:.2f}", f"{row['d']:.2f}", *(show(row[name]) for name in ("proxy", "gold"))]
        cells.append(show(row["gold_gain"]) if "gold_gain" in row else "-")
        rows.append([row["name"], *cells])
    return Table(["policy", "KL, nats", "d", "proxy", "gold", "gold, gain"], rows)


def fits_table(fits: dict[str, dict | None]) -> Table:
    formulas = {"best_of_n": "best of n: d (alpha - beta d)", "ppo": "PPO: d (alpha - beta log d)"}
    columns = ("alpha", "beta", "gold peaks at d", "KL there, nats", "gain there", "rms error of the fit")
    rows = []
    for name, x in fits.items():
        if x is None:
            rows.append([formulas[name], "fewer than two different KL: no curve", *["-"] * (len(columns) - 1)])
            continue
        peak = x["peak_d"]["value"]
        beyond = (
            "" if peak is None or peak <= x["largest_d"] else f", beyond the largest measured, {x['largest_d']:.2f}"
        )
        cells = [*(show(x[key], null=math.inf) for key in ("alpha", "beta")), show(x["peak_d"], null=math.inf) + beyond]
        cells += ["-" if x[key] is None else f"{x[key]:.2f}" for key in ("peak_kl", "peak_gain")]
        rows.append([formulas[name], *cells, f"{x['rms_error']:.3f}"])
    return Table(["gold gain", *columns], rows)


def draw(result: dict, file: Path) -> None:
    """Proxy and gold gain against d, points with their intervals, and the fitted curve of the gold gain."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for ax, (name, x), title in zip(figure.subplots(1, 2, sharey=True), result["fits"].items(), ("best of n", "PPO")):
        rows = [row for row in result["rows"] if row["curve"] == name]
        for key, color in (("proxy_gain", "tab:gray"), ("gold_gain", "tab:orange")):
            value, low, high = (np.array([row[key][k] for row in rows]) for k in ("value", "low", "high"))
            errors = np.stack([value - low, high - value]).clip(min=0)
            label = key.removesuffix("_gain")
            ax.errorbar([row["d"] for row in rows], value, errors, fmt="o", capsize=2, color=color, label=label)
        if x is not None:
            d = np.linspace(0, x["largest_d"], 200)
            curve = CURVES[name].gain(d, x["alpha"]["value"], x["beta"]["value"])
            ax.plot(d, curve, color="tab:orange", label="fit to gold")
        ax.set(title=title, xlabel="sqrt(KL(policy || base)), KL in nats", ylabel="reward, gain over the base")
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(file, dpi=120)
