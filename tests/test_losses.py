"""Losses per token and per pair: against the textbook, their gradients, and what must leave them alone."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import batches, close

from rlhf.losses import (
    approx_kl,
    centring_loss,
    cispo_loss,
    clip_fraction,
    dpo_loss,
    gspo_loss,
    ipo_loss,
    next_token_loss,
    policy_loss,
    preference_loss,
    truncated_importance,
    value_clip_fraction,
    value_loss,
)

clips = st.sampled_from([(0.2, None, None), (0.2, 0.28, None), (0.2, None, 3.0), (0.1, 0.4, 1.5), (0.0, None, None)])


def elementwise(function, *tensors):
    """The slow function on every element of tensors (B, T)."""
    return [[function(*values) for values in zip(*rows)] for rows in zip(*(t.tolist() for t in tensors))]


def policies(batch, scale=0.5):
    """Old log-probs, new ones that moved by about `scale` nats, advantages."""
    old = batch.logprob()
    return old + batch.token(scale), old, batch.token()


def doubles(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


# ---- policy --------------------------------------------------------------------------------------------------------


@given(batches(), clips)
def test_policy_loss(batch, clip):
    new, old, advantages = policies(batch)
    expected = elementwise(lambda *x: -reference.policy_objective(*x, *clip), new, old, advantages)
    close(policy_loss(new, old, advantages, *clip), expected)


@given(batches(), st.sampled_from([1.0, 1.5, 2.0, 8.0]))
def test_truncated_importance(batch, cap):
    old, sampled, _ = policies(batch)
    expected = elementwise(lambda p, q: reference.truncated_ratio(p, q, cap), old, sampled)
    close(truncated_importance(old, sampled, cap), expected)
    assert torch.equal(truncated_importance(old, old.clone(), cap), torch.ones_like(old))  # not one bit


def test_importance_weights_have_no_gradient_and_scale_nothing_down():
    old, sampled = doubles((2, 3), (2, 3))
    assert not truncated_importance(old, sampled, 2.0).requires_grad
    for cap in (0.99, math.nan):
        with pytest.raises(ValueError, match="at least 1"):
            truncated_importance(old, sampled, cap)


def test_truncation_bounds_the_variance_and_without_it_the_mean_is_right():
    """By enumeration over one token: E_q[min(p/q, C) f] is E_p[f] where C is large, and short of it where C bites."""
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.1, 0.3, 0.6]).double()
    f = torch.tensor([3.0, -1.0, 2.0]).double()
    means = [float((q * truncated_importance(p.log(), q.log(), cap) * f).sum()) for cap in (100.0, 2.0)]
    assert means[0] == pytest.approx(float((p * f).sum())) and means[1] == pytest.approx(0.2 * 3 - 0.2 + 0.1 * 2)


@given(batches(), clips)
def test_clip_fraction(batch, clip):
    new, old, advantages = policies(batch)
    expected = elementwise(lambda *x: reference.clipped(*x, *clip[:2]), new, old, advantages)
    assert clip_fraction(new, old, advantages, *clip[:2]).tolist() == expected


@given(batches(), clips)
def test_where_the_clip_decides_there_is_no_gradient_and_elsewhere_that_of_the_ratio(batch, clip):
    new, old, advantages = policies(batch)
    (grad,) = torch.autograd.grad(policy_loss(new.requires_grad_(), old, advantages, *clip[:2]).sum(), new)
    decided = clip_fraction(new, old, advantages, *clip[:2]).bool()
    ratio = (new - old).exp().detach()
    # at a clip of 0 every ratio sits outside or on the edge; on the edge torch.clamp lets the gradient pass
    close(grad, torch.where(decided, 0, -advantages * ratio).tolist())


@given(batches(), clips)
def test_at_a_ratio_of_1_the_gradient_is_the_policy_gradient(batch, clip):
    old, advantages = batch.logprob(), batch.token()
    new = old.clone().requires_grad_()
    loss = policy_loss(new, old, advantages, *clip)
    assert torch.equal(loss, -advantages)
    assert torch.equal(torch.autograd.grad(loss.sum(), new)[0], -advantages)  # d/dlogp of -A logp
    assert not clip_fraction(new, old, advantages, *clip[:2]).any() and not approx_kl(new, old).any()


def test_dual_clip_bounds_only_negative_advantages():
    new, old = torch.tensor([2.0, 2.0]).requires_grad_(), torch.zeros(2)  # both ratios e^2 = 7.4
    loss = policy_loss(new, old, torch.tensor([-1.0, 1.0]), 0.2, dual_clip=3.0)
    close(loss.detach(), [3.0, -1.2])
    assert torch.autograd.grad(loss.sum(), new)[0].tolist() == [0, 0]


def test_an_infinite_clip_is_none():
    new, old, advantages = doubles((3, 4), (3, 4), (3, 4))
    expected = -advantages * (new - old).exp()
    torch.testing.assert_close(policy_loss(new, old, advantages, math.inf), expected, rtol=0, atol=0)


@given(batches(), st.sampled_from([(0.2, None), (3e-4, 4e-4), (0.1, 0.4)]))
def test_gspo_clips_whole_responses(batch, clip):
    """Its value by the definition, row by row, and the gradient of eq. 10: s A / |y| to every token, or none at all."""
    new, old, _ = policies(batch)
    mask, new = batch.mask, new.detach().requires_grad_()
    advantage = batch.token()[:, :1].expand_as(new)  # one a response, as the paper has it
    loss = gspo_loss(new, old, advantage, mask, *clip)
    (gradient,) = torch.autograd.grad(torch.where(mask, loss, 0).sum(), new)
    low, high = 1 - clip[0], 1 + (clip[1] or clip[0])
    for row in range(len(mask)):
        places = [t for t in range(mask.shape[1]) if mask[row, t]]
        if not places:
            continue
        s = math.exp(float((new - old).detach()[row, places].sum()) / len(places))
        a = float(advantage[row, 0])
        free = -a * s >= -a * min(max(s, low), high)
        for t in places:
            close(loss[row, t].detach(), max(-a * s, -a * min(max(s, low), high)))
            close(gradient[row, t], -a * s if free else 0.0)
    assert not gradient[~mask].any()


@given(batches(), st.sampled_from([(0.2, None), (0.2, 2.0), (1.0, 4.0)]))
def test_cispo_weighs_every_tokens_gradient(batch, clip):
    new, old, advantages = policies(batch)
    new = new.detach().requires_grad_()
    loss = cispo_loss(new, old, advantages, *clip)
    (gradient,) = torch.autograd.grad(loss.sum(), new)

    def weight(n, o):
        return min(max(math.exp(n - o), 1 - clip[0]), 1 + (clip[1] or clip[0]))

    close(gradient, elementwise(lambda n, o, a: -weight(n, o) * a, new.detach(), old, advantages))
    close(loss.detach(), elementwise(lambda n, o, a: -weight(n, o) * a * n, new.detach(), old, advantages))


@given(batches())
def test_at_a_ratio_of_1_all_policy_losses_have_one_gradient(batch):
    """What GSPO and CISPO change are the ratios; where there is none yet, PPO's gradient is left."""
    old, advantages = batch.logprob(), batch.token()[:, :1].expand_as(batch.mask).contiguous()
    gradients = []
    for loss in (
        lambda new: policy_loss(new, old, advantages, 0.2),
        lambda new: gspo_loss(new, old, advantages, batch.mask, 0.2),
        lambda new: cispo_loss(new, old, advantages, 0.2),
    ):
        new = old.detach().clone().requires_grad_()
        gradients.append(torch.autograd.grad(torch.where(batch.mask, loss(new), 0).sum(), new)[0])
    close(gradients[0], gradients[1].tolist())
    close(gradients[0], gradients[2].tolist())


