"""How a text becomes words before a BPE merges them: HF's normalizers and pre-tokenizers, as far as byte-level BPEs use them.

`Words` is a list of steps, so that any tokenizer.json that is made of these steps can be read; the ones that GGUF files
know by name have that name. A word never spans a border that a step makes, so its ids can be looked up.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import regex  # tiktoken's own dependency

CONTRACTIONS = "'(?:[sdmt]|ll|ve|re)"
GPT2 = CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s|\p{{N}}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PUNCTUATION = r"[\p{P}$+<=>^`|~]"
BEHAVIORS = ("Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext")
# The blocks of letters that are younger than Unicode 16: the regex module knows them, the one that HF uses does not.
NEWER = re.compile("[\U00012550-\U00012686\U00018d80-\U00019191\U000323b0-\U00033479\U0003d000-\U0003fc3f]")
UNASSIGNED = "\u0378"
NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "Replace", "Prepend")


class Split(NamedTuple):
    """Cuts at every match of a pattern; what becomes of the match says the behavior, one of BEHAVIORS."""

    pattern: str  # of the regex module
    behavior: str = "Isolated"
    invert: bool = False  # what lies between the matches is cut out instead


class Words(NamedTuple):
    """How a text becomes words."""

    splits: tuple[Split, ...]
    normalizer: tuple = ()  # steps as tokenizer.json has them, in order
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges make of it

    def of(self, text: str) -> list[str]:
        """The words of a normalised text; all together they are the text, unless a step removes something."""
        words = [text] if text else []
        for split in self.splits:
            words = [piece for word in words for piece in pieces(word, split)]
        return words

    def spec(self) -> dict:
        """It as JSON, for `words_of`."""
        return {"splits": [list(s) for s in self.splits], "normalizer": list(self.normalizer)} | {
            "ignore_merges": self.ignore_merges
        }


NFC = ({"type": "NFC"},)
NAMED = {  # by the names that GGUF files give them
    "gpt-2": Words((Split(GPT2),)),
    "smollm": Words((Split(r"\p{N}"), Split(GPT2))),
    "qwen2": Words((Split(CL100K % ""),), NFC),
    "llama-bpe": Words((Split(CL100K % "{1,3}"),), ignore_merges=True),
    "tekken": Words((Split(O200K % ("", "", "")),), ignore_merges=True),
    "gpt-4o": Words((Split(O200K % (ENDINGS, ENDINGS, "{1,3}")),)),
    "qwen35": Words((Split(QWEN35),), NFC),
}
ALIASES = dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe")
ALIASES |= {"phi-2": "gpt-2", "deepseek-r1-qwen": "qwen2"}
STARTS_WITH_BOS = ("llama-bpe", "tekken")  # llama.cpp's default where a file does not say it
# One pattern each for tiktoken, which is several times faster. Digits stand alone in SmolLM's, so a space before a digit
# ends a piece: hence the digit in the look-ahead.
ONE_PATTERN = {words.splits: words.splits[0].pattern for words in NAMED.values() if len(words.splits) == 1}
ONE_PATTERN[NAMED["smollm"].splits] = r"\p{N}|" + CONTRACTIONS + r"| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


@lru_cache(64)
def compiled(pattern: str) -> regex.Pattern:
    """ValueError for what is no pattern. As in Oniguruma, which HF uses, ^ and $ are those of a line, and sets nest."""
    try:
        if regex.search(r"\[[^]]*(--|~~|\|\|)", pattern):  # there, plain characters
            raise ValueError(f"pattern {pattern!r:.80} is not supported: it would be read as an operation on sets")
        return regex.compile(pattern, regex.MULTILINE | regex.VERSION1)
    except (regex.error, TypeError, RecursionError) as error:
        raise ValueError(f"pattern {pattern!r:.80} is not supported: {error!s:.80}") from None


def pieces(text: str, split: Split) -> list[str]:
    """The text cut by one step."""
    seen = text if text.isascii() else NEWER.sub(UNASSIGNED, text)  # as long as the text
    if split.behavior == "Isolated":  # whichever of both is the match
        found, done = [], 0
        for match in compiled(split.pattern).finditer(seen):
            start, end = match.span()
            if start > done:
                found.append(text[done:start])
            if end > start:
                found.append(text[start:end])
            done = max(done, end)
        return found + [text[done:]] if done < len(text) else found
    cut = []  # (piece, is it a match)
    done = 0
    for match in compiled(split.pattern).finditer(seen):
        start, end = match.span()
        if end == start:
            continue
        if start > done:
            cut.append((text[done:start], split.invert))
        cut.append((text[start:end], not split.invert))
        done = end
    if done < len(text):
        cut.append((text[done:], split.invert))
    if split.behavior == "Removed":
        return [piece for piece, is_match in cut if not is_match]
    backwards = split.behavior == "MergedWithNext"
    joined, before = [], False
    for piece, is_match in reversed(cut) if backwards else cut:
        merges = is_match == before if split.behavior == "Contiguous" else is_match and not before
        if merges and joined:
            joined[-1] = piece + joined[-1] if backwards else joined[-1] + piece
        else:
            joined.append(piece)
        before = is_match
    return joined[::-1] if backwards else joined


def normalized(text: str, steps: Sequence[dict]) -> str:
    """The text after HF's normalizers."""
    for step in steps:
        kind = step["type"]
        if kind.startswith("NF"):
            text = unicodedata.normalize(kind, text)
        elif kind == "Lowercase":
            text = "".join(map(str.lower, text))  # one at a time: no final sigma
        elif kind == "StripAccents":
            text = regex.sub(r"\p{M}+", "", text)
        elif kind == "Strip":
            left, right = (
                side * bool(step.get(f"strip_{name}"))
                for side, name in ((r"\A\p{White_Space}+", "left"), (r"\p{White_Space}+\Z", "right"))
            )
            text = regex.sub("|".join(filter(None, (left, right))) or r"(?!)", "", text)
        elif kind == "Replace":
            text = compiled(pattern_of(step["pattern"])).sub(lambda _: step["content"], text)  # noqa: B023
        elif text:  # Prepend
            text = step["prepend"] + text
    return text


