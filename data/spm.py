"""Sentencepiece models: our own, those of pretrained models, and those that a tokenizer.json spells.

A model file is a protobuf message. What it has no place for (added tokens, other ends of text, the chat template) lies in
one more field of it, which other readers pass over, so a tokenizer of ours is always one file.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from data.beside import (
    LARGEST_VOCABULARY,
    Added,
    Cut,
    TextEncoder,
    added_token,
    as_bytes,
    bos_first,
    bos_of,
    read_beside,
    read_json,
    write_files,
)
from data.bpe import BPETokenizer, dump, made_as_listed, merge, read_hf
from data.words import normalized, normalizer_of, rubs, steps_of

MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"  # sentencepiece's own letter for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces, in GGUF files too
BESIDE = 200  # number of our field; from 200 on they are anybody's
PREFIXES = ("model", "prepend", "always", "first", "never")
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
NUL = "\ufdd0"  # a character that no text has, in place of U+0000, which sentencepiece has no pieces for
DOUBLED = {"type": "Replace", "pattern": {"Regex": "\\A" + SPACE}, "content": 2 * SPACE}  # transformers 5's for one
PROBE = "\ufb01  \u00bd\n"  # what NFKC and the collapse of spaces would change


class SentencePieceTokenizer(TextEncoder):
    """A trained sentencepiece model; bos and eos are added by whoever builds the sequence, never by `encode`.

    blob: the content of the model file where there is no file yet. chat_template: in place of the file's own. beside:
    what its files know more than the model, as `split_blob` finds it in a file of ours:

    added: content -> fields of Added. prefix: where a space is put before a text, one of PREFIXES: by the model itself;
    always, unless there is one, as HF's Metaspace has it; "prepend", even then; "first", not behind an added token.
    normalizer: HF's steps before that. merges: the list of pairs that merge, where pieces are made in another way than
    sentencepiece would make them of their scores. bos, eos, pad, add_bos, special (names that templates know), chat_template.
    """

    def __init__(
        self,
        path: str | Path | None,
        blob: bytes | None = None,
        chat_template: str | None = None,
        beside: dict | None = None,
    ):
        self.path = None if path is None else Path(path)
        where = str(self.path or "the tokenizer")
        try:
            blob = self.path.read_bytes() if blob is None else blob
        except FileNotFoundError:
            raise FileNotFoundError(f"no tokenizer at {self.path}; run `python -m data.prepare` first") from None
        self._model, found = split_blob(blob, where)
        beside = {**(found if beside is None else beside)}
        beside |= {"chat_template": chat_template} if chat_template else {}
        self.beside = checked_beside({k: v for k, v in beside.items() if v not in (None, [], {})}, where)
        self.model = core = processor(self._model, where)
        size = core.vocab_size()
        self.added = {token: Added(*fields) for token, fields in self.beside.get("added", {}).items()}
        self.prefix, self.normalizer = self.beside.get("prefix", "model"), self.beside.get("normalizer", [])
        self.chat_template, self.add_bos = self.beside.get("chat_template"), self.beside.get("add_bos", True)
        self.vocab_size = max([size, *(token.id + 1 for token in self.added.values())])
        self.bos, self.eos = self.beside.get("bos", core.bos_id()), self.beside.get("eos", core.eos_id())
        # Llama 2's has no pad: no text ever produces unk, so that is one to spare
        pad = self.beside.get("pad", core.pad_id())
        self.pad = core.unk_id() if pad < 0 or pad in (self.bos, self.eos) else pad
        special = {self.pad, self.bos, self.eos} - {-1}
        if len(special) < 3 or max(special) >= self.vocab_size:
            raise ValueError(f"{where} lacks a distinct pad, bos or eos ({self.pad}, {self.bos}, {self.eos})")
        self.start = self.bos  # what a plain text begins with
        self._outside = {token.id: text for text, token in self.added.items()}
        self.control = {core.id_to_piece(i): i for i in range(size) if core.is_control(i) and i not in self._outside}
        self.control |= {text: token.id for text, token in self.added.items() if token.special}
        names = {"bos": self.bos, "eos": self.eos, "unk": core.unk_id(), "pad": core.pad_id()}
        plain = {f"{name}_token": self.piece(i) for name, i in names.items() if i >= 0}
        self.special: dict[str, str] = self.beside.get("special", plain)
        self._hidden = {*self.control.values(), self.pad}
        changes = {key: value for key, value in self.beside.items() if key not in ("chat_template", "special")}
        self.fingerprint = hashlib.sha256(self._model + (dump(changes) if changes else b"")).hexdigest()

        spec = field(3, 0)  # no space before the text: where there is one, it is put there by us
        if self.prefix != "model":
            spec += field(2, b"") + field(4, 0) + field(5, 1)  # and nothing else is done to it
        self._bare = processor(self._model + field(3, spec), where)
        self._rubs = (
            rubs(self.normalizer) if self.prefix != "model" else self._bare.encode(" a") == self._bare.encode("a")
        )
        self._nul = NUL.encode() in self._model
        self._pairs = self._pairs_of(self.beside["merges"], where) if "merges" in self.beside else None
        raw, late = {}, {}
        for text, token in self.added.items():
            (late if token.normalized and self.prefix != "model" else raw)[text] = token
        self._cut = Cut(raw)
        self._cut_late = Cut({self._spelled(text): token for text, token in late.items()})

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without control tokens and pad; bytes that are no UTF-8 become U+FFFD."""
        ids = [i for i in map(int, ids) if i not in self._hidden and 0 <= i < self.vocab_size]
        if not self.added and self.prefix == "model":
            return self.model.decode(ids)
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        spaced = self.prefix != "never" and ids and ids[0] not in self._outside
        return text.removeprefix(" ") if spaced else text

    def token_bytes(self, i: int) -> bytes:
        """What an id adds to a text that has begun; models may have more rows than there are tokens."""
        if i in self._hidden or not 0 <= i < self.vocab_size:
            return b""
        if i in self._outside:
            return self._outside[i].encode()
        if i >= self.model.vocab_size():
            return b""
        piece = self.model.id_to_piece(i)
        if self.model.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").replace(NUL, "\0").encode()

    def piece(self, i: int) -> str:
        """The spelling of an id."""
        known = i < self.model.vocab_size()
        if i in self._outside:
            return self._outside[i]
        return self.model.id_to_piece(i).replace(NUL, "\0") if known else f"[PAD{i}]"

    def parts(self) -> dict:
        """All of it in plain lists, as GGUF files take it."""
        model, ids = self.model, range(self.model.vocab_size())
        kinds = (
            (UNKNOWN, model.is_unknown),
            (CONTROL, model.is_control),
            (UNUSED, model.is_unused),
            (BYTE, model.is_byte),
        )
        user_defined = user_defined_pieces(self._model)
        types = [next((kind for kind, holds in kinds if holds(i)), NORMAL) for i in ids]
        types = [USER_DEFINED if i in user_defined else kind for i, kind in enumerate(types)]
        inside = {token.id: types[token.id] for token in self.added.values() if token.id < len(ids)}
        types += [UNUSED] * (self.vocab_size - len(ids))
        for token in self.added.values():
            types[token.id] = CONTROL if token.special else USER_DEFINED
        own = ("added", "prefix", "normalizer", "merges", "special")
        more = {key: value for key, value in self.beside.items() if key in own}
        more |= {"core": len(ids), "types": sorted(inside.items())} if more else {}
        return {
            "model": "llama",
            "tokens": [self.piece(i) for i in range(self.vocab_size)],
            "scores": [*(float(model.get_score(i)) for i in ids), *[-1000.0] * (self.vocab_size - len(ids))],
            "types": types,
            **{"bos": self.bos, "eos": self.eos, "pad": self.pad, "unk": model.unk_id(), "add_bos": self.add_bos},
            "add_space_prefix": model.encode_as_pieces("a")[0].startswith(SPACE)
            if self.prefix == "model"
            else self.prefix != "never",
            "chat_template": self.chat_template,
            **({"beside": dump(more).decode()} if more else {}),
        }

    def save(self, directory: str | Path) -> Path:
        """Writes the model file into a directory (a checkpoint, usually)."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.path = Path(directory) / MODEL_FILE
        self.path.write_bytes(self._model + (field(BESIDE, dump(self.beside)) if self.beside else b""))
        return self.path

    def _spelled(self, text: str, prefix: bool = True) -> str:
        """A text as HF's normalizers leave it, before it is looked through for added tokens once more."""
        text = normalized(text, self.normalizer)
        if self.prefix in ("prepend", "never"):
            text = SPACE * (prefix and self.prefix == "prepend" and text != "") + text.replace(" ", SPACE)
        return text

    def _encode_stretch(self, text: str, after: str) -> bytes:
        """Ids of what lies between added tokens."""
        if self.prefix == "model":
            return as_bytes((self._bare if after == "text" else self.model).encode(text))
        found = []
        text = self._spelled(text, after != "text")
        for stretch, i in self._cut_late.of(text):
            if i is not None:
                found.append(i)
            else:
                wanted = self.prefix == "always" and after != "text" or self.prefix == "first" and after == "nothing"
                space = SPACE if wanted and not stretch.startswith((" ", SPACE)) else ""
                found += self._encode_bare(space + stretch)
            after = "token"
        return as_bytes(found)

    def _pairs_of(self, merges: list, where: str) -> dict[tuple[int, int], tuple[int, int]]:
        """ids of two pieces -> (when they merge, id of what they make)"""
        ids, pairs = {self.piece(i): i for i in range(self.model.vocab_size())}, {}
        for turn, (left, right) in enumerate(merges):
            if not {left, right, left + right} <= ids.keys():
                raise ValueError(f"{where} is damaged: {left!r:.40} and {right!r:.40} make no piece")
            pairs.setdefault((ids[left], ids[right]), (turn, ids[left + right]))
        return pairs

    def _encode_bare(self, text: str) -> list[int]:
        if self._pairs is not None:
            unknown, symbols = self.model.unk_id(), []
            for letter in text.replace(" ", SPACE):
                i = self.model.piece_to_id(NUL if letter == "\0" else letter)
                known = i != unknown and not (letter == NUL and self._nul)
                symbols += [i] if known else [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in letter.encode()]
            return merge(symbols, self._pairs)
        if not self._nul:
            return self._bare.encode(text)
        parts = text.split(NUL)
        ids = self._bare.encode(parts[0].replace("\0", NUL))
        for part in parts[1:]:
            ids += [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in NUL.encode()]
            ids += self._bare.encode(part.replace("\0", NUL))
        return ids


