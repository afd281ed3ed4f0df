"""Byte-level BPE, the tokenizer of GPT-2, Llama 3, Qwen and SmolLM: ids equal to those of HF's `tokenizers`.

A text is cut into words by a pattern, and the UTF-8 bytes of each word are merged pair by pair, earliest merge first
(GPT-2, https://github.com/openai/gpt-2). tiktoken does that, five times faster than HF's; it wants one rank per merged
piece, which are not the ids where a vocabulary was put in another order, as SmolLM2's was.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken

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
from data.words import ONE_PATTERN, hf_form, named, normalized, rubs, words_of, words_of_hf

BPE_FILE = "bpe.json"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # GGUF's token types
LONG_SPACE = re.compile(r"\s{10000}")
MOST_WORDS_KEPT, LONGEST_KEPT = 2**17, 24  # whose ids are remembered; characters
# In none of ONE_PATTERN does a word begin before such a space and end behind it, or depend on what lies beyond it.
SPACE_BETWEEN = re.compile(r"(?<=\S) (?=\S)")

# vocabularies spell each byte as one printable letter: those that are printable as themselves, the others from U+0100
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {byte: chr(byte) for byte in PRINTABLE}
LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in LETTERS)}
TO_BYTES = {ord(letter): byte for byte, letter in LETTERS.items()}  # for str.translate, then Latin-1
ALPHABET = set(LETTERS.values())


class BPETokenizer(TextEncoder):
    """A byte-level BPE; bos and eos are added by whoever builds the sequence, never by `encode`.

    tokens: spelling of each id; types: GGUF's kind of each; merges: "left right", earliest first; pre: how a text becomes
    words, a name or a spec of data/words.py. pad: a control token of its own where the model has one to spare. add_bos:
    texts of this model start with bos. beside: JSON of what GGUF has no key for: flags of added tokens that eat what is
    beside them, and names that templates know. ValueError where these do not fit together.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        types: Sequence[int],
        merges: Sequence[str],
        pre: str | dict,
        eos: int,
        bos: int | None = None,
        pad: int | None = None,
        add_bos: bool = False,
        chat_template: str | None = None,
        beside: str | None = None,
        path: Path | None = None,
    ):
        words = words_of(pre)
        check_parts(tokens, types, merges, {"eos": eos, "bos": bos, "pad": pad})
        self.tokens, self.types, self.merges, self.pre = list(tokens), list(types), list(merges), named(words)
        self.vocab_size = len(tokens)
        self.bos, self.eos = eos if bos is None else bos, eos
        self.add_bos, self._bos = bool(add_bos), bos
        # a pad that ends texts, as GPT-2's and SmolLM2's does, cannot mark what lies beyond their end
        spare = [i for i, kind in enumerate(types) if kind == CONTROL and i not in (self.bos, eos)]
        self.pad = pad if pad is not None and pad != eos else (spare or [eos])[0]
        self.chat_template, self.path = chat_template, path
        self.control = {tokens[i]: i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL) and tokens[i]}
        # what a plain text begins with: bos, or what stood between the texts of a model that was trained without one
        self.start = self.bos if self.add_bos else self.control.get("<|endoftext|>", self.bos)
        more = read_more(beside)
        names = {"bos": bos, "eos": eos, "pad": self.pad}
        plain = {f"{name}_token": tokens[i] for name, i in names.items() if i is not None}
        self.flags: dict[str, list[str]] = more.get("flags", {})
        self.special: dict[str, str] = more.get("special", plain)
        kept = {"flags": self.flags} if self.flags else {}
        kept |= {"special": self.special} if self.special != plain else {}
        self.beside = dump(kept).decode() if kept else None
        ids = {**self.parts(), "bos": self.bos, "chat_template": None, "beside": self.flags}
        if not self.flags:
            del ids["beside"]
        self.fingerprint = hashlib.sha256(dump(ids)).hexdigest()

        self._bytes = spelled_bytes(tokens, types)
        normal = {piece: i for i, piece in enumerate(self._bytes) if piece}
        normal |= merged_too(tokens, types, merges)
        self.added = {
            tokens[i]: Added(i, kind != USER_DEFINED, **dict.fromkeys(self.flags.get(tokens[i], ()), True))
            for i, kind in enumerate(types)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) and tokens[i]
        }
        for text, token in self.added.items():
            if not token.special:
                self._bytes[token.id] = text.encode()
        self._words, self._known, self._known_words = words, {}, {}
        self._rubs = rubs(words.normalizer)
        self._cut = Cut({text: token for text, token in self.added.items() if not token.normalized})
        self._cut_normalized = Cut(
            {normalized(text, words.normalizer): token for text, token in self.added.items() if token.normalized}
        )
        ranks, self._ids, self._missing, pairs = rank_pieces(normal, merges, words.ignore_merges)
        # tiktoken merges whatever makes a piece, HF what is listed: the same, unless a piece is never made as listed
        self._pairs = None if made_as_listed(len(ranks), 256, pairs) else pairs
        self._ranks, pattern = ranks, ONE_PATTERN.get(words.splits)
        self._one_pattern = pattern is not None and self._pairs is None
        self._core = tiktoken.Encoding("", pat_str=pattern or "(?!)", mergeable_ranks=ranks, special_tokens={})

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without control tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, i: int) -> bytes:
        """What an id adds to a text; models may have more rows than there are tokens."""
        return self._bytes[i] if 0 <= i < len(self._bytes) else b""

    def parts(self) -> dict:
        """All of it in plain lists, as `BPETokenizer` and GGUF files take it."""
        names = ("tokens", "types", "merges", "pre", "eos", "bos", "pad", "add_bos", "chat_template")
        beside = {"beside": self.beside} if self.beside else {}
        return {"model": "gpt2", **{name: getattr(self, name) for name in names}, "bos": self._bos, **beside}

    def save(self, directory: str | Path) -> Path:
        """Writes the tokenizer's file into a directory (a checkpoint, usually)."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.path = Path(directory) / BPE_FILE
        self.path.write_bytes(dump(self.parts()))
        return self.path

    def _encode_stretch(self, text: str, after: str) -> bytes:
        """Ids of what lies between added tokens, but for those that are looked for in normalised texts."""
        if self._cut_normalized.pattern is None:
            return self._encode_ordinary(normalized(text, self._words.normalizer))
        found = self._cut_normalized.of(normalized(text, self._words.normalizer))
        return b"".join(self._encode_ordinary(stretch) if i is None else as_bytes([i]) for stretch, i in found)

    def _encode_ordinary(self, text: str) -> bytes:
        """Ids of the pieces between single spaces, most of which were seen before; see SPACE_BETWEEN."""
        if not self._one_pattern:
            return self._encode_words(text)
        first, *pieces = text.split(" ")
        found = list(map(self._known.get, pieces))
        new = [piece for piece, ids in zip(pieces, found) if ids is None] if None in found else ()
        if first[-1:].isspace() or any(map(unclear, new)):
            first, *pieces = SPACE_BETWEEN.split(text)
            found = list(map(self._known.get, pieces))
        if None in found:
            found = [self._remembered(piece, " " + piece) if i is None else i for piece, i in zip(pieces, found)]
        begin = self._known.get(" " + first)  # the others begin with no space: it is for the one without one before it
        return b"".join([self._remembered(" " + first, first) if begin is None else begin, *found])

    def _remembered(self, key: str, text: str) -> bytes:
        """Ids of a piece of a text, to be found by its key the next time."""
        ids = self._encode_chunk(text)
        if len(text) <= LONGEST_KEPT:
            if len(self._known) >= MOST_WORDS_KEPT:
                self._known.clear()
            self._known[key] = ids
        return ids

    def _encode_chunk(self, text: str) -> bytes:
        """By tiktoken."""
        raw = text.encode()
        if self._missing and len(raw.translate(None, self._missing)) < len(raw):
            return self._encode_words(text)
        if len(text) > 10000 and LONG_SPACE.search(text):  # a million spaces end tiktoken's regex, and the process
            return self._encode_words(text)
        ids = self._ids
        return as_bytes([ids[rank] for rank in self._core.encode_ordinary(text)])

    def _encode_words(self, text: str) -> bytes:
        """The same, word by word; bytes that have no token are dropped before their neighbours merge, as HF does."""
        found, known = [], self._known_words
        for word in self._words.of(text):
            ids = known.get(word)
            if ids is None:
                raw = word.encode().translate(None, self._missing)
                ids = as_bytes([self._ids[rank] for rank in self._merge(raw)])
                if len(known) >= MOST_WORDS_KEPT:
                    known.clear()
                known[word] = ids
            found.append(ids)
        return b"".join(found)

    def _merge(self, raw: bytes) -> list[int]:
        """Ranks of a word's pieces."""
        if not raw:
            return []
        if self._pairs is None:
            return self._core._encode_single_piece(raw)
        if self._words.ignore_merges and raw in self._ranks:
            return [self._ranks[raw]]
        return merge([self._ranks[raw[k : k + 1]] for k in range(len(raw))], self._pairs)


