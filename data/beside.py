"""What lies beside a vocabulary in an HF directory: added tokens, names of special tokens, the chat template; and added
tokens in texts, as HF's `tokenizers` finds them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # tiktoken's own dependency

NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
ANCHOR = "\x01"  # a token by itself: no piece of a vocabulary joins it with what follows
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
LARGEST_VOCABULARY = 2**24  # the largest published ones have 2**18
WORD = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]"
ENDS_WITH_WORD, BEGINS_WITH_WORD = regex.compile(WORD + r"\Z"), regex.compile(WORD)
SPACE_BEFORE, SPACE_BEHIND = regex.compile(r"\p{White_Space}*\Z"), regex.compile(r"\p{White_Space}*")


class Added(NamedTuple):
    """A token that is cut out of texts before anything else looks at them."""

    id: int
    special: bool  # a control token: only templates and builders of sequences write it
    single_word: bool = False  # not where it touches a word
    lstrip: bool = False  # eats the white space before it
    rstrip: bool = False  # eats the white space behind it
    normalized: bool = False  # looked for in the normalised text

    @property
    def flags(self) -> list[str]:
        return [name for name in FLAGS if getattr(self, name)]


class Beside(NamedTuple):
    """What the files beside a vocabulary say."""

    added: dict[str, Added]
    ids: dict[str, int | None]  # bos, eos, unk, pad
    special: dict[str, str]  # bos_token, eos_token ...: what a chat template knows by these names
    add_bos: bool | None  # texts start with bos; None: nothing says so
    chat_template: str | None
    legacy: bool | None  # of sentencepiece: every stretch between control tokens gets a space before it


class Cut:
    """Finds added tokens in texts: the leftmost first, of several the longest; control tokens are passed over."""

    def __init__(self, added: dict[str, Added]):
        self.added = added
        wanted = any(not token.special for token in added.values())
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        self.pattern = re.compile("|".join(longest_first)) if wanted else None

    def of(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The text in stretches, and the id of those that are an added token."""
        done = 0
        for match in self.pattern.finditer(text) if self.pattern else ():
            token, (start, end) = self.added[match[0]], match.span()
            if (
                token.special
                or token.single_word
                and (ENDS_WITH_WORD.search(text, 0, start) or BEGINS_WITH_WORD.match(text, end))
            ):
                continue
            if token.lstrip:
                start = max(SPACE_BEFORE.search(text, 0, start).start(), done)
            if token.rstrip:
                end = SPACE_BEHIND.match(text, end).end()
            if start > done:
                yield text[done:start], None
            yield text[start:end], token.id
            done = max(done, end)
        if done < len(text):
            yield text[done:], None


