"""A device and a precision against float64 on a CPU: texts, judgement, gradient, update, and a run that goes on.

The same bodies run on the CPU, so they are tried where there is no GPU. Distances are relative norms.
"""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from reference_model import small_model
from small_rollout import PAD, RESPONSE, TEMPERATURE, WIDTH, base_model, moved, prompts, reward_model
from torch import Tensor, nn

from model.generate import Generated, Sampling, generate, row_uniforms
from rlhf.functional import whiten
from rlhf.infra import checkpoint, distributed, optim
from rlhf.infra.optim import Precision
from rlhf.ppo import update as ppo
from rlhf.ppo.roles import ActorCritic, logprobs_of
from rlhf.ppo.rollout import Experience, Rollout, judge, minibatches
from rlhf.rewards import shape_rewards

CPU, ROWS, STOPS = torch.device("cpu"), 16, [1, 2]
OBJECTIVE = ppo.Objective(clip=0.1, value_clip=0.1, value_coef=0.4, entropy_coef=0.02)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_every_device = pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=gpu)])
# How far from float64's numbers may be, and a gradient, in which errors of many tokens add up. This model is small and its
# attention sharp: a CPU's bf16 is .018 and .068 away, its float32 1e-6.
LIMITS = [("fp32", 1e-4, 1e-4), ("bf16", 4e-2, 2e-1)]
in_every_precision = pytest.mark.parametrize("name, limit, gradient", LIMITS)


def precision_of(device: torch.device, name: str) -> Precision:
    plain = optim.amp(device)
    if name == "fp32":
        return plain
    return plain._replace(autocast=partial(torch.autocast, device.type, dtype=torch.bfloat16))


