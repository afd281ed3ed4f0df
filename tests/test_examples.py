"""Token file 2: what was written comes back, over any number of shards; what is not as written is refused in one line."""

import json
import random
import re
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import examples as module
from data.examples import Encoded, Examples, ShardWriter, check_shard, shard_name, write_shard, write_split
from data.records import Pair, Record


@dataclass(frozen=True)
class Words:
    """A tokenizer as far as token files know one."""

    vocab_size: int = 50
    fingerprint: str = "f" * 64
    pad: int = 0
    start: int = 1
    eos: int = 2


def encode(record: Record, history: bool = False, vocab_size: int = 50) -> Encoded:
    """Tokens that differ where texts do: letters by their number."""
    prompt = record.prompt if isinstance(record.prompt, str) else "".join(m["content"] for m in record.prompt)
    prompt = [1, *(3 + ord(c) % (vocab_size - 3) for c in prompt)]
    answers = [[*(3 + ord(c) % (vocab_size - 3) for c in answer), 2] for answer in record.answers]
    return Encoded(prompt, answers, [i % 2 == 1 for i in range(len(prompt))] if history else None, record)


def write(directory, shards: list[list[Encoded]], tokenizer=Words(), **options) -> Examples:  # noqa: B008
    for number, encoded in enumerate(shards):
        write_shard(directory / shard_name(number), encoded, tokenizer, **options)
    write_split(directory)
    return Examples(directory)


texts = st.text("abcdefghij", min_size=1, max_size=8)


@st.composite
def encoded_records(draw) -> Encoded:
    answers = tuple(draw(st.lists(texts, max_size=3, unique=True)))
    prompt = draw(texts | st.just("") | st.lists(texts.map(lambda t: {"role": "user", "content": t}), min_size=1))
    scores = draw(st.none() | st.lists(st.floats(-9, 9), min_size=len(answers), max_size=len(answers)).map(tuple))
    n = len(answers)
    numbers = st.integers(0, n - 1) if n > 1 else st.nothing()
    pairs = st.builds(Pair, numbers, numbers, st.floats(0.5, 1), st.floats(0, 9), st.floats(0.1, 9))
    pairs = draw(st.lists(pairs.filter(lambda pair: pair.winner != pair.loser), max_size=3)) if n > 1 else []
    extra = draw(
        st.dictionaries(st.sampled_from("xyz"), st.integers(-5, 5) | st.booleans() | texts | st.lists(st.floats(0, 1)))
    )
    record = Record(prompt, answers, scores or None, tuple(pairs), extra, draw(st.sampled_from(["", "news", "film"])))
    return encode(record, history=draw(st.booleans()))


