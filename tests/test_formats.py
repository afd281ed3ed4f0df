"""The forms that people have, each with the Record it must become; what is wrong in a row is said, and nothing else lost."""

import gzip
import json
import re
from collections import Counter
from itertools import islice

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from data.containers import Bad, Piece, read, sniff
from data.formats import FORMS, KNOWN, Reader, reader_of, recognise
from data.records import Pair, Record, group_of
from rlhf.feedback.store import FeedbackStore


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def bot(text: str) -> dict:
    return {"role": "assistant", "content": text}


def of(row: dict, **options) -> Record:
    (record,) = reader_of([row], source="file", **options).records(row)[1]
    return record


def reason(row: dict, like: dict | None = None) -> str:
    with pytest.raises(ValueError) as error:
        reader_of([like or row]).records(row)
    assert "\n" not in str(error.value)
    return str(error.value)


HH = "\n\nHuman: Name a fruit.\n\nAssistant: Sure?\n\nHuman: Yes.\n\nAssistant:"
CHAT = [user("Hi"), bot("Yes?"), user("Name a fruit.")]
A, B = Pair(0, 1), Pair(1, 0)
ROWS = {  # form: (row, prompt, answers, pairs, scores), several of them
    "text": [({"text": "a\nb", "id": 7}, "", ["a\nb"], (), None)],
    "rated_text": [({"text": "a", "score": "3.5"}, "", ["a"], (), (3.5,))],
    "prompts": [
        ({"prompt": "2+2?", "answer": "4"}, "2+2?", [], (), None),
        ({"question": "2+2?", "answer": "4"}, "2+2?", [], (), None),
        ({"prompt": CHAT, "reward_model": {"ground_truth": "4"}}, CHAT, [], (), None),
    ],
    "completion": [
        ({"prompt": "The sky is", "completion": " blue."}, "The sky is", [" blue."], (), None),
        ({"prompt": CHAT, "completion": [bot("Pear.")]}, CHAT, ["Pear."], (), None),
        ({"prompt": "Hi", "response": [bot("Ho")]}, [user("Hi")], ["Ho"], (), None),
    ],
    "alpaca": [
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, "Add.\n\n2, 2\n\n", ["4"], (), None),
        ({"instruction": "Sing.", "input": "", "output": "La"}, "Sing.\n\n", ["La"], (), None),
        ({"instruction": "Sing.", "input": None, "output": "La"}, "Sing.\n\n", ["La"], (), None),
        ({"instruction": "Add.", "context": "2, 2", "response": "4"}, "Add.\n\n2, 2\n\n", ["4"], (), None),
        (
            {"system": "Be brief.", "instruction": "Sing.", "input": "", "output": "La", "history": [["Hi", "Ho"]]},
            [{"role": "system", "content": "Be brief."}, user("Hi"), bot("Ho"), user("Sing.")],
            ["La"],
            (),
            None,
        ),
    ],
    "messages": [
        ({"messages": [*CHAT, bot("Pear.")]}, CHAT, ["Pear."], (), None),
        ({"messages": json.dumps([*CHAT, bot("Pear.")])}, CHAT, ["Pear."], (), None),  # in a table
        (
            {"messages": [user("Hi"), {"role": "assistant", "content": [{"type": "text", "text": "Ho"}]}]},
            [user("Hi")],
            ["Ho"],
            (),
            None,
        ),
    ],
    "sharegpt": [
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "S"},
            [{"role": "system", "content": "S"}, user("Hi")],
            ["Ho"],
            (),
            None,
        )
    ],
    "sharegpt_pairs": [
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Ho"},
                "rejected": {"from": "gpt", "value": "No"},
            },
            [user("Hi")],
            ["Ho", "No"],
            (A,),
            None,
        )
    ],
    "preference": [
        ({"prompt": "Is", "chosen": " a", "rejected": " b"}, "Is", [" a", " b"], (A,), None),
        ({"prompt": CHAT, "chosen": [bot("a")], "rejected": [bot("b")]}, CHAT, ["a", "b"], (A,), None),
        (
            {"prompt": "Hi", "chosen": [user("Hi"), bot("a")], "rejected": [user("Hi"), bot("b")]},  # mixed
            [user("Hi")],
            ["a", "b"],
            (A,),
            None,
        ),
        ({"prompt": CHAT, "chosen": [*CHAT, bot("a")], "rejected": [*CHAT, bot("b")]}, CHAT, ["a", "b"], (A,), None),
        (
            {"prompt": "Is", "chosen": "a", "rejected": "b", "score_chosen": 8.0, "score_rejected": 2.5},
            "Is",
            ["a", "b"],
            (Pair(0, 1, gap=5.5),),
            None,
        ),
        (
            {"prompt": "Is", "chosen": "a", "rejected": "b", "score_chosen": 8.0, "score_rejected": 8.0},
            "Is",
            ["a", "b"],
            (Pair(0, 1, gap=0),),
            None,
        ),
        ({"instruction": "Do", "input": "it", "chosen": "a", "rejected": "b"}, "Do\n\nit\n\n", ["a", "b"], (A,), None),
        (
            {"system": "S", "question": "Q", "chosen": "a", "rejected": "b"},
            [{"role": "system", "content": "S"}, user("Q")],
            ["a", "b"],
            (A,),
            None,
        ),
    ],
    "implicit": [({"chosen": [*CHAT, bot("a")], "rejected": [*CHAT, bot("b")]}, CHAT, ["a", "b"], (A,), None)],
    "two_texts": [({"chosen": "a", "rejected": "b"}, "", ["a", "b"], (A,), None)],
    "hh": [
        (
            {"chosen": HH + " Pear.", "rejected": HH + " A brick. Human: no"},
            HH,
            [" Pear.", " A brick. Human: no"],
            (A,),
            None,
        )
    ],
    "shp": [
        (
            {"history": "H", "human_ref_A": "a", "human_ref_B": "b", "labels": label, "post_id": "x"},
            "H",
            ["a", "b"],
            (pair,),
            None,
        )
        for label, pair in ((1, A), (0, B), ("0", B))
    ],
    "tldr": [
        (
            {
                "info": {"id": "i", "post": "P", "title": "T", "subreddit": "r"},
                "summaries": [{"text": " a"}, {"text": " b"}],
                "choice": 1,
            },
            "SUBREDDIT: r/r\nTITLE: T\nPOST: P\nTL;DR:",
            [" a", " b"],
            (B,),
            None,
        )
    ],
    "verdict": [
        ({"input": "I", "output_1": "a", "output_2": "[0.5]", "label": 2}, "I", ["a", "[0.5]"], (B,), None),
        (
            {"instruction": "I", "output_1": "a", "output_2": "b", "preference": 1.25},
            "I\n\n",
            ["a", "b"],
            (Pair(0, 1, p=0.75),),
            None,
        ),
        (
            {"instruction": "I", "output_1": "a", "output_2": "b", "preference": 1.5},
            "I\n\n",
            ["a", "b"],
            (Pair(0, 1, p=0.5, gap=0),),
            None,
        ),
        (
            {
                "instruction": "I",
                "input": "",
                "response1": "a",
                "response2": "b",
                "annotator1": 2,
                "annotator2": 0,
                "annotator3": 2,
            },
            "I\n\n",
            ["a", "b"],
            (Pair(1, 0, p=2.5 / 3),),
            None,
        ),
        *[
            (
                {"conversation_a": [user("Q"), bot("a")], "conversation_b": [user("Q"), bot("b")], "winner": winner},
                [user("Q")],
                ["a", "b"],
                (pair,),
                None,
            )
            for winner, pair in (
                ("model_a", A),
                ("model_b", B),
                ("tie", Pair(0, 1, p=0.5, gap=0)),
                ("tie (bothbad)", Pair(0, 1, p=0.5, gap=0)),
            )
        ],
        ({"prompt": "P", "response_a": "a", "response_b": "b", "winner": "B"}, "P", ["a", "b"], (B,), None),
        ({"prompt": "P", "response_0": "a", "response_1": "b", "better_response_id": 0}, "P", ["a", "b"], (A,), None),
        (
            {
                "prompt": "P",
                "response_a": "a",
                "response_b": "b",
                "winner_model_a": 0,
                "winner_model_b": 1,
                "winner_tie": 0,
            },
            "P",
            ["a", "b"],
            (B,),
            None,
        ),
    ],
    "thumbs": [
        ({"prompt": "P", "completion": "a", "label": True}, "P", ["a"], (), (1.0,)),
        ({"prompt": CHAT, "completion": [bot("a")], "label": False}, CHAT, ["a"], (), (0.0,)),
        ({"prompt": "P", "completion": "a", "label": "false"}, "P", ["a"], (), (0.0,)),
    ],
    "rating": [
        ({"prompt": "P", "response": "a", "helpfulness": 3, "verbosity": 1}, "P", ["a"], (), (3.0,)),
        ({"prompt": "P", "response": "a", "score": "-1e1"}, "P", ["a"], (), (-10.0,)),
    ],
    "responses": [
        (
            {"prompt": "P", "responses": ["a", "b", "b"], "scores": [1, 3, 2]},
            "P",
            ["a", "b", "b"],
            (Pair(1, 0, gap=2.0), Pair(2, 0, gap=1.0)),
            (1.0, 3.0, 2.0),
        ),
        (
            {
                "instruction": "P",
                "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 0}],
            },
            "P\n\n",
            ["a", "b"],
            (A,),
            (1.0, 0.0),
        ),
    ],
}
CASES = [(form, *row) for form, rows in ROWS.items() for row in rows]


