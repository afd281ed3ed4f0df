"""Check the numbers of any framework: recompute them, and name the convention that explains a difference.

    python -m rlhf.check DUMP           DUMP: .safetensors or .json with the keys of KEYS, written by any framework

Every quantity is recomputed from the dump's *own* inputs (advantages from its rewards, whatever we think of those), so
that a deviation shows where it happens and not again in all that follows. Where the numbers differ, the conventions
below are tried, one at a time, then two together, until one reproduces them.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.advantages import gae
from rlhf.check.conventions import (
    ADVANTAGE_OUTPUTS,
    BOOTSTRAPS,
    CLIP_COUNTS,
    DISCOUNTS,
    DUAL_CLIPS,
    EPISODES,
    ESTIMATORS,
    FACTORS,
    GROUP_SCORES,
    GRPO_SCALES,
    HOLES,
    KL_GUARDS,
    KL_MEANS,
    KL_SHARES,
    OURS,
    POLICY_DISTANCES,
    POLICY_LOSSES,
    PREFERENCE_LOSSES,
    PREFERENCE_MEANS,
    RATIOS,
    RETURN_OUTPUTS,
    REWARD_SCALES,
    RLOO_BASELINES,
    SCORES,
    SIGNS,
    SINGLES,
    SLOTS,
    TRAINED,
    UPPER_CLIPS,
    VALUE_LOSSES,
    WHITENED_MEANS,
    WHITENINGS,
    filled,
    means,
    row_sums,
    scopes,
    unchanged,
)
from rlhf.check.dump import Dump
from rlhf.kl import k1
from rlhf.rewards import shape_rewards

# ---- the pieces that conventions are made of ------------------------------------------------------------------------


# ---- the known conventions: name -> what it does instead. The first of each axis, without a name, is ours. ----------


# ---- the quantities: what each needs, how it is computed, and the axes along which conventions differ ---------------


def number(d: Dump, key: str, default: float | None = None) -> float | None:
    return float(d[key]) if key in d else default


def kl(d, estimator=k1, guard=unchanged):
    return guard(estimator(d["logprobs"], d["ref_logprobs"])), d["mask"]


def token_kl(d, *choice):
    """The dump's own KL if it has one."""
    return d["kl"] if "kl" in d else kl(d, *choice)[0]


def mean_kl(d, mean, *choice):
    return mean(token_kl(d, *choice), d["mask"])


def rewards(d, slot=SLOTS[OURS], score=unchanged, scale=unchanged, share=unchanged, *choice):
    episode, paying = slot(d["mask"])
    kl = torch.where(paying, share(token_kl(d, *choice), d["mask"]), 0)
    # k1 against a reference of zero is the KL itself
    shaped = shape_rewards(score(d["scores"]), kl, torch.zeros_like(kl), episode, number(d, "kl_coef"))
    return scale(shaped, episode), episode


def credit(d, output, episode, scale, discount, bootstrap, holes=unchanged):
    mask, values = d["mask"], d["values"]
    earning, valued = episode(mask)
    paid = d["rewards"] if "rewards" in d else rewards(d)[0]
    earned = torch.where(earning, scale(paid, mask), 0)
    last = bootstrap(d.get("bootstrap"), values, mask)
    discounts = discount(number(d, "gamma"), number(d, "lam"))
    advantages, _ = gae(earned, torch.where(valued, values, 0), holes(earning | valued), *discounts, last)
    return output(advantages, values, mask), mask


def whitened_advantages(d, whitening, scope, mean):
    x = d["advantages"] if "advantages" in d else d["returns"] - d["values"]
    return scope(lambda x, mask: mean(whitening(x, mask), x, mask), x, d["mask"]), d["mask"]


def trained_advantages(d):
    return d["whitened_advantages"] if "whitened_advantages" in d else d["advantages"]


def ppo_loss(d, form, mean, upper, dual, ratio, sign):
    mask, old = d["mask"], d["logprobs"]
    clips = number(d, "clip"), upper(number(d, "clip_high")), dual(number(d, "dual_clip"))
    return sign * mean(form(ratio(d["new_logprobs"], old, mask), old, trained_advantages(d), *clips), mask)


