"""PPO, RLOO and GRPO find the exact optimum of a problem small enough to enumerate: nothing is off by one, or by a sign.

RLHF maximises J(pi) = E[r(x, y)] - beta KL(pi || ref). Its optimum (arXiv:2305.18290, eq. 4) is
    pi*(y | x) = ref(y | x) exp(r(x, y) / beta) / Z(x),    J(pi*) = beta log Z(x).
Here ref is a small random transformer over 5 tokens, a response is at most 3 of them, EOS included, and r is random: 85
responses to each of two prompts. The policy learns by the calls of train_ppo.py, from samples; then every response is
enumerated.

Why each of them must end at pi*, and nowhere else:
- At pi* all responses to a prompt earn the same, KL included: r - beta log(pi* / ref) = beta log Z. And token by token:
  with V the value of pi*, every TD error is 0. So nobody has an advantage, whatever was sampled, and
  `test_at_the_optimum_nobody_has_an_advantage` says so of the formulas. Anywhere else the better responses have one.
- GRPO divides by the group's standard deviation. That changes how fast it goes and not where to, because the KL is part
  of the reward that is divided. (With the KL in the loss instead, as in its paper, beta would become beta * std.)
- PPO whitens its advantages. The mean over all tokens is a constant baseline, which changes no expectation. Dividing by
  the deviation, however small that gets, is like GRPO's: the steps do not fade near the optimum, so the learning rate has to.
- Learned positions, because RoPE is relative: after "1" and after "1 1" it attends to the same thing, predicts the same,
  and cannot represent pi* (it stops at 0.87 of the gain even with the exact gradient of J).
"""

import functools
import itertools
import math

import pytest
import torch
from small_rollout import frozen_reference
from torch import Tensor

from model.generate import Sampling, generate, row_uniforms
from model.transformer import ModelConfig, Transformer
from rlhf.advantages import ESTIMATORS
from rlhf.functional import whiten
from rlhf.infra import distributed, optim
from rlhf.ppo import update as ppo
from rlhf.ppo.roles import ActorCritic
from rlhf.ppo.rollout import Experience, gather, judge, minibatches
from rlhf.rewards import missing_eos, shape_rewards

VOCAB, EOS, PAD, LONGEST = 5, 4, 0, 3  # padding is an ordinary token too
BETA, TEMPERATURE, EOS_PENALTY = 0.5, 0.8, 0.3
PROMPTS, PROMPT_LENGTHS = torch.tensor([[1, PAD, PAD], [2, 0, 0]]), torch.tensor([1, 3])
WIDTH = PROMPTS.shape[1] + LONGEST
TEXT = [token for token in range(VOCAB) if token != EOS]
RESPONSES = [
    (*head, last)
    for n in range(LONGEST)
    for head in itertools.product(TEXT, repeat=n)
    for last in range(VOCAB)
    if last == EOS or n == LONGEST - 1
]


# ---- the problem, and its solution by enumeration


