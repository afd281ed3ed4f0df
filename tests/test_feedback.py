"""The store of votes: what it refuses, what a rater sees, what comes out, and that nothing acknowledged is ever lost."""

import json
import math
import os
import random
import selectors
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from terminal import terminal
from tiny import ROOT

from data.containers import rows
from data.encoding import Encoder
from data.loader import pad
from data.records import Record
from data.tokenizer import load_tokenizer
from rlhf.feedback.__main__ import page
from rlhf.feedback.preferences import disagreement, majority, preference_rows
from rlhf.feedback.raters import Judgement
from rlhf.feedback.store import FeedbackStore, Unknown
from rlhf.reward.files import load_reward_model


def filled(path: Path, pairs: int = 4, raters: int = 1, **options) -> FeedbackStore:
    """A store with one pair a prompt: "bad i" by the model base, "good i" by tuned."""
    store = FeedbackStore(path, **options)
    with store.transaction():
        base, tuned = store.add_model("base"), store.add_model("tuned")
        for i in range(pairs):
            prompt = store.add_prompt(f"prompt {i}")
            a, b = store.add_completion(prompt, base, f" bad {i}"), store.add_completion(prompt, tuned, f" good {i}")
            store.make_comparison(a, b, raters)
    return store


def prefer_good(store: FeedbackStore, rater: str, most: int = 10**6) -> list[int]:
    """Votes of a rater who always prefers "good"; their ids."""
    votes = []
    while len(votes) < most and (shown := store.next_comparison(rater)):
        side = "left" if "good" in shown.left else "right"
        votes.append(store.vote(shown.id, rater, side, seconds=2.0, nonce=f"{rater} {shown.id:08}"))
    return votes


@pytest.fixture
def store(tmp_path):
    return filled(tmp_path / "s.sqlite")


# ---- what a rater sees


def test_a_comparison_stays_until_it_is_judged_and_comes_once(store):
    seen = []
    while shown := store.next_comparison("ana"):
        assert store.next_comparison("ana") == shown
        seen.append(shown.prompt)
        store.vote(shown.id, "ana", "tie", nonce=f"nonce {shown.id:08}")
    assert sorted(seen) == [f"prompt {i}" for i in range(4)]
    assert store.next_comparison("ben") is None  # one rater a pair was asked for


def test_a_pair_goes_to_as_many_raters_as_asked_for(tmp_path):
    store = filled(tmp_path / "s.sqlite", pairs=3, raters=2, repeats=0)
    assert [len(prefer_good(store, name)) for name in ("ana", "ben", "cleo")] == [3, 3, 0]


def test_a_skipped_pair_goes_to_another_rater(store):
    skipped = store.next_comparison("ana")
    store.vote(skipped.id, "ana", "skip", nonce="nonce 123")
    assert store.next_comparison("ana").prompt != skipped.prompt
    assert store.next_comparison("ben").prompt == skipped.prompt


def test_what_lies_before_one_rater_is_not_given_to_another(store):
    names = ["ana", "ben", "cleo", "dan"]
    assert len({store.next_comparison(name).prompt for name in names}) == 4 and store.next_comparison("eve") is None


def test_sides_come_from_the_seed(tmp_path):
    """Half of the good answers stand on the left; the same seed gives the same sides, another one other sides."""

    def sides(name, seed):
        store, found = filled(tmp_path / name, 60, seed=seed, repeats=0), []
        with store.transaction():
            while shown := store.next_comparison("ana"):
                found.append("good" in shown.left)
                store.vote(shown.id, "ana", "tie", nonce=f"nonce {shown.id:08}")
        return found

    first = sides("a", 1)
    assert first == sides("b", 1) and first != sides("c", 2) and 15 < sum(first) < 45


def test_repetitions_are_swapped_and_measure_consistency(tmp_path):
    store = filled(tmp_path / "s.sqlite", 40, repeats=0.3)
    with store.transaction():
        prefer_good(store, "ana")
        while shown := store.next_comparison("ana"):
            raise AssertionError(shown)
    judgements = store.judgements()
    again = {j.pair: j for j in judgements if j.repeat}
    first = {j.pair: j for j in judgements if not j.repeat}
    assert len(first) == 40 and 4 <= len(again) <= 25
    assert all(first[pair].a_left != j.a_left for pair, j in again.items())
    assert store.statistics()["self_consistency"]["share"] == 1
    assert len(preference_rows(records(store))[0]) == 40  # a repetition is no second voice


