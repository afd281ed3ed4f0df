"""The conventions of the frameworks: each a name and a small function in a dict; OURS is the first of every dict."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.advantages import dr_grpo, grpo, rloo
from rlhf.check.dump import Dump
from rlhf.functional import masked_mean, masked_sum, masked_var, whiten
from rlhf.kl import k1, k2, k3
from rlhf.losses import approx_kl, clip_fraction, policy_loss, preference_loss, value_loss


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
