"""What a text is to us: how it is cleaned, when two are the same, and which split it belongs to."""

from __future__ import annotations

import hashlib
import html
import html.entities
import json
import re
import unicodedata
from pathlib import Path

SPLITS = ("train", "validation", "test")
WORD_BYTES = bytes(ord(c.lower()) if (c := chr(i)).isalnum() and i < 128 or c == "_" else 32 for i in range(256))


def clean(text: str) -> str:
    """Plain text of one line: entities decoded, '' as \", no control characters, single spaces.

    Also U+2581, which is sentencepiece's own sign for a space, becomes an underscore.
    """
    for _ in range(3):  # "&amp;lt;" was escaped twice
        text = re.sub(r"&(#\d+|#x[0-9a-fA-F]+|\w+);", _entity, text)
    text = text.replace("''", '"').replace('""', '"').replace("\u2581", "_")
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or not _unwanted(c))
    return re.sub(r" +", " ", text).strip()


def _entity(match: re.Match) -> str:
    known = (
        match[1].startswith("#") or match[1] + ";" in html.entities.html5
    )  # unescape alone would see &not in &nothing;
    return html.unescape(match[0]) if known else match[0]


def _unwanted(c: str) -> bool:
    return c == "\ufeff" or unicodedata.category(c) in ("Cc", "Cs")  # BOM, control characters, lone surrogates


def parse_json(text: str, where: str):
    """The value of a JSON text; ValueError, which begins with `where`, for a text that is none or that nobody could store."""
    try:
        value = json.loads(text)
        if "\\u" in text:  # half a surrogate pair is no character: no file could hold what was read
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where} has half a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error})") from None
    return value


def prompt_lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank. ValueError if there is none, or for a file that is not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"prompt file {path} is not UTF-8 (byte {e.start}); convert it first") from None
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"prompt file {path} is empty: 0 prompts in {len(text)} characters; write one prompt a line")
    return lines


def key(text: str) -> str:
    """What counts as the same text: case and punctuation aside (a text of nothing else, say ":)", is itself)."""
    if text.isascii():  # the same, ten times as fast
        return b" ".join(text.encode().translate(WORD_BYTES).split()).decode() or text
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())) or text


def split_of(text: str) -> str:
    """train, validation or test, 80/10/10, by the hash of the text: no list of rows to keep, and no text in two."""
    bucket = int.from_bytes(hashlib.sha256(key(text).encode()).digest()[:8], "big") % 10
    return SPLITS[max(0, bucket - 7)]
