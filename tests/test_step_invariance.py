"""How a batch is cut into micro-batches, ranks and rows changes memory and speed, and nothing else.

A real rollout of a tiny policy (ragged prompts and responses), credit whitened over all ranks, then the gradient of one
optimiser step, after the policy has moved so far that some tokens are clipped. The file is its own worker: two processes
run `everything` and leave their gradients for the tests to compare with those of one process.
"""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_rollout import (
    EOS,
    PAD,
    TEMPERATURE,
    WIDTH,
    act,
    actor_critic,
    base_model,
    frozen_reference,
    moved,
    reward_model,
)
from tiny import World
from torch import Tensor

from data.loader import micro_batches
from rlhf.advantages import ESTIMATORS
from rlhf.functional import whiten
from rlhf.infra import checkpoint, distributed, optim
from rlhf.ppo import update as ppo
from rlhf.ppo.roles import ActorCritic
from rlhf.ppo.rollout import Experience, Rollout, gather, judge, minibatches
from rlhf.rewards import missing_eos, shape_rewards

ROWS, SAMPLES, MICRO_BATCHES = 16, 4, (1, 2, 4, 8)
CRITIC = {"gae": "shared", "rloo": "none", "grpo": "none", "dr_grpo": "none", "reinforce++": "none"}
KL_COEF, EOS_PENALTY, GAMMA, LAM = 0.3, 0.5, 0.97, 0.9
OBJECTIVE = ppo.Objective(clip=0.1, clip_high=0.15, dual_clip=1.2, value_clip=0.1, value_coef=0.4, entropy_coef=0.02)
ALONE, GROUP = distributed.Dist(), torch.arange(ROWS) // SAMPLES
Gradient = dict[str, Tensor]


# ---- the loop of train_ppo.py, as one process sees it


def act_and_judge(ranks: distributed.Dist, policy: ActorCritic, iteration: int = 0, micro_batch: int = 4) -> Rollout:
    """The rollout of all ranks; each acts and judges its own rows."""
    mine = torch.arange(ranks.rank, ROWS, ranks.world)
    base = frozen_reference(base_model("gpt2"), TEMPERATURE)
    samples = act(policy, mine, SAMPLES, iteration)
    return gather(judge(samples, policy, base, reward_model().score, micro_batch, WIDTH), ranks)


def credit(rollout: Rollout, estimator: str = "gae", group: Tensor = GROUP, whiten=whiten) -> Experience:
    scores = missing_eos(rollout.scores, rollout.finished, EOS_PENALTY)
    rewards = shape_rewards(scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, KL_COEF)
    row = ESTIMATORS[estimator]
    advantages, returns = row.estimate(rewards, rollout.values, rollout.mask, GAMMA, LAM, group)
    advantages = whiten(advantages, rollout.mask) if row.whiten else advantages
    return Experience.of(rollout, rewards, advantages, returns)


def step_gradient(
    ranks: distributed.Dist, policy: ActorCritic, minibatch: Experience, micro_batch: int, accumulate=None
) -> tuple[Gradient, dict[str, float]]:
    """Gradient and logged means of a step on `minibatch`, of which this rank takes its share."""
    policy.zero_grad()
    share = minibatch[torch.arange(ranks.rank, len(minibatch), ranks.world)]
    accumulate = accumulate or ppo.accumulate_gradient
    means = accumulate(ranks.wrap(policy), share, OBJECTIVE, micro_batch, ranks, optim.amp(ranks.device))
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}, means


def mean_of_means(policy, minibatch, objective, micro_batch, dist, precision) -> None:
    """The usual mistake: every micro-batch divides by its own tokens, and DDP averages that over the ranks."""
    parts = list(minibatch.split(micro_batch))
    for batch in parts:
        loss, _ = ppo.ppo_loss(policy(batch.tokens, batch.mask), batch, objective)
        (loss / batch.mask.sum() / len(parts)).backward()


