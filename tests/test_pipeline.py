"""data.prepare: what is written, that every row is accounted for, and that no process and no kill changes a byte."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import fake_ratings
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import COUNTS, TURNED_AWAY, VALUES

from data import pipeline, vader
from data.chat import Chat
from data.encoding import Encoder
from data.examples import Examples
from data.pipeline import main
from data.records import Record
from data.text import SPLITS
from data.tokenizer import load_tokenizer, train_sentencepiece

ROOT = Path(__file__).resolve().parent.parent
WORDS = "apple bread cloud dream earth flame grape house island juice kite lemon moon night ocean".split()


def sentence(rng: random.Random, words: int = 8) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)) + f" {rng.randrange(10**6)}."


def rows_of(form: str, n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(f"{form} {seed}")
    make = {
        "text": lambda: {"text": sentence(rng), "id": rng.randrange(10**9)},
        "preference": lambda: {"prompt": sentence(rng), "chosen": " " + sentence(rng), "rejected": " " + sentence(rng)},
        "messages": lambda: {
            "messages": [
                {"role": "user", "content": sentence(rng)},
                {"role": "assistant", "content": sentence(rng)},
                {"role": "user", "content": sentence(rng)},
                {"role": "assistant", "content": sentence(rng)},
            ]
        },
        "rating": lambda: {
            "prompt": sentence(rng),
            "response": sentence(rng),
            "score": rng.random(),
            "length": rng.random(),
        },
    }
    return [make[form]() for _ in range(n)]


def write(file: Path, rows: list) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """60 files of each run wait for the disk, 8 ms each; only a power cut would tell the difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A sentencepiece tokenizer with the control tokens of ChatML."""
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [text for row in rows_of("preference", 300) for text in row.values()]
    train_sentencepiece(texts, directory / "tokenizer.model", 500, pipeline.CONTROL)
    return directory


def run(*arguments, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data.prepare", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


def manifest_of(out: Path) -> dict:
    manifest = json.loads((out / "manifest.json").read_text())
    rows, splits = manifest["rows"], manifest["splits"]
    assert rows["read"] == rows["kept"] + rows["rejected"] + rows["duplicates"]
    assert rows["kept"] == sum(split["rows"] for split in splits.values())
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == rows["rejected"] and all({*row} == {"file", "line", "reason"} for row in rejects)
    for split in SPLITS:
        examples = Examples(out / split, verify=True)
        assert (examples.answers, examples.pairs) == (splits[split]["answers"], splits[split]["pairs"])
    return manifest


def rejects_of(out: Path) -> dict[int, str]:
    lines = (out / "rejects.jsonl").read_text().splitlines()
    return {row["line"]: row["reason"] for row in map(json.loads, lines)}


def records_of(out: Path) -> list[Record]:
    splits = [Examples(out / split) for split in SPLITS]
    return [examples.record(i) for examples in splits for i in range(examples.prompts)]


def digest(out: Path) -> dict[str, str]:
    return {
        str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(out.rglob("*"))
        if f.is_file()
    }


# --- what is written ---


def test_rated_sentences(tmp_path, monkeypatch):
    """Every sentence of the reader in its split, start token, text and eos; cut into prompt and answer the row is the same."""
    sdist = fake_ratings.use_fake(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    sentences, counts = vader.read_sentences(sdist)
    main(["vader", "--out=new", "--vocab_size=400"])
    main(["vader", "--out=cut", "--vocab_size=400", "--prompt_tokens=4"])
    manifest, tokenizer = manifest_of(Path("new")), load_tokenizer("new")
    assert manifest["rows"]["read"] == sum(count["read"] for count in counts.values())
    assert manifest["rows"]["duplicates"] == sum(count.get("duplicate", 0) for count in counts.values()) > 0
    for split in SPLITS:
        mine, new, cut = [x for x in sentences if x.split == split], Examples(f"new/{split}"), Examples(f"cut/{split}")
        assert new.answers == len(mine) > 0
        for i, sentence in enumerate(mine):
            row = [tokenizer.start, *tokenizer.encode(sentence.text), tokenizer.eos]
            assert row == new.row(i).tolist() == cut.row(i).tolist()
            assert cut.prompt(i).tolist() == row[: 5 if len(row) - 2 > 4 else 1]
            assert "".join([cut.record(i).prompt, *cut.record(i).answers]) == sentence.text
        assert [x.domain for x in mine] == [new.sources[i] for i in new.source()]
        for column, name in (("score", "rating"), ("half_a", "half_a"), ("rating_std", "rating_std"), ("rest", "rest")):
            assert np.allclose(new.column(column), [getattr(x, name) for x in mine])
    assert vader.load_rules("new")("lovely") == 1
    with pytest.raises(SystemExit):
        main(["--help"])


@pytest.mark.parametrize("name", COUNTS)
def test_files_that_people_have(shared_data_dir, tokenizer_dir, tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    main([str(shared_data_dir / name), f"--out={tmp_path / 'out'}", f"--tokenizer={tokenizer_dir}"])
    manifest, (form, kept, answers, pairs, prompts) = manifest_of(tmp_path / "out"), COUNTS[name]
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert manifest["rows"]["kept"] + manifest["rows"]["duplicates"] == kept and {*card["forms"]} == {form}
    assert manifest["rows"]["duplicates"] == (74 if form == "text" else 0)
    assert manifest["rows"]["rejected"] == sum(TURNED_AWAY.get(name, {}).values())
    total = Counter()
    for split in manifest["splits"].values():
        total.update(split)
    assert total["answers"] == answers - manifest["rows"]["duplicates"]
    assert prompts in (None, total["prompts"])
    if form not in ("rating", "thumbs"):  # of which pairs are made
        assert total["pairs"] == pairs


def test_columns_and_joined_ratings(tmp_path, tokenizer_dir):
    rows = [{**row, "prompt": f"prompt {i // 3}", "note": "n"} for i, row in enumerate(rows_of("rating", 300))]
    rows[1] |= {"score": rows[0]["score"]}
    rows[4] |= {"response": rows[3]["response"]}
    write(tmp_path / "r.jsonl", rows)
    main([str(tmp_path / "r.jsonl"), f"--out={tmp_path / 'out'}", f"--tokenizer={tokenizer_dir}"])
    assert sum(split["prompts"] for split in manifest_of(tmp_path / "out")["splits"].values()) == 100
    records = {record.prompt: record for record in records_of(tmp_path / "out")}
    for i in range(100):
        group, record = rows[3 * i : 3 * i + 3], records[f"prompt {i}"]
        assert record.answers == tuple(row["response"] for row in group) and record.source == "r"
        assert record.scores == tuple(row["score"] for row in group)
        assert record.extra == {"length": [row["length"] for row in group], "note": "n"}
        assert len(record.pairs) == (2 if i < 2 else 3)
    train = Examples(tmp_path / "out" / "train")
    assert train.columns == ["length"]
    assert sorted(train.column("length")) == sorted(
        x for i in range(train.prompts) for x in train.record(i).extra["length"]
    )


def test_conversations_and_their_template(tmp_path, tokenizer_dir):
    rows = rows_of("messages", 50)
    file, tokenizer = write(tmp_path / "m.jsonl", rows), load_tokenizer(tokenizer_dir)
    main([str(file), f"--out={tmp_path / 'auto'}", f"--tokenizer={tokenizer_dir}"])
    chat = Chat(tokenizer)
    assert manifest_of(tmp_path / "auto")["template"] == chat.sha256
    assert (tmp_path / "auto" / "template.jinja").read_text() == chat.source
    for split in SPLITS:
        examples = Examples(tmp_path / "auto" / split)
        assert examples.template == chat.sha256
        for i in range(examples.answers):
            record = examples.record(i)
            right = chat.encode(record.prompt, record.answers[0])
            assert examples.row(i).tolist() == right.prompt + right.answer
            ((_, answer, history),) = examples.rows([i])
            assert [*(history != 0), *[True] * len(answer)] == right.trained and history.any() and not history.all()
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
                                      "{% if add_generation_prompt %}<|im_start|>{% endif %}")  # fmt: skip
    main([str(file), f"--out={tmp_path / 'own'}", f"--tokenizer={tokenizer_dir}", f"--template={tmp_path / 't.jinja'}"])
    assert manifest_of(tmp_path / "own")["template"] not in (None, chat.sha256)
    main([str(file), f"--out={tmp_path / 'none'}", f"--tokenizer={tokenizer_dir}", "--template=none"])
    assert manifest_of(tmp_path / "none")["template"] is None and not (tmp_path / "none" / "template.jinja").exists()
    main([str(file), f"--out={tmp_path / 'system'}", f"--tokenizer={tokenizer_dir}", "--system=Be brief."])
    assert all(
        record.prompt[0] == {"role": "system", "content": "Be brief."} for record in records_of(tmp_path / "system")
    )
    main([str(file), f"--out={tmp_path / 'trained'}"])  # a tokenizer of our own knows ChatML
    assert manifest_of(tmp_path / "trained")["template"] == chat.sha256
    assert {*pipeline.CONTROL} <= {*load_tokenizer(tmp_path / "trained").control}
    forms = {json.dumps(record.prompt) for record in records_of(tmp_path / "none")}
    assert forms == {json.dumps(row["messages"][:-1]) for row in rows}


def test_texts_are_messages_with_chat(tmp_path, tokenizer_dir):
    file = write(tmp_path / "p.jsonl", rows_of("preference", 40))
    main([str(file), f"--out={tmp_path / 'out'}", f"--tokenizer={tokenizer_dir}", "--chat=true"])
    assert manifest_of(tmp_path / "out")["template"]
    assert all(record.prompt[0]["role"] == "user" for record in records_of(tmp_path / "out"))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=300)
def test_an_answer_continues_its_prompt(tokenizer_dir, text):
    """The bytes that its tokens add are the answer's, with no space that sentencepiece puts before what stands alone."""
    tokenizer = load_tokenizer(tokenizer_dir)
    added = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, "text")))
    assert added == text.replace("\u2581", " ").encode()


