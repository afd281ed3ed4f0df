"""Losses per token or per pair, unreduced: whoever knows the whole batch masks, sums and divides.

Padding is zero in all inputs, and `masked_sum(loss, mask)` drops it; where padding may hold garbage, mask the *inputs*
with `torch.where`. Only GSPO, which needs a mean over the response, takes a mask. All raise ValueError if their tensors
differ in shape, because (B, 1) against (B,) would broadcast to (B, B) without a word.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.functional import masked_sum
from rlhf.kl import k2


def policy_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO-clip (arXiv:1707.06347, eq. 7), negated; ratio = pi_new / pi_old. (B, T) -> (B, T)

    max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip_high)); clip_high = clip unless given (arXiv:2503.14476, eq. 10).
    dual_clip > 1 also bounds the loss where A < 0, by -A dual_clip (arXiv:1912.09729, eq. 5). clip = inf: no clip.
    """
    _same_shape(new_logprobs=new_logprobs, logprobs=logprobs, advantages=advantages)
    loss = torch.maximum(*_surrogates(new_logprobs, logprobs, advantages, clip, clip_high))
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss


def clip_fraction(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, clip: float, clip_high: float | None = None
) -> Tensor:
    """1 where the clip decides the loss, so that the token has no gradient; else 0. (B, T) -> (B, T)

    OpenAI's definition, shared by TRL, verl and OpenRLHF; CleanRL counts every ratio outside the range.
    """
    _same_shape(new_logprobs=new_logprobs, logprobs=logprobs, advantages=advantages)
    plain, clipped = _surrogates(new_logprobs, logprobs, advantages, clip, clip_high)
    return (clipped > plain).to(plain.dtype)


def gspo_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    clip_high: float | None = None,
) -> Tensor:
    """Group sequence policy optimisation (arXiv:2507.18071, eq. 14), negated: one clipped ratio a response. (B, T) each

    s = exp(mean_t log(pi_new / pi_old)) of the response; max(-A s, -A clamp(s, 1 - clip, 1 + clip_high)), where every token
    hands its share of the gradient on: s_t = stop(s) pi_new,t / stop(pi_new,t). clip is two orders smaller than PPO's (3e-4).
    """
    _same_shape(new_logprobs=new_logprobs, logprobs=logprobs, advantages=advantages, mask=mask)
    new = torch.where(mask, new_logprobs, 0)
    moved = mean_log_ratio(new_logprobs, logprobs, mask).detach()
    log_ratio = moved + new - new.detach()  # (B, T): the value of s, the gradient of its token
    return torch.maximum(*_surrogates(log_ratio, torch.zeros_like(new), advantages, clip, clip_high))


def mean_log_ratio(new_logprobs: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
    """log s of GSPO (arXiv:2507.18071, eq. 7): mean_t log(pi_new / pi_old) of the response, on each of its tokens. (B, T)"""
    moved = masked_sum(new_logprobs - logprobs, mask, 1) / mask.sum(1).clamp(min=1)  # (B,)
    return torch.where(mask, moved[:, None], 0)


def cispo_loss(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, clip: float, clip_high: float | None = None
) -> Tensor:
    """Clipped importance-sampling weights (MiniMax-M1, arXiv:2506.13585, eq. 4), negated. (B, T) -> (B, T)

    -stop(clamp(ratio, 1 - clip, 1 + clip_high)) A log pi_new: the weight is clipped and no token loses its gradient.
    """
    _same_shape(new_logprobs=new_logprobs, logprobs=logprobs, advantages=advantages)
    ratio = (new_logprobs - logprobs).exp()
    weight = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high)).detach()
    return -weight * advantages * new_logprobs