@pytest.mark.parametrize(
    "form, row, prompt, answers, pairs, scores", CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_forms(form, row, prompt, answers, pairs, scores):
    assert recognise(row).name == form
    assert recognise(dict(reversed(row.items()))).name == form
    record = of({**row, "more": {"deep": [1]}})
    assert (record.prompt, list(record.answers), record.pairs, record.scores) == (prompt, answers, pairs, scores)
    assert (
        record.extra["more"] == {"deep": [1]} and Record.from_json(json.loads(json.dumps(record.to_json()))) == record
    )
    assert all(record.extra[name] == row[name] for name in record.extra if name != "more")


def test_every_form_is_tried():
    assert {*ROWS} | {"instances"} == {*FORMS}


def test_tasks_with_instances():
    row = {"id": 1, "instruction": "Add.", "instances": [{"input": "2", "output": "4"}, {"input": "", "output": "0"}]}
    records = Reader("instances").records(row)[1]
    assert [(r.prompt, *r.answers, r.extra) for r in records] == [
        ("Add.\n\n2\n\n", "4", {"id": 1}),
        ("Add.\n\n", "0", {"id": 1}),
    ]


def test_groups_and_sources():
    assert of({"history": "H", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "post_id": "x"}).group == group_of(
        "x"
    )
    assert of({"prompt": "Say IT!", "chosen": "a", "rejected": "b"}).group == of({"prompt": "say it"}).group
    assert of({"prompt": "p", "chosen": "a", "rejected": "b", "subset": "hard"}).source == "hard"
    assert of({"text": "t"}).source == "file" and of({"text": "t", "domain": "news"}).extra == {"domain": "news"}


WRONG = [
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "are the same"),
    ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "rejected is empty"),
    ({"prompt": "p", "chosen": "a", "rejected": 5}, "rejected is 5 where a text"),
    ({"prompt": 5, "chosen": "a", "rejected": "b"}, "prompt is 5 where a text"),
    ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt is null"),
    ({"prompt": "p", "chosen": [bot("a")], "rejected": [user("b")]}, "rejected ends with a turn of the user"),
    ({"chosen": [user("x"), bot("a")], "rejected": [user("y"), bot("b")]}, "differ before their last turn"),
    ({"chosen": HH + " a", "rejected": "\n\nHuman: other\n\nAssistant: b"}, "differ before their last turn"),
    ({"chosen": HH, "rejected": HH + " b"}, "chosen is empty"),
    ({"messages": [user("Hi")]}, "ends with a turn of the user"),
    ({"messages": []}, "messages is [] where a list of messages"),
    ({"messages": "Hi"}, "messages is 'Hi' where a list of messages"),
    ({"messages": [user("Hi"), {"role": "assistant"}]}, "messages[1] has no content"),
    ({"messages": [user("Hi"), {"role": "assistant", "content": None}]}, "messages[1].content is None"),
    ({"messages": [user("Hi"), {"role": "wizard", "content": "x"}]}, "messages[1] is of 'wizard'"),
    ({"messages": [user("Hi"), "Ho"]}, "messages[1] is 'Ho' where a message"),
    ({"prompt": "p", "completion": "a", "label": "maybe"}, "label is 'maybe' where true or false"),
    ({"prompt": "p", "completion": "a", "label": 3}, "label is 3 where true or false"),
    ({"prompt": "p", "response": "a", "score": "3,5"}, "score is '3,5' where a number"),
    ({"prompt": "p", "response": "a", "score": float("nan")}, "score is nan where a number"),
    ({"prompt": "p", "response": "a", "score": 10**400}, "score is 1000"),
    ({"prompt": "p", "response": "a", "score": True}, "score is True where a number"),
    ({"text": "a", "score": float("-inf")}, "score is -inf where a number"),
    ({"text": " "}, "text is empty"),
    ({"prompt": " "}, "the prompt is empty"),
    ({"instruction": "i", "input": "", "output": ""}, "output is empty"),
    ({"input": "i", "output_1": "a", "output_2": "b", "label": 7}, "label is 7: not between 1 and 2"),
    (
        {"conversation_a": [user("q"), bot("a")], "conversation_b": [user("q"), bot("b")], "winner": "C"},
        "neither a, b nor tie",
    ),
    ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "2 numbers were expected"),
    ({"prompt": "p", "responses": ["a", ""], "scores": [1, 2]}, "responses[1] is empty"),
    ({"foo": 1, "bar": 2}, "no known form has the keys foo, bar"),
    ({}, "no known form has the keys (none)"),
    (Bad("no JSON: x"), "no JSON: x"),
]


