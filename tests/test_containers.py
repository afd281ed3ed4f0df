"""Rows of files: the same rows out of every container, in any cut, and a reason for whatever cannot be read."""

import csv
import gzip
import io
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import containers
from data.containers import Bad, Piece, cut, find_files, read, rows, sniff

KNOWN = ("prompt", "chosen", "rejected", "text", "score")
ROWS = [
    {"prompt": "a", "chosen": "b, c", "rejected": 'd "e"'},
    {"prompt": "zwei\nZeilen", "chosen": "\u2028\x85\x0c no line ends", "rejected": "caf\u00e9 \U0001f600"},
    {"prompt": "a\ttab", "chosen": "'", "rejected": ";"},
]


def table(rows: list[dict], **dialect) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def json_lines(rows: list, end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


FILES = {  # the same rows
    "jsonl": json_lines(ROWS),
    "jsonl with CRLF": json_lines(ROWS, "\r\n"),
    "jsonl with BOM": b"\xef\xbb\xbf" + json_lines(ROWS),
    "jsonl without a last line end": json_lines(ROWS)[:-1],
    "jsonl with blank lines": json_lines(ROWS, "\n\n \n"),
    "array": json.dumps(ROWS).encode(),
    "array over lines": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode(),
    "objects over lines": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "csv": table(ROWS),
    "csv with BOM": b"\xef\xbb\xbf" + table(ROWS),
    "csv, all quoted": table(ROWS, quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "csv with semicolons": table(ROWS, delimiter=";"),
    "tsv": table(ROWS, delimiter="\t"),
}


TEXTS = ("jsonl", "array over lines", "objects over lines", "csv", "tsv")
FILES |= {f"{name} in {code}": ("\ufeff" + FILES[name].decode("utf-8-sig")).encode(code)
          for name in TEXTS for code in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")}  # fmt: skip
FILES |= {
    "jsonl with CR": json_lines(ROWS, "\r"),
    "array with CR": json.dumps(ROWS, indent=2).replace("\n", "\r").encode(),
    "csv with CR": table(ROWS, lineterminator="\r", quoting=csv.QUOTE_ALL),
    "tsv with CR in UTF-16": table(ROWS, delimiter="\t", lineterminator="\r", quoting=csv.QUOTE_ALL)
    .decode()
    .encode("utf-16"),
}


def values(path, known=KNOWN) -> list:
    return [row for _, row in rows([path], known)]


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "txt", "bin"])
def test_content_decides(tmp_path, name, zipped, ending):
    file = tmp_path / f"file.{ending}"
    file.write_bytes(gzip.compress(FILES[name]) if zipped else FILES[name])
    assert values(file) == ROWS


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{**row, "n": i, "x": float("nan"), "deep": [{"a": 1}], "raw": b"ab"} for i, row in enumerate(ROWS * 400)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.json", row_group_size=100)
    container = sniff(tmp_path / "t.json")
    found = list(read(Piece(container)))
    assert [row for _, row in found] == [{**row, "x": None, "raw": "ab"} for row in rows]
    assert [number for number, _ in found] == list(range(1, 1201))
    pieces = cut(container, 2000)
    assert len(pieces) > 3 and [pair for piece in pieces for pair in read(piece)] == found


def test_tables_whose_quotation_marks_are_letters(tmp_path):
    (tmp_path / "t.tsv").write_text('text\tscore\n"so" he said\t1\nshe said "no\t2\n"\t3\n')
    assert values(tmp_path / "t.tsv") == [
        {"text": '"so" he said', "score": "1"},
        {"text": 'she said "no', "score": "2"},
        {"text": '"', "score": "3"},
    ]


def test_tables_of_one_column(tmp_path):
    blob = table([{"text": "a, b"}, {"text": 'c "d"\ne'}], quoting=csv.QUOTE_ALL)
    for ending in ("csv", "txt"):
        (tmp_path / f"t.{ending}").write_bytes(blob)
        assert values(tmp_path / f"t.{ending}") == [{"text": "a, b"}, {"text": 'c "d"\ne'}]
    (tmp_path / "u.txt").write_text("text\nis what this is")  # one word at its beginning does not make a table of it
    assert values(tmp_path / "u.txt") == [{"text": "text\nis what this is"}]


def test_text(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone,\r\ntwo\r\n\r\n \nthree\x0c\xe2\x80\xa8four\n\xff\n\nfive")
    paragraphs = sniff(tmp_path / "t.txt", KNOWN)
    found = list(read(Piece(paragraphs)))
    assert [number for number, _ in found] == [1, 5, 8]
    assert found[0][1] == {"text": "one,\ntwo"} and "UTF-8" in found[1][1].reason and found[2][1] == {"text": "five"}
    lines = [row for _, row in read(Piece(sniff(tmp_path / "t.txt", KNOWN, unit="line")))]
    assert [row for row in lines if isinstance(row, dict)] == [
        {"text": text} for text in ("one,", "two", "three\x0c\u2028four", "five")
    ]
    assert sum(isinstance(row, Bad) for row in lines) == 1


BAD_LINES = {
    b'{"text": "cut': "no JSON",
    b"not json": "no JSON",
    b'{"text": "\xff"}': "not UTF-8",
    b'["a", "b"]': "a list where an object was expected",
    b'"a text"': "a text where",
    b"17": "a number where",
    b"null": "null where",
    b"\0\0 a hole \0": "no JSON",
    b'{"text": "a", "text": "b"}': "the key 'text' stands twice",
    b'{"text": "\\ud83d"}': "half a surrogate pair",
    b'{"a": {"\\uDC00": 1}}': "half a surrogate pair",
    b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}": "more than 100 levels",
    b"[" * 200_000: "",  # what it is depends on the version of Python
    b'{"a": ' + b"9" * 5000 + b"}": "no JSON",
}


def test_bad_lines_are_named_and_the_others_read(tmp_path):
    good = [json.dumps({"text": f"line {i}"}).encode() for i in range(len(BAD_LINES))]
    lines = [line for pair in zip(BAD_LINES, good) for line in pair]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    found = list(rows([tmp_path / "t.jsonl"]))
    assert len(found) == len(lines)
    for i, ((where, row), line) in enumerate(zip(found, lines)):
        assert where == f"{tmp_path / 't.jsonl'}, line {i + 1}"
        if line in BAD_LINES:
            assert isinstance(row, Bad) and BAD_LINES[line] in row.reason and "\n" not in row.reason
        else:
            assert row == json.loads(line)


def test_pairs_of_surrogates_and_numbers_without_end_are_read(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "\\ud83d\\ude00", "x": NaN, "y": -Infinity, "z": 1e999}\n')
    (row,) = values(tmp_path / "t.jsonl")
    assert row["text"] == "\U0001f600" and row["x"] != row["x"] and row["z"] == float("inf") == -row["y"]


def test_long_lines(tmp_path, monkeypatch):
    ten = {"text": "x" * 10_000_000}
    (tmp_path / "t.jsonl").write_bytes(json_lines([ten, {"text": "y"}]))
    assert values(tmp_path / "t.jsonl") == [ten, {"text": "y"}]
    (tmp_path / "t.csv").write_bytes(table([ten | {"score": "1"}]))
    assert values(tmp_path / "t.csv") == [ten | {"score": "1"}]
    monkeypatch.setattr(containers, "LONGEST_ROW", 1000)
    found = values(tmp_path / "t.jsonl")
    assert isinstance(found[0], Bad) and "longer" in found[0].reason and found[1:] == [{"text": "y"}]


def test_a_quotation_mark_too_many_spoils_one_line(tmp_path, monkeypatch):
    body = 'text,score\na,1\n"b,2\nc,3\n"d\ne",4\nf,5,6\ng\n\n"h""i",7\n"j" k,8\nl,9\n"m,10\nn,11'
    (tmp_path / "t.csv").write_text(body)
    found = [(where.rpartition(" ")[2], row) for where, row in rows([tmp_path / "t.csv"], KNOWN)]
    good = {number: row["text"] for number, row in found if isinstance(row, dict)}
    assert good == {"2": "a", "4": "c", "5": "d\ne", "10": 'h"i', "12": "l", "14": "n"}
    assert {number for number, row in found if isinstance(row, Bad)} == {"3", "7", "8", "11", "13"}


@pytest.mark.parametrize("indent", [None, 1])
def test_a_broken_row_of_an_array_spoils_itself(tmp_path, indent):
    rows = [{"text": f"row {i}", "turns": [{"role": "user"}, {"role": "a"}]} for i in range(9)]
    text = json.dumps(rows, indent=indent)
    text = text.replace('"row 2"', '"row 2').replace('"row 4"', "row 4").replace('"row 6"', '"row 6", "text": 1')
    (tmp_path / "t.json").write_text(text)
    found = values(tmp_path / "t.json")
    assert [row["text"][-1] for row in found if isinstance(row, dict) and "text" in row] == list("013578")
    (tmp_path / "cut.json").write_text(json.dumps(rows, indent=indent)[:-100])
    assert [isinstance(row, dict) for row in values(tmp_path / "cut.json")][:7] == [True] * 7
    assert isinstance(values(tmp_path / "cut.json")[-1], Bad)


@pytest.mark.parametrize("name", FILES)
def test_any_cut_gives_the_same_rows(tmp_path, name, monkeypatch):
    monkeypatch.setattr(containers, "BLOCK", 64)
    rng = random.Random(name)
    many = [{key: value * rng.randint(1, 5) for key, value in rng.choice(ROWS).items()} for _ in range(60)]
    blob = {"jsonl": json_lines(many), "jsonl with CRLF": json_lines(many, "\r\n"), "array": json.dumps(many).encode()}
    blob |= {"array over lines": json.dumps(many, indent=2).encode(), "csv": table(many)}
    blob |= {"tsv": table(many, delimiter="\t"), "objects over lines": FILES["objects over lines"] * 9}
    file = tmp_path / "file"
    file.write_bytes(blob.get(name, FILES[name]))
    container = sniff(file, KNOWN)
    whole = list(read(Piece(container)))
    for size in (1, 100, 777, 5000):
        pieces = cut(container, size)
        assert [pair for piece in pieces for pair in read(piece)] == whole
        assert size < 1000 or len(pieces) < 20


@given(
    blob=st.binary(max_size=300) | st.text('{}[]",:\\ \n\r\t0a\u00e9', max_size=80).map(str.encode),
    size=st.integers(1, 60),
)
def test_any_bytes_are_rows_or_refused_in_one_line(tmp_path_factory, blob, size):
    file = tmp_path_factory.mktemp("bytes") / "file"
    for ending in ("", ".jsonl", ".csv"):
        file = file.with_suffix(ending)
        file.write_bytes(blob)
        try:
            container = sniff(file, KNOWN)
            whole = list(read(Piece(container)))
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        assert all(isinstance(row, dict | Bad) for _, row in whole)
        assert [row for piece in cut(container, size) for row in read(piece)] == whole


LEGACY = [{"text": f"é {i}"} for i in range(4)]


@pytest.mark.parametrize(
    "blob, reason",
    [
        (
            json_lines(ROWS).decode().encode("utf-16-le"),
            "UTF-16 or UTF-32 without a byte order mark; convert it with `iconv",
        ),
        (json_lines(ROWS).decode().encode("utf-32-be"), "UTF-16 or UTF-32 without"),
        (
            json_lines(LEGACY).decode().encode("cp1252"),
            "not UTF-8, first at byte 10 .0xe9., nor are 4 of its first 4 lines; .*`iconv",
        ),
        (
            json_lines(LEGACY, "\r").decode().encode("latin-1"),
            "not UTF-8, first at byte 10 .*`iconv -f WINDOWS-1252 -t UTF-8`",
        ),
        (json_lines(LEGACY).decode().replace("é", "語").encode("shift-jis"), "not UTF-8, first at byte 10"),
        (b"PK\x03\x04....", "zip"),
        (b"\x28\xb5\x2f\xfd....", "zstd"),
        (b"\x89PNG\r\n\x1a\n\0\0\0" + b"x" * 90, "binary"),
        (gzip.compress(json_lines(ROWS * 100))[:-40], "damaged gzip"),
        (gzip.compress(json_lines(ROWS)) + b"PK", "damaged gzip"),
        (b"PAR1" + b"x" * 50, "parquet"),
    ],
)
def test_what_is_refused(tmp_path, blob, reason):
    (tmp_path / "f.jsonl").write_bytes(blob)
    with pytest.raises(ValueError, match=reason) as error:
        values(tmp_path / "f.jsonl")
    assert str(tmp_path / "f.jsonl") in str(error.value) and "\n" not in str(error.value)


def test_a_text_whose_lines_end_with_a_return(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"one\rtwo\r\r" + b"three\r" * 300_000)
    found = list(read(Piece(sniff(tmp_path / "t.txt"))))
    assert [number for number, _ in found] == [1, 4] and found[0][1] == {"text": "one\ntwo"}
    assert found[1][1]["text"].count("three\n") == 299_999


def test_one_line_in_another_encoding_is_one_bad_line(tmp_path):
    good, bad = json_lines(LEGACY), '{"text": "caf\xe9"}\n'.encode("latin-1")
    (tmp_path / "f.jsonl").write_bytes(bad + good + bad)
    assert [isinstance(row, Bad) for row in values(tmp_path / "f.jsonl")] == [True, *[False] * 4, True]


def test_half_a_character_of_utf16_is_a_bad_line(tmp_path):
    blob = json_lines(LEGACY).decode().encode("utf-16")
    for damaged in (blob[:-1], blob + b"\x00\xd8", blob + '"\ud800"\n'.encode("utf-16-le", "surrogatepass")):
        (tmp_path / "f.jsonl").write_bytes(damaged)
        found = values(tmp_path / "f.jsonl")
        assert found[:3] == LEGACY[:3] and sum(isinstance(row, Bad) for row in found) <= 1 and len(found) in (4, 5)


def test_names_globs_and_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d" / ".hidden").mkdir(parents=True)
    for name in (
        "d/b.jsonl",
        "d/a.csv.gz",
        "d/README.md",
        "d/LICENSE.txt",
        "d/.hidden/c.jsonl",
        "d/dataset_infos.json",
    ):
        (tmp_path / name).write_text("{}")
    assert [str(path) for path in find_files(["d"])] == ["d/a.csv.gz", "d/b.jsonl"]
    assert [str(path) for path in find_files(["d/*.jsonl", "d", "d/b.jsonl"])] == ["d/b.jsonl", "d/a.csv.gz"]
    assert [str(path) for path in find_files(["d/README.md"])] == ["d/README.md"]  # who names it means it
    for name, reason in (("none.jsonl", "there is no file"), ("*.none", "no file matches"), ("e", "holds no data")):
        (tmp_path / "e").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=reason):
            find_files([name])