def unclear(piece: str) -> bool:
    """Is there nothing between two spaces, or more space beside one of them?"""
    return not piece or piece[0].isspace() or piece[-1].isspace()


def read_more(beside: str | None) -> dict:
    """The JSON beside a vocabulary. ValueError for what is none of ours."""
    try:
        more = json.loads(beside) if beside else {}
        flags, special = more.get("flags", {}), more.get("special", {})
        if all(isinstance(value, list) for value in flags.values()):
            if all(isinstance(value, str) for value in special.values()):
                return more
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"what the tokenizer has beside its vocabulary is none of ours: {beside!r:.60}")


def check_parts(tokens, types, merges, special: dict[str, int | None]) -> None:
    """ValueError unless these, which come from strangers' files, are a tokenizer."""
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


def merged_too(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str]) -> dict[bytes, int]:
    """Added tokens that are pieces of words as well: single bytes, and what merges make or are made of.

    ValueError where that would make a control token of somebody's text.
    """
    added = {token: i for i, token in enumerate(tokens) if types[i] not in (NORMAL, UNUSED) and token}
    if not added:
        return {}
    used = {piece for merge in merges for piece in (*merge.split(" "), merge.replace(" ", ""))} | ALPHABET
    found = {token: i for token, i in added.items() if token in used and set(token) <= ALPHABET}
    for token, i in found.items():
        if types[i] != USER_DEFINED:
            raise ValueError(f"a merge makes the control token {token!r:.60} of plain text, which is not supported")
    return {token.translate(TO_BYTES).encode("latin-1"): i for token, i in found.items()}


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
    """Rank of each piece for tiktoken, id of each rank, the bytes that have no token, and what each listed pair makes.

    Single bytes come first, then what each merge makes. tiktoken needs all 256 bytes: the missing get ranks, and no id.
    Pieces that no merge makes are never found, unless words are looked up before the merges (`ignore_merges`). pairs:
    ranks of two pieces -> (when they merge, rank of what they make).
    """
    singles = sorted((normal[bytes([byte])], byte) for byte in range(256) if bytes([byte]) in normal)
    missing = bytes(byte for byte in range(256) if bytes([byte]) not in normal)
    pieces = [bytes([byte]) for _, byte in singles] + [bytes([byte]) for byte in missing]
    ranks, halves = {piece: rank for rank, piece in enumerate(pieces)}, []
    for merge in merges:
        left, right = (half.translate(TO_BYTES).encode("latin-1", "replace") for half in merge.partition(" ")[::2])
        if left not in normal or right not in normal or left + right not in normal:
            raise ValueError(f"merge {merge!r:.60} does not make a token of two others")
        ranks.setdefault(left + right, len(ranks))
        halves.append((left, right))
    pairs = {}
    for turn, (left, right) in enumerate(halves, 1):
        if left in ranks and right in ranks:  # else nothing ever makes one of them
            pairs.setdefault((ranks[left], ranks[right]), (turn, ranks[left + right]))
    if ignore_merges:
        for piece in normal:
            ranks.setdefault(piece, len(ranks))
    return ranks, [normal.get(piece, -1) for piece in ranks], missing, pairs


