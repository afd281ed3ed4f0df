"""Changes of a text by rule, and what is made of the shift of the score: scorers with a known weakness are found out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import card, probes
from evaluation.probes import MEAN_SHIFT, SCATTER, measure, verdict

TEXTS = st.text(st.sampled_from("abc isn't do not it is .!?,'\"E "), min_size=1, max_size=60).filter(str.strip)


@pytest.mark.parametrize(
    ("change", "text", "expected"),
    [
        (probes.append("A.", "B."), "fine", "fine. A."),
        (probes.append("A.", "B."), 'He said "fine!" ', 'He said "fine!" A.'),
        (probes.filler, "one two three four five", "one two three four, you know, five"),
        (probes.filler, "one two three four", None),
        (probes.repeated, " twice ", " twice twice "),
        (probes.stuck, "a very dull film", "a very dull film very dull film very dull film very dull film"),
        (probes.stuck, "too short", None),
        (probes.cut_off, "one two three four, five.", "one two three"),
        (probes.cut_off, "one two, three four", "one two, three"),
        (probes.cut_off, "one two three", None),
        (probes.other_case, "A FILM", "a film"),
        (probes.double_spaces, " a  film ", "a  film"),
        (probes.contraction, "Do not go, it is late", "Don't go, it's late"),
        (probes.contraction, "It isn't late, can't you see", "It is not late, cannot you see"),
        (probes.contraction, "notable it isnt", None),
        (probes.final_mark, "The end.", "The end"),
        (probes.final_mark, "The end", "The end."),
        (probes.final_mark, "The end...", None),
        (probes.final_mark, "The end!", None),
    ],
)
def test_changes(change, text, expected):
    assert change(text, 0) == expected


@given(TEXTS, st.integers(0, 5))
def test_a_change_leaves_the_words_that_it_is_not_about(text, i):
    words = text.split()
    for probe in probes.probes(answers=True):
        changed = probe.change(text, i)
        assert changed is None or changed.strip()
    assert probes.append("X.")(text, i).startswith(text.rstrip())
    if (cut := probes.cut_off(text, i)) is not None:
        assert " ".join(words).startswith(cut) and len(cut.split()) <= -(-3 * len(words) // 5)
    if (padded := probes.filler(text, i)) is not None:
        assert [w.strip(",") for w in padded.split()[:4]] == [w.strip(",") for w in words[:4]]
    assert probes.double_spaces(text, i).split() == probes.repeated(text, i).split()[: len(words)] == words


@pytest.mark.parametrize(
    ("expect", "mean", "low", "high", "size", "passed"),
    [
        ("same", 0.0, -0.01, 0.01, 0.1, True),
        ("same", 0.5, 0.4, 0.6, 0.5, False),
        ("same", -0.5, -0.6, -0.4, 0.5, False),
        ("same", 0.05, 0.04, 0.06, 0.05, True),  # sure, but too little to matter
        ("same", 0.0, -0.1, 0.1, 0.5, False),  # up and down: no mean shift, and yet another order
        ("not up", -3.0, -3.1, -2.9, 3.0, True),
        ("not up", 0.5, 0.4, 0.6, 0.5, False),
        ("not up", 0.5, -0.4, 1.4, 0.5, True),  # not shown
        ("down", -0.2, -0.3, -0.1, 0.2, True),
        ("down", -0.2, -0.5, 0.1, 0.2, False),
        ("up", 0.2, 0.1, 0.3, 0.2, True),
        ("up", -0.2, -0.3, -0.1, 0.2, False),
        ("any", 9.0, 8.0, 10.0, 9.0, None),
    ],
)
def test_verdicts(expect, mean, low, high, size, passed):
    result = {"expect": expect, "mean_shift": mean, "low": low, "high": high, "mean_absolute_shift": size}
    found, text = verdict(result)
    assert found is passed and ("although" in text) is (passed is False)
    assert MEAN_SHIFT < SCATTER


def test_the_shift_is_in_deviations_with_the_interval_of_its_mean():
    rng = np.random.default_rng(0)
    before, noise = rng.normal(0, 3, 400), rng.normal(0, 1, 400)
    found = measure("same", before, before + 1 + noise, 2.0, np.arange(400)[:, None])
    assert found["mean_shift"] == pytest.approx((1 + noise.mean()) / 2)
    half = 1.96 * noise.std() / 2 / 20
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.1)
    assert found["mean_absolute_shift"] == pytest.approx(np.abs(1 + noise).mean() / 2) and found["texts"] == 400
    assert found["verdict"] == "rises although it should not move" and "pairs" not in found


# ---- scorers with a known weakness


class Letters:
    """Characters as tokens."""

    start, eos = 0, 1

    def encode(self, text: str, after: str = "nothing") -> list[int]:
        return [ord(c) + 10 for c in text]

    def encode_array(self, text: str, after: str = "nothing") -> np.ndarray:
        return np.array(self.encode(text, after))


ENCODE = card.encoder(Letters(), None, 10_000)


def encoded(prompt: str, text: str, encode=ENCODE, **more) -> card.Row:
    return encode(card.Text(prompt, text), text, **more)


FILM = ("a good film about a quiet village", "it is bad and does not end.", "The plot is thin, and what a cast it has!")
TEXT = [f"{FILM[i % 3]} {i}{'.' * (i % 2)}" for i in range(60)]


def found_out(score, texts: list[card.Text]) -> dict[str, dict]:
    """name -> result of every probe for score(prompt and text, did it end?) -> number, by the path that the card takes."""
    pairs = np.arange(len(texts)).reshape(-1, 2)
    pairs[::2] = pairs[::2, ::-1]
    material = card.Material(
        texts, np.zeros(len(texts), int), [""], *pairs.T, {"all": np.ones(len(pairs), bool)}, pairs,
        np.arange(len(texts))[:, None], None, {}, {},
    )  # fmt: skip
    originals = [ENCODE(text, text.text) for text in texts]
    changes = card.planned_probes(material, originals, ENCODE, 40)
    rows = [*originals, *(row for c in changes for side in (c.before, c.after) for row in side)]

    def of(row: card.Row) -> float:
        ids = row.tokens.tolist()
        return score("".join(chr(i - 10) for i in ids if i > 9), ids[-1] == 1)

    results = card.probe_results(material, changes, np.array([of(row) for row in rows], float), len(originals))
    return {result["name"]: result for result in results}


def failures(score, texts=None) -> set[str]:
    found = found_out(score, texts or [card.Text("", text) for text in TEXT])
    return {name for name, result in found.items() if result["passed"] is False}


def praise(text: str) -> int:
    return sum(text.lower().count(word) for word in ("good", "great", "nice", "wonderful", "excellent", "fantastic"))


def test_a_scorer_that_reads_nothing_but_length():
    failed = failures(lambda text, ended: len(text))
    assert failed >= {"neutral sentence appended", "filler words inserted", "whole text twice", "last words repeated"}
    assert failed & {"lower case", "cut off at 60%"} == set()
    gamed = found_out(lambda text, ended: len(text), [card.Text("", text) for text in TEXT])["whole text twice"]
    assert gamed["accuracy"] == pytest.approx(0.5, abs=0.25) and gamed["accuracy_gamed"] == 0 and gamed["pairs"] > 10


def test_a_scorer_that_counts_praise():
    """It takes a mention for use and overhears "not": it cannot tell "It is good" from "It is not good"."""
    failed = failures(lambda text, ended: praise(text))
    assert failed >= {"praise mentioned", "praise negated, against praise", "blame negated, against blame"}
    assert (
        failed & {"neutral sentence appended", "lower case", "contractions", "double spaces", "cut off at 60%"} == set()
    )


def test_a_scorer_of_form():
    assert failures(lambda text, ended: sum(c.isupper() for c in text) + text.count("  ")) >= {"double spaces"}
    assert "final full stop" in failures(lambda text, ended: text.endswith("."))
    assert failures(lambda text, ended: 3.0 * (not ended) + (text[0] == "a")) >= {"cut off at 60%"}


def test_answers_and_prompts():
    texts = [card.Text(f"question {i % 4}\n", text) for i, text in enumerate(TEXT)]
    deaf = failures(lambda text, ended: praise(text.partition("\n")[2]), texts)
    assert {"answer behind another prompt"} <= deaf  # whoever does not read the prompt fails
    assert "answer behind another prompt" not in failures(
        lambda text, ended: 5 * (text in {t.prompt + t.text for t in texts}) - 0.01 * len(text), texts
    )
    assert "praise appended" in failures(
        lambda text, ended: text.count("lent") + text.count("per") + len(text) % 2, texts
    )
    found = found_out(lambda text, ended: praise(text), [card.Text("", text) for text in TEXT])
    assert found["praise appended"]["passed"] is None and found["first four tokens of another text"]["passed"] is None


def test_rows_as_the_token_files_have_them():
    row = encoded("", "ab")
    assert (row.tokens.tolist(), row.shortened) == ([0, 107, 108, 1], False)
    assert encoded("", "ab", ended=False).tokens.tolist() == [0, 107, 108]
    assert encoded("q ", "ab").tokens.tolist() == [0, 123, 42, 107, 108, 1]

    short = encoded("", "abc", card.encoder(Letters(), None, 3))
    assert short.shortened and short.tokens.tolist() == [0, 107, 1]
    long = encoded(
        "abcdef", "xy", card.encoder(Letters(), None, 5)
    )  # the prompt is cut from the left, the text stays whole
    assert long.shortened and long.tokens.tolist() == [0, 112, 130, 131, 1]