def far(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|"""
    ours, theirs = (x.detach().double().cpu() for x in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm())


def actor_critic(dtype=torch.float64, device=CPU) -> ActorCritic:
    """Groups of heads, an output matrix of its own, and a critic that has an opinion; the same numbers in every dtype."""
    policy = ActorCritic(small_model("llama", seed=15), "shared", TEMPERATURE)
    return moved(policy, 0.05).to(device, dtype)


def acted(policy: ActorCritic, precision: Precision, iteration: int = 0) -> Generated:
    device = policy.value_head.weight.device
    ids, lengths = (x.to(device) for x in prompts(ROWS, iteration))
    uniforms = row_uniforms(1, iteration, range(ROWS), RESPONSE)
    with precision.autocast():
        return generate(policy.model, ids, lengths, Sampling(RESPONSE, STOPS, PAD, TEMPERATURE), uniforms)


def moved_to(samples: Generated, device: torch.device, dtype: torch.dtype) -> Generated:
    def move(x: Tensor) -> Tensor:
        return x.to(device, dtype if x.is_floating_point() else x.dtype)

    return samples.map(move)


def judged(policy: ActorCritic, precision: Precision, samples: Generated) -> Rollout:
    weight = policy.value_head.weight
    reference = logprobs_of(base_model().to(weight.device, weight.dtype), TEMPERATURE)
    score = reward_model().to(weight.device, weight.dtype).score
    samples = moved_to(samples, weight.device, weight.dtype)
    with precision.autocast():
        return judge(samples, policy, reference, score, 4, WIDTH)


def credited(rollout: Rollout) -> Experience:
    rewards = shape_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, 0.1)
    return Experience.of(rollout, rewards, whiten(rewards, rollout.mask), rewards.flip(1).cumsum(1).flip(1))


def flat(module: nn.Module, of: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([of(x).flatten() for x in module.parameters()])


@pytest.fixture(scope="module")
def exact():
    """What float64 makes of it on a CPU: policy, samples, rollout, experience."""
    policy, precision = actor_critic(), precision_of(CPU, "fp32")
    samples = acted(policy, precision)
    rollout = judged(policy, precision, samples)
    return policy, samples, rollout, credited(rollout)


@on_every_device
@in_every_precision
def test_generate(exact, kind, name, limit, gradient):
    """What the sampler says of its tokens, of ragged prompts and ends, is what float64 says of the same texts."""
    device = torch.device(kind)
    policy = actor_critic(torch.float32, device)
    samples = acted(policy, precision_of(device, name))
    assert not samples.finished.all() and samples.finished.any()  # some rows end by themselves and some do not
    told = judged(exact[0], precision_of(CPU, "fp32"), samples)
    assert far(samples.logprobs, told.logprobs[:, : samples.logprobs.shape[1]]) < limit
    if name == "fp32":
        assert torch.equal(samples.tokens.cpu(), exact[1].tokens)


@on_every_device
@in_every_precision
def test_judge(exact, kind, name, limit, gradient):
    device = torch.device(kind)
    rollout = judged(actor_critic(torch.float32, device), precision_of(device, name), exact[1])
    for field in ("logprobs", "ref_logprobs", "entropy", "values", "scores"):
        assert far(getattr(rollout, field), getattr(exact[2], field)) < limit, field


@on_every_device
@in_every_precision
def test_one_update(exact, kind, name, limit, gradient):
    """Its gradient, and the weights after a step of AdamW."""
    device, (policy, samples, _, experience) = torch.device(kind), exact
    policies = copy.deepcopy(policy), actor_critic(torch.float32, device)
    precisions = precision_of(CPU, "fp32"), precision_of(device, name)
    ours = credited(judged(policies[1], precisions[1], samples))  # its own, so that every ratio begins at 1
    for one, precision, rows in zip(policies, precisions, (experience, ours)):
        ppo.accumulate_gradient(one, rows, OBJECTIVE, 4, distributed.Dist(device=rows.tokens.device), precision)
    theirs, mine = (flat(one, lambda x: x.grad) for one in policies)
    assert far(mine, theirs) < gradient
    for one, precision in zip(policies, precisions):
        norm = optim.step(optim.make_optimizer(one, 1e-3, eps=1e-5), one, precision.scaler, 1.0)
        assert norm == pytest.approx(float(theirs.norm()), rel=gradient)
    weights = [flat(one, lambda x: x) for one in policies]
    assert far(weights[1], weights[0]) < limit / 10


def trained(device: torch.device, precision: Precision, stop=None) -> Tensor:
    """The weights after four iterations; stop(policy, optimizer) -> the two that go on after the second."""
    policy = actor_critic(torch.float32, device)
    optimizer = optim.make_optimizer(policy, 1e-2, eps=1e-5)
    for iteration in range(4):
        if stop and iteration == 2:
            policy, optimizer = stop(policy, optimizer)
        experience = credited(judged(policy, precision, acted(policy, precision, iteration)))
        for rows in minibatches(ROWS, 2, 2, 1, iteration):
            minibatch = experience[rows.to(device)]
            ppo.accumulate_gradient(policy, minibatch, OBJECTIVE, 4, distributed.Dist(device=device), precision)
            optim.step(optimizer, policy, precision.scaler, 0.5)
    return flat(policy, lambda x: x).detach()


@on_every_device
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_second_run_and_a_resumed_one(tmp_path, kind, name):
    """To the bit on a CPU. A GPU may add up in any order, and a text may then turn out another: no promise but here."""

    def through_a_file(policy: ActorCritic, optimizer: optim.AdamW):
        moments = checkpoint.optimizer_tensors(optimizer, policy)
        checkpoint.save(tmp_path / "half", checkpoint.trained_state(policy), {"kind": "test"}, {}, moments)
        saved, other = checkpoint.load(tmp_path / "half"), moved(actor_critic(torch.float32, device), 0.1)
        checkpoint.load_weights(other, saved.read("model.safetensors"), saved.path)
        again = optim.make_optimizer(other, 1e-2, eps=1e-5)
        checkpoint.load_optimizer(again, other, saved.read("optimizer.safetensors"))
        assert all(x.device == device for x in other.parameters())
        return other, again

    device = torch.device(kind, 0) if kind == "cuda" else CPU
    precision = precision_of(device, name)
    first, second, resumed = (trained(device, precision, stop) for stop in (None, None, through_a_file))
    if kind == "cpu":
        assert torch.equal(first, second) and torch.equal(first, resumed)
    else:
        print(f"{name}: two runs equal {torch.equal(first, second)}, resumed {torch.equal(first, resumed)}")
        assert far(second, first) < 1e-2 and far(resumed, first) < 1e-2
