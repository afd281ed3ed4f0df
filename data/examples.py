"""Token file 2: prompts and their answers on disk, written and read here. A split is a directory of shards.

train/manifest.json   counts of every shard, sources, columns, tokenizer, template, sha256 of the shards' manifests
train/00000/          one shard; prompt i of it is record i, and its answers and pairs stand together, in order
    prompts.bin, prompt_offsets.bin    tokens: start token, history, generation prompt       uint16, or uint32 from 65,536
                                       prompt i is prompts[o[i]:o[i + 1]]                    int64, prompts + 1
    prompt_loss.bin                    1 where the assistant wrote the token                 uint8 a prompt token
    answers.bin, answer_offsets.bin    each ends with the token that stops the policy
    answer_prompt.bin                  which prompt of the shard                             int64 an answer
    score.bin, column_0.bin ...        NaN where there is none; names in the manifest        float64 an answer
    source.bin, group.bin              number of the source's name; records that belong together    uint16, uint64 a prompt
    winner.bin, loser.bin              two answers of the shard                              int64 a pair
    p.bin, gap.bin, weight.bin         see data.records.Pair                                 float64 a pair
    records.jsonl, record_offsets.bin  the record as it was read                             int64, prompts + 1
    manifest.json                      counts, dtypes, sha256 of every file, how it was made

Everything is little-endian; what would be empty has no file (no scores, no pairs, no trained history). A row is a prompt
and one of its answers, encoded apart, as a policy continues a prompt.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.fetch import sha256
from data.records import Record
from data.tokenizer import Tokenizer

FORMAT = "plain-rlhf examples 2"
COUNTS = ("prompts", "prompt_tokens", "prompt_loss", "answers", "answer_tokens", "scores", "pairs", "record_bytes")
BUFFER = 1 << 16  # items of a file that wait in memory while a shard is written
NONE = np.zeros(0, np.int64)
MOST_MAPPED = 512  # files that are mapped at a time: a process may have 1,024 open


@dataclass(frozen=True)
class Encoded:
    """A record in tokens: the prompt up to where the assistant begins, and each answer with the token that ends it."""

    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]
    prompt_loss: Sequence[bool] | None  # per token of the prompt: did the assistant write it; None = none of them
    record: Record


FILES = {  # of a shard: dtype ("" = of a token), how many items, see COUNTS, and how many more
    "prompts.bin": ("", "prompt_tokens", 0),
    "prompt_offsets.bin": ("<i8", "prompts", 1),
    "prompt_loss.bin": ("|u1", "prompt_loss", 0),
    "answers.bin": ("", "answer_tokens", 0),
    "answer_offsets.bin": ("<i8", "answers", 1),
    "answer_prompt.bin": ("<i8", "answers", 0),
    "score.bin": ("<f8", "scores", 0),
    "source.bin": ("<u2", "prompts", 0),
    "group.bin": ("<u8", "prompts", 0),
    "winner.bin": ("<i8", "pairs", 0),
    "loser.bin": ("<i8", "pairs", 0),
    "p.bin": ("<f8", "pairs", 0),
    "gap.bin": ("<f8", "pairs", 0),
    "weight.bin": ("<f8", "pairs", 0),
    "records.jsonl": ("|u1", "record_bytes", 0),
    "record_offsets.bin": ("<i8", "prompts", 1),
}
COLUMN = ("<f8", "answers", 0)  # of every column_0.bin ...


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size < 2**16 else "<u4"


def layout(counts: dict[str, int], vocab_size: int, columns: int) -> dict[str, tuple[str, int]]:
    """The files of a shard: name -> dtype and number of items. A file without items is not there."""
    files = FILES | {f"column_{i}.bin": COLUMN for i in range(columns)}
    token = token_dtype(vocab_size)
    return {name: (dtype or token, counts[count] + more) for name, (dtype, count, more) in files.items()}


# --- writing ---


class _File:
    """A file of items of one dtype, written as they come."""

    def __init__(self, path: Path, dtype: str):
        self.path, self.dtype, self.length = path, np.dtype(dtype), 0
        self._waiting, self._file = [], None

    def extend(self, items: Iterable) -> None:
        self._waiting.extend(items)
        if len(self._waiting) >= BUFFER:
            self._flush()

    def append(self, item) -> None:
        self._waiting.append(item)
        if len(self._waiting) >= BUFFER:
            self._flush()

    def write(self, items: Sequence[int]) -> None:
        """Many at a time; a file that is written in this way has nothing waiting."""
        self.write_bytes(np.asarray(items).astype(self.dtype).tobytes())

    def write_bytes(self, items: bytes) -> None:
        if items and self._file is None:
            self._file = open(self.path, "wb")
        if items:
            self._file.write(items)
            self.length += len(items) // self.dtype.itemsize

    def _flush(self) -> None:
        self.write_bytes(np.array(self._waiting, self.dtype).tobytes())
        self._waiting = []

    def close(self) -> None:
        self._flush()
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __len__(self) -> int:
        return self.length + len(self._waiting)


class ShardWriter:
    """Writes one shard, record by record, in the memory of a few; nothing is at `directory` before all of it is.

        with ShardWriter(out / "train" / "00000", tokenizer, template) as shard:
            shard.add(encoded)
        shard.manifest

    template: sha256 of the chat template that the prompts were rendered with, None for plain text. columns: numbers among
    the records' extra columns (one for all answers, or a list of one each) to keep beside the scores; the same in all shards
    of a split. made: how, in JSON values, for whoever resumes. The same input gives the same bytes. A block that fails or is
    killed leaves nothing, or a directory whose name begins with a point.
    """

    def __init__(
        self,
        directory: str | Path,
        tokenizer: Tokenizer,
        template: str | None = None,
        columns: Sequence[str] = (),
        made: dict | None = None,
    ):
        self.directory, self.tokenizer, self.columns = Path(directory), tokenizer, list(columns)
        self.template, self.made, self.sources, self.manifest = template, made or {}, {}, {}
        self.pairs = self.answers = self.prompts = 0
        self.labels = True  # is every score so far 0 or 1?

    def __enter__(self) -> ShardWriter:
        if self.directory.exists():
            raise ValueError(f"{self.directory} is there already: remove it, or write another shard")
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self._work = Path(tempfile.mkdtemp(prefix=f".{self.directory.name}.", dir=self.directory.parent))
        self._work.chmod(0o755)  # mkdtemp makes it private
        dtypes = layout(dict.fromkeys(COUNTS, 0), self.tokenizer.vocab_size, len(self.columns))
        self._files = {name: _File(self._work / name, dtype) for name, (dtype, _) in dtypes.items()}
        for name in ("prompt_offsets.bin", "answer_offsets.bin", "record_offsets.bin"):
            self._files[name].extend([0])
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            for file in self._files.values():
                file.close()
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._work, ignore_errors=True)  # gone already, if it took its place

    def add(self, encoded: Encoded) -> None:
        """ValueError if the tokens do not fit the record: see `faults`, which a reader of strange data asks first."""
        if found := faults(encoded, self.tokenizer.vocab_size):
            raise ValueError(f"record {self.prompts} of {self.directory} {found}")
        self.add_checked(encoded)

    def add_checked(self, encoded: Encoded) -> None:
        """`add` for who has asked `faults`."""
        record, files, count = encoded.record, self._files, len(encoded.answers)
        if encoded.prompt_loss is not None and any(encoded.prompt_loss):
            missing = len(files["prompts.bin"]) - len(files["prompt_loss.bin"])
            files["prompt_loss.bin"].write_bytes(bytes(missing))  # of the records before, which had none
            files["prompt_loss.bin"].write(encoded.prompt_loss)
        elif len(files["prompt_loss.bin"]):
            files["prompt_loss.bin"].write_bytes(bytes(len(encoded.prompt)))
        files["prompts.bin"].write(encoded.prompt)
        files["prompt_offsets.bin"].append(files["prompts.bin"].length)
        files["source.bin"].append(self._source(record.source))
        files["group.bin"].append(int(record.group, 16))
        for answer in encoded.answers:
            files["answers.bin"].write(answer)
            files["answer_offsets.bin"].append(files["answers.bin"].length)
            files["answer_prompt.bin"].append(self.prompts)
        if record.scores:
            missing = self.answers - len(files["score.bin"])
            files["score.bin"].extend([np.nan] * missing + list(record.scores))
            self.labels &= all(score in (0, 1) for score in record.scores)
        elif len(files["score.bin"]):
            files["score.bin"].extend([np.nan] * count)
        for i, name in enumerate(self.columns):
            files[f"column_{i}.bin"].extend(numbers(record.extra.get(name), count))
        if record.pairs:
            for name in ("winner", "loser"):
                files[f"{name}.bin"].extend(self.answers + getattr(pair, name) for pair in record.pairs)
            for name in ("p", "gap", "weight"):
                files[f"{name}.bin"].extend(getattr(pair, name) for pair in record.pairs)
        files["records.jsonl"].write_bytes(json_line(record.to_json()))
        files["record_offsets.bin"].append(files["records.jsonl"].length)
        self.prompts, self.answers, self.pairs = self.prompts + 1, self.answers + count, self.pairs + len(record.pairs)

    def _source(self, name: str) -> int:
        if len(self.sources) == 2**16 and name not in self.sources:
            raise ValueError(f"{self.directory} has {2**16:,} sources and another, {name!r:.60}: take a coarser column")
        return self.sources.setdefault(name, len(self.sources))

    def _finish(self) -> None:
        length = {name: len(file) for name, file in self._files.items()}
        counts = dict(
            prompts=self.prompts,
            prompt_tokens=length["prompts.bin"],
            prompt_loss=length["prompt_loss.bin"],
            answers=self.answers,
            answer_tokens=length["answers.bin"],
            scores=length["score.bin"],
            pairs=self.pairs,
            record_bytes=length["records.jsonl"],
        )
        self.manifest = {
            "format": FORMAT,
            "counts": counts,
            "sources": list(self.sources),
            "columns": self.columns,
            "labels": self.labels,
            "tokenizer": tokenizer_facts(self.tokenizer),
            "template": self.template,
            "dtypes": {name: file.dtype.str for name, file in self._files.items() if len(file)},
            "sha256": {name: sha256(file.path) for name, file in self._files.items() if len(file)},
            "made": self.made,
        }
        write_json(self._work / "manifest.json", self.manifest)
        _fsync(self._work)
        os.rename(self._work, self.directory)
        _fsync(self.directory.parent)


def write_shard(
    directory: str | Path,
    encoded: Iterable[Encoded],
    tokenizer: Tokenizer,
    template: str | None = None,
    columns: Sequence[str] = (),
    made: dict | None = None,
) -> dict:
    """Writes a shard of these records, see `ShardWriter`, and returns its manifest."""
    with ShardWriter(directory, tokenizer, template, columns, made) as shard:
        for one in encoded:
            shard.add(one)
    return shard.manifest


def faults(encoded: Encoded, vocab_size: int) -> str:
    """What is wrong with a record's tokens, to put behind its name; "" if nothing is.

    The sides of a pair must differ in tokens: a tokenizer that rewrites texts can make two of them one.
    """
    record, answers = encoded.record, encoded.answers
    if len(answers) != len(record.answers):
        return f"has {len(record.answers)} answers, but {len(answers)} in tokens"
    if not len(encoded.prompt) or not all(map(len, answers)):
        return "has a prompt or an answer without a token"
    if encoded.prompt_loss is not None and len(encoded.prompt_loss) != len(encoded.prompt):
        return f"has {len(encoded.prompt)} tokens in its prompt, but {len(encoded.prompt_loss)} marks for the loss"
    for ids in map(np.asarray, (encoded.prompt, *answers)):
        if ids.min() < 0 or ids.max() >= vocab_size:
            return f"has token {ids.min() if ids.min() < 0 else ids.max()}, but the vocabulary has {vocab_size}"
    for pair in record.pairs:
        if np.array_equal(answers[pair.winner], answers[pair.loser]):
            return f"has a pair of equal answers, {pair.winner} and {pair.loser}"
    return ""


def numbers(value, count: int) -> list[float]:
    """An extra column's value for each of `count` answers: a number for all, or a list of one each; NaN where it is neither."""
    values = value if isinstance(value, list) and len(value) == count else [value] * count
    return [_number(v) for v in values]


