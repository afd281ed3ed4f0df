"""One PPO minibatch: the loss of a micro-batch, the gradient of an optimiser step, and the numbers worth looking at."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.functional import explained_variance, masked_mean, masked_sum, masked_var
from rlhf.infra.distributed import Dist
from rlhf.infra.optim import Precision
from rlhf.losses import (
    approx_kl,
    cispo_loss,
    clip_fraction,
    gspo_loss,
    mean_log_ratio,
    policy_loss,
    truncated_importance,
    value_clip_fraction,
    value_loss,
)
from rlhf.ppo.roles import PolicyOutput
from rlhf.ppo.rollout import Cut, Experience, Rollout, by_rows


@dataclass(frozen=True)
class Objective:
    """The numbers of the PPO objective: policy loss + value_coef * value loss - entropy_coef * entropy."""

    clip: float = 0.2  # ratio may move this far from 1
    clip_high: float | None = None  # upper bound of the ratio, if it differs (DAPO, arXiv:2503.14476)
    dual_clip: float | None = None  # bound of the loss for negative advantages (arXiv:1912.09729)
    value_clip: float | None = 0.2  # values may move this far from the old ones; None = unclipped
    value_coef: float = 0.5
    entropy_coef: float = 0.0
    policy_loss: str = "ppo"  # of POLICY_LOSSES
    importance_cap: float | None = None  # of the weights that correct for another sampler; None = no weights


POLICY_LOSSES = {  # (log-probs now (B, T), what was experienced, the numbers) -> per token (B, T)
    "ppo": lambda new, b, o: policy_loss(new, b.logprobs, b.advantages, o.clip, o.clip_high, o.dual_clip),
    "gspo": lambda new, b, o: gspo_loss(new, b.logprobs, b.advantages, b.mask, o.clip, o.clip_high),
    "cispo": lambda new, b, o: cispo_loss(new, b.logprobs, b.advantages, o.clip, o.clip_high),
}


def weighted_policy_loss(new_logprobs: Tensor, batch: Experience, objective: Objective) -> Tensor:
    """The policy loss of every token, times its importance weight where there is one. (B, T) -> (B, T)"""
    loss = POLICY_LOSSES[objective.policy_loss](new_logprobs, batch, objective)
    if objective.importance_cap is None:
        return loss
    return loss * truncated_importance(batch.logprobs, batch.sampler_logprobs, objective.importance_cap)


CLIPPED = {  # what `clip_fraction` is asked about: (new, old, the sign that makes it count)
    "ppo": lambda new, b: (new, b.logprobs, b.advantages),
    "gspo": lambda new, b: (b.logprobs + mean_log_ratio(new, b.logprobs, b.mask), b.logprobs, b.advantages),
    "cispo": lambda new, b: (new, b.logprobs, new - b.logprobs),  # its weights are clipped on both sides
}


def ppo_loss(output: PolicyOutput, batch: Experience, objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the loss over the masked tokens, and the sums of what is logged. The caller divides by the step's tokens."""
    o, mask = objective, batch.mask
    policy = weighted_policy_loss(output.logprobs, batch, o)  # (B, T)
    values = batch.base_values + output.values
    value = value_loss(values, batch.values, batch.returns, o.value_clip)  # (B, T)
    loss = masked_sum(policy, mask) + o.value_coef * masked_sum(value, mask)
    if o.entropy_coef:
        loss = loss - o.entropy_coef * masked_sum(output.entropy, mask)
    with torch.no_grad():
        sums = {
            "loss/policy": policy,
            "loss/value": value,
            "policy/approxkl": approx_kl(output.logprobs, batch.logprobs),
            "policy/clipfrac": clip_fraction(*CLIPPED[o.policy_loss](output.logprobs, batch), o.clip, o.clip_high),
            "policy/entropy": output.entropy,
            "policy/ratio": torch.exp(output.logprobs - batch.logprobs),
            "value/clipfrac": value_clip_fraction(values, batch.values, batch.returns, o.value_clip),
        }
        return loss, {name: masked_sum(x, mask) for name, x in sums.items()}