def truncated_importance(logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """Weight of a token's policy loss where another engine, or precision, sampled than the one that learns. (B, T) -> (B, T)

    min(exp(log pi_old - log pi_sampler), C): truncated importance sampling, TIS (Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training", fengyao.notion.site/off-policy-rl). Exactly 1 where the two
    agree. ValueError for C < 1, which would scale down also what needs no correction.
    """
    _same_shape(logprobs=logprobs, sampler_logprobs=sampler_logprobs)
    if not cap >= 1:
        raise ValueError(f"the cap of importance weights is {cap}; it must be at least 1")
    return (logprobs - sampler_logprobs).exp().clamp(max=cap).detach()


def approx_kl(new_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """How far the policy has moved since it acted: (log pi_new - log pi_old)^2 / 2, nats. (B, T) -> (B, T)

    OpenAI's and TRL's `approxkl`, the second-order KL(old || new); OpenRLHF and verl log -(log pi_new - log pi_old).
    """
    _same_shape(new_logprobs=new_logprobs, logprobs=logprobs)
    return k2(new_logprobs, logprobs)


def _surrogates(new_logprobs, logprobs, advantages, clip, clip_high):
    ratio = (new_logprobs - logprobs).exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return -advantages * ratio, -advantages * clipped


def value_loss(new_values: Tensor, values: Tensor, returns: Tensor, clip: float | None = None) -> Tensor:
    """Half the squared error, or the larger of it and the error of the value clipped to old +- clip. (B, T) -> (B, T)

    max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2;  clip None: (V - R)^2 / 2.
    Source: openai/lm-human-preferences, lm_human_preferences/train_policy.py `loss`.
    """
    _same_shape(new_values=new_values, values=values, returns=returns)
    return torch.maximum(*_value_errors(new_values, values, returns, clip))


def value_clip_fraction(new_values: Tensor, values: Tensor, returns: Tensor, clip: float | None = None) -> Tensor:
    """1 where the clipped value has the larger error, so that the token has no gradient; else 0. (B, T) -> (B, T)"""
    _same_shape(new_values=new_values, values=values, returns=returns)
    plain, clipped = _value_errors(new_values, values, returns, clip)
    return (clipped > plain).to(plain.dtype)


def _value_errors(new_values, values, returns, clip):
    clipped = new_values if clip is None else new_values.clamp(values - clip, values + clip)
    return (new_values - returns) ** 2 / 2, (clipped - returns) ** 2 / 2


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    label: Tensor | None = None,
) -> Tensor:
    """Bradley-Terry: negative log-likelihood that the chosen response beats the rejected one, nats. (B,) -> (B,)

    -p log sigmoid(d) - (1 - p) log sigmoid(-d), d = chosen - rejected - margin (arXiv:2203.02155, eq. 1;
    margin: arXiv:2307.09288, eq. 2). p = 1 - label_smoothing, or `label` (B,): the probability that chosen is better.
    Raises ValueError if both are given: a soft label is already smooth.
    """
    _same_shape(chosen=chosen, rejected=rejected, margin=margin, label=label)
    if label is not None and label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing} together with soft labels would smooth twice; use one")
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    p = 1 - label_smoothing if label is None else label
    return -p * F.logsigmoid(difference) - (1 - p) * F.logsigmoid(-difference)


def centring_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(chosen + rejected)^2: keeps the level of the rewards, which the preference loss leaves free, near 0. (B,) -> (B,)

    Eisenstein et al. 2023 (arXiv:2312.09244), eq. 2; the center_rewards_coefficient of TRL's RewardTrainer weighs it.
    """
    _same_shape(chosen=chosen, rejected=rejected)
    return (chosen + rejected) ** 2


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    label: Tensor | None = None,
) -> Tensor:
    """Direct preference optimisation (arXiv:2305.18290, eq. 7) on log-probs *summed* over the response. (B,) -> (B,)

    The preference loss of the implicit rewards beta log(pi / ref), smoothed (ericmitchell.ai/cdpo.pdf, eq. 3) or with a
    `label` (B,) as it has them.
    """
    _same_shape(policy_chosen=policy_chosen, ref_chosen=ref_chosen)
    _same_shape(policy_rejected=policy_rejected, ref_rejected=ref_rejected)
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    return preference_loss(chosen, rejected, label_smoothing=label_smoothing, label=label)


def ipo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """Identity preference optimisation (arXiv:2310.12036, eq. 17), whose aim is a finite margin. (B,) -> (B,)

    (h - 1 / (2 beta))^2, h = log(pi / ref)_chosen - log(pi / ref)_rejected. The paper sums log-probs over the response;
    TRL hands in their mean per token.
    """
    _same_shape(policy_chosen=policy_chosen, ref_chosen=ref_chosen)
    _same_shape(policy_rejected=policy_rejected, ref_rejected=ref_rejected, policy_chosen=policy_chosen)
    return ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected) - 1 / (2 * beta)) ** 2


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of tokens under the logits that predict them, nats; nothing is shifted here. (..., V) -> (...)

    -log softmax(z)[token] = logsumexp(z) - z[token], in float32 for half precision. torch's log_softmax stays in the cache row
    by row, where logsumexp passes over all logits five times.
    """
    logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return -logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _same_shape(**tensors: Tensor | None):
    shapes = {name: tuple(x.shape) for name, x in tensors.items() if x is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
