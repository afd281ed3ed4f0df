"""Minimal pairs: sentence by sentence against a textbook transformer, and what is no file of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import SMALL, slow_logits, small_model
from test_card import written
from test_chat import tokenizer  # noqa: F401 (a fixture)

from evaluation.minimal_pairs import MinimalPair, known, read_pairs, report
from rlhf.ppo.roles import logprobs_of

MODEL = small_model("smollm2", seed=3)
sentences = st.lists(st.integers(1, SMALL["vocab_size"] - 1), min_size=2, max_size=6).map(np.array)


def total(row: np.ndarray) -> float:
    """log p of everything after the first token, one sentence at a time."""
    logits = slow_logits(MODEL, row.tolist())  # (T, V)
    return sum(float(logits[t - 1].log_softmax(-1)[row[t]]) for t in range(1, len(row)))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=3), st.integers(0, SMALL["vocab_size"] - 1))
def test_the_likelier_sentence_by_hand(rows, pad):
    pairs = [MinimalPair(good, bad, "") for good, bad in rows]
    found = known(logprobs_of(MODEL), pairs, pad, "cpu")
    for x, (good, bad) in zip(found, rows):
        difference = total(good) - total(bad)
        assert x == (difference > 0) or abs(difference) < 1e-9
    swapped = known(logprobs_of(MODEL), [MinimalPair(pair.bad, pair.good, "") for pair in pairs], pad, "cpu")
    assert (found + swapped == 1).all()


def test_report_counts_by_kind_and_pairs_the_models():
    kinds = ["agreement", "", "agreement", "binding"]
    pairs = [MinimalPair(np.zeros(2), np.zeros(2), kind) for kind in kinds]
    found = report(pairs, {"base": np.array([1.0, 1, 0, 1]), "tuned": np.array([1.0, 0, 0, 0.5])})
    assert found["base"]["accuracy"]["mean"] == 0.75 and found["base"]["gain"] == {"mean": 0, "low": 0, "high": 0}
    assert found["tuned"]["gain"]["mean"] == -0.375 and found["tuned"]["pairs"] == 4
    assert {kind: x["accuracy"]["mean"] for kind, x in found["tuned"]["by_kind"].items()} == {
        "agreement": 0.5,
        "binding": 0.5,
    }


def test_a_line_of_blimp(tmp_path, tokenizer):  # noqa: F811
    lines = [
        {"sentence_good": "a b", "sentence_bad": "a c", "linguistics_term": "agreement", "UID": "x", "field": "y"},
        {"sentence_good": " a b", "sentence_bad": "c", "phenomenon": "binding"},
        {"sentence_good": "b", "sentence_bad": "c"},
    ]
    one, two, three = read_pairs(written(tmp_path / "x.jsonl", lines), tokenizer, 8)
    assert [pair.kind for pair in (one, two, three)] == ["agreement", "binding", ""]
    assert one.good.tolist() == two.good.tolist() == [tokenizer.start, *tokenizer.encode("a b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"sentence_good": "a"}, "line 1 has no text 'sentence_bad'; it has sentence_good"),
        ({"sentence_good": "a", "sentence_bad": "a "}, "line 1: two different sentences"),
        ({"sentence_good": "a", "sentence_bad": " "}, "line 1: two different sentences"),
        (
            {"sentence_good": "a", "sentence_bad": "x y z x y z x y z"},
            "tokens do not fit into the model's context of 8",
        ),
        ("[]", "holds no pair"),
        ("", "holds no pair"),
    ],
)
def test_what_is_no_pair(tmp_path, tokenizer, line, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        read_pairs(written(tmp_path / "x.jsonl", [line]), tokenizer, 8)