def critic_loss(d, form, mean, trained, factor):
    loss = form(d["new_values"], d["values"], d["returns"], number(d, "value_clip"))
    return factor * mean(loss, trained(d["mask"]))


def policy_distance(d, form, mean):
    return mean(form(d["new_logprobs"], d["logprobs"]), d["mask"])


def clipped_share(d, form, mean, upper):
    clips = number(d, "clip"), upper(number(d, "clip_high"))
    return mean(form(d["new_logprobs"], d["logprobs"], trained_advantages(d), *clips), d["mask"])


def group_advantages(d, form, single, score=unchanged):
    cost = None if score is unchanged else number(d, "kl_coef") * row_sums(token_kl(d), d["mask"])
    scores = score(d["scores"], cost)
    return single(form(scores, d["group"]), scores, d["group"])


def pair_loss(d, form, mean):
    options = d.get("margin"), number(d, "label_smoothing", 0.0)
    return mean(form(d["chosen_scores"], d["rejected_scores"], *options))


def kl_axes(d: Dump) -> list[dict]:
    return [] if "kl" in d else [ESTIMATORS, KL_GUARDS]


def credit_axes(d: Dump) -> list[dict]:
    has_holes = bool((filled(d["mask"]) & ~d["mask"]).any())
    return [EPISODES, REWARD_SCALES, DISCOUNTS, BOOTSTRAPS] + [HOLES] * has_holes


def score_axes(d: Dump) -> list[dict]:
    has_kl = "kl" in d or {"logprobs", "ref_logprobs"} <= set(d)
    return [GROUP_SCORES] * (has_kl and {"mask", "kl_coef"} <= set(d))


@dataclass(frozen=True)
class Quantity:
    needs: tuple[str, ...]  # keys of the dump; "a|b": either
    compute: Callable  # (dump, one choice of each axis) -> what the dump should hold; for (B, T) also where
    axes: Callable[[Dump], list[dict]]


KL_NEEDS = ("mask", "kl|logprobs", "kl|ref_logprobs")
REWARD_NEEDS = (*KL_NEEDS, "scores", "kl_coef")
GAE_NEEDS = ("values", "gamma", "lam", *(f"rewards|{need}" if need != "mask" else need for need in REWARD_NEEDS))
POLICY_NEEDS = ("mask", "new_logprobs", "logprobs", "whitened_advantages|advantages", "clip")
QUANTITIES = {
    "kl": Quantity(("mask", "logprobs", "ref_logprobs"), kl, lambda d: [ESTIMATORS, KL_GUARDS]),
    "mean_kl": Quantity(KL_NEEDS, mean_kl, lambda d: [KL_MEANS, *kl_axes(d)]),
    "rewards": Quantity(REWARD_NEEDS, rewards, lambda d: [SLOTS, SCORES, REWARD_SCALES, KL_SHARES, *kl_axes(d)]),
    "advantages": Quantity(GAE_NEEDS, credit, lambda d: [ADVANTAGE_OUTPUTS, *credit_axes(d)]),
    "returns": Quantity(GAE_NEEDS, credit, lambda d: [RETURN_OUTPUTS, *credit_axes(d)]),
    "whitened_advantages": Quantity(
        ("mask", "advantages|returns", "advantages|values"),
        whitened_advantages,
        lambda d: [WHITENINGS, scopes(d), WHITENED_MEANS],
    ),
    "rloo_advantages": Quantity(
        ("scores", "group"), group_advantages, lambda d: [RLOO_BASELINES, SINGLES, *score_axes(d)]
    ),
    "grpo_advantages": Quantity(
        ("scores", "group"), group_advantages, lambda d: [GRPO_SCALES, SINGLES, *score_axes(d)]
    ),
    "policy_loss": Quantity(
        POLICY_NEEDS, ppo_loss, lambda d: [POLICY_LOSSES, means(d), UPPER_CLIPS, DUAL_CLIPS, RATIOS, SIGNS]
    ),
    "value_loss": Quantity(
        ("mask", "new_values", "values", "returns"),
        critic_loss,
        lambda d: [VALUE_LOSSES, means(d), TRAINED, FACTORS],
    ),
    "approx_kl": Quantity(
        ("mask", "new_logprobs", "logprobs"), policy_distance, lambda d: [POLICY_DISTANCES, means(d)]
    ),
    "clip_fraction": Quantity(POLICY_NEEDS, clipped_share, lambda d: [CLIP_COUNTS, means(d), UPPER_CLIPS]),
    "preference_loss": Quantity(
        ("chosen_scores", "rejected_scores"), pair_loss, lambda d: [PREFERENCE_LOSSES, PREFERENCE_MEANS]
    ),
}


