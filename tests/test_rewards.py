"""Rewards per token: where the score lands, what a token pays, what a row adds up to."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import batches, close

from rlhf.kl import ESTIMATORS
from rlhf.rewards import missing_eos, shape_rewards


@given(batches(holes=True), st.sampled_from([0.0, 0.05, 2.0]), st.sampled_from(list(ESTIMATORS)))
def test_shape_rewards(batch, kl_coef, estimator):
    arguments = batch.row(), batch.logprob(), batch.logprob(), batch.mask
    rewards = shape_rewards(*arguments, kl_coef, estimator)
    close(rewards, reference.shape_rewards(*(a.tolist() for a in arguments), kl_coef, estimator))
    assert (rewards[~batch.mask] == 0).all()


@given(batches(holes=True))
def test_a_row_adds_up_to_its_score_minus_its_kl(batch):
    scores, p, q = batch.row(), batch.logprob(), batch.logprob()
    kl = [sum(reference.counted([row], [m])) for row, m in zip((p - q).tolist(), batch.mask.tolist())]
    rewards = shape_rewards(scores, p, q, batch.mask, 0.05)
    close(rewards.sum(1), [s - 0.05 * k for s, k in zip(scores.tolist(), kl)])


def test_the_score_is_paid_for_the_last_real_token():
    mask = torch.tensor([[False, True, True, False], [True, False, False, False], [False, True, False, True]])
    zero, scores = torch.zeros(3, 4), torch.tensor([1.0, 2.0, 3.0])
    expected = [[0, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 3]]
    assert shape_rewards(scores, zero, zero, mask, 0.1).tolist() == expected


def test_an_empty_response_would_lose_its_score():
    mask = torch.tensor([[True, False], [False, False], [False, False]])
    with pytest.raises(ValueError, match="2 of 3 responses are empty .first: row 1."):
        shape_rewards(torch.ones(3), torch.zeros(3, 2), torch.zeros(3, 2), mask, 0.1)


def test_unknown_estimator():
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'; choose one of k1, k2, k3"):
        shape_rewards(torch.ones(1), torch.zeros(1, 2), torch.zeros(1, 2), mask, 0.1, "k4")


def test_missing_eos():
    scores, finished = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([True, False, False])
    assert missing_eos(scores, finished, 0.5).tolist() == [1.0, 0.5, -2.5]
    assert missing_eos(scores, finished, 0.0).tolist() == scores.tolist()