@settings(max_examples=15, deadline=None)
@given(
    shards=st.lists(st.lists(encoded_records(), max_size=4), min_size=1, max_size=3),
    rng=st.randoms(use_true_random=False),
)
def test_what_is_written_comes_back(tmp_path_factory, shards, rng):
    file = write(tmp_path_factory.mktemp("split") / "train", shards, columns=["x", "z"])
    flat = [one for shard in shards for one in shard]
    assert file.prompts == len(flat)
    answers = [(i, answer) for i, one in enumerate(flat) for answer in one.answers]
    pairs = [(i, pair) for i, one in enumerate(flat) for pair in one.record.pairs]
    first = np.cumsum([0] + [len(one.answers) for one in flat])
    assert (file.answers, file.pairs) == (len(answers), len(pairs))
    for i, one in enumerate(flat):
        assert file.record(i) == one.record
        assert file.prompt(i).tolist() == one.prompt
        assert (
            file.sources[file.source([i])[0]] == one.record.source and f"{file.group([i])[0]:016x}" == one.record.group
        )
    for j, (i, answer) in enumerate(answers):
        assert file.answer(j).tolist() == answer and file.row(j).tolist() == [*flat[i].prompt, *answer]
        prompt, own, history = file.rows([j])[0]
        assert (prompt.tolist(), own.tolist()) == (flat[i].prompt, answer)
        assert any(flat[i].prompt_loss or []) == (history is not None and bool(history.any()))
        assert history is None or history.tolist() == (flat[i].prompt_loss or [False] * len(prompt))
    # any rows in any order, of all shards at once
    some = rng.choices(range(len(answers)), k=7) if answers else []
    prompts = rng.choices(range(len(flat)), k=7) if flat else []
    for rows in (None, some):
        wanted = [answers[j] for j in (range(len(answers)) if rows is None else rows)]
        numbers = range(len(answers)) if rows is None else rows
        assert file.answer_lengths(rows).tolist() == [len(answer) for _, answer in wanted]
        assert file.row_lengths(rows).tolist() == [len(flat[i].prompt) + len(answer) for i, answer in wanted]
        assert file.prompt_of(rows).tolist() == [i for i, _ in wanted]
        if file.has("score"):
            scores = [flat[i].record.scores for i, _ in wanted]
            expected = [np.nan if s is None else s[j - first[i]] for s, (i, _), j in zip(scores, wanted, numbers)]
            np.testing.assert_array_equal(file.column("score", rows), expected)
        for name in ("x", "z"):
            values = [flat[i].record.extra.get(name) for i, _ in wanted]
            counts = [len(flat[i].answers) for i, _ in wanted]
            values = [
                v[j - first[i]] if isinstance(v, list) and len(v) == n else v
                for v, (i, _), j, n in zip(values, wanted, numbers, counts)
            ]
            expected = [v if isinstance(v, int | float) else np.nan for v in values]
            np.testing.assert_array_equal(file.column(name, rows), expected)
    for rows in (None, prompts):
        numbers = range(len(flat)) if rows is None else rows
        assert file.prompt_lengths(rows).tolist() == [len(flat[i].prompt) for i in numbers]
        assert file.answers_of(rows).tolist() == [[first[i], first[i + 1]] for i in numbers]
        assert [b - a for a, b in file.pairs_of(rows).tolist()] == [len(flat[i].record.pairs) for i in numbers]
    got = file.pair()
    assert got.winner.tolist() == [first[i] + pair.winner for i, pair in pairs]
    assert got.loser.tolist() == [first[i] + pair.loser for i, pair in pairs]
    assert list(zip(got.p, got.gap, got.weight)) == [(pair.p, pair.gap, pair.weight) for _, pair in pairs]
    file.verify()


def records(count: int, seed: int = 0) -> list[Record]:
    rng = random.Random(seed)
    word = lambda: "".join(rng.choices("abcdefghij", k=rng.randint(2, 9)))  # noqa: E731
    return [
        Record(
            f"{word()} {i}",
            (word() + "a", word() + "b"),
            (1.5, 0.5),
            (Pair(0, 1, gap=1.0),),
            {"x": i, "t": word()},
            "s",
        )
        for i in range(count)
    ]


@pytest.fixture
def split(tmp_path):
    """Two shards, to be broken."""
    rows = [encode(record, history=True) for record in records(20)]
    write(tmp_path / "train", [rows[:12], rows[12:]], columns=["x"])
    return tmp_path / "train"


def one_line(e) -> str:
    assert "\n" not in str(e.value)
    return str(e.value)


def test_the_same_input_gives_the_same_bytes(tmp_path):
    rows = [encode(record) for record in records(50)]
    for name in "ab":
        write(tmp_path / name / "train", [rows[:30], rows[30:]], columns=["x"])
    files = [
        {f.relative_to(tmp_path / name): f.read_bytes() for f in (tmp_path / name).rglob("*") if f.is_file()}
        for name in "ab"
    ]
    assert files[0] == files[1] and len(files[0]) == 2 * 17 + 1