@functools.cache
def acted(critic: str, ranks: distributed.Dist = ALONE) -> tuple[ActorCritic, Rollout]:
    """A policy that has moved since it acted, and what it did."""
    policy = actor_critic(critic, "gpt2")
    rollout = act_and_judge(ranks, policy)
    return moved(policy, 0.02), rollout


def train(ranks: distributed.Dist, critic: str, micro_batch: int, iterations: int = 3):
    """Three iterations of two epochs of two minibatches: twelve optimiser steps. -> policy, metrics of every step"""
    policy = actor_critic(critic, "gpt2")
    learner, precision = ranks.wrap(policy), optim.amp(ranks.device)
    optimizer = optim.make_optimizer(policy, lr=3e-3, eps=1e-5)
    updates = []
    for iteration in range(iterations):
        experience = credit(act_and_judge(ranks, policy, iteration, micro_batch))
        for rows in minibatches(ROWS, 2, 2, 1, iteration):
            minibatch = experience[rows[ranks.rank :: ranks.world]]
            update = ppo.accumulate_gradient(learner, minibatch, OBJECTIVE, micro_batch, ranks, precision)
            updates.append(update | {"norm": optim.step(optimizer, policy, precision.scaler, clip=0.5)})
    return policy, updates


def everything(out: Path) -> None:
    """The job of each of the two processes."""
    torch.set_num_threads(1)
    ranks = distributed.setup()
    logged = {"world": ranks.world}
    for critic in ("shared", "separate"):
        policy, rollout = acted(critic, ranks)
        experience = credit(rollout)
        for micro_batch in MICRO_BATCHES:
            gradient, means = step_gradient(ranks, policy, experience, micro_batch)
            checkpoint.save(out / f"{critic} {micro_batch} {ranks.rank}", gradient, {})
            logged[f"{critic} {micro_batch}"] = means
        gradient, _ = step_gradient(ranks, policy, experience, 8, mean_of_means)
        checkpoint.save(out / f"{critic} wrong {ranks.rank}", gradient, {})
        trained, logged[f"{critic} trained"] = train(ranks, critic, micro_batch=2)
        checkpoint.save(out / f"{critic} trained {ranks.rank}", trained.state_dict(), {})
    (out / f"{ranks.rank}.json").write_text(json.dumps(logged))
    ranks.close()


if __name__ == "__main__":
    everything(Path(sys.argv[1]))
    raise SystemExit


# ---- comparison


def assert_same(gradient: Gradient, expected: Gradient, tolerance: float = 1e-10):
    """Equal relative to the tensor's own size, or to the whole gradient's where it should be zero (keys' biases)."""
    assert gradient.keys() == expected.keys()
    largest = max(float(x.abs().max()) for x in expected.values())
    for name, x in expected.items():
        torch.testing.assert_close(gradient[name], x, rtol=tolerance, atol=1e-2 * tolerance * largest, msg=name)


def assert_differs(gradient: Gradient, expected: Gradient):
    """By far more than the 1e-6 that would still pass as rounding."""
    with pytest.raises(AssertionError):
        assert_same(gradient, expected, tolerance=1e-3)


def at_once(policy: ActorCritic, experience: Experience) -> Gradient:
    """The gradient of one forward and backward over all rows."""
    return step_gradient(ALONE, policy, experience, ROWS)[0]


