"""A task that a program checks: three numbers to sort. `python -m data.prepare sorting --tokenizer=MODEL --out=DIR`

    user: Sort: 14, 18, 13        assistant: 13, 14, 18

Every set of three different numbers from 1 to 29 stands once, in an order that is not sorted, and the splits go by the set:
what is held out was never seen in another order. The column `answer` is what rewards/verify.py compares with.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from data.records import Record, group_of

LARGEST = 29
NO_SYSTEM = {"role": "system", "content": ""}  # else a template may write its own: tokens without use


def read_records() -> Iterator[tuple[int, Record]]:
    """(number, record) of all 3,654 rows."""
    for number, numbers in enumerate(itertools.combinations(range(1, LARGEST + 1), 3), 1):
        orders = [order for order in itertools.permutations(numbers) if order != numbers]
        asked, answer = (", ".join(map(str, order)) for order in (random.Random(number).choice(orders), numbers))
        prompt = [NO_SYSTEM, {"role": "user", "content": f"Sort: {asked}"}]
        yield number, Record(prompt, (answer,), extra={"answer": answer}, source="sorting", group=group_of(answer))


def recipe() -> dict:
    """What the records depend on."""
    return {"source": "sorting", "largest": LARGEST}


def write_beside(directory: Path) -> None:
    """Nothing: the answers stand in the rows."""
