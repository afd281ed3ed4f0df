"""The self-check passes on a healthy set-up, and each check fails when its own thing is really broken."""

from dataclasses import replace

import pytest
import torch
from reference_model import small_model
from small_rollout import EOS, TEMPERATURE, WIDTH, act, actor_critic, frozen_reference, moved, reward_model

from model.transformer import Transformer
from rlhf.infra import distributed
from rlhf.ppo.roles import ActorCritic
from rlhf.ppo.rollout import judge
from rlhf.ppo.self_check import Check, self_check

ROWS = 8
NAMES = {  # short name -> how the line of the report begins
    "reference": "reference:",
    "ratio": "first ratio:",
    "sampler": "sampler:",
    "reward": "reward:",
    "eos": "EOS can be sampled",
    "ranks": "all ranks",
}


def checks(policy=None, reference=None, score=None, sampled_at=TEMPERATURE, dist=None, between=None, **options):
    """The failed checks' short names, after one rollout of 8 rows."""
    policy = policy or actor_critic("shared", "gpt2", torch.float32)
    reference = reference or frozen_reference(policy.model, TEMPERATURE)
    score = score or reward_model(torch.float32).score
    samples = act(policy, torch.arange(ROWS), temperature=sampled_at)
    rollout = judge(samples, policy, reference, score, 4, WIDTH)
    if between is not None:
        between(policy)
    found = self_check(policy, rollout, score, EOS, dist or distributed.Dist(), **options)
    names = [next(short for short, start in NAMES.items() if check.name.startswith(start)) for check in found]
    assert names == [name for name in NAMES if name in names]  # each once, in this order
    assert len(names) == len(NAMES) - (not options.get("fresh", True))
    return [name for name, check in zip(names, found) if not check.passed]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("critic", ["shared", "separate", "none"])
def test_a_healthy_setup_passes(family, critic):
    assert checks(actor_critic(critic, family, torch.float32)) == []


def test_another_reference():
    other = frozen_reference(moved(small_model("gpt2", torch.float32, seed=15), 0.01), TEMPERATURE)
    assert checks(reference=other) == ["reference"]
    assert checks(reference=other, fresh=False) == []  # a resumed policy has rightly moved away


def test_another_engine_may_differ_as_its_precision_does():
    """Sampled a little colder: too much for one forward against another in float32, little for bf16."""
    assert checks(sampled_at=TEMPERATURE * 1.01) == ["sampler"]
    assert checks(sampled_at=TEMPERATURE * 1.01, sampled_in="bf16") == []
    assert checks(sampled_at=TEMPERATURE * 3, sampled_in="bf16") == ["sampler"]
    assert checks(sampled_in="fp32") == []


@pytest.mark.parametrize("gap", [0.01, -0.01])
def test_a_gap_of_either_sign_on_one_token(gap):
    policy, score = actor_critic("shared", "gpt2", torch.float32), reward_model(torch.float32).score
    reference = frozen_reference(policy.model, TEMPERATURE)
    rollout = judge(act(policy, torch.arange(ROWS)), policy, reference, score, 4, WIDTH)
    one = torch.zeros_like(rollout.logprobs)
    one[3, rollout.lengths[3] - 1] = gap
    broken = {
        "ref_logprobs": ["reference"],
        "sampler_logprobs": ["sampler"],
        "logprobs": ["reference", "ratio", "sampler"],
    }
    for column, expected in broken.items():
        changed = replace(rollout, **{column: getattr(rollout, column) + one})
        failed = [check for check in self_check(policy, changed, score, EOS, distributed.Dist()) if not check.passed]
        assert [check.name.split(":")[0].split()[-1] for check in failed] == expected


def test_a_reference_at_another_temperature():
    policy = actor_critic("shared", "gpt2", torch.float32)
    assert checks(policy, frozen_reference(policy.model, 1.0)) == ["reference"]


def test_a_policy_that_changes_between_judge_and_learn():
    """Dropout, an adapter that is on in one pass only, a step too early: the first ratio is not one."""
    assert checks(between=lambda policy: moved(policy, 0.01)) == ["ratio"]


def test_a_sampler_at_another_temperature():
    assert checks(sampled_at=1.0) == ["sampler"]


def test_a_sampler_with_stale_weights():
    """The responses come from another policy than the one that judges them."""
    policy = actor_critic("shared", "gpt2", torch.float32)
    samples = act(policy, torch.arange(ROWS))
    moved(policy, 0.01)
    score, dist = reward_model(torch.float32).score, distributed.Dist()
    rollout = judge(samples, policy, frozen_reference(policy.model, TEMPERATURE), score, 4, WIDTH)
    failed = [check.name for check in self_check(policy, rollout, score, EOS, dist) if not check.passed]
    assert len(failed) == 1 and failed[0].startswith("sampler")


def test_a_reward_that_reads_padding():
    reads_padding = {
        "mean over all columns": lambda tokens, lengths, mask: tokens.float().mean(1),
        "last column": lambda tokens, lengths, mask: tokens[:, -1].float(),
        "width": lambda tokens, lengths, mask: lengths + tokens.shape[1],
        "minus width": lambda tokens, lengths, mask: lengths - tokens.shape[1],
        "normalised over its batch": lambda tokens, lengths, mask: lengths / lengths.sum(),
    }
    for name, score in reads_padding.items():
        assert checks(score=score) == ["reward"], name


class NeverEnds(Transformer):
    def unembed(self, hidden):
        logits = super().unembed(hidden).clone()
        logits[..., EOS] -= 30  # not forbidden, and yet never to be seen
        return logits


class EndsSometimes(Transformer):
    def unembed(self, hidden):
        logits = super().unembed(hidden).clone()
        logits[..., EOS] -= 30 * (hidden[..., 0] > 0)
        return logits


@pytest.mark.parametrize("kind, expected", [(NeverEnds, ["eos"]), (EndsSometimes, [])])
def test_an_eos_that_cannot_be_sampled(kind, expected):
    """Some states may well forbid it, but not all that the responses passed through."""
    model = small_model("gpt2", torch.float32, seed=15)
    restricted = kind(model.config)
    restricted.load_state_dict(model.state_dict())
    assert checks(ActorCritic(restricted, "shared", TEMPERATURE)) == expected


def test_ranks_that_differ():
    class Drifted(distributed.Dist):
        """Another rank holds other weights."""

        def same(self, module):
            return False

    assert checks(dist=Drifted()) == ["ranks"]


def test_one_bad_rank_is_enough():
    """Every number is the largest over the ranks, so that all of them stop."""

    class Other(distributed.Dist):
        def all_gather_rows(self, x):
            return torch.cat((x, torch.tensor([0.6])))

    assert checks(dist=Other()) == list(NAMES)


def test_not_a_number_fails():
    score = reward_model(torch.float32).score
    assert checks(score=lambda *batch: score(*batch) * torch.nan) == ["reward"]

    def broken(policy):
        with torch.no_grad():
            policy.model.norm.weight[0] = torch.nan

    assert "ratio" in checks(between=broken)


def test_a_check_reads_as_a_line():
    assert str(Check("first ratio", 0.25, 1e-3)).split() == ["FAIL", "first", "ratio", "2.50e-01", "(limit", "1e-03)"]
    assert str(Check("first ratio", 0.0, 1e-3)).split()[0] == "PASS"
    assert not Check("x", float("nan"), 1.0).passed and Check("x", 1.0, 1.0).passed
