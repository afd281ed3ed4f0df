"""Files -> prepared data: `python -m data.prepare FILES ... --out=DIR` recognises containers and forms by itself.

    rows of files -> Records -> without duplicates -> train, validation, test -> tokens

Writes out/{train,validation,test} (data/examples.py describes a split), the tokenizer, manifest.json with every count,
rejects.jsonl with every row that was turned away and why, and a data card (card.md, card.json).

The input is cut into units of 64 MB, at borders between rows, and every unit becomes one shard of each split: the bytes do
not depend on the number of processes, memory not on the size of the input, and what was finished before an interruption
is not done again. Two passes: the first hashes all rows, which finds duplicates, the second encodes what stays.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.card import Card, describe
from data.chat import Chat, open_chat
from data.containers import Bad, Container, Duplicate, Piece, cut, find_files, read, save_stdin, sniff, unzip
from data.encoding import Encoder
from data.examples import Encoded, Examples, ShardWriter, check_shard, faults, shard_name, write_json, write_split
from data.fetch import sha256
from data.formats import FORMS, KNOWN, Reader, reader_of
from data.records import Record, pairs_by_score
from data.text import SPLITS
from data.tokenizer import MODEL_FILE, Tokenizer, load_tokenizer, train_sentencepiece

FORMAT = "plain-rlhf data 2"
RECIPE = 1  # counts up when the same source would give other bytes: what was prepared before is then made again
UNIT = 64 << 20  # bytes of input that become one shard
TRAINING_TEXT = 32 << 20  # bytes of training text that a tokenizer of our own is trained on
BUCKETS = 256  # of hashes, one after the other in memory
VOCAB_SIZE = 2048
CONTROL = ("<|im_start|>", "<|im_end|>")  # of ChatML, for a tokenizer of our own
MOST_COLUMNS = 32
MOST_ANSWERS = 64  # of one prompt, where rated rows are joined
KEPT, DUPLICATE, LEAK, NEAR = range(4)  # what becomes of a record after the first pass
TEMPLATE = "template.jinja"


@dataclass(frozen=True)
class Options:
    files: tuple[str, ...]  # paths, globs, directories, "-" for standard input, or the name of a reader in data/
    out: Path
    tokenizer: Path | None = None  # a directory that holds one; None: train one
    vocab_size: int | None = None  # of the one that is trained; None: VOCAB_SIZE, or what the text allows
    form: str = ""  # what every row is; "" recognises
    rename: tuple[tuple[str, str], ...] = ()  # (key, column)
    unit: str = "paragraph"  # of a text: what one row is, paragraph or line
    chat: bool = False  # a text prompt is one message of the user
    template: str = "auto"  # of conversations: auto, none, or a file
    system: str = ""  # system message of conversations without one
    test: tuple[str, ...] = ()  # files that are the test split
    prompt_tokens: int = 0  # so many tokens of a text become its prompt
    near_duplicates: float | None = None  # Jaccard similarity from which two rows are the same
    strict: bool = False  # the first bad row ends the run
    workers: int = 1


@dataclass(frozen=True)
class Part:
    """Some rows, and how they are read: a piece of a file, or all that a reader in data/ has."""

    reader: Reader
    piece: Piece | None = None
    module: str = ""


@dataclass(frozen=True)
class Unit:
    """What becomes one shard."""

    number: int
    parts: tuple[Part, ...]
    size: int  # bytes
    test: bool = False  # from the files of --test


@dataclass(frozen=True)
class Item:
    """A record of a row, or why there is none."""

    file: str
    line: int
    form: str
    record: Record | Bad | Duplicate


def items(unit: Unit) -> Iterator[Item]:
    """All records of a unit in order, and its bad rows; always the same."""
    for part in unit.parts:
        if part.module:
            for number, record in records_of(part.module):
                yield Item(part.module, number, part.module, record)
            continue
        shown = part.piece.container.shown
        for number, row in read(part.piece):
            try:
                form, records = part.reader.records(row)
            except ValueError as e:
                yield Item(shown, number, "", Bad(str(e)))
                continue
            for record in records:
                yield Item(shown, number, form, record)


def named_reader(name: str):
    """The module data/NAME.py if it has records of its own to read, else None."""
    if not name.isidentifier() or importlib.util.find_spec(f"data.{name}") is None:
        return None
    module = importlib.import_module(f"data.{name}")
    return module if hasattr(module, "read_records") else None


@lru_cache(maxsize=1)
def records_of(name: str) -> list:
    return list(named_reader(name).read_records())


def split_of(record: Record, unit: Unit, has_test: bool) -> str:
    """With test files of their own, what would be test is trained on."""
    if unit.test:
        return "test"
    return "train" if has_test and record.split == "test" else record.split


# --- processes ---


def run(function: Callable, jobs: Sequence, workers: int, what: str, sizes: Sequence[int], lock: Path) -> Iterator:
    """function(job) for each of the jobs, in their order, in some processes; a bar of bytes where someone watches."""
    bar = tqdm(total=sum(sizes), unit="B", unit_scale=True, desc=what, leave=False, disable=None)
    with bar, ExitStack() as stack:
        if min(workers, len(jobs)) > 1:
            work = (os.getpid(), lock)
            pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), work_for, work)
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(function, jobs)
        else:
            results = map(function, jobs)
        try:
            for size, result in zip(sizes, results):
                bar.update(size)
                yield result
        except BrokenProcessPool:
            raise ValueError("a process was killed, probably for its memory; use fewer --workers") from None


def work_for(parent: int, lock: Path) -> None:
    """Begins a process that works for another, and ends when that one does, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    global held
    held = open(lock, "w")
    fcntl.flock(held, fcntl.LOCK_SH)  # so that the next run waits until all processes of this one are gone

    def watch():
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def written(file: Path, mode: str = "w") -> Iterator:
    """A file that is there when all of it is."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


# --- the first pass: what is there more than once ---


@dataclass(frozen=True)
class Scan:
    """A unit of the first pass."""

    unit: Unit
    directory: Path
    strict: bool
    has_test: bool


def scan(job: Scan) -> dict:
    """Writes hashes, groups and splits of all records of a unit for `settle`; returns facts on which the run depends."""
    file = job.directory / shard_name(job.unit.number)
    if file.with_suffix(".json").is_file():
        return json.loads(file.with_suffix(".json").read_text())
    hashes, groups, splits = array("Q"), array("Q"), array("B")
    facts, numbers = dict.fromkeys(("conversations", "texts", "answered"), 0), Counter()
    for item in items(job.unit):
        record = item.record
        if not isinstance(record, Record):
            if job.strict and isinstance(record, Bad):
                raise ValueError(f"{item.file}, line {item.line}: {record.reason}")
            continue
        hashes.append(identity(record))
        groups.append(int(record.group, 16))
        splits.append(SPLITS.index(split_of(record, job.unit, job.has_test)))
        facts["conversations"] += not isinstance(record.prompt, str)
        facts["texts"] += not record.prompt
        facts["answered"] += bool(record.answers)
        for name in numeric(record):
            numbers[name] += 1
    hashes = np.array(hashes, np.uint64)
    order = np.argsort(hashes, kind="stable")
    found = {"hash": hashes[order], "place": order.astype(np.uint32), "group": np.array(groups, np.uint64)}
    for name, values in {**found, "split": np.array(splits, np.uint8)}.items():
        with written(file.with_suffix(f".{name}"), "wb") as f:
            f.write(values.tobytes())
    facts = {**facts, "records": len(hashes), "numbers": dict(sorted(numbers.most_common(1000)))}
    with written(file.with_suffix(".json")) as f:
        f.write(json.dumps(facts))
    return facts


def identity(record: Record) -> int:
    """64 bits of what a record says: two with the same are duplicates. Without answers its further columns count too."""
    says = [record.scores, [(pair.winner, pair.loser, pair.p) for pair in record.pairs], [*map(len, record.answers)]]
    says += [] if isinstance(record.prompt, str) else [record.prompt]
    says += [] if record.answers else [record.extra]
    texts = [record.prompt] * isinstance(record.prompt, str) + list(record.answers)
    return hash_of("\n".join([json.dumps(says, sort_keys=True), *texts]))


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def numeric(record: Record) -> list[str]:
    """Its further columns that are a number: they are kept beside the scores."""
    if not record.answers:
        return []
    return [n for n, v in record.extra.items() if isinstance(v, int | float) and not isinstance(v, bool)]


def mapped(file: Path, dtype: str) -> np.ndarray:
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)


def settle(directory: Path, units: Sequence[Unit]) -> Counter:
    """Decides which records stay -> 00000.fate, a byte for each record. Returns how many of each (split, fate).

    A record of a group that the test files have is a leak. Of records with the same hash the first one stays.
    """
    files = [directory / shard_name(unit.number) for unit in units]
    hashes, groups, splits = (
        [mapped(file.with_suffix(f".{name}"), dtype) for file in files]
        for name, dtype in (("hash", "<u8"), ("group", "<u8"), ("split", "u1"))
    )
    fates = [np.zeros(len(group), np.uint8) for group in groups]
    held_out = np.unique(np.concatenate([g for g, unit in zip(groups, units) if unit.test] or [np.zeros(0, np.uint64)]))
    for unit, group, fate in zip(units, groups, fates):
        if len(held_out) and not unit.test:
            fate[np.isin(group, held_out)] = LEAK
    borders = np.arange(1, BUCKETS, dtype=np.uint64) << np.uint64(64 - 8)
    cuts = [np.concatenate([[0], np.searchsorted(h, borders), [len(h)]]) for h in hashes]
    for bucket in range(BUCKETS):
        seen = []  # (hash, unit, place) of this bucket, in order of unit and place among equal hashes
        for number, (file, h, c, fate) in enumerate(zip(files, hashes, cuts, fates)):
            part = slice(c[bucket], c[bucket + 1])
            place = mapped(file.with_suffix(".place"), "<u4")[part]
            stays = fate[place] == KEPT
            seen.append((h[part][stays], np.full(stays.sum(), number), place[stays]))
        h, number, place = (np.concatenate(column) for column in zip(*seen))
        order = np.argsort(h, kind="stable")
        again = order[1:][h[order][1:] == h[order][:-1]]
        for n in np.unique(number[again]):
            fates[n][place[again][number[again] == n]] = DUPLICATE
    counts = Counter()
    for file, fate, split in zip(files, fates, splits):
        with written(file.with_suffix(".fate"), "wb") as f:
            f.write(fate.tobytes())
        for s, name in enumerate(SPLITS):
            counts.update(
                {(name, kind): int(((fate == kind) & (split == s)).sum()) for kind in (KEPT, DUPLICATE, LEAK)}
            )
    return counts


def fates_of(directory: Path, unit: Unit) -> np.ndarray:
    return np.fromfile((directory / shard_name(unit.number)).with_suffix(".fate"), np.uint8)


def groups_of(directory: Path, unit: Unit) -> np.ndarray:
    return np.fromfile((directory / shard_name(unit.number)).with_suffix(".group"), np.uint64)


def kept_records(directory: Path, units: Sequence[Unit]) -> Iterator[tuple[Unit, int, Record]]:
    """(unit, place, record) of the records that stay, one after the other."""
    for unit in units:
        fates = fates_of(directory, unit)
        records = (item.record for item in items(unit) if isinstance(item.record, Record))
        for place, (fate, record) in enumerate(zip(fates, records)):
            if fate == KEPT:
                yield unit, place, record


def find_near_duplicates(directory: Path, units: Sequence[Unit], threshold: float) -> None:
    """Marks records whose 5-word shingles are like those of an earlier one (MinHash, Broder 1997), Jaccard from `threshold`.

    In one process, with all signatures in memory: for up to some 10 M records.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise ValueError("--near_duplicates needs datasketch: pip install datasketch") from None
    index, near = MinHashLSH(threshold=threshold, num_perm=128), {}
    progress = tqdm(kept_records(directory, units), desc="near-duplicates", unit=" records", leave=False, disable=None)
    for unit, place, record in progress:
        words = re.findall(r"\w+", " ".join(texts_of(record)).casefold())
        shingles = {" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))}
        signature = MinHash(num_perm=128, seed=1)
        signature.update_batch(sorted(shingles))
        if any(signature.jaccard(index_of) >= threshold for index_of in map(near.get, index.query(signature))):
            fates = near.setdefault(("fates", unit.number), fates_of(directory, unit))
            fates[place] = NEAR
        else:
            name = (unit.number, place)
            near[name] = signature
            index.insert(name, signature)
    for unit in units:
        if ("fates", unit.number) in near:
            with written((directory / shard_name(unit.number)).with_suffix(".fate"), "wb") as f:
                f.write(near["fates", unit.number].tobytes())


def texts_of(record: Record) -> list[str]:
    """All texts of a record; what a tokenizer is trained on."""
    if isinstance(record.prompt, str):
        return [record.prompt + answer for answer in record.answers] or [record.prompt]
    return [message["content"] for message in record.prompt] + list(record.answers)


def training_texts(directory: Path, units: Sequence[Unit], has_test: bool) -> Iterator[str]:
    """Texts of the training split in order, about TRAINING_TEXT bytes of them."""
    size = 0
    for unit, _, record in kept_records(directory, units):
        if split_of(record, unit, has_test) == "train":
            for text in texts_of(record):
                yield text
                size += len(text.encode())
            if size > TRAINING_TEXT:
                return


# --- the second pass: tokens ---


@dataclass(frozen=True)
class Encode:
    """A unit of the second pass."""

    unit: Unit
    scanned: Path  # what the first pass found
    notes: Path  # rejects, card and prompts of the unit
    data: Path  # where the splits are
    shards: tuple[tuple[str, int], ...]  # (split, number) of the shards that become of it
    recipe: str
    template: str | None  # sha256
    columns: tuple[str, ...]
    prompt_tokens: int
    strict: bool
    has_test: bool

    def directories(self) -> dict[str, Path]:
        return {split: self.data / split / shard_name(number) for split, number in self.shards}


@lru_cache(maxsize=1)
def encoder_of(data: Path, template: str | None, prompt_tokens: int) -> Encoder:
    """What prepared data is encoded with, from its files; once per process."""
    tokenizer = load_tokenizer(data)
    chat = Chat(tokenizer, (data / TEMPLATE).read_text("utf-8")) if template else None
    return Encoder(tokenizer, chat, prompt_tokens)


def encode(job: Encode) -> None:
    """Writes the shards of a unit, its rejects, its part of the card, and the hashes of its prompts; whole ones stay."""
    note = job.notes / shard_name(job.unit.number)
    made = {"recipe": job.recipe, "unit": job.unit.number}
    if note.with_suffix(".json").is_file() and all(is_whole(d, made) for d in job.directories().values()):
        return
    note.with_suffix(".json").unlink(missing_ok=True)
    for directory in job.directories().values():
        shutil.rmtree(directory, ignore_errors=True)
    encoder = encoder_of(job.data, job.template, job.prompt_tokens)
    card, prompts = Card(), {split: set() for split, _ in job.shards}
    fates, groups = iter(fates_of(job.scanned, job.unit)), iter(groups_of(job.scanned, job.unit))
    with ExitStack() as stack:
        rejects = stack.enter_context(written(note.with_suffix(".rejects")))
        shards = {
            split: stack.enter_context(ShardWriter(directory, encoder.tokenizer, job.template, job.columns, made))
            for split, directory in job.directories().items()
        }

        def keep(split: str, encoded: Encoded) -> None:
            shards[split].add_checked(encoded)
            card.add(split, encoded)
            if encoded.record.prompt:
                prompts[split].add(hash_of(json.dumps(encoded.record.prompt)))

        joined = Joined(keep)
        for item in items(job.unit):
            outcome = item.record
            fate = KEPT
            if isinstance(outcome, Record):
                fate, outcome = next(fates), replace(outcome, group=f"{next(groups):016x}")
            card.read(item.form)
            if fate in (DUPLICATE, NEAR) or isinstance(outcome, Duplicate):
                card.duplicate("near" if fate == NEAR else "exact")
                continue
            if fate == LEAK:
                outcome = Bad("its prompt is in the test file")
            if isinstance(outcome, Record):
                split = split_of(outcome, job.unit, job.has_test)
                outcome = encoded_or_bad(encoder, outcome)
            if isinstance(outcome, Bad):
                if job.strict:
                    raise ValueError(f"{item.file}, line {item.line}: {outcome.reason}")
                card.reject(outcome.reason)
                row = {"file": item.file, "line": item.line, "reason": outcome.reason}
                rejects.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                card.keep(split)
                joined.add(split, outcome, rated=item.form in ("rating", "thumbs"))
        joined.flush()
    for split, found in prompts.items():
        with written(note.with_suffix(f".{split}"), "wb") as f:
            f.write(np.sort(np.array(list(found), np.uint64)).tobytes())
    with written(note.with_suffix(".json")) as f:
        f.write(json.dumps(card.to_json()))


def is_whole(directory: Path, made: dict) -> bool:
    try:
        return check_shard(directory, verify=True)["made"] == made
    except (ValueError, OSError):
        return False


def encoded_or_bad(encoder: Encoder, record: Record) -> Encoded | Bad:
    try:
        encoded = encoder.encode(record)
    except ValueError as e:
        return Bad(" ".join(str(e).split()))
    fault = faults(encoded, encoder.tokenizer.vocab_size)
    return Bad(f"in tokens it {fault}") if fault else encoded


class Joined:
    """Joins rated answers that stand one after another and have one prompt, so that pairs can be made of them.

    keep(split, encoded) gets every record. Columns in which the answers differ become lists, one value an answer.
    """

    def __init__(self, keep: Callable[[str, Encoded], None]):
        self.keep, self.split, self.waiting = keep, "", []

    def add(self, split: str, encoded: Encoded, rated: bool) -> None:
        record, first = encoded.record, self.waiting[0].record if self.waiting else None
        fits = first and rated and split == self.split and len(self.waiting) < MOST_ANSWERS
        if not (fits and record.prompt == first.prompt and record.source == first.source):
            self.flush()
        self.split = split
        self.waiting.append(encoded)
        if not rated or not record.prompt:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            self.keep(self.split, join(self.waiting) if len(self.waiting) > 1 else self.waiting[0])
        self.waiting = []


def join(several: list[Encoded]) -> Encoded:
    records, first = [encoded.record for encoded in several], several[0]
    answers, scores, extra = (), (), {}
    for record in records:
        answers, scores = answers + record.answers, scores + record.scores
    for name in {name: None for record in records for name in record.extra}:
        values = [record.extra.get(name) for record in records]
        extra[name] = values[0] if all(value == values[0] for value in values) else values
    ids = [answer for encoded in several for answer in encoded.answers]
    pairs = pairs_by_score([np.asarray(answer).tobytes() for answer in ids], scores)  # of different tokens
    record = replace(first.record, answers=answers, scores=scores, extra=extra, pairs=pairs)
    return Encoded(first.prompt, ids, first.prompt_loss, record)


def distinct(files: Sequence[Path]) -> int:
    """How many different hashes there are in sorted files of them."""
    hashes = [mapped(file, "<u8") for file in files]
    borders = np.arange(1, BUCKETS, dtype=np.uint64) << np.uint64(64 - 8)
    cuts = [np.concatenate([[0], np.searchsorted(h, borders), [len(h)]]) for h in hashes]
    return sum(
        len(np.unique(np.concatenate([h[c[bucket] : c[bucket + 1]] for h, c in zip(hashes, cuts)])))
        for bucket in range(BUCKETS)
    )


# --- the whole ---


def prepare(options: Options) -> dict:
    """Prepares data in options.out and returns its manifest. ValueError, in one line, where the input or an option is wrong."""
    out = options.out.resolve()  # through a symbolic link
    check_out(out)
    tokenizer, chat = open_tokenizer(options)
    with working(out) as work:
        modules, files = open_inputs(options, work)
        recipe = recipe_of(options, modules, files, tokenizer, chat)
        if made_like(out) == recipe:
            print(f"{options.out} is already prepared in this way: nothing to do")
            shutil.rmtree(work)
            return json.loads((out / "manifest.json").read_text())
        if out.exists() and any(out.iterdir()):
            print(f"{options.out} was prepared in another way or is damaged: making it again")
        data = build(options, work, units_of(modules, files), recipe, tokenizer, chat)
        shutil.rmtree(work / "old", ignore_errors=True)
        if out.exists():
            os.replace(out, work / "old")
        os.replace(data, out)
        shutil.rmtree(work)
    return json.loads((out / "manifest.json").read_text())


def check_out(out: Path) -> None:
    """ValueError where something else than prepared data is in the way."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return
    try:
        ours = str(json.loads((out / "manifest.json").read_text())["format"]).startswith("plain-rlhf ")
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise ValueError(f"{out} exists and is not prepared data; choose another --out or remove it")


def made_like(out: Path) -> dict | None:
    """The recipe of finished data whose files are all there."""
    try:
        manifest = json.loads((out / "manifest.json").read_text())
        whole = all((out / name).stat().st_size == size for name, size in manifest["files"].items())
        if manifest["format"] != FORMAT or not whole:
            return None
        for split in SPLITS:
            Examples(out / split)  # looks at the sizes of all its files
        return manifest["made"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextmanager
def working(out: Path) -> Iterator[Path]:
    """The directory beside `out` in which it is made, one run at a time; after an interruption it stays to be gone on with."""
    work = out.with_name(f".{out.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with open(work / "lock", "w") as lock, open(work / "processes", "w") as processes:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Busy(f"{out} is being prepared by another process; wait for it") from None
            fcntl.flock(processes, fcntl.LOCK_EX)  # those of a run that was killed
            fcntl.flock(processes, fcntl.LOCK_UN)
            yield work
    except Busy:
        raise
    except ValueError:  # the same input would end in the same way
        shutil.rmtree(work, ignore_errors=True)
        raise
    except OSError as e:
        raise OSError(f"cannot write {out}: {e.strerror or e}") from None


class Busy(ValueError):
    """Somebody else is at work there."""


def open_inputs(options: Options, work: Path) -> tuple[list[str], list[tuple[Container, Reader, bool]]]:
    """Names of readers in data/; and files, how each is read, and whether it is of --test. Says what was recognised."""
    inputs = work / "inputs"
    shutil.rmtree(inputs, ignore_errors=True)
    inputs.mkdir()
    modules = [name for name in options.files if named_reader(name)]
    files = [(path, False) for path in find_files(name for name in options.files if name not in modules)]
    files += [(path, True) for path in find_files(options.test)]
    twice = {path.resolve() for path, test in files if test} & {path.resolve() for path, test in files if not test}
    if twice:
        raise ValueError(f"{min(twice)} is to be trained on and is a file of --test too")
    known = KNOWN | {column for _, column in options.rename}
    found = []
    for number, (path, test) in enumerate(files):
        shown = "standard input" if str(path) == "-" else str(path)
        if str(path) == "-":
            path = save_stdin(inputs / "stdin")
        container = sniff(path, known, options.unit, shown)
        if not container.plain and (container.kind == "parquet" or path.stat().st_size > UNIT // 16):
            container = unzip(container, inputs / f"{number}")  # to be cut
        reader = file_reader(container, options)
        known_as = FORMS[reader.form].what + f" ({reader.form})" if reader.form else "no known form in its first rows"
        print(f"{shown}: {container}, {known_as}", flush=True)
        found.append((container, reader, test))
    return modules, found


def file_reader(container: Container, options: Options) -> Reader:
    stem = "stdin" if container.shown == "standard input" else Path(container.shown).name.split(".")[0]
    more = {"chat": options.chat, "system": options.system, "source": stem}
    if options.form:
        return Reader(options.form, fixed=True, rename=options.rename, **more)
    return reader_of((row for _, row in islice(read(Piece(container)), 100)), options.rename, **more)


def units_of(modules: list[str], files: list[tuple[Container, Reader, bool]]) -> list[Unit]:
    """The input in units of about UNIT bytes, several small files in one; first what is trained on, then --test."""
    units = [((Part(Reader(), module=name),), 1, False) for name in modules]
    for test in (False, True):
        parts, size = [], 0
        for container, reader, of_test in files:
            if of_test is not test:
                continue
            total = container.path.stat().st_size
            pieces = cut(container, UNIT) if total > UNIT and container.plain else [Piece(container)]
            for piece in pieces:
                share = total // max(1, len(pieces))
                if parts and size + share > UNIT:
                    units.append((tuple(parts), size, test))
                    parts, size = [], 0
                parts.append(Part(reader, piece))
                size += share
        if parts:
            units.append((tuple(parts), size, test))
    return [Unit(number, *unit) for number, unit in enumerate(units)]


def recipe_of(
    options: Options, modules: list[str], files: list, tokenizer: Tokenizer | None, chat: Chat | None
) -> dict:
    """What the bytes of the prepared data depend on, in JSON values."""
    inputs = [{"file": name, "kind": "a reader of its own", **named_reader(name).recipe()} for name in modules]
    for container, reader, test in files:
        inputs.append(
            {
                "file": container.shown,
                "kind": str(container) + (", " + reader.form) * bool(reader.form) + ", test" * test,
                "sha256": sha256(container.path),
            }
        )
    settings = ("form", "rename", "unit", "chat", "system", "prompt_tokens", "near_duplicates")
    recipe = {
        "by": "python -m data.prepare",
        "recipe": RECIPE,
        "inputs": inputs,
        **{name: getattr(options, name) for name in settings if getattr(options, name)},
        **({"tokenizer": tokenizer.fingerprint} if tokenizer else {"vocab_size": options.vocab_size}),
        "template": chat.sha256 if chat else options.template,
        "unit_bytes": UNIT,
    }
    return json.loads(json.dumps(recipe))  # lists, as they are read back


def begin(work: Path, recipe: dict) -> str:
    """Keeps what an interrupted run with this recipe has finished, and nothing else; the recipe's sha256."""
    text = json.dumps(recipe, sort_keys=True)
    try:
        before = (work / "recipe.json").read_text()
    except OSError:
        before = ""
    if before != text:
        for name in ("scan", "notes", "data"):
            shutil.rmtree(work / name, ignore_errors=True)
        with written(work / "recipe.json") as f:
            f.write(text)
    elif (work / "data").exists():
        print("going on with what was prepared before the interruption", flush=True)
    for name in ("scan", "notes", "data"):
        (work / name).mkdir(exist_ok=True)
    return hashlib.sha256(text.encode()).hexdigest()


def build(options: Options, work: Path, units: list[Unit], recipe: dict, tokenizer, chat) -> Path:
    """Both passes; returns the directory with everything in it."""
    digest, has_test = begin(work, recipe), bool(options.test)
    scanned, notes, data, sizes = work / "scan", work / "notes", work / "data", [unit.size for unit in units]
    jobs = [Scan(unit, scanned, options.strict, has_test) for unit in units]
    facts, numbers = Counter(), Counter()
    for found in run(scan, jobs, options.workers, "reading", sizes, work / "processes"):
        numbers.update(found.pop("numbers"))
        facts.update(found)
    check_facts(options, facts, units)
    fates = settle(scanned, units)
    if not fates["train", KEPT]:
        raise ValueError(
            f"none of the {sum(fates.values()):,} rows that can be read falls into the training split; use more rows"
        )
    if options.near_duplicates:
        find_near_duplicates(scanned, units, options.near_duplicates)
    if chat and options.template == "auto" and not facts["conversations"] and facts["texts"] < facts["records"]:
        print("prompts stay plain texts; for a chat model, --chat=true makes each one message of the user", flush=True)
    chat = make_tokenizer(
        options, data, training_texts(scanned, units, has_test), bool(facts["conversations"]), tokenizer, chat
    )
    columns = sorted(n for n, count in numbers.most_common(MOST_COLUMNS) if count * 10 >= facts["answered"])
    of_split = {split: [unit for unit in units if splits_of(unit, has_test)[split]] for split in SPLITS}
    jobs = [
        Encode(
            unit=unit,
            scanned=scanned,
            notes=notes,
            data=data,
            shards=tuple((split, of_split[split].index(unit)) for split in SPLITS if unit in of_split[split]),
            recipe=digest,
            template=chat and chat.sha256,
            columns=tuple(columns),
            prompt_tokens=options.prompt_tokens,
            strict=options.strict,
            has_test=has_test,
        )
        for unit in units
    ]
    for split in SPLITS:
        for leftover in (data / split).glob(".*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    for _ in run(encode, jobs, options.workers, "encoding", sizes, work / "processes"):
        pass
    for module in {part.module for unit in units for part in unit.parts} - {""}:
        named_reader(module).write_beside(data)
    finish(options, data, notes, units, of_split, recipe, chat)
    return data


def splits_of(unit: Unit, has_test: bool) -> dict[str, bool]:
    """Which splits a unit has a shard of."""
    return {"train": not unit.test, "validation": not unit.test, "test": unit.test or not has_test}


def check_facts(options: Options, facts: Counter, units: list[Unit]) -> None:
    """ValueError where nothing can be used, or an option has no effect."""
    if not facts["records"]:
        bad = next((item for unit in units for item in items(unit)), None)
        where = f"{bad.file}, line {bad.line}: {bad.record.reason}" if bad else "there is no row"
        raise ValueError(f"no row of {', '.join(options.files)} can be used; {where}")
    for name, shown in (("chat", "true"), ("system", options.system), ("template", options.template)):
        if getattr(options, name) and (name, shown) not in (("template", "auto"), ("template", "none")):
            if not facts["conversations"]:
                raise ValueError(f"--{name}={shown} has no effect: there is no conversation (plain texts: --chat=true)")
    if options.prompt_tokens and not facts["texts"]:
        raise ValueError(f"--prompt_tokens={options.prompt_tokens} has no effect: every row has a prompt of its own")


def open_tokenizer(options: Options) -> tuple[Tokenizer | None, Chat | None]:
    """The tokenizer that was given and its template, None where it has none (or none is wanted)."""
    if options.tokenizer is None:
        return None, None
    if not options.tokenizer.is_dir():
        raise ValueError(
            f"no tokenizer at {options.tokenizer}: give the directory of a model, a run or prepared data; of a GGUF file or a "
            f"model's name one is made by python export.py --init={options.tokenizer} --out=DIRECTORY"
        )
    tokenizer = load_tokenizer(options.tokenizer)
    lacking = options.template == "auto" and not tokenizer.chat_template and "<|im_start|>" not in tokenizer.control
    return tokenizer, None if lacking else open_chat(tokenizer, options.template, options.system or None)


def make_tokenizer(options, data: Path, texts: Iterator[str], conversations: bool, tokenizer, chat) -> Chat | None:
    """Writes data/tokenizer and, where there are conversations, data/template.jinja; returns what renders these."""
    home = data / "tokenizer"
    if tokenizer:
        if conversations and chat is None and options.template == "auto":
            raise ValueError(
                f"{options.tokenizer} has no chat template, and there are conversations: give --template=FILE, or "
                "--template=none to write them as plain text"
            )
        tokenizer.save(home)
    elif not home.exists():
        made = data / ".tokenizer"
        shutil.rmtree(made, ignore_errors=True)
        train_tokenizer(list(texts), made / MODEL_FILE, options.vocab_size, CONTROL if conversations else ())
        os.replace(made, home)
    if not conversations or options.template == "none":
        return None
    chat = chat or open_chat(load_tokenizer(data), options.template, options.system or None)
    with written(data / TEMPLATE) as f:
        f.write(chat.source)
    return chat


def train_tokenizer(texts: list[str], file: Path, vocab_size: int | None, control: Sequence[str]) -> None:
    """One of `vocab_size` pieces; without a size, of 2,048 or as many as the texts have."""
    try:
        train_sentencepiece(texts, file, vocab_size or VOCAB_SIZE, control)
    except ValueError as e:
        most = re.search(r"<= (\d+)", str(e))
        if vocab_size or not most:
            raise
        print(f"the tokenizer has {most[1]} pieces: there is not enough text for {VOCAB_SIZE}", flush=True)
        train_sentencepiece(texts, file, int(most[1]), control)


def finish(options, data: Path, notes: Path, units, of_split, recipe: dict, chat: Chat | None) -> None:
    """Joins what the units left: manifests, rejects, the card."""
    names = [notes / shard_name(unit.number) for unit in units]
    card = Card()
    for name in names:
        card.update(json.loads(name.with_suffix(".json").read_text()))
    with written(data / "rejects.jsonl", "wb") as f:
        for name in names:
            with open(name.with_suffix(".rejects"), "rb") as rejects:
                shutil.copyfileobj(rejects, f)
    prompts = {
        split: distinct([(notes / shard_name(unit.number)).with_suffix(f".{split}") for unit in of_split[split]])
        for split in SPLITS
    }
    splits = {split: write_split(data / split, {"by": recipe["by"]}) for split in SPLITS}
    summary = card.summary(prompts)
    write_json(data / "card.json", summary)
    with written(data / "card.md") as f:
        f.write(describe(options.out.name, summary, recipe["inputs"]))
    files = sorted(
        f for f in data.rglob("*") if f.is_file() and not (f.parent.name.isdecimal() and f.parent.parent.parent == data)
    )
    manifest = {
        "format": FORMAT,
        "made": recipe,
        "rows": summary["rows"],
        "splits": {
            split: {name: summary["splits"][split][name] for name in ("rows", "prompts", "answers", "pairs", "tokens")}
            for split in SPLITS
        },
        "tokenizer": splits["train"]["tokenizer"]["fingerprint"],
        "template": chat and chat.sha256,
        "files": {str(f.relative_to(data)): f.stat().st_size for f in files},
    }
    write_json(data / "manifest.json", manifest)


# --- the command ---


def report(out: Path, manifest: dict) -> None:
    """Prints every count of the manifest."""
    rows, columns = manifest["rows"], ("rows", "prompts", "answers", "pairs", "tokens")
    print(" ".join(["split".ljust(10), *(name.rjust(12) for name in columns)]))
    for split, counts in manifest["splits"].items():
        print(" ".join([split.ljust(10), *(f"{counts[name]:,}".rjust(12) for name in columns)]))
    print("{read:,} rows read = {kept:,} kept + {rejected:,} rejected + {duplicates:,} duplicates".format(**rows))
    if rows["rejected"]:
        reasons = json.loads((out / "card.json").read_text())["rejected"]
        for reason, count in list(reasons.items())[:5]:
            print(f"  rejected {count:,}: {reason}")
        print(f"  each of them with its line and its reason: {out / 'rejects.jsonl'}")
    print(f"wrote {out}; what is in there: {out / 'card.md'}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}; see --help")


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def renaming(text: str) -> tuple[str, str]:
    key, equals, column = text.partition("=")
    if not (key and equals and column):
        raise argparse.ArgumentTypeError(f"{text!r} is no key=column")
    return key, column


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def similarity(text: str) -> float:
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def options_of(argv: Sequence[str] | None) -> Options:
    parser = _Parser(prog="python -m data.prepare", description="Makes token files of any data.", allow_abbrev=False)
    add = parser.add_argument
    add("files", nargs="+", help="files, globs, directories, - for standard input; or the name of a reader in data/")
    add("--out", type=Path, help="directory to write (out/data/NAME, after the first file)")
    add("--tokenizer", type=Path, help="use this tokenizer (a directory that holds one) and train none")
    add("--vocab_size", type=at_least_one, help=f"pieces of the tokenizer that is trained otherwise ({VOCAB_SIZE})")
    add("--format", dest="form", choices=list(FORMS), metavar="FORM", help="what every row is (%(choices)s)")
    add(
        "--map",
        dest="rename",
        type=renaming,
        action="append",
        metavar="KEY=COLUMN",
        help="read this column as this key",
    )
    add(
        "--unit", choices=["paragraph", "line"], default="paragraph", help="what a row of a plain text is (%(default)s)"
    )
    add(
        "--chat", type=boolean, default=False, metavar="true", help="a prompt that is a text is one message of the user"
    )
    add(
        "--template",
        default="auto",
        help="for conversations: auto (the tokenizer's own), none, or a file (%(default)s)",
    )
    add("--system", default="", help="system message of conversations that bring none")
    add(
        "--test",
        action="append",
        default=[],
        metavar="FILE",
        help="the test split; its prompts leave the training split",
    )
    add("--prompt_tokens", type=at_least_one, default=0, help="so many tokens of a text become its prompt (none)")
    add(
        "--near_duplicates",
        type=similarity,
        metavar="JACCARD",
        help="drop rows this similar to an earlier one, e.g. 0.8",
    )
    add("--strict", type=boolean, default=False, metavar="true", help="the first bad row ends the run")
    add("--workers", type=at_least_one, default=os.cpu_count() or 1, help="processes (%(default)s)")
    args = parser.parse_args(argv)
    if args.tokenizer and args.vocab_size:
        raise ValueError("--vocab_size has no effect with --tokenizer: that one is trained already")
    stem = Path(args.files[0]).name.split(".")[0] or "stdin"
    found = vars(args) | {"files": tuple(args.files), "rename": tuple(args.rename or ()), "test": tuple(args.test)}
    return Options(
        **found | {"form": args.form or "", "out": args.out or Path("out/data") / stem.replace("-", "stdin")}
    )


def main(argv: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    options = options_of(argv)
    report(options.out, prepare(options))
    print(f"{time.perf_counter() - started:.1f} s")


def command() -> None:
    """`main`, with every expected mistake as one line and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as e:
        named = isinstance(e, OSError) and e.filename is not None
        message = f"{e.filename}: {e.strerror}" if named else " ".join(str(e).split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what is finished", file=sys.stderr)
        sys.exit(130)
