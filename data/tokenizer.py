"""Text <-> token ids. Our own models use a sentencepiece BPE with byte fallback, so that every text has ids and comes back
unchanged; pretrained ones bring a sentencepiece model or a byte-level BPE (data/bpe.py). All have the same few methods.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from data import bpe, spm
from data.bpe import BPE_FILE, BPETokenizer, load_bpe
from data.spm import MODEL_FILE, SentencePieceTokenizer, read_hf_directory
from data.words import ALIASES, STARTS_WITH_BOS

HF_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
PAD, BOS, EOS, UNK = 0, 1, 2, 3  # sentencepiece insists on unk; with byte fallback no text ever produces it

Tokenizer = SentencePieceTokenizer | BPETokenizer


class Detokenizer:
    """Text of a stream of ids, piece by piece: never half a character, and all pieces together are the whole text.

    The stream continues a text: the space before sentencepiece's first word, which `decode` drops, stays; or it starts
    `afresh`, and is what `decode` says. `flush` gives what is left at the end: U+FFFD where the last character is incomplete.
    """

    def __init__(self, tokenizer: Tokenizer, afresh: bool = False):
        self.tokenizer, self.afresh = tokenizer, afresh
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        piece = self.decoder.decode(self.tokenizer.token_bytes(int(i)))
        if self.afresh and piece:
            self.afresh = False
            if not self.tokenizer.decode([int(i)]).startswith(" "):
                piece = piece.removeprefix(" ")
        return piece

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in a directory: of a run or checkpoint, of prepared data, its own, or of an HF-format model."""
    directory = Path(directory)
    inside = directory / "tokenizer"  # prepared data keeps it one level down, a run in its checkpoints
    for home in (inside, directory, *sorted(directory.glob("step_*"), reverse=True)[:1]):
        if (home / BPE_FILE).is_file():
            return load_bpe(home / BPE_FILE)
        has_model = (home / MODEL_FILE).is_file()
        if (home / "tokenizer.json").is_file() or has_model and any((home / name).is_file() for name in HF_FILES):
            return read_hf_directory(home)
        if has_model:
            return SentencePieceTokenizer(home / MODEL_FILE)
    return SentencePieceTokenizer(directory / MODEL_FILE)


def tokenizer_from_parts(parts: dict) -> Tokenizer:
    """A tokenizer of plain lists, as `parts()` gives them and GGUF files hold them. ValueError where they do not fit."""
    known = {"gpt2": ("tokens", "types", "merges", "pre", "eos"), "llama": ("tokens", "types", "scores", "bos", "eos")}
    if parts.get("model") not in list(known):
        raise ValueError(f"tokenizer model {parts.get('model')!r:.60} is not supported; known: {', '.join(known)}")
    if missing := [name for name in known[parts["model"]] if name not in parts]:
        raise ValueError(f"the tokenizer lacks its {', '.join(missing)}")
    if parts["model"] == "gpt2":
        names = (*known["gpt2"], "bos", "pad", "add_bos", "chat_template", "beside")
        given = (
            {"add_bos": ALIASES.get(parts["pre"], parts["pre"]) in STARTS_WITH_BOS}
            if isinstance(parts["pre"], str)
            else {}
        )
        return BPETokenizer(**given | {name: parts[name] for name in names if name in parts})
    return spm.from_parts(parts)


def gguf_parts(tokenizer: Tokenizer, stop_ids: Sequence[int] = ()) -> dict:
    """The parts of a tokenizer for a GGUF file. ValueError, by name, for what llama.cpp would read otherwise.

    stop_ids: all that end a text; llama.cpp has a key for two beside eos.
    """
    parts = tokenizer.parts()
    if isinstance(parts.get("pre"), dict):
        raise ValueError(f"GGUF has no name for the tokenizer's words: {parts['pre']['splits']!r:.200}")
    if isinstance(tokenizer, SentencePieceTokenizer) and "merges" in tokenizer.beside:
        raise ValueError(
            "GGUF has no place for the merges of a sentencepiece vocabulary, which its scores do not follow"
        )
    for text, token in tokenizer.added.items():
        if eats := set(token.flags) - {"normalized"}:
            raise ValueError(f"GGUF cannot say that added token {text!r:.60} has {', '.join(sorted(eats))}")
    others = sorted({*stop_ids} - {tokenizer.eos})
    stops = {"stops": sorted(stop_ids)} if others else {}
    return parts | dict(zip(("eot", "eom"), others)) | stops


def write_hf(tokenizer: Tokenizer, directory: str | Path) -> list[Path]:
    """The files of an HF directory, from which transformers 4 and 5 make a tokenizer with the same ids, and we our own."""
    return (bpe if isinstance(tokenizer, BPETokenizer) else spm).write_hf(tokenizer, directory)


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
