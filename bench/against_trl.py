"""Learning curves beside TRL 1.12: PPO, GRPO or RLOO on one model, reward, prompts, hyper-parameters and conventions.

    python bench/against_trl.py                       # needs the extra "compare" (trl 1.12, its last with PPO)
    python bench/against_trl.py --trainer=grpo --out=out/against_grpo
    python bench/against_trl.py --trainer=rloo --out=out/against_rloo --epochs=1 --minibatches=1

PPO has four sides. `trl` is PPOTrainer as it is, sampling included; `ours` is train_ppo.py with the options that
TRL's conventions ask for: critic apart and from the language model, AdamW with eps 1e-8, the gradient not clipped, the rate
falling linearly from the first iteration. Three conventions are no options, and `ours, patched` has them (`Conventions` below):

    the slot after EOS    where there is room, TRL pays the score s one slot after EOS, and that slot has a value:
                          A_EOS = r + lam s + (1 - lam) V(after EOS) - V(EOS), where ours is r + s - V(EOS); that value
                          is trained, the slot's log-prob is not, and the two losses divide by their own number of tokens
    the first epoch       is shuffled too
    a padding token       that the policy draws ends a response for TRL, and is never trained; for us it is a token like others.
                          Of these two sides neither draws one: the likeliest token takes its place

`trl, our numbers` is PPOTrainer drawing its responses from its own logits by our uniforms. It and `ours, patched` then see
the same prompts, responses and minibatches, so every number of every iteration must agree. These two are in float64: in
float32 rounding, which AdamW makes large where gradients are small, decides about a token from the second iteration on. So
`ours, patched` are also three further seeds of TRL's algorithm. Scores are after the EOS penalty, as TRL logs them. What is
finished is kept.

For GRPO and RLOO `trl` and `ours` are compared over the seeds, and the other two sides step by step (`GroupConventions`): both
epochs see the same minibatches, GRPO's eps is 1e-4, and RLOO's loss is a mean over responses instead of tokens.
"""

import contextlib
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import small  # noqa: E402
import torch  # noqa: E402
import trl_sides  # noqa: E402
from torch import Tensor  # noqa: E402

import train_ppo  # noqa: E402
from evaluation.words import markdown_table  # noqa: E402
from model import generate  # noqa: E402
from rlhf.advantages import ESTIMATORS, grpo  # noqa: E402
from rlhf.functional import masked_sum, whiten  # noqa: E402
from rlhf.infra import config, distributed, optim  # noqa: E402
from rlhf.infra.files import read_lines, write_lines, write_text  # noqa: E402
from rlhf.losses import value_loss  # noqa: E402
from rlhf.ppo import update  # noqa: E402
from rlhf.ppo.rollout import Experience, Rollout, judge  # noqa: E402
from rlhf.reward.bridge import open_reader  # noqa: E402
from rlhf.reward.scorer import unnamed  # noqa: E402

BLOCK = 5  # iterations whose mean a band is about
SHOWN = (1, 2, 3, 5, 10, 15, 20, 25)  # iterations of the step-by-step table
SAME = {  # our name of a number: TRL's, by its PPOTrainer
    "objective/scores": "objective/scores", "objective/kl": "objective/kl", "loss/policy": "loss/policy_avg",
    "loss/value": "loss/value_avg", "policy/clipfrac": "policy/clipfrac_avg",
}  # fmt: skip
SAME_IN_GROUPS = {  # RLOO logs another loss: of responses, and 0 where no ratio has left 1
    "grpo": ("objective/scores", "loss/policy", "policy/clipfrac", "policy/entropy"),
    "rloo": ("objective/scores", "policy/entropy"),
}


