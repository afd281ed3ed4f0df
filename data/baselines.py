"""What a reward model has to beat: rules that come with the data, a bag of words, length alone; and what people reach."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from data.pairs import SomeAnswers

GAPS = {"all": 0.0, "0.5": 0.5, "1": 1.0, "2": 2.0}  # pairs whose ratings differ by more than this, in points


def pairwise_accuracy(chosen: np.ndarray, rejected: np.ndarray, gap: np.ndarray) -> dict[str, float]:
    """Share of pairs whose better text has the higher score, by rating gap; equal scores count one half.

    chosen (M,), rejected (M,) scores, gap (M,) > 0 -> {"all", "0.5", "1", "2"}; NaN where there is no such pair.
    """
    right = (chosen > rejected) + 0.5 * (chosen == rejected)  # (M,)
    return {
        name: float(right[gap > least].mean()) if (gap > least).any() else float("nan") for name, least in GAPS.items()
    }


def accuracy(scores: np.ndarray, file: SomeAnswers) -> dict[str, float]:
    """`pairwise_accuracy` of one score per row, (rows,), on the pairs among them."""
    return pairwise_accuracy(
        scores[file.column("pair_chosen")], scores[file.column("pair_rejected")], file.column("pair_gap")
    )


def pair_clusters(some: SomeAnswers) -> np.ndarray:
    """What was sampled, by pair, for `rlhf.statistics.cluster_bootstrap`: both its texts, (pairs, 2), where pairs are made of
    scores; else its prompt, (pairs, 1), with all that stands under one group.
    """
    if some.made:
        return np.stack([some.column("pair_chosen"), some.column("pair_rejected")], 1)
    prompts = some.data.prompt_of(some.answers[some.column("pair_chosen")])
    return np.unique(some.data.group(prompts), return_inverse=True)[1][:, None]


def baselines(
    train: SomeAnswers, test: SomeAnswers, rules: Callable[[str], float] | None
) -> dict[str, dict[str, float]]:
    """Pairwise accuracy on the test pairs: name -> {"all", "0.5", "1", "2"}. rules: text -> score, see `data.judge`.

    Data of preferences have neither rules (None) nor single raters, so no "rules" and no ceilings.
    """
    scores = {"rules": np.array([rules(text) for text in test.texts])} if rules else {}
    scores |= learned_scores(train, test)
    there = {name: columns for name, columns in CEILINGS.items() if test.has(*columns)}
    ceilings = {name: people(*map(test.column, columns), test) for name, columns in there.items()}
    return {name: accuracy(row, test) for name, row in scores.items()} | ceilings


def learned_scores(train: SomeAnswers, test: SomeAnswers) -> dict[str, np.ndarray]:
    """A score for every test text by what all of `train` teaches a bag of words, and by length: (rows,) each."""
    bow = BagOfWords(train.texts, train.column("rating"))
    return {"bow": bow.scores(test.texts), "length": length_scores(train, test)}


def length_scores(train: SomeAnswers, test: SomeAnswers) -> np.ndarray:
    """Tokens of every test answer, or minus them: people like long texts or short ones, and `train` decides. (rows,)"""
    sign = 1.0 if accuracy(train.answer_lengths().astype(float), train)["all"] >= 0.5 else -1.0
    return sign * test.answer_lengths()


# whose mean is the score, and whose the truth. Two halves of the raters: what ten people say about ten others; one against
# the rest: what a single person reaches. With the mean of all as the truth, a rater would be compared with himself.
CEILINGS = {"human": ("half_a", "half_b"), "one_rater": ("one_rater", "rest")}


def agreement(judge: np.ndarray, truth: np.ndarray, file: SomeAnswers) -> tuple[np.ndarray, np.ndarray]:
    """Whether the judge agrees about each pair (1, 1/2 for a tie, 0) with other people, whose truth also sets the gap.

    judge (rows,), truth (rows,) -> right (pairs,), gap (pairs,) >= 0; a gap of 0 has no truth.
    """
    a, b = file.column("pair_chosen"), file.column("pair_rejected")
    gap = truth[a] - truth[b]
    return (np.sign((judge[a] - judge[b]) * np.sign(gap)) + 1) / 2, np.abs(gap)


def people(judge: np.ndarray, truth: np.ndarray, file: SomeAnswers) -> dict[str, float]:
    """The ceiling: pairwise accuracy of some raters' mean (rows,) against the mean of others, (rows,)."""
    right, gap = agreement(judge, truth, file)
    return pairwise_accuracy(right, 1 - right, gap)  # gap 0 is not > 0


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