@pytest.mark.parametrize("row, expected", WRONG, ids=[expected for _, expected in WRONG])
def test_what_is_wrong_is_said(row, expected):
    assert expected in reason(row)


@pytest.mark.parametrize(
    "like, row, expected",
    [  # a row that is the file's form with something missing is not another form
        (
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            {"prompt": "p"},
            "chosen, rejected is missing for preference",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"}, "rejected is missing"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            {"chosen": "a", "rejected": "b"},
            "is missing for preference",
        ),
        (
            {"prompt": "p", "completion": "a", "label": True},
            {"prompt": "p", "completion": "a", "label": None},
            "label is missing",
        ),
        ({"text": "a", "score": 1}, {"text": "a"}, "missing for rated_text"),
        (
            {"instruction": "a", "input": "", "output": "x"},
            {"instruction": "a", "input": ""},
            "output or response is missing",
        ),
    ],
)
def test_a_row_with_something_missing(like, row, expected):
    assert expected in reason(row, like)


def test_forms_may_be_mixed():
    rows = [row for rows in ROWS.values() for row, *_ in rows]
    reader = reader_of([ROWS["messages"][0][0]])
    for row in rows:
        assert reader.records(row)[0] == recognise(row).name


def test_map_and_format():
    row = {"frage": "2+2?", "antwort": "4", "prompt": "not this"}
    record = of(row, rename=[("prompt", "frage"), ("completion", "antwort")])
    assert (record.prompt, record.answers, record.extra) == ("2+2?", ("4",), {})
    fixed = Reader("prompts", fixed=True)
    assert fixed.records({"prompt": "p", "completion": "c"})[1][0].extra == {"completion": "c"}
    assert fixed.records({"messages": CHAT})[1][0].prompt == CHAT
    with pytest.raises(ValueError, match="missing"):
        fixed.records({"text": "a"})