def rubs(steps: Sequence[dict]) -> bool:
    """Do these normalizers treat the beginning of a text otherwise than what stands within?"""
    return any(step["type"] in ("Strip", "Prepend") or "Regex" in step.get("pattern", ()) for step in steps)


# --- HF's form ---


def pattern_of(spec: dict) -> str:
    """{"Regex": ...} or {"String": ...} as a pattern."""
    if isinstance(spec, dict) and isinstance(spec.get("Regex"), str):
        return spec["Regex"]
    if isinstance(spec, dict) and isinstance(spec.get("String"), str):
        return re.escape(spec["String"])
    raise ValueError(f"pattern {spec!r:.80} is not supported")


def steps_of(spec: dict | None, name: str) -> list[dict]:
    """The steps of a normalizer or a pre-tokenizer, one after another."""
    if spec is None:
        return []
    if spec["type"] == "Sequence":
        return [step for inner in spec[f"{name}s"] for step in steps_of(inner, name)]
    return [spec]


def normalizer_of(spec: dict | None) -> tuple:
    """The steps of a tokenizer.json's normalizer. ValueError, by name, for what is not supported."""
    steps = steps_of(spec, "normalizer")
    for step in steps:
        if step["type"] not in NORMALIZERS:
            raise ValueError(f"normalizer {step['type']!r:.60} is not supported; known: {', '.join(NORMALIZERS)}")
        if step["type"] == "Replace":
            compiled(pattern_of(step["pattern"]))
            if not isinstance(step["content"], str):
                raise ValueError(f"normalizer {step!r:.80} is not supported")
        if step["type"] == "Prepend" and not isinstance(step["prepend"], str):
            raise ValueError(f"normalizer {step!r:.80} is not supported")
    return tuple(steps)


def split_of(step: dict) -> Split:
    """One step of a pre-tokenizer. ValueError, by name, for what is not supported."""
    kind = step["type"]
    if kind == "Digits":
        return Split(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
    if kind == "Punctuation":
        return checked(Split(PUNCTUATION, step.get("behavior", "Isolated")), step)
    if kind == "Split":
        pattern = pattern_of(step["pattern"])
        return checked(
            Split(pattern, step["behavior"], bool(step.get("invert")) and step["behavior"] != "Isolated"), step
        )
    raise ValueError(f"pre-tokenizer {kind!r:.60} is not supported before ByteLevel; known: Split, Digits, Punctuation")


def checked(split: Split, step: dict) -> Split:
    if split.behavior not in BEHAVIORS:
        raise ValueError(f"pre-tokenizer {step!r:.200} is not supported: behaviors are {', '.join(BEHAVIORS)}")
    compiled(split.pattern)
    return split


def words_of_hf(pre_tokenizer: dict | None, normalizer: dict | None, ignore_merges: bool) -> Words:
    """What a tokenizer.json of a byte-level BPE means. ValueError, by name, for what is not supported."""
    steps = steps_of(pre_tokenizer, "pretokenizer")
    if not steps or steps[-1]["type"] != "ByteLevel":
        last = steps[-1]["type"] if steps else None
        raise ValueError(f"pre-tokenizer {last!r:.60} is not supported: ByteLevel was expected at its end")
    *before, last = steps
    if last.get("add_prefix_space", True):
        raise ValueError("pre-tokenizer ByteLevel with add_prefix_space is not supported")
    splits = tuple(split_of(step) for step in before) + (Split(GPT2),) * bool(last.get("use_regex", True))
    return Words(splits, normalizer_of(normalizer), bool(ignore_merges))


def hf_form(words: Words) -> dict:
    """normalizer, pre_tokenizer and ignore_merges of a tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": s.pattern}, "behavior": s.behavior, "invert": s.invert}
        for s in words.splits
    ]
    normalizers = list(words.normalizer)
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers}
        if len(normalizers) > 1
        else (normalizers or [None])[0],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
    }


# --- names ---


def named(words: Words) -> str | dict:
    """The name that GGUF files have for it, or its spec."""
    return next((name for name, known in NAMED.items() if known == words), words.spec())


def words_of(pre: str | dict) -> Words:
    """The inverse of `named`. ValueError for a name that is not known and for what is no spec."""
    if isinstance(pre, str):
        if ALIASES.get(pre, pre) not in NAMED:
            raise ValueError(f"pre-tokenizer {pre!r:.60} is not supported; known: {', '.join(NAMED)}")
        return NAMED[ALIASES.get(pre, pre)]
    try:
        splits = tuple(checked(Split(*split), split) for split in pre["splits"])
        return Words(
            splits, normalizer_of({"type": "Sequence", "normalizers": pre["normalizer"]}), bool(pre["ignore_merges"])
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"pre-tokenizer {pre!r:.100} is no description of one: {error!r:.60}") from None