@dataclass(frozen=True)
class Config:
    trainer: Literal["ppo", "grpo", "rloo"] = "ppo"  # TRL's, and our estimator
    place: str = "out/tiny"  # the small models; made where they are missing
    out: str = "out/against_trl"  # the runs and results.md; what is finished is kept
    seeds: tuple[int, ...] = (1, 2, 3)  # of samples, prompts and minibatches
    pairs: int = 1  # of the seeds that TRL also runs on our random numbers
    iterations: int = 25  # of a run
    batch: int = 32  # responses of an iteration
    group: int = 8  # responses to a prompt, of GRPO and RLOO
    epochs: int = 2  # passes over an iteration's responses
    minibatches: int = 2  # optimiser steps of an epoch
    lr: float = 1e-3  # of AdamW
    kl_coef: float = 0.05  # of PPO; GRPO and RLOO run without a KL, of which they have other forms
    eos_penalty: float = 1.0  # of a response that did not end
    clip: float = 0.2  # of the ratio
    value_clip: float = 0.2  # of the value
    value_coef: float = 0.1  # of the value loss
    lam: float = 0.95  # of GAE

    def __post_init__(self):
        config.at_least(
            self, pairs=0, iterations=1, batch=1, group=2, epochs=1, minibatches=1, lr=0, kl_coef=0, eos_penalty=0
        )


def main() -> None:
    cfg = config.parse(Config)
    out, place = Path(cfg.out), Path(cfg.place)
    small.prepare(place, gold=False)
    small.settle(out, asdict(cfg), free=("seeds", "out", "pairs"))
    sides = ("trl", "ours", "ours, patched") if cfg.trainer == "ppo" else ("trl", "ours")
    found = curves(cfg, place, out, sides, cfg.seeds)
    tables = [bands(found, name) for name in ("objective/scores", "objective/kl") if name in found["trl"][0][0]]
    pair = curves(cfg, place, out, ("trl, our numbers", "ours, patched"), cfg.seeds[: cfg.pairs])
    tables.append(step_by_step(*pair.values(), SAME_IN_GROUPS.get(cfg.trainer, SAME)))
    text = "\n\n".join(tables)
    write_text(out / "results.md", text + "\n")
    print(text)


def curves(cfg: Config, place: Path, out: Path, sides: tuple[str, ...], seeds) -> dict[str, list[list[dict]]]:
    """The curve of every side and seed."""
    found: dict[str, list[list[dict]]] = {side: [] for side in sides}
    for seed in seeds:  # the outer loop: an interrupted study has all sides
        for side in sides:
            found[side].append(
                curve(cfg, place, out / f"{side.replace(', ', '_').replace(' ', '_')}_{seed}", side, seed)
            )
            last = [row["objective/scores"] for row in found[side][-1][-BLOCK:]]
            print(f"{side}, seed {seed}: score of the last {BLOCK} iterations {np.mean(last):.3f}", flush=True)
    return found


def curve(cfg: Config, place: Path, out: Path, side: str, seed: int) -> list[dict]:
    """A number per name and iteration, under our names."""
    if not (file := out / "curve.jsonl").exists():
        rows = they(cfg, place, side, seed) if side.startswith("trl") else we(cfg, place, out, side, seed)
        out.mkdir(parents=True, exist_ok=True)
        write_lines(file, rows)
    return read_lines(file)


def options_of(cfg: Config, seed: int) -> dict:
    """Of train_ppo.py: TRL's conventions as far as they are options."""
    same = {"iterations": cfg.iterations, "batch": cfg.batch, "epochs": cfg.epochs, "minibatches": cfg.minibatches}
    same |= {"lr": cfg.lr, "warmup": 0, "adam_eps": 1e-8, "grad_clip": 0.0, "clip": cfg.clip, "seed": seed}
    same |= {"eos_penalty": cfg.eos_penalty, "reward": str(Path(cfg.place) / "proxy_hf"), "max_ratio": None}
    if cfg.trainer != "ppo":
        group = {"estimator": cfg.trainer, "samples_per_prompt": cfg.group, "kl_coef": 0.0, "decay": "constant"}
        return same | group
    own = {"layout": "full", "critic": "separate", "kl_coef": cfg.kl_coef, "lam": cfg.lam}
    return same | own | {"value_clip": cfg.value_clip, "value_coef": cfg.value_coef}


