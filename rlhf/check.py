"""Check the numbers of any framework: recompute them, and name the convention that explains a difference.

    python -m rlhf.check DUMP           DUMP: .safetensors or .json with the keys of KEYS, written by any framework

Every quantity is recomputed from the dump's *own* inputs (advantages from its rewards, whatever we think of those), so
that a deviation shows where it happens and not again in all that follows. Where the numbers differ, the conventions
below are tried, one at a time, then two together, until one reproduces them.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from rlhf.advantages import dr_grpo, gae, grpo, rloo
from rlhf.functional import masked_mean, masked_sum, masked_var, whiten
from rlhf.infra.config import parse, run
from rlhf.kl import k1, k2, k3
from rlhf.losses import approx_kl, clip_fraction, policy_loss, preference_loss, value_loss
from rlhf.rewards import shape_rewards

Dump = dict[str, Tensor]

# What a dump may hold: shape and meaning. B responses, T columns (of the response, or of prompt and response), N pairs.
KEYS = {
    "mask": ("BT", "true or 1 on the real tokens of the response, EOS included"),
    "logprobs": ("BT", "log-prob of each token under the policy that sampled it"),
    "ref_logprobs": ("BT", "the same under the reference"),
    "new_logprobs": ("BT", "the same under the policy being trained"),
    "values": ("BT", "value of the state before each token, at sampling time"),
    "new_values": ("BT", "the same from the critic being trained"),
    "scores": ("B", "one score per response"),
    "group": ("B", "which prompt each response answers, an integer"),
    "bootstrap": ("B", "value after a response that the length limit cut, 0 for finished ones; absent: 0 for all"),
    "kl": ("BT", "KL per token, before its coefficient"),
    "mean_kl": ("", "KL of the batch as it is logged; ours is nats per response"),
    "rewards": ("BT", "reward per token: KL penalty and score"),
    "advantages": ("BT", "before whitening"),
    "whitened_advantages": ("BT", "after whitening"),
    "returns": ("BT", "targets of the critic"),
    "rloo_advantages": ("B", "score against the other responses to the same prompt"),
    "grpo_advantages": ("B", "score standardised among the responses to the same prompt"),
    "policy_loss": ("", "the number that is logged or differentiated"),
    "value_loss": ("", "the same for the critic, before its coefficient"),
    "approx_kl": ("", "how far the new policy is from the old one; ours is the mean of (log ratio)^2 / 2"),
    "clip_fraction": ("", "share of tokens whose loss is clipped"),
    "chosen_scores": ("N", "reward model on the preferred response of each pair"),
    "rejected_scores": ("N", "and on the other"),
    "margin": ("N", "margin of each pair; absent: 0"),
    "preference_loss": ("", "loss of the reward model over these pairs"),
    "kl_coef": ("", "weight of the KL in the reward"),
    "gamma": ("", "discount"),
    "lam": ("", "lambda of GAE"),
    "clip": ("", "the ratio may move this far from 1"),
    "clip_high": ("", "upper bound, where it differs from the lower; absent: clip"),
    "dual_clip": ("", "bound of the loss for negative advantages; absent: none"),
    "value_clip": ("", "values may move this far; absent: unclipped"),
    "label_smoothing": ("", "of the preference loss; absent: 0"),
    "world": ("", "number of ranks; absent: every divisor of the rows is tried"),
    "micro_batch": ("", "rows per micro-batch; absent: every divisor of the rows is tried"),
}


# ---- the pieces that conventions are made of ------------------------------------------------------------------------


def unchanged(x, *_):
    return x


def tail(mask: Tensor) -> Tensor:
    """True from the first counted token of each row to the end of the tensor."""
    return mask.cummax(1).values


def filled(mask: Tensor) -> Tensor:
    """The mask without its holes."""
    return tail(mask) & tail(mask.flip(1)).flip(1)


def after(mask: Tensor, shortest: int = 1) -> Tensor:
    """The mask with one slot more after the last token, where the tensor has room; rows below `shortest` as they are."""
    longer = mask | pad(filled(mask), (1, 0))[:, :-1] & ~filled(mask)
    return torch.where(mask.sum(1, keepdim=True) >= shortest, longer, mask)


def row_sums(x: Tensor, mask: Tensor) -> Tensor:
    return masked_sum(x, mask, 1)


def row_means(x: Tensor, mask: Tensor) -> Tensor:
    return row_sums(x, mask) / mask.sum(1)


def standardise(x: Tensor, mask: Tensor, unbiased: bool) -> Tensor:
    """(x - mean) / std of the counted entries, the padding shifted and scaled like the rest."""
    return (x - masked_mean(x, mask)) * (masked_var(x, mask, unbiased) + 1e-8).rsqrt()


def keep_mean(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Whitened with the mean added back. Padding, zero before, gets a value: that is how it leaks."""
    return standardise(torch.where(mask, x, 0), mask, unbiased) + masked_mean(x, mask)