def _number(value) -> float:
    try:
        return float(value) if isinstance(value, int | float) else np.nan
    except OverflowError:  # an integer of more than 308 digits
        return np.nan


_as_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for every row


def json_line(row: dict) -> bytes:
    try:
        return _as_json(row).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which has no UTF-8: as an escape
        return json.dumps(row).encode() + b"\n"


def write_split(directory: str | Path, made: dict | None = None) -> dict:
    """Writes the manifest of a split whose shards are all there, 00000 ..., and returns it.

    ValueError if a number is missing, or a shard has other columns, another tokenizer or another template.
    """
    directory = Path(directory)
    names = (
        sorted(d.name for d in directory.iterdir() if d.is_dir() and d.name.isdecimal()) if directory.is_dir() else []
    )
    if names != [shard_name(i) for i in range(len(names))] or not names:
        raise ValueError(
            f"{directory} has {len(names)} shards, and they are not {shard_name(0)} and so on; prepare it again"
        )
    shards = [read_manifest(directory / name, "counts") for name in names]
    common = {name: shards[0][name] for name in ("columns", "tokenizer", "template")}
    for name, shard in zip(names, shards):
        for what, value in common.items():
            if shard[what] != value:
                raise ValueError(f"{directory / name} has {what} {shard[what]}, {directory / names[0]} has {value}")
    sources = {}
    for shard in shards:
        for source in shard["sources"]:
            sources.setdefault(source, len(sources))
    manifest = {
        "format": FORMAT,
        "split": directory.name,
        "totals": {name: sum(shard["counts"][name] for shard in shards) for name in COUNTS},
        "sources": list(sources),
        "labels": all(shard["labels"] for shard in shards),
        **common,
        "shards": {
            "counts": {name: [shard["counts"][name] for shard in shards] for name in COUNTS},
            "sources": [[sources[source] for source in shard["sources"]] for shard in shards],
            "sha256": [sha256(directory / name / "manifest.json") for name in names],
        },
        "made": made or {},
    }
    temporary = directory / ".manifest.json"
    write_json(temporary, manifest)
    os.replace(temporary, directory / "manifest.json")
    _fsync(directory)
    return manifest


