"""What people think of two answers: a store of comparisons and votes in one SQLite file.

Append-only: triggers refuse UPDATE and DELETE, an undo is a row that supersedes a vote. Every call is one transaction that
is on disk before it returns (WAL, synchronous=FULL), so an acknowledged vote survives kill -9, and any number of processes
may use the file. Which answer stands on the left is drawn here, from the store's seed, and never by who asks.

    store = FeedbackStore("out/feedback.sqlite")
    prompt = store.add_prompt("A good film is")
    a, b = (store.add_completion(prompt, store.add_model(name), text) for name, text in samples)
    store.make_comparisons([(a, b)])
    shown = store.next_comparison("ana")                                    # blind: texts alone
    vote = store.vote(shown.id, "ana", "left", seconds=2.5, nonce="...")    # the same nonce again changes nothing
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from rlhf.feedback.preferences import FORMS, ORDERS, answer_text, as_text, is_conversation, read_rows
from rlhf.feedback.raters import Judgement, describe
from rlhf.feedback.schema import CHOICES, FORMAT, KINDS, LAST, NEW, RATINGS, SCHEMA, VOTES
from rlhf.infra.files import write_lines

OPEN_SECONDS = 600  # so long a pair that lies before one rater is not given to another
REPEAT_DISTANCE = 5  # votes between a pair and its swapped repetition, at least


class Unknown(ValueError):
    """An id that the store does not have, or not for this rater: a server answers 404."""


class Unavailable(ValueError):
    """The file cannot be read or written now: locked, a full disk. What was asked may be right: a server answers 503."""


@dataclass(frozen=True)
class Comparison:
    """What a rater sees: no model names, the sides drawn by the store."""

    id: int
    asked: str | list[dict]  # a text, or messages
    left: str
    right: str

    @property
    def prompt(self) -> str:
        """For the eye: a conversation as text, one paragraph a turn."""
        return as_text(self.asked)


class Vote(NamedTuple):
    id: int
    comparison: int
    choice: str


class FeedbackStore:
    """The votes in one SQLite file. Threads of a process may share an object, processes open the file themselves.

    seed (which side, which pairs come again) and repeats (share of a rater's comparisons that show an earlier pair again,
    swapped) are fixed when the file is made, 0 and 0.1 unless told otherwise. ValueError if the file has other ones, is
    something else, or stays locked for a minute.
    """

    def __init__(self, path: str | Path, seed: int | None = None, repeats: float | None = None):
        if repeats is not None and not 0 <= repeats < 1:
            raise ValueError(f"repeats {repeats} must be a share of the comparisons, from 0 to below 1")
        self.path, self._lock = Path(path), threading.RLock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        try:
            self._begin(seed, repeats)
        except BaseException:
            self._db.close()  # it may hold a lock, for which the next to open the file would wait
            raise

    def _begin(self, seed: int | None, repeats: float | None) -> None:
        path = self.path
        with self._errors():
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
        with self.transaction() as db:
            version, tables = db.execute("PRAGMA user_version").fetchone()[0], db.execute("SELECT 1 FROM sqlite_master")
            if version == 0 and not tables.fetchone():
                for statement in _statements(SCHEMA):
                    db.execute(statement)
                chosen = [("seed", seed or 0), ("repeats", 0.1 if repeats is None else repeats)]
                db.executemany("INSERT INTO setting VALUES (?, ?)", chosen)
                db.execute(f"PRAGMA user_version = {FORMAT}")
            elif version != FORMAT:
                raise ValueError(f"{path} is no feedback store of format {FORMAT} (user_version {version})")
            settings = dict(db.execute("SELECT name, value FROM setting").fetchall())
        self.seed, self.repeats = int(settings["seed"]), settings["repeats"]
        for name, asked, has in (("seed", seed, self.seed), ("repeats", repeats, self.repeats)):
            if asked is not None and asked != has:
                raise ValueError(f"{path} was made with {name} {has}, not {asked}: leave it out, or make a new store")

    def close(self) -> None:
        self._db.close()

    # what is compared

    def add_model(self, name: str, checkpoint: str = "", sha256: str = "") -> int:
        """The id of this model; the same arguments give the same id."""
        return self._find_or_insert("model", {"name": name, "checkpoint": checkpoint, "sha256": sha256})

    def add_prompt(self, prompt: str | list[dict], source: str | None = None) -> int:
        """The id of a prompt, a text or [{"role", "content"}, ...]; the same prompt gives the same id."""
        if not isinstance(prompt, str) and not is_conversation(prompt):
            raise ValueError(f"a prompt is a text or a list of messages with role and content, not {str(prompt)[:80]}")
        content = json.dumps(prompt, ensure_ascii=False)
        return self._find_or_insert("prompt", {"content": content}, {"source": source})

    def add_completion(self, prompt: int, model: int, text: str, sampling: dict | None = None) -> int:
        """The id of an answer; sampling: how it was made (seed, temperature, score ...), kept as JSON."""
        about = None if sampling is None else json.dumps(sampling, sort_keys=True)
        return self._find_or_insert(
            "completion", {"prompt_id": prompt, "model_id": model, "text": text}, {"sampling": about}
        )

    def add_rater(self, name: str, kind: str = "human") -> int:
        """The id of a rater. ValueError if the name is known as another kind: simulated raters stay recognisable."""
        if not (isinstance(name, str) and 0 < len(name) <= 100 and name.isprintable() and name == name.strip()):
            raise ValueError(f"rater name {str(name)[:100]!r} must have 1 to 100 printable characters, no space around")
        if kind not in KINDS:
            raise ValueError(f"rater kind {kind!r} is none of {', '.join(KINDS)}")
        rater = self._find_or_insert("rater", {"name": name}, {"kind": kind})
        has = self._read("SELECT kind FROM rater WHERE id = ?", rater)[0]["kind"]
        if has != kind:
            raise ValueError(f"rater {name!r} is known as {has}, not as {kind}: choose another name")
        return rater

    def make_comparison(self, a: int, b: int, raters: int = 1, priority: float = 0.0) -> bool:
        """Ask `raters` people which of two completions is better; False where that gives no new pair."""
        return bool(self.make_comparisons([(a, b)], raters, [priority]))

    def make_comparisons(
        self, pairs: Sequence[tuple[int, int]], raters: int = 1, priorities: Sequence[float] | None = None
    ) -> int:
        """Queue pairs of completions; those of higher priority come first, equal ones in their order here.

        Returns how many are new: a pair that is known, or whose texts are the same, is left out.
        ValueError if two completions answer different prompts.
        """
        priorities = [0.0] * len(pairs) if priorities is None else list(priorities)
        if len(priorities) != len(pairs) or raters < 1:
            raise ValueError(f"{len(pairs)} pairs, {len(priorities)} priorities, {raters} raters: one priority a pair")
        added = 0
        with self.transaction() as db:
            for (a, b), priority in zip(pairs, priorities):
                one, two = (self._completion(db, i) for i in (a, b))
                if one["prompt_id"] != two["prompt_id"]:
                    raise ValueError(f"completions {a} and {b} answer different prompts; compare answers to one prompt")
                if one["text"] != two["text"]:
                    row = (min(a, b), max(a, b), raters, float(priority), time.time())
                    sql = "INSERT OR IGNORE INTO pair(a_id, b_id, raters, priority, created) VALUES (?, ?, ?, ?, ?)"
                    added += db.execute(sql, row).rowcount
        return added

    # voting

    def next_comparison(self, rater: str) -> Comparison | None:
        """What this rater should judge next; the same again until there is a vote on it. None: nothing is left.

        In this order: what lies open before the rater; sometimes (`repeats`) an earlier pair again, swapped; the pair of
        highest priority that the rater has not seen and that still needs raters.
        """
        rater_id = self._rater(rater)
        with self.transaction() as db:
            row = db.execute(
                f"SELECT id FROM comparison c WHERE rater_id = ? AND {LAST} = 'undone' ORDER BY id LIMIT 1", (rater_id,)
            ).fetchone()
            comparison = row["id"] if row else self._repeat(db, rater_id) or self._new(db, rater_id)
            return None if comparison is None else self._show(db, comparison)

    def progress(self, rater: str) -> tuple[int, int]:
        """How many comparisons this rater has judged, skips among them, and how many there are, those and what is left.

        A repetition counts when it comes: a rater is not told which pairs are one, so the second number may grow.
        """
        judged = "SELECT count(*) FROM standing WHERE rater_id = ?1"
        before_them = f"SELECT count(*) FROM comparison c WHERE rater_id = ?1 AND {LAST} = 'undone'"
        counts = f"SELECT ({judged}), ({before_them}), (SELECT count(*) {NEW})"
        done, *left = self._read(counts, self._rater(rater), time.time() - OPEN_SECONDS)[0]
        return done, done + sum(left)

    def lay_before(
        self, rater: str, asked: str | list[dict], left: tuple[str, str, dict], right: tuple[str, str, dict]
    ) -> int:
        """The comparison of two answers (model, text, sampling) that lie before this rater now, as they lie there.

        Who shows them has drawn the sides. Nobody else is asked about them, unless this rater skips them, or leaves them
        without a vote for OPEN_SECONDS. The same again gives the same comparison while it has no vote; ValueError once it
        has one, where it lies open the other way round, and for two equal texts.
        """
        if left[1] == right[1]:
            raise ValueError("both answers have the same text: there is nothing to compare")
        rater_id = self._rater(rater)
        with self.transaction() as db:
            prompt = self.add_prompt(asked, source="page")
            sides = [
                self.add_completion(prompt, self.add_model(model), text, how) for model, text, how in (left, right)
            ]
            self.make_comparison(*sides)
            pair = db.execute("SELECT id FROM pair WHERE a_id = ? AND b_id = ?", sorted(sides)).fetchone()["id"]
            sql = f"SELECT id, left_id, {LAST} AS last FROM comparison c WHERE pair_id = ? AND rater_id = ?"
            seen = db.execute(sql, (pair, rater_id)).fetchall()
            if not seen:
                return self._insert_comparison(db, pair, rater_id, *sides, None)
            if [(row["left_id"], row["last"]) for row in seen] != [(sides[0], "undone")]:
                raise ValueError(f"{rater} has judged these two answers, or has them open under Compare")
            return seen[0]["id"]

    def vote(
        self,
        comparison: int,
        rater: str,
        choice: str,
        strength: float | None = None,
        seconds: float | None = None,
        nonce: str = "",
    ) -> int:
        """Store a vote and return its id; when it returns, the vote is on disk.

        choice: left, right (as shown), tie, both_bad or skip. strength: 1 to 3, of left and right alone; what is imported
        may be a mean of several. seconds: from showing to choosing. nonce: a text of the client's, new for every vote; a
        retry with it returns the same id.
        Unknown: no such comparison of this rater. ValueError: it has a vote already (undo that), or a bad argument.
        """
        if choice not in CHOICES:
            raise ValueError(f"choice {choice!r} is none of {', '.join(CHOICES)}")
        known = isinstance(strength, int | float) and 1 <= strength <= 3
        if strength is not None and not (known and choice in ("left", "right")):
            raise ValueError(f"strength {strength!r} with choice {choice}: from 1 to 3, and only for left or right")
        if seconds is not None and not (isinstance(seconds, int | float) and 0 <= seconds < 1e6):
            raise ValueError(f"seconds {seconds!r} must be between 0 and 1,000,000")
        if not (isinstance(nonce, str) and 8 <= len(nonce) <= 100):
            raise ValueError("nonce must be a text of 8 to 100 characters, new for every vote, so that a retry is safe")
        rater_id = self._rater(rater)
        with self.transaction() as db:
            given = db.execute("SELECT id, comparison_id, choice FROM vote WHERE nonce = ?", (nonce,)).fetchone()
            if given:
                if (given["comparison_id"], given["choice"]) != (comparison, choice):
                    raise ValueError(f"nonce {nonce!r} belongs to another vote; draw a new one")
                return given["id"]
            self._own(db, comparison, rater_id)
            last = self._last(db, comparison)
            if last and last["choice"] != "undone":
                raise ValueError(f"comparison {comparison} has a vote already; undo it to vote again")
            row = (comparison, choice, strength, seconds, nonce, last["id"] if last else None, time.time())
            return db.execute(
                "INSERT INTO vote(comparison_id, choice, strength, seconds, nonce, supersedes, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            ).lastrowid

    def undo(self, vote: int, rater: str) -> None:
        """Take a vote back, by a row that supersedes it; its comparison is open again. A second undo changes nothing."""
        rater_id = self._rater(rater)
        with self.transaction() as db:
            row = db.execute("SELECT comparison_id, choice FROM vote WHERE id = ?", (vote,)).fetchone()
            if row is None or row["choice"] == "undone":
                raise Unknown(f"no vote {vote}")
            self._own(db, row["comparison_id"], rater_id)
            if not db.execute("SELECT 1 FROM vote WHERE supersedes = ?", (vote,)).fetchone():
                sql = "INSERT INTO vote(comparison_id, choice, supersedes, created) VALUES (?, 'undone', ?, ?)"
                db.execute(sql, (row["comparison_id"], vote, time.time()))

    def last_vote(self, rater: str) -> Vote | None:
        """The newest vote of this rater that counts: what "undo" means."""
        sql = "SELECT id, comparison_id, choice FROM standing WHERE rater_id = ? ORDER BY id DESC LIMIT 1"
        rows = self._read(sql, self._rater(rater))
        return Vote(*rows[0]) if rows else None

    def rate(self, completion: int, rater: str, score: float, low: float, high: float, nonce: str) -> int:
        """Store a rating of one completion on the scale low..high; the same nonce again returns the same id."""
        values = {"completion_id": completion, "rater_id": self._rater(rater), "score": score, "low": low, "high": high}
        return self._find_or_insert("rating", {"nonce": nonce}, values)

    # what came out

    def judgements(self) -> list[Judgement]:
        """All votes that count, in the form that `rlhf.feedback.raters` reads."""
        rows = self._read(
            "SELECT s.pair_id, r.name, s.left_id = p.a_id, s.choice, s.seconds, s.repeat_of IS NOT NULL FROM standing s "
            "JOIN rater r ON r.id = s.rater_id JOIN pair p ON p.id = s.pair_id ORDER BY s.id"
        )
        return [Judgement(pair, rater, bool(a_left), *more, bool(again)) for pair, rater, a_left, *more, again in rows]

    def statistics(self) -> dict:
        """`rlhf.feedback.raters.describe` of the votes, and how far the queue is: no model names, raters may read it."""
        pairs, prompts = self._read("SELECT (SELECT count(*) FROM pair), (SELECT count(*) FROM prompt)")[0]
        return describe(self.judgements()) | {"queued_pairs": pairs, "prompts": prompts}

    def missing_votes(self) -> int:
        """How many votes the queued pairs still need; a rater's repetition of a pair is none of them."""
        given = "SELECT count(DISTINCT rater_id) FROM standing s WHERE s.pair_id = p.id"
        return self._read(f"SELECT coalesce(sum(max(p.raters - ({given}), 0)), 0) FROM pair p")[0][0]

    def wins(self) -> list[dict]:
        """Votes for a side, by the two models compared: [{"model", "against", "wins", "of"}]. Not for raters' eyes."""
        rows = self._read(
            "SELECT w.name, l.name, count(*) FROM standing s "
            "JOIN completion cw ON cw.id = iif(s.choice = 'left', s.left_id, s.right_id) "
            "JOIN completion cl ON cl.id = iif(s.choice = 'left', s.right_id, s.left_id) "
            "JOIN model w ON w.id = cw.model_id JOIN model l ON l.id = cl.model_id "
            "WHERE s.choice IN ('left', 'right') AND w.id <> l.id GROUP BY w.id, l.id ORDER BY w.name, l.name"
        )
        won = {(row[0], row[1]): row[2] for row in rows}
        both = {(a, b): (won.get((a, b), 0), won.get((b, a), 0)) for pair in won for a, b in (pair, pair[::-1])}
        return [{"model": a, "against": b, "wins": w, "of": w + l} for (a, b), (w, l) in sorted(both.items())]

    def export_jsonl(self, path: str | Path, form: str = "preference") -> dict[str, int]:
        """Write the votes as JSON lines and return how many rows were written, and why pairs were left out.

        preference: TRL's {"prompt", "chosen", "rejected"}, one row a pair with the verdict of most raters, by their
            first votes; conversational where the prompt is a conversation. Beside it strength (mean, 1 to 3, or null),
            votes, agreement, raters' kinds, models. Left out and counted: tie, both_bad, skip,
            split (no majority), blank (an answer without text, which no reward model can read).
        votes: every vote that counts, with its texts, models, rater, sides and seconds.
        ratings: {"prompt", "response", "score", "low", "high", "rater", "kind", "model"}.
        """
        if form not in FORMS:
            raise ValueError(f"form {form!r} is none of {', '.join(FORMS)}")
        rows, counts = FORMS[form]([dict(row) for row in self._read(RATINGS if form == "ratings" else VOTES)])
        write_lines(path, rows)
        return {"written": len(rows), **counts}

    def import_jsonl(
        self,
        path: str | Path,
        rater: str = "import",
        raters: int = 1,
        order: str = "given",
        seed: int = 0,
    ) -> dict[str, int]:
        """Read JSON lines, all or nothing, and return the counts of what is new; the same file again changes nothing.

        {"prompt", "chosen", "rejected"}: a vote of `rater` (kind "import"), its sides drawn by the store; with its
            strength, a number from 1 to 3, where the row has one.
        {"prompt", "responses": [{"text", "model", "scores"}, ...]}: to be compared, every two of a prompt, by `raters`
            people each, in the `order` given, random (by seed), or active: first where the members of a reward
            ensemble, whose scores every response then has, disagree most (see `disagreement`).
        Prompts are texts or conversations; chosen and rejected are texts or one message of the assistant.
        """
        if order not in ORDERS:
            raise ValueError(f"order {order!r} is none of {', '.join(ORDERS)}")
        counts = dict.fromkeys(("rows", "votes", "pairs", "identical"), 0)
        asked = []  # (a, b, scores of a, scores of b)
        with self.transaction():
            for where, row in read_rows(path):
                counts["rows"] += 1
                try:
                    prompt = self.add_prompt(row["prompt"], source=Path(path).name)
                    if "chosen" in row:
                        self._import_vote(prompt, row, rater, counts)
                        continue
                    answers = self._answers(prompt, row["responses"])
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
                for (a, text_a, scores_a), (b, text_b, scores_b) in combinations(answers, 2):
                    if text_a == text_b:
                        counts["identical"] += 1
                    else:
                        asked.append((a, b, scores_a, scores_b))
            if asked:
                pairs = [(a, b) for a, b, _, _ in asked]
                priorities = ORDERS[order]([x[2:] for x in asked], seed)
                counts["pairs"] = self.make_comparisons(pairs, raters, priorities)
        return counts

    def _import_vote(self, prompt: int, row: dict, rater: str, counts: dict) -> None:
        if row["chosen"] == row["rejected"]:
            counts["identical"] += 1
            return
        rater_id = self.add_rater(rater, "import")
        chosen, rejected = (
            self.add_completion(prompt, self.add_model(row.get(f"{side}_model") or side), answer_text(row[side]))
            for side in ("chosen", "rejected")
        )
        self.make_comparison(chosen, rejected)
        with self.transaction() as db:
            a, b = sorted((chosen, rejected))
            pair = db.execute("SELECT id FROM pair WHERE a_id = ? AND b_id = ?", (a, b)).fetchone()["id"]
            sql = "SELECT 1 FROM comparison WHERE pair_id = ? AND rater_id = ?"
            if db.execute(sql, (pair, rater_id)).fetchone():
                return  # imported before
            left, right = self._sides(pair, a, b, rater_id)
            comparison = self._insert_comparison(db, pair, rater_id, left, right, None)
        choice = "left" if left == chosen else "right"
        self.vote(comparison, rater, choice, row.get("strength"), nonce=f"import/{comparison}/{rater_id}")
        counts["votes"] += 1

    def _answers(self, prompt: int, answers: list) -> list[tuple[int, str, list[float] | None]]:
        if not isinstance(answers, list):
            raise ValueError(f"responses are a list, not {str(answers)[:80]}")
        return [self._answer(prompt, {"text": answer} if isinstance(answer, str) else answer) for answer in answers]

    def _answer(self, prompt: int, answer: dict) -> tuple[int, str, list[float] | None]:
        if (
            not isinstance(answer, dict)
            or not isinstance(answer.get("text"), str)
            or not isinstance(answer.get("model", ""), str)
        ):
            raise ValueError("a response is a text or has text and model")
        scores = answer.get("scores")
        if scores is not None and not (isinstance(scores, list) and all(type(x) in (int, float) for x in scores)):
            raise ValueError(f"scores are a list of numbers, one per member of an ensemble, not {str(scores)[:80]}")
        about = None if scores is None else {"scores": scores}
        model = self.add_model(answer.get("model", "unknown"))
        return self.add_completion(prompt, model, answer["text"], about), answer["text"], scores

    # the parts of a transaction

    def _new(self, db, rater_id: int) -> int | None:
        pair = db.execute(
            f"SELECT id, a_id, b_id {NEW} ORDER BY priority DESC, id LIMIT 1", (rater_id, time.time() - OPEN_SECONDS)
        ).fetchone()
        if pair is None:
            return None
        sides = self._sides(pair["id"], pair["a_id"], pair["b_id"], rater_id)
        return self._insert_comparison(db, pair["id"], rater_id, *sides, None)

    def _repeat(self, db, rater_id: int) -> int | None:
        seen = db.execute("SELECT count(*) AS n FROM comparison WHERE rater_id = ?", (rater_id,)).fetchone()["n"]
        if self._draw("repeat", rater_id, seen) >= self.repeats:
            return None
        old = db.execute(
            "SELECT comparison_id, pair_id, left_id, right_id FROM standing s WHERE rater_id = ? AND repeat_of IS NULL "
            "AND choice <> 'skip' AND NOT EXISTS (SELECT 1 FROM comparison r WHERE r.repeat_of = s.comparison_id) "
            "AND comparison_id <= (SELECT id FROM comparison WHERE rater_id = ? ORDER BY id DESC LIMIT 1 OFFSET ?) "
            "ORDER BY comparison_id LIMIT 1",
            (rater_id, rater_id, REPEAT_DISTANCE),
        ).fetchone()
        if old is None:
            return None
        return self._insert_comparison(
            db, old["pair_id"], rater_id, old["right_id"], old["left_id"], old["comparison_id"]
        )

    def _insert_comparison(self, db, pair: int, rater_id: int, left: int, right: int, repeat_of: int | None) -> int:
        return db.execute(
            "INSERT INTO comparison(pair_id, rater_id, left_id, right_id, repeat_of, created) VALUES (?, ?, ?, ?, ?, ?)",
            (pair, rater_id, left, right, repeat_of, time.time()),
        ).lastrowid

    def _sides(self, pair: int, a: int, b: int, rater_id: int) -> tuple[int, int]:
        return (a, b) if self._draw("side", pair, rater_id) < 0.5 else (b, a)

    def _draw(self, *what) -> float:
        """A number in [0, 1) that depends on the store's seed and on `what` alone: the same in every process."""
        digest = hashlib.sha256("/".join(map(str, (self.seed, *what))).encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    def _show(self, db, comparison: int) -> Comparison:
        row = db.execute(
            "SELECT c.id, p.content, l.text, r.text FROM comparison c JOIN completion l ON l.id = c.left_id "
            "JOIN completion r ON r.id = c.right_id JOIN prompt p ON p.id = l.prompt_id WHERE c.id = ?",
            (comparison,),
        ).fetchone()
        return Comparison(row[0], json.loads(row[1]), row[2], row[3])

    def _completion(self, db, completion: int) -> sqlite3.Row:
        row = db.execute("SELECT prompt_id, text FROM completion WHERE id = ?", (completion,)).fetchone()
        if row is None:
            raise Unknown(f"no completion {completion}")
        return row

    def _own(self, db, comparison: int, rater_id: int) -> None:
        row = db.execute("SELECT rater_id FROM comparison WHERE id = ?", (comparison,)).fetchone()
        if row is None or row["rater_id"] != rater_id:
            raise Unknown(f"no comparison {comparison} of this rater")

    def _last(self, db, comparison: int) -> sqlite3.Row | None:
        sql = "SELECT id, choice FROM vote v WHERE comparison_id = ? AND NOT EXISTS "
        sql += "(SELECT 1 FROM vote w WHERE w.supersedes = v.id)"
        return db.execute(sql, (comparison,)).fetchone()

    def _rater(self, name: str) -> int:
        rows = self._read("SELECT id FROM rater WHERE name = ?", name)
        return rows[0]["id"] if rows else self.add_rater(name)

    def _find_or_insert(self, table: str, unique: dict, more: dict | None = None) -> int:
        row = unique | (more or {}) | {"created": time.time()}
        marks = ", ".join("?" * len(row))
        with self.transaction() as db:
            where = " AND ".join(f"{name} = ?" for name in unique)
            found = db.execute(f"SELECT id FROM {table} WHERE {where}", tuple(unique.values())).fetchone()
            if found:
                return found["id"]
            sql = f"INSERT INTO {table}({', '.join(row)}) VALUES ({marks})"
            return db.execute(sql, tuple(row.values())).lastrowid

    def _read(self, sql: str, *values) -> list[sqlite3.Row]:
        with self._errors():
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction, alone on the file; on disk when the block is left, or not at all. Those inside join it.

        Around many calls it makes one wait for the disk of all of them; an id counts only once the block is left.
        """
        with self._errors():
            if self._db.in_transaction:  # of this thread: the others wait for the lock
                yield self._db
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.OperationalError as error:
                raise Unavailable(f"{self.path}: {error}") from error
            except (sqlite3.Error, OverflowError) as error:  # an id of more than 63 bits
                raise ValueError(f"{self.path}: {error}") from error


def _statements(sql: str) -> Iterator[str]:
    """The statements of a script, one by one: executescript would commit before it begins."""
    statement = ""
    for line in sql.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
