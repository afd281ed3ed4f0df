"""Byte-level BPE, the tokenizer of GPT-2, Llama 3, Qwen and SmolLM: ids equal to those of HF's `tokenizers`.

A text is cut into words by a pattern, and the UTF-8 bytes of each word are merged pair by pair, earliest merge first
(GPT-2, https://github.com/openai/gpt-2). tiktoken does that, five times faster than HF's; it wants one rank per merged
piece, which are not the ids where a vocabulary was put in another order, as SmolLM2's was.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import regex  # tiktoken's own dependency
import tiktoken

BPE_FILE = "bpe.json"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # GGUF's token types
LARGEST_VOCABULARY = 2**24  # the largest published ones have 2**18
LONG_SPACE = re.compile(r"\s{10000}")

# vocabularies spell each byte as one printable letter: those that are printable as themselves, the others from U+0100
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {byte: chr(byte) for byte in PRINTABLE}
LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in LETTERS)}
TO_BYTES = {ord(letter): byte for byte, letter in LETTERS.items()}  # for str.translate, then Latin-1
ALPHABET = set(LETTERS.values())


class Words(NamedTuple):
    """How a text becomes words."""

    pattern: str
    nfc: bool = False  # composed characters first: e + accent is the same text as the accented letter
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges make of it


CONTRACTIONS = "'(?:[sdmt]|ll|ve|re)"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {  # by the names that GGUF files give them
    "gpt-2": Words(CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    # digits stand alone, so a space before a digit ends a piece: hence the digit in the look-ahead
    "smollm": Words(r"\p{N}|" + CONTRACTIONS + r"| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"),
    "qwen2": Words(CL100K % "", nfc=True),
    "llama-bpe": Words(CL100K % "{1,3}", ignore_merges=True),
}


class BPETokenizer:
    """A byte-level BPE; bos and eos are added by whoever builds the sequence, never by `encode`.

    tokens: spelling of each id; types: GGUF's kind of each; merges: "left right", earliest first; pre: a key of WORDS.
    pad: a control token of its own where the model has one to spare. add_bos: texts of this model start with bos.
    ValueError where these do not fit together.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        types: Sequence[int],
        merges: Sequence[str],
        pre: str,
        eos: int,
        bos: int | None = None,
        pad: int | None = None,
        add_bos: bool = False,
        chat_template: str | None = None,
        path: Path | None = None,
    ):
        check_parts(tokens, types, merges, pre, {"eos": eos, "bos": bos, "pad": pad})
        self.tokens, self.types, self.merges, self.pre = list(tokens), list(types), list(merges), pre
        self.vocab_size = len(tokens)
        self.bos, self.eos, self.add_bos = eos if bos is None else bos, eos, bool(add_bos)
        # a pad that ends texts, as GPT-2's and SmolLM2's does, cannot mark what lies beyond their end
        spare = [i for i, kind in enumerate(types) if kind == CONTROL and i not in (self.bos, eos)]
        self.pad = pad if pad is not None and pad != eos else (spare or [eos])[0]
        self.chat_template, self.path = chat_template, path
        self.control = {tokens[i]: i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL) and tokens[i]}
        # what a plain text begins with: bos, or what stood between the texts of a model that was trained without one
        self.start = self.bos if add_bos else self.control.get("<|endoftext|>", self.bos)
        self.fingerprint = hashlib.sha256(dump({**self.parts(), "chat_template": None})).hexdigest()

        self._bytes = spelled_bytes(tokens, types)
        normal = {piece: i for i, piece in enumerate(self._bytes) if piece}
        self._user_defined = {tokens[i]: i for i, kind in enumerate(types) if kind == USER_DEFINED and tokens[i]}
        for text, i in self._user_defined.items():
            self._bytes[i] = text.encode()
        longest_first = sorted(map(re.escape, self._user_defined), key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(longest_first)})") if longest_first else None
        self._words = WORDS[pre]
        ranks, self._ids, self._missing = rank_pieces(normal, merges, self._words.ignore_merges)
        self._core = tiktoken.Encoding(pre, pat_str=self._words.pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> list[int]:
        """Ids of a text. "<|im_end|>" in it is ordinary characters: user text cannot become a control token."""
        if self._cut is None:
            return self._encode_ordinary(text)
        ids = []
        for i, part in enumerate(self._cut.split(text)):  # what the vocabulary's authors defined as one piece of text
            ids += [self._user_defined[part]] if i % 2 else self._encode_ordinary(part)
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without control tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, i: int) -> bytes:
        """What an id adds to a text; models may have more rows than there are tokens."""
        return self._bytes[i] if 0 <= i < len(self._bytes) else b""

    def parts(self) -> dict:
        """All of it in plain lists, as `BPETokenizer` and GGUF files take it."""
        names = ("tokens", "types", "merges", "pre", "eos", "bos", "pad", "add_bos", "chat_template")
        return {"model": "gpt2", **{name: getattr(self, name) for name in names}}

    def save(self, directory: str | Path) -> Path:
        """Writes the tokenizer's file into a directory (a checkpoint, usually)."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.path = Path(directory) / BPE_FILE
        self.path.write_bytes(dump(self.parts()))
        return self.path

    def _encode_ordinary(self, text: str) -> list[int]:
        if self._words.nfc:
            text = unicodedata.normalize("NFC", text)
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates become U+FFFD
        ids = self._ids
        if self._missing and len(text.encode().translate(None, self._missing)) < len(text.encode()):
            return self._encode_words(text)
        if len(text) > 10000 and LONG_SPACE.search(text):  # a million spaces end tiktoken's regex, and the process
            return self._encode_words(text)
        return [ids[rank] for rank in self._core.encode_ordinary(text)]

    def _encode_words(self, text: str) -> list[int]:
        """The same, word by word; bytes that have no token are dropped before their neighbours merge, as HF does."""
        ids = []
        for word in regex.findall(self._words.pattern, text):
            if known := word.encode().translate(None, self._missing):
                ids += [self._ids[rank] for rank in self._core._encode_single_piece(known)]
        return ids


def check_parts(tokens, types, merges, pre, special: dict[str, int | None]) -> None:
    """ValueError unless these, which come from strangers' files, are a tokenizer."""
    if pre not in WORDS:
        raise ValueError(f"pre-tokenizer {pre!r:.60} is not supported; known: {', '.join(WORDS)}")
    for name, values, kind in (("tokens", tokens, str), ("token types", types, int), ("merges", merges, str)):
        if not isinstance(values, (list, tuple)) or not all(type(value) is kind for value in values):
            raise ValueError(f"the tokenizer's {name} are no list of {kind.__name__}: {values!r:.60}")
    if len(tokens) != len(types):
        raise ValueError(f"the tokenizer has {len(tokens)} tokens, but types of {len(types)}")
    for name, i in special.items():
        if i is None and name != "eos":
            continue
        if type(i) is not int or not 0 <= i < len(tokens):
            raise ValueError(f"the tokenizer's {name} is {i!r:.60}; an id below {len(tokens)} was expected")


