"""What a reward model has to beat: the VADER rules, a bag of words, length alone; and what people themselves reach."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from data.loader import SomeRows
from data.tokens import TokenFile

GAPS = {"all": 0.0, "0.5": 0.5, "1": 1.0, "2": 2.0}  # pairs whose ratings differ by more than this, in points


def pairwise_accuracy(chosen: np.ndarray, rejected: np.ndarray, gap: np.ndarray) -> dict[str, float]:
    """Share of pairs whose better text has the higher score, by rating gap; equal scores count one half.

    chosen (M,), rejected (M,) scores, gap (M,) > 0 -> {"all", "0.5", "1", "2"}; NaN where there is no such pair.
    """
    right = (chosen > rejected) + 0.5 * (chosen == rejected)  # (M,)
    return {
        name: float(right[gap > least].mean()) if (gap > least).any() else float("nan") for name, least in GAPS.items()
    }


def accuracy(scores: np.ndarray, file: TokenFile | SomeRows) -> dict[str, float]:
    """`pairwise_accuracy` of one score per row, (rows,), on the pairs of a token file."""
    return pairwise_accuracy(
        scores[file.column("pair_chosen")], scores[file.column("pair_rejected")], file.column("pair_gap")
    )


def baselines(
    train: TokenFile, test: TokenFile | SomeRows, rules: Callable[[str], float]
) -> dict[str, dict[str, float]]:
    """Pairwise accuracy on the test pairs: name -> {"all", "0.5", "1", "2"}. rules: text -> score, see `load_rules`.

    The bag of words learns from all of `train`.
    """
    length = train.lengths().astype(float)
    sign = 1.0 if accuracy(length, train)["all"] >= 0.5 else -1.0  # people like long texts or short ones: train decides
    bow = BagOfWords(train.texts, train.column("rating"))
    return {
        "vader": accuracy(np.array([rules(text) for text in test.texts]), test),
        "bow": accuracy(bow.scores(test.texts), test),
        "length": accuracy(sign * test.lengths(), test),
        "human": people(test.column("half_a"), test.column("half_b"), test),
        "one_rater": people(test.column("one_rater"), test.column("rest"), test),
    }


def people(judge: np.ndarray, truth: np.ndarray, file: TokenFile | SomeRows) -> dict[str, float]:
    """The ceiling: some raters' mean as the score, the mean of *other* raters as the truth, which also sets the gap.

    judge (rows,), truth (rows,). Two halves of the raters: what ten people say about ten others; one against the rest:
    what a single person reaches. With the mean of all as the truth, a rater would be compared with himself.
    """
    a, b = file.column("pair_chosen"), file.column("pair_rejected")
    gap = truth[a] - truth[b]
    agree = (judge[a] - judge[b]) * np.sign(gap)
    return pairwise_accuracy(agree, np.zeros_like(agree), np.abs(gap))  # gap 0 has no truth, and is not > 0


class BagOfWords:
    """Ridge regression of the rating on words and pairs of neighbours, each text a tf-idf vector of length 1.

    minimise |X w - (y - mean y)|^2 + ridge |w|^2 by conjugate gradients on (X'X + ridge I) w = X'y. X (texts, features)
    is sparse: X w and X'r are one `bincount` each. `ridge` was chosen on the validation split.
    """

    def __init__(self, texts: Sequence[str], ratings: np.ndarray, ridge: float = 1.0, iterations: int = 30):
        grams = [_grams(text) for text in texts]
        seen = Counter(gram for text in grams for gram in text)  # in how many texts
        self.index = {gram: i for i, gram in enumerate(gram for gram, n in seen.items() if n > 1)}
        self.idf = np.log(len(texts) / np.array([seen[gram] for gram in self.index]))
        row, column, value = self._features(grams)
        target = np.asarray(ratings, np.float64) - np.mean(ratings, dtype=np.float64)

        def X(w):  # (features,) -> (texts,)
            return np.bincount(row, value * w[column], minlength=len(texts))

        def Xt(r):  # (texts,) -> (features,)
            return np.bincount(column, value * r[row], minlength=len(self.index))

        self.w = np.zeros(len(self.index))
        residual = Xt(target)
        direction, size = residual.copy(), residual @ residual
        for _ in range(iterations):
            if size < 1e-12:
                break
            product = Xt(X(direction)) + ridge * direction
            step = size / (direction @ product)
            self.w += step * direction
            residual -= step * product
            size, old = residual @ residual, size
            direction = residual + size / old * direction

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Predicted rating minus the training mean: (texts,)."""
        row, column, value = self._features([_grams(text) for text in texts])
        return np.bincount(row, value * self.w[column], minlength=len(texts))

    def _features(self, grams: list[list[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The nonzero entries of X: row, column, value, each (nonzero,)."""
        found = [[self.index[gram] for gram in text if gram in self.index] for text in grams]
        row = np.repeat(np.arange(len(found)), [len(f) for f in found])
        column = np.array([i for f in found for i in f], np.int64)
        value = self.idf[column]
        norm = np.sqrt(np.bincount(row, value**2, minlength=len(found)))
        return row, column, value / np.maximum(norm[row], 1e-12)


def _grams(text: str) -> list[str]:
    """The different words, marks and pairs of neighbours of a text."""
    words = re.findall(r"[\w']+|[^\s\w]", text.lower())
    around = ["<", *words, ">"]
    pairs = [f"{a} {b}" for a, b in zip(around, around[1:])]
    return list(dict.fromkeys(words + pairs))  # not a set: its order differs from process to process
