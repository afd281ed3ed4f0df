"""Rewards in Python and sums of rewards: what they are asked, what they may say, and how what goes wrong is told."""

import json
import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_reward_model import Words, ragged

from data.records import Record
from rlhf.reward import function
from rlhf.reward.scorer import check_room, open_scorer, scorer_of

ROWS = {  # of the data: which rows the two of `ragged` answer
    3: Record([{"role": "user", "content": "add 2 and 2"}], extra={"answer": "4", "level": 1}),
    7: Record("add 2 and 3", extra={"answer": "5", "level": 2}),
}
ASKED = torch.tensor([3, 7])


def records(rows):
    return [ROWS.get(int(row), ROWS[3]) for row in rows]


def opened(tmp_path, code: str, *, spec: str = "f", **how):
    (tmp_path / "r.py").write_text(code)
    return open_scorer(",".join(f"{tmp_path / 'r.py'}:{one}" for one in spec.split(",")), Words(), **how)


@pytest.mark.parametrize(
    "signature, seen",
    [
        ("prompts, responses", {"prompts", "responses"}),
        ("p, r", {"p", "r"}),
        ("responses, answer", {"responses", "answer"}),
        ("answer, *, messages, responses", {"answer", "messages", "responses"}),
        ("responses, weight=2, answer=None", {"responses"}),  # a default is the function's own
        ("responses, **columns", {"responses", "prompts", "messages", "answer", "level"}),
        ("**everything", {"responses", "prompts", "messages", "answer", "level"}),
    ],
)
def test_a_function_is_asked_by_the_names_of_its_parameters(tmp_path, signature, seen):
    log = tmp_path / "log.json"
    body = "    import json\n    found = {k: v for k, v in locals().items() if k not in ('json', 'weight')}\n"
    body += "    for name in ('columns', 'everything'):\n        found |= found.pop(name, {})\n"
    body += "    found = {k: v for k, v in found.items() if v is not None}\n"
    body += f"    open({str(log)!r}, 'w').write(json.dumps(found))\n"
    opened(tmp_path, f"def f({signature}):\n{body}    return [0, 0]\n", records=records).score(*ragged(), ASKED)
    found = json.loads(log.read_text())
    assert found.keys() == seen
    truth = {"prompts": ["w4", "w1 w2 w3"], "responses": ["w5 w6 w7", "w8"], "answer": ["4", "5"], "level": [1, 2]}
    truth |= {"p": truth["prompts"], "r": truth["responses"]}
    truth["messages"] = [ROWS[3].prompt, [{"role": "user", "content": "add 2 and 3"}]]
    assert found == {name: truth[name] for name in seen}


def test_a_column_cannot_take_the_place_of_a_text(tmp_path):
    found = [Record("a", extra={"responses": "column", "prompts": "column", "more": 1})] * 2
    code = (
        "def f(responses, **more):\n    return [len(r) * (p != 'column') for r, p in zip(responses, more['prompts'])]\n"
    )
    assert opened(tmp_path, code, records=lambda rows: found).score(*ragged(), ASKED).tolist() == [8, 2]


@pytest.mark.parametrize("signature", ["prompts, responses, /", "*texts"])
def test_parameters_without_names_are_refused(tmp_path, signature):
    with pytest.raises(ValueError, match="by its place: a reward is given its parameters by their names"):
        opened(tmp_path, f"def f({signature}):\n    return [0, 0]\n")


PARTS = """
def f(prompts, responses):
    return {"right": [1, 0], "long": [len(r.split()) for r in responses]}

def g(prompts, responses):
    return [0.5, -2]

def h(prompts, responses):
    return {"right": [10, 20]}
"""


def test_components_add_up_and_each_mean_is_a_metric(tmp_path):
    one = opened(tmp_path, PARTS)
    said = one.detailed(*ragged())
    assert one.names == ["long", "right"] and said.tolist() == [[4, 3, 1], [1, 1, 0]]
    assert one.score(*ragged()).tolist() == [4, 1] and one.means(said[:, 1:]) == {"reward/long": 2, "reward/right": 0.5}
    weighed = opened(tmp_path, PARTS, spec="f:long=-0.5:2")
    assert weighed.score(*ragged()).tolist() == [-1, -1] and weighed.names == ["f", "long", "right"]
    plain = opened(tmp_path, PARTS, spec="g")
    assert plain.detailed(*ragged()).tolist() == [[0.5], [-2]] and plain.means(torch.zeros(2, 0)) == {}