@pytest.mark.parametrize("kind", ["ppo", "gspo", "cispo"])
def test_importance_weights_multiply_the_policy_loss_alone(kind):
    """Where sampler and policy agree not a bit changes; else every token's loss counts as often as it was too rare, by the
    textbook, and truncated.
    """
    policy, rollout = acted("shared")
    objective = replace(OBJECTIVE, policy_loss=kind, entropy_coef=0.0, value_coef=0.0)
    weighing = replace(objective, importance_cap=2.0)
    same = replace(credit(rollout), sampler_logprobs=rollout.logprobs)
    output = policy(same.tokens, same.mask)
    assert torch.equal(ppo.ppo_loss(output, same, objective)[0], ppo.ppo_loss(output, same, weighing)[0])

    noise = torch.randn(rollout.logprobs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = replace(same, sampler_logprobs=torch.where(same.mask, same.logprobs + noise, 0))
    plain = ppo.POLICY_LOSSES[kind](output.logprobs, other, objective).tolist()
    pairs = zip(other.logprobs.tolist(), other.sampler_logprobs.tolist())
    weights = [[reference.truncated_ratio(p, q, 2.0) for p, q in zip(*rows)] for rows in pairs]
    expected = [[w * x for w, x in zip(*rows)] for rows in zip(weights, plain)]
    assert {2.0} < {w for row in weights for w in row}  # some are truncated, some are not
    total = sum(reference.counted(expected, other.mask.tolist()))
    assert ppo.ppo_loss(output, other, weighing)[0].item() == pytest.approx(total, rel=1e-12)


# ---- one process


def test_the_batch_is_worth_the_name():
    """Ragged rows, ended and cut ones, clipped and free tokens, the padding's id inside: else the rest shows nothing."""
    policy, rollout = acted("shared")
    _, means = step_gradient(ALONE, policy, credit(rollout), 4)
    assert len(set(rollout.lengths.tolist())) > 4 and len(set(rollout.mask.sum(1).tolist())) > 3
    assert 0 < rollout.finished.sum() < ROWS
    assert (rollout.tokens[rollout.mask] == PAD).any()
    assert 0.05 < means["policy/clipfrac"] < 0.95 and 0.05 < means["value/clipfrac"] < 0.95
    tokens = [int(part.mask.sum()) for part in rollout.split(4)]
    assert max(tokens) > 1.3 * min(tokens)  # micro-batches of different weight


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_micro_batches_change_no_gradient(critic, micro_batch):
    policy, rollout = acted(critic)
    experience = credit(rollout)
    assert_same(step_gradient(ALONE, policy, experience, micro_batch)[0], at_once(policy, experience))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=15)
@given(order=st.permutations(range(ROWS)), micro_batch=st.integers(1, ROWS))
def test_the_order_of_the_rows_changes_no_gradient(estimator, order, micro_batch):
    """Shuffled before credit is assigned and whitened, and cut anywhere: the last micro-batch may be smaller."""
    policy, rollout = acted(CRITIC[estimator])
    shuffled = credit(rollout[torch.tensor(order)], estimator, GROUP[torch.tensor(order)])
    assert_same(
        step_gradient(ALONE, policy, shuffled, micro_batch)[0], at_once(policy, credit(rollout, estimator)), 1e-9
    )


