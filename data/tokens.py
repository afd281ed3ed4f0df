"""The format of a token file, written and read here: one directory of flat arrays and a manifest.

tokens.bin   bos text eos, bos text eos, ...                    uint16, or uint32 from 65,536 pieces on
offsets.bin  where rows begin; row i is tokens[o[i]:o[i+1]]     int64, rows + 1
domain.bin, rating.bin, half_a.bin ...                          one value a row
pair_chosen.bin, pair_rejected.bin, pair_gap.bin                two row numbers and how far apart people rated them
texts.jsonl  the cleaned text of every row
manifest.json   counts, dtypes, tokenizer fingerprint, sha256 of every file, how it was made
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.fetch import sha256
from data.text import parse_json
from data.tokenizer import SentencePieceTokenizer

FORMAT = "plain-rlhf tokens 1"


def write_token_file(
    directory: Path,
    texts: Sequence[str],
    tokenizer: SentencePieceTokenizer,
    domains: Sequence[str],
    columns: dict[str, np.ndarray],
    ids: Sequence[str],
    made: dict,
    pairs: dict[str, np.ndarray] | None = None,
) -> dict:
    """Writes a token file and returns its manifest. columns: name -> one value per row, "domain" among them."""
    directory.mkdir(parents=True)
    dtype = np.uint16 if tokenizer.vocab_size < 2**16 else np.uint32
    rows = []
    for start in tqdm(range(0, len(texts), 1000), desc=f"tokens of {directory.name}", leave=False, disable=None):
        for ids_of_text in tokenizer.encode_many(texts[start : start + 1000]):
            rows.append(np.array([tokenizer.start, *ids_of_text, tokenizer.eos], dtype))
    arrays = {
        "tokens": np.concatenate(rows) if rows else np.zeros(0, dtype),
        "offsets": np.cumsum([0] + [len(r) for r in rows], dtype=np.int64),
        **columns,
        **(pairs or {}),
    }
    for name, array in arrays.items():
        (directory / f"{name}.bin").write_bytes(array.tobytes())
    with open(directory / "texts.jsonl", "w", encoding="utf-8") as f:
        for name, text in zip(ids, texts):
            f.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
    manifest = {
        "format": FORMAT,
        "split": directory.name,
        "rows": len(texts),
        "tokens": len(arrays["tokens"]),
        "pairs": len(arrays.get("pair_gap", ())),
        "domains": list(domains),
        "rows_by_domain": {d: int((columns["domain"] == i).sum()) for i, d in enumerate(domains)},
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "pad": tokenizer.pad,
            "bos": tokenizer.start,
            "eos": tokenizer.eos,
        },
        "arrays": {name: {"dtype": str(a.dtype), "length": len(a)} for name, a in arrays.items()},
        "sha256": {f.name: sha256(f) for f in sorted(directory.iterdir())},
        "made": made,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


class TokenFile:
    """One split on disk, memory-mapped: `len(f)` rows, `f[i]` the tokens of row i (bos and eos included)."""

    def __init__(self, path: str | Path, verify: bool = False):
        """ValueError if a file is missing, truncated or not as the manifest says; verify=True also checks sha256."""
        self.path = Path(path)
        self.manifest = self._read_manifest()
        self.rows, self.domains = self.manifest["rows"], self.manifest["domains"]
        tokenizer = self.manifest["tokenizer"]
        self.fingerprint, self.vocab_size = tokenizer["fingerprint"], tokenizer["vocab_size"]
        self.pad, self.bos, self.eos = tokenizer["pad"], tokenizer["bos"], tokenizer["eos"]
        self._arrays = {name: self._map(name, **spec) for name, spec in self.manifest["arrays"].items()}
        self.tokens, self.offsets = self._arrays["tokens"], self._arrays["offsets"]
        if self.offsets[0] != 0 or (np.diff(self.offsets) < 0).any():
            raise self._broken("offsets.bin", "does not count upwards from 0")
        if int(self.offsets[-1]) != len(self.tokens):
            raise self._broken("offsets.bin", f"ends at {self.offsets[-1]}, but there are {len(self.tokens)} tokens")
        if verify:
            self.verify()

    def _read_manifest(self) -> dict:
        file = self.path / "manifest.json"
        if not file.is_file():
            raise FileNotFoundError(f"no token file at {self.path} (no manifest.json); run `python -m data.prepare`")
        try:
            manifest = parse_json(file.read_text("utf-8", "replace"), str(file))
        except ValueError as e:
            raise ValueError(f"{e}; remove {self.path.parent} and run `python -m data.prepare` again") from None
        if manifest.get("format") != FORMAT or "arrays" not in manifest:
            hint = "this is the directory of all splits: add /train" if "splits" in manifest else "prepare it again"
            raise ValueError(f"{file} does not describe a token file in format {FORMAT!r}; {hint}")
        return manifest

    def _broken(self, file: str, what: str) -> ValueError:
        again = self.manifest["made"]["by"] if "manifest" in self.__dict__ else "python -m data.prepare"
        return ValueError(f"{self.path / file} {what}; remove {self.path.parent} and run `{again}` again")

    def _map(self, name: str, dtype: str, length: int) -> np.ndarray:
        file = self.path / f"{name}.bin"
        expected = length * np.dtype(dtype).itemsize
        if not file.is_file():
            raise self._broken(file.name, f"is missing ({expected} bytes expected)")
        if (size := file.stat().st_size) != expected:
            raise self._broken(file.name, f"has {size} bytes, the manifest says {expected}")
        return np.memmap(file, dtype, mode="r") if length else np.zeros(0, dtype)  # an empty file cannot be mapped

    def verify(self) -> None:
        """Raises ValueError if the content of any file differs from the sha256 in the manifest."""
        for name, digest in self.manifest["sha256"].items():
            got = hashlib.sha256((self.path / name).read_bytes()).hexdigest()
            if got != digest:
                raise self._broken(name, f"has sha256 {got[:12]}, the manifest says {digest[:12]}")

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < self.rows:
            raise IndexError(f"row {i} of {self.rows} in {self.path}")
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)  # (rows,), bos and eos included

    def column(self, name: str) -> np.ndarray:
        """One value per row (rating, half_a, domain ...) or per pair (pair_chosen, pair_rejected, pair_gap)."""
        if name not in self._arrays:
            raise ValueError(f"{self.path} has no column {name!r}; it has {', '.join(sorted(self._arrays))}")
        return self._arrays[name]

    @cached_property
    def has_single_pairs(self) -> bool:
        """Are the pairs rows 0 and 1, 2 and 3 ..., as data.prepare makes them of preferences?"""
        chosen, rejected = (self._arrays.get(f"pair_{name}", np.zeros(0)) for name in ("chosen", "rejected"))
        return np.array_equal(np.stack([chosen, rejected], 1).ravel(), np.arange(self.rows))

    def has(self, *names: str) -> bool:
        return {*names} <= self._arrays.keys()

    def labelled_by(self, name: str) -> TokenFile:
        """This file as it would be if `name`, e.g. half of the raters, were its ratings: pairs turn, and ties fall out."""
        ratings, file = self.column(name), copy.copy(self)
        chosen, rejected = self.column("pair_chosen"), self.column("pair_rejected")
        gap = ratings[chosen] - ratings[rejected]  # (pairs,)
        pairs = {
            "pair_chosen": np.where(gap > 0, chosen, rejected)[gap != 0],
            "pair_rejected": np.where(gap > 0, rejected, chosen)[gap != 0],
            "pair_gap": np.abs(gap)[gap != 0],
        }
        file._arrays = self._arrays | {"rating": ratings} | pairs
        return file

    def domain_ids(self, names: Sequence[str]) -> list[int]:
        for name in names:
            if name not in self.domains:
                raise ValueError(f"{self.path} has no domain {name!r}; it has {', '.join(self.domains)}")
        return [self.domains.index(name) for name in names]

    @cached_property
    def texts(self) -> list[str]:
        with open(self.path / "texts.jsonl", encoding="utf-8") as f:
            return [parse_json(line, f"{f.name}, line {i}")["text"] for i, line in enumerate(f, 1)]