def records(store: FeedbackStore) -> list[dict]:
    from rlhf.feedback.schema import VOTES

    return [dict(row) for row in store._read(VOTES)]


def test_higher_priority_comes_first(tmp_path):
    store = FeedbackStore(tmp_path / "s.sqlite")
    model, pairs = store.add_model("m"), []
    for i in range(4):
        prompt = store.add_prompt(f"prompt {i}")
        pairs.append((store.add_completion(prompt, model, "x"), store.add_completion(prompt, model, "y")))
    assert store.make_comparisons(pairs, priorities=[0.1, 0.9, 0.5, 0.9]) == 4
    assert store.make_comparisons(pairs) == 0  # known
    order = []
    while shown := store.next_comparison("ana"):
        order.append(shown.prompt[-1])
        store.vote(shown.id, "ana", "tie", nonce=f"nonce {shown.id:08}")
    assert order == ["1", "3", "2", "0"]


# ---- votes


def test_a_retry_changes_nothing_and_undo_opens_the_comparison(store):
    shown = store.next_comparison("ana")
    vote = store.vote(shown.id, "ana", "left", 2, 1.5, "one nonce")
    assert store.vote(shown.id, "ana", "left", 2, 1.5, "one nonce") == vote
    assert store.statistics()["votes"] == 1 and store.last_vote("ana") == (vote, shown.id, "left")
    store.undo(vote, "ana")
    store.undo(vote, "ana")
    assert store.statistics()["votes"] == 0 and store.last_vote("ana") is None
    assert store.next_comparison("ana") == shown
    again = store.vote(shown.id, "ana", "right", nonce="two nonces")
    store.undo(vote, "ana")  # a late retry of the first undo
    assert store.last_vote("ana") == (again, shown.id, "right")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"choice": "undone"}, "choice 'undone' is none of"),
        ({"strength": 4}, "strength 4 with choice left"),
        ({"strength": True, "choice": "tie"}, "only for left or right"),
        ({"seconds": -1.0}, "seconds -1.0 must"),
        ({"seconds": math.nan}, "seconds nan must"),
        ({"nonce": ""}, "nonce must be a text"),
        ({"rater": ""}, "rater name '' must"),
        ({"rater": "a\nb"}, "must have 1 to 100 printable"),
        ({"rater": "ben"}, "no comparison .* of this rater"),
        ({"comparison": 99}, "no comparison 99 of this rater"),
        ({"comparison": 10**30}, "too large"),
        ({"seconds": "2"}, "seconds '2' must"),
    ],
)
def test_a_bad_vote_is_refused(store, change, message):
    shown = store.next_comparison("ana")
    good = {"comparison": shown.id, "rater": "ana", "choice": "left", "nonce": "one nonce"}
    with pytest.raises(ValueError, match=message):
        store.vote(**(good | change))
    assert store.statistics()["votes"] == 0
    store.vote(**good)
    with pytest.raises(ValueError, match="has a vote already"):
        store.vote(**(good | {"nonce": "two nonces"}))
    with pytest.raises(ValueError, match="belongs to another vote"):
        store.vote(**(good | {"choice": "right"}))


def test_only_the_rater_can_undo(store):
    vote = store.vote(store.next_comparison("ana").id, "ana", "left", nonce="one nonce")
    for number, rater in ((vote, "ben"), (vote + 7, "ana")):
        with pytest.raises(Unknown):
            store.undo(number, rater)
    assert store.statistics()["votes"] == 1


