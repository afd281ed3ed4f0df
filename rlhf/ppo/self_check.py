"""Two seconds before the first update: the identities that must hold when policy and reference are still the same."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from model.generate import warp_logits
from rlhf.infra.distributed import Dist
from rlhf.infra.metrics import say
from rlhf.ppo.roles import ActorCritic
from rlhf.ppo.rollout import Rollout
from rlhf.reward.model import Score

TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 2e-1}  # nats per token, of what two forwards may differ by
LEAST_EOS = 1e-6  # a policy whose best chance to end is below this will never be seen to end


@dataclass(frozen=True)
class Check:
    name: str
    value: float
    limit: float  # the check passes while value <= limit

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # NaN fails

    def __str__(self) -> str:
        return f"  {'PASS' if self.passed else 'FAIL'}  {self.name:<58} {self.value:9.2e}  (limit {self.limit:.0e})"


@torch.no_grad()
def self_check(
    policy: ActorCritic,
    rollout: Rollout,
    score: Score | None,
    eos: int | Iterable[int],
    dist: Dist,
    fresh: bool = True,
    tolerance: float = 1e-3,
) -> list[Check]:
    """The checks of a first rollout, one Check each. `fresh` says that policy and reference hold the same weights.

    `rollout` is what this rank has judged, one micro-batch of it is enough. `score` None leaves out the reward: a Python
    function may rightly look at its whole batch. Of several `eos` the likeliest counts. `tolerance` bounds what the
    cached and the full forward may differ by, in nats per token.
    """
    mask = rollout.mask
    gap = torch.where(mask, (rollout.logprobs - rollout.ref_logprobs).abs(), 0).max()
    output = policy(rollout.tokens, mask, rollout.features)
    ratio = torch.where(mask, (output.logprobs - rollout.logprobs).exp() - 1, 0).abs().max()
    cache = torch.where(mask, (rollout.logprobs - rollout.sampler_logprobs).abs(), 0).max()

    with dist.whole(policy.model):
        hidden = policy.model.trunk(rollout.tokens[:, :-1])[mask[:, 1:]]  # (N, D) where responses were drawn
        logits = warp_logits(policy.model.unembed(hidden), policy.temperature)
    stops = [eos] if isinstance(eos, int) else list(eos)
    no_eos = 1 - torch.clamp(logits.softmax(-1)[:, stops].max() / LEAST_EOS, max=1)

    def worst(x) -> float:
        """The largest of all ranks; unlike a maximum by all-reduce, it keeps a NaN."""
        return float(dist.all_gather_rows(torch.as_tensor(x, dtype=torch.float32, device=mask.device).reshape(1)).max())

    checks = [
        Check("first ratio: |pi / pi_old - 1|", worst(ratio), tolerance),
        Check("sampler: |cached - full forward| log-prob", worst(cache), tolerance),
        Check("EOS can be sampled (0 = somewhere with probability)", worst(no_eos), 0.5),
        Check("all ranks hold the same weights (1 = they differ)", worst(not dist.same(policy)), 0),
    ]
    if score is not None:
        few = rollout[:4]
        single = torch.cat([score(row.tokens, row.lengths, row.mask) for row in few.split(1)])
        batched = score(rollout.tokens, rollout.lengths, mask)[: len(few)]
        checks.insert(2, Check("reward: |alone - in a padded batch|", worst((single - batched).abs().max()), tolerance))
    if fresh:  # a resumed policy has rightly moved away
        checks.insert(0, Check("reference: |log pi - log ref| per token", worst(gap), tolerance))
    return checks


def check_once(
    policy: ActorCritic,
    rollout: Rollout,
    score: Score | None,
    eos: int | Iterable[int],
    dist: Dist,
    fresh: bool,
    precision: str,
) -> None:
    """Before the first update: say PASS or FAIL for every identity; ValueError on all ranks where one fails."""
    checks = self_check(policy, rollout, score, eos, dist, fresh, TOLERANCE[precision])
    say("self-check before the first update\n" + "\n".join(map(str, checks)), dist.is_main)
    if failed := [check.name for check in checks if not check.passed]:
        raise ValueError(f"self-check failed: {'; '.join(failed)}")