def test_chat_makes_messages_of_texts():
    assert of({"prompt": "Hi\n\n", "completion": " Ho"}, chat=True).prompt == [user("Hi")]
    assert of({"prompt": "Hi\n\n", "completion": " Ho"}, chat=True).answers == ("Ho",)
    dialogue = of({"chosen": HH + " Pear.", "rejected": HH + " Brick."}, chat=True)
    assert dialogue.prompt == [user("Name a fruit."), bot("Sure?"), user("Yes.")] and dialogue.answers == (
        "Pear.",
        "Brick.",
    )
    assert of({"text": "t"}, chat=True).prompt == "" and of({"messages": [*CHAT, bot("a")]}, chat=True).prompt == CHAT


COUNTS = {  # file: form, rows kept, answers, pairs, prompts; ../data/README.md of the reference material
    "formats/alpaca.jsonl": ("alpaca", 60, 60, 0, 60),
    "formats/helpsteer.jsonl": ("rating", 180, 180, 0, 60),
    "formats/messages.jsonl": ("messages", 60, 60, 0, 60),
    "formats/preferences.csv": ("preference", 60, 120, 60, 60),
    "formats/prompt_completion.jsonl": ("completion", 60, 60, 0, 60),
    "formats/prompts_with_answer.jsonl": ("prompts", 60, 0, 0, 60),
    "formats/sharegpt.jsonl": ("sharegpt", 60, 60, 0, 60),
    "formats/sharegpt_pairs.jsonl": ("sharegpt_pairs", 60, 120, 60, 60),
    "formats/shp.jsonl": ("shp", 60, 120, 60, 20),
    "formats/thumbs.jsonl": ("thumbs", 120, 120, 0, 60),
    "formats/tldr_comparisons.jsonl": ("tldr", 60, 120, 60, 30),
    "formats/train-00000-of-00001.parquet": ("preference", 60, 120, 60, 60),
    "formats/trl_conversational.jsonl": ("preference", 60, 120, 60, 60),
    "formats/trl_implicit_prompt.jsonl": ("implicit", 60, 120, 60, 60),
    "formats/trl_strings.jsonl": ("preference", 60, 120, 60, 60),
    "formats/ultrafeedback.jsonl": ("preference", 60, 120, 60, 60),
    "formats/verl_prompts.jsonl": ("prompts", 60, 0, 0, 60),
    "gsm8k_first1000.jsonl.gz": ("prompts", 1000, 0, 0, 1000),
    "hh_harmless/first1000.jsonl.gz": ("hh", 997, 1994, 997, None),
    "llmbar/Natural.json": ("verdict", 100, 200, 100, 100),
    "polite_rude/instruction-data-with-preference.json": ("preference", 1094, 2188, 1094, None),
    "self_instruct/seed_tasks.jsonl": ("instances", 175, 175, 0, 175),
    "shakespeare/input.txt": ("text", 7222, 7222, 0, None),
}
TURNED_AWAY = {
    "hh_harmless/first1000.jsonl.gz": {"chosen is empty": 3},
    "polite_rude/instruction-data-with-preference.json": {"chosen and rejected are the same": 6},
}