def we(cfg: Config, place: Path, out: Path, side: str, seed: int) -> list[dict]:
    options = options_of(cfg, seed)
    if side == "ours":
        rows = small.ppo(place, out, options)
    else:
        trls = (Conventions if cfg.trainer == "ppo" else GroupConventions)(seed)
        with contextlib.ExitStack() as stack:
            for module, changes in trls.changes(cfg.trainer):
                stack.enter_context(small.replaced(module, **changes))
            rows = small.ppo(place, out, options, trls.changed)
    penalties = [cfg.eos_penalty * row["response/truncated_rate"] for row in rows]
    return [row | {"objective/scores": row["objective/scores"] - x} for row, x in zip(rows, penalties)]


def they(cfg: Config, place: Path, side: str, seed: int) -> list[dict]:
    settings = small.config_of(place, Path(cfg.out), options_of(cfg, seed))
    dist = distributed.setup()
    cast = train_ppo.open_cast(settings, dist, optim.amp(dist.device, "fp32"))
    prompts = torch.cat([cast.act.prompts.batch(i).prompts for i in range(cfg.iterations)])
    shared = side != "trl"
    if cfg.trainer != "ppo":
        reward = (Conventions(seed).changed(cast) if shared else cast).reward
        return trl_sides.grouped(cfg, place, seed, prompts, reward.score, shared)
    rows = trl_sides.ppo(cfg, place, seed, prompts, shared)
    return [{ours: row[theirs] for ours, theirs in SAME.items()} for row in rows]


class Conventions:
    """Of TRL's PPOTrainer, where they are no options of ours: functions of the loop in place of others."""

    def __init__(self, seed: int):
        self.order = np.random.RandomState(seed)
        self.pad, self.slot = 0, torch.zeros(0)  # of the tokenizer; (B, T) bool, where the score is paid

    def changes(self, trainer: str) -> list[tuple]:
        """(module, its names that are others) within a run."""
        loop = {"judge": self.judge, "whiten": self.whiten, "minibatches": self.minibatches}
        return [(train_ppo, loop), (update, {"ppo_loss": self.loss}), (generate, {"draw": self.draw})]

    def changed(self, cast: train_ppo.Cast) -> train_ppo.Cast:
        """All models in float64; and the self-check knows nothing of the slot."""
        self.pad = cast.tokenizer.pad
        cast.roles.policy.double()
        cast.roles.frozen.model.double()
        model = open_reader(cast.reward.spec).model.double()
        reward = replace(
            cast.reward, components=unnamed(lambda tokens, lengths, mask, _: model.score(tokens, lengths, mask))
        )
        return replace(cast, reward=reward, check_once=lambda *_, **__: None)

    def judge(self, samples, policy, reference, score, micro_batch, width, *more) -> Rollout:
        """The slot after EOS counts as a token, where there is room; it has a value, and log-probs of zero."""
        room = samples.finished & (samples.mask.sum(1) < small.RESPONSE)
        slot = room[:, None] & (torch.arange(width) == samples.lengths[:, None])  # (B, T)
        wider = torch.nn.functional.pad
        missing = (0, width - samples.tokens.shape[1])
        longer = replace(
            samples, tokens=wider(samples.tokens, missing, value=self.pad), lengths=samples.lengths + room,
            mask=wider(samples.mask, missing) | slot, logprobs=wider(samples.logprobs, missing),
        )  # fmt: skip
        judged = judge(longer, policy, reference, score, micro_batch, width, *more)
        names = ("logprobs", "ref_logprobs", "entropy", "sampler_logprobs")
        self.slot = slot
        return replace(judged, **{name: torch.where(slot, 0, getattr(judged, name)) for name in names})

    def draw(self, logits: Tensor, *how) -> tuple[Tensor, Tensor, Tensor]:
        tokens, *rest = DRAW(logits, *how)
        return trl_sides.no_padding(tokens, logits, self.pad), *rest

    def whiten(self, advantages: Tensor, mask: Tensor) -> Tensor:
        return whiten(advantages, mask & ~self.slot)

    def loss(self, output, batch: Experience, objective: update.Objective) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's mean is over the tokens, the value's over the slots too; the caller divides both by the latter."""
        answer = batch.mask & (batch.tokens != self.pad)
        share = batch.mask.sum() / answer.sum()
        policy, sums = LOSS(output, replace(batch, mask=answer), replace(objective, value_coef=0.0))
        value = masked_sum(value_loss(output.values, batch.values, batch.returns, objective.value_clip), batch.mask)
        sums = {name: x * share for name, x in sums.items()} | {"loss/value": value.detach()}
        return policy * share + objective.value_coef * value, sums

    def minibatches(self, rows: int, count: int, epochs: int, seed: int, iteration: int):
        for _ in range(epochs):
            yield from torch.from_numpy(self.order.permutation(rows)).reshape(count, -1)


class GroupConventions(Conventions):
    """Of TRL's GRPOTrainer and RLOOTrainer, where they are no options of ours."""

    def changes(self, trainer: str) -> list[tuple]:
        grouped = {"grpo": ESTIMATORS["grpo"]._replace(estimate=self.estimate), "rloo": ESTIMATORS["rloo"]}
        loop = {"minibatches": self.minibatches, "ESTIMATORS": grouped}
        loss = {"ppo_loss": self.per_response} if trainer == "rloo" else {}
        return [(train_ppo, loop), (update, loss), (generate, {"draw": self.draw})]

    def estimate(self, rewards, values, mask, gamma, lam, group) -> tuple[Tensor, Tensor]:
        returns = masked_sum(rewards, mask, dim=1)
        return tuple(torch.where(mask, x[:, None], 0) for x in (grpo(returns, group, eps=1e-4), returns))

    def per_response(self, output, batch: Experience, objective: update.Objective) -> tuple[Tensor, dict[str, Tensor]]:
        """The caller divides by the tokens, TRL by the responses. At one step an iteration no ratio leaves 1."""
        loss, sums = LOSS(output, batch, objective)
        return loss * batch.mask.sum() / len(batch.mask), sums

    def minibatches(self, rows: int, count: int, epochs: int, seed: int, iteration: int):
        for _ in range(epochs):
            yield from torch.arange(rows).reshape(count, -1)