def dump(parts: dict) -> bytes:
    return json.dumps(parts, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def spelled_bytes(tokens: Sequence[str], types: Sequence[int]) -> list[bytes]:
    """The bytes of each normal token; of the others, none."""
    spelled = [token if kind == NORMAL else "" for token, kind in zip(tokens, types)]
    if strange := set("".join(spelled)) - ALPHABET:
        culprit = next(token for token in spelled if set(token) & strange)
        raise ValueError(f"token {culprit!r:.60} is not spelled in the letters of byte-level BPE")
    return [token.translate(TO_BYTES).encode("latin-1") for token in spelled]


def rank_pieces(normal: dict[bytes, int], merges: Sequence[str], ignore_merges: bool):
    """Rank of each piece for tiktoken, id of each rank, and the bytes that have no token.

    Single bytes come first, then what each merge makes. tiktoken needs all 256 bytes: the missing get ranks, and no id.
    Pieces that no merge makes are never found, unless words are looked up before the merges (`ignore_merges`).
    """
    singles = sorted((normal[bytes([byte])], byte) for byte in range(256) if bytes([byte]) in normal)
    missing = bytes(byte for byte in range(256) if bytes([byte]) not in normal)
    pieces = [bytes([byte]) for _, byte in singles] + [bytes([byte]) for byte in missing]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    for merge in merges:
        left, right = (half.translate(TO_BYTES).encode("latin-1", "replace") for half in merge.partition(" ")[::2])
        if left not in normal or right not in normal or left + right not in normal:
            raise ValueError(f"merge {merge!r:.60} does not make a token of two others")
        ranks.setdefault(left + right, len(ranks))
    if ignore_merges:
        for piece in normal:
            ranks.setdefault(piece, len(ranks))
    return ranks, [normal.get(piece, -1) for piece in ranks], missing


# --- the forms in which vocabularies come ---


def load_bpe(file: str | Path) -> BPETokenizer:
    """A tokenizer that `save` wrote."""
    parts = read_json(Path(file))
    missing = {"tokens", "types", "merges", "pre", "eos"} - parts.keys()
    if parts.pop("model", None) != "gpt2" or missing:
        raise ValueError(f"{file} is not a tokenizer of ours: it lacks {', '.join(sorted(missing)) or 'its model'}")
    try:
        return BPETokenizer(**parts, path=Path(file))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def read_ranks(file: str | Path, pre: str = "gpt-2", special: Sequence[str] = ("<|endoftext|>",)) -> BPETokenizer:
    """A tiktoken file, "base64 rank" per line, as GPT-2's in the `openai-whisper` package; special tokens follow it."""
    try:
        lines = [line.split() for line in Path(file).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in lines}
    except ValueError:
        raise ValueError(f"{file} is not a file of ranks, one base64 token and its rank per line") from None
    if sorted(ranks.values()) != list(range(len(lines))):
        raise ValueError(f"{file} is damaged: the ranks of its {len(lines)} tokens are not 0 to {len(lines) - 1}")
    tokens = ["".join(map(LETTERS.get, piece)) for piece in sorted(ranks, key=ranks.get)]
    merges = [spell_merge(piece, ranks) for piece in sorted(ranks, key=ranks.get) if len(piece) > 1]
    types = [NORMAL] * len(tokens) + [CONTROL] * len(special)
    return BPETokenizer([*tokens, *special], types, merges, pre, eos=len(tokens))


def spell_merge(piece: bytes, ranks: dict[bytes, int]) -> str:
    """The merge that makes a piece: its last one, when only earlier ones are allowed."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, ranks[piece]), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank == ranks[piece]:
            raise ValueError(f"token {piece!r} of rank {rank} is not made of earlier ones: not a BPE")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return " ".join("".join(map(LETTERS.get, part)) for part in parts)


def read_hf(directory: str | Path) -> BPETokenizer:
    """The tokenizer of an HF directory: tokenizer.json, and the special tokens and chat template of the files beside it.

    ValueError, with the name of what it is, for everything that would give other ids than HF's code.
    """
    directory = Path(directory)
    file = directory / "tokenizer.json"
    content = read_json(file)
    beside = [directory / name for name in ("tokenizer_config.json", "generation_config.json", "config.json")]
    named, *numbered = (read_json(other) if other.is_file() else {} for other in beside)
    template = directory / "chat_template.jinja"
    try:
        vocabulary = hf_vocabulary(content)
        tokens = {token: i for i, token in enumerate(vocabulary["tokens"])}
        special = {"bos": hf_bos(content.get("post_processor"), tokens)}
        add_bos = special["bos"] is not None
        for name in ("eos", "bos", "pad"):
            token = named.get(f"{name}_token")  # text, or in older files an object that holds it
            token = token.get("content") if isinstance(token, dict) else token
            ids = [other.get(f"{name}_token_id") for other in numbered]
            ids = [i[0] if isinstance(i, list) and i else i for i in ids]  # of several, the first
            found = [special.get(name), tokens.get(token), *ids]
            special[name] = next((i for i in found if i is not None), None)
        templates = template.read_text("utf-8") if template.is_file() else named.get("chat_template")
        if isinstance(templates, list):
            templates = next((one["template"] for one in templates if one["name"] == "default"), None)
        return BPETokenizer(**vocabulary, **special, add_bos=add_bos, chat_template=templates)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a tokenizer.json as HF writes it: {error!r:.100}") from None


def hf_vocabulary(content: dict) -> dict:
    """tokens, types, merges and pre of a tokenizer.json."""
    model = content["model"]
    if model.get("byte_fallback"):
        raise ValueError("it spells sentencepiece, whose tokenizer.model is needed beside it")
    pre = hf_words(content["pre_tokenizer"], content.get("normalizer"))
    plain = {"type": ("BPE",), "dropout": (None, 0), "continuing_subword_prefix": (None, "")}
    plain |= {"end_of_word_suffix": (None, ""), "ignore_merges": (None, False, WORDS[pre].ignore_merges)}
    for key, values in plain.items():
        if model.get(key) not in values:
            raise ValueError(f"{key} {model[key]!r:.60} is not supported for a {pre} vocabulary: byte-level BPE is")
    if model.get("unk_token") is not None and not ALPHABET <= model["vocab"].keys():
        raise ValueError(
            f"unk_token {model['unk_token']!r:.60} is not supported: some bytes have no token of their own"
        )
    added = {token["id"]: token for token in content.get("added_tokens") or []}
    ids = [*model["vocab"].values(), *added]
    if not all(type(i) is int and 0 <= i < LARGEST_VOCABULARY for i in ids):
        raise ValueError(f"token ids must be whole numbers below {LARGEST_VOCABULARY}")
    tokens = [f"[PAD{i}]" for i in range(max(ids) + 1)]  # what llama.cpp calls ids without a token
    types = [UNUSED] * len(tokens)
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for i, token in added.items():
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word") or not token["content"]:
            raise ValueError(f"added token {token['content']!r:.60} eats what is beside it, which is not supported")
        tokens[i], types[i] = token["content"], CONTROL if token.get("special") else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"tokens": tokens, "types": types, "merges": merges, "pre": pre}


def hf_words(spec: dict, normalizer: dict | None) -> str:
    """The key of WORDS that a tokenizer.json means."""
    *before, last = spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    byte_level = last["type"] == "ByteLevel" and not last.get("add_prefix_space", True)
    splits = last.get("use_regex", True)
    pre = None
    if byte_level and splits and not before:
        pre = "gpt-2"
    elif byte_level and splits and before == [{"type": "Digits", "individual_digits": True}]:
        pre = "smollm"
    elif byte_level and not splits and len(before) == 1 and before[0]["type"] == "Split":
        if before[0]["behavior"] == "Isolated" and not before[0].get("invert"):
            pattern = before[0]["pattern"].get("Regex")
            pre = next((name for name, words in WORDS.items() if words.pattern == pattern), None)
    if pre is None:
        raise ValueError(f"pre-tokenizer {json.dumps(spec):.200} is not supported; known: {', '.join(WORDS)}")
    if normalizer != ({"type": "NFC"} if WORDS[pre].nfc else None):
        raise ValueError(f"normalizer {json.dumps(normalizer):.100} is not supported for a {pre} vocabulary")
    return pre


def hf_bos(post: dict | None, tokens: dict[str, int]) -> int | None:
    """The token that HF puts before every text."""
    for step in [post, *(post or {}).get("processors", [])]:
        if step and step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return tokens[step["single"][0]["SpecialToken"]["id"]]
    return None


def write_hf(tokenizer: BPETokenizer, directory: str | Path) -> list[Path]:
    """tokenizer.json and tokenizer_config.json, from which transformers 4 and 5 make a tokenizer with the same ids."""
    words, byte_level = WORDS[tokenizer.pre], {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    before = {
        "gpt-2": [],
        "smollm": [{"type": "Digits", "individual_digits": True}],
    }.get(
        tokenizer.pre, [{"type": "Split", "pattern": {"Regex": words.pattern}, "behavior": "Isolated", "invert": False}]
    )
    splits = tokenizer.pre in ("gpt-2", "smollm")
    content = {
        "version": "1.0",
        "added_tokens": [
            added_token(i, token, kind != USER_DEFINED)
            for i, (token, kind) in enumerate(zip(tokenizer.tokens, tokenizer.types))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if words.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*before, byte_level | {"use_regex": splits}]},
        "post_processor": bos_first(tokenizer.tokens[tokenizer.bos], tokenizer.bos) if tokenizer.add_bos else None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokenizer.tokens) if tokenizer.types[i] != UNUSED},
            "merges": tokenizer.merges,
            "ignore_merges": words.ignore_merges,
        },
    }
    names = {name: tokenizer.tokens[getattr(tokenizer, name)] for name in ("bos", "eos", "pad")}
    return write_hf_files(directory, content, names, tokenizer.chat_template)


def write_hf_files(
    directory: str | Path, content: dict, names: dict[str, str], chat_template: str | None
) -> list[Path]:
    config = {f"{name}_token": token for name, token in names.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if chat_template:
        config["chat_template"] = chat_template
    files = {"tokenizer.json": content, "tokenizer_config.json": config}
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        (Path(directory) / name).write_text(json.dumps(values, ensure_ascii=False, indent=1), "utf-8")
    return [Path(directory) / name for name in files]


def added_token(i: int, token: str, special: bool = True) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": token, "special": special} | flags


def bos_first(token: str, i: int) -> dict:
    """The post-processor that puts bos before every text."""
    start, one, two = (
        {kind: {"id": name, "type_id": n}}
        for kind, name, n in (("SpecialToken", token, 0), ("Sequence", "A", 0), ("Sequence", "B", 1))
    )
    special = {token: {"id": token, "ids": [i], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [start, one], "pair": [start, one, two], "special_tokens": special}


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {str(error):.100}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {content!r:.60}; a JSON object was expected")
    return content