@given(batches())
def test_approx_kl(batch):
    new, old, _ = policies(batch)
    close(approx_kl(new, old), elementwise(lambda a, b: (a - b) ** 2 / 2, new, old))


# ---- value ---------------------------------------------------------------------------------------------------------


@given(batches(), st.sampled_from([None, 0.2, 1.0]))
def test_value_loss(batch, clip):
    old = batch.token()
    new, returns = old + batch.token(0.5), batch.token(2.0)
    loss = value_loss(new, old, returns, clip)
    expected = elementwise(lambda *x: reference.value_loss(*x, clip), new, old, returns)
    close(loss, expected)
    if clip is None:
        assert not value_clip_fraction(new, old, returns, clip).any()
    else:  # decided by the clip: the error would be smaller without it
        free = elementwise(reference.value_loss, new, old, returns)
        by_clip = [[float(a > b) for a, b in zip(*rows)] for rows in zip(expected, free)]
        assert value_clip_fraction(new, old, returns, clip).tolist() == by_clip


def test_the_gradient_of_the_value_loss_is_the_error():
    new, old, returns = doubles((3, 4), (3, 4), (3, 4))
    (grad,) = torch.autograd.grad(value_loss(new, old, returns).sum(), new)
    close(grad, (new - returns).tolist())  # the factor one half
    (grad,) = torch.autograd.grad(value_loss(new, old, returns, 0.2).sum(), new)
    decided = value_clip_fraction(new, old, returns, 0.2).bool()
    assert decided.any() and not decided.all()
    close(grad, torch.where(decided, 0, new - returns).tolist())


