"""Answers that are right or wrong, where a reward or the judge says so with 1 and 0: accuracy, pass@k, greedy accuracy."""

import numpy as np

from evaluation.comparison import mean_and_interval
from evaluation.words import Table, show
from rlhf.statistics import pass_at_k


def is_verdict(samples: dict[str, np.ndarray]) -> bool:
    """Are all scores of all models, (P, n) each, 0 or 1, and not all the same?"""
    values = np.unique(np.concatenate([x.ravel() for x in samples.values()]))
    return values.tolist() == [0.0, 1.0]


def report(samples: dict[str, np.ndarray], greedy: dict[str, np.ndarray]) -> dict[str, dict]:
    """Of every model, with 95% intervals over prompts: the share of right answers among its samples (P, n), and how far that
    is above the first model's on the same prompts; pass@k for k = 2, 4, ... n; the share of right greedy answers (P,), where
    there are any; and of prompts with right and wrong samples, from which alone a group of them learns.
    """
    found, first = {}, next(iter(samples.values())).mean(1)
    for name, x in samples.items():
        n, right = x.shape[1], x.sum(1)
        found[name] = {"accuracy": mean_and_interval(x.mean(1))}
        if found.keys() != {name}:
            found[name]["rise"] = mean_and_interval(x.mean(1) - first)
        if name in greedy:
            found[name]["greedy"] = mean_and_interval(greedy[name])
        for k in [2**i for i in range(1, n.bit_length())]:
            found[name][f"pass@{k}"] = mean_and_interval(pass_at_k(right, n, k))
        if n > 1:
            found[name]["mixed"] = mean_and_interval((right > 0) & (right < n))
    return found


FIRST = ("accuracy", "rise", "greedy")


def table(found: dict[str, dict]) -> Table:
    """found: what `report` made of every score that is a verdict, {score: {model: ...}}."""
    names = list(dict.fromkeys(key for models in found.values() for x in models.values() for key in x))
    names = sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    rows = [
        [name, what, *(show(x.get(key)) for key in names)]
        for what, models in found.items()
        for name, x in models.items()
    ]
    return Table(["model", "right by", *names], rows)
