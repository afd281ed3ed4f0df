"""Two seconds before the first update: the identities that must hold when policy and reference are still the same."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.generate import warp_logits
from rlhf.functional import masked_mean
from rlhf.infra.distributed import Dist
from rlhf.infra.healthy import TOLERANCE
from rlhf.infra.metrics import say
from rlhf.ppo.roles import ActorCritic
from rlhf.ppo.rollout import Rollout
from rlhf.reward.model import Score

FEW_ROWS = 8  # whose distributions are looked at for EOS: (tokens, V) in float32
LEAST_EOS = 1e-6  # a policy whose best chance to end is below this will never be seen to end


@dataclass(frozen=True)
class Check:
    name: str
    value: float
    limit: float  # the check passes while value <= limit
    largest: float | None = None  # where value is a mean

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # NaN fails

    def __str__(self) -> str:
        largest = "" if self.largest is None else f", largest {self.largest:.2e}"
        verdict = "PASS" if self.passed else "FAIL"
        return f"  {verdict}  {self.name:<58} {self.value:9.2e}  (limit {self.limit:.0e}{largest})"


@torch.no_grad()
def self_check(
    policy: ActorCritic,
    rollout: Rollout,
    score: Score | None,
    eos: int | Iterable[int],
    dist: Dist,
    fresh: bool = True,
    precision: str = "fp32",
    sampled_in: str | None = None,
) -> list[Check]:
    """The checks of a first rollout, one Check each. `fresh` says that policy and reference hold the same weights.

    `rollout` is what this rank has judged, one micro-batch of it is enough. `score` None leaves out the reward: a Python
    function may rightly look at its whole batch. Of several `eos` the likeliest counts. What a token may differ by in two
    forwards is the largest of all in fp32, and in half precision the mean, see TOLERANCE; sampled_in: the sampler's precision,
    where it is another.
    """
    mask = rollout.mask
    coarser = max(precision, sampled_in or precision, key=TOLERANCE.get)
    output = policy(rollout.tokens, mask, rollout.features)
    kept = rollout.features.shape[-1] > 0  # states of frozen layers, which may be the sampler's own
    whole = policy(rollout.tokens, mask).logprobs if kept else rollout.logprobs  # by all layers

    few = rollout[:FEW_ROWS]
    with dist.whole(policy.model):
        hidden = policy.model.trunk(few.tokens[:, :-1])[few.mask[:, 1:]]  # (N, D), the states responses were drawn in
        logits = warp_logits(policy.model.unembed(hidden), policy.temperature)
    stops = [eos] if isinstance(eos, int) else list(eos)
    no_eos = 1 - torch.clamp(logits.softmax(-1)[:, stops].max() / LEAST_EOS, max=1)

    def worst(x) -> float:
        """The largest of all ranks; unlike a maximum by all-reduce, it keeps a NaN."""
        return float(dist.all_gather_rows(torch.as_tensor(x, dtype=torch.float32, device=mask.device).reshape(1)).max())

    def among(name: str, largest: Tensor, mean: Tensor, precision: str = precision) -> Check:
        """Of differences whose largest and mean these are."""
        if precision == "fp32":
            return Check(name, worst(largest), TOLERANCE[precision])
        return Check(name, worst(mean), TOLERANCE[precision], worst(largest))

    def per_token(name: str, difference: Tensor, precision: str = precision) -> Check:
        """Of (B, T) differences."""
        difference = torch.where(mask, difference.abs(), 0)
        return among(name, difference.max(), masked_mean(difference, mask), precision)

    checks = [
        per_token("first ratio: |pi / pi_old - 1|", (output.logprobs - rollout.logprobs).exp() - 1),
        per_token("sampler: |cached - full forward| log-prob", whole - rollout.sampler_logprobs, coarser),
        Check("EOS can be sampled (0 = somewhere with probability)", worst(no_eos), 0.5),
        Check("all ranks hold the same weights (1 = they differ)", worst(not dist.same(policy)), 0),
    ]
    if score is not None:
        single = torch.cat([score(row.tokens, row.lengths, row.mask) for row in rollout[:4].split(1)])
        difference = (single - rollout.scores[: len(single)]).abs().cpu().double()  # (4,)
        checks.insert(2, among("reward: |alone - in a padded batch|", difference.max(), difference.mean()))
    if fresh:  # a resumed policy has rightly moved away
        checks.insert(0, per_token("reference: |log pi - log ref| per token", rollout.logprobs - rollout.ref_logprobs))
    return checks


def check_once(
    policy: ActorCritic,
    rollout: Rollout,
    score: Score | None,
    eos: int | Iterable[int],
    dist: Dist,
    fresh: bool,
    precision: str,
    sampled_in: str | None = None,
) -> None:
    """Before the first update: say PASS or FAIL for every identity; ValueError on all ranks where one fails."""
    checks = self_check(policy, rollout, score, eos, dist, fresh, precision, sampled_in)
    say("self-check before the first update\n" + "\n".join(map(str, checks)), dist.is_main)
    if failed := [check.name for check in checks if not check.passed]:
        raise ValueError(f"self-check failed: {'; '.join(failed)}")
