"""The policy and its critic against one forward per token, and who learns from whose loss."""

from dataclasses import asdict

import pytest
import torch
from reference_model import random_ids, slow_logits, small_model
from small_rollout import TEMPERATURE, actor_critic, frozen_reference

from rlhf.infra import checkpoint
from rlhf.lm.checkpoints import language_model_of
from rlhf.lm.language_model import LanguageModel
from rlhf.ppo.roles import ActorCritic

CRITICS = ("shared", "separate", "none")
STARTS, LENGTHS = [1, 3, 2, 5], [7, 4, 8, 6]  # response tokens STARTS[b] ... LENGTHS[b] - 1 of row b
TOKENS = random_ids(0, 4, 8)
MASK = torch.tensor([[start <= t < end for t in range(8)] for start, end in zip(STARTS, LENGTHS)])


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_every_token_against_a_forward_of_its_own(family, critic):
    """Column t is about token t: its log-prob, entropy and value all come from the tokens before it alone."""
    policy = actor_critic(critic, family)
    out = policy(TOKENS, MASK)
    expected = torch.zeros(3, *MASK.shape, dtype=torch.float64)
    for b, (start, end) in enumerate(zip(STARTS, LENGTHS)):
        for t in range(start, end):
            before = TOKENS[b : b + 1, :t]
            p = (policy.model(before)[0, -1] / TEMPERATURE).softmax(-1)
            expected[0, b, t], expected[1, b, t] = p[TOKENS[b, t]].log(), -(p * p.log()).sum()
            if critic != "none":
                trunk = policy.value_trunk if critic == "separate" else policy.model
                expected[2, b, t] = policy.value_head.weight[0] @ trunk.trunk(before)[0, -1] + policy.value_head.bias[0]
    for ours, theirs in zip((out.logprobs, out.entropy, out.values), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert (ours[~MASK] == 0).all()


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_logprobs_against_the_textbook_transformer(family):
    """Nothing of ours on the other side: floats, loops, the softmax of tests/reference_model.py's logits."""
    logprobs = actor_critic("none", family)(TOKENS, MASK).logprobs.detach()
    model = small_model(family, seed=15)
    for b, (start, end) in enumerate(zip(STARTS, LENGTHS)):
        logits = slow_logits(model, TOKENS[b, :end].tolist())
        for t in range(start, end):
            expected = (logits[t - 1] / TEMPERATURE).log_softmax(-1)[TOKENS[b, t]]
            assert float(logprobs[b, t]) == pytest.approx(float(expected), abs=1e-10)


def test_language_model_loss_is_minus_the_logprob():
    model = small_model("llama", seed=15)
    expected = -ActorCritic(model, "none")(TOKENS, MASK).logprobs[MASK]
    torch.testing.assert_close(LanguageModel(model)(TOKENS, MASK), expected, rtol=1e-12, atol=1e-12)


def test_what_is_outside_the_mask_and_behind_it_does_not_matter():
    policy, junk = actor_critic(), TOKENS.clone()
    for b, end in enumerate(LENGTHS):
        junk[b, end:] = (junk[b, end:] + 5) % 13
    for ours, theirs in zip(vars(policy(junk, MASK)).values(), vars(policy(TOKENS, MASK)).values()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_fresh_critic_says_zero(critic):
    """Then the first advantages are the plain returns."""
    policy = ActorCritic(small_model("llama"), critic).double()
    assert (policy(TOKENS, MASK).values == 0).all()
    policy(TOKENS, MASK).values.sum().backward()
    assert policy.value_head.weight.grad.abs().sum() > 0  # and yet it can learn


def grads(policy, what):
    policy.zero_grad()
    getattr(policy(TOKENS, MASK), what)[MASK].square().sum().backward()
    return {name for name, p in policy.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}


def test_a_separate_critic_learns_from_the_value_loss_alone():
    policy = actor_critic("separate")
    trunk = {f"model.{name}" for name, _ in policy.model.named_parameters()}
    critic = {name for name, _ in policy.named_parameters()} - trunk
    assert grads(policy, "logprobs") == grads(policy, "entropy") == trunk
    assert grads(policy, "values") == critic
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    with torch.no_grad():  # and no memory is shared
        for parameter in policy.value_trunk.parameters():
            parameter.add_(1)
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())


def test_a_shared_trunk_learns_from_both():
    policy = actor_critic("shared")  # untied: the value loss has no use for the output matrix
    names = {name for name, _ in policy.named_parameters()}
    assert grads(policy, "values") == names - {"model.lm_head.weight"}
    assert grads(policy, "logprobs") == names - {"value_head.weight", "value_head.bias"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("critic", CRITICS)
def test_no_parameter_is_idle(critic, tied):
    """DDP would wait for its gradient for ever."""
    policy = actor_critic(critic, "llama", tied=tied)
    out = policy(TOKENS, MASK)
    (out.logprobs.sum() + out.values.sum()).backward()
    assert all(p.grad is not None for p in policy.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("critic", CRITICS)
def test_a_saved_policy_is_a_language_model(critic, tied, tmp_path):
    """Tied or not, with or without a critic: its checkpoint gives back the same trunk, and no weight is stored twice."""
    policy = actor_critic(critic, "llama", torch.float32, tied=tied)
    config = {"kind": "policy", "model": asdict(policy.model.config), "tokenizer": "abc"}
    checkpoint.save(tmp_path / "policy", policy.state_dict(), config)
    model = language_model_of(checkpoint.load(tmp_path / "policy"), tmp_path / "policy")
    expected = policy(TOKENS, MASK).logprobs
    assert torch.equal(ActorCritic(model, "none", TEMPERATURE)(TOKENS, MASK).logprobs, expected)


def test_the_first_token_cannot_be_a_response():
    mask = MASK.clone()
    mask[2, 0] = True
    for forward in (actor_critic(), frozen_reference(small_model("llama")), LanguageModel(small_model("llama"))):
        with pytest.raises(ValueError, match="nothing before it"):
            forward(TOKENS, mask)


def test_only_response_positions_meet_the_vocabulary(monkeypatch):
    """A (B, T, V) tensor never exists: unembed sees the N masked positions, once."""
    policy, seen, unembed = actor_critic(), [], type(actor_critic().model).unembed
    monkeypatch.setattr(
        type(policy.model), "unembed", lambda self, hidden: seen.append(hidden.shape) or unembed(self, hidden)
    )
    policy(TOKENS, MASK)
    assert [tuple(shape) for shape in seen] == [(int(MASK.sum()), 24)]


def test_the_reference_is_a_frozen_copy():
    policy = actor_critic("shared")
    reference = frozen_reference(policy.model, TEMPERATURE)
    before = reference(TOKENS, MASK)
    assert torch.equal(before, policy(TOKENS, MASK).logprobs) and not before.requires_grad
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    assert torch.equal(reference(TOKENS, MASK), before)
    assert all(p.requires_grad for p in policy.parameters())  # freezing the copy did not freeze the policy