@given(weights=st.lists(st.floats(-4, 4).map(lambda x: round(x, 3)), min_size=4, max_size=4))
def test_a_sum_is_the_weighted_sum_by_hand(tmp_path_factory, weights):
    a, b, c, long = weights
    tmp_path = tmp_path_factory.mktemp("sum")
    total = opened(tmp_path, PARTS, spec=f"f:{a}:long={long},g:{b},h:{c}")
    by_hand = [a * (1 + 3 * long) + b * 0.5 + c * 10, a * (0 + 1 * long) + b * -2 + c * 20]
    assert total.score(*ragged()).tolist() == pytest.approx(by_hand, rel=1e-5, abs=1e-5)
    means = total.means(total.detailed(*ragged())[:, 1:])
    assert means.keys() == {f"reward/{x}" for x in ("f", "f.right", "long", "g", "h", "h.right")}
    assert means["reward/g"] == -0.75 and means["reward/h.right"] == 15 and means["reward/f.right"] == 0.5
    assert means["reward/f"] == pytest.approx(0.5 + 2 * long, abs=1e-5)  # as they are, before their weight


def test_the_same_files_under_other_weights_are_another_reward(tmp_path):
    (tmp_path / "r.py").write_text(PARTS)
    specs = ["f:1,{}:g:1", "f:1,{}:g:2", "g:1,{}:f:1", "f:right=2", "f:right=3", "f:2"]
    digests = {scorer_of(f"{tmp_path}/r.py:{spec.format(tmp_path / 'r.py')}").digest for spec in specs}
    assert len(digests) == len(specs)
    assert scorer_of(f"{tmp_path}/r.py:f").digest == scorer_of(f"{tmp_path}/r.py:g").digest  # told apart by the spec


@pytest.mark.parametrize(
    "spec, said",
    [
        ("r.py", "which function of r.py is the reward"),
        ("r.py:f:x", "'x' of the reward r.py:f:x is no weight; write r.py:f:0.5"),
        ("r.py:f:nan", "is no weight"),
        ("r.py:f:1:2", "is no weight"),
        ("r.py:f:a=1:a=2", "is no weight"),
        ("out/rm:a=1", "only a function has components; write out/rm:0.5"),
        ("r.py:f:1,r.py:f:2", "has r.py:f twice; add up its weights"),
        ("r.py:f:1,", "a reward without a name in 'r.py:f:1,'"),
        ("", "a reward without a name in ''"),
    ],
)
def test_specs_that_name_nothing(spec, said):
    with pytest.raises(ValueError, match=said):
        scorer_of(spec)


def test_components_may_not_change_and_weights_must_be_of_one(tmp_path):
    with pytest.raises(ValueError, match="has long, right, and a weight for 'wrong'"):
        opened(tmp_path, PARTS, spec="f:wrong=1").score(*ragged())
    with pytest.raises(ValueError, match="has no components, and a weight for 'right'"):
        opened(tmp_path, PARTS, spec="g:right=1").score(*ragged())
    moody = opened(tmp_path, "calls = []\ndef f(p, r):\n    calls.append(1)\n    return {str(len(calls)): [0, 0]}\n")
    moody.score(*ragged())
    with pytest.raises(ValueError, match="now has the components 2; before, 1: name the same ones"):
        moody.score(*ragged())
    late = opened(
        tmp_path, "calls = []\ndef f(p, r):\n    calls.append(1)\n    return {'a': [0, 0]} if calls[1:] else [0, 0]\n"
    )
    late.score(*ragged())
    with pytest.raises(ValueError, match="now has the components a; before, nothing"):
        late.score(*ragged())


@pytest.mark.parametrize(
    "most, said", [(12, "or use --max_prompt=4 or shorter responses"), (8, "or use shorter responses")]
)
def test_what_is_proposed_can_be_done(most, said):
    with pytest.raises(
        ValueError, match=f"reads {most} tokens; the longest prompt has 5 .* up to 8: allow 13, {said}$"
    ):
        check_room(5, 8, most, "it reads")


