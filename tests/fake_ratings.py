"""A tiny stand-in for the vaderSentiment source distribution: the same layout, made-up sentences, some nasty rows."""

import hashlib
import io
import random
import tarfile
from pathlib import Path

from data import vader
from data.fetch import sha256

GOOD, BAD = "warm funny lovely sharp brilliant".split(), "dull weak boring ugly broken".split()
THINGS = "film plot camera story screen remote editor mayor team picture sound actor".split()
RULES = {
    "vaderSentiment.py": b"class SentimentIntensityAnalyzer:\n"
    b"    def polarity_scores(self, text):\n"
    b"        return {'compound': text.count('lovely') - text.count('ugly')}\n",
    "vader_lexicon.txt": b"lovely\t2.0\n",
    "emoji_utf8_lexicon.txt": b"x\ty\n",
}
NASTY = [  # (id, published mean, text, raw ratings or None): what real rows are like, and what broken ones could be
    ("n1", 9.0, "Tom &amp; Jerry &lt;3 ''great''   fun\x07 \ufeff&amp;quot;really&amp;quot;", "[4, 2, 3, 1]"),
    ("n2", 1.0, "TOM & Jerry: 3 great! fun really", "[1, 1]"),  # a duplicate of n1, case and punctuation aside
    ("n3", 0.0, " \x00\ufeff ", "[0, 0]"),  # nothing is left
    ("n4", 0.0, "nobody rated this one", None),
    ("n5", 0.0, "only one person rated this", "[1]"),
    ("n6", 0.0, "ratings that are no list", "[1, 2"),
    ("n7", 0.0, "off the scale", "[7, 0]"),
    ("n8", 0.0, ":)", "[2, 3]"),  # punctuation alone is not empty
    ("n9", 0.0, ":(", "[-2, -3]"),  # ... and not the same as another
    ("n10", 0.0, "a tab\tin the text", "[0, 0]"),
]


def sentences(domain: str, n: int) -> list[tuple[str, float, str, str]]:
    rng = random.Random(domain)
    rows = []
    for i in range(n):
        mood, words = rng.choice([(2, GOOD), (-2, BAD)])
        what = f"The {rng.choice(words)} {rng.choice(THINGS)} of {domain} {i}"
        text = f"{what} was {rng.choice(words)}, caf\u00e9 {rng.random():.3f}."
        ratings = [max(-4, min(4, mood + rng.choice([-1, 0, 1]))) for _ in range(rng.choice([4, 5, 20]))]
        rows.append((str(i), sum(ratings) / len(ratings), text, str(ratings)))
    return rows


def _tar(path_or_file, files: dict[str, bytes]) -> None:
    with tarfile.open(**path_or_file) as tar:
        for name, blob in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))


def fake_sdist(path: Path, rows: int = 60, files: dict[str, bytes] | None = None) -> Path:
    inner = {}
    for domain, stem in vader.DOMAINS.items():
        table = sentences(domain, rows) + (NASTY if domain == "tweets" else [])
        truth = "".join(f"{i}\t{mean}\t{text}\r\n" for i, mean, text, _ in table)
        raw = "".join(
            f"{i}\t{mean}\t1.0\t{r}\r\n" for i, mean, _, r in reversed(table) if r
        )  # another order: join by id
        inner[f"hutto_ICWSM_2014/{stem}_GroundTruth.txt"] = truth.encode()
        inner[f"hutto_ICWSM_2014/{stem}_anonDataRatings.txt"] = b"\xef\xbb\xbf" + raw.encode()
    inner |= files or {}
    ratings = io.BytesIO()
    _tar({"fileobj": ratings, "mode": "w:gz"}, inner)
    outer = {f"vaderSentiment/{name}": blob for name, blob in RULES.items()}
    outer["additional_resources/hutto_ICWSM_2014.tar.gz"] = ratings.getvalue()
    outer["setup.py"] = b"raise SystemExit('setup.py must never run')\n"
    outer["PKG-INFO"] = b"Metadata-Version: 1.0\nName: vaderSentiment\nVersion: 3.3.2\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    _tar({"name": path, "mode": "w:gz"}, {f"vaderSentiment-3.3.2/{name}": blob for name, blob in outer.items()})
    return path


def use_fake(monkeypatch, tmp_path: Path) -> Path:
    """Puts a fake source distribution into a cache of its own, and makes it the pinned one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sdist = fake_sdist(tmp_path / "cache" / "plain-rlhf" / vader.SDIST)
    monkeypatch.setattr(vader, "SDIST_SHA256", sha256(sdist))
    monkeypatch.setattr(vader, "RULES", {name: hashlib.sha256(blob).hexdigest() for name, blob in RULES.items()})
    return sdist
