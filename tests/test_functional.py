"""Masked statistics, whitening over ranks, log-probabilities: against the textbook, then what must hold by definition."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import batches, close

from rlhf.functional import (
    explained_variance,
    logprobs_and_entropy,
    masked_mean,
    masked_sum,
    masked_var,
    whiten,
)


@given(batches(holes=True, empty=True))
def test_statistics(batch):
    x, mask = batch.token(), batch.mask
    values = reference.counted(x.tolist(), mask.tolist())
    close(masked_sum(x, mask), math.fsum(values))
    close(
        masked_sum(x, mask, dim=1), [math.fsum(reference.counted([r], [m])) for r, m in zip(x.tolist(), mask.tolist())]
    )
    close(masked_mean(x, mask), reference.mean(values))
    close(masked_var(x, mask), reference.variance(values))
    close(masked_var(x, mask, unbiased=False), reference.variance(values, unbiased=False))


@given(batches(holes=True, empty=True))
def test_whiten(batch):
    x, mask = batch.token(), batch.mask
    close(whiten(x, mask), reference.whiten(x.tolist(), mask.tolist()))


@given(batches(holes=True, empty=True))
def test_explained_variance(batch):
    values, returns, mask = batch.token(), batch.token(), batch.mask
    # close values of R make 1 - a / b ill-conditioned: compare b times it
    spread = reference.variance(reference.counted(returns.tolist(), mask.tolist()))
    expected = reference.explained_variance(values.tolist(), returns.tolist(), mask.tolist())
    close(explained_variance(values, returns, mask) * spread, expected * spread)


def test_nothing_counts():
    x, mask = torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)
    for value in (masked_sum(x, mask), masked_mean(x, mask), masked_var(x, mask), explained_variance(x, x, mask)):
        assert value == 0
    assert (whiten(x, mask) == 0).all()


def test_one_token_has_no_variance_and_is_white_at_zero():
    x, mask = torch.tensor([[5.0, 7.0]]), torch.tensor([[True, False]])
    assert masked_var(x, mask) == 0
    assert whiten(x, mask).tolist() == [[0, 0]]


def test_a_perfect_critic_explains_all_and_a_constant_one_nothing():
    torch.manual_seed(0)
    returns, mask = torch.randn(4, 5, dtype=torch.float64), torch.ones(4, 5, dtype=torch.bool)
    assert explained_variance(returns, returns, mask) == 1
    close(explained_variance(torch.full_like(returns, 3.0), returns, mask), 0.0)
    close(explained_variance(returns + 3, returns, mask), 1.0)  # forgives an offset


# ---- log-probabilities ---------------------------------------------------------------------------------------------


def logits_and_tokens(seed, dtype=torch.float64, shape=(3, 4), vocab=7):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, vocab, generator=generator, dtype=torch.float64) * 3).to(dtype)
    return logits, torch.randint(vocab, shape, generator=generator)


@given(st.integers(0, 2**31), st.sampled_from([torch.float64, torch.float32]), st.sampled_from([0.25, 0.7, 1.0, 2.0]))
def test_logprobs_and_entropy(seed, dtype, temperature):
    logits, tokens = logits_and_tokens(seed, dtype, shape=(3,))
    logprobs, entropy = logprobs_and_entropy(logits, tokens, temperature)
    probs = [reference.softmax(row, temperature) for row in logits.tolist()]
    close(logprobs, [math.log(p[t]) for p, t in zip(probs, tokens.tolist())])
    close(entropy, [reference.entropy(p) for p in probs])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_of_logprobs_and_entropy(temperature):
    logits, tokens = logits_and_tokens(0)
    logits.requires_grad_()
    torch.autograd.gradcheck(lambda z: logprobs_and_entropy(z, tokens, temperature), logits)
    # each alone, as autograd itself would derive it
    logp = (logits / temperature).log_softmax(-1)
    plain = (logp.gather(-1, tokens[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1))
    for ours, theirs in zip(logprobs_and_entropy(logits, tokens, temperature), plain):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        upstream = torch.linspace(-1, 2, theirs.numel(), dtype=theirs.dtype).view_as(theirs)
        got, expected = (torch.autograd.grad(y, logits, upstream, retain_graph=True)[0] for y in (ours, theirs))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, tokens = logits_and_tokens(1, dtype)
    logits.requires_grad_()
    outputs = logprobs_and_entropy(logits, tokens, 0.7)
    exact = logprobs_and_entropy(logits.detach().float(), tokens, 0.7)
    for ours, theirs in zip(outputs, exact):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    assert torch.autograd.grad(sum(o.sum() for o in outputs), logits)[0].dtype == dtype


def test_excluded_tokens():
    """Logits of -inf, as top-k and top-p leave them: probability 0, finite entropy, no gradient."""
    logits, tokens = logits_and_tokens(2)
    tokens[:] = 1
    few = logits[..., :4].clone()
    logits[..., 4:] = -math.inf
    logits.requires_grad_()
    outputs = logprobs_and_entropy(logits, tokens)
    for ours, theirs in zip(outputs, logprobs_and_entropy(few, tokens)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(sum(o.sum() for o in outputs), logits)
    assert grad.isfinite().all() and (grad[..., 4:] == 0).all()
    assert logprobs_and_entropy(logits, torch.full_like(tokens, 5))[0].eq(-math.inf).all()


def test_extremes_of_entropy():
    certain = torch.tensor([[200.0, -200.0, 0.0]])
    logprobs, entropy = logprobs_and_entropy(certain, torch.tensor([0]))
    assert logprobs == 0 and entropy == 0
    close(logprobs_and_entropy(torch.zeros(1, 9), torch.tensor([4]))[1], [math.log(9)])


def test_backward_keeps_one_tensor_as_wide_as_the_vocabulary():
    logits, tokens = logits_and_tokens(3, torch.float32, shape=(5,), vocab=1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        logprobs_and_entropy(logits.requires_grad_(), tokens, 0.7)
    wide = [x for x in kept if x.numel() >= logits.numel()]
    assert len(wide) == 1 and wide[0].data_ptr() == logits.data_ptr()