WRONG = {  # what a function does -> what the line says beside the row
    "return {}": "must return 2 finite numbers",
    "return {'a': [1, 2], 3: [1, 2]}": "must return 2 finite numbers",
    "return {'a': [1, 2], 'b': [1, 2, 3]}": "got 3 in list [1, 2, 3] for 'b'",
    "return {'a': [1, float('nan')]}": "got float nan for 'a': on row 7 of the data",
    "return [1, 10**400]": "row 7 of the data",
    "return [1, 1e39]": "got float 1e+39: on row 7 of the data",  # has no place in float32
    "return [1, 'x' * 999]": "got str 'xxx",
    "return {'a': {'b': [1, 2]}}": "got dict {'b': [1, 2]} for 'a'",
    "return [len(r) / (len(r) - 2) for r in r]": "ZeroDivisionError: division by zero in line 2 of r.py",
    "exit(3)": "raised SystemExit: 3",
    "assert len(r) < 2": "raised AssertionError in line 2 of r.py, assert len(r) < 2",
    "raise OSError('the\\nserver')": "raised OSError: the server",
}


@pytest.mark.parametrize("body", WRONG)
def test_what_goes_wrong_names_the_row_and_its_text_on_one_line(tmp_path, body):
    reward = opened(tmp_path, f"def f(p, r):\n    {body}\n", records=records)
    with pytest.raises(ValueError) as caught:
        reward.score(*ragged(), ASKED)
    line = str(caught.value)
    assert WRONG[body] in line and f"{tmp_path / 'r.py'}:f" in line and "\n" not in line and len(line) < 900
    on_second = "row 7 of the data, prompt 'w1 w2 w3', response 'w8'" in line
    on_first = "row 3 of the data, prompt 'w4', response 'w5 w6 w7'" in line
    assert on_first != on_second and ("ZeroDivision" not in body or on_second)


def test_without_data_the_place_in_the_batch_is_named(tmp_path):
    with pytest.raises(ValueError, match="on response 2 of 2, prompt 'w1 w2 w3', response 'w8'"):
        opened(tmp_path, "def f(p, r):\n    return [0, float('inf')]\n").score(*ragged())


@pytest.mark.parametrize("code", ["def f(p, r:\n", "import nothing_of_this_name\n", "exit()\n", "raise KeyError(3)\n"])
def test_a_file_that_cannot_be_imported_is_named(tmp_path, code):
    with pytest.raises(ValueError, match=f"the reward {tmp_path / 'r.py'} cannot be imported: ") as caught:
        opened(tmp_path, code)
    assert "\n" not in str(caught.value)


def test_a_file_may_have_dataclasses(tmp_path):
    """They look for their module by its name."""
    code = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\n"
    )
    assert opened(tmp_path, f"{code}def f(p, r):\n    return [A().x] * 2\n").score(*ragged()).tolist() == [1, 1]


def test_a_function_that_takes_long_is_named_while_it_does(tmp_path, monkeypatch):
    """It waits until that was said."""
    said, heard = threading.Event(), []
    monkeypatch.setattr(function, "say", lambda words: (heard.append(words), said.set()))
    monkeypatch.setattr(function, "PATIENCE", 0.01)
    function.waiting = said
    code = "from rlhf.reward import function\ndef f(p, r):\n    assert function.waiting.wait(60)\n    return [0, 0]\n"
    assert opened(tmp_path, code).score(*ragged()).tolist() == [0, 0]
    assert len(heard) == 1 and "r.py:f has not answered for 0.01 s" in heard[0] and "prompt 'w4'" in heard[0]


@given(st.lists(st.one_of(st.floats(-1e30, 1e30), st.integers(-(2**60), 2**60), st.booleans()), min_size=2, max_size=2))
def test_every_finite_number_is_taken_as_it_is(values):
    asked = function.Asked("f", ["a", "b"], ["c", "d"], None)
    assert asked.numbers_in(values)[""].tolist() == torch.tensor([float(x) for x in values]).tolist()
    assert all(math.isfinite(x) for x in asked.numbers_in(tuple(values))[""].tolist())