def test_what_a_policy_writes_is_encoded_as_it_wrote_it(tokenizer_dir):
    """Greedy words of a policy: the text of sampled tokens, put into a row, becomes these tokens again."""
    tokenizer, rng = load_tokenizer(tokenizer_dir), random.Random(0)
    encoder = Encoder(tokenizer)
    for prompt in ("A prompt", "ends in\n\n", "a space "):
        for _ in range(50):
            ids = tokenizer.encode(rng.choice(["", " "]) + sentence(rng), "text")
            text = b"".join(map(tokenizer.token_bytes, ids)).decode()
            encoded = encoder.encode(Record(prompt, (text,)))
            assert list(encoded.answers[0]) == [*ids, tokenizer.eos]
            assert list(encoded.prompt) == [tokenizer.start, *tokenizer.encode(prompt)]


# --- every row is accounted for ---

BAD = [  # what a line may be, and how its reason begins
    ("{broken", "no JSON"),
    ("[1, 2]", "a list where an object"),
    ("null", "null where an object"),
    ('{"text": "a", "text": "b"}', "no JSON: the key 'text' stands twice"),
    ('{"text": "\\ud800"}', "half a surrogate pair"),
    ('{"text": ' + "[" * 150 + "]" * 150 + "}", "JSON of more than 100 levels"),
    ('{"text": 5}', "text is 5 where a text"),
    ('{"text": null}', "text is missing"),
    ('{"text": "  "}', "text is empty"),
    ('{"unknown": 1}', "no known form has the keys unknown"),
    ('{"prompt": "p", "chosen": "a", "rejected": "a"}', "chosen and rejected are the same"),
    ('{"prompt": "p", "chosen": "a", "rejected": ""}', "rejected is empty"),
    ('{"prompt": "p", "response": "a", "score": NaN}', "score is nan"),
    ('{"prompt": "p", "completion": "c", "label": "x"}', "label is 'x'"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "messages ends with a turn of the user"),
    ("x" * 3000, "no JSON"),
]