def biased(x: Tensor, mask: Tensor) -> Tensor:
    return standardise(x, mask, unbiased=False)


def eps_outside(x: Tensor, mask: Tensor) -> Tensor:
    return (x - masked_mean(x, mask)) / (masked_var(x, mask).sqrt() + 1e-8)


def whiten_all(scores: Tensor) -> Tensor:
    return whiten(scores, torch.ones_like(scores, dtype=torch.bool))


def optimistic(new, old, advantages, clip, clip_high, dual_clip):
    return -policy_loss(new, old, -advantages, clip, clip_high)  # the smaller of the two losses


def unclipped(new, old, advantages, clip, clip_high, dual_clip):
    return policy_loss(new, old, advantages, torch.inf)


def reinforce(new, old, advantages, clip, clip_high, dual_clip):
    return -advantages * new


def optimistic_value(new, values, returns, clip):
    clipped = new if clip is None else new.clamp(values - clip, values + clip)
    return torch.minimum(value_loss(new, values, returns), value_loss(clipped, values, returns))


def out_of_range(new, old, advantages, clip, clip_high):
    ratio = (new - old).exp()
    return ((ratio > 1 + (clip if clip_high is None else clip_high)) | (ratio < 1 - clip)).double()


def sequence_ratio(mean: Callable) -> Callable:
    """New log-probs that are as far from the old ones on every token of a response: `mean` of its log ratios."""
    return lambda new, old, mask: old + mean(new - old, mask)[:, None]


def whole_batch_rloo(scores, group):
    return rloo(scores, torch.zeros_like(group))


def strided_rloo(scores, group):
    return rloo(scores, torch.arange(len(group)) % len(group.unique()))


def normalised_rloo(scores, group):
    advantages = rloo(scores, group)
    return (advantages - advantages.mean()) / (advantages.std() + 1e-4)


def biased_grpo(scores, group):
    n = (group[:, None] == group).sum(1)
    deviation = dr_grpo(scores, group)
    spread = deviation / grpo(scores, group, 0.0)  # the unbiased standard deviation, NaN where it is 0
    return torch.where(spread > 0, deviation / (spread * ((n - 1) / n).sqrt() + 1e-6), 0)


def batch_grpo(scores, group):
    return dr_grpo(scores, group) / (scores.std() + 1e-4)


def keep_single(advantages, scores, group):
    return torch.where((group[:, None] == group).sum(1) == 1, scores, advantages)


def every_margin(chosen, rejected, margin, label_smoothing):
    n, margin = len(chosen), torch.zeros_like(chosen) if margin is None else margin
    pairs = (x[:, None].expand(n, n) for x in (chosen, rejected))
    return preference_loss(*pairs, margin.expand(n, n), label_smoothing)


# ---- the known conventions: name -> what it does instead. The first of each axis, without a name, is ours. ----------

OURS = ""