def made_as_listed(pieces: int, singles: int, pairs: dict[tuple[int, int], tuple[int, int]]) -> bool:
    """Does every piece come about by a merge that is listed for it, in the order of the ranks, when it stands alone?

    Then two neighbours that make a piece in another way never meet, and merging by the rank of what comes about, as
    tiktoken and sentencepiece do, is the same as merging by the list. pairs: as `rank_pieces` makes them; the first
    `singles` of the `pieces` are characters.
    """
    splits = [[] for _ in range(pieces)]
    for (left, right), (turn, made) in pairs.items():
        splits[made].append((turn, left, right))
    turns, halves = [0] * pieces, [(-1, -1)] * pieces
    for made in range(singles, pieces):
        for turn, left, right in splits[made]:
            if turn > turns[made - 1] and meet(turn, left, right, turns, halves, pairs):
                turns[made], halves[made] = turn, (left, right)
                break
        else:
            return False
    return True


def meet(turn: int, left: int, right: int, turns: list[int], halves: list[tuple[int, int]], pairs: dict) -> bool:
    """Do two pieces, put side by side, both come about before they merge in this turn?

    Walks down the right edge of the left one and the left edge of the right one, latest first: no pair of pieces on the
    way may be listed earlier than what it would break up.
    """
    if max(turns[left], turns[right]) >= turn or min(turns[left], turns[right]) < 0:
        return False
    limit = turn
    while True:
        crossing = pairs.get((left, right))
        if crossing and crossing[0] < limit:
            return False
        if turns[left] == turns[right] == 0:
            return True
        if turns[left] > turns[right]:
            limit, left = turns[left], halves[left][1]
        else:
            limit, right = turns[right] + 1, halves[right][0]  # of two equal turns the left one is first


