"""Text <-> token ids. Our own models use a sentencepiece BPE with byte fallback, so that every text has ids and comes back
unchanged; pretrained ones bring a sentencepiece model or a byte-level BPE (data/bpe.py). All have the same few methods.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from data import bpe
from data.bpe import BPE_FILE, BPETokenizer, load_bpe, read_hf

MODEL_FILE = "tokenizer.model"
HF_FILE = "tokenizer.json"
SPACE = "\u2581"  # sentencepiece's own letter for a space
PAD, BOS, EOS, UNK = 0, 1, 2, 3  # sentencepiece insists on unk; with byte fallback no text ever produces it


class SentencePieceTokenizer:
    """A trained sentencepiece model; bos and eos are added by whoever builds the sequence, never by `encode`.

    `blob` is the content of the model file where there is no file yet. add_bos: texts of this model start with bos.
    """

    def __init__(self, path: str | Path | None, blob: bytes | None = None, chat_template: str | None = None):
        self.path = None if path is None else Path(path)
        try:
            self._blob = self.path.read_bytes() if blob is None else blob
        except FileNotFoundError:
            raise FileNotFoundError(f"no tokenizer at {self.path}; run `python -m data.prepare` first") from None
        self.fingerprint = hashlib.sha256(self._blob).hexdigest()
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=self._blob)
        except RuntimeError:
            what = f"{self.path or 'the tokenizer'} ({len(self._blob)} bytes)"
            raise ValueError(f"{what} is not a sentencepiece model; prepare it again") from None
        self.vocab_size = self.model.vocab_size()
        self.bos, self.eos, self.add_bos, self.chat_template = (
            self.model.bos_id(),
            self.model.eos_id(),
            True,
            chat_template,
        )
        # Llama 2's has no pad: no text ever produces unk, so that is one to spare
        self.pad = self.model.pad_id() if self.model.pad_id() >= 0 else self.model.unk_id()
        if len({self.pad, self.bos, self.eos} - {-1}) < 3:
            raise ValueError(
                f"{self.path or 'the tokenizer'} lacks a distinct pad, bos or eos ({self.pad}, {self.bos}, {self.eos})"
            )
        self.start = self.bos  # what a plain text begins with
        self.control = {self.model.id_to_piece(i): i for i in range(self.vocab_size) if self.model.is_control(i)}
        self._hidden = {*self.control.values(), self.pad}

    def encode(self, text: str) -> list[int]:
        """Ids of a text. "<s>" in it is four ordinary characters: user text cannot become a control token."""
        return self.model.encode(text)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return self.model.encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without bos, eos and pad; bytes that are no UTF-8 become U+FFFD."""
        return self.model.decode([i for i in map(int, ids) if i not in self._hidden and 0 <= i < self.vocab_size])

    def token_bytes(self, i: int) -> bytes:
        """What an id adds to a text that has begun; models may have more rows than there are tokens."""
        if i in self._hidden or not 0 <= i < self.vocab_size:
            return b""
        piece = self.model.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if self.model.is_byte(i) else piece.replace(SPACE, " ").encode()

    def parts(self) -> dict:
        """All of it in plain lists, as GGUF files take it."""
        model, ids = self.model, range(self.vocab_size)
        kinds = ((2, model.is_unknown), (3, model.is_control), (5, model.is_unused), (6, model.is_byte))
        return {
            "model": "llama",
            "tokens": [model.id_to_piece(i) for i in ids],
            "scores": [float(model.get_score(i)) for i in ids],
            "types": [next((kind for kind, holds in kinds if holds(i)), 1) for i in ids],
            **{"bos": self.bos, "eos": self.eos, "pad": self.pad, "unk": model.unk_id(), "add_bos": self.add_bos},
            "add_space_prefix": model.encode_as_pieces("a")[0].startswith(SPACE),
            "chat_template": self.chat_template,
        }

    def save(self, directory: str | Path) -> Path:
        """Writes the model file into a directory (a checkpoint, usually)."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.path = Path(directory) / MODEL_FILE
        self.path.write_bytes(self._blob)
        return self.path


Tokenizer = SentencePieceTokenizer | BPETokenizer


class Detokenizer:
    """Text of a stream of ids, piece by piece: never half a character, and all pieces together are the whole text.

    The stream continues a text: the space before sentencepiece's first word, which `decode` drops, stays. `flush` gives
    what is left at the end: U+FFFD where the last character is incomplete.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        return self.decoder.decode(self.tokenizer.token_bytes(int(i)))

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in a directory: of a checkpoint, of prepared data, its own, or of an HF-format model."""
    directory = Path(directory)
    inside = directory / "tokenizer"  # prepared data keeps it one level down
    for home in (inside, directory):
        if (home / BPE_FILE).is_file():
            return load_bpe(home / BPE_FILE)
        if (home / MODEL_FILE).is_file():
            return SentencePieceTokenizer(home / MODEL_FILE)
        if (home / HF_FILE).is_file():
            return read_hf(home)
    return SentencePieceTokenizer(directory / MODEL_FILE)


def tokenizer_from_parts(parts: dict) -> Tokenizer:
    """A tokenizer of plain lists, as `parts()` gives them and GGUF files hold them. ValueError where they do not fit."""
    known = {"gpt2": ("tokens", "types", "merges", "pre", "eos"), "llama": ("tokens", "types", "scores", "bos", "eos")}
    if parts.get("model") not in list(known):
        raise ValueError(f"tokenizer model {parts.get('model')!r:.60} is not supported; known: {', '.join(known)}")
    if missing := [name for name in known[parts["model"]] if name not in parts]:
        raise ValueError(f"the tokenizer lacks its {', '.join(missing)}")
    if parts["model"] == "gpt2":
        names = (*known["gpt2"], "bos", "pad", "add_bos", "chat_template")
        return BPETokenizer(**{name: parts[name] for name in names if name in parts})
    return SentencePieceTokenizer(None, sentencepiece_blob(parts), parts.get("chat_template"))


def write_hf(tokenizer: Tokenizer, directory: str | Path) -> list[Path]:
    """The files of an HF directory, from which transformers 4 and 5 make a tokenizer with the same ids, and we our own."""
    if isinstance(tokenizer, BPETokenizer):
        return bpe.write_hf(tokenizer, directory)
    parts, probe = tokenizer.parts(), "\ufb01  \u00bd\n"
    if tokenizer.decode(tokenizer.encode(probe)) != probe or not any(
        map(tokenizer.model.is_byte, range(tokenizer.vocab_size))
    ):
        raise ValueError(
            "this sentencepiece model rewrites texts before it splits them, which tokenizer.json has no form for here"
        )
    tokens, space = parts["tokens"], [{"type": "Prepend", "prepend": SPACE}] if parts["add_space_prefix"] else []
    ids = {token: i for i, token in enumerate(tokens)}
    # a piece is merged from any two pieces that make it; better scores first
    pairs = (
        (-parts["scores"][i], i, ids[token[:k]], f"{token[:k]} {token[k:]}")
        for i, token in enumerate(tokens)
        for k in range(1, len(token))
        if parts["types"][i] == 1 and token[:k] in ids and token[k:] in ids
    )
    content = {
        "version": "1.0",
        "added_tokens": [bpe.added_token(i, token) for i, token in enumerate(tokens) if parts["types"][i] in (2, 3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*space, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        "post_processor": bpe.bos_first(tokens[tokenizer.bos], tokenizer.bos),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space else []),
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": [merge for *_, merge in sorted(pairs)],
            "unk_token": tokens[parts["unk"]],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }
    names = {name: tokens[getattr(tokenizer, name)] for name in ("bos", "eos", "pad")}
    files = bpe.write_hf_files(directory, content, names, tokenizer.chat_template)
    (Path(directory) / MODEL_FILE).write_bytes(tokenizer._blob)
    return [*files, Path(directory) / MODEL_FILE]


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
    if special.get("pad") == special["eos"]:
        del special["pad"]
    pieces = (
        field(1, token.encode()) + key(2, 5) + struct.pack("<f", score) + field(3, kind)
        for token, score, kind in zip(tokens, scores, types)
    )
    trainer = field(3, 2) + field(4, len(tokens)) + field(35, 1)  # BPE, its size, bytes for what has no piece
    for name, number in (("unk", 45), ("bos", 46), ("eos", 47), ("pad", 48)):  # found by their spelling
        trainer += field(number, tokens[special[name]].encode()) if name in special else b""
    normalizer = field(1, b"identity") + field(3, int(parts.get("add_space_prefix", True))) + field(4, 0) + field(5, 1)
    return b"".join(field(1, piece) for piece in pieces) + field(2, trainer) + field(3, normalizer)


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def key(number: int, wire_type: int) -> bytes:
    return varint(number << 3 | wire_type)


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protobuf message: a whole number, or a length and bytes."""
    if isinstance(value, int):
        return key(number, 0) + varint(value)
    return key(number, 2) + varint(len(value)) + value