ESTIMATORS = {  # (log-probs, reference) -> KL per token
    OURS: k1,
    "KL estimator k2 (TRL <= 0.11 'mse')": k2,
    "KL estimator k3": k3,
    "KL estimator |k1| (TRL <= 0.11 'abs')": lambda p, q: (p - q).abs(),
    "KL with its sign turned round": lambda p, q: q - p,
}
KL_GUARDS = {  # KL per token -> the same
    OURS: unchanged,
    "KL clamped to +-10 (OpenRLHF; verl its k3)": lambda kl: kl.clamp(-10, 10),
}
KL_SHARES = {  # (KL per token, mask) -> what each token pays for
    OURS: unchanged,
    "KL divided by the response's length": lambda kl, mask: kl / mask.sum(1, keepdim=True),
    "the whole response's KL on each token": lambda kl, mask: row_sums(kl, mask)[:, None].expand_as(kl),
}
KL_MEANS = {  # (KL per token, mask) -> one number for the log
    OURS: lambda kl, mask: row_sums(kl, mask).mean(),
    "mean per token, not per response (verl, OpenRLHF)": masked_mean,
    "mean of each response's mean per token": lambda kl, mask: row_means(kl, mask).mean(),
}
SCORES = {
    OURS: unchanged,
    "score clipped to +-5 (DeepSpeed-Chat)": lambda scores: scores.clamp(-5, 5),
    "score clipped to +-10 (OpenRLHF, trlX)": lambda scores: scores.clamp(-10, 10),
    "score whitened over the batch": whiten_all,
}
SLOTS = {  # mask -> (episode, whose last token gets the score; tokens that pay for their KL)
    OURS: lambda mask: (mask, mask),
    "score on the slot after EOS (TRL >= 0.12)": lambda mask: (after(mask), mask),
    "score on the slot after EOS, unless EOS is all there is (torchtune)": lambda mask: (after(mask, 2), mask),
    "score on the slot after EOS, which pays KL too (DeepSpeed-Chat)": lambda mask: (after(mask),) * 2,
}
REWARD_SCALES = {  # (rewards, mask) -> rewards
    OURS: unchanged,
    "rewards whitened, mean kept (TRL whiten_rewards)": keep_mean,
    "rewards whitened with the biased variance, mean kept (OpenAI)": lambda r, mask: keep_mean(r, mask, False),
    "rewards whitened, mean removed": whiten,
}
EPISODES = {  # mask -> (rewards that count, values that count) in GAE
    OURS: lambda mask: (mask, mask),
    "the slot after EOS is part of the episode (TRL >= 0.12, DeepSpeed-Chat)": lambda mask: (after(mask),) * 2,
    "the slot after EOS is part of the episode, unless EOS is all there is (torchtune)": lambda mask: (
        (after(mask, 2),) * 2
    ),
    "rewards outside the mask enter GAE (TRL <= 0.11 whiten_rewards)": lambda mask: (tail(mask), mask),
    "values outside the mask enter GAE": lambda mask: (mask, tail(mask)),
    "rewards and values outside the mask enter GAE": lambda mask: (tail(mask),) * 2,
}
HOLES = {  # mask -> the tokens that GAE walks over
    OURS: unchanged,
    "holes in the mask are tokens of value and reward 0 (TRL <= 0.11, OpenRLHF)": filled,
}
BOOTSTRAPS = {  # (bootstrap or None, values, mask) -> bootstrap
    OURS: unchanged,
    "rows without padding bootstrap from their last value": lambda _, v, mask: torch.where(mask[:, -1], v[:, -1], 0),
    "no bootstrap": lambda *_: None,
}
DISCOUNTS = {  # (gamma, lambda) -> the same
    OURS: lambda gamma, lam: (gamma, lam),
    "lambda = 1": lambda gamma, lam: (gamma, 1.0),
    "lambda = 0": lambda gamma, lam: (gamma, 0.0),
    "gamma = 1": lambda gamma, lam: (1.0, lam),
    "gamma = lambda = 1": lambda gamma, lam: (1.0, 1.0),
}
ADVANTAGE_OUTPUTS = {  # (advantages, values, mask) -> what is called advantages
    OURS: unchanged,
    "already whitened": lambda a, v, mask: whiten(a, mask),
    "already whitened, biased variance": lambda a, v, mask: biased(a, mask),
    "values added: these are returns": lambda a, v, mask: a + v,
}
RETURN_OUTPUTS = {  # (advantages, values, mask) -> what is called returns
    OURS: lambda a, v, mask: a + v,
    "values added to the whitened advantages": lambda a, v, mask: whiten(a, mask) + v,
    "values not added: these are advantages": unchanged,
}
WHITENINGS = {  # (x, mask) -> x whitened
    OURS: whiten,
    "biased variance (OpenAI, OpenRLHF, vwxyzjn)": biased,
    "eps outside the root: divided by std plus 1e-8 (CleanRL)": eps_outside,
}
WHITENED_MEANS = {  # (whitened, x, mask) -> whitened
    OURS: unchanged,
    "mean added back (torchtune's inverted shift_mean)": lambda y, x, mask: y + masked_mean(x, mask),
    "mean removed, not divided (OpenRLHF no_std_norm)": lambda y, x, mask: x - masked_mean(x, mask),
    "not whitened": lambda y, x, mask: x,
}
POLICY_LOSSES = {  # (new, old, advantages, clip, clip_high, dual_clip) -> loss per token
    OURS: policy_loss,
    "no clip": unclipped,
    "the smaller of the two losses, not the larger": optimistic,
    "-advantage * log-prob (REINFORCE)": reinforce,
}
UPPER_CLIPS = {OURS: unchanged, "upper clip 0.28 (DAPO)": lambda _: 0.28, "same clip on both sides": lambda _: None}
DUAL_CLIPS = {OURS: unchanged, "dual clip 3 (verl's default)": lambda _: 3.0, "no dual clip": lambda _: None}
RATIOS = {  # (new, old, mask) -> new log-probs
    OURS: unchanged,
    "one ratio per response, of the mean log ratio (GSPO)": sequence_ratio(row_means),
    "one ratio per response, of the summed log ratio (TRL RLOO)": sequence_ratio(row_sums),
}
SIGNS = {OURS: 1.0, "sign turned round": -1.0}
VALUE_LOSSES = {  # (new values, values, returns, clip) -> loss per token
    OURS: value_loss,
    "no value clip": lambda new, values, returns, _: value_loss(new, values, returns),
    "value clip 0.2": lambda new, values, returns, _: value_loss(new, values, returns, 0.2),
    "value clip 0.5": lambda new, values, returns, _: value_loss(new, values, returns, 0.5),
    "the smaller of the two errors, not the larger": optimistic_value,
}
FACTORS = {OURS: 1.0, "without the factor one half": 2.0}
TRAINED = {  # mask -> the slots whose value is trained
    OURS: unchanged,
    "the slot after EOS is trained too (TRL >= 0.12, torchtune)": after,
}
POLICY_DISTANCES = {  # (new, old) -> distance per token
    OURS: approx_kl,
    "mean of -(log ratio) (OpenRLHF, verl)": lambda new, old: k1(old, new),
    "ratio - 1 - log ratio (CleanRL, trlX)": lambda new, old: k3(old, new),
    "without the factor one half": lambda new, old: 2 * approx_kl(new, old),
}
CLIP_COUNTS = {  # (new, old, advantages, clip, clip_high) -> 0 or 1 per token
    OURS: clip_fraction,
    "every ratio out of range, whatever the advantage (CleanRL)": out_of_range,
}
GROUP_SCORES = {  # (scores, KL per response) -> scores
    OURS: unchanged,
    "the response's KL is part of its score (TRL RLOO)": lambda scores, kl: scores - kl,
}
RLOO_BASELINES = {  # (scores, group) -> advantages
    OURS: rloo,
    "the baseline includes the response's own score": dr_grpo,
    "baseline over the whole batch": whole_batch_rloo,
    "groups strided: every P-th row answers the same of P prompts (TRL <= 0.21)": strided_rloo,
    "normalised over the batch (TRL normalize_advantages)": normalised_rloo,
}
GRPO_SCALES = {  # (scores, group) -> advantages
    OURS: grpo,
    "eps 1e-4 (TRL)": lambda scores, group: grpo(scores, group, 1e-4),
    "eps 1e-9 (OpenRLHF)": lambda scores, group: grpo(scores, group, 1e-9),
    "biased standard deviation": biased_grpo,
    "standard deviation of the whole batch (TRL scale_rewards='batch')": batch_grpo,
    "not divided (Dr. GRPO)": dr_grpo,
}
SINGLES = {  # (advantages, scores, group) -> advantages
    OURS: unchanged,
    "a response alone in its group keeps its score (verl)": keep_single,
}
PREFERENCE_LOSSES = {  # (chosen, rejected, margin or None, label smoothing) -> loss per pair
    OURS: preference_loss,
    "margin ignored (OpenRLHF LogExpLoss)": lambda c, r, _, smoothing: preference_loss(c, r, None, smoothing),
    "every pair meets every margin (TRL <= 0.23)": every_margin,
    "label smoothing ignored (TRL >= 0.29 DPO)": lambda c, r, margin, _: preference_loss(c, r, margin),
    "chosen and rejected exchanged": lambda c, r, *options: preference_loss(r, c, *options),
}
PREFERENCE_MEANS = {OURS: Tensor.mean, "sum over the pairs": Tensor.sum}


