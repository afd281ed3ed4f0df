"""Does a model still know its language? Minimal pairs: two sentences that differ in one word, of which one is right.

A file has one pair a line, {"sentence_good": ..., "sentence_bad": ...}, and what it tests under "phenomenon" or, as in the
files of BLiMP (Warstadt et al. 2020, arXiv:1912.00582), "linguistics_term". None comes with this repository.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.containers import rows_with
from data.loader import in_order, pad
from evaluation.comparison import mean_and_interval
from evaluation.words import markdown_table, show
from rlhf.statistics import win_rate


class MinimalPair(NamedTuple):
    good: np.ndarray  # (T,) bos and the tokens of the right sentence
    bad: np.ndarray  # (T',)
    kind: str  # "" where the file names none


def read_pairs(path: str | Path, tokenizer, context: int) -> list[MinimalPair]:
    """All pairs of a file; ValueError, naming the line, for one that is none, is twice the same, or exceeds the context."""
    found = []
    for where, row in rows_with(path, ("sentence_good", "sentence_bad")):
        texts = [row[name].strip() for name in ("sentence_good", "sentence_bad")]
        if not all(texts) or texts[0] == texts[1]:
            raise ValueError(
                f"{where}: two different sentences were expected, not {texts[0]!r:.40} and {texts[1]!r:.40}"
            )
        good, bad = (np.array([tokenizer.start, *tokenizer.encode(text)]) for text in texts)
        if (longest := max(len(good), len(bad))) > context:
            raise ValueError(
                f"{where}: {longest} tokens do not fit into the model's context of {context}; leave it out"
            )
        found.append(MinimalPair(good, bad, str(row.get("phenomenon") or row.get("linguistics_term") or "")))
    if not found:
        raise ValueError(f"{path} holds no pair of sentences")
    return found


def known(logprobs, pairs: Sequence[MinimalPair], pad_id: int, device) -> np.ndarray:
    """Per pair 1 where the good sentence is likelier, 0 where the bad one is, one half for a tie: (pairs,).

    By the total log-probability of the sentence's tokens after bos, as BLiMP does; `logprobs` as of `logprobs_of`.
    """
    rows = [row for pair in pairs for row in (pair.good, pair.bad)]
    order = np.argsort([len(row) for row in rows], kind="stable")
    totals = np.zeros(len(rows))
    for places in in_order(len(rows), 32):
        tokens, lengths = (x.to(device) for x in pad([rows[i] for i in order[places]], pad_id))
        t = torch.arange(tokens.shape[1], device=device)
        totals[order[places]] = logprobs(tokens, (t >= 1) & (t < lengths[:, None])).cpu().double().sum(1).numpy()
    return win_rate(totals[::2], totals[1::2])


def report(pairs: Sequence[MinimalPair], known: dict[str, np.ndarray]) -> dict[str, dict]:
    """Accuracy of every model, its gain over the first, and accuracy by what the pairs test."""
    kinds = np.array([pair.kind for pair in pairs])
    base = next(iter(known.values()))
    result = {}
    for name, x in known.items():
        groups = {kind: x[kinds == kind] for kind in sorted({*kinds} - {""})}
        result[name] = {
            "pairs": len(x),
            "accuracy": mean_and_interval(x),
            "gain": mean_and_interval(x - base),
            "by_kind": {str(kind): {"pairs": len(y), "accuracy": mean_and_interval(y)} for kind, y in groups.items()},
        }
    return result


def markdown(found: dict[str, dict]) -> str:
    rows = [[name, str(x["pairs"]), show(x["accuracy"]), show(x["gain"], "+.3f")] for name, x in found.items()]
    return "Minimal pairs: how often the right sentence is the likelier one.\n\n" + markdown_table(
        ["model", "pairs", "accuracy", "gain over the base"], rows
    )