def test_a_block_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "00000", Words()) as shard:
        shard.add(encode(records(1)[0]))
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    write_shard(tmp_path / "00000", [], Words())
    with pytest.raises(ValueError, match="00000 is there already"):
        write_shard(tmp_path / "00000", [], Words())
    assert [f.name for f in tmp_path.iterdir()] == ["00000"]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(answers=[[5, 2]]), "has 2 answers, but 1 in tokens"),
        (dict(prompt=[]), "without a token"),
        (dict(answers=[[5, 2], []]), "without a token"),
        (dict(prompt_loss=[True]), "tokens in its prompt, but 1 marks"),
        (dict(prompt=[50]), "has token 50, but the vocabulary has 50"),
        (dict(answers=[[5, 2], [-1]]), "has token -1, but the vocabulary has 50"),
        (dict(answers=[[5, 2], [5, 2]]), "has a pair of equal answers, 0 and 1"),
    ],
)
def test_tokens_that_do_not_fit_their_record(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as e:
        write_shard(tmp_path / "00000", [replace(encode(records(1)[0]), **change)], Words())
    assert "record 0 of" in one_line(e) and not list(tmp_path.iterdir())


NAMES = sorted(module.layout(dict.fromkeys(module.COUNTS, 1), 50, 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_truncated_or_longer_file_is_refused_with_both_sizes(split, name):
    path = split / "00001" / name
    content = path.read_bytes()
    for damaged in (content[:-1], content + b"\0", b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="prepare the data again") as e:
            Examples(split)
        assert f"00001/{name} has {len(damaged)} bytes, the manifest says {len(content)}" in one_line(e)
        with pytest.raises(ValueError, match=f"{name} has"):
            check_shard(split / "00001")
    path.unlink()
    with pytest.raises(ValueError, match=rf"00001/{name} is missing \({len(content)} bytes expected\)"):
        Examples(split)


@pytest.mark.parametrize("name", NAMES)
def test_a_bit_that_flipped_is_seen_on_demand(split, name):
    path = split / "00000" / name
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 64
    path.write_bytes(blob)
    file = Examples(split)
    with pytest.raises(ValueError, match=f"00000/{name} has sha256 .*, the manifest says") as e:
        file.verify()
    one_line(e)
    for what in range(file.answers):  # without it: whatever it says, or a line; never another exception
        try:
            file.rows([what]), file.pair(), file.column("score"), file.column("x")
            file.record(file.prompt_of([what])[0]), file.source(), file.group(), file.answers_of(), file.pairs_of()
        except ValueError as e:
            assert str(split) in str(e) and "\n" not in str(e)
            break


def test_numbers_that_cannot_be(split):
    for name, bad, message in (
        ("p.bin", [0.4], "has 0.4 to 1.0, and may have 0.5 to 1"),
        ("gap.bin", [-1.0], "has -1.0 to 1.0, and may have 0 to 1e+308"),
        ("weight.bin", [np.inf, 1.0], "has 1.0 to inf"),
        ("weight.bin", [np.nan], "has nan to nan"),
        ("answers.bin", np.array([50], np.uint16), "has token 50 in row 0, the vocabulary has 50"),
    ):
        path = split / "00001" / name
        good = path.read_bytes()
        path.write_bytes(np.array(bad).tobytes() + good[np.array(bad).nbytes :])
        with pytest.raises(ValueError, match=re.escape(f"00001/{name} {message}")) as e:
            Examples(split).pair(), Examples(split).rows([24])
        one_line(e)
        path.write_bytes(good)


def test_offsets_that_lead_astray(split):
    for name in ("prompt_offsets.bin", "answer_offsets.bin", "record_offsets.bin"):
        path = split / "00000" / name
        good = np.fromfile(path, np.int64)
        for bad, why in ((good[::-1], "upwards from 0"), (np.append(good[:-1], good[-1] + 5), "the manifest says")):
            bad.tofile(path)
            file = Examples(split)
            with pytest.raises(ValueError, match=f"{name} .*{why}"):
                file.prompt(0), file.answer(0), file.record(0)
        good.tofile(path)
    for name in ("answer_prompt.bin", "winner.bin"):
        path = split / "00000" / name
        good = np.fromfile(path, np.int64)
        np.full(len(good), 99).tofile(path)
        with pytest.raises(ValueError, match=f"{name} has 99 to 99, but there are"):
            Examples(split).answers_of(), Examples(split).pair()
        good.tofile(path)


@settings(max_examples=150, deadline=None)
@given(
    where=st.sampled_from(["manifest.json", "00000/manifest.json"]),
    path=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    value=st.sampled_from([None, -1, 0, 10**9, 10**30, 0.5, "x", [], {}, [0], True]),
)
def test_a_manifest_that_someone_edited(split_for_manifests, where, path, value):
    """Whatever stands at any place of it: refused in a line, or it does not matter; and nothing is allocated by its word."""
    file = split_for_manifests / where
    good = file.read_text()
    manifest = place = json.loads(good)
    for depth, k in enumerate(path):
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            break
        key = keys[k % len(keys)]
        if depth == len(path) - 1 or not isinstance(place[key], dict | list):
            place[key] = value
            break
        place = place[key]
    file.write_text(json.dumps(manifest))
    try:
        Examples(split_for_manifests, verify=True).row(0)
    except ValueError as e:
        assert "\n" not in str(e) and str(split_for_manifests) in str(e)
    finally:
        file.write_text(good)


@pytest.fixture(scope="module")
def split_for_manifests(tmp_path_factory):
    rows = [encode(record, history=True) for record in records(20)]
    directory = tmp_path_factory.mktemp("manifests") / "train"
    write(directory, [rows[:12], rows[12:]], columns=["x"])
    return directory


def test_what_is_no_split(tmp_path, split):
    with pytest.raises(FileNotFoundError, match="no prepared data at .*nowhere"):
        Examples(tmp_path / "nowhere")
    for text, message in (
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("3", "does not describe data in format"),
        ('{"format": "plain-rlhf tokens 1", "arrays": {}}', "prepare it again"),
        (json.dumps({"format": module.FORMAT, "splits": {}}), "the directory of all splits: add /train"),
    ):
        (split / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message) as e:
            Examples(split)
        one_line(e)


def test_shards_that_are_not_of_one_split(tmp_path):
    rows = [encode(record) for record in records(3)]
    with pytest.raises(ValueError, match="has 0 shards"):
        write_split(tmp_path)
    write_shard(tmp_path / "00001", rows, Words())
    with pytest.raises(ValueError, match="has 1 shards, and they are not 00000 and so on"):
        write_split(tmp_path)
    for change in (dict(tokenizer=Words(fingerprint="other")), dict(template="other"), dict(columns=["x"])):
        write_shard(tmp_path / "00000", rows, **{"tokenizer": Words()} | change)
        with pytest.raises(ValueError, match=f"00001 has {next(iter(change))} ") as e:
            write_split(tmp_path)
        one_line(e)
        for file in (tmp_path / "00000").iterdir():
            file.unlink()
        (tmp_path / "00000").rmdir()


def test_empty_shards_and_empty_splits(tmp_path):
    rows = [encode(record) for record in records(3)]
    file = write(tmp_path / "some", [[], rows[:1], [], [], rows[1:], []])
    assert [file.record(i) for i in range(3)] == records(3) and file.prompt_of().tolist() == [0, 0, 1, 1, 2, 2]
    file = write(tmp_path / "none", [[], []])
    assert (file.prompts, file.answers, file.pairs) == (0, 0, 0) and not file.has("score")
    assert [len(x) for x in (file.row_lengths(), file.group(), file.answers_of(), *file.pair())] == [0] * 8
    for i in (-1, 0):
        with pytest.raises(IndexError, match=f"row {i} of 0 prompts"):
            file.prompt(i)


def test_prompts_alone_have_no_files_of_answers(tmp_path):
    file = write(tmp_path / "train", [[encode(Record("a question", extra={"answer": "42"}))]])
    assert {f.name for f in (tmp_path / "train" / "00000").iterdir()} == {
        *("prompts.bin", "prompt_offsets.bin", "answer_offsets.bin", "source.bin", "group.bin"),
        *("records.jsonl", "record_offsets.bin", "manifest.json"),
    }
    assert file.record(0).extra == {"answer": "42"} and file.answers_of([0]).tolist() == [[0, 0]]


def test_large_vocabularies_and_texts_that_are_no_text(tmp_path):
    record = Record("", ("é\u2028",), None, (), {"half": "\ud800", "big": 10**400, "deep": [[[]]], "x": 10**400})
    encoded = Encoded([1], [[69_999, 2]], None, record)
    file = write(tmp_path / "train", [[encoded]], Words(vocab_size=70_000), columns=["x"])
    assert file.row(0).tolist() == [1, 69_999, 2] and file.record(0) == record and np.isnan(file.column("x")).all()


def test_unknown_columns_and_sources(split):
    file = Examples(split)
    with pytest.raises(ValueError, match="train has no column 'stars'; it has score, x"):
        file.column("stars")
    with pytest.raises(ValueError, match="train has no source 'films'; it has 's'"):
        file.source_ids(["films"])
    assert not file.prompt(0).flags.writeable


def test_sources_are_numbered_over_all_shards(tmp_path):
    names = [["b", "a"], ["c"], ["a", "c", "b"]]
    shards = [[encode(Record(f"{i}{name}", source=name)) for i, name in enumerate(row)] for row in names]
    file = write(tmp_path / "train", shards)
    assert [file.sources[i] for i in file.source()] == sum(names, [])


def test_many_shards_are_cheap_to_open_to_send_and_to_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_MAPPED", 7)
    rows = [encode(record) for record in records(25)]
    file = write(tmp_path / "train", [[one] for one in rows])
    assert not file._mapped and len(ForkingPickler.dumps(file)) < 20_000
    order = random.Random(0).sample(range(50), 50)
    for _ in range(2):
        other = ForkingPickler.loads(ForkingPickler.dumps(file))
        assert [other.row(j).tolist() for j in order] == [
            rows[j // 2].prompt + rows[j // 2].answers[j % 2] for j in order
        ]
        assert other.row_lengths(order).tolist() == [len(other.row(j)) for j in order]
        assert len(other._mapped) == 7
        file = other  # one that has mapped files can be sent too


def test_a_mixture_is_one_after_the_other(tmp_path):
    rows = [encode(replace(record, source=f"s{i % 3}")) for i, record in enumerate(records(9))]
    a = write(tmp_path / "a", [rows[:2], rows[2:5]], columns=["x"])
    b = write(tmp_path / "b", [rows[5:]])
    both = Examples(tmp_path / "a", tmp_path / "b", weights=[1, 3])
    assert both.part.tolist() == [0, 0, 1] and both.weights == (1, 3)
    assert [both.row(j).tolist() for j in range(18)] == [f.row(j).tolist() for f in (a, b) for j in range(f.answers)]
    assert [both.sources[i] for i in both.source()] == [f"s{i % 3}" for i in range(9)]
    assert np.isnan(both.column("x")).tolist() == [False] * 10 + [True] * 8
    assert [both.record(i) for i in range(9)] == [one.record for one in rows]
    write(tmp_path / "c", [rows], Words(fingerprint="other"))
    write(tmp_path / "d", [rows], template="sha")
    for name, what in (("c", "another tokenizer"), ("d", "another chat template")):
        with pytest.raises(ValueError, match=f"{name} was prepared with {what} than .*a; prepare both with one"):
            Examples(tmp_path / "a", tmp_path / name)
