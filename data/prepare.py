"""Text -> token files: `python -m data.prepare vader` (rated sentences), `text FILE` or `preferences FILE`.

Writes out/{train,validation,test,tokenizer}; data/tokens.py describes what lies in a split.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data import vader
from data.fetch import fetch, sha256
from data.pairs import make_pairs
from data.preferences import read_preferences
from data.text import SPLITS, key, parse_json, split_of
from data.tokenizer import MODEL_FILE, Tokenizer, load_tokenizer, train_sentencepiece
from data.tokens import FORMAT, write_token_file

PAIRS = {"train": 40_000, "validation": 8_000, "test": 8_000}
STARTED = time.perf_counter()
RECIPE = 3  # counts up when the same source would give other files: what was prepared before is then made again


def prepare_vader(
    out: Path, vocab_size: int = 2048, tokenizer_dir: Path | None = None, train_domains: list[str] | None = None
) -> None:
    """Rated sentences of four domains -> out/{train,validation,test,tokenizer,rules} and out/manifest.json.

    train_domains: the domains of the training split, none = all; validation and test always have all of them.
    """
    made = {
        "by": "python -m data.prepare vader",
        "source": vader.SDIST,
        "sha256": vader.SDIST_SHA256,
        **({"tokenizer": load_tokenizer(tokenizer_dir).fingerprint} if tokenizer_dir else {"vocab_size": vocab_size}),
        "pairs": PAIRS,
        "recipe": RECIPE,
        **({"train_domains": train_domains} if train_domains else {}),
    }
    if _is_prepared(out, made):
        return
    print(f"getting {vader.PACKAGE} {vader.VERSION} (cached, or with pip)", flush=True)
    sdist = fetch(vader.PACKAGE, vader.VERSION, vader.SDIST, vader.SDIST_SHA256)
    sentences, counts = vader.read_sentences(sdist)
    if train_domains:
        sentences = [s for s in sentences if s.split != "train" or s.domain in train_domains]
    with _building(out) as work:
        vader.write_rules(sdist, work / "rules")
        train = [s.text for s in sentences if s.split == "train"]
        tokenizer = make_tokenizer(train, work / "tokenizer", vocab_size, tokenizer_dir)
        splits = {}
        for split in SPLITS:
            rows = [s for s in sentences if s.split == split]
            columns = {"domain": np.array([list(vader.DOMAINS).index(s.domain) for s in rows], np.uint8)}
            for name in ("rating", "half_a", "half_b", "rating_std", "one_rater", "rest"):
                columns[name] = np.array([getattr(s, name) for s in rows], np.float32)
            splits[split] = write_token_file(
                work / split,
                [s.text for s in rows],
                tokenizer,
                list(vader.DOMAINS),
                columns,
                [s.id for s in rows],
                made,
                make_pairs(columns["rating"], columns["domain"], PAIRS[split], seed=0),
            )
        _finish(work, made, counts, splits, tokenizer)
    _report(out)


def make_tokenizer(texts: list[str], directory: Path, vocab_size: int, given: Path | None) -> Tokenizer:
    """A copy of the tokenizer that lies in `given`, or one trained on the texts; either is saved in `directory`."""
    if given is None:
        return train_sentencepiece(texts, directory / MODEL_FILE, vocab_size)
    load_tokenizer(given).save(directory)
    return load_tokenizer(directory)


def prepare_text(file: Path, out: Path, tokenizer_dir: Path | None, vocab_size: int, unit: str) -> None:
    """A plain text file -> token files; its paragraphs (between blank lines) or its lines become the rows."""
    made = {
        "by": "python -m data.prepare text",
        "source": file.name,
        "sha256": sha256(file),
        "unit": unit,
        "tokenizer": load_tokenizer(tokenizer_dir).fingerprint if tokenizer_dir else f"trained, {vocab_size} pieces",
        "recipe": RECIPE,
    }
    if _is_prepared(out, made):
        return
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is not UTF-8 (byte {e.start}); convert it first") from None
    text = text.replace("\r\n", "\n").replace("\u2581", "_")  # sentencepiece's own sign for a space
    parts = re.split(r"\n\s*\n", text) if unit == "paragraph" else text.split("\n")
    filled = [p.strip("\n") for p in parts if p.strip()]
    if not filled:
        raise ValueError(f"{file} contains no text")
    first = {}
    for part in filled:
        first.setdefault(key(part), part)
    rows = {s: [p for p in first.values() if split_of(p) == s] for s in SPLITS}
    if not rows["train"]:
        raise ValueError(f"{file}: none of its {len(first)} {unit}s falls into the training split; use a longer text")
    count = {"read": len(parts), "empty": len(parts) - len(filled), "duplicate": len(filled) - len(first)}
    with _building(out) as work:
        tokenizer = make_tokenizer(rows["train"], work / "tokenizer", vocab_size, tokenizer_dir)
        splits = {}
        for split, texts in rows.items():
            columns = {"domain": np.zeros(len(texts), np.uint8)}
            ids = [f"{split}/{i}" for i in range(len(texts))]
            splits[split] = write_token_file(work / split, texts, tokenizer, [file.stem], columns, ids, made)
        _finish(work, made, {file.stem: count | {s: len(t) for s, t in rows.items()}}, splits, tokenizer)
    _report(out)


def prepare_preferences(file: Path, out: Path, tokenizer_dir: Path | None, vocab_size: int) -> None:
    """JSON lines with prompt, chosen, rejected -> token files whose pairs are the lines; a prompt lies in one split.

    Rows 2 i and 2 i + 1 are pair i, prompt and answer joined as they are. pair_gap is the line's strength (1 where it has
    none), and the ratings are half of it above and below 0: points within a pair, not between pairs.
    """
    made = {
        "by": "python -m data.prepare preferences",
        "source": file.name,
        "sha256": sha256(file),
        "tokenizer": load_tokenizer(tokenizer_dir).fingerprint if tokenizer_dir else f"trained, {vocab_size} pieces",
        "recipe": RECIPE,
    }
    if _is_prepared(out, made):
        return
    found, same = read_preferences(file)
    rows = {s: [row for row in found if split_of(row.prompt) == s] for s in SPLITS}
    if missing := [s for s in SPLITS if not rows[s]]:
        raise ValueError(f"{file}: none of its {len(found)} pairs falls into {missing[0]}; collect more prompts")
    count = {"read": len(found) + same, "identical": same}
    with _building(out) as work:
        texts = {
            s: [(p.prompt + side).replace("\u2581", "_") for p in rows[s] for side in (p.chosen, p.rejected)]
            for s in SPLITS
        }
        tokenizer = make_tokenizer(texts["train"], work / "tokenizer", vocab_size, tokenizer_dir)
        splits = {}
        for split in SPLITS:
            gap = np.array([p.strength for p in rows[split]], np.float32)
            first = np.arange(0, 2 * len(gap), 2, dtype=np.int32)
            pairs = {"pair_chosen": first, "pair_rejected": first + 1, "pair_gap": gap}
            columns = {"domain": np.zeros(2 * len(gap), np.uint8), "rating": np.stack([gap, -gap], 1).ravel() / 2}
            ids = [f"{split}/{i}/{side}" for i in range(len(gap)) for side in ("chosen", "rejected")]
            splits[split] = write_token_file(
                work / split, texts[split], tokenizer, [file.stem], columns, ids, made, pairs
            )
        _finish(work, made, {file.stem: count | {s: 2 * len(r) for s, r in rows.items()}}, splits, tokenizer)
    _report(out)


def _is_prepared(out: Path, made: dict) -> bool:
    """True (and says so) if out/ is finished and was made in exactly this way; ValueError if it is somebody else's."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        manifest = parse_json((out / "manifest.json").read_text("utf-8"), str(out))
        ours = manifest["format"] == FORMAT and "files" in manifest  # a single split has the format too
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise ValueError(f"{out} exists and is not prepared data; choose another --out or remove it")
    whole = all((out / f).is_file() and (out / f).stat().st_size == n for f, n in manifest["files"].items())
    if whole and manifest["made"] == made:
        print(f"{out} is already prepared in this way: nothing to do")
        return True
    print(f"{out} was prepared in another way or is damaged: making it again")
    return False


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """A scratch directory beside `out` that takes its place if the block succeeds, and disappears if it fails."""
    out = out.resolve()  # through a symbolic link
    work = old = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        old = work.with_name(work.name + ".old")
        work.chmod(0o755)  # mkdtemp makes it private
        yield work
        if out.exists():
            os.replace(out, old)
        os.replace(work, out)
    except OSError as e:
        raise OSError(f"cannot write {out}: {e.strerror or e}") from None
    finally:
        for directory in filter(None, [work, old]):
            shutil.rmtree(directory, ignore_errors=True)