def shard_name(number: int) -> str:
    return f"{number:05d}"


def tokenizer_facts(tokenizer: Tokenizer) -> dict:
    return {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "pad": tokenizer.pad,
        "bos": tokenizer.start,
        "eos": tokenizer.eos,
    }


def write_json(file: Path, content: dict) -> None:
    with open(file, "w", encoding="utf-8", newline="\n") as f:
        f.write(json.dumps(content, indent=1) + "\n")
        f.flush()
        os.fsync(f.fileno())


def _fsync(path: Path) -> None:
    """Without it a rename can reach the disk before the bytes do."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading ---


def read_manifest(directory: Path, part: str) -> dict:
    """The manifest of a shard (part "counts") or of a split ("shards"); ValueError if it is none, or its numbers are none."""
    file = directory / "manifest.json"
    if not file.is_file():
        raise FileNotFoundError(f"no prepared data at {directory} (no manifest.json); run `python -m data.prepare`")
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as e:
        raise broken(file, f"is no JSON ({e})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or part not in manifest:
        hint = "prepare it again"
        if isinstance(manifest, dict) and "splits" in manifest:
            hint = "this is the directory of all splits: add /train"
        raise ValueError(f"{file} does not describe data in format {FORMAT!r}; {hint}")
    try:
        _check_manifest(manifest, part)
    except (KeyError, TypeError, AssertionError) as e:
        raise broken(file, f"is incomplete or not as it was written ({type(e).__name__}: {e})") from None
    return manifest


def _check_manifest(manifest: dict, part: str) -> None:
    """Raises where something else stands than what `ShardWriter` or `write_split` wrote."""

    def require(right: bool, what: str):
        if not right:
            raise TypeError(what)

    def number(x) -> bool:
        return type(x) is int and 0 <= x < 2**48

    def texts(x) -> bool:
        return isinstance(x, list) and all(isinstance(item, str) for item in x)

    tokenizer = manifest["tokenizer"]
    require(texts(manifest["sources"]) and texts(manifest["columns"]), "sources or columns")
    require(isinstance(tokenizer["fingerprint"], str) and number(tokenizer["vocab_size"]), "tokenizer")
    require(all(type(tokenizer[name]) is int for name in ("pad", "bos", "eos")), "tokenizer")
    require(manifest["template"] is None or isinstance(manifest["template"], str), "template")
    require(type(manifest["labels"]) is bool and isinstance(manifest["made"], dict), "labels or made")
    if part == "counts":
        require(all(number(manifest["counts"][name]) for name in COUNTS), "counts")
        require(isinstance(manifest["sha256"], dict) and isinstance(manifest["dtypes"], dict), "sha256 or dtypes")
        return
    shards = manifest["shards"]
    count = len(shards["sha256"])
    require(texts(shards["sha256"]) and count > 0 and len(shards["sources"]) == count, "shards")
    for name in COUNTS:
        require(len(shards["counts"][name]) == count and all(map(number, shards["counts"][name])), name)
        require(manifest["totals"][name] == sum(shards["counts"][name]), f"totals of {name}")
    for sources in shards["sources"]:
        require(all(number(i) and i < len(manifest["sources"]) for i in sources), "sources of shards")


def broken(file: Path, what: str) -> ValueError:
    return ValueError(f"{file} {what}; remove {file.parent} and prepare the data again")


def check_shard(directory: str | Path, verify: bool = False) -> dict:
    """The manifest of a shard, if its files have the sizes it says, and with verify=True the sha256. ValueError otherwise."""
    directory = Path(directory)
    manifest = read_manifest(directory, "counts")
    files = layout(manifest["counts"], manifest["tokenizer"]["vocab_size"], len(manifest["columns"]))
    _check_sizes(directory, files)
    there = {name: dtype for name, (dtype, length) in files.items() if length}
    if manifest["dtypes"] != there or manifest["sha256"].keys() != there.keys():
        raise broken(directory / "manifest.json", f"names {len(manifest['sha256'])} files, its counts {len(there)}")
    for name in there if verify else ():
        expected, got = manifest["sha256"][name], sha256(directory / name)
        if got != expected:
            raise broken(directory / name, f"has sha256 {got[:12]}, the manifest says {expected[:12]!r}")
    return manifest


def _check_sizes(directory: Path | str, files: dict[str, tuple[str, int]]) -> None:
    for name, (dtype, length) in files.items():
        expected = length * ITEMSIZE[dtype]
        try:
            size = os.stat(f"{directory}/{name}").st_size if length else 0
        except FileNotFoundError:
            raise broken(Path(directory, name), f"is missing ({expected} bytes expected)") from None
        if size != expected:
            raise broken(Path(directory, name), f"has {size} bytes, the manifest says {expected}")


ITEMSIZE = {dtype: np.dtype(dtype).itemsize for dtype in ("|u1", "<u2", "<u4", "<i8", "<u8", "<f8")}


ENDS = {  # where the last offset has to be
    "prompt_offsets.bin": "prompt_tokens",
    "answer_offsets.bin": "answer_tokens",
    "record_offsets.bin": "record_bytes",
}

BOUNDS = {"p.bin": (0.5, 1.0), "gap.bin": (0.0, 1e308), "weight.bin": (0.0, 1e308)}
NUMBERS_OF = {"answer_prompt.bin": "prompts", "winner.bin": "answers", "loser.bin": "answers"}


class Pairs(NamedTuple):
    """Pairs of answers, (M,) each; see data.records.Pair."""

    winner: np.ndarray  # int64, number of the answer in the split
    loser: np.ndarray
    p: np.ndarray  # float64
    gap: np.ndarray
    weight: np.ndarray


class Examples:
    """A split on disk, memory-mapped, its shards one after the other: prompts, answers and pairs are numbered from 0 over all.

        train = Examples("out/data/mine/train")
        train.row(7)  # the tokens of answer 7 with its prompt

    prompts, answers, pairs: how many there are. sources, columns: names. fingerprint, vocab_size, pad, bos, eos: of the
    tokenizer; template: sha256 of the chat template, or None. Several paths make a mixture: data of the same tokenizer and
    template one after the other, with a weight each, which loaders draw by. Opening reads one manifest each and no data;
    it can be sent to other processes.
    """

    def __init__(self, *paths: str | Path, weights: Sequence[float] | None = None, verify: bool = False):
        """ValueError if a file is missing, truncated or not as the manifest says; verify=True also checks sha256."""
        self.paths = tuple(map(Path, paths))
        self.weights = tuple(weights or [1.0] * len(paths))
        self.manifests = [read_manifest(path, "shards") for path in self.paths]
        self._same("tokenizer", "template")
        tokenizer = self.manifests[0]["tokenizer"]
        self.fingerprint, self.vocab_size = tokenizer["fingerprint"], tokenizer["vocab_size"]
        self.pad, self.bos, self.eos = tokenizer["pad"], tokenizer["bos"], tokenizer["eos"]
        self.template = self.manifests[0]["template"]
        self.labels = [m["labels"] for m in self.manifests]  # per path: are all its scores 0 or 1, as of thumbs?
        self.sources = list(dict.fromkeys(name for m in self.manifests for name in m["sources"]))
        self.columns = list(dict.fromkeys(name for m in self.manifests for name in m["columns"]))
        sizes = [len(m["shards"]["sha256"]) for m in self.manifests]
        self.shards = sum(sizes)
        self.part = np.repeat(np.arange(len(sizes)), sizes)  # (shards,) which path a shard is of
        self._number = np.arange(self.shards) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        counts = {name: np.concatenate([m["shards"]["counts"][name] for m in self.manifests]) for name in COUNTS}
        self._counts = {name: count.astype(np.int64) for name, count in counts.items()}
        self.starts = {  # (shards + 1,) number of the first prompt, answer, pair of every shard
            name: np.append(0, np.cumsum(self._counts[name])) for name in ("prompts", "answers", "pairs")
        }
        self.prompts, self.answers, self.pairs = (int(starts[-1]) for starts in self.starts.values())
        self._mapped, self._sound = OrderedDict(), set()
        for shard in range(self.shards):
            _check_sizes(self._directory(shard), self._layout(shard))
        if verify:
            self.verify()

    def _same(self, *names: str) -> None:
        for name in names:
            for path, manifest in zip(self.paths[1:], self.manifests[1:]):
                if manifest[name] != self.manifests[0][name]:
                    what = {"tokenizer": "another tokenizer", "template": "another chat template"}[name]
                    raise ValueError(f"{path} was prepared with {what} than {self.paths[0]}; prepare both with one")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_mapped": OrderedDict()}  # every process maps for itself

    @property
    def digest(self) -> list[str]:
        """sha256 of the shards' manifests, which name the content of every file."""
        return [digest for manifest in self.manifests for digest in manifest["shards"]["sha256"]]

    def verify(self) -> None:
        """Raises ValueError if the content of any file differs from the sha256 that its manifest says."""
        for shard in range(self.shards):
            directory = Path(self._directory(shard))
            expected = self.manifests[self.part[shard]]["shards"]["sha256"][self._number[shard]]
            if (got := sha256(directory / "manifest.json")) != expected:
                raise broken(directory / "manifest.json", f"has sha256 {got[:12]}, the split's says {expected[:12]!r}")
            check_shard(directory, verify=True)

    # --- tokens ---

    def prompt(self, i: int) -> np.ndarray:
        """The tokens of a prompt, (P,)."""
        return self._tokens("prompts.bin", "prompt_offsets.bin", *self._place("prompts", i))

    def answer(self, i: int) -> np.ndarray:
        """The tokens of an answer with the one that ends it, (A,)."""
        return self._tokens("answers.bin", "answer_offsets.bin", *self._place("answers", i))

    def row(self, i: int) -> np.ndarray:
        """The tokens of an answer with its prompt before it, (P + A,)."""
        return np.concatenate(self.rows([i])[0][:2])

    def rows(self, answers: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """Of each answer: tokens of its prompt (P,), its own (A,), and which of the prompt the assistant wrote in earlier
        turns, (P,) uint8, or None where none is.
        """
        found = []
        for answer, prompt in zip(answers, self.prompt_of(answers)):
            shard, i = self._place("answers", answer)
            j = int(prompt - self.starts["prompts"][shard])
            before = self._tokens("prompts.bin", "prompt_offsets.bin", shard, j)
            own = self._tokens("answers.bin", "answer_offsets.bin", shard, i)
            history = None
            if self._counts["prompt_loss"][shard]:
                history = self._tokens("prompt_loss.bin", "prompt_offsets.bin", shard, j)
            found.append((before, own, history))
        return found

    def prompt_lengths(self, prompts: np.ndarray | None = None) -> np.ndarray:
        """Tokens of these prompts (None: all), from the offsets alone. (N,) int64"""
        return self.each("prompts", prompts, lambda shard, at: self._lengths(shard, "prompt_offsets.bin", at))

    def answer_lengths(self, answers: np.ndarray | None = None) -> np.ndarray:
        """Tokens of these answers (None: all). (N,) int64"""
        return self.each("answers", answers, lambda shard, at: self._lengths(shard, "answer_offsets.bin", at))

    def row_lengths(self, answers: np.ndarray | None = None) -> np.ndarray:
        """Tokens of these answers with their prompts (None: all). (N,) int64"""
        return self.prompt_lengths(self.prompt_of(answers)) + self.answer_lengths(answers)

    def _lengths(self, shard: int, offsets: str, at: np.ndarray) -> np.ndarray:
        offsets = self._map(shard, offsets)
        return offsets[at + 1] - offsets[at]

    def _tokens(self, name: str, offsets: str, shard: int, i: int) -> np.ndarray:
        offsets = self._map(shard, offsets)
        found = self._map(shard, name)[offsets[i] : offsets[i + 1]]
        if name in ("prompts.bin", "answers.bin") and (most := found.max()) >= self.vocab_size:
            file = Path(self._directory(shard), name)
            raise broken(file, f"has token {most} in row {i}, the vocabulary has {self.vocab_size}")
        return found

    # --- what belongs to what ---

    def prompt_of(self, answers: np.ndarray | None = None) -> np.ndarray:
        """The prompt of each of these answers (None: of all), (N,) int64."""

        def read(shard, at):
            return self._map(shard, "answer_prompt.bin")[at] + self.starts["prompts"][shard]

        return self.each("answers", answers, read)

    def answers_of(self, prompts: np.ndarray | None = None) -> np.ndarray:
        """(N, 2): the first answer of each of these prompts (None: all), and the one after its last."""

        def read(shard, at):
            prompt_of = self._map(shard, "answer_prompt.bin")
            return self.starts["answers"][shard] + np.stack([np.searchsorted(prompt_of, at + k) for k in (0, 1)], 1)

        return self.each("prompts", prompts, read, np.zeros((0, 2), np.int64))

    def pairs_of(self, prompts: np.ndarray | None = None) -> np.ndarray:
        """(N, 2): the first pair of each of these prompts (None: all), and the one after its last."""

        def read(shard, at):
            prompt_of = self._map(shard, "answer_prompt.bin")[self._map(shard, "winner.bin")]
            return self.starts["pairs"][shard] + np.stack([np.searchsorted(prompt_of, at + k) for k in (0, 1)], 1)

        return self.each("prompts", prompts, read, np.zeros((0, 2), np.int64))

    def pair(self, pairs: np.ndarray | None = None) -> Pairs:
        """These pairs (None: all), in the numbers of this split."""
        first = self.starts["answers"]
        sides = [
            self.each("pairs", pairs, lambda shard, at, name=name: self._map(shard, name)[at] + first[shard])
            for name in ("winner.bin", "loser.bin")
        ]
        facts = [
            self.each("pairs", pairs, lambda shard, at, name=name: self._map(shard, name)[at], np.zeros(0))
            for name in ("p.bin", "gap.bin", "weight.bin")
        ]
        return Pairs(*sides, *facts)

    # --- columns and texts ---

    def has(self, *names: str) -> bool:
        """Is there any score ("score"), and are these extra columns kept?"""
        return all(self._counts["scores"].any() if name == "score" else name in self.columns for name in names)

    def column(self, name: str, answers: np.ndarray | None = None) -> np.ndarray:
        """The score of these answers (None: all), or another of `columns`; NaN where there is none. (N,) float64"""
        if not self.has(name):
            known = [name for name in ("score", *self.columns) if self.has(name)]
            raise ValueError(f"{self} has no column {name!r}; it has {', '.join(known) or 'none'}")

        def read(shard, at):
            columns = self.manifests[self.part[shard]]["columns"]
            if name == "score" and self._counts["scores"][shard]:
                return self._map(shard, "score.bin")[at]
            if name != "score" and name in columns:
                return self._map(shard, f"column_{columns.index(name)}.bin")[at]
            return np.full(len(at), np.nan)

        return self.each("answers", answers, read, np.zeros(0))

    def source(self, prompts: np.ndarray | None = None) -> np.ndarray:
        """Which of `sources` each of these prompts (None: all) is from. (N,) int64"""

        def read(shard, at):
            manifest = self.manifests[self.part[shard]]
            names = [manifest["sources"][i] for i in manifest["shards"]["sources"][self._number[shard]]]
            local = self._map(shard, "source.bin")[at]
            if len(local) and local.max() >= len(names):
                file = Path(self._directory(shard), "source.bin")
                raise broken(file, f"has source {local.max()}, the manifest has {len(names)}")
            return np.array([self.sources.index(name) for name in names], np.int64)[local]

        return self.each("prompts", prompts, read)

    def source_ids(self, names: Sequence[str]) -> list[int]:
        for name in names:
            if name not in self.sources:
                raise ValueError(f"{self} has no source {name!r}; it has {', '.join(map(repr, self.sources[:20]))}")
        return [self.sources.index(name) for name in names]

    def group(self, prompts: np.ndarray | None = None) -> np.ndarray:
        """A number that prompts share which belong together, by which splits are made. (N,) uint64"""
        return self.each(
            "prompts", prompts, lambda shard, at: self._map(shard, "group.bin")[at], np.zeros(0, np.uint64)
        )

    def record(self, prompt: int) -> Record:
        """What was read: texts or messages, extra columns and all; from the disk, each time."""
        shard, i = self._place("prompts", prompt)
        line = self._tokens("records.jsonl", "record_offsets.bin", shard, i).tobytes()
        try:
            return Record.from_json(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise broken(
                Path(self._directory(shard), "records.jsonl"), f"has no record as its line {i + 1} ({e})"
            ) from None

    # --- shards ---

    def __repr__(self) -> str:
        return ", ".join(map(str, self.paths))

    def each(
        self,
        what: str,
        rows: np.ndarray | None,
        read: Callable[[int, np.ndarray], np.ndarray],
        empty: np.ndarray = NONE,
    ) -> np.ndarray:
        """`by_shard` for these rows of prompts, answers or pairs, or for all of them (None)."""
        starts = self.starts[what]
        if rows is None:
            parts = [read(s, np.arange(n)) for s, n in enumerate(np.diff(starts)) if n]
            return np.concatenate([empty, *parts])
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= starts[-1]):
            raise IndexError(f"row {rows.min() if rows.min() < 0 else rows.max()} of {starts[-1]} {what} in {self}")
        return by_shard(starts, rows, read, empty)

    def _place(self, what: str, i: int) -> tuple[int, int]:
        """The shard of a prompt or an answer, and its number in there."""
        starts = self.starts[what]
        if not 0 <= i < starts[-1]:
            raise IndexError(f"row {i} of {starts[-1]} {what} in {self}")
        shard = int(np.searchsorted(starts, i, side="right")) - 1
        return shard, int(i - starts[shard])

    def _directory(self, shard: int) -> str:
        return f"{self.paths[self.part[shard]]}/{shard_name(self._number[shard])}"

    def _layout(self, shard: int) -> dict[str, tuple[str, int]]:
        counts = {name: int(count[shard]) for name, count in self._counts.items()}
        return layout(counts, self.vocab_size, len(self.manifests[self.part[shard]]["columns"]))

    def _map(self, shard: int, name: str) -> np.ndarray:
        """A file of a shard; the first time, what would lead astray is looked for."""
        if (shard, name) in self._mapped:
            self._mapped.move_to_end((shard, name))
            return self._mapped[shard, name]
        dtype, count, more = FILES.get(name, COLUMN)
        dtype, length = dtype or token_dtype(self.vocab_size), int(self._counts[count][shard]) + more
        path = f"{self._directory(shard)}/{name}"
        array = np.zeros(0, dtype)
        if length:
            _check_sizes(self._directory(shard), {name: (dtype, length)})
            with open(path, "rb") as file:  # np.memmap does no more, and takes five times as long
                array = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
        if (shard, name) not in self._sound:
            self._check(path, array, shard)
            self._sound.add((shard, name))
        self._mapped[shard, name] = array
        if len(self._mapped) > MOST_MAPPED:
            self._mapped.popitem(last=False)
        return array

    def _check(self, path: str, array: np.ndarray, shard: int) -> None:
        name = path.rpartition("/")[2]
        if name in ENDS:
            end = self._counts[ENDS[name]][shard]
            if array[0] != 0 or (array[1:] <= array[:-1]).any():
                raise broken(Path(path), "does not count upwards from 0")
            if array[-1] != end:
                raise broken(Path(path), f"ends at {array[-1]}, the manifest says {end}")
        if name in NUMBERS_OF and len(array):
            count = self._counts[NUMBERS_OF[name]][shard]
            if not 0 <= array.min() <= array.max() < count:
                raise broken(
                    Path(path), f"has {array.min()} to {array.max()}, but there are {count} {NUMBERS_OF[name]}"
                )
        if name in BOUNDS and len(array) and not (BOUNDS[name][0] <= array.min() <= array.max() <= BOUNDS[name][1]):
            least, most = BOUNDS[name]
            raise broken(Path(path), f"has {array.min()} to {array.max()}, and may have {least:g} to {most:g}")
        if name == "answer_prompt.bin" and (array[1:] < array[:-1]).any():
            raise broken(Path(path), "does not go through the prompts in order")


def by_shard(
    starts: np.ndarray, rows: np.ndarray, read: Callable[[int, np.ndarray], np.ndarray], empty: np.ndarray = NONE
) -> np.ndarray:
    """read(shard, numbers in the shard) for these rows, in their order. starts (shards + 1,): the first row of every shard."""
    if not len(rows):
        return empty
    shard = np.searchsorted(starts, rows, side="right") - 1
    order = np.argsort(shard, kind="stable")
    parts = [(at, int(shard[at[0]])) for at in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1)]
    found = np.concatenate([read(s, rows[at] - starts[s]) for at, s in parts])
    out = np.empty_like(found)
    out[order] = found
    return out


def flat(ranges: np.ndarray) -> np.ndarray:
    """(N, 2) of first and end -> all numbers in them, one range after the other."""
    counts = np.diff(ranges)[:, 0]
    return np.arange(counts.sum()) + np.repeat(ranges[:, 0] - np.cumsum(counts) + counts, counts)