def train_sentencepiece(
    texts: Iterable[str], path: str | Path, vocab_size: int = 2048, control: Sequence[str] = ()
) -> SentencePieceTokenizer:
    """Trains a BPE on texts and writes the model file; the same texts give the same bytes. ValueError if too few.

    control: tokens beside bos, eos and pad that no text ever becomes, such as the marks of a chat (data/chat.py).
    """
    texts = list(texts)
    longest = max((len(text.encode()) for text in texts), default=0)  # bytes
    blob = io.BytesIO()  # not model_prefix=: the file would then contain its own path, and so would the fingerprint
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=blob,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,  # 256 of the pieces: no text is ever unknown
            character_coverage=1.0 - 1e-4,
            normalization_rule_name="identity",  # decode(encode(text)) == text
            remove_extra_whitespaces=False,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            control_symbols=list(control),
            num_threads=1,
            minloglevel=2,
            **({"max_sentence_length": longest} if longest > 4192 else {}),  # its default; longer ones are left out
        )
    except (RuntimeError, OSError) as e:
        why = " ".join(str(e).split()).rpartition("]")[2].strip()  # "INTERNAL: file(line) [test] sentences"
        raise ValueError(
            f"cannot train a tokenizer of {vocab_size} pieces (--vocab_size): {why or 'there is no text'}"
        ) from None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(blob.getvalue())
    return SentencePieceTokenizer(path)


def check_fingerprint(expected: str, actual: str, where: str) -> None:
    """Raises ValueError if the ids in `where` were made by another tokenizer than the one in use."""
    if expected != actual:
        raise ValueError(
            f"wrong tokenizer for {where}: it was made with {expected[:12]}, this one is {actual[:12]}; "
            "use the tokenizer saved beside it, or prepare the data again with this one (--tokenizer)"
        )