@settings(max_examples=15)
@given(
    rows=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS, unique=True),
    tokens=st.integers(WIDTH, 5 * WIDTH),
)
def test_a_budget_of_tokens_changes_no_gradient(rows, tokens):
    """Rows of like length share a forward: what is learned, and what is logged, is what all rows at once give."""
    policy, rollout = acted("shared")
    minibatch = credit(rollout)[torch.tensor(rows)]

    def cut(lengths):
        return [torch.from_numpy(part) for part in micro_batches(lengths.numpy(), tokens)]

    parts = cut(minibatch.lengths)
    assert sorted(torch.cat(parts).tolist()) == [*range(len(rows))]
    assert all(len(part) * int(minibatch.lengths[part].max()) <= tokens for part in parts)
    whole, means = step_gradient(ALONE, policy, minibatch, ROWS)
    policy.zero_grad()
    found = ppo.accumulate_gradient(policy, minibatch, OBJECTIVE, 1, ALONE, optim.amp(ALONE.device), cut)
    assert_same({name: x.grad.clone() for name, x in policy.named_parameters()}, whole)
    assert found == pytest.approx(means, rel=1e-6, abs=1e-9)
    samples, base = act(policy, torch.tensor(sorted(rows)), SAMPLES), frozen_reference(base_model("gpt2"), TEMPERATURE)
    ours = judge(samples, policy, base, reward_model().score, 1, WIDTH, cut=cut)
    plain = judge(samples, policy, base, reward_model().score, ROWS, WIDTH)
    assert torch.equal(torch.where(ours.mask, ours.tokens, 0), torch.where(plain.mask, plain.tokens, 0))
    for name in ("lengths", "scores", "logprobs", "values"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_a_mean_per_micro_batch_would_be_noticed(micro_batch):
    policy, rollout = acted("shared")
    wrong, _ = step_gradient(ALONE, policy, credit(rollout), micro_batch, mean_of_means)
    assert_differs(wrong, at_once(policy, credit(rollout)))


def test_that_mistake_is_none_where_nothing_is_cut():
    """So what the tests above notice is the mean per micro-batch, not another error in `mean_of_means`."""
    policy, rollout = acted("shared")
    whole, _ = step_gradient(ALONE, policy, credit(rollout), ROWS, mean_of_means)
    assert_same(whole, at_once(policy, credit(rollout)))


def test_whitening_per_rank_would_be_noticed():
    policy, rollout = acted("shared")

    def per_rank(advantages, mask):
        """Two ranks that forget to gather: each whitens every other row."""
        white = torch.empty_like(advantages)
        for rank in (0, 1):
            white[rank::2] = whiten(advantages[rank::2], mask[rank::2])
        return white

    assert_differs(at_once(policy, credit(rollout, whiten=per_rank)), at_once(policy, credit(rollout)))


def test_gradients_travel_once_per_step():
    """Whatever is sent earlier is sent again: the gradient would be right, and the network busy."""
    asked = []

    class Recording(distributed.Dist):
        def grad_sync(self, module, on):
            asked.append(on)
            return super().grad_sync(module, on)

    policy, rollout = acted("shared")
    step_gradient(Recording(), policy, credit(rollout), 6)
    assert asked == [False, False, True]


# ---- the textbook: one row and one token at a time, no mask, no padding, no batch


def textbook_tokens(policy: ActorCritic, ids: list[int], start: int):
    """Log-prob, entropy and value of each response token, from one forward per token over what came before it."""
    logprobs, entropies, values = [], [], []
    for t in range(start, len(ids)):
        before = torch.tensor([ids[:t]])
        p = torch.softmax(policy.model(before)[0, -1] / TEMPERATURE, 0)
        logprobs.append(torch.log(p[ids[t]]))
        entropies.append(-sum(q * torch.log(q) for q in p))
        if policy.value_head is not None:
            trunk = policy.value_trunk or policy.model
            values.append(sum(policy.value_head.weight[0] * trunk.trunk(before)[0, -1]) + policy.value_head.bias[0])
    return logprobs, entropies, values


def textbook_advantages(estimator: str, rewards: list[list[float]], values: list[list[float]]):
    """Advantages and returns of every response, by tests/reference.py."""
    if estimator == "gae":
        advantages = [reference.gae_of_episode(r, v, GAMMA, LAM) for r, v in zip(rewards, values)]
        return advantages, [[a + b for a, b in zip(*row)] for row in zip(advantages, values)]
    if estimator == "reinforce++":
        advantages = [reference.gae_of_episode(r, [0.0] * len(r), GAMMA, 1.0) for r in rewards]
    else:
        per_response = getattr(reference, estimator)([sum(r) for r in rewards], GROUP.tolist())
        advantages = [[a] * len(r) for a, r in zip(per_response, rewards)]
    return advantages, None  # without a critic nobody asks for the returns


def textbook_gradient(acting: ActorCritic, policy: ActorCritic, rollout: Rollout, estimator: str) -> Gradient:
    base, judge_model, o = ActorCritic(base_model("gpt2"), "none"), reward_model(), OBJECTIVE
    rows, rewards, old_logprobs, old_values = [], [], [], []
    for b in range(len(rollout)):
        ids = rollout.tokens[b, : rollout.lengths[b]].tolist()
        start = rollout.mask[b].tolist().index(True)
        rows.append((ids, start))
        with torch.no_grad():
            old, _, values = textbook_tokens(acting, ids, start)
            ref, _, _ = textbook_tokens(base, ids, start)
            hidden = judge_model.model.trunk(torch.tensor([ids]))[0]  # (T, D)
            score = float(judge_model.head(sum(hidden) / len(ids)))
        if ids[-1] != EOS:
            score -= EOS_PENALTY
        r = [-KL_COEF * float(a - b) for a, b in zip(old, ref)]
        r[-1] += score
        rewards.append(r)
        old_logprobs.append(old)
        old_values.append([float(v) for v in values])
    advantages, returns = textbook_advantages(estimator, rewards, old_values)
    pooled, mean, std = [a for row in advantages for a in row], 0.0, 1.0
    if estimator in ("gae", "reinforce++"):  # whitened by the loop, or by definition
        mean, std = reference.mean(pooled), (reference.variance(pooled) + 1e-8) ** 0.5

    loss = torch.zeros((), dtype=torch.float64)
    for b, (ids, start) in enumerate(rows):
        new, entropies, values = textbook_tokens(policy, ids, start)
        for t in range(len(new)):
            advantage = (advantages[b][t] - mean) / std
            ratio = torch.exp(new[t]) / torch.exp(old_logprobs[b][t])
            near = min(max(ratio, torch.tensor(1 - o.clip)), torch.tensor(1 + o.clip_high))
            objective = min(ratio * advantage, near * advantage)
            if advantage < 0:
                objective = max(objective, torch.tensor(o.dual_clip * advantage))
            loss = loss - objective - o.entropy_coef * entropies[t]
            if values:
                v, old, target = values[t], old_values[b][t], returns[b][t]
                near = min(max(v, torch.tensor(old - o.value_clip)), torch.tensor(old + o.value_clip))
                loss = loss + o.value_coef * max((v - target) ** 2, (near - target) ** 2) / 2
    policy.zero_grad()
    (loss / len(pooled)).backward()
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize("estimator, critic", [*CRITIC.items(), ("gae", "separate")])
def test_the_gradient_is_the_textbooks(estimator, critic):
    policy, rollout = acted(critic)
    ours, _ = step_gradient(ALONE, policy, credit(rollout, estimator), 4)
    assert_same(ours, textbook_gradient(actor_critic(critic, "gpt2"), policy, rollout, estimator), 1e-9)


# ---- two processes


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes computed, as (name, rank) -> tensors, and what each logged."""
    out = tmp_path_factory.mktemp("two")
    done = World(out).together([__file__, str(out)], 2)
    assert done.code == 0, done
    logged = [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]
    return lambda name, rank=0: checkpoint.load(out / f"{name} {rank}").tensors, logged


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_ranks_change_no_gradient(two, critic, micro_batch):
    tensors, logged = two
    policy, rollout = acted(critic)
    expected, means = step_gradient(ALONE, policy, credit(rollout), ROWS)
    for rank in (0, 1):
        assert_same(tensors(f"{critic} {micro_batch}", rank), expected)
        assert logged[rank]["world"] == 2 and logged[rank][f"{critic} {micro_batch}"] == pytest.approx(means, rel=1e-10)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_mean_per_rank_would_be_noticed(two, critic):
    policy, rollout = acted(critic)
    assert_differs(two[0](f"{critic} wrong"), at_once(policy, credit(rollout)))


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_ranks_train_the_same_weights(two, critic):
    tensors, logged = two
    alone, updates = train(ALONE, critic, micro_batch=8)
    assert updates[0]["policy/ratio"] == 1  # exactly: the first micro-batches are the judged ones
    for rank in (0, 1):
        assert_same(tensors(f"{critic} trained", rank), alone.state_dict(), 1e-8)
        assert len(logged[rank][f"{critic} trained"]) == len(updates) == 12
        for ours, expected in zip(logged[rank][f"{critic} trained"], updates):
            assert ours == pytest.approx(expected, rel=1e-8, abs=1e-12)