def accumulate_gradient(
    policy: torch.nn.Module,
    minibatch: Experience,
    objective: Objective,
    micro_batch: int,
    dist: Dist,
    precision: Precision,
    cut: Cut | None = None,
) -> dict[str, float]:
    """Add the gradient of the minibatch to policy.grad, `micro_batch` rows or a part of `cut` at a time; -> per-token means.

    `minibatch` holds this rank's rows. The loss of every token is divided by the tokens of the whole minibatch over all
    micro-batches and ranks, so the gradient does not depend on how the rows were cut up.
    """
    tokens = dist.sum(minibatch.mask.sum())
    total: dict[str, Tensor] = {}
    parts = (cut or by_rows(micro_batch))(minibatch.lengths)
    for part in parts:
        batch = minibatch[part].trim()
        with dist.grad_sync(policy, part is parts[-1]):
            with precision.autocast():
                output = policy(batch.tokens, batch.mask, batch.features)
            loss, sums = ppo_loss(output, batch, objective)
            # DDP averages over the ranks; loss_scale turns its mean back into a sum
            precision.scaler.scale(loss / tokens * dist.loss_scale).backward()
        total = {name: total.get(name, 0) + x for name, x in sums.items()}
    means = dist.sum(torch.stack(list(total.values()))) / tokens
    return dict(zip(total, means.tolist()))


NO_UPDATE = dict.fromkeys(
    "loss/policy loss/value policy/approxkl policy/clipfrac policy/entropy policy/ratio value/clipfrac "
    "policy/grad_norm".split(),
    math.nan,
)  # what is known of an iteration from which nothing was learned


def metrics(
    experience: Experience, advantages: Tensor, updates: list[dict[str, float]], kl_coef: float, minibatches: int
) -> dict[str, float]:
    """The numbers of an iteration in the field's names; `advantages` (B, T) are those before whitening.

    KL is the policy that acted against the reference, nats per response. The updates' means are over all of them that
    were taken, or else over those that were not ("bad/steps" of an update is 1 then); the first ratio is of the first.
    Explained variance is 1 - Var(R - V) / Var(R).
    """
    mask, returns = experience.mask, experience.returns
    score = float(experience.scores.mean())
    kl = mean_kl(experience)
    reward = float(masked_sum(experience.rewards, mask, 1).mean())
    mismatch = torch.where(mask, (experience.logprobs - experience.sampler_logprobs).abs(), 0)
    record = {
        "objective/scores": score,
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": float(masked_sum(experience.entropy, mask, 1).mean()),
        "objective/non_score_reward": reward - score,
        "objective/rlhf_reward": reward,
        "response/length": float(mask.sum(1).cpu().double().mean()),
        "response/eos_rate": float(experience.finished.cpu().double().mean()),
        "response/truncated_rate": float((~experience.finished).cpu().double().mean()),
        "response/distinct_2": distinct_n(experience.tokens[mask], mask.sum(1), 2),
        "rollout/logprob_diff_mean": float(masked_mean(mismatch, mask)),
        "rollout/logprob_diff_max": float(mismatch.max()),
        "returns/mean": float(masked_mean(returns, mask)),
        "returns/std": float(masked_var(returns, mask).sqrt()),
        "advantages/mean": float(masked_mean(advantages, mask)),
        "advantages/std": float(masked_var(advantages, mask).sqrt()),
        "value/mean": float(masked_mean(experience.values, mask)),
        "value/explained_var": float(explained_variance(experience.values, returns, mask)),
    }
    taken = [update for update in updates if not update["bad/steps"]]
    means = taken or updates or [NO_UPDATE]
    record |= {name: sum(update[name] for update in means) / len(means) for name in NO_UPDATE}
    first = (updates or [NO_UPDATE])[0]["policy/ratio"]
    return record | {"policy/ratio_first": first, "policy/epochs_run": len(taken) / minibatches}


def mean_kl(rollout: Rollout) -> float:
    """KL of the policy that acted against the reference, estimated by k1: nats per response."""
    return float(masked_sum(rollout.logprobs - rollout.ref_logprobs, rollout.mask, 1).mean())


def distinct_n(ids: Tensor, lengths: Tensor, n: int) -> float:
    """Different n-grams / all n-grams, counted over all rows together (Li et al. 2016, arXiv:1510.03055); 0 if none.

    ids (N,) of the rows, one after the other; lengths (B,) of them.
    """
    row, last = torch.arange(len(lengths), device=ids.device).repeat_interleave(lengths), len(ids) - n + 1
    if last < 1:
        return 0.0
    grams = ids[:last]  # as one number each, which stands for all ids so far
    for i in range(1, n):
        following = ids[i : last + i]
        grams = grams.unique(return_inverse=True)[1] * (following.max() + 1) + following
    grams = grams[row[:last] == row[n - 1 :]]
    return len(grams.unique()) / len(grams) if len(grams) else 0.0