def mixed_lines(n: int, seed: int) -> tuple[list[str], dict[int, str], int]:
    """n lines: (lines, reason of the bad ones by number, how many repeat an earlier one)."""
    rng, lines, bad, again, recent = random.Random(seed), [], {}, 0, []
    good = [row for form in ("text", "preference", "rating") for row in rows_of(form, n // 3 + 1, seed)]
    good += rows_of("messages", n // 100, seed)  # a template takes its time
    rng.shuffle(good)
    for number in range(1, n + 1):
        kind = rng.random()
        if kind < 0.2:
            line, bad[number] = rng.choice(BAD)
        elif kind < 0.3 and recent:
            line, again = rng.choice(recent), again + 1
        else:
            line = json.dumps(good.pop())
            recent = [*recent[-99:], line]
        lines.append(line)
    return lines, bad, again


@pytest.mark.parametrize("n", [2000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_counts_add_up_and_every_reject_is_named(tmp_path, tokenizer_dir, n, monkeypatch):
    lines, bad, again = mixed_lines(n, 1)
    (tmp_path / "f.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    monkeypatch.setattr(pipeline, "UNIT", n * 40)
    main([str(tmp_path / "f.jsonl"), f"--out={tmp_path / 'out'}", f"--tokenizer={tokenizer_dir}", "--workers=2"])
    rows, rejects = manifest_of(tmp_path / "out")["rows"], rejects_of(tmp_path / "out")
    assert rows == {"read": n, "kept": n - len(bad) - again, "rejected": len(bad), "duplicates": again}
    assert rejects.keys() == bad.keys()
    assert all(reason.startswith(bad[line]) for line, reason in rejects.items())


LINES = st.lists(
    st.one_of(
        st.text(max_size=20),
        VALUES.map(json.dumps),
        st.dictionaries(
            st.sampled_from(["text", "prompt", "chosen", "rejected", "completion", "label", "score"]), VALUES
        ).map(json.dumps),
        st.sampled_from([line for line, _ in BAD]),
    ).map(lambda line: line.replace("\n", " ").replace("\r", " ")),
    max_size=8,
)


@pytest.mark.slow
@given(LINES)
@settings(max_examples=60)
def test_any_lines_add_up(tokenizer_dir, lines):
    """Never a traceback, never another sum."""
    good = [{"text": sentence(random.Random(i))} for i in range(12)]  # for there is a training split
    with tempfile.TemporaryDirectory() as directory:
        file, out = Path(directory, "f.jsonl"), Path(directory, "out")
        file.write_bytes("\n".join([*map(json.dumps, good), *lines]).encode("utf-8", "surrogatepass"))
        main([str(file), f"--out={out}", f"--tokenizer={tokenizer_dir}"])
        assert manifest_of(out)["rows"]["read"] == len(good) + sum(bool(line.strip(" \t")) for line in lines)


def test_duplicates_go_whatever_their_keys_and_spelling(tmp_path, tokenizer_dir):
    rows = rows_of("preference", 60)
    copies = [
        json.dumps({"id": i, **dict(reversed(rows[0].items()))}, indent=None, ensure_ascii=i % 2) for i in range(20)
    ]
    write(tmp_path / "a.jsonl", rows + copies)
    write(tmp_path / "b.jsonl", rows[:30])
    main(
        [
            str(tmp_path / "a.jsonl"),
            str(tmp_path / "b.jsonl"),
            f"--out={tmp_path / 'out'}",
            f"--tokenizer={tokenizer_dir}",
        ]
    )
    rows = manifest_of(tmp_path / "out")["rows"]
    assert (rows["read"], rows["kept"], rows["duplicates"]) == (110, 60, 50)


def test_strict_ends_at_the_first_bad_row(tmp_path, tokenizer_dir):
    file = write(tmp_path / "f.jsonl", [*rows_of("text", 30), "{broken", "[]"])
    result = run(file, f"--out={tmp_path / 'out'}", "--strict=true", f"--tokenizer={tokenizer_dir}")
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert result.stderr.startswith(f"error: {file}, line 31: no JSON") and result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["f.jsonl"]


def test_a_test_file_is_the_test_split_and_leaks_nowhere(tmp_path, tokenizer_dir):
    rows = rows_of("preference", 80)
    leak = {**rows[3], "chosen": "another", "prompt": rows[3]["prompt"].upper()}
    write(tmp_path / "train.jsonl", [*rows[:60], leak])
    write(tmp_path / "test.jsonl", [*rows[60:], rows[3], rows[5]])
    out = tmp_path / "out"
    main(
        [
            str(tmp_path / "train.jsonl"),
            f"--test={tmp_path / 'test.jsonl'}",
            f"--out={out}",
            f"--tokenizer={tokenizer_dir}",
        ]
    )
    manifest = manifest_of(out)
    assert manifest["splits"]["test"]["rows"] == 22 and manifest["rows"]["rejected"] == 3
    assert rejects_of(out) == dict.fromkeys((4, 6, 61), "its prompt is in the test file")
    groups = [set(Examples(out / split).group()) for split in SPLITS]
    assert not groups[0] & groups[2] and not groups[1] & groups[2] and not groups[0] & groups[1]
    with pytest.raises(ValueError, match="is a file of --test too"):
        main([str(tmp_path / "train.jsonl"), f"--test={tmp_path / 'train.jsonl'}", f"--out={tmp_path / 'no'}"])


def test_near_duplicates(tmp_path, tokenizer_dir):
    pytest.importorskip("datasketch")
    rng = random.Random(0)
    texts = [sentence(rng, 40) for _ in range(40)]
    near = [text.replace(text.split()[20], "other", 1) for text in texts[:7]]
    write(tmp_path / "f.jsonl", [{"text": text} for text in texts + near])
    main([str(tmp_path / "f.jsonl"), f"--out={tmp_path / 'all'}", f"--tokenizer={tokenizer_dir}"])
    main(
        [
            str(tmp_path / "f.jsonl"),
            f"--out={tmp_path / 'out'}",
            f"--tokenizer={tokenizer_dir}",
            "--near_duplicates=0.5",
        ]
    )
    assert manifest_of(tmp_path / "all")["rows"]["kept"] == 47 and manifest_of(tmp_path / "out")["rows"]["kept"] == 40
    assert {text for record in records_of(tmp_path / "out") for text in record.answers} == {*texts}


def test_standard_input_and_several_containers(tmp_path, tokenizer_dir):
    rows = rows_of("preference", 90)
    write(tmp_path / "a.jsonl", rows[:30])
    (tmp_path / "b.json").write_text(json.dumps(rows[30:60]))
    result = subprocess.run(
        [sys.executable, "-m", "data.prepare", "-", str(tmp_path / "*.json*"), f"--out={tmp_path / 'out'}"]
        + [f"--tokenizer={tokenizer_dir}"],
        input="".join(json.dumps(row) + "\n" for row in rows[60:]),
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert manifest_of(tmp_path / "out")["rows"]["kept"] == 90
    assert {record.source for record in records_of(tmp_path / "out")} == {"stdin", "a", "b"}
    assert "standard input: JSON lines, comparisons (preference)" in result.stdout


@pytest.mark.slow
def test_other_encodings_are_the_same_rows(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(pipeline, "UNIT", 10_000)  # so that all of them are unpacked to be cut
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of("text", 300))
    (tmp_path / "plain.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "marked.jsonl").write_text("\ufeff" + text, encoding="utf-16-be")
    (tmp_path / "returns.jsonl").write_bytes(text.replace("\n", "\r").encode())
    (tmp_path / "zipped.jsonl").write_bytes(gzip.compress(text.encode("utf-16")))
    found = []
    for file in sorted(tmp_path.glob("*.jsonl")):
        main([str(file), f"--out={tmp_path / file.stem}", f"--tokenizer={tokenizer_dir}"])
        found.append((manifest_of(tmp_path / file.stem)["rows"], [r.answers for r in records_of(tmp_path / file.stem)]))
    assert found[0][0]["kept"] == 300 and all(sorted(rows) == sorted(found[0][1]) for _, rows in found)


# --- neither processes nor interruptions change a byte ---


def many_files(directory: Path) -> list[str]:
    """Some files of all containers, so that units of 10,000 bytes cut through them."""
    directory.mkdir()
    lines, _, _ = mixed_lines(400, 2)
    (directory / "a.jsonl").write_text("\n".join(lines))
    (directory / "b.json").write_text(json.dumps(rows_of("messages", 30), indent=1))
    (directory / "c.txt").write_text("\n\n".join(row["text"] + "\nand more" for row in rows_of("text", 400, 7)))
    table = "".join(f'"{row["text"]}, ""q""\n",{i}\n' for i, row in enumerate(rows_of("text", 300, 8)))
    (directory / "d.csv").write_text("text,score\n" + table)
    return [str(directory), f"--tokenizer={directory.parent / 'tokenizer'}"]


def prepared(tmp_path: Path, name: str, arguments: list[str], workers: int) -> dict[str, str]:
    main([*arguments, f"--out={tmp_path / name}", f"--workers={workers}"])
    manifest_of(tmp_path / name)
    found = digest(tmp_path / name)
    card = (tmp_path / name / "card.md").read_text().replace(f"card of {name}", "card of out")
    found["card.md"] = hashlib.sha256(card.encode()).hexdigest()
    found["manifest.json"] = (tmp_path / name / "manifest.json").read_text().partition('"files"')[0]
    return found


def test_any_number_of_processes_writes_the_same_bytes(tmp_path, tokenizer_dir, monkeypatch):
    (tmp_path / "tokenizer").symlink_to(tokenizer_dir)
    arguments = many_files(tmp_path / "d")
    monkeypatch.setattr(pipeline, "UNIT", 10_000)
    one = prepared(tmp_path, "one", arguments, 1)
    assert len([name for name in one if name.startswith("train/") and name.endswith("prompts.bin")]) > 10
    assert prepared(tmp_path, "three", arguments, 3) == one
    monkeypatch.setattr(pipeline, "UNIT", 64 << 20)
    whole = manifest_of(tmp_path / "one")["rows"]
    main([*arguments, f"--out={tmp_path / 'whole'}"])
    assert manifest_of(tmp_path / "whole")["rows"] == whole
    texts = [sorted(str(record) for record in records_of(tmp_path / name)) for name in ("one", "whole")]
    assert texts[0] == texts[1]


def test_nothing_is_done_again(tmp_path, tokenizer_dir, capsys):
    file = write(tmp_path / "f.jsonl", rows_of("text", 100))
    arguments = [str(file), f"--out={tmp_path / 'out'}", f"--tokenizer={tokenizer_dir}"]
    main(arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    main(arguments)
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    write(file, rows_of("text", 101))
    main(arguments)
    assert "was prepared in another way" in capsys.readouterr().out
    assert manifest_of(tmp_path / "out")["rows"]["read"] == 101
    shard = next((tmp_path / "out" / "train").glob("0*"))
    (shard / "answers.bin").write_bytes(b"")
    main(arguments)
    assert manifest_of(tmp_path / "out")["rows"]["read"] == 101
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.jsonl", "out"]


INTERRUPTED = """
import sys
from data import pipeline
pipeline.UNIT = 10_000
sys.exit(pipeline.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path, tokenizer_dir, monkeypatch):
    (tmp_path / "tokenizer").symlink_to(tokenizer_dir)
    arguments, rng, killed, when = many_files(tmp_path / "d"), random.Random(3), 0, 0
    monkeypatch.setattr(pipeline, "UNIT", 10_000)
    right = prepared(tmp_path, "right", arguments, 1)
    for round in range(60):
        command = [sys.executable, "-c", INTERRUPTED, *arguments, f"--out={tmp_path / 'killed'}", "--workers=2"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.3, 3.0) if killed < 5 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            continue
        assert process.returncode == 0
        when += 1
        if killed >= 5:
            break
        (tmp_path / "killed").rename(tmp_path / f"whole {round}")  # it was done before the kill: from the start
    assert killed >= 5
    assert prepared(tmp_path, "killed", arguments, 1) == right


# --- what is refused ---


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["none.jsonl"], "there is no file none.jsonl"),
        (["*.none"], "no file matches"),
        (["f.jsonl", "--tokenizer=nowhere"], "no tokenizer at nowhere: give the directory"),
        (["f.jsonl", "--tokenizer=f.jsonl"], "export.py --init=f.jsonl"),
        (["f.jsonl", "--format=prompts"], "no row of f.jsonl can be used"),
        (["f.jsonl", "--format=wrong"], "invalid choice"),
        (["f.jsonl", "--map=text"], "is no key=column"),
        (["f.jsonl", "--chat=true"], "--chat=true has no effect"),
        (["f.jsonl", "--system=S"], "--system=S has no effect"),
        (["f.jsonl", "--strict=maybe"], "neither true nor false"),
        (["f.jsonl", "--workers=0"], "below 1"),
        (["f.jsonl", "--near_duplicates=2"], "not between 0 and 1"),
        (["f.jsonl", "--vocab_size=99999"], "cannot train a tokenizer"),
        (["f.jsonl", "--colour=red"], "unrecognized arguments"),
        (["p.jsonl", "--prompt_tokens=4"], "--prompt_tokens=4 has no effect"),
        (["empty.jsonl"], "there is no row"),
        (["f.jsonl", "--out=."], "is not prepared data"),
        (["bad.jsonl"], "no row of bad.jsonl can be used; bad.jsonl, line 1: no JSON"),
        (["m.jsonl", "--tokenizer=plain"], "has no chat template"),
        (["m.jsonl", "--template=none.jinja"], "neither auto, none nor a readable file"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, arguments, reason, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "f.jsonl", rows_of("text", 50))
    write(tmp_path / "p.jsonl", rows_of("preference", 50))
    write(tmp_path / "m.jsonl", rows_of("messages", 50))
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "bad.jsonl", ["{", "["])
    train_sentencepiece([sentence(random.Random(1))] * 9, tmp_path / "plain" / "tokenizer.model", 300)
    with pytest.raises((ValueError, OSError), match=reason.replace("*", r"\*")) as error:
        main([*arguments, *([] if any("--out" in a for a in arguments) else ["--out=out"])])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_the_command_says_it_in_one_line(tmp_path):
    result = run(tmp_path / "none.jsonl", f"--out={tmp_path / 'out'}")
    assert (
        result.returncode == 2
        and result.stderr.startswith("error: there is no file")
        and result.stderr.count("\n") == 1
    )