def base_model(seed: int = 0) -> Transformer:
    shape = dict(vocab_size=VOCAB, width=32, layers=2, heads=2, ffn=64, context=8, positions="learned", tied=False)
    model, generator = Transformer(ModelConfig(**shape)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(torch.ones_like(noise) if name.endswith("norm.weight") else 0.2 * noise)
        model.lm_head.weight.mul_(0.5)  # no response so rare that it is never tried
    return model


class Problem:
    """Every response to every prompt: P prompts, Y responses."""

    def __init__(self, seed: int = 0):
        self.base = base_model(seed)
        prompts = [row[:n].tolist() for row, n in zip(PROMPTS, PROMPT_LENGTHS)]
        self.rows = [(tuple(prompt), response) for prompt in prompts for response in RESPONSES]
        generator = torch.Generator().manual_seed(seed)
        rewards = (2 * torch.rand(len(self.rows), generator=generator) - 1).tolist()
        self.table = {(*prompt, *response): r for (prompt, response), r in zip(self.rows, rewards)}
        self.tokens = torch.full((len(self.rows), WIDTH), PAD)
        self.mask = torch.zeros(self.tokens.shape, dtype=torch.bool)
        for i, (prompt, response) in enumerate(self.rows):
            self.tokens[i, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
            self.mask[i, len(prompt) : len(prompt) + len(response)] = True
        unfinished = torch.tensor([response[-1] != EOS for _, response in self.rows])
        self.reward = (torch.tensor(rewards, dtype=torch.float64) - EOS_PENALTY * unfinished).view(len(prompts), -1)
        self.reference = self.log_probability(frozen_reference(self.base, TEMPERATURE))
        self.optimum = (self.reference + self.reward / BETA).log_softmax(1)

    def score(self, tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        return torch.tensor([self.table[tuple(row[:n].tolist())] for row, n in zip(tokens, lengths)])

    def log_probability(self, logprobs) -> Tensor:
        """Of every response, by the function (tokens, mask) -> logprobs (B, T): (P, Y)"""
        return logprobs(self.tokens, self.mask).detach().double().sum(1).view(len(PROMPTS), -1)

    def report(self, log_p: Tensor) -> dict[str, float]:
        """Exact expectations under a policy, means over the prompts; tv is the prompts' worst."""
        p = log_p.exp()
        reward, kl = (p * self.reward).sum(1).mean(), (p * (log_p - self.reference)).sum(1).mean()
        tv = (p - self.optimum.exp()).abs().sum(1).max() / 2
        return {"reward": float(reward), "kl": float(kl), "objective": float(reward - BETA * kl), "tv": float(tv)}

    def miss(self, log_p: Tensor) -> dict[str, float]:
        """Distances from the optimum in nats and units of reward; `gain` is the share of the possible gain in J."""
        ours, best, start = (self.report(x) for x in (log_p, self.optimum, self.reference))
        gain = (ours["objective"] - start["objective"]) / (best["objective"] - start["objective"])
        return {
            "reward": ours["reward"] - best["reward"],
            "kl": ours["kl"] - best["kl"],
            "gain": gain,
            "tv": ours["tv"],
        }


@functools.cache
def problem(seed: int = 0) -> Problem:
    return Problem(seed)


# ---- the loop of train_ppo.py


def train(
    estimator: str,
    iterations: int = 150,
    seed: int = 0,
    kl_coef: float = BETA,
    cut=lambda samples: samples,
    pay=lambda rewards, mask: rewards,
) -> dict[str, float]:
    """How far the trained policy is from the optimum. The last three options are where the tests put mistakes in."""
    batch, epochs, lr = 256, 2, 3e-3
    task, dist = problem(seed), distributed.Dist()
    base = base_model(seed)
    reference = frozen_reference(base, TEMPERATURE)
    row = ESTIMATORS[estimator]
    policy = ActorCritic(base, "shared" if row.needs_values else "none", TEMPERATURE)
    optimizer = optim.make_optimizer(policy, lr, betas=(0.9, 0.999), eps=1e-5)
    precision = optim.amp(dist.device)
    normalise = whiten if row.whiten else lambda advantages, mask: advantages
    objective = ppo.Objective(clip=0.2, value_clip=None, value_coef=0.5)
    ids = torch.arange(batch)
    group = ids // (batch // len(PROMPTS))
    for iteration in range(iterations):
        # 1. act
        uniforms = row_uniforms(seed, iteration, ids.tolist(), LONGEST)
        sampling = Sampling(LONGEST, [EOS], PAD, TEMPERATURE)
        samples = cut(generate(base, PROMPTS[group], PROMPT_LENGTHS[group], sampling, uniforms))
        # 2. judge
        rollout = gather(judge(samples, policy, reference, task.score, batch, WIDTH), dist)
        # 3. credit
        scores = missing_eos(rollout.scores, rollout.finished, EOS_PENALTY)
        rewards = shape_rewards(scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, kl_coef, "k1")
        rewards = pay(rewards, rollout.mask)
        advantages, returns = row.estimate(rewards, rollout.values, rollout.mask, 1.0, 0.95, group)
        experience = Experience.of(rollout, rewards, normalise(advantages, rollout.mask), returns)
        # 4. learn
        optim.set_lr(optimizer, optim.schedule(iteration, iterations, 5, lr, "linear"))
        for rows in minibatches(batch, 1, epochs, seed, iteration):
            ppo.accumulate_gradient(policy, experience[rows], objective, batch, dist, precision)
            optim.step(optimizer, policy, precision.scaler, 1.0)
    return task.miss(task.log_probability(lambda tokens, mask: policy(tokens, mask).logprobs))


def assert_optimal(miss: dict[str, float]) -> None:
    """Within 0.015 in expected reward, 0.02 nats in KL, 0.05 in total variation, 3% of the gain in J.

    Measured over ten seeds of gae, rloo and grpo each, worst of 30: 0.0076, 0.0072, 0.033, 2.8%. Seed 0, by estimator:
    gae 0.0014, 0.0002, 0.014, 0.4%;  rloo 0.0034, 0.0040, 0.015, 0.5%;  grpo 0.0021, 0.0001, 0.014, 0.7%.
    """
    assert abs(miss["reward"]) < 0.015 and abs(miss["kl"]) < 0.02, miss
    assert miss["tv"] < 0.05 and 0.97 < miss["gain"] <= 1, miss


# ---- the tests


def test_the_problem():
    """Every response is counted, the two expressions for J(pi*) agree, and the reference is far from the optimum."""
    task = problem()
    assert len(RESPONSES) == len(set(RESPONSES)) == 85
    for log_p in (task.reference, task.optimum):
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    log_z = (task.reference + task.reward / BETA).logsumexp(1)
    assert task.report(task.optimum)["objective"] == pytest.approx(float(BETA * log_z.mean()), abs=1e-6)
    start = task.miss(task.reference)
    assert start["gain"] == 0 and start["tv"] > 0.3 and start["reward"] < -0.5 and start["kl"] < -0.4
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):  # and nothing near it is better
        noise = 0.1 * torch.randn(task.optimum.shape, generator=generator, dtype=torch.float64)
        assert task.miss((task.optimum + noise).log_softmax(1))["gain"] < 1


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo", "dr_grpo"])
def test_at_the_optimum_nobody_has_an_advantage(estimator, lam):
    """With pi*'s own log-probs and values, token by token, in float64: all advantages are 0, not only their mean."""
    task = problem()

    def over_completions(log_weights: Tensor) -> dict[tuple, float]:
        """What the texts that begin so weigh together."""
        total = {}
        for (prompt, response), log_w in zip(task.rows, log_weights.flatten().tolist()):
            for n in range(len(response) + 1):
                start = (*prompt, *response[:n])
                total[start] = total.get(start, 0.0) + math.exp(log_w)
        return total

    ref, weight = over_completions(task.reference), over_completions(task.reference + task.reward / BETA)
    logprobs, ref_logprobs, values = torch.zeros(3, *task.mask.shape, dtype=torch.float64)
    for i, (prompt, response) in enumerate(task.rows):
        for n in range(len(response)):
            before, after, t = (*prompt, *response[:n]), (*prompt, *response[: n + 1]), len(prompt) + n
            logprobs[i, t] = math.log(weight[after] / weight[before])
            ref_logprobs[i, t] = math.log(ref[after] / ref[before])
            values[i, t] = BETA * math.log(weight[before] / ref[before])
    group = torch.arange(len(task.rows)) // len(RESPONSES)
    estimate = ESTIMATORS[estimator].estimate
    rewards = shape_rewards(task.reward.flatten(), logprobs, ref_logprobs, task.mask, BETA)
    advantages, _ = estimate(rewards, values, task.mask, 1.0, lam, group)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-8)
    wrong, _ = estimate(rewards + 0.1 * rewards**2, values, task.mask, 1.0, lam, group)
    assert wrong.abs().max() > 1e-2


slow = pytest.mark.slow


@slow
@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo", "reinforce++"])
def test_the_optimum_is_found(estimator):
    assert_optimal(train(estimator))


# ---- and mistakes are not forgiven


def without_eos(samples):
    """EOS counts as padding, where the response has another token."""
    mask = samples.mask.clone()
    long = torch.nonzero(samples.finished & (mask.sum(1) > 1)).flatten()
    mask[long, samples.lengths[long] - 1] = False
    return type(samples)(**{**vars(samples), "mask": mask})


def one_early(rewards, mask):
    """What the last token is paid goes to the token before it, where there is one."""
    rewards, last = rewards.clone(), mask.int().cumsum(1).argmax(1)
    rows = torch.nonzero(mask.sum(1) > 1).flatten()
    rewards[rows, last[rows] - 1] += rewards[rows, last[rows]]
    rewards[rows, last[rows]] = 0
    return rewards


MISTAKES = {
    "KL twice as dear": {"kl_coef": 2 * BETA},
    "reward one token early": {"pay": one_early},
    "EOS outside the mask": {"cut": without_eos},
}


@pytest.mark.slow
@slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_misses_it(mistake):
    """By far, and already after half the iterations, when the right loop is within 0.06 and has 95% of the gain.

    Measured over three seeds, at best: 0.77 of the gain, 0.16, 0.63; total variation 0.22, 0.41, 0.25.
    """
    miss = train("gae", iterations=75, **MISTAKES[mistake])
    assert miss["gain"] < 0.85 and miss["tv"] > 0.15, miss