LOSS, DRAW = update.ppo_loss, generate.draw


def bands(found: dict[str, list[list[dict]]], name: str) -> str:
    """Mean and [least, most] of the seeds of every block of iterations, and where `trl` and another side do not overlap."""
    curves = {side: np.array([[row[name] for row in rows] for rows in runs]) for side, runs in found.items()}
    length = len(found["trl"][0])
    blocks = range(0, length, BLOCK)
    means = {side: np.stack([x[:, i : i + BLOCK].mean(1) for i in blocks], 1) for side, x in curves.items()}
    rows, apart = [], {side: [] for side in curves if side != "trl"}
    for k, start in enumerate(blocks):
        where, cells = f"{start + 1} to {min(start + BLOCK, length)}", []
        for side, x in means.items():
            low, high = x[:, k].min(), x[:, k].max()
            cells.append(f"{x[:, k].mean():.3f} [{low:.3f}, {high:.3f}]")
            if side != "trl" and (low > means["trl"][:, k].max() or high < means["trl"][:, k].min()):
                apart[side].append(where)
        rows.append([where, *cells])
    said = [
        f"{side} and trl: {'the bands overlap everywhere' if not where else 'apart in ' + ', '.join(where)}"
        for side, where in apart.items()
    ]
    return "\n\n".join(
        [f"{name}, mean of the seeds [least, most]:", markdown_table(["iterations", *means], rows), *said]
    )


def step_by_step(theirs: list[list[dict]], ours: list[list[dict]], names) -> str:
    """The largest difference of any seed, of what both computed on the same responses; TRL logs float32."""
    rows = []
    for step in (k for k in SHOWN if k <= min(map(len, ours), default=0)):
        pairs = [(a[step - 1], b[step - 1]) for a, b in zip(ours, theirs)]
        rows.append([str(step), *(f"{max(abs(a[name] - b[name]) for a, b in pairs):.1e}" for name in names)])
    head = "ours, patched, and trl, our numbers: the largest difference of any seed at an iteration:"
    return head + "\n\n" + markdown_table(["iteration", *names], rows)


if __name__ == "__main__":
    config.run(main, stopped="stopped; the same command keeps what is finished")