def merge(symbols: list[int], pairs: dict[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Sennrich et al. 2016: the earliest listed pair merges first, of several the leftmost, until none is left."""
    after = [*range(1, len(symbols)), -1]
    before = list(range(-1, len(symbols) - 1))
    waiting = []  # (turn, place, left, right): what to merge, unless one of both is gone by then

    def wait(place: int) -> None:
        if place >= 0 and after[place] >= 0:
            pair = symbols[place], symbols[after[place]]
            if pair in pairs:
                heapq.heappush(waiting, (pairs[pair][0], place, *pair))

    for place in range(len(symbols)):
        wait(place)
    while waiting:
        _, place, *pair = heapq.heappop(waiting)
        following = after[place]
        if following < 0 or symbols[place] != pair[0] or symbols[following] != pair[1]:
            continue
        symbols[place], symbols[following] = pairs[tuple(pair)][1], -1
        after[place] = after[following]
        if after[place] >= 0:
            before[after[place]] = place
        wait(place)
        wait(before[place])
    return [symbol for symbol in symbols if symbol >= 0]


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
    file = Path(directory) / "tokenizer.json"
    content = read_json(file)
    try:
        model = content["model"]
        if not isinstance(model["vocab"], dict):
            raise ValueError(f"type {model.get('type')!r:.60} is not supported: byte-level BPE is")
        words = words_of_hf(content["pre_tokenizer"], content.get("normalizer"), model.get("ignore_merges"))
        plain = {"type": ("BPE",), "dropout": (None, 0), "continuing_subword_prefix": (None, "")}
        for key, values in (plain | {"end_of_word_suffix": (None, "")}).items():
            if model.get(key) not in values:
                raise ValueError(f"{key} {model[key]!r:.60} is not supported: byte-level BPE is")
        if model.get("unk_token") is not None and not ALPHABET <= model["vocab"].keys():
            what = f"unk_token {model['unk_token']!r:.60}"
            raise ValueError(f"{what} is not supported: some bytes have no token of their own")
        beside = read_beside(directory, model["vocab"], content)
        tokens, types = listed(model["vocab"], beside.added)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        first = bos_of(content.get("post_processor"), {token: i for i, token in enumerate(tokens)})
        special = {name: beside.ids[name] for name in ("bos", "eos", "pad")}
        special |= {"bos": first} if first is not None else {}
        flags = {token: kind.flags for token, kind in beside.added.items() if kind.flags}
        more = {"flags": flags, "special": beside.special}
        return BPETokenizer(
            tokens, types, merges, named(words), **special, add_bos=first is not None,
            chat_template=beside.chat_template, beside=dump(more).decode(),
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a tokenizer.json as HF writes it: {error!r:.100}") from None


def listed(vocabulary: dict[str, int], added: dict[str, Added]) -> tuple[list[str], list[int]]:
    """Tokens and types in order of their ids. ValueError for ids that are none."""
    ids = [*vocabulary.values(), *(token.id for token in added.values())]
    if not all(type(i) is int and 0 <= i < LARGEST_VOCABULARY for i in ids):
        raise ValueError(f"token ids must be whole numbers below {LARGEST_VOCABULARY}")
    tokens = [f"[PAD{i}]" for i in range(max(ids, default=-1) + 1)]  # what llama.cpp calls ids without a token
    types = [UNUSED] * len(tokens)
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, NORMAL
    for token, kind in added.items():
        tokens[kind.id], types[kind.id] = token, CONTROL if kind.special else USER_DEFINED
    return tokens, types


def write_hf(tokenizer: BPETokenizer, directory: str | Path) -> list[Path]:
    """tokenizer.json and tokenizer_config.json, from which transformers 4 and 5 make a tokenizer with the same ids."""
    words = words_of(tokenizer.pre)
    vocabulary = {token: i for i, token in enumerate(tokenizer.tokens) if tokenizer.types[i] != UNUSED}
    if words.ignore_merges and len(vocabulary) == tokenizer.vocab_size:
        # a word that is in the vocabulary is that token, which those that only lie behind it must not be
        size = 1 + max(i for i, kind in enumerate(tokenizer.types) if kind == NORMAL)
        vocabulary = {token: i for token, i in vocabulary.items() if i < size}
    content = {
        "version": "1.0",
        "added_tokens": [
            added_token(token.id, text, token.special, token.flags) for text, token in tokenizer.added.items()
        ],
        **hf_form(words),
        "post_processor": bos_first(tokenizer.tokens[tokenizer.bos], tokenizer.bos) if tokenizer.add_bos else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": tokenizer.merges,
            "ignore_merges": words.ignore_merges,
        },
    }
    return write_files(directory, content, {"bos_token": None, **tokenizer.special}, tokenizer.chat_template)
