"""A task that a program checks: which of two numbers is larger? `python -m data.prepare larger --tokenizer=MODEL --out=DIR`

    user: Is 41 larger than 7? Answer yes or no.        assistant: yes

Every pair of different numbers from 1 to 99 stands once, in either order, and the splits go by the pair. The column
`answer` is what rewards/verify.py compares with.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from data.records import Record, group_of

LARGEST = 99
SYSTEM = {"role": "system", "content": "Answer with the result only, without any other words."}


def read_records() -> Iterator[tuple[int, Record]]:
    """(number, record) of all 4,851 rows."""
    for number, pair in enumerate(itertools.combinations(range(1, LARGEST + 1), 2), 1):
        a, b = random.Random(number).sample(pair, 2)
        answer = "yes" if a > b else "no"
        prompt = [SYSTEM, {"role": "user", "content": f"Is {a} larger than {b}? Answer yes or no."}]
        yield number, Record(prompt, (answer,), extra={"answer": answer}, source="larger", group=group_of(f"{pair}"))


def recipe() -> dict:
    """What the records depend on."""
    return {"source": "larger", "largest": LARGEST}


def write_beside(directory: Path) -> None:
    """Nothing: the answers stand in the rows."""