def means(d: Dump) -> dict[str, Callable]:
    """(x per token, mask) -> scalar: what a loss may be divided by."""
    rows, columns = d["mask"].shape
    return {
        OURS: masked_mean,
        "mean of each response's mean (TRL GRPO, OpenRLHF token_level_loss=False)": lambda x, m: row_means(x, m).mean(),
        **{
            f"mean of the means of {n} micro-batches or ranks": mean_of_means(n)
            for n in block_counts(d, "world", "micro_batch")
            if n < rows
        },
        "divided by rows x columns, padding is zero (Dr. GRPO)": lambda x, m: masked_sum(x, m) / m.numel(),
        "mean over all columns, padding included": lambda x, m: x.mean(),
        "sum over each response, mean over responses": lambda x, m: masked_sum(x, m) / rows,
        "sum over all tokens, divided by the columns": lambda x, m: masked_sum(x, m) / columns,
        "sum over all tokens": masked_sum,
    }


def scopes(d: Dump) -> dict[str, Callable]:
    """(f, x, mask) -> f(x, mask), applied to the slots that share their moments."""
    rows, blocks = len(d["mask"]), [n for n in block_counts(d, "world") if n < len(d["mask"])]
    return {
        OURS: lambda f, x, mask: f(x, mask),
        "padding whitened too (trlX)": lambda f, x, mask: f(torch.where(mask, x, 0), torch.ones_like(mask)),
        "each response by itself": per_rank(rows),
        **{f"per rank, {n} ranks of consecutive rows (TRL)": per_rank(n) for n in blocks},
        **{f"per rank, {n} ranks of every {n}th row": per_strided_rank(n) for n in blocks},
    }


