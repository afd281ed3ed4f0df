"""KL estimators against the textbook and against enumeration; the adaptive coefficient."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import batches, close

from rlhf.kl import ESTIMATORS, AdaptiveKL, FixedKL, full_kl, k1, k2, k3


@given(batches(holes=True), st.sampled_from(list(ESTIMATORS)))
def test_estimators(batch, name):
    p, q = batch.logprob(), batch.logprob()
    expected = [[reference.kl_estimate(name, a, b) for a, b in zip(*rows)] for rows in zip(p.tolist(), q.tolist())]
    close(ESTIMATORS[name](p, q), expected)


@given(st.floats(-60, 60) | st.floats(-1e-6, 1e-6))
def test_k2_and_k3_are_never_negative(log_ratio):
    for dtype in (torch.float32, torch.float64):
        p, q = torch.zeros(1, dtype=dtype), torch.full((1,), log_ratio, dtype=dtype)
        assert k2(p, q) >= 0 and k3(p, q) >= 0


def test_equal_policies_have_no_kl():
    p = torch.randn(3, 4)
    for estimator in ESTIMATORS.values():
        assert (estimator(p, p) == 0).all()
    assert (full_kl(p, p) == 0).all()


def two_policies(seed, vocab=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, vocab, generator=generator, dtype=torch.float64)


def expectation(estimator, p, q):
    """Over the tokens that p draws, by enumeration; with gradients through the estimator and not through the draw."""
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    return (logp.exp().detach() * estimator(logp, logq)).sum()


@given(st.integers(0, 2**31))
def test_k1_and_k3_are_unbiased_by_enumeration(seed):
    p, q = two_policies(seed)
    exact = reference.full_kl(reference.softmax(p.tolist()), reference.softmax(q.tolist()))
    close(full_kl(p, q), exact)
    close(expectation(k1, p, q), exact)
    close(expectation(k3, p, q), exact)


def test_k2_is_biased_but_not_by_much_when_the_policies_are_close():
    p, q = two_policies(0)
    assert abs(expectation(k2, p, q) - full_kl(p, q)) > 1e-3
    near = p + 0.01 * q
    assert abs(expectation(k2, near, p) / full_kl(near, p) - 1) < 0.01


@given(st.integers(0, 2**31))
def test_what_the_estimators_do_as_a_loss(seed):
    """Differentiated on sampled tokens: k1 has no gradient on average, k2 that of KL(pi || ref), k3 that of KL(ref || pi).

    This is why the penalty goes into the reward (arXiv:2506.09477).
    """
    p, q = two_policies(seed)
    p.requires_grad_()

    def gradient(loss):
        return torch.autograd.grad(loss, p)[0].tolist()

    close(torch.tensor(gradient(expectation(k1, p, q)), dtype=torch.float64), [0.0] * len(p))
    close(torch.tensor(gradient(expectation(k2, p, q)), dtype=torch.float64), gradient(full_kl(p, q)))
    close(torch.tensor(gradient(expectation(k3, p, q)), dtype=torch.float64), gradient(full_kl(q, p)))


@given(st.integers(0, 2**31))
def test_the_kl_of_sequences_is_the_expected_sum_over_tokens(seed):
    """Two tokens drawn in turn: E[k1 + k1'] = KL of the distributions over all 9 texts."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((3,), (3, 3)))
    logp, logq = (f.log_softmax(-1)[:, None] + s.log_softmax(-1) for f, s in zip(first, second))
    by_text = (logp.exp() * (logp - logq)).sum()
    by_token = full_kl(*first) + (first[0].softmax(-1) * full_kl(*second)).sum()
    torch.testing.assert_close(by_text, by_token, rtol=1e-12, atol=1e-12)


def test_full_kl_where_tokens_are_excluded():
    p, q = two_policies(1)
    cut = p.clone()
    cut[3:] = -math.inf
    weights = reference.softmax(p[:3].tolist()) + [0.0, 0.0]
    cut.requires_grad_()
    close(full_kl(cut, q), reference.full_kl(weights, reference.softmax(q.tolist())))
    assert torch.autograd.grad(full_kl(cut, q), cut)[0].isfinite().all()
    assert full_kl(cut, cut) == 0  # both exclude the same tokens
    assert full_kl(q, cut) == math.inf


def test_gradients():
    p, q = two_policies(2).requires_grad_()
    torch.autograd.gradcheck(full_kl, (p, q))
    for estimator in ESTIMATORS.values():
        torch.autograd.gradcheck(estimator, (p, q))


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 2048)), max_size=20), st.floats(0.1, 20))
def test_adaptive_coefficient(history, target):
    control, trace = AdaptiveKL(0.15, target, horizon=10_000), []
    for kl, n in history:
        control.update(kl, n)
        trace.append(control.coef)
    assert trace == pytest.approx(reference.adaptive_kl(0.15, target, 10_000, history), rel=1e-12)


def test_adaptive_coefficient_moves_at_most_a_fifth_of_n_over_horizon():
    up, down, still = (AdaptiveKL(0.1, target=6, horizon=1000) for _ in range(3))
    up.update(1e9, 500), down.update(0.0, 500), still.update(6.0, 500)
    assert up.coef == pytest.approx(0.1 * 1.1) and down.coef == pytest.approx(0.1 * 0.9) and still.coef == 0.1


def test_state_of_the_controllers():
    control = AdaptiveKL(0.1, target=6, horizon=1000)
    control.update(torch.tensor(6.6), 256)  # a metric may arrive as a tensor; the coefficient stays a number
    resumed = AdaptiveKL(0.1, target=6, horizon=1000)
    resumed.load_state_dict(control.state_dict())
    assert resumed.coef == control.coef != 0.1 and isinstance(control.coef, float)

    fixed = FixedKL(0.05)
    fixed.update(100.0, 256)
    fixed.load_state_dict(fixed.state_dict())
    assert fixed.coef == 0.05


def test_adaptive_coefficient_refuses_nonsense():
    for target, horizon in ((0, 1000), (-1, 1000), (6, 0)):
        with pytest.raises(ValueError, match="positive target and horizon"):
            AdaptiveKL(0.1, target, horizon)
    with pytest.raises(ValueError, match="not a number"):
        AdaptiveKL(0.1, 6, 1000).update(math.nan, 8)
