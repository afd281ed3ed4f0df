"""Credit assignment against its definitions, and the identities that make it what it is."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import batches, close

from rlhf.advantages import ESTIMATORS, dr_grpo, gae, grpo, reinforce_plus_plus, rloo
from rlhf.functional import masked_sum

fractions = st.sampled_from([0.0, 0.5, 0.9, 0.95, 1.0])


@given(batches(holes=True, empty=True), fractions, fractions, st.booleans())
def test_gae(batch, gamma, lam, truncated):
    rewards, values, bootstrap = batch.token(), batch.token(), batch.row() if truncated else None
    expected = reference.gae(
        rewards.tolist(), values.tolist(), batch.mask.tolist(), gamma, lam, bootstrap.tolist() if truncated else None
    )
    for ours, theirs in zip(gae(rewards, values, batch.mask, gamma, lam, bootstrap), expected):
        close(ours, theirs)
        assert (ours[~batch.mask] == 0).all()


@given(batches(holes=True), fractions)
def test_lambda_1_is_the_monte_carlo_return_minus_the_value(batch, gamma):
    rewards, values, mask = batch.token(), batch.token(), batch.mask
    advantages, returns = gae(rewards, values, mask, gamma, 1.0)
    to_go = torch.zeros_like(rewards)
    for b, row in enumerate(mask):
        columns = row.nonzero().flatten().tolist()
        for i, t in enumerate(columns):
            to_go[b, t] = sum(gamma**k * rewards[b, s].item() for k, s in enumerate(columns[i:]))
    close(returns, to_go.tolist())  # whatever the critic says
    close(advantages, torch.where(mask, to_go - values, 0).tolist())


@given(batches(holes=True), fractions, fractions)
def test_values_on_a_base_are_rewards_shaped_by_it(batch, gamma, lam):
    """Values of base + v and the rewards as they are, or v and rewards of gamma base(t + 1) - base(t) more: one advantage
    (Wiewiora 2003, arXiv:1106.5267). That is what --value_base does, in either way to say it."""
    rewards, base, values, mask = batch.token(), batch.token(), batch.token(), batch.mask
    shaped = rewards.clone()
    for b, row in enumerate(mask):
        columns = row.nonzero().flatten().tolist()
        for t, after in zip(columns, [*columns[1:], None]):
            shaped[b, t] += (0 if after is None else gamma * base[b, after]) - base[b, t]
    on_base, returns = gae(rewards, base + values, mask, gamma, lam)
    plain, targets = gae(shaped, values, mask, gamma, lam)
    close(on_base, plain.tolist())
    close(torch.where(mask, returns - base, 0), targets.tolist())  # what the critic's head is trained to say


@given(batches(), fractions)
def test_lambda_0_is_the_td_error(batch, gamma):
    rewards, values, mask = batch.token(), batch.token(), batch.mask
    follows = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    next_values = torch.where(follows, values.roll(-1, dims=1), 0)
    expected = torch.where(mask, rewards + gamma * next_values - values, 0)
    close(gae(rewards, values, mask, gamma, 0.0)[0], expected.tolist())


@given(batches(holes=True))
def test_gamma_1_and_lambda_1_telescope(batch):
    """The first token's advantage is all that the row was paid, minus what the critic expected."""
    rewards, values, mask = batch.token(), batch.token(), batch.mask
    advantages, _ = gae(rewards, values, mask, 1.0, 1.0)
    first = mask.int().argmax(1, keepdim=True)
    paid = masked_sum(rewards, mask, dim=1)
    close(advantages.gather(1, first).squeeze(1), (paid - values.gather(1, first).squeeze(1)).tolist())


@given(batches(), fractions, fractions)
def test_bootstrap_is_one_more_state_that_pays_nothing_new(batch, gamma, lam):
    """A truncated row ends in a state worth `bootstrap`, as if one more token were paid exactly that."""
    mask = batch.mask | torch.ones_like(batch.mask)  # all full
    rewards, values, bootstrap = batch.token(), batch.token(), batch.row()
    longer = [torch.cat([x, bootstrap[:, None]], dim=1) for x in (rewards, values)]
    expected, _ = gae(*longer, torch.cat([mask, mask[:, :1]], dim=1), gamma, lam)
    close(gae(rewards, values, mask, gamma, lam, bootstrap)[0], expected[:, :-1].tolist())


@given(batches(holes=True), st.sampled_from(list(ESTIMATORS)), st.integers(0, 3), st.integers(0, 3))
def test_padding_and_other_rows_change_nothing(batch, name, columns, rows):
    """More columns on the right and more rows below (of other prompts): the old part stays what it was, bit for bit.

    REINFORCE++ is whitened over all rows by definition, so it only gets columns.
    """
    rewards, values, mask, group = batch.token(), batch.token(), batch.mask, batch.group()
    before = ESTIMATORS[name].estimate(rewards, values, mask, 0.9, 0.95, group)
    height, width = mask.shape

    def grow(x, fill):
        wide = torch.cat([x, torch.full((height, columns), fill, dtype=x.dtype)], dim=1)
        return torch.cat([wide, wide[:1].expand(0 if name == "reinforce++" else rows, -1)])

    bigger = grow(rewards, 7.0), grow(values, 7.0), grow(mask, False)
    more = len(bigger[0]) - height
    group = torch.cat([group, torch.arange(100, 100 + more)])
    after = ESTIMATORS[name].estimate(*bigger, 0.9, 0.95, group)
    for old, new in zip(before, after):
        if name == "gae":
            assert torch.equal(new[:height, :width], old)
        else:  # sums over a longer row may be added in another order
            close(new[:height, :width], old.tolist())
        assert (new[:height, width:] == 0).all()