# --- protobuf ---


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def key(number: int, wire_type: int) -> bytes:
    return varint(number << 3 | wire_type)


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protobuf message: a whole number, or a length and bytes."""
    if isinstance(value, int):
        return key(number, 0) + varint(value)
    return key(number, 2) + varint(len(value)) + value


def fields(message: bytes) -> Iterator[tuple[int, int, int, bytes | int]]:
    """Number, start, end and value of each field of a message. ValueError where it is none."""

    def number(at: int) -> tuple[int, int]:
        value = shift = 0
        while at < len(message) and shift < 70:
            byte = message[at]
            value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
            if byte < 128:
                return value, at
        raise ValueError("not a protobuf message")

    at = 0
    while at < len(message):
        start, (tag, at) = at, number(at)
        if tag & 7 == 0:
            value, at = number(at)
        elif tag & 7 == 2:
            size, at = number(at)
            value, at = message[at : at + size], at + size
        elif tag & 7 in (1, 5):
            size = 8 if tag & 7 == 1 else 4
            value, at = message[at : at + size], at + size
        else:
            raise ValueError("not a protobuf message")
        if at > len(message):
            raise ValueError("not a protobuf message")
        yield tag >> 3, start, at, value


def split_blob(blob: bytes, where: str) -> tuple[bytes, dict]:
    """The model of a file, and what a file of ours has beside it. ValueError for a damaged one."""
    marker = key(BESIDE, 2)
    if marker not in blob:
        return blob, {}
    try:
        found = [(start, end, value) for number, start, end, value in fields(blob) if number == BESIDE]
        beside = [json.loads(value) for _, _, value in found]
    except (ValueError, RecursionError):
        raise ValueError(f"{where} ({len(blob)} bytes) is not a sentencepiece model; prepare it again") from None
    if not found:
        return blob, {}
    (start, end, _), *more = found
    if more or not isinstance(beside[0], dict):
        raise ValueError(f"{where} is damaged: {len(found)} fields of ours, one object was expected")
    return blob[:start] + blob[end:], beside[0]


def checked_beside(beside: dict, where: str) -> dict:
    """What a file of ours has beside the model. ValueError unless it is of the kinds that `SentencePieceTokenizer` names."""

    def whole(value) -> bool:
        return type(value) is int and 0 <= value < LARGEST_VOCABULARY

    def texts(value) -> bool:
        return isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)

    def added(value) -> bool:
        return isinstance(value, dict) and all(
            isinstance(token, (list, tuple)) and len(token) == len(Added._fields) and whole(token[0])
            and text and all(type(flag) is bool for flag in token[1:])
            for text, token in value.items()
        )  # fmt: skip

    def merges(value) -> bool:
        return isinstance(value, list) and all(
            isinstance(pair, (list, tuple)) and [type(half) for half in pair] == [str, str] for pair in value
        )

    kinds = {"added": added, "merges": merges, "special": texts, "prefix": lambda value: value in list(PREFIXES)}
    kinds |= dict.fromkeys(("bos", "eos", "pad"), whole) | {"add_bos": lambda value: type(value) is bool}
    kinds |= {
        "chat_template": lambda value: isinstance(value, (str, list)),
        "normalizer": lambda value: isinstance(value, list),
    }
    for key_, value in beside.items():
        if key_ not in kinds or not kinds[key_](value):
            raise ValueError(f"{where} is damaged: {key_!r:.40} beside the model is {value!r:.60}")
    try:
        normalizer_of({"type": "Sequence", "normalizers": beside.get("normalizer", [])})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{where} is damaged: normalizer {error!r:.60}") from None
    return beside


def user_defined_pieces(blob: bytes) -> set[int]:
    """Ids of the pieces that sentencepiece cuts out of a text first, which its processor does not tell."""
    pieces = [value for number, _, _, value in fields(blob) if number == 1]
    return {
        i for i, piece in enumerate(pieces) if any(n == 3 and value == USER_DEFINED for n, _, _, value in fields(piece))
    }


def processor(blob: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=blob)
    except RuntimeError:
        raise ValueError(f"{where} ({len(blob)} bytes) is not a sentencepiece model; prepare it again") from None


def sentencepiece_blob(parts: dict) -> bytes:
    """A sentencepiece model file (a protobuf message) of plain lists: pieces with score and type, and five settings."""
    tokens, scores, types = parts["tokens"], parts["scores"], parts["types"]
    special = {name: parts[name] for name in ("bos", "eos", "unk", "pad") if parts.get(name) is not None}
    if not len(tokens) == len(scores) == len(types):
        raise ValueError(f"the tokenizer has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types")
    if wrong := [name for name, i in special.items() if type(i) is not int or not 0 <= i < len(tokens)]:
        raise ValueError(
            f"the tokenizer's {wrong[0]} is {special[wrong[0]]!r:.60}; an id below {len(tokens)} was expected"
        )
    if special.get("pad") == special.get("eos"):
        special.pop("pad", None)
    if any("\0" in token for token in tokens) and any(NUL in token for token in tokens):
        raise ValueError("tokens with U+0000 and with U+FDD0 are not supported together")
    pieces = (
        field(1, token.replace("\0", NUL).encode()) + key(2, 5) + struct.pack("<f", score) + field(3, kind)
        for token, score, kind in zip(tokens, scores, types)
    )
    trainer = field(3, 2) + field(4, len(tokens)) + field(35, 1)  # BPE, its size, bytes for what has no piece
    for name, number in (("unk", 45), ("bos", 46), ("eos", 47), ("pad", 48)):  # found by their spelling
        trainer += field(number, tokens[special[name]].encode()) if name in special else b""
    normalizer = field(1, b"identity") + field(3, int(parts.get("add_space_prefix", True))) + field(4, 0) + field(5, 1)
    return b"".join(field(1, piece) for piece in pieces) + field(2, trainer) + field(3, normalizer)


def from_parts(parts: dict) -> SentencePieceTokenizer:
    """The tokenizer of plain lists, as `parts()` gives them and GGUF files hold them. ValueError where they do not fit."""
    if parts.get("beside"):
        try:
            more = json.loads(parts["beside"])
            core, inside = more.pop("core"), dict(more.pop("types"))
            lists = {name: parts[name][:core] for name in ("tokens", "scores", "types")}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(
                f"what the tokenizer has beside its pieces is none of ours: {parts['beside']!r:.60}"
            ) from None
        lists["types"] = [inside.get(i, kind) for i, kind in enumerate(lists["types"])]
        ids = {name: parts[name] for name in ("bos", "eos", "pad") if parts.get(name) is not None}
        blob = sentencepiece_blob(parts | dict.fromkeys(ids) | lists | {k: i for k, i in ids.items() if i < core})
        return SentencePieceTokenizer(
            None, blob, parts.get("chat_template"), more | ids | {"add_bos": parts.get("add_bos", True)}
        )
    add_bos = {} if parts.get("add_bos", True) else {"add_bos": False}
    return SentencePieceTokenizer(None, sentencepiece_blob(parts), parts.get("chat_template"), add_bos)


# --- HF directories ---


def read_hf_directory(directory: str | Path) -> SentencePieceTokenizer | BPETokenizer:
    """The tokenizer of a directory with tokenizer.json, tokenizer.model or both.

    The model cuts texts into pieces; added tokens, special tokens and the chat template are those of the files beside it,
    as HF's code reads them. ValueError, with the name of what it is, where that would give other ids than HF's.
    """
    directory = Path(directory)
    file, model_file = directory / "tokenizer.json", directory / MODEL_FILE
    if not file.is_file():
        plain = SentencePieceTokenizer(model_file)
        vocabulary = {plain.model.id_to_piece(i): i for i in range(plain.model.vocab_size())}
        return joined(directory, model_file, plain._model, vocabulary, {}, {})
    content = read_json(file)
    try:
        model = content["model"]
        words = steps_of(content.get("pre_tokenizer"), "pretokenizer")
        if not model.get("byte_fallback") or words and words[-1]["type"] == "ByteLevel":
            return read_hf(directory)
        prefix, normalizer, cut_out = spaces_of(content)
        settings = {"prefix": prefix, "normalizer": normalizer}
        if model_file.is_file():
            blob, _ = split_blob(model_file.read_bytes(), str(model_file))
            plain = processor(blob, str(model_file))
            for token, i in model["vocab"].items():
                other = plain.id_to_piece(i) if i < plain.vocab_size() else token
                if other.replace(NUL, "\0") != token:
                    raise ValueError(f"token {i} is {token!r:.40}, but {other!r:.40} in {MODEL_FILE} beside it")
            own_prefix = plain.encode_as_pieces("a")[0].startswith(SPACE)
            identity = plain.decode(plain.encode(PROBE)) == PROBE and NUL.encode() not in blob
            late = any(t.get("normalized") and not t.get("special") for t in content.get("added_tokens") or [])
            if prefix == ("prepend" if own_prefix else "never") and not normalizer and identity and not late:
                settings = {}  # the model itself does the same
        else:
            blob, merges = blob_of_merges(content, cut_out)
            settings |= {"merges": merges} if merges else {}
        return joined(directory, None, blob, model["vocab"], content, settings)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(file)) else f"{file}: {error}") from None
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a tokenizer.json as HF writes it: {error!r:.100}") from None


def joined(
    directory: Path, path: Path | None, blob: bytes, vocabulary: dict[str, int], content: dict, settings: dict
) -> SentencePieceTokenizer:
    """The model with what the files beside it say."""
    model, found = processor(blob, str(path or directory)), read_beside(directory, vocabulary, content)
    user_defined, added = user_defined_pieces(blob), {}
    for text, token in found.added.items():
        i = token.id
        itself = i < model.vocab_size() and not set(token.flags) - {"normalized"}  # the model knows it as what it is
        itself &= i == model.unk_id() or model.is_control(i) and token.special if itself else False
        if not (itself or not content and i in user_defined and not token.special):
            added[text] = list(token)
    ids = vocabulary | {text: token.id for text, token in found.added.items()}
    first = bos_of(content.get("post_processor"), ids)
    core = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    said = found.ids | ({} if first is None else {"bos": first})
    beside = settings | {"added": added} | {name: said[name] for name in core if said[name] not in (None, core[name])}
    if not (first is not None if content else found.add_bos is not False):
        beside["add_bos"] = False
    if not content and found.legacy is False:
        beside["prefix"] = "first"  # as HF's code reads such a model file
    tokenizer = SentencePieceTokenizer(path, blob, found.chat_template, beside)
    if found.special != tokenizer.special:
        tokenizer = SentencePieceTokenizer(path, blob, found.chat_template, beside | {"special": found.special})
    return tokenizer


def spaces_of(content: dict) -> tuple[str, list[dict], list[str]]:
    """Where a tokenizer.json puts a space before texts, what it does to them before, and the pieces it cuts out first."""
    steps, cut_out = list(normalizer_of(content.get("normalizer"))), []
    own = [step for step in steps if step["type"] == "Prepend" or step in (SPACES, DOUBLED)]
    if steps[len(steps) - len(own) :] != own:
        raise ValueError(f"normalizer {json.dumps(content['normalizer']):.200} is not supported: spaces come last")
    for step in own:
        if step["type"] == "Prepend" and step["prepend"] != SPACE:
            raise ValueError(f"normalizer {step!r:.80} is not supported: {SPACE} is what is put before a text")
    prefix, escaped = "prepend" if any(step["type"] == "Prepend" for step in own) else "never", SPACES in own
    for step in steps_of(content.get("pre_tokenizer"), "pretokenizer"):
        if step["type"] == "Metaspace" and step.get("replacement") == SPACE:
            old = "always" if step.get("add_prefix_space", True) else "never"
            scheme, escaped = step.get("prepend_scheme") or old, True
            prefix = "prepend" if DOUBLED in own and scheme == "always" else scheme if prefix == "never" else prefix
        elif step["type"] == "Split" and step["behavior"] in ("Isolated", "isolated") and "Regex" in step["pattern"]:
            cut_out = [re.sub(r"\\(.)", r"\1", piece) for piece in re.split(r"(?<!\\)\|", step["pattern"]["Regex"])]
            if "|".join(map(re.escape, cut_out)) != step["pattern"]["Regex"]:
                raise ValueError(f"pre-tokenizer {step!r:.200} is not supported beside sentencepiece")
        elif (
            step["type"] == "Split" and step["pattern"] == {"String": " "} and step["behavior"] == "MergedWithPrevious"
        ):
            pass  # Gemma's: no space is left by then
        else:
            raise ValueError(f"pre-tokenizer {step['type']!r:.60} is not supported beside sentencepiece")
    early = steps[: len(steps) - len(own)] + [SPACES] * (SPACES in own and prefix in ("always", "first"))
    if prefix == "first" and any(step["type"] == "Replace" and step != SPACES for step in early):
        raise ValueError("prepend_scheme first is not supported behind a Replace, which moves where a text begins")
    late = [t["content"] for t in content.get("added_tokens") or [] if t.get("normalized") and not t.get("special")]
    if DOUBLED in own and late:
        raise ValueError(f"added token {late[0]!r:.60} behind a Replace of the first space is not supported")
    if not escaped or DOUBLED in own and prefix != "prepend":
        raise ValueError(f"a vocabulary with bytes whose spaces do not become {SPACE} is not supported")
    return prefix, early, cut_out


def blob_of_merges(content: dict, cut_out: list[str]) -> tuple[bytes, list[tuple[str, str]]]:
    """A sentencepiece model of the pieces of a tokenizer.json; and its merges, unless it makes the same of its scores."""
    model, added = content["model"], {token["content"]: token for token in content.get("added_tokens") or []}
    vocabulary, unknown = model["vocab"], model.get("unk_token")
    if unknown is None and added.get("<unk>", {}).get("special"):
        unknown = "<unk>"
    plain = {"type": ("BPE",), "dropout": (None, 0), "continuing_subword_prefix": (None, "")}
    plain |= {"end_of_word_suffix": (None, ""), "ignore_merges": (None, False, bool(cut_out))}
    for key_, values in plain.items():
        if model.get(key_) not in values:
            raise ValueError(f"{key_} {model[key_]!r:.60} is not supported for a vocabulary with bytes")
    size = len(vocabulary)
    if sorted(vocabulary.values()) != list(range(size)) or size > LARGEST_VOCABULARY:
        raise ValueError(f"the ids of its {size} tokens are not 0 to {size - 1}")
    if missing := [i for i in range(256) if f"<0x{i:02X}>" not in vocabulary]:
        raise ValueError(f"byte_fallback without a token for byte {missing[0]} is not supported")
    tokens = sorted(vocabulary, key=vocabulary.get)
    singles = [token for token in tokens if len(token) == 1]
    ranks, halves = {token: rank for rank, token in enumerate(singles)}, []
    for one in model["merges"]:
        left, right = one.split(" ") if isinstance(one, str) else one
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ValueError(f"merge {one!r:.60} does not make a token of two others")
        ranks.setdefault(left + right, len(ranks))
        halves.append((left, right))
    pairs = {}
    for turn, (left, right) in enumerate(halves, 1):
        if left in ranks and right in ranks:
            pairs.setdefault((ranks[left], ranks[right]), (turn, ranks[left + right]))
    same = made_as_listed(len(ranks), len(singles), pairs)
    if cut_out and not same:
        raise ValueError("its merges make other pieces than sentencepiece would, which is not supported")
    types, scores = [], []
    for token in tokens:
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", token) is not None
        kind = (
            UNKNOWN
            if token == unknown
            else BYTE
            if is_byte
            else CONTROL
            if added.get(token, {}).get("special")
            else NORMAL
        )
        kind = USER_DEFINED if token in cut_out else kind
        if kind in (UNKNOWN, CONTROL, BYTE) and len(token) > 1 and token in ranks:
            raise ValueError(f"a merge makes the token {token!r:.60} of plain text, which is not supported")
        if kind == NORMAL and token not in ranks:
            kind = CONTROL if token in added else UNUSED  # no merge makes it
        types.append(kind)
        scores.append(-float(ranks.get(token, 0)))
    if unknown is None:  # sentencepiece insists on one, which no text produces
        unused = [i for i, kind in enumerate(types) if kind in (UNUSED, CONTROL)]
        if not unused:
            raise ValueError("it has neither unk_token nor a token to spare, one of which sentencepiece needs")
        types[unused[-1]], unknown = UNKNOWN, tokens[unused[-1]]
    parts = {"tokens": tokens, "scores": scores, "types": types, "unk": vocabulary[unknown], "add_space_prefix": False}
    return sentencepiece_blob(parts), [] if same else halves


def write_hf(tokenizer: SentencePieceTokenizer, directory: str | Path) -> list[Path]:
    """The files of an HF directory, from which transformers 4 and 5 make a tokenizer with the same ids, and we our own."""
    parts, model, size = tokenizer.parts(), tokenizer.model, tokenizer.model.vocab_size()
    identity = tokenizer.prefix != "model" or model.decode(model.encode(PROBE)) == PROBE
    if not identity or not any(map(model.is_byte, range(size))):
        raise ValueError(
            "this sentencepiece model rewrites texts before it splits them, which tokenizer.json has no form for here"
        )
    tokens = [model.id_to_piece(i).replace(NUL, "\0") for i in range(size)]
    user_defined = {tokens[i] for i in user_defined_pieces(tokenizer._model)}
    ids = {token: i for i, token in enumerate(tokens)}
    made = [i for i, token in enumerate(tokens) if parts["types"][i] == NORMAL or token in tokenizer.added]
    # a piece is merged from any two pieces that make it; better scores first
    pairs = (
        (-model.get_score(i), i, ids[token[:k]], f"{token[:k]} {token[k:]}")
        for i, token in ((i, tokens[i]) for i in made)
        if not model.is_control(i)
        for k in range(1, len(token))
        if token[:k] in ids and token[k:] in ids and not {token[:k], token[k:]} & user_defined
    )
    scheme = tokenizer.prefix
    if scheme == "model":
        scheme = "prepend" if parts["add_space_prefix"] else "never"
    spaces = [{"type": "Prepend", "prepend": SPACE}] * (scheme == "prepend")
    spaces += [SPACES] * (scheme in ("prepend", "never"))
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    before = [metaspace] * (scheme in ("always", "first"))
    if user_defined:  # pieces that sentencepiece cuts out of a text, spaces already put before it
        pattern = "|".join(map(re.escape, sorted(user_defined, key=len, reverse=True)))
        before.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    special = {
        tokens[i]: Added(i, True) for i in range(size) if parts["types"][i] in (UNKNOWN, CONTROL)
    } | tokenizer.added
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * (scheme != "never")
    content = {
        "version": "1.0",
        "added_tokens": [
            added_token(token.id, text, token.special, token.flags)
            for text, token in sorted(special.items(), key=lambda item: item[1].id)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [*tokenizer.normalizer, *spaces]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": before} if before else None,
        "post_processor": bos_first(tokenizer.piece(tokenizer.bos), tokenizer.bos) if tokenizer.add_bos else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": tokenizer.beside.get("merges") or [merge for *_, merge in sorted(pairs)],
            "unk_token": tokens[parts["unk"]],
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": bool(user_defined),
        },
    }
    files = write_files(directory, content, {"bos_token": None, **tokenizer.special}, tokenizer.chat_template)
    if "merges" in tokenizer.beside:  # which the model alone would not follow
        return files
    (Path(directory) / MODEL_FILE).write_bytes(tokenizer._model)
    return [*files, Path(directory) / MODEL_FILE]