# ---- preferences ---------------------------------------------------------------------------------------------------


@given(batches(), st.sampled_from([0.0, 0.1]), st.booleans(), st.booleans())
def test_preference_loss(batch, smoothing, with_margin, soft):
    chosen, rejected, margin, label = batch.row(), batch.row(), batch.row().abs(), batch.row().sigmoid()
    kwargs = {"margin": margin} if with_margin else {}
    kwargs |= {"label": label} if soft else {"label_smoothing": smoothing}
    ps = label.tolist() if soft else [1 - smoothing] * len(label)
    margins = margin.tolist() if with_margin else [0.0] * len(label)
    expected = [reference.preference_loss(*x) for x in zip(chosen.tolist(), rejected.tolist(), margins, ps)]
    close(preference_loss(chosen, rejected, **kwargs), expected)


@given(batches(), st.floats(-50, 50), st.sampled_from([0.0, 0.1]))
def test_only_differences_of_scores_count(batch, shift, smoothing):
    chosen, rejected = batch.row(8).round() / 8, batch.row(8).round() / 8
    shift = round(shift * 8) / 8  # eighths: adding and subtracting the shift is exact
    shifted = preference_loss(chosen + shift, rejected + shift, label_smoothing=smoothing)
    assert torch.equal(shifted, preference_loss(chosen, rejected, label_smoothing=smoothing))


@given(batches())
def test_swapping_the_pair_swaps_the_label(batch):
    a, b, label = batch.row(), batch.row(), batch.row().sigmoid()
    close(preference_loss(a, b, label=label), preference_loss(b, a, label=1 - label).tolist())
    close(preference_loss(a, a), [math.log(2)] * len(a))


def test_preference_loss_at_extreme_differences():
    """-log(sigmoid(x)) would be inf from -104 on in float32; a difference beyond it costs itself, and nothing above."""
    a = torch.tensor([0.0, 0.0, 1e4, -1e4]).requires_grad_()
    loss = preference_loss(a, torch.tensor([200.0, -200.0, 0.0, 0.0]))
    assert loss.tolist() == [200, 0, 0, 1e4]
    assert torch.autograd.grad(loss.sum(), a)[0].tolist() == [-1, 0, 0, -1]


@given(batches(), st.floats(-5, 5))
def test_centring_sets_the_level_that_the_preference_loss_leaves_free(batch, shift):
    """Its best common shift c of all rewards is minus their mean, by d/dc sum (a + b + 2 c)^2 = 0."""
    a, b = batch.row().double(), batch.row().double()
    best = -torch.cat([a, b]).mean()
    assert centring_loss(a + best, b + best).sum() <= centring_loss(a + shift, b + shift).sum() + 1e-9
    close(centring_loss(a, b), [(x + y) ** 2 for x, y in zip(a.tolist(), b.tolist())])


@pytest.mark.parametrize("smoothing", [0.05, 0.1, 0.2])
def test_smoothing_has_its_optimum_at_a_finite_difference(smoothing):
    best = torch.tensor([math.log((1 - smoothing) / smoothing)], dtype=torch.float64).requires_grad_()
    loss = preference_loss(best, torch.zeros_like(best), label_smoothing=smoothing)
    close(loss.detach(), [reference.entropy([smoothing, 1 - smoothing])])
    close(torch.autograd.grad(loss.sum(), best)[0], [0.0])


def test_smoothing_and_soft_labels_exclude_each_other():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="smooth twice"):
        preference_loss(x, x, label_smoothing=0.1, label=x)