def mean_of_means(n: int) -> Callable:
    return lambda x, mask: torch.stack([masked_mean(*part) for part in zip(x.chunk(n), mask.chunk(n))]).mean()


def per_rank(n: int) -> Callable:
    """f on each of n blocks of consecutive rows."""
    return lambda f, x, mask: torch.cat([f(*part) for part in zip(x.chunk(n), mask.chunk(n))])


def per_strided_rank(n: int) -> Callable:
    """f on the rows rank, rank + n, rank + 2 n, ... of each of n ranks."""

    def over(f, x, mask):
        y = torch.empty_like(x)
        for rank in range(n):
            y[rank::n] = f(x[rank::n], mask[rank::n])
        return y

    return over


def block_counts(d: Dump, *keys: str) -> list[int]:
    """Into how many equal blocks the rows may have been cut: as the dump says, else every way there is."""
    rows = len(d["mask"])
    blocks = {"world": lambda: int(d["world"]), "micro_batch": lambda: rows // int(d["micro_batch"])}
    said = [blocks[key]() for key in keys if key in d]
    return [n for n in said if n > 1] if said else [n for n in range(2, rows + 1) if rows % n == 0]


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


def load_dump(path: str | Path) -> Dump:
    """The tensors of a .safetensors or .json file, in float64, mask as bool, group as int64.

    Raises OSError if the file cannot be read, ValueError naming the key that is unknown, misshapen or not finite.
    """
    path = Path(path)
    if path.suffix not in (".json", ".safetensors"):
        raise ValueError(f"{path} must be a .safetensors or .json file")
    raw = read_json(path) if path.suffix == ".json" else read_safetensors(path)
    for key in raw:
        if key not in KEYS:
            close = get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(KEYS)}"
            raise ValueError(f"{path}: unknown key {key!r}; {hint}")
    dump = {key: x.squeeze() if KEYS[key][0] == "" else x for key, x in raw.items()}
    check_shapes(path, dump)
    dump = {key: convert(path, key, x) for key, x in dump.items()}
    check_finite(path, dump)
    return dump


