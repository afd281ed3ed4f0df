"""Mask poisoning: nothing outside the mask may reach a value or a gradient, not even as NaN times zero.

Every masked slot of every input is filled with NaN, infinities, 1e30 or random numbers; values and gradients must be
bit-equal to those of the clean inputs, and masked slots must have gradient zero.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from reference import batches

from rlhf import advantages, kl, losses, rewards
from rlhf.functional import explained_variance, logprobs_and_entropy, masked_mean, masked_sum, masked_var, whiten

POISONS = {
    "nan": lambda x: torch.full_like(x, math.nan),
    "inf": lambda x: torch.full_like(x, math.inf),
    "-inf": lambda x: torch.full_like(x, -math.inf),
    "1e30": lambda x: torch.full_like(x, 1e30),
    "-1e30": lambda x: torch.full_like(x, -1e30),
    "random": lambda x: 1e3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype),
    "mixed": lambda x: (
        torch.tensor([math.nan, math.inf, -math.inf, 1e30], dtype=x.dtype).repeat(x.numel())[: x.numel()].view(x.shape)
    ),
}


def bits(x):
    return x.contiguous().view({torch.float32: torch.int32, torch.float64: torch.int64}[x.dtype])


def values_and_gradients(function, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # an upstream gradient that is nowhere zero, not even on masked outputs
    upstream = [torch.linspace(1, 2, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]
    gradients = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    return outputs, [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs)]


def assert_immune(function, mask, inputs):
    """`function` of several (B, T) or (B,) inputs; the (B, T) ones are poisoned where the mask is False."""
    outputs, gradients = values_and_gradients(function, inputs)
    assert all(x.isfinite().all() for x in (*outputs, *gradients))
    for x, gradient in zip(inputs, gradients):
        assert x.shape != mask.shape or (gradient[~mask] == 0).all()
    for name, poison in POISONS.items():
        sick = [torch.where(mask, x, poison(x)) if x.shape == mask.shape else x for x in inputs]
        for clean, dirty in zip((outputs, gradients), values_and_gradients(function, sick)):
            for a, b in zip(clean, dirty):
                assert torch.equal(bits(a), bits(b)), name


def with_mask(mask):
    """Every formula that takes a mask: name -> (function of its float inputs, how many of them are (B, T))."""
    scores = torch.linspace(-1, 1, len(mask))
    group = torch.arange(len(mask)) // 2
    formulas = {
        "masked_sum": (lambda x: masked_sum(x, mask), 1),
        "masked_sum per row": (lambda x: masked_sum(x, mask, dim=1), 1),
        "masked_mean": (lambda x: masked_mean(x, mask), 1),
        "masked_var": (lambda x: masked_var(x, mask), 1),
        "masked_var biased": (lambda x: masked_var(x, mask, unbiased=False), 1),
        "whiten": (lambda x: whiten(x, mask), 1),
        "explained_variance": (lambda v, r: explained_variance(v, r, mask), 2),
        "gae": (lambda r, v: advantages.gae(r, v, mask, 0.9, 0.95), 2),
        "gae bootstrapped": (lambda r, v: advantages.gae(r, v, mask, 0.9, 0.95, scores.to(v.dtype)), 2),
        "reinforce_plus_plus": (lambda r: advantages.reinforce_plus_plus(r, mask, 0.9), 1),
    }
    for estimator in kl.ESTIMATORS:
        formulas[f"shape_rewards {estimator}"] = (
            lambda p, q, e=estimator: rewards.shape_rewards(scores.to(p.dtype), p, q, mask, 0.1, e),
            2,
        )
    for name, row in advantages.ESTIMATORS.items():
        formulas[f"estimator {name}"] = (
            lambda r, v, f=row.estimate: f(r, v, mask, 0.9, 0.95, group),
            2,
        )
    return formulas


@pytest.mark.parametrize("name", with_mask(torch.ones(2, 2, dtype=torch.bool)))
@settings(max_examples=20)
@given(batch=batches(holes=True))
def test_formulas_with_a_mask(name, batch):
    function, inputs = with_mask(batch.mask)[name]
    assert_immune(function, batch.mask, [batch.token() for _ in range(inputs)])


@settings(max_examples=20)
@given(batches(holes=True, empty=True))
def test_rows_without_any_token(batch):
    for name, (function, inputs) in with_mask(batch.mask).items():
        if not name.startswith("shape_rewards"):  # there an empty row is an error
            assert_immune(function, batch.mask, [batch.token() for _ in range(inputs)])


LOSSES = {
    "policy": (lambda n, o, a: losses.policy_loss(n, o, a, 0.2), 3),
    "policy dual clip": (lambda n, o, a: losses.policy_loss(n, o, a, 0.2, 0.3, 3.0), 3),
    "approx_kl": (losses.approx_kl, 2),
    "value": (losses.value_loss, 3),
    "value clipped": (lambda n, o, r: losses.value_loss(n, o, r, 0.2), 3),
    "k1": (kl.k1, 2),
    "k2": (kl.k2, 2),
    "k3": (kl.k3, 2),
}


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=20)
@given(batch=batches(holes=True, empty=True))
def test_formulas_without_a_mask_get_masked_inputs(name, batch):
    """As their module says: inputs through `where`, the result through masked_sum."""
    function, inputs = LOSSES[name]

    def masked(*x):
        return masked_sum(function(*(torch.where(batch.mask, t, 0) for t in x)), batch.mask)

    assert_immune(masked, batch.mask, [batch.token(0.5) for _ in range(inputs)])


def test_masking_the_result_alone_is_not_enough():
    """Why the inputs are masked: the value is clean, the gradient is not."""
    x, mask = torch.tensor([1.0, 1e30]).requires_grad_(), torch.tensor([True, False])
    loss = masked_sum(x.exp(), mask)
    assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isnan().any()


@settings(max_examples=20)
@given(batches(holes=True, empty=True))
def test_random_ids_and_logits_where_nothing_counts(batch):
    """Only masked positions meet the vocabulary, so an id there may even lie outside of it."""
    mask, vocab = batch.mask, 5
    logits = torch.randn(*mask.shape, vocab, generator=batch.generator, dtype=batch.dtype)
    tokens = torch.randint(vocab, mask.shape, generator=batch.generator)

    def on(ids):
        def function(z):
            chosen = z[mask], ids[mask]
            return losses.next_token_loss(*chosen).sum(), *(x.sum() for x in logprobs_and_entropy(*chosen, 0.7))

        return function

    clean = values_and_gradients(on(tokens), [logits])
    for poison in POISONS.values():
        for fill in (-100, 0, 3, 10**9):
            ids = torch.where(mask, tokens, fill)
            sick = values_and_gradients(on(ids), [torch.where(mask[..., None], logits, poison(logits))])
            assert all(torch.equal(bits(a), bits(b)) for x, y in zip(clean, sick) for a, b in zip(x, y))