@given(batches())
def test_groups(batch):
    scores, group = (
        (batch.row() * 8).round() / 8,
        batch.group(),
    )  # eighths: sums are exact, groups may have zero variance
    for ours, theirs in ((rloo, reference.rloo), (grpo, reference.grpo), (dr_grpo, reference.dr_grpo)):
        close(ours(scores, group), theirs(scores.tolist(), group.tolist()))


@pytest.mark.parametrize("estimator", [rloo, grpo, dr_grpo])
def test_group_properties(estimator):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(12, generator=generator, dtype=torch.float64)
    group = torch.arange(4).repeat(3)
    advantages = estimator(scores, group)
    close(torch.stack([advantages[group == g].sum() for g in range(4)]), [0.0] * 4)
    close(estimator(scores + 100 * group, group), advantages.tolist())  # a baseline per prompt
    order = torch.randperm(12, generator=generator)
    close(estimator(scores[order], group[order] * 1000 - 7), advantages[order].tolist())  # ids are only names
    assert (estimator(scores, torch.arange(12)) == 0).all()  # alone: nothing to compare with


def test_grpo_has_unit_variance_within_a_group_and_none_where_all_are_equal():
    scores = torch.tensor([1.0, 2.0, 4.0, 0.1, 0.1, 0.1], dtype=torch.float64)
    advantages = grpo(scores, torch.tensor([0, 0, 0, 1, 1, 1]))
    close(advantages[:3].var(), (1 / (1 + 1e-6 / scores[:3].std().item())) ** 2)
    for size in range(2, 12):  # in float32 the mean of equal numbers often is another number
        for score in (0.1, 10.1, -1e4 / 3):
            assert (grpo(torch.full((size,), score), torch.zeros(size, dtype=torch.long)) == 0).all()


def test_rloo_is_unbiased_by_enumeration():
    """E[A_i grad log pi(y_i)] over all pairs of responses is the gradient of the expected score; 3 possible responses."""
    logits = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    score = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)
    logp = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((logp.exp() * score).sum(), logits, retain_graph=True)
    group, surrogate = torch.zeros(3, dtype=torch.long), 0.0
    for texts in torch.cartesian_prod(*[torch.arange(3)] * 3):
        chance = logp[texts].sum().exp().detach()
        surrogate = surrogate + chance * (rloo(score[texts], group) * logp[texts]).mean()
    close(torch.autograd.grad(surrogate, logits)[0], exact.tolist())


@given(batches(holes=True, empty=True), fractions)
def test_reinforce_plus_plus(batch, gamma):
    rewards = batch.token()
    expected = reference.reinforce_plus_plus(rewards.tolist(), batch.mask.tolist(), gamma)
    for ours, theirs in zip(reinforce_plus_plus(rewards, batch.mask, gamma), expected):
        close(ours, theirs)


@given(batches(holes=True, empty=True))
def test_estimators_by_name(batch):
    """One signature for all; whole-response estimators give every counted token the advantage of its row's reward."""
    rewards, values, mask, group = batch.token(), batch.token(), batch.mask, batch.group()
    for name, estimator in ESTIMATORS.items():
        advantages, returns = estimator.estimate(rewards, values, mask, 0.9, 0.95, group)
        assert advantages.shape == returns.shape == mask.shape and advantages.dtype == returns.dtype == rewards.dtype
        assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all(), name
    row_rewards = masked_sum(rewards, mask, dim=1)
    for name, simple in (("rloo", rloo), ("grpo", grpo), ("dr_grpo", dr_grpo)):
        advantages, returns = ESTIMATORS[name].estimate(rewards, values, mask, 0.9, 0.95, group)
        assert torch.equal(advantages, torch.where(mask, simple(row_rewards, group)[:, None], 0))
        assert torch.equal(returns, torch.where(mask, row_rewards[:, None], 0))


def test_estimators_pass_on_what_they_use():
    torch.manual_seed(0)
    rewards, values, group = torch.randn(2, 3), torch.randn(2, 3), torch.zeros(2, dtype=torch.long)
    mask = torch.ones(2, 3, dtype=torch.bool)
    named = ESTIMATORS["gae"].estimate(rewards, values, mask, 0.9, 0.8, group)
    assert all(torch.equal(a, b) for a, b in zip(named, gae(rewards, values, mask, 0.9, 0.8)))
    named = ESTIMATORS["reinforce++"].estimate(rewards, values, mask, 0.9, 0.8, group)
    assert all(torch.equal(a, b) for a, b in zip(named, reinforce_plus_plus(rewards, mask, 0.9)))


@given(batches(holes=True))
def test_an_estimator_reads_what_its_row_says(batch):
    """Other values change the advantages of those that need them alone, other groups those that compare responses."""
    rewards, values, mask, group = batch.token(), batch.token(), batch.mask, batch.group()
    for name, row in ESTIMATORS.items():
        before = row.estimate(rewards, values, mask, 0.9, 0.95, group)
        for needed, changed in ((row.needs_values, (values + 1, group)), (row.needs_group, (values, group * 0))):
            after = row.estimate(rewards, changed[0], mask, 0.9, 0.95, changed[1])
            assert needed or all(torch.equal(a, b) for a, b in zip(before, after)), name
