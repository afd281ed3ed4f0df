"""JSON in and out: strict, whole, and every complaint names the file and the line, whoever reads."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.containers import rows_with
from data.examples import Examples
from data.text import prompt_lines
from evaluation.card import beats_length
from rlhf.check.dump import read_json as read_dump
from rlhf.feedback import preferences
from rlhf.infra import files

DEEP, HALF = "[" * 100_000, '{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}'
ROW = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
FLOATS = st.floats(allow_nan=True, allow_infinity=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | FLOATS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def no_constant(name: str):
    pytest.fail(f"{name} is no JSON")


@given(st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), max_size=4))
def test_what_is_written_is_json_and_comes_back(tmp_path_factory, rows):
    """Against json's own reader, which is told that NaN is no JSON; any character may stand in a text."""
    place = tmp_path_factory.mktemp("files")
    files.write_lines(place / "rows.jsonl", rows)
    theirs = [
        json.loads(line, parse_constant=no_constant)
        for line in (place / "rows.jsonl").read_text("utf-8").split("\n")[:-1]
    ]
    assert files.read_lines(place / "rows.jsonl") == theirs == [files.strict(row) for row in rows]
    files.write_json(place / "one.json", {"rows": rows})
    assert files.read_json(place / "one.json") == {"rows": theirs}
    assert sorted(file.name for file in place.iterdir()) == ["one.json", "rows.jsonl"]


def test_what_is_not_finite_is_null():
    found = files.strict({"a": math.nan, "b": [math.inf, (1.5, -math.inf)], "c": {"d": math.nan}, "e": True, "f": 7})
    assert found == {"a": None, "b": [None, [1.5, None]], "c": {"d": None}, "e": True, "f": 7}


def test_the_old_file_stays_where_the_new_one_fails(tmp_path):
    files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "a.txt", "new \ud83d")
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


READERS = {  # who reads JSON, and under which name
    "read_json": (files.read_json, "x.json"),
    "read_lines": (files.read_lines, "x.jsonl"),
    "read_rows": (lambda file: list(files.read_rows(file)), "x.jsonl"),
    "rows_with": (lambda file: list(rows_with(file, ("prompt",))), "x.jsonl"),
    "feedback": (lambda file: list(preferences.read_rows(file)), "x.jsonl"),
    "examples": (lambda file: Examples(file.parent), "manifest.json"),
    "dump": (read_dump, "x.json"),
    "card": (lambda file: beats_length(str(file.parent)), "card.json"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", [DEEP, "{", '{"a": }', "\udcff", "1e", '"\n"'], ids=lambda text: repr(text[:9]))
def test_one_line_names_the_file_and_the_line(tmp_path, reader, content):
    """Two good lines stand before the bad one where a file has lines."""
    read, name = READERS[reader]
    file, lines = tmp_path / name, name.endswith("l")
    file.write_bytes((ROW * 2 * lines + content + "\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as error:
        read(file)
    said = str(error.value)
    assert str(file) in said and "\n" not in said and len(said) < 400
    assert not lines or "line 3" in said or reader == "rows_with" and "not UTF-8" in said


@pytest.mark.parametrize("reader", ["read_rows", "rows_with", "feedback"])
def test_half_a_character_of_a_stranger(tmp_path, reader):
    """It could be stored nowhere; a whole pair of surrogates is one character."""
    read, name = READERS[reader]
    (tmp_path / name).write_text(ROW + ROW.replace('"p"', '"\\ud83d\\ude00"'))
    assert read(tmp_path / name)[1][1]["prompt"] == "\U0001f600"
    (tmp_path / name).write_text(ROW + HALF)
    with pytest.raises(ValueError, match=r"x.jsonl, line 2(:| has) half a surrogate pair"):
        read(tmp_path / name)


@given(st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_lines_of_prompts_end_at_a_newline_alone(tmp_path_factory, lines):
    """Not at U+2028, U+0085, a form feed; a carriage return before the newline belongs to it."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    filled = [line for line in lines if line.strip()]
    for end in ("\n", "\r\n"):
        file.write_bytes(end.join(["\ufeff", *lines, "x"]).encode())
        assert prompt_lines(file) == [*filled, "x"]
