"""Prepared data as rows, one an answer with its prompt before it: what the trainers and the report card read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from data.batches import cut
from data.examples import Examples
from data.pairs import SomeAnswers

MOST_PAIRS = {"train": 40_000, "validation": 8_000, "test": 8_000}  # that are made of scores


class TokenFile:
    """One split: `len(f)` rows, `f[i]` the tokens of row i (prompt, answer and what ends it); see data/examples.py.

    Columns are `rating` (the score), `domain` (the source) and the numbers among the data's other columns; `pair_chosen`,
    `pair_rejected` (rows) and `pair_gap` of the data's own pairs, or of pairs of its scores.
    """

    def __init__(self, path: str | Path, verify: bool = False, labels: str = "score"):
        self.path, self.data = Path(path), Examples(path, verify=verify)
        self.rows, self.domains = self.data.answers, self.data.sources
        self.fingerprint, self.vocab_size = self.data.fingerprint, self.data.vocab_size
        self.pad, self.bos, self.eos = self.data.pad, self.data.bos, self.data.eos
        self.labels, self.digest = labels, self.data.digest

    @cached_property
    def _answers(self) -> SomeAnswers:
        return SomeAnswers(self.data, None, MOST_PAIRS.get(self.path.name, 8_000))

    @cached_property
    def _turned(self) -> dict[str, np.ndarray]:
        """Ratings by the labels, and the pairs as those put them; ties fall out."""
        ratings = self._answers.column(self.labels).astype(np.float32)
        chosen, rejected = self._answers.column("pair_chosen"), self._answers.column("pair_rejected")
        gap = ratings[chosen] - ratings[rejected]  # (pairs,)
        return {
            "rating": ratings,
            "pair_chosen": np.where(gap > 0, chosen, rejected)[gap != 0],
            "pair_rejected": np.where(gap > 0, rejected, chosen)[gap != 0],
            "pair_gap": np.abs(gap)[gap != 0],
        }

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> np.ndarray:
        return self.data.row(int(i))

    def row(self, i: int, context: int) -> np.ndarray:
        """At most `context` tokens of row i: of a longer one the prompt is cut from the left, behind its start token.

        ValueError where the answer alone does not fit: an answer is never cut.
        """
        row, prompt = self[i], int(self.data.prompt_lengths(self.data.prompt_of(np.array([i])))[0])
        if len(row) <= context:
            return row
        if (room := context - (len(row) - prompt)) < 1:
            raise ValueError(
                f"row {i} of {self.path}: an answer of {len(row) - prompt} tokens does not fit a context of {context}; "
                "leave it out, or use a model that reads more"
            )
        return np.append(row[:prompt][cut(row[:prompt], room, self.bos)], row[prompt:])

    def lengths(self) -> np.ndarray:
        return self.data.row_lengths()  # (rows,)

    def column(self, name: str) -> np.ndarray:
        if name == "domain":
            return self.data.source(self.data.prompt_of())
        if self.labels != "score" and name in self._turned:
            return self._turned[name]
        column = self._answers.column(name)
        return column.astype(np.float32) if column.dtype == np.float64 else column

    @property
    def has_single_pairs(self) -> bool:
        """Do the pairs come with the data, so that its ratings compare the answers of a pair, and no others?"""
        return not self._answers.made

    def has(self, *names: str) -> bool:
        return self._answers.has(*names)

    def labelled_by(self, name: str) -> TokenFile:
        """This file as it would be if `name`, e.g. half of the raters, were its ratings: pairs turn, and ties fall out."""
        return TokenFile(self.path, labels=name)

    def domain_ids(self, names: Sequence[str]) -> list[int]:
        return self.data.source_ids(names)

    @cached_property
    def texts(self) -> list[str]:
        return self._answers.texts
