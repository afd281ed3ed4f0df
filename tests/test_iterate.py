"""The loop of rounds: with a simulated rater, with people, stopped at any point, refused promotions."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from test_bad_input import refused
from tiny import SMALL, lines

import iterate
from data.examples import Examples
from data.loader import pad
from data.tokenizer import load_tokenizer
from rlhf.feedback.store import Comparison, FeedbackStore
from rlhf.infra.files import write_lines

OURS = ("init", "data", "out", "reward", "base", "tuned", "sources", "response_tokens", "prompt_tokens", "judge")


def passed_on(script: str, **changes) -> str:
    """The small options of a script as iterate.py passes them on, in one text."""
    return " ".join(f"--{k}={v}" for k, v in (SMALL[script] | changes).items() if k not in OURS)


LOOP = {
    "init": "lm", "data": "data", "out": "rounds", "rounds": 2, "pairs": 40, "response_tokens": 8, "sources": "",
    "rater": "rewards.py:shorter", "rater_noise": 0, "judge": "rewards.py:shorter", "seed": 3,
    "rm": passed_on("train_rm.py"), "refine": "--preference_coef=0.5",
    "ppo": passed_on("train_ppo.py", iterations=2, weak_reward="true"),
    "evaluate": passed_on("evaluate.py", prompts=12, best_of=1, human_texts=8),
}  # fmt: skip


def loop(**changes) -> list[str]:
    options = {name: value for name, value in (LOOP | changes).items() if value is not None}
    return ["iterate.py", *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture(scope="module")
def finished(world):
    """Two rounds, by the real commands; what they printed."""
    done = world.spawn(loop())
    assert done.code == 0, done
    return world.path / "rounds", done.out


def votes_of(out) -> list[tuple]:
    """Everything about the votes that count but the clock."""
    store = FeedbackStore(out / "feedback.sqlite")
    try:
        return [tuple(j) for j in store.judgements()]
    finally:
        store.close()


@pytest.mark.slow
def test_two_rounds(finished):
    """Every number of the page is the number of the stage that measured it, and the simulated rater did as it says."""
    out, said = finished
    page = json.loads((out / "rounds.json").read_text())
    table = (out / "rounds.md").read_text()
    assert "SIMULATED by rewards.py:shorter" in table and page["rater"] in table and said.endswith(table + "\n")
    sampled_from = "lm"
    for k, row in enumerate(page["rounds"], 1):
        here = out / f"round_{k}"
        assert row["round"] == k and row["sampled_from"] == sampled_from
        summary = json.loads((here / "evaluation/summary.json").read_text())
        new = "tuned" if sampled_from == "lm" else f"rounds/round_{k}/ppo"
        gain = next(x["judge_gain"] for x in summary["pairwise"] if x["a"] == new and x["b"] in ("base", sampled_from))
        if sampled_from != "lm":
            gain = next(x["judge_gain"] for x in summary["pairwise"] if (x["a"], x["b"]) == (new, sampled_from))
        assert row["gain_over_previous"] == gain and row["judge"] == summary["rows"][new]["judge"]
        assert row["promoted"] == (gain["low"] > 0)
        sampled_from = row["policy"] if row["promoted"] else sampled_from
        preferences = lines(here / "preferences.jsonl")
        assert all(len(p["chosen"]) <= len(p["rejected"]) for p in preferences)  # this rater likes what is shorter
        assert {kind for p in preferences for kind in p["rater_kinds"]} == {"model"}
        votes = json.loads((here / "rm/report.json").read_text())["preferences"]
        assert votes["trained_on"] + votes["pairs"] < row["votes"] == len(preferences) <= 40 * k
    assert len(lines(out / "round_2/preferences.jsonl")) > len(lines(out / "round_1/preferences.jsonl"))  # old and new
    prompts = [{row["prompt"] for row in lines(out / f"round_{k}/pairs.jsonl")} for k in (1, 2)]
    assert not prompts[0] & prompts[1]


@pytest.mark.slow
def test_killed_at_any_point(world, finished):
    """SIGKILL to everything it started, again and again, at other points each time: the same rounds in the end."""
    out, _ = finished
    command, again = loop(out="killed"), world.path / "killed"
    kills = 0
    for seconds in (3, 5, 7, 9, 12, 15, 18, 600):
        process = world.popen(command)
        try:
            process.communicate(timeout=seconds)
        except Exception:  # still running
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        if (again / "round_2/round.json").exists() and process.returncode == 0:
            break
    assert process.returncode == 0 and kills >= 3
    assert votes_of(again) == votes_of(out)
    for k in (1, 2):
        ours, theirs = (json.loads((run / f"round_{k}/round.json").read_text()) for run in (again, out))
        for row in (ours, theirs):
            row.pop("seconds")
        assert json.loads(json.dumps(ours).replace("killed/", "rounds/")) == theirs


PEOPLE = {"out": "people", "rater": "people", "rater_noise": None, "rounds": 1, "pairs": 30}
PEOPLE["ppo"] = passed_on("train_ppo.py", iterations=1, weak_reward="true", lr=0)  # nothing is learned: a draw


@pytest.fixture(scope="module")
def asked(world):
    """A loop that waits for people; what it printed."""
    done = world.spawn(loop(**PEOPLE))
    assert done.code == 0, done
    return done.out


@pytest.mark.slow
def test_people_vote_and_the_loop_goes_on(world, asked):
    """It stops where votes are missing and says how to give them; after the last one it goes on, and refuses a draw."""
    missing = int(re.search(r"round 1: (\d+) votes are missing", asked)[1])
    assert 0 < missing <= 30 and "--feedback=people/feedback.sqlite" in asked
    store = FeedbackStore(world.path / "people/feedback.sqlite")
    assert store.missing_votes() == missing
    while shown := store.next_comparison("ana"):
        store.vote(shown.id, "ana", "left", nonce=f"vote on {shown.id}")
    assert store.missing_votes() == 0
    store.close()
    done = world.spawn(loop(**PEOPLE))
    assert done.code == 0 and "| refused |" in done.out and "Votes by: people" in done.out, done
    (row,) = json.loads((world.path / "people/rounds.json").read_text())["rounds"]
    assert row["gain_over_previous"]["mean"] == 0 and not row["promoted"]
    preferences = lines(world.path / "people/round_1/preferences.jsonl")
    assert row["votes"] == len(preferences) <= missing and preferences[0]["rater_kinds"] == ["human"]


@pytest.mark.slow
def test_active_pairs_are_those_where_the_heads_disagree(world):
    """Before any vote: the pairs that are put before people are the pool's most disputed, by a second computation."""
    changes = {"out": "active", "order": "active", "pool": 3, "pairs": 10, "rater": "people", "rater_noise": None}
    done = world.spawn(loop(**changes, rm=passed_on("train_rm.py", members=3)))
    assert done.code == 0 and "votes are missing" in done.out, done
    active = lines(world.path / "active/round_1/pairs.jsonl")
    done = world.spawn(loop(**changes | {"order": "random", "pool": 1, "pairs": 30, "out": "all"}))
    assert done.code == 0, done
    everything = lines(world.path / "all/round_1/pairs.jsonl")
    assert 0 < len(active) <= 10 < len(everything)
    assert {row["prompt"] for row in active} < {row["prompt"] for row in everything}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"pool": 2}, ("--order=random", "--pool=2")),
        ({"order": "active"}, ("--order=active", "--pool=1")),
        ({"raters": 2}, ("--raters=2", "simulated")),
        ({"rater": "people"}, ("--rater_noise", "people")),
        ({"rm": "--out=elsewhere"}, ("--rm", "--out", "itself")),
        ({"refine": "--preferences=elsewhere"}, ("--refine", "--preferences", "itself")),
        ({"ppo": "--reward elsewhere"}, ("--ppo", "--reward", "itself")),
        ({"out": "wrong", "rm": "--epoch=1"}, ("round 0, reward model ended with 2",)),
    ],
    ids=str,
)
def test_what_it_refuses(world, changes, words):
    done = world.start(loop(**changes)).wait()
    if "wrong" in changes.values():
        assert done.code == 2 and "did you mean" in done.err and words[0] in done.err
    else:
        refused(done, *words)


