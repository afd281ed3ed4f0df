"""The commands: what they write, that they do not redo or destroy anything, and how they fail (one line, exit code 2)."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import fake_ratings
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import fetch as fetching
from data import prepare, vader
from data.baselines import pair_clusters
from data.fetch import fetch, sha256
from data.pairs import SomeRows, make_pairs
from data.prepare import main
from data.text import SPLITS, key, split_of
from data.tokenizer import load_tokenizer
from data.tokens import TokenFile

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {"domain", "rating", "half_a", "half_b", "rating_std", "one_rater", "rest"}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PAIRS", {"train": 300, "validation": 50, "test": 50})
    monkeypatch.chdir(tmp_path)
    return fake_ratings.use_fake(monkeypatch, tmp_path)


def command(*arguments, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "data.prepare", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def refused(result: subprocess.CompletedProcess) -> str:
    """The one line of a command that ended as bad input has to end."""
    assert result.returncode == 2, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


# --- vader ---


def test_what_is_written(fake, tmp_path, capsys):
    main(["vader", "--out=out", "--vocab_size=400"])
    table = capsys.readouterr().out
    assert "tweets" in table and "duplicate" in table and "wrote out" in table
    assert not list(tmp_path.glob(".out*"))  # nothing temporary is left
    tokenizer = load_tokenizer("out")
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["tokenizer"] == tokenizer.fingerprint and manifest["made"]["sha256"] == sha256(fake)
    sentences, counts = vader.read_sentences(fake)
    assert manifest["counts"] == counts
    for split in SPLITS:
        file = TokenFile(f"out/{split}", verify=True)
        expected = [s for s in sentences if s.split == split]
        assert file.texts == [s.text for s in expected] and file.fingerprint == tokenizer.fingerprint
        assert file.manifest["rows"] == manifest["splits"][split]["rows"] == len(expected)
        assert set(file.manifest["arrays"]) == COLUMNS | {
            "tokens",
            "offsets",
            "pair_chosen",
            "pair_rejected",
            "pair_gap",
        }
        assert file.tokens.dtype == np.uint16 and file.column("rating").dtype == np.float32
        for i, sentence in enumerate(expected):
            assert file[i].tolist() == [tokenizer.bos, *tokenizer.encode(sentence.text), tokenizer.eos]
            assert file.domains[file.column("domain")[i]] == sentence.domain
            for name in COLUMNS - {"domain"}:
                assert file.column(name)[i] == np.float32(getattr(sentence, name))
        assert sum(file.manifest["rows_by_domain"].values()) == len(file)


def test_no_text_is_in_two_splits(fake):
    main(["vader", "--out=out", "--vocab_size=400"])
    keys = [key(text) for split in SPLITS for text in TokenFile(f"out/{split}").texts]
    assert len(keys) == len(set(keys))


def test_the_tokenizer_sees_the_training_split_alone(fake, monkeypatch):
    seen = []
    original = prepare.train_sentencepiece
    monkeypatch.setattr(prepare, "train_sentencepiece", lambda texts, *a: seen.extend(texts) or original(seen, *a))
    main(["vader", "--out=out", "--vocab_size=400"])
    assert seen == TokenFile("out/train").texts


def test_training_on_some_domains_leaves_the_other_splits_alone(fake):
    main(["vader", "--out=all", "--vocab_size=400"])
    main(["vader", "--out=some", "--tokenizer=all", "--train_domains", "film", "news"])
    everything, some = TokenFile("all/train"), TokenFile("some/train")
    domains = everything.column("domain")
    kept = [i for i in range(len(everything)) if everything.domains[domains[i]] in ("film", "news")]
    assert 0 < len(kept) < len(everything) and some.texts == [everything.texts[i] for i in kept]
    for split in ("validation", "test"):
        assert [row.tolist() for row in TokenFile(f"some/{split}")] == [
            row.tolist() for row in TokenFile(f"all/{split}")
        ]


def test_the_same_archive_gives_the_same_bytes(fake):
    main(["vader", "--out=a", "--vocab_size=400"])
    main(["vader", "--out=b", "--vocab_size=400"])
    names = sorted(p.relative_to("a") for p in Path("a").rglob("*") if p.is_file())
    assert names == sorted(p.relative_to("b") for p in Path("b").rglob("*") if p.is_file())
    data = [n for n in names if str(n) != "manifest.json"]
    assert len(data) == len(names) - 1
    assert all((Path("a") / n).read_bytes() == (Path("b") / n).read_bytes() for n in data)
    a, b = (json.loads((Path(out) / "manifest.json").read_text()) for out in "ab")
    assert a.pop("seconds") > 0 and b.pop("seconds") > 0  # the one thing that may differ
    assert a == b


def test_finished_data_is_recognised_and_other_data_made_again(fake, capsys):
    main(["vader", "--out=out", "--vocab_size=400"])
    before = Path("out/train").stat().st_mtime_ns
    capsys.readouterr()
    main(["vader", "--out=out", "--vocab_size=400"])
    assert "already prepared" in capsys.readouterr().out and Path("out/train").stat().st_mtime_ns == before
    with open("out/test/tokens.bin", "ab") as f:
        f.write(b"x")
    main(["vader", "--out=out", "--vocab_size=400"])
    assert "making it again" in capsys.readouterr().out
    TokenFile("out/test", verify=True)
    main(["vader", "--out=out", "--vocab_size=380"])
    assert load_tokenizer("out").vocab_size == 380


def test_a_directory_that_is_not_ours_is_left_alone(fake):
    Path("thesis").mkdir()
    Path("thesis/chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="thesis exists and is not prepared data"):
        main(["vader", "--out=thesis", "--vocab_size=400"])
    Path("thesis/manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="not prepared data"):
        main(["vader", "--out=thesis", "--vocab_size=400"])
    assert Path("thesis/chapter.txt").read_text() == "years of work"
    main(["vader", "--out=out", "--vocab_size=400"])
    with pytest.raises(ValueError, match="out/train exists and is not prepared data"):  # one split, not all of it
        main(["vader", "--out=out/train", "--vocab_size=400"])


def test_a_full_disk_leaves_the_old_data_and_nothing_else(fake, tmp_path, monkeypatch):
    main(["vader", "--out=out", "--vocab_size=400"])
    original = Path.write_bytes

    def full(path, blob):
        if path.name == "half_b.bin":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, blob)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="cannot write .*out: No space left on device"):
        main(["vader", "--out=out", "--vocab_size=390"])
    assert {p.name for p in tmp_path.iterdir()} == {"out", "cache"}
    assert load_tokenizer("out").vocab_size == 400
    with pytest.raises(OSError, match="cannot write .*new: No space"):
        main(["vader", "--out=new", "--vocab_size=400"])
    assert {p.name for p in tmp_path.iterdir()} == {"out", "cache"}


# --- pairs ---


@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([-1.0, 0.0, 0.5, 2.0])), max_size=30),
    count=st.integers(0, 60),
    seed=st.integers(0, 3),
)
def test_pairs_are_within_a_domain_different_and_ordered_by_rating(rows, count, seed):
    domains, ratings = np.array([d for d, _ in rows], np.uint8), np.array([r for _, r in rows], np.float32)
    pairs = make_pairs(ratings, domains, count, seed)
    chosen, rejected, gap = pairs["pair_chosen"], pairs["pair_rejected"], pairs["pair_gap"]
    assert len(chosen) == len(rejected) == len(gap) <= count
    assert (domains[chosen] == domains[rejected]).all() and (gap > 0).all()
    assert np.array_equal(ratings[chosen] - ratings[rejected], gap)
    assert len({frozenset(p) for p in zip(chosen.tolist(), rejected.tolist())}) == len(gap)
    assert all(np.array_equal(a, b) for a, b in zip(pairs.values(), make_pairs(ratings, domains, count, seed).values()))


def test_a_domain_has_the_share_of_its_rows_and_every_row_the_same_chance():
    domains = np.repeat([0, 1, 2], [300, 100, 1]).astype(np.uint8)  # one row alone has no partner
    ratings = np.random.default_rng(0).normal(size=401).astype(np.float32)
    pairs = make_pairs(ratings, domains, 6000, seed=1)
    assert len(pairs["pair_gap"]) == 6000
    assert abs((domains[pairs["pair_chosen"]] == 0).mean() - 0.75) < 0.03
    uses = np.bincount(np.concatenate([pairs["pair_chosen"], pairs["pair_rejected"]]), minlength=401)[:400]
    assert uses.min() > 8 and uses.max() < 60  # 30 +- 5.5 each


# --- plain text ---


TEXT = "".join(
    f"Scene {i}.\nThe wind rose over the {i * 7919 % 1000} hills, and\nnobody spoke.\n\n" for i in range(120)
)


def test_a_text_file_becomes_paragraphs_and_comes_back(tmp_path, capsys):
    (tmp_path / "play.txt").write_text(
        "\ufeff" + TEXT.replace("\n", "\r\n") + TEXT[:90] + "\n\n \n\n", encoding="utf-8"
    )
    main(["text", str(tmp_path / "play.txt"), f"--out={tmp_path / 'out'}", "--vocab_size=330"])
    assert "duplicate" in capsys.readouterr().out
    files = [TokenFile(tmp_path / "out" / s, verify=True) for s in SPLITS]
    texts = [t for f in files for t in f.texts]
    paragraphs = TEXT.strip("\n").split("\n\n")
    assert sorted(set(texts)) == sorted(texts) and set(paragraphs) <= set(texts) and len(texts) <= len(paragraphs) + 1
    tokenizer = load_tokenizer(tmp_path / "out")
    for file in files:
        assert [tokenizer.decode(file[i]) for i in range(len(file))] == file.texts  # line breaks included
        assert file.domains == ["play"] and len(file.column("domain")) == len(file)
    main(["text", str(tmp_path / "play.txt"), f"--out={tmp_path / 'out'}", "--vocab_size=330"])
    assert "already prepared" in capsys.readouterr().out


def test_a_text_file_by_lines_with_the_tokenizer_of_other_data(tmp_path):
    (tmp_path / "play.txt").write_text(TEXT)
    (tmp_path / "poem.txt").write_text("\n".join(f"line {i}" for i in range(50)))
    main(["text", str(tmp_path / "play.txt"), f"--out={tmp_path / 'play'}", "--vocab_size=330"])
    main(
        [
            "text",
            str(tmp_path / "poem.txt"),
            f"--out={tmp_path / 'poem'}",
            f"--tokenizer={tmp_path / 'play'}",
            "--unit=line",
        ]
    )
    assert load_tokenizer(tmp_path / "poem").fingerprint == load_tokenizer(tmp_path / "play").fingerprint
    assert sum(len(TokenFile(tmp_path / "poem" / s)) for s in SPLITS) == 50


# --- bad input ---


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ol\xe9")
    (tmp_path / "one.txt").write_text("hello there")  # its hash says test split
    (tmp_path / "short.txt").write_text(TEXT[:200])
    out = f"--out={tmp_path / 'out'}"
    assert "--oot" in refused(command("vader", "--oot=x"))
    assert "see --help" in refused(command())
    assert "vadder" in refused(command("vadder"))
    assert "nowhere.txt: No such file" in refused(command("text", tmp_path / "nowhere.txt", out))
    assert "contains no text" in refused(command("text", tmp_path / "empty.txt", out))
    assert "not UTF-8 (byte 3)" in refused(command("text", tmp_path / "latin.txt", out))
    assert "none of its 1 paragraphs falls into the training split" in refused(
        command("text", tmp_path / "one.txt", out)
    )
    assert "too high (2048)" in refused(command("text", tmp_path / "short.txt", out))
    assert "no tokenizer at" in refused(command("text", tmp_path / "short.txt", out, f"--tokenizer={tmp_path}"))
    both = ["--tokenizer=x", "--vocab_size=300"]
    assert "--vocab_size has no effect with --tokenizer" in refused(command("text", tmp_path / "short.txt", out, *both))
    below = f"--out={tmp_path / 'short.txt' / 'out'}"  # inside a file: no permission behaves the same, but not for root
    assert "cannot write" in refused(command("text", tmp_path / "short.txt", below, "--vocab_size=270"))
    assert not (tmp_path / "out").exists()


# --- the download: pip is real, the index is a directory ---


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip sees nothing but a directory with the fake source distribution; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return fake_ratings.fake_sdist(tmp_path / "index" / vader.SDIST, rows=5)


def test_download_verify_cache_and_no_setup_py(index, tmp_path):
    for unused in ("PIP_REQUIRE_HASHES", "PIP_ONLY_BINARY"):  # habits that an ordinary pip configuration may have
        os.environ[unused] = {"PIP_REQUIRE_HASHES": "1", "PIP_ONLY_BINARY": ":all:"}[unused]
    try:
        kept = fetch(vader.PACKAGE, vader.VERSION, vader.SDIST, sha256(index))  # setup.py would end the process
    finally:
        del os.environ["PIP_REQUIRE_HASHES"], os.environ["PIP_ONLY_BINARY"]
    assert kept.read_bytes() == index.read_bytes() and list(kept.parent.iterdir()) == [kept]
    digest = sha256(index)
    index.unlink()
    assert fetch(vader.PACKAGE, vader.VERSION, vader.SDIST, digest) == kept  # offline the second time


def test_a_damaged_cache_is_downloaded_again(index):
    kept = fetching.cache_dir() / vader.SDIST
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half a file")
    assert fetch(vader.PACKAGE, vader.VERSION, vader.SDIST, sha256(index)).read_bytes() == index.read_bytes()


def test_another_file_than_the_pinned_one_is_refused(index):
    with pytest.raises(ValueError, match=f"{vader.SDIST} has sha256 {sha256(index)}, expected {vader.SDIST_SHA256}"):
        fetch(vader.PACKAGE, vader.VERSION, vader.SDIST, vader.SDIST_SHA256)
    assert not list(fetching.cache_dir().iterdir())


def test_no_index_is_one_line_and_exit_code_2(tmp_path):
    quiet = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"}
    quiet |= {"PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": "", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    message = refused(command("vader", f"--out={tmp_path / 'out'}", **quiet))
    assert "pip could not download vaderSentiment==3.3.2" in message and vader.SDIST in message
    message = refused(command("vader", f"--out={tmp_path / 'out'}", **quiet | {"PIP_NO_INDEX": "1"}))
    assert "No matching distribution" in message
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    quiet["XDG_CACHE_HOME"] = str(tmp_path / "file")
    assert "set XDG_CACHE_HOME" in refused(command("vader", f"--out={tmp_path / 'out'}", **quiet))


def test_the_reason_in_what_pip_says():
    broken = "WARNING: Retrying after connection broken by 'x'\nERROR: No matching distribution found for y"
    assert fetching._reason(broken) == "no package index can be reached"
    assert fetching._reason("/usr/bin/python: No module named pip\n") == "/usr/bin/python: No module named pip"
    assert fetching._reason("Collecting x\nERROR: Could not install: No space left on device\n").startswith("Could not")
    assert fetching._reason("") == "it said nothing"


# preferences


def preferences(path: Path, count: int = 40) -> Path:
    rows = [
        {"prompt": f"number {i}", "chosen": " is good", "rejected": f" is bad{i}", "strength": 2} for i in range(count)
    ]
    rows += [rows[0] | {"chosen": " is", "strength": None}, {"prompt": "p", "chosen": "x", "rejected": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_preferences_become_pairs(tmp_path, capsys):
    main(["preferences", str(preferences(tmp_path / "p.jsonl")), f"--out={tmp_path / 'out'}", "--vocab_size=300"])
    assert "identical" in capsys.readouterr().out
    found = []
    for split in ("train", "validation", "test"):
        file = TokenFile(tmp_path / "out" / split, verify=True)
        chosen, rejected, gap = (file.column(f"pair_{name}") for name in ("chosen", "rejected", "gap"))
        assert (file.column("rating")[chosen] - file.column("rating")[rejected]).tolist() == gap.tolist()
        found += [(file.texts[a], file.texts[b], float(g)) for a, b, g in zip(chosen, rejected, gap)]
        with pytest.raises(ValueError, match="holds preferences: 2 of its"):  # answers to different prompts are no pair
            SomeRows(file, np.arange(2))
        assert pair_clusters(file).tolist() == [[i] for i in range(len(gap))]  # nothing is in two of them
        prompts = {text.partition(" is")[0] for text in file.texts}
        assert {split_of(prompt) for prompt in prompts} == {split}
    expected = [(f"number {i} is good", f"number {i} is bad{i}", 2.0) for i in range(40)]
    assert sorted(found) == sorted([*expected, ("number 0 is", "number 0 is bad0", 1.0)])


def test_too_few_preferences(tmp_path):
    with pytest.raises(ValueError, match="none of its 2 pairs falls into .*; collect more prompts"):
        main(["preferences", str(preferences(tmp_path / "p.jsonl", 1)), f"--out={tmp_path / 'out'}"])