@pytest.mark.parametrize("name", COUNTS)
def test_files_that_people_have(shared_data_dir, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    container = sniff(shared_data_dir / name, KNOWN)
    reader = reader_of(row for _, row in islice(read(Piece(container)), 100))
    forms, records, turned_away = Counter(), [], Counter()
    for _, row in read(Piece(container)):
        try:
            form, found = reader.records(row)
        except ValueError as error:
            turned_away[str(error)] += 1
        else:
            forms[form] += 1
            records += found
    form, kept, answers, pairs, prompts = COUNTS[name]
    assert set(forms) == {form} and len(records) == kept and turned_away == TURNED_AWAY.get(name, {})
    assert sum(len(r.answers) for r in records) == answers and sum(len(r.pairs) for r in records) == pairs
    assert prompts in (None, len({r.group for r in records}))
    if "llmbar" in name:
        assert sum(r.pairs[0].winner == 0 for r in records) == 42


def test_what_our_own_store_exports_goes_in(tmp_path):
    store = FeedbackStore(tmp_path / "s.sqlite", repeats=0)
    conversation = [user("Name a fruit.")]
    with store.transaction():
        base, tuned = store.add_model("base"), store.add_model("tuned")
        for prompt in ("A fruit is", conversation):
            where = store.add_prompt(prompt)
            one, two = store.add_completion(where, base, " a brick."), store.add_completion(where, tuned, " a pear.")
            store.make_comparison(one, two, 2)
            store.rate(two, "ana", 4, 1, 5, nonce=f"a rating of {prompt}")
    for rater, better in (("ana", "pear"), ("ben", "pear")):
        for i in range(2):
            shown = store.next_comparison(rater)
            store.vote(
                shown.id,
                rater,
                "left" if better in shown.left else "right",
                strength=2,
                nonce=f"a vote of {rater}, {i}",
            )
    for form in ("preference", "votes", "ratings"):
        store.export_jsonl(tmp_path / f"{form}.jsonl", form)
        rows = [json.loads(line) for line in (tmp_path / f"{form}.jsonl").read_text().splitlines()]
        records = [of(row) for row in rows]
        assert {str(record.prompt) for record in records} == {"A fruit is", str(conversation)}
        for record in records:
            if form == "ratings":
                assert record.answers == (" a pear.",) and record.scores == (4.0,)
            else:
                assert record.answers[record.pairs[0].winner] == " a pear." and len(record.pairs) == 1
        if form == "preference":
            assert [record.pairs[0] for record in records] == [Pair(0, 1, p=1.0, gap=2.0)] * 2
    store.close()


def test_the_examples_of_the_docs():
    """Every form has a row in docs/your-data.md, and that row is of this form."""
    text = (ROOT / "docs" / "your-data.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .* \| `(\{.*\})` \|$", text, re.MULTILINE)
    assert {form for form, _ in rows} == {*FORMS}
    for form, row in rows:
        row = json.loads(row)
        assert recognise(row).name == form and len(reader_of([row]).records(row)[1]) == 1


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", " ", "a", "b", "1", "tie", "[1]", HH, "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "id", "post", "score"]), inner, max_size=3
        )
        | st.builds(
            lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), inner
        )
    ),
    max_leaves=8,
)
EXTRAS = ["scores", "responses", "info", "post_id", "strength", "agreement", "domain", "winner_model_b", "instances"]