def test_append_only(store):
    prefer_good(store, "ana")
    store.rate(1, "ana", 3, 1, 5, "rating 1")
    db = sqlite3.connect(store.path)
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    assert len(tables) == 9
    for table in tables:
        column = "name" if table == "setting" else "id"
        for sql in (f"UPDATE {table} SET {column} = {column}", f"DELETE FROM {table}"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                db.execute(sql)


def test_the_database_itself_refuses_a_second_vote(store):
    """Whoever writes to the file past this class: a comparison has one chain of votes, each superseding the one before."""
    prefer_good(store, "ana")
    db = sqlite3.connect(store.path)
    for supersedes in ("NULL", "1"):
        sql = f"INSERT INTO vote(comparison_id, choice, nonce, supersedes, created) VALUES (1, 'left', ?, {supersedes}, 0)"
        if supersedes == "1":
            db.execute(sql, ("nonce a",))
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            db.execute(sql, ("nonce b",))


def test_answers_that_a_page_shows_are_voted_on_as_they_lie(tmp_path):
    store = FeedbackStore(tmp_path / "votes.sqlite")
    asked = [{"role": "user", "content": "Name a fruit."}]
    base, tuned = ("lm", "Brick.", {"seed": 1}), ("ppo", "Pear.", {"seed": 1})
    shown = store.lay_before("ana", asked, base, tuned)
    assert store.lay_before("ana", asked, base, tuned) == shown == store.next_comparison("ana").id
    with pytest.raises(ValueError, match="open under Compare"):
        store.lay_before("ana", asked, tuned, base)
    store.vote(shown, "ana", "right", nonce="12345678")
    with pytest.raises(ValueError, match="has judged"):
        store.lay_before("ana", asked, base, tuned)
    with pytest.raises(ValueError, match="same text"):
        store.lay_before("ana", asked, base, ("ppo", "Brick.", {}))
    assert store.next_comparison("ben") is None  # nobody else is asked
    left_out = store.lay_before("ana", asked, base, ("ppo", "Plum.", {}))
    assert store.next_comparison("ben") is None
    store.vote(left_out, "ana", "skip", nonce="23456789")
    assert store.next_comparison("ben").right in ("Brick.", "Plum.")  # unless she skips them
    assert store.export_jsonl(tmp_path / "votes.jsonl")["written"] == 1
    (row,) = map(json.loads, (tmp_path / "votes.jsonl").read_text().splitlines())
    assert (row["prompt"], row["chosen_model"], row["rejected_model"]) == (asked, "ppo", "lm")


def test_ratings(store, tmp_path):
    rating = store.rate(1, "ana", 4, 1, 5, "rating 1")
    assert store.rate(1, "ana", 4, 1, 5, "rating 1") == rating
    with pytest.raises(ValueError, match="CHECK"):
        store.rate(1, "ana", 6, 1, 5, "rating 2")
    assert store.export_jsonl(tmp_path / "r.jsonl", "ratings") == {"written": 1}
    (row,) = read(tmp_path / "r.jsonl")
    assert row == {
        "prompt": "prompt 0", "response": " bad 0", "score": 4, "low": 1, "high": 5, "rater": "ana", "kind": "human",
        "model": "base",
    }  # fmt: skip


def test_kinds_of_raters_do_not_mix(store):
    store.add_rater("simulated", "model")
    with pytest.raises(ValueError, match="known as model, not as human"):
        store.add_rater("simulated")
    prefer_good(store, "simulated")
    assert {row["kind"] for row in records(store)} == {"model"}


def test_pairs_that_cannot_be_compared(store):
    model = store.add_model("base")
    one, two = store.add_prompt("p"), store.add_prompt("q")
    a, b = store.add_completion(one, model, "x"), store.add_completion(two, model, "y")
    twin = store.add_completion(one, store.add_model("tuned"), "x")
    with pytest.raises(ValueError, match="answer different prompts"):
        store.make_comparison(a, b)
    assert not store.make_comparison(a, twin)  # the same text
    with pytest.raises(Unknown):
        store.make_comparison(a, 999)


def test_files_that_are_no_store(tmp_path):
    (tmp_path / "text").write_text("hello, this is no database, whatever its name says\n" * 10)
    with pytest.raises(ValueError, match="not a database"):
        FeedbackStore(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE t(x)")
    other.close()
    with pytest.raises(ValueError, match="no feedback store of format 1"):
        FeedbackStore(tmp_path / "other")
    filled(tmp_path / "s", seed=3).close()
    with pytest.raises(ValueError, match="made with seed 3, not 4"):
        FeedbackStore(tmp_path / "s", seed=4)
    assert FeedbackStore(tmp_path / "s").seed == 3


def test_threads_share_a_store(tmp_path):
    store = filled(tmp_path / "s.sqlite", 40, repeats=0)
    threads = [threading.Thread(target=prefer_good, args=(store, f"r{i}")) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.statistics()["votes"] == 40


# ---- export and import


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_export_is_what_trl_reads(store, tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    prompt, model = store.add_prompt(chat), store.add_model("base")
    store.make_comparison(store.add_completion(prompt, model, "bad"), store.add_completion(prompt, model, "good"))
    prefer_good(store, "ana")
    counts = store.export_jsonl(tmp_path / "p.jsonl")
    assert counts == {"written": 5, "tie": 0, "both_bad": 0, "skip": 0, "split": 0}
    rows = {str(row["prompt"]): row for row in read(tmp_path / "p.jsonl")}
    assert rows["prompt 2"] | {"prompt": "prompt 2", "chosen": " good 2", "rejected": " bad 2"} == rows["prompt 2"]
    assert (rows["prompt 2"]["chosen_model"], rows["prompt 2"]["rejected_model"]) == ("tuned", "base")
    assert rows[str(chat)]["prompt"] == chat
    assert rows[str(chat)]["chosen"] == [{"role": "assistant", "content": "good"}]


def test_import_of_an_export_is_the_same_export(store, tmp_path):
    prefer_good(store, "ana")
    store.export_jsonl(tmp_path / "one.jsonl")
    other = FeedbackStore(tmp_path / "other.sqlite", seed=5)
    assert other.import_jsonl(tmp_path / "one.jsonl")["votes"] == 4
    assert other.import_jsonl(tmp_path / "one.jsonl")["votes"] == 0
    other.export_jsonl(tmp_path / "two.jsonl")
    strip = ("rater_kinds",)
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in strip} for row in read(tmp_path / name)]
        for name in ("one.jsonl", "two.jsonl")
    )
    assert ours == theirs
    assert other.next_comparison("ana") is None


def test_active_import_asks_first_where_the_ensemble_disagrees(tmp_path):
    rows = [
        {"prompt": "agreed", "responses": [{"text": "x", "scores": [0, 0, 0]}, {"text": "y", "scores": [2, 2.1, 2]}]},
        {"prompt": "open", "responses": [{"text": "x", "scores": [0, 0, 0]}, {"text": "y", "scores": [2, -2, 0]}]},
        {"prompt": "half", "responses": [{"text": "x", "scores": [0, 0, 0]}, {"text": "y", "scores": [1, 0, 1]}]},
        {"prompt": "same", "responses": ["x", "x"]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    orders = {}
    for order in ("active", "random", "given"):
        store = FeedbackStore(tmp_path / f"{order}.sqlite")
        counts = store.import_jsonl(tmp_path / "in.jsonl", order=order, seed=1)
        assert counts == {"rows": 4, "votes": 0, "pairs": 3, "identical": 1}
        orders[order] = []
        while shown := store.next_comparison("ana"):
            orders[order].append(shown.prompt)
            store.vote(shown.id, "ana", "tie", nonce=f"nonce {shown.id:08}")
    assert orders["active"] == ["open", "half", "agreed"] and orders["given"] == ["agreed", "open", "half"]
    assert sorted(orders["random"]) == sorted(orders["given"])


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r"in.jsonl, line 2 is not JSON"),
        ("[1]", r"in.jsonl, line 2 has the keys none; known rows have prompt, chosen, rejected or prompt, responses"),
        ('{"prompt": "p", "chosen": "c"}', r"in.jsonl, line 2 has the keys chosen, prompt"),
        ('{"prompt": 3, "chosen": "c", "rejected": "r"}', "in.jsonl, line 2: a prompt is a text or a list of messages"),
        ('{"prompt": "p", "responses": "xy"}', "in.jsonl, line 2: responses are a list, not xy"),
        ('{"prompt": "p", "responses": null}', "in.jsonl, line 2: responses are a list"),
        (
            '{"prompt": "p", "responses": [{"text": "x", "scores": "12"}]}',
            "in.jsonl, line 2: scores are a list of numbers",
        ),
        ('{"prompt": "\\ud800", "responses": ["x", "y"]}', "in.jsonl, line 2 has half a surrogate pair"),
        (
            '{"prompt": "p", "chosen": "c", "rejected": [{"role": "user", "content": "r"}]}',
            "one message of the assistant",
        ),
        (
            '{"prompt": "p", "responses": ["x", {"model": "m"}]}',
            r"in.jsonl, line 2: a response is a text or has text and model",
        ),
    ],
)
def test_a_bad_line_is_named_and_nothing_of_the_file_is_taken(tmp_path, line, message):
    (tmp_path / "in.jsonl").write_text('{"prompt": "p", "responses": ["x", "y"]}\n' + line + "\n")
    store = FeedbackStore(tmp_path / "s.sqlite")
    with pytest.raises(ValueError, match=message):
        store.import_jsonl(tmp_path / "in.jsonl")
    assert store.statistics()["prompts"] == 0


