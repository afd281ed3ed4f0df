"""Pairs of rated rows: within a domain, different, each domain with its share."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.pairs import make_pairs


@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([-1.0, 0.0, 0.5, 2.0])), max_size=30),
    count=st.integers(0, 60),
    seed=st.integers(0, 3),
)
def test_pairs_are_within_a_domain_different_and_ordered_by_rating(rows, count, seed):
    domains, ratings = np.array([d for d, _ in rows], np.uint8), np.array([r for _, r in rows], np.float32)
    pairs = make_pairs(ratings, domains, count, seed)
    chosen, rejected, gap = pairs["pair_chosen"], pairs["pair_rejected"], pairs["pair_gap"]
    assert len(chosen) == len(rejected) == len(gap) <= count
    assert (domains[chosen] == domains[rejected]).all() and (gap > 0).all()
    assert np.array_equal(ratings[chosen] - ratings[rejected], gap)
    assert len({frozenset(p) for p in zip(chosen.tolist(), rejected.tolist())}) == len(gap)
    assert all(np.array_equal(a, b) for a, b in zip(pairs.values(), make_pairs(ratings, domains, count, seed).values()))


def test_a_domain_has_the_share_of_its_rows_and_every_row_the_same_chance():
    domains = np.repeat([0, 1, 2], [300, 100, 1]).astype(np.uint8)  # one row alone has no partner
    ratings = np.random.default_rng(0).normal(size=401).astype(np.float32)
    pairs = make_pairs(ratings, domains, 6000, seed=1)
    assert len(pairs["pair_gap"]) == 6000
    assert abs((domains[pairs["pair_chosen"]] == 0).mean() - 0.75) < 0.03
    uses = np.bincount(np.concatenate([pairs["pair_chosen"], pairs["pair_rejected"]]), minlength=401)[:400]
    assert uses.min() > 8 and uses.max() < 60  # 30 +- 5.5 each
