"""Damaged files of every kind that a stranger may hand over: read, or refused in one line, soon, and in little memory.

HF and PEFT directories, GGUF files and request bodies have files of their own, test_fuzz_*.py. Together, with the slow ones,
more than ten thousand mutations. Whatever is opened, nothing is unpickled.
"""

import functools
import gzip
import importlib
import json
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from test_chat import CHATML
from test_examples import Words, encode
from test_fuzz_safetensors import changed, damaged, limited_memory
from test_pretrained import tiny_tokenizer
from test_stored_models import adapters, language_model

from data.chat import Chat
from data.containers import find_files, rows
from data.examples import Examples, shard_name, write_shard, write_split
from data.records import Pair, Record
from data.tokenizer import load_tokenizer, train_sentencepiece, write_hf
from rlhf.feedback.store import FeedbackStore
from rlhf.infra import checkpoint, metrics, run
from rlhf.lm.pretrained import open_pretrained

PICKLE = importlib.import_module("pickle")  # which nobody here may import, see tests/test_layers.py
SECONDS = 5  # that a reader may take for a file of a few kilobytes
ROWS = [{"prompt": f"caf\u00e9 {i}", "chosen": f"yes, {i}", "rejected": "no", "score": i / 2} for i in range(8)]
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


# Each makes its files in a directory, and says which of them is changed and how the whole is read.


def of_a_checkpoint(name: str, place: Path) -> tuple[Path, Callable]:
    step = language_model(place / "lm")
    return step / name, lambda: open_pretrained(place / "lm" / "step_000001")


def of_an_adapter(place: Path) -> tuple[Path, Callable]:
    language_model(place / "lm")
    step = adapters(place / "ppo", place / "lm")
    return step / "config.json", lambda: open_pretrained(step)


def of_a_tokenizer(name: str, place: Path) -> tuple[Path, Callable]:
    if name == "tokenizer.model":
        texts = ["a good film", "a bad film that nobody likes"] * 20
        train_sentencepiece(texts, place / name, 300, ("<|im_end|>",))
    else:
        write_hf(tiny_tokenizer(), place)

    def read():
        tokenizer = load_tokenizer(place)
        tokenizer.decode(tokenizer.encode("A film, 12\x04 caf\u00e9 <|im_end|> \U0001f600"))

    return place / name, read


def of_rows(ending: str, place: Path) -> tuple[Path, Callable]:
    file = place / f"rows.{ending}"
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    table = "prompt\tchosen\tscore\n" + "".join(f"{row['prompt']}\t{row['chosen']}\t{row['score']}\n" for row in ROWS)
    match ending:
        case "jsonl":
            file.write_text(text)
        case "jsonl.gz":
            file.write_bytes(gzip.compress(text.encode()))
        case "json":
            file.write_text(json.dumps({"data": ROWS}))
        case "csv":
            file.write_text(table.replace("\t", ","))
        case "tsv":
            file.write_text(table)
        case "parquet":
            pytest.importorskip("pyarrow.parquet").write_table(sys.modules["pyarrow"].Table.from_pylist(ROWS), file)
    return file, lambda: list(rows(find_files([file])))


def of_examples(name: str, place: Path) -> tuple[Path, Callable]:
    records = [Record(f"abc{i}", ("de", "fg"), (0.5, 1.0), (Pair(0, 1),), {"x": i}, "film") for i in range(6)]
    write_shard(place / shard_name(0), [encode(record) for record in records], Words())
    write_split(place)

    def read():
        data = Examples(place)
        for i in range(data.prompts):
            data.record(i), data.prompt(i)
        for i in range(data.answers):
            data.row(i)
        data.pair(), data.prompt_lengths()

    return place / name.replace("shard", shard_name(0)), read


def of_a_run(name: str, place: Path) -> tuple[Path, Callable]:
    options = {"lr": 0.1, "domains": ["film"], "init_sha256": "a" * 64}
    state = {"done": 4, "options": options}
    checkpoint.save_step(place, 4, {"w": torch.zeros(2)}, {}, state)
    run.write_json(place / "run.json", options)
    (place / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "kl": i / 3}) + "\n" for i in range(4)))
    if name == "metrics.jsonl":
        return place / name, lambda: metrics.read_rows(place / name)
    return place / name, lambda: run.differences(run.options_of(str(place), options, {})[0], options)