@pytest.mark.slow
def test_what_a_begun_loop_refuses(world, asked):
    refused(world.start(loop(**PEOPLE | {"seed": 4})).wait(), "begun with seed=3", "seed=4")
    (world.path / "many/round_0").mkdir(parents=True)
    shutil.copytree(world.path / "people/round_0/rm", world.path / "many/round_0/rm")
    refused(world.start(loop(**PEOPLE | {"pairs": 5000, "out": "many"})).wait(), "different prompts", "--pairs")


@pytest.mark.slow
def test_one_loop_at_a_time(world):
    process = world.popen(loop(out="twice"))
    while not (world.path / "twice/round_0/rm/run.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    refused(world.start(loop(out="twice")).wait(), "twice is held", "still running")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_missing_votes(tmp_path):
    """By the definition, over two raters, ties, skips, undone votes and repetitions."""
    store = FeedbackStore(tmp_path / "votes.sqlite", repeats=0)
    prompt, model = store.add_prompt("p"), store.add_model("m")
    texts = [store.add_completion(prompt, model, text) for text in "abcd"]
    store.make_comparisons([(texts[0], texts[1]), (texts[2], texts[3])], raters=2)
    assert store.missing_votes() == 4
    for name in ("ana", "ben"):
        store.add_rater(name)
        shown = store.next_comparison(name)
        vote = store.vote(shown.id, name, "skip", nonce=f"vote of {name}")
    assert store.missing_votes() == 2
    store.undo(vote, "ben")
    assert store.missing_votes() == 3


@pytest.mark.parametrize("name", ["data", "bytes"])
def test_prompt_and_answer_join_to_the_sampled_text(world, name):
    """Wherever the prompt ends: before a space, within a word, within a character."""
    tokenizer = load_tokenizer(world.path / "data") if name == "data" else Bytes()
    ids = [tokenizer.start, *tokenizer.encode("a good film — naïve ☃ but long")]
    for cut in range(1, len(ids)):
        other = [*ids[:cut], *tokenizer.encode("x")]
        tokens, lengths = pad([np.array(ids), np.array(other)], tokenizer.pad)
        mask = (torch.arange(tokens.shape[1]) >= cut) & (torch.arange(tokens.shape[1]) < lengths[:, None])
        prompt, *answers = iterate.as_texts(tokenizer, None, tokens, lengths, mask)
        assert [prompt + answer for answer in answers] == [tokenizer.decode(ids), tokenizer.decode(other)]


def test_a_function_rates_prompt_and_answer_apart(world, tmp_path):
    """As in PPO; and a rater whose path is longer than a name may be is called by the end of it."""
    place = tmp_path / ("long " * 30) / "reward.py"
    place.parent.mkdir()
    place.write_text(
        "def f(prompts, responses):\n"
        f"    with open({str(tmp_path / 'seen')!r}, 'a') as file:\n"
        "        file.writelines(repr(pair) + '\\n' for pair in zip(prompts, responses))\n"
        "    return [len(response) for response in responses]\n"
    )
    cfg = iterate.Config(init=str(world.path / "lm"), rater=f"{place}:f", rater_noise=0, out=str(tmp_path))
    store = FeedbackStore(tmp_path / "votes.sqlite", repeats=0)
    model, asked = store.add_model("m"), set()
    for prompt, *answers in (("The film", " was long", " bad"), ("caf\u00e9 ", "is\n 2\u00bd", "\u2603")):
        store.make_comparison(*(store.add_completion(store.add_prompt(prompt), model, text) for text in answers))
        asked |= {(prompt, answer) for answer in answers}
    iterate.simulate(cfg, store)
    assert {ast.literal_eval(line) for line in (tmp_path / "seen").read_text().split("\n")[:-1]} == asked
    (rater,) = store.statistics()["by_rater"]
    assert rater.endswith("reward.py:f") and len(rater) == 100 and store.missing_votes() == 0
    assert {(row["wins"], row["of"]) for row in store.wins()} == set()  # one model
    store.export_jsonl(tmp_path / "out.jsonl")
    assert [row["chosen"] for row in lines(tmp_path / "out.jsonl")] == [" was long", "is\n 2\u00bd"]
    store.close()


def test_a_rater_reads_the_tokens_that_are_learnt_from(world, tmp_path):
    """Those that data.prepare makes of the vote."""
    shown = Comparison(1, "The film", " was long", " bad")
    tokens, lengths, mask = iterate.rows_to_rate(load_tokenizer(world.path / "data"), shown, as_texts=False)
    vote = {"prompt": "The film", "chosen": shown.left, "rejected": shown.right}
    rows = [vote, *({"prompt": f"Film {i}", "chosen": " a", "rejected": " b"} for i in range(20))]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["data.prepare", str(tmp_path / "votes.jsonl"), "--tokenizer=data", f"--out={tmp_path / 'data'}"]
    assert world.start(command).wait().code == 0
    splits = [Examples(tmp_path / "data" / name) for name in ("train", "validation", "test")]
    (found,) = [(x, i) for x in splits for i in range(x.prompts) if x.record(i).prompt == "The film"]
    data, prompt = found
    answers = np.flatnonzero(data.prompt_of(np.arange(data.answers)) == prompt)
    assert [data.record(prompt).answers[i] for i in range(2)] == [shown.left, shown.right]
    for row, n, m, answer in zip(tokens, lengths, mask, answers):
        assert row[:n].tolist() == data.row(answer).tolist()
        assert int(m.sum()) == len(data.answer(answer)) and m[: n - int(m.sum())].sum() == 0


@pytest.mark.parametrize("spec", ["out/rm", "x" * 500, "a\tb\x1b.py:f", " padded ", "x" * 86, "x" * 87])
def test_every_rater_has_a_name_that_the_store_takes(tmp_path, spec):
    store = FeedbackStore(tmp_path / "votes.sqlite")
    store.add_rater(iterate.rater_name(spec), "model")
    store.close()


class Bytes:
    """A token is a byte, so a prompt may end within a character."""

    start, pad = 256, 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def test_votes_are_prepared_where_somebody_elses_data_lies(world, tmp_path):
    (tmp_path / "data.py").write_text("raise SystemExit('mine')")
    rows = [{"prompt": "the film", "chosen": f" is good {i}", "rejected": " is bad"} for i in range(9)]
    here = tmp_path / "round_1"
    write_lines(here / "preferences.jsonl", rows)
    command = iterate.votes_command(iterate.Config(data=str(world.path / "data")), here)
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and (here / "data" / "manifest.json").exists(), done