verdicts = st.lists(st.sampled_from(["a", "b", "tie", "both_bad", "skip"]), min_size=1, max_size=6)


@settings(max_examples=30)
@given(st.lists(verdicts, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_every_pair_is_exported_or_counted(pairs, rng):
    """The rows and the reasons add up to the pairs; which side a rater saw on the left changes nothing."""
    votes = []
    for pair, given_verdicts in enumerate(pairs):
        for i, verdict in enumerate(given_verdicts):
            a_left = rng.random() < 0.5
            left, right = ("A", "B") if a_left else ("B", "A")
            choice = {"a": "left" if a_left else "right", "b": "right" if a_left else "left"}.get(verdict, verdict)
            assert Judgement(pair, "", a_left, choice, None, False).verdict == verdict
            votes.append(
                dict(pair=pair, rater=f"r{i}", kind="human", a_left=a_left, choice=choice, repeat=0, prompt='"p"',
                     left=left, right=right, left_model=left, right_model=right, strength=None)
            )  # fmt: skip
    rows, left_out = preference_rows(votes)
    assert len(rows) + sum(left_out.values()) == len(pairs)
    expected = [majority(v) for v in pairs]
    assert [row["chosen"].lower() for row in rows] == [v for v in expected if v in ("a", "b")]
    assert left_out == {name: expected.count(name) for name in ("tie", "both_bad", "skip", "split")}


def test_blank_answers_are_left_out_and_counted(tmp_path):
    """People saw that one of them has no text; a reward model could read neither, so data.prepare must not meet them."""
    store = FeedbackStore(tmp_path / "s.sqlite", repeats=0)
    model = store.add_model("m")
    for i, answers in enumerate((("good", "bad"), ("good", " \n"), ("", "bad"))):
        prompt = store.add_prompt(f"p{i}")
        store.make_comparison(*(store.add_completion(prompt, model, text) for text in answers))
    while shown := store.next_comparison("ana"):
        store.vote(shown.id, "ana", "left", nonce=f"vote on {shown.id}")
    assert store.export_jsonl(tmp_path / "out.jsonl")["blank"] == 2
    ((_, row),) = rows([tmp_path / "out.jsonl"])
    assert row["prompt"] == "p0"
    store.close()


@pytest.mark.parametrize("strength", [None, 1, 2, 3, 2.5, 4 / 3])
def test_strength_survives_import_and_export(tmp_path, strength):
    """Also the mean of several votes, which an export has."""
    row = {"prompt": "p", "chosen": "good", "rejected": "bad", "strength": strength}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    for name, file in (("one", "in"), ("two", "one")):
        store = FeedbackStore(tmp_path / f"{name}.sqlite")
        assert store.import_jsonl(tmp_path / f"{file}.jsonl")["votes"] == 1
        store.export_jsonl(tmp_path / f"{name}.jsonl")
        store.close()
        (again,) = read(tmp_path / f"{name}.jsonl")
        assert again["strength"] == strength and (again["chosen"], again["rejected"]) == ("good", "bad")


@pytest.mark.parametrize("strength", [0, 3.5, 200, "2", [1], float("nan")])
def test_a_strength_of_another_scale_is_refused(tmp_path, strength):
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"prompt": "p", "chosen": "a", "rejected": "b", "strength": strength})
    )
    store = FeedbackStore(tmp_path / "s.sqlite")
    with pytest.raises(ValueError, match=r"in.jsonl, line 1: strength .* from 1 to 3"):
        store.import_jsonl(tmp_path / "in.jsonl")
    assert store.statistics()["votes"] == 0
    store.close()