def read_json(path: Path) -> Dump:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object of lists and numbers, not a {type(content).__name__}")
    tensors = {}
    for key, value in content.items():
        try:
            tensors[key] = torch.tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{path}: {key!r} is not a number or a rectangular list of numbers") from None
    return tensors


def read_safetensors(path: Path) -> Dump:
    path.open("rb").close()  # the library's own message for a missing file does not name it
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def check_shapes(path: Path, dump: Dump) -> None:
    """All B, T and N agree; the first key that uses a letter fixes it."""
    size, fixed_by = {}, {}
    for key in KEYS:  # mask first
        if key not in dump:
            continue
        axes, shape = KEYS[key][0], tuple(dump[key].shape)
        if len(shape) != len(axes):
            wanted = f"({', '.join(axes)})" if axes else "a single number"
            raise ValueError(f"{path}: {key} has shape {shape}, expected {wanted}")
        for axis, n in zip(axes, shape):
            if size.setdefault(axis, n) != n:
                raise ValueError(
                    f"{path}: {key} has shape {shape}, but {axis} is {size[axis]} in {fixed_by[axis]}: cut or pad it"
                )
            fixed_by.setdefault(axis, key)
            if n == 0:
                raise ValueError(f"{path}: {key} is empty")
    for key in dump:
        if "T" in KEYS[key][0] and "mask" not in dump:
            raise ValueError(f"{path}: {key} needs a mask (B, T) that says which of its columns are real tokens")
    for key in ("world", "micro_batch"):
        if key in dump and (dump[key] < 1 or size.get("B", 0) % int(dump[key])):
            raise ValueError(f"{path}: {size.get('B', 0)} rows do not divide into {key} = {float(dump[key]):g}")


def convert(path: Path, key: str, x: Tensor) -> Tensor:
    if key == "mask":
        if not ((x == 0) | (x == 1)).all():
            raise ValueError(f"{path}: mask must be boolean or 0 and 1, it holds {odd_ones(x)}")
        return x.bool()
    return x.long() if key == "group" else x.double()


def odd_ones(mask: Tensor) -> str:
    return ", ".join(f"{value:g}" for value in mask[(mask != 0) & (mask != 1)].flatten()[:3].tolist())


def check_finite(path: Path, dump: Dump) -> None:
    """Inside the mask every number is finite; outside it anything may stand."""
    for key, x in dump.items():
        where = dump["mask"] if "T" in KEYS[key][0] else torch.ones_like(x, dtype=torch.bool)
        bad = (where & ~x.isfinite()).nonzero()
        if len(bad):
            at = f" at {tuple(bad[0].tolist())}, inside the mask" if x.dim() == 2 else f" at {bad[0].tolist()}"
            raise ValueError(f"{path}: {key} holds {float(x[tuple(bad[0])])}{at if x.dim() else ''}")
    if "mask" in dump and not dump["mask"].any(1).all():
        row = int((~dump["mask"].any(1)).nonzero()[0])
        raise ValueError(f"{path}: row {row} of the mask has no token; leave empty responses out")


# ---- the command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    dump: str  # .safetensors or .json file; the word "--dump" may be left out
    tolerance: float = 1e-5  # relative to the largest number of a tensor; 1e-2 for bfloat16
    most: int = 2  # conventions that are combined to explain one difference; 3 takes longer


def main() -> None:
    words = [word if word.startswith("-") or i else f"--dump={word}" for i, word in enumerate(sys.argv[1:])]
    config = parse(Config, words)
    dump = load_dump(config.dump)
    findings = check(dump, config.tolerance, config.most)
    if all(f.missing for f in findings):
        why = "; ".join(f"{f.quantity} needs {', '.join(f.missing).replace('|', ' or ')}" for f in findings)
        raise ValueError(f"{config.dump}: nothing to check; {why or 'it holds none of ' + ', '.join(QUANTITIES)}")
    if "mask" in dump:
        (rows, columns), tokens = dump["mask"].shape, int(dump["mask"].sum())
        print(f"{config.dump}: {rows} rows, {columns} columns, {tokens} tokens; tolerance {config.tolerance:g}")
    print(table(findings))
    if not all(f.equal or f.missing for f in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
