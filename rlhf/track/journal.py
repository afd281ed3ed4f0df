"""What was sent of metrics.jsonl, kept beside what was sent: no line goes twice, and one that was made again is noticed.

A resumed run drops the lines behind its checkpoint and makes them again, with the same losses and other seconds.
"""

import hashlib
import secrets
from pathlib import Path

from rlhf.infra.files import json_line, read_lines, write_lines

FILE = (
    "sent.jsonl"  # {"to": tracker, "id": of the run there}, then {"step": n, "line": hash} for every line that was sent
)


class Journal:
    """The journal in `place`, begun where there is none; ValueError where it is another tracker's."""

    def __init__(self, place: str | Path, to: str):
        self.file = Path(place) / FILE
        rows = read_lines(self.file)
        self.head = rows[0] if rows else {"to": to, "id": secrets.token_hex(4)}
        if not {"to", "id"} <= set(self.head) or not all({"step", "line"} <= set(row) for row in rows[1:]):
            raise ValueError(f"{self.file} is damaged: delete it, and what was sent is sent again")
        if self.head["to"] != to:
            raise ValueError(f"{place} holds what went to {self.head['to']}: choose another --out for {to}")
        self.sent: list[dict] = rows[1:]

    @property
    def last(self) -> int:
        """The highest step that was ever sent; -1 before the first."""
        return max((row["step"] for row in self.sent), default=-1)

    def news(self, rows: list[dict]) -> tuple[list[dict], int | None]:
        """(the lines that were not sent as they stand now, the step from which on others were sent in their place or None)."""
        keys = list(map(key, rows))
        same = 0
        while same < min(len(keys), len(self.sent)) and keys[same] == self.sent[same]:
            same += 1
        if same == len(rows):
            return [], None  # a resumed run has dropped lines, and has made none of them yet
        return rows[same:], rows[same]["step"] if same < len(self.sent) else None

    def write(self, rows: list[dict], forget: bool) -> None:
        """These are sent. `forget`: what was sent of later steps is gone from the tracker too."""
        later = [] if forget else [row for row in self.sent if row["step"] > rows[-1]["step"]]
        self.sent = [*map(key, rows), *later]
        write_lines(self.file, [self.head, *self.sent])


def key(row: dict) -> dict:
    return {"step": row["step"], "line": hashlib.sha256(json_line(row).encode()).hexdigest()[:16]}
