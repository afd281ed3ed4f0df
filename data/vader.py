"""Sentences of four domains, each rated from -4 to 4 by 15 to 99 people (Hutto & Gilbert 2014), and the VADER rules.

Both come from one file, the source distribution of vaderSentiment 3.3.2 (MIT licence).
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.containers import Bad, Duplicate
from data.fetch import fetch
from data.judge import JUDGE
from data.records import Record
from data.text import clean, key, split_of

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
RATINGS = "additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "tweets": "tweets",
    "film": "movieReviewSnippets",
    "news": "nytEditorialSnippets",
    "products": "amazonReviewSnippets",
}
DUPLICATE = "duplicate"
ASK_THE_RULES = '''"""The judge of this data: the VADER rules, -1 to 1, on prompt and response together."""

from pathlib import Path

from data.vader import load_rules

rules = load_rules(Path(__file__).parent)


def judge(prompts, responses):
    return [rules(prompt + response) for prompt, response in zip(prompts, responses)]
'''
RULES = {  # sha256: the rules are code, and nothing else is ever executed
    "vaderSentiment.py": "25cd814d23000b41c0e242d99960832c6620b3f1b844469173404500ce63206b",
    "vader_lexicon.txt": "1ec9c6e9ee19aade328f8beb393a6afa71a5bb3acf7d3cc22d4ef568df374bf5",
    "emoji_utf8_lexicon.txt": "b8d54223ae1ce22a3e12c1f745316b71678c328eb5f5d3063a842f37cfbe2823",
}


@dataclass(frozen=True)
class Sentence:
    text: str
    domain: str
    id: str  # as in the source: "<domain>/<row id>"
    split: str
    rating: float  # mean of all raw ratings, -4 ... 4
    half_a: float  # mean of the raters with even index
    half_b: float  # ... and of those with odd index: two independent measurements of the same sentence
    rating_std: float  # deviation of the single ratings (population)
    one_rater: float  # the first rater alone
    rest: float  # mean of all the others


def read_sentences(sdist: str | Path) -> tuple[list[Sentence], dict]:
    """All usable sentences in the order of the archive, and the counts of what was read, kept and dropped, and why."""
    sentences, counts = [], {domain: Counter() for domain in DOMAINS}
    for domain, sentence, published in _rated(sdist):
        count = counts[domain]
        count["read"] += 1
        if isinstance(sentence, str):
            count[sentence] += 1
            if sentence != DUPLICATE:
                continue
        # a tweet's published mean is sometimes of other raters than the published ratings: we use the ratings
        count["published mean differs"] += int(published)
        if not isinstance(sentence, str):
            sentences.append(sentence)
            count[sentence.split] += 1
    if not sentences:
        raise ValueError(f"{sdist} contains no usable sentence; delete it and download again")
    return sentences, {domain: dict(count) for domain, count in counts.items()}


def read_records() -> Iterator[tuple[int, Record | Bad | Duplicate]]:
    """(number, record) of every sentence: its text, the mean of its ratings, its domain as source; Bad for unusable ones.

    Downloads the archive where it is not in the cache.
    """
    for number, (domain, sentence, _) in enumerate(_rated(fetch(PACKAGE, VERSION, SDIST, SDIST_SHA256)), 1):
        if isinstance(sentence, str):
            yield number, Duplicate() if sentence == DUPLICATE else Bad(sentence)
        else:
            extra = {
                name: float(getattr(sentence, name)) for name in ("half_a", "half_b", "rating_std", "one_rater", "rest")
            }
            scores = (float(sentence.rating),)
            yield number, Record("", (sentence.text,), scores, extra={"id": sentence.id, **extra}, source=domain)


def recipe() -> dict:
    """What the records depend on."""
    return {"source": SDIST, "sha256": SDIST_SHA256}


def write_beside(directory: Path) -> None:
    """What prepared data keeps beside the records: the rules, and the judge that asks them."""
    write_rules(fetch(PACKAGE, VERSION, SDIST, SDIST_SHA256), directory / "rules")
    (directory / JUDGE).write_text(ASK_THE_RULES)


def _rated(sdist: str | Path) -> Iterator[tuple[str, Sentence | str, bool]]:
    """(domain, sentence or why there is none, does its published mean differ) of every row, in order."""
    archive = _members(io.BytesIO(_member(sdist, RATINGS)), str(sdist))
    seen: set[str] = set()
    for domain, stem in DOMAINS.items():
        texts = _rows(archive, f"{stem}_GroundTruth.txt")
        raw = {row[0]: row for row in _rows(archive, f"{stem}_anonDataRatings.txt")}  # joined by id: the orders differ
        for row in texts:
            sentence, differs = _sentence(row, raw.get(row[0]), domain), False
            if not isinstance(sentence, str):
                differs, same = abs(_number(row[1]) - sentence.rating) > 1e-3, key(sentence.text)
                sentence = DUPLICATE if same in seen else sentence
                seen.add(same)
            yield domain, sentence, differs


def _sentence(row: list[str], raw: list[str] | None, domain: str) -> Sentence | str:
    """The sentence of a row, or the reason why there is none."""
    if len(row) != 3:
        return "malformed row"
    text = clean(row[2])
    if not text:
        return "empty text"
    try:
        ratings = np.array(json.loads(raw[3]), np.float64) if raw else np.zeros(0)
    except (ValueError, IndexError):
        return "malformed ratings"
    if ratings.ndim != 1 or len(ratings) < 2:
        return "fewer than two ratings"
    if not (np.abs(ratings) <= 4).all():
        return "rating outside -4 ... 4"
    mean = ratings.mean()
    return Sentence(
        text,
        domain,
        f"{domain}/{row[0]}",
        split_of(text),
        rating=mean,
        half_a=ratings[0::2].mean(),
        half_b=ratings[1::2].mean(),
        rating_std=ratings.std(),
        one_rater=ratings[0],
        rest=ratings[1:].mean(),
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _rows(archive: dict[str, bytes], name: str) -> list[list[str]]:
    if name not in archive:
        raise ValueError(f"{RATINGS} has no {name}; delete the cached archive and download again")
    lines = archive[name].decode("utf-8-sig", errors="replace").split("\n")  # one file starts with a BOM
    return [line.rstrip("\r").split("\t") for line in lines if line.strip()]


def _members(file: io.BufferedIOBase, where: str) -> dict[str, bytes]:
    """The plain files of a tar archive by base name, read into memory: nothing is ever extracted to a path."""
    try:
        with tarfile.open(fileobj=file) as tar:
            return {Path(m.name).name: tar.extractfile(m).read() for m in tar if m.isfile()}
    except (tarfile.TarError, EOFError, OSError) as e:
        raise ValueError(f"{where} is damaged ({str(e).splitlines()[0]}); delete it and download again") from None


def _member(sdist: str | Path, name: str) -> bytes:
    with open(sdist, "rb") as f:
        members = _members(f, str(sdist))
    if Path(name).name not in members:
        raise ValueError(f"{sdist} has no {name}; delete it and download again")
    return members[Path(name).name]


def write_rules(sdist: str | Path, directory: str | Path) -> None:
    """Copies the rule module and its two lexicons out of the archive."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name in RULES:
        (Path(directory) / name).write_bytes(_member(sdist, f"vaderSentiment/{name}"))


def load_rules(path: str | Path = "out/data/vader") -> Callable[[str], float]:
    """The VADER rules as a function: text -> compound score in -1 ... 1. ValueError if a file is not the pinned one.

    path: the prepared directory, or its rules/ folder.
    """
    path = Path(path)
    path = path / "rules" if (path / "rules").is_dir() else path
    for name, digest in RULES.items():
        if not (path / name).is_file():
            raise FileNotFoundError(f"no {path / name}; run `python -m data.prepare vader` first")
        if hashlib.sha256((path / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{path / name} is not the pinned file of {SDIST}; prepare the data again")
    spec = importlib.util.spec_from_file_location("vader_rules", path / "vaderSentiment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    analyzer = module.SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]