def _finish(work: Path, made: dict, counts: dict, splits: dict, tokenizer: Tokenizer) -> None:
    files = {str(f.relative_to(work)): f.stat().st_size for f in sorted(work.rglob("*")) if f.is_file()}
    summary = {s: {k: m[k] for k in ("rows", "tokens", "pairs", "rows_by_domain")} for s, m in splits.items()}
    manifest = {"format": FORMAT, "made": made, "counts": counts, "splits": summary}
    manifest |= {"tokenizer": tokenizer.fingerprint, "files": files, "seconds": time.perf_counter() - STARTED}
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _report(out: Path) -> None:
    """Prints every count of the manifest as two tables."""
    manifest = json.loads((out / "manifest.json").read_text())
    counts = manifest["counts"]
    names = list(dict.fromkeys(name for c in counts.values() for name in c if name not in SPLITS))
    print(_table("domain", [*names, *SPLITS], counts | ({"total": _total(counts)} if len(counts) > 1 else {})))
    print(_table("split", ["rows", "tokens", "pairs"], manifest["splits"]))
    print(f"wrote {out}")


def _total(counts: dict[str, dict]) -> dict:
    return {k: sum(c.get(k, 0) for c in counts.values()) for k in {k for c in counts.values() for k in c}}


def _table(corner: str, columns: list[str], rows: dict[str, dict]) -> str:
    width = max(map(len, [corner, *rows]))
    lines = ["  ".join([corner.ljust(width), *columns])]
    for name, row in rows.items():
        lines.append("  ".join([name.ljust(width), *(f"{row.get(c, 0):,}".rjust(len(c)) for c in columns)]))
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}; see --help")