class TextEncoder:
    """What both kinds of tokenizer do with a text before they differ: added tokens are cut out, and the rest is encoded."""

    _cut: Cut
    _rubs = False  # does what begins a text lose, or get, something at its edge?

    def encode(self, text: str, after: str = "nothing") -> list[int]:
        """Ids of a text. "<|im_end|>" in it is ordinary characters: user text cannot become a control token.

        after: what stands before it: nothing, a control "token", or other "text", which it then goes on from: the bytes
        of its ids are those of the text, where the tokenizer keeps texts as they are.
        ValueError for half a surrogate pair, which has no bytes.
        """
        return self.encode_array(text, after).tolist()

    def encode_array(self, text: str, after: str = "nothing") -> np.ndarray:
        """The same as an array, (n,) uint32."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise half_a_pair(text, error) from None
        if after == "text" and self._rubs:
            return self._encode_array(ANCHOR + text, "token")[len(self._encode_array(ANCHOR, "token")) :]
        return self._encode_array(text, after)

    def _encode_array(self, text: str, after: str) -> np.ndarray:
        found = []
        for stretch, i in self._cut.of(text):
            found.append(self._encode_stretch(stretch, after) if i is None else as_bytes([i]))
            after = "token"
        return np.frombuffer(b"".join(found), "<u4")

    def _encode_stretch(self, text: str, after: str) -> bytes:
        """Ids of what lies between added tokens, four bytes each."""
        raise NotImplementedError


def as_bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, "<u4").tobytes()


def half_a_pair(text: str, error: UnicodeEncodeError) -> ValueError:
    start = max(0, error.start - 20)
    return ValueError(
        f"character {error.start} of {text[start : error.start + 20]!r} is half a surrogate pair, which has no bytes"
    )


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {str(error):.100}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {content!r:.60}; a JSON object was expected")
    return content


def read_beside(directory: str | Path, vocabulary: dict[str, int], content: dict) -> Beside:
    """What transformers 5 makes of an HF directory whose model has this vocabulary and whose tokenizer.json is `content`.

    ValueError where a file is none of HF's, and where it gives an added token another id than HF's code would.
    """
    directory = Path(directory)

    def beside(name: str) -> dict:
        return read_json(directory / name) if (directory / name).is_file() else {}

    named, numbered = beside("tokenizer_config.json"), [beside("generation_config.json"), beside("config.json")]
    mapped, listed = beside("special_tokens_map.json"), beside("added_tokens.json")
    try:
        decoder = named.get("added_tokens_decoder")
        names = named if decoder is not None else named | {k: v for k, v in mapped.items() if v is not None}
        texts = {name: text_of(names.get(f"{name}_token")) for name in NAMES}
        added: dict[str, Added] = {}
        for token in content.get("added_tokens") or []:
            if not token["content"] or type(token["id"]) is not int or not 0 <= token["id"] < LARGEST_VOCABULARY:
                what = f"{token['content']!r:.60} {token['id']!r:.60}"
                raise ValueError(f"token ids must be whole numbers below {LARGEST_VOCABULARY}: {what}")
            check_id(token["content"], token["id"], vocabulary, added)
            added[token["content"]] = added_of(token["id"], token)
        wanted = {}  # content -> (id that its file says, its token)
        for i, token in (decoder or {}).items():
            wanted[token["content"]] = (int(i), added_of(int(i), token))
        if decoder is None:
            for token, i in listed.items():
                is_special = token in texts.values()
                wanted[token] = (i, Added(i, is_special, normalized=not is_special))
        for name, token in texts.items():  # those of other names mark no text, and a model may lack rows for them
            if token is not None and (name in ("bos", "eos") or token in vocabulary):
                wanted.setdefault(token, (None, Added(-1, True)))
        for token in names.get("extra_special_tokens") or names.get("additional_special_tokens") or []:
            wanted.setdefault(text_of(token), (None, Added(-1, True)))
        for token, (said, kind) in sorted(wanted.items(), key=lambda item: (item[1][0] is None, item[1][0] or 0)):
            if token in added and (said is None or token in listed):
                continue
            added[token] = kind._replace(id=check_id(token, said, vocabulary, added))
        ids = {name: special_id(name, texts[name], vocabulary, added, numbered, mapped) for name in NAMES}
        known = [f"{name}_token" for name in NAMES if f"{name}_token" in names]
        special = {name: text_of(names[name]) for name in known if names[name] is not None}
        spelled = {i: token for token, i in vocabulary.items()} | {kind.id: token for token, kind in added.items()}
        special |= {
            f"{name}_token": spelled[i] for name, i in ids.items() if f"{name}_token" not in known and i in spelled
        }
        add_bos = named.get("add_bos_token")
        return Beside(added, ids, special, add_bos, template_beside(directory, named), named.get("legacy"))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"the files beside the vocabulary are not as HF writes them: {error!r:.100}") from None


def text_of(token) -> str | None:
    """A special token is a text, or in older files an object that holds it."""
    return token.get("content") if isinstance(token, dict) else token


def added_of(i: int, token: dict) -> Added:
    return Added(i, bool(token.get("special")), **{flag: bool(token.get(flag)) for flag in FLAGS})


def check_id(text: str, said: int | None, vocabulary: dict[str, int], added: dict[str, Added]) -> int:
    """The id that HF's code gives to an added token, whatever its file says: the one it has, or the next.

    ValueError if its file says another.
    """
    known = added[text].id if text in added else vocabulary.get(text)
    if known is None:
        known = max([len(vocabulary), *(token.id + 1 for token in added.values())])
    if said is not None and said != known:
        raise ValueError(f"added token {text!r:.60} has id {said} in its file, but {known} in HF's code")
    return known


def special_id(name: str, text, vocabulary, added, numbered: Sequence[dict], mapped: dict) -> int | None:
    """The id of bos, eos ...: of the token with that name, or the one that a config names."""

    def known(token):
        return added[token].id if token in added else vocabulary.get(token)

    ids = [other.get(f"{name}_token_id") for other in numbered]
    ids = [i[0] if isinstance(i, list) and i else i for i in ids]  # of several, the first
    found = [known(text), *ids, known(text_of(mapped.get(f"{name}_token")))]
    return next((i for i in found if i is not None), None)


def template_beside(directory: Path, named: dict) -> str | None:
    """The chat template of a directory: chat_template.jinja, else the one in tokenizer_config.json."""
    file = directory / "chat_template.jinja"
    templates = file.read_text("utf-8") if file.is_file() else named.get("chat_template")
    if isinstance(templates, list):
        return next((one["template"] for one in templates if one["name"] == "default"), None)
    return templates


# --- writing ---


def added_token(i: int, token: str, special: bool = True, flags: Sequence[str] = ()) -> dict:
    """An added token as tokenizer.json has it."""
    return {"id": i, "content": token, "special": special} | {flag: flag in flags for flag in FLAGS}


def bos_first(token: str, i: int) -> dict:
    """The post-processor that puts bos before every text."""
    start, one, two = (
        {kind: {"id": name, "type_id": n}}
        for kind, name, n in (("SpecialToken", token, 0), ("Sequence", "A", 0), ("Sequence", "B", 1))
    )
    special = {token: {"id": token, "ids": [i], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [start, one], "pair": [start, one, two], "special_tokens": special}


def bos_of(post: dict | None, tokens: dict[str, int]) -> int | None:
    """The token that a post-processor puts before every text."""
    for step in [post, *(post or {}).get("processors", [])]:
        if step and step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return tokens[step["single"][0]["SpecialToken"]["id"]]
    return None


def write_files(
    directory: str | Path, content: dict, special: dict[str, str], chat_template: str | None, **more
) -> list[Path]:
    """tokenizer.json and tokenizer_config.json."""
    config = special | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | more
    if chat_template:
        config["chat_template"] = chat_template
    files = {"tokenizer.json": content, "tokenizer_config.json": config}
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        (Path(directory) / name).write_text(json.dumps(values, ensure_ascii=False, indent=1), "utf-8")
    return [Path(directory) / name for name in files]