@given(batches(), st.sampled_from([0.05, 0.5]), st.sampled_from([0.0, 0.1]))
def test_dpo_loss(batch, beta, smoothing):
    logps = [batch.row() - 5 for _ in range(4)]
    expected = [reference.dpo_loss(*x, beta, smoothing) for x in zip(*(x.tolist() for x in logps))]
    close(dpo_loss(*logps, beta, smoothing), expected)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_ipo_aims_at_a_margin(beta):
    """The minimum is where the log-ratios differ by 1 / (2 beta), and the loss is the squared distance from there."""
    policy, other, ref, ref_other = doubles((7,), (7,), (7,), (7,))
    loss = ipo_loss(policy, other, ref, ref_other, beta)
    slow = [
        ((p - r) - (o - q) - 1 / (2 * beta)) ** 2
        for p, o, r, q in zip(*(x.tolist() for x in (policy, other, ref, ref_other)))
    ]
    close(loss.detach(), slow)
    assert not ipo_loss(other + 1 / (2 * beta), other, ref, ref, beta).gt(1e-20).any()


def test_dpo_starts_at_log_2():
    chosen, rejected = torch.tensor([-40.0, -3.0]), torch.tensor([-41.0, -90.0])
    close(dpo_loss(chosen, rejected, chosen, rejected, beta=0.1), [math.log(2)] * 2)


# ---- next token ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.sampled_from([torch.float64, torch.float32]))
def test_next_token_loss(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) * 3).to(dtype)
    tokens = torch.randint(5, (2, 3), generator=generator)
    expected = [
        [-math.log(reference.softmax(z)[t]) for z, t in zip(*rows)] for rows in zip(logits.tolist(), tokens.tolist())
    ]
    close(next_token_loss(logits, tokens), expected)


def test_next_token_loss_of_half_precision_is_float32():
    logits, tokens = torch.randn(4, 9).bfloat16(), torch.arange(4)
    assert torch.equal(next_token_loss(logits, tokens), next_token_loss(logits.float(), tokens))
    assert next_token_loss(logits, tokens).dtype == torch.float32


# ---- all -----------------------------------------------------------------------------------------------------------


def test_gradients_of_every_loss():
    check, pair, batch, tokens = torch.autograd.gradcheck, [(5,)] * 2, [(3, 4)] * 3, torch.arange(4).expand(3, 4)
    for options in ((0.2,), (0.2, 0.28), (0.2, None, 1.5), (math.inf,)):
        check(lambda *x, o=options: policy_loss(*x, *o), doubles(*batch))
    for clip in (None, 0.2):
        check(lambda *x, c=clip: value_loss(*x, c), doubles(*batch))
    check(lambda a, b: preference_loss(a, b, label_smoothing=0.1), doubles(*pair))
    check(lambda a, b, m: preference_loss(a, b, margin=m), doubles(*pair, (5,)))
    check(lambda a, b, y: preference_loss(a, b, label=y.sigmoid()), doubles(*pair, (5,)))
    check(centring_loss, doubles(*pair))
    for smoothing in (0.0, 0.1):
        check(lambda *x, s=smoothing: dpo_loss(*x, 0.5, s), doubles(*pair, *pair))
    check(lambda *x: ipo_loss(*x, 0.5), doubles(*pair, *pair))
    check(lambda z: next_token_loss(z, tokens), doubles((3, 4, 6)))
    check(approx_kl, doubles(*batch[:2]))


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: policy_loss(a, a, b, 0.2),
        lambda a, b: clip_fraction(a, b, b, 0.2),
        lambda a, b: approx_kl(a, b),
        lambda a, b: value_loss(b, a, a),
        lambda a, b: value_clip_fraction(a, a, b, 0.2),
        lambda a, b: preference_loss(a, b),
        lambda a, b: preference_loss(b, b, margin=a),
        lambda a, b: preference_loss(b, b, label=a),
        lambda a, b: centring_loss(a, b),
        lambda a, b: dpo_loss(a, a, b, b, 0.1),
        lambda a, b: ipo_loss(a, b, a, b, 0.1),
        lambda a, b: cispo_loss(a, a, b, 0.2),
        lambda a, b: gspo_loss(a, a, a, b.bool(), 0.2),
    ],
)
def test_no_loss_broadcasts(loss):
    """(n, 1) against (n,) once made a reward loss of n x n pairs in a well-known library."""
    with pytest.raises(ValueError, match=r"shapes differ: .*\(4, 1\)"):
        loss(torch.zeros(4, 1), torch.zeros(4))
