"""KL(policy || reference) from the log-probabilities of sampled tokens, and the coefficient that weighs it.

k1, k2, k3 as in John Schulman's note "Approximating KL Divergence" (joschu.net/blog/kl-approx.html), for tokens drawn
from the policy. They take no mask: whoever sums them masks their inputs.
"""

import math

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased, high variance, can be negative: log(pi / ref) of the sampled token, nats. (B, T) -> (B, T)"""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Biased, low variance, never negative: log(pi / ref)^2 / 2, nats. (B, T) -> (B, T)"""
    return (logprobs - ref_logprobs) ** 2 / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased and never negative: ref / pi - 1 - log(ref / pi), nats (arXiv:2402.03300, eq. 4). (B, T) -> (B, T)

    Unclamped: it overflows to inf where the reference is far more certain than the policy.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL over the whole vocabulary, exact: sum_v pi_v (log pi_v - log ref_v), nats. (..., V) -> (...)

    Infinite where the policy gives weight to a token that the reference excludes (logit -inf).
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logp, logq = logits.log_softmax(-1, dtype=dtype), ref_logits.log_softmax(-1, dtype=dtype)
    return (logp.exp() * torch.where(logp > -math.inf, logp - logq, 0)).sum(-1)  # 0 log 0 = 0, whatever ref says


class FixedKL:
    """A coefficient that stays. It comes from the command line at every start, so it has no state."""

    def __init__(self, coef: float):
        self.coef = coef

    def update(self, kl: float, n: int):
        pass

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict):
        pass


class AdaptiveKL:
    """Steers the coefficient so that the KL comes to `target`, nats per sequence (arXiv:1909.08593, section 2.2).

    e = clip(KL / target - 1, -0.2, 0.2);  coef *= 1 + e n / horizon, after n sequences of mean KL. The paper writes
    K_beta for n / horizon; the horizon is that of its code, openai/lm-human-preferences.
    Raises ValueError if target or horizon is not positive, or if the KL is not a number.
    """

    def __init__(self, coef: float, target: float, horizon: float):
        if target <= 0 or horizon <= 0:
            raise ValueError(f"adaptive KL needs a positive target and horizon, not {target} and {horizon}")
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, n: int):
        """kl: mean over n sequences of the KL summed over their tokens, nats."""
        if math.isnan(kl):
            raise ValueError("the KL between policy and reference is not a number; its coefficient cannot follow it")
        error = min(max(float(kl) / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon

    def state_dict(self) -> dict:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict):
        self.coef = state["coef"]