def of_feedback(name: str, place: Path) -> tuple[Path, Callable]:
    store = FeedbackStore(place / "votes.sqlite", repeats=0)
    (place / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    store.import_jsonl(place / "in.jsonl")
    store.export_jsonl(place / "out.jsonl")
    store.close()

    def read_votes():
        opened = FeedbackStore(place / "votes.sqlite", repeats=0)
        try:
            opened.statistics(), list(opened.judgements()), opened.next_comparison("ana")
        finally:
            opened.close()

    def read_rows():
        (place / "new.sqlite").unlink(missing_ok=True)
        opened = FeedbackStore(place / "new.sqlite")
        try:
            opened.import_jsonl(place / name)
        finally:
            opened.close()

    return place / name, read_votes if name == "votes.sqlite" else read_rows


def of_a_template(place: Path) -> tuple[Path, Callable]:
    (place / "template.txt").write_text(CHATML)
    tokenizer = tiny_tokenizer()
    return place / "template.txt", lambda: Chat(
        tokenizer, (place / "template.txt").read_bytes().decode("latin-1")
    ).render(MESSAGES, add_generation_prompt=True)


READERS = {
    "our config.json": functools.partial(of_a_checkpoint, "config.json"),
    "our state.json": functools.partial(of_a_checkpoint, "state.json"),
    "our weights": functools.partial(of_a_checkpoint, "model.safetensors"),
    "an adapter's config.json": of_an_adapter,
    "tokenizer.json": functools.partial(of_a_tokenizer, "tokenizer.json"),
    "tokenizer_config.json": functools.partial(of_a_tokenizer, "tokenizer_config.json"),
    "tokenizer.model": functools.partial(of_a_tokenizer, "tokenizer.model"),
    **{ending: functools.partial(of_rows, ending) for ending in "jsonl jsonl.gz json csv tsv parquet".split()},
    **{
        f"examples {name}": functools.partial(of_examples, name)
        for name in ("manifest.json", "shard/manifest.json", "shard/answers.bin", "shard/prompts.bin")
    },
    "run.json": functools.partial(of_a_run, "run.json"),
    "metrics.jsonl": functools.partial(of_a_run, "metrics.jsonl"),
    "votes.sqlite": functools.partial(of_feedback, "votes.sqlite"),
    "preferences": functools.partial(of_feedback, "out.jsonl"),
    "chat template": of_a_template,
}
SLOWLY = {"chat template": 0.25}  # a process for each


@contextmanager
def deadline():
    """TimeoutError after SECONDS of computing, or twelve times as long by the clock: the machine may be busy."""

    def late(number, frame):
        raise TimeoutError(f"still reading after {SECONDS} s")

    before = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def attempt(read: Callable) -> bool:
    """Was it read? If not, then by a ValueError or OSError of one line."""
    try:
        with deadline():
            read()
    except TimeoutError:
        raise
    except (ValueError, OSError) as error:
        text = str(error)
        assert text and len(text) < 1500 and "\n" not in text, text
        return False
    return True


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("examples", [25, pytest.param(150, marks=pytest.mark.slow)])
def test_damaged_files(tmp_path, name, examples):
    file, read = READERS[name](tmp_path)
    content, counts = file.read_bytes(), {True: 0, False: 0}
    assert attempt(read)
    mutations = damaged(content, min(len(content), 200))
    if file.suffix == ".json":  # beside bytes, what its values say
        whole = json.loads(content)
        mutations |= changed(whole).map(functools.partial(signed, name.endswith("config.json") and "our" in name))

    @settings(max_examples=int(examples * SLOWLY.get(name, 1)), suppress_health_check=list(HealthCheck))
    @given(mutations)
    def attack(mutation):
        for left in file.parent.glob(f"{file.name}-*"):  # sqlite's journals
            left.unlink()
        file.write_bytes(mutation)
        counts[attempt(read)] += 1

    with limited_memory():
        attack()
    assert sum(counts.values()) >= examples * SLOWLY.get(name, 1) * 0.5, counts


def signed(ours: bool, content: dict) -> bytes:
    """As somebody would write it who knows that our config.json holds a digest of itself."""
    if ours:
        content = content | {"sha256": checkpoint.own_digest(content)}
    return json.dumps(content).encode("utf-8", "replace")


@pytest.mark.parametrize("name", READERS)
def test_nothing_is_unpickled(tmp_path, name):
    """By Python's own word: no class is looked up for a pickle while a file of any kind is opened."""
    found = []

    def hook(event: str, args) -> None:
        if WATCHING and event == "pickle.find_class":
            found.append(args)

    sys.addaudithook(hook)
    WATCHING.append(True)
    try:
        PICKLE.loads(PICKLE.dumps(Path("x")))
        assert found, "the hook sees what it has to"
        found.clear()
        file, read = READERS[name](tmp_path)
        assert attempt(read)
        if name != "chat template":  # its process answers in pickles of ours
            assert not found, found
        file.unlink()
        file.write_bytes(PICKLE.dumps(Evil()))
        attempt(read)
        assert not EXPLODED
    finally:
        WATCHING.clear()


WATCHING, EXPLODED = [], []


class Evil:
    """Whoever unpickles it is seen."""

    def __reduce__(self):
        return explode, ()


def explode():
    EXPLODED.append(time.time())


def test_a_database_of_somebody_else(tmp_path):
    """A view in place of a table runs whatever it says when it is read."""
    db = sqlite3.connect(tmp_path / "votes.sqlite")
    db.execute("CREATE VIEW votes AS SELECT 1")
    db.commit()
    db.close()
    with pytest.raises(ValueError):
        FeedbackStore(tmp_path / "votes.sqlite")