def main(argv: list[str] | None = None) -> None:
    parser = _Parser(prog="python -m data.prepare", description="Makes token files.", allow_abbrev=False)
    jobs = parser.add_subparsers(dest="job", required=True)
    v = jobs.add_parser("vader", help="rated sentences of four domains, from PyPI", allow_abbrev=False)
    v.add_argument("--out", type=Path, default=Path("out/data/vader"), help="directory to write (%(default)s)")
    v.add_argument(
        "--train_domains", nargs="+", choices=list(vader.DOMAINS), metavar="DOMAIN",
        help="train on these alone (%(choices)s); validation and test keep all",
    )  # fmt: skip
    t = jobs.add_parser("text", help="any plain text file", allow_abbrev=False)
    t.add_argument("file", type=Path, help="UTF-8 text")
    t.add_argument("--out", type=Path, required=True, help="directory to write")
    t.add_argument("--unit", choices=["paragraph", "line"], default="paragraph", help="what one row is (%(default)s)")
    p = jobs.add_parser("preferences", help="JSON lines with prompt, chosen, rejected", allow_abbrev=False)
    p.add_argument("file", type=Path, help="one comparison a line, prompts and answers as texts")
    p.add_argument("--out", type=Path, required=True, help="directory to write")
    for job in (v, t, p):
        job.add_argument(
            "--tokenizer", type=Path, help="use this tokenizer (a directory that holds one) and train none"
        )
        job.add_argument("--vocab_size", type=int, help="pieces of the tokenizer that is trained otherwise (2048)")
    args = parser.parse_args(argv)
    if args.tokenizer and args.vocab_size:
        raise ValueError("--vocab_size has no effect with --tokenizer: that one is trained already")
    vocab_size = args.vocab_size or 2048
    if args.job == "vader":
        prepare_vader(args.out, vocab_size, args.tokenizer, args.train_domains)
    elif args.job == "preferences":
        prepare_preferences(args.file, args.out, args.tokenizer, vocab_size)
    else:
        prepare_text(args.file, args.out, args.tokenizer, vocab_size, args.unit)
    print(f"{time.perf_counter() - STARTED:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        named = isinstance(e, OSError) and e.filename is not None
        message = f"{e.filename}: {e.strerror}" if named else " ".join(str(e).split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