@given(st.lists(st.dictionaries(st.sampled_from(sorted(KNOWN) + EXTRAS), VALUES, max_size=6), min_size=1, max_size=4))
def test_any_row_is_a_record_or_has_a_reason(rows):
    reader = reader_of(rows)
    for row in rows + rows[0:1]:
        for one in (reader, Reader("prompts", fixed=True, chat=True), reader_of(rows, chat=True)):
            try:
                _, records = one.records(row)
            except ValueError as error:
                assert str(error) and "\n" not in str(error)
                continue
            for record in records:
                assert Record.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False))) == record
                assert all(answer.strip() for answer in record.answers)
                assert all(record.answers[p.winner] != record.answers[p.loser] for p in record.pairs)


def test_zipped_relatives(shared_data_dir, tmp_path):
    """The same records from a file with a BOM, CRLF, other key orders, gzipped."""
    for name in ("trl_strings.jsonl", "messages.jsonl", "shp.jsonl", "thumbs.jsonl"):
        blob = (shared_data_dir / "formats" / name).read_bytes()
        rows = [json.loads(line) for line in blob.splitlines()]
        twisted = "\r\n".join(json.dumps(dict(sorted(row.items(), reverse=True))) for row in rows)
        (tmp_path / "x").write_bytes(gzip.compress(b"\xef\xbb\xbf" + twisted.encode()))
        found = [row for _, row in read(Piece(sniff(tmp_path / "x", KNOWN)))]
        reader = reader_of(found)
        assert [reader.records(row)[1] for row in found] == [reader.records(row)[1] for row in rows]