@pytest.mark.parametrize(
    "given_verdicts, expected",
    [("aab", "a"), ("ab", "split"), ("abt", "split"), ("aabb", "split"), ("ttb", "tie"), ("s", "skip"), ("sb", "b")],
)
def test_majority(given_verdicts, expected):
    assert majority([{"t": "tie", "s": "skip"}.get(v, v) for v in given_verdicts]) == expected


def test_disagreement():
    agree, open_ = disagreement(np.array([[2.0, 2.0], [5.0, -5.0]]), np.zeros((2, 2)))
    assert agree == 0 and open_ == pytest.approx((1 / (1 + math.exp(-5)) - 0.5) ** 2)
    with pytest.raises(ValueError, match="at least 2 members"):
        disagreement(np.zeros((3, 1)), np.zeros((3, 1)))


def test_progress_counts_to_the_end(tmp_path):
    """One more with every vote, one less with an undo; of pairs that one rater is to judge, others see none. Repetitions of
    earlier pairs come on top.
    """
    store = filled(tmp_path / "a.sqlite", 5, repeats=0)
    assert store.progress("ana") == store.progress("bo") == (0, 5)
    for done in range(5):
        assert store.progress("ana") == (done, 5)
        shown = store.next_comparison("ana")
        assert store.progress("ana") == (done, 5) and store.progress("bo") == (0, 4 - done)
        vote = store.vote(shown.id, "ana", "skip" if done == 4 else "tie", nonce=f"nonce {done:04}")
    assert store.next_comparison("ana") is None and store.progress("ana") == (5, 5)
    assert store.progress("bo") == (0, 1)  # the skipped one
    store.undo(vote, "ana")
    assert store.progress("ana") == (4, 5)
    store = filled(tmp_path / "b.sqlite", 12, repeats=0.9)
    prefer_good(store, "ana")
    done, total = store.progress("ana")
    assert done == total > 12