# ---- comparing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    quantity: str
    difference: float  # largest |given - ours|, nan if not computed
    equal: bool
    explanations: tuple[str, ...]  # every smallest set of conventions that reproduces the given numbers
    missing: tuple[str, ...] = ()  # keys without which it could not be computed


def check(dump: Dump, tolerance: float = 1e-5, most: int = 2) -> list[Finding]:
    """Every quantity that the dump holds, recomputed; at most `most` conventions are combined to explain a difference."""
    return [examine(dump, name, tolerance, most) for name in QUANTITIES if name in dump]


def examine(dump: Dump, name: str, tolerance: float, most: int) -> Finding:
    quantity = QUANTITIES[name]
    missing = tuple(need for need in quantity.needs if not any(key in dump for key in need.split("|")))
    if missing:
        return Finding(name, torch.nan, False, (), missing)
    given, axes = dump[name], quantity.axes(dump)
    ours = quantity.compute(dump, *(axis[OURS] for axis in axes))
    equal, difference = compare(given, ours, tolerance)
    explanations = () if equal else explain(dump, quantity, axes, given, tolerance, most)
    return Finding(name, difference, equal, explanations)


def compare(given: Tensor, other: Tensor | tuple[Tensor, Tensor], tolerance: float) -> tuple[bool, float]:
    """Whether both agree, and by how much they differ; `other` may come with a mask of what counts.

    The tolerance is relative to the largest number given, or to 0.1 if all are smaller.
    """
    other, where = other if isinstance(other, tuple) else (other, torch.ones_like(other, dtype=torch.bool))
    difference = float((given - other)[where].abs().max())  # NaN, which equals nothing, if one of them is
    return difference <= tolerance * max(0.1, float(given[where].abs().max())), difference


def explain(dump, quantity, axes, given, tolerance, most) -> tuple[str, ...]:
    """The names of all combinations of the fewest conventions that reproduce `given`."""
    for count in range(1, min(most, len(axes)) + 1):
        found = []
        for names in combinations(axes, count):
            choice = [axis[name] for axis, name in zip(axes, names)]
            if compare(given, quantity.compute(dump, *choice), tolerance)[0]:
                found.append(" + ".join(name for name in names if name != OURS))
        if found:
            return tuple(found)
    return ()


def combinations(axes: list[dict], count: int) -> Iterator[tuple[str, ...]]:
    """One name per axis, of which exactly `count` are not ours."""
    for changed in itertools.combinations(range(len(axes)), count):
        names = [[n for n in axis if n != OURS] if i in changed else [OURS] for i, axis in enumerate(axes)]
        yield from itertools.product(*names)


def table(findings: list[Finding]) -> str:
    """One line per quantity: given against ours, the largest difference, what explains it."""
    lines = [("quantity", "given vs ours", "max |difference|", "explained by")]
    for f in findings:
        if f.missing:
            lines.append((f.quantity, "not checked", "", f"needs {', '.join(f.missing).replace('|', ' or ')}"))
            continue
        why = "" if f.equal else "  or  ".join(f.explanations[:3]) or "no known convention"
        lines.append((f.quantity, "equal" if f.equal else "differs", f"{f.difference:.1e}", why))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(line, widths)), line[3]]).rstrip() for line in lines)


# ---- reading --------------------------------------------------------------------------------------------------------


# ---- the command ----------------------------------------------------------------------------------------------------