# ---- the terminal


def tool(tmp_path: Path, *options: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rlhf.feedback", f"--store={tmp_path / 's.sqlite'}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **kwargs)


@pytest.mark.slow
def test_the_terminal_tool_from_import_to_export(tmp_path):
    rows = [{"prompt": f"p{i}", "responses": [{"text": f"x{i}", "model": "m"}, f"y{i}\x1b[2J"]} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tool(tmp_path, "--action=import", f"--file={tmp_path / 'in.jsonl'}").returncode == 0
    voting = tool(tmp_path, "--rater=ana", input="a\nu\nB\n?t\ns\n")
    assert voting.returncode == 0 and "3 votes" in voting.stdout and "nothing is left" in voting.stdout
    assert "\x1b" not in voting.stdout and "\\x1b[2J" in voting.stdout
    assert "ana" in tool(tmp_path, "--action=statistics").stdout
    out = tmp_path / "out.jsonl"
    assert tool(tmp_path, "--action=export", f"--file={out}").returncode == 0
    (row,) = read(out)
    assert row["prompt"] == "p0" and row["strength"] == 3
    bad = tool(tmp_path, "--action=export")
    assert (bad.returncode, bad.stderr) == (2, "error: --file=PATH is required to export: JSON lines\n")
    bad = tool(tmp_path, "--rater=ana", "--raters=2")
    assert bad.returncode == 2 and "--raters has no effect with --action=vote" in bad.stderr


@pytest.mark.slow
def test_keys_need_no_enter_in_a_terminal(tmp_path):
    filled(tmp_path / "s.sqlite", 3).close()
    with terminal(["-m", "rlhf.feedback", f"--store={tmp_path / 's.sqlite'}", "--rater=ana"], term="xterm") as screen:
        pages = []
        for key in (b"a", b"\x1b[C", b"u", b"t", b"s", b"q"):
            pages.append(screen.until("q: quit\n").removeprefix("\x1b[H\x1b[2J").splitlines()[0])
            screen.type(key)
        assert screen.end()[0] == 0
    places = ["1 of 3", "2 of 3   your last: left", "3 of 3   your last: right", "2 of 3   undone: right"]
    assert pages == [*places, "3 of 3   your last: tie", "your last: skip"]
    choices = [row["choice"] for row in records(FeedbackStore(tmp_path / "s.sqlite"))]
    assert choices == ["left", "tie", "skip"]


def test_a_text_cannot_send_control_sequences(store):
    from rlhf.feedback.store import Comparison

    text = page(Comparison(1, "p\x1b]0;title\x07", "a\nb", "\x9b2J\u202e"))
    assert all(c.isprintable() or c == "\n" for c in text)


# ---- the loop


def taste_of(world, path: Path, liked: str) -> float:
    """Train a reward model on 60 votes of a rater who likes one word; its score of " zebra" minus " film", never judged."""
    path.mkdir()
    store = FeedbackStore(path / "s.sqlite", repeats=0)
    with store.transaction():
        model = store.add_model("lm")
        for i in range(60):
            prompt = store.add_prompt(f"number {i} was")
            store.make_comparison(*(store.add_completion(prompt, model, f" {w} {i}") for w in ("zebra", "film")))
        while shown := store.next_comparison("ana"):
            side = "left" if liked in shown.left else "right"
            store.vote(shown.id, "ana", side, seconds=1, nonce=f"nonce {shown.id:08}")
    store.export_jsonl(path / "p.jsonl")
    command = ["data.prepare", str(path / "p.jsonl"), "--tokenizer=data", f"--out={path / 'data'}"]
    done = world.start(command).wait()
    assert (done.code, done.err) == (0, ""), done
    options = {"data": path / "data", "out": path / "rm", "objective": "pairs", "sources": "", "batch": 8}
    world.ok("train_rm.py", **options, epochs=30, lr=0.003, prompt_tokens=2)
    report = json.loads((path / "rm" / "report.json").read_text())
    assert report["accuracy"]["all"] == 1 and set(report["baselines"]) == {"bow", "length"}

    tokenizer = load_tokenizer(world.path / "data")
    reward_model = load_reward_model(str(path / "rm"), tokenizer.fingerprint)
    rows = [Record(f"something else, {i}: it was", (f" {word}",)) for word in ("zebra", "film") for i in range(10)]
    rows = [Encoder(tokenizer).encode(row) for row in rows]
    tokens, lengths = pad([np.append(row.prompt, row.answers[0]).astype(np.int64) for row in rows], tokenizer.pad)
    t, begins = torch.arange(tokens.shape[1]), torch.tensor([len(row.prompt) for row in rows])
    with torch.no_grad():
        mask = (t >= begins[:, None]) & (t < lengths[:, None])
        zebra, film = reward_model.score(tokens, lengths, mask).chunk(2)
    return float((zebra - film).mean())


@pytest.mark.slow
def test_votes_train_a_reward_model(world, tmp_path):
    """From votes to scores by the documented commands: opposite tastes, opposite scores on texts that nobody judged."""
    assert taste_of(world, tmp_path / "a", "zebra") > 0.5 and taste_of(world, tmp_path / "b", "film") < -0.5


# ---- crash


@pytest.mark.slow
def test_no_acknowledged_vote_is_lost_when_writers_are_killed(tmp_path):
    """8 raters x 1,000 votes, each writer killed again and again at random moments, while a reader exports.

    Every vote that a writer was told of is there exactly once, and no other: a writer repeats what it was not told of.
    """
    writers, votes, path = 8, 1000, tmp_path / "s.sqlite"
    filled(path, votes, writers, repeats=0).close()
    rng, selector, running = random.Random(0), selectors.DefaultSelector(), {}

    def start(rater: str) -> None:
        command = [
            sys.executable,
            ROOT / "tests/feedback_writer.py",
            path,
            rater,
            str(votes),
            tmp_path / f"{rater}.log",
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        running[rater] = process
        selector.register(process.stdout, selectors.EVENT_READ, rater)

    for i in range(writers):
        start(f"w{i}")
    reader, kills, exported = FeedbackStore(path), 0, 0
    while running:
        for key, _ in selector.select(timeout=60):
            rater, process = key.data, running[key.data]
            ended = not os.read(process.stdout.fileno(), 4096)
            if not ended and rng.random() < 0.02:  # the writer is somewhere in its next vote
                process.kill()
                kills, ended = kills + 1, True
            if ended:
                selector.unregister(process.stdout)
                process.stdout.close()
                del running[rater]
                if process.wait() != 0:
                    assert process.returncode == -9
                    start(rater)
        if rng.random() < 0.01:
            written = reader.export_jsonl(tmp_path / "export.jsonl", "votes")["written"]
            assert written >= exported and len(read(tmp_path / "export.jsonl")) == written
            exported = written

    acknowledged = Counter()
    for i in range(writers):
        for line in (tmp_path / f"w{i}.log").read_text().splitlines():
            if line.startswith("ack"):
                _, nonce, comparison, vote = line.split()
                acknowledged[int(vote), int(comparison), nonce] += 1
    assert len(acknowledged) == writers * votes and set(acknowledged.values()) == {1}
    stored = sqlite3.connect(path).execute("SELECT id, comparison_id, nonce FROM vote").fetchall()
    assert sorted(stored) == sorted(acknowledged)
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert reader.export_jsonl(tmp_path / "export.jsonl", "votes")["written"] == writers * votes
    assert kills > 20 and exported > 0
