"""Sentences and ratings: what is read, cleaned, dropped and split; the rules; the baselines of the reward model."""

import hashlib
import json
import math

import fake_ratings
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data import vader
from data.baselines import GAPS, BagOfWords, _grams, accuracy, baselines, pairwise_accuracy, people
from data.examples import Examples
from data.pairs import MOST_PAIRS, MOST_TRAINING_PAIRS, SomeAnswers
from data.pipeline import main
from data.text import SPLITS, clean, key, split_of

# --- text ---


@pytest.mark.parametrize(
    "raw, cleaned",
    [
        ("AT&amp;T &lt;3 &gt;", "AT&T <3 >"),
        ("&amp;amp;lt;b&amp;gt;", "<b>"),  # escaped more than once
        ("AT&T, R&D; Q&A &notanentity; &copy", "AT&T, R&D; Q&A &notanentity; &copy"),  # no entities: left alone
        ("''The Lord'' of \"\"it\"\"", '"The Lord" of "it"'),
        ("don't", "don't"),
        ("\ufeffa\x00b\x07 c\t\td\u00a0e\r\n ", "ab c d e"),
        ("  many    spaces ", "many spaces"),
        ("a\u2581b", "a_b"),
        ("caf\u00e9 \u2019 \U0001f600", "caf\u00e9 \u2019 \U0001f600"),
        ("\x00 \ufeff", ""),
    ],
)
def test_clean(raw, cleaned):
    assert clean(raw) == cleaned


@given(text=st.text(max_size=80))
@example("a ' ' b")
def test_clean_text_is_one_printable_line(text):
    cleaned = clean(text)
    assert cleaned == cleaned.strip() and "  " not in cleaned and len(cleaned.splitlines()) <= 1
    assert not any(c in cleaned for c in "\ufeff\x00\n\t\u2581")
    cleaned.encode("utf-8")  # no lone surrogates


@given(text=st.text(max_size=40), mark=st.sampled_from([".", "!", " ...", "?!", '"']))
def test_case_and_punctuation_do_not_make_another_text(text, mark):
    if key(text) != text:  # else it may consist of nothing but marks, which count then
        assert key(text + mark) == key(text)
    assert split_of(text) == split_of(key(text)) or not key(text)


def test_key_of_examples():
    assert key("It's GREAT!!!") == key("it s great") == key("\uff29t's great.")  # full-width I
    assert len({key(":)"), key(":("), key("good :)"), key("bad :(")}) == 4


def test_the_split_is_eighty_ten_ten_and_never_changes():
    counts = {s: sum(split_of(f"sentence {i}") == s for i in range(5000)) for s in SPLITS}
    assert abs(counts["train"] - 4000) < 120 and abs(counts["validation"] - 500) < 90 and abs(counts["test"] - 500) < 90
    bucket = int(hashlib.sha256(b"sentence 7").hexdigest()[:16], 16) % 10
    assert split_of("Sentence 7!") == (["train"] * 8 + ["validation", "test"])[bucket]


# --- reading the archive ---


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    return vader.read_sentences(fake_ratings.fake_sdist(tmp_path_factory.mktemp("sdist") / vader.SDIST))


def test_every_row_is_kept_or_counted_as_dropped(read):
    sentences, counts = read
    assert counts["film"]["read"] == 60 and counts["tweets"]["read"] == 60 + len(fake_ratings.NASTY)
    for domain, count in counts.items():
        dropped = {k: n for k, n in count.items() if k not in (*SPLITS, "read", "published mean differs")}
        assert count["read"] == sum(count.get(s, 0) for s in SPLITS) + sum(dropped.values())
        assert sum(count.get(s, 0) for s in SPLITS) == sum(s.domain == domain for s in sentences)
    tweets = counts["tweets"]
    assert tweets["duplicate"] == 1 and tweets["empty text"] == 1 and tweets["fewer than two ratings"] == 2
    assert tweets["malformed ratings"] == tweets["rating outside -4 ... 4"] == tweets["malformed row"] == 1
    assert tweets["published mean differs"] == 3  # n1, n8, n9: the ratings count, not the published mean


def test_ratings_are_the_mean_of_the_raw_ratings(read):
    by_id = {s.id: s for s in read[0]}
    nasty = by_id["tweets/n1"]
    assert nasty.text == 'Tom & Jerry <3 "great" fun "really"'
    assert (nasty.rating, nasty.half_a, nasty.half_b, nasty.one_rater, nasty.rest) == (2.5, 3.5, 1.5, 4.0, 2.0)
    assert nasty.rating_std == pytest.approx(math.sqrt(5 / 4))
    assert {"tweets/n8", "tweets/n9"} <= set(by_id) and "tweets/n2" not in by_id
    for domain in vader.DOMAINS:  # the two files are in different orders
        for i, mean, text, raw in fake_ratings.sentences(domain, 60):
            sentence = by_id[f"{domain}/{i}"]
            assert sentence.text == text and sentence.rating == pytest.approx(mean)
            assert sentence.half_a == pytest.approx(np.mean(json.loads(raw)[0::2]))
            assert sentence.half_b == pytest.approx(np.mean(json.loads(raw)[1::2]))


def test_a_damaged_archive_is_one_clear_line(tmp_path):
    good = fake_ratings.fake_sdist(tmp_path / "good.tar.gz")
    (tmp_path / "short.tar.gz").write_bytes(good.read_bytes()[:3000])
    (tmp_path / "text.tar.gz").write_bytes(b"not an archive")
    for name in ("short", "text"):
        with pytest.raises(ValueError, match=f"{name}.tar.gz (is damaged|has no).*download again"):
            vader.read_sentences(tmp_path / f"{name}.tar.gz")


def test_members_are_read_in_memory_and_paths_in_the_archive_mean_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = {"../../evil.txt": b"x", "/tmp/evil-plain-rlhf.txt": b"x"}
    sdist = fake_ratings.fake_sdist(tmp_path / "in" / vader.SDIST, rows=5, files=evil)
    vader.read_sentences(sdist)
    assert [f.name for f in tmp_path.rglob("*") if f.is_file()] == [vader.SDIST]


# --- the rules ---


def test_rules_are_loaded_from_the_prepared_directory(tmp_path, monkeypatch):
    sdist = fake_ratings.use_fake(monkeypatch, tmp_path)
    vader.write_rules(sdist, tmp_path / "out" / "rules")
    for path in (tmp_path / "out", tmp_path / "out" / "rules"):
        assert vader.load_rules(path)("a lovely, lovely, ugly film") == 1


@pytest.mark.parametrize("name", list(vader.RULES))
def test_rules_that_are_not_the_pinned_ones_are_never_executed(name, tmp_path, monkeypatch):
    sdist = fake_ratings.use_fake(monkeypatch, tmp_path)
    vader.write_rules(sdist, tmp_path / "rules")
    with open(tmp_path / "rules" / name, "ab") as f:
        f.write(b"\nraise SystemExit('executed')\n")
    with pytest.raises(ValueError, match=f"{name} is not the pinned file"):
        vader.load_rules(tmp_path)
    (tmp_path / "rules" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no .*{name}; run `python -m data.prepare vader`"):
        vader.load_rules(tmp_path)


# --- baselines ---


@given(
    scores=st.lists(
        st.tuples(st.integers(-2, 2), st.integers(-2, 2), st.sampled_from([0.25, 0.5, 0.75, 1.5, 3.0])), min_size=1
    )
)
def test_pairwise_accuracy_is_the_count_of_right_pairs(scores):
    chosen, rejected, gap = (np.array(x, float) for x in zip(*scores))
    got = pairwise_accuracy(chosen, rejected, gap)
    for name, least in GAPS.items():
        points = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b, g in scores if g > least]
        assert got[name] == pytest.approx(sum(points) / len(points)) if points else math.isnan(got[name])


def test_bag_of_words_is_ridge_regression():
    rng = np.random.default_rng(0)
    words = np.array("good bad film plot very not warm dull".split())
    texts = [" ".join(rng.choice(words, size=rng.integers(2, 7))) for _ in range(40)]
    ratings = rng.normal(size=40) + 3.0
    bow = BagOfWords(texts, ratings, ridge=0.7, iterations=300)
    row, column, value = bow._features([_grams(text) for text in texts])
    X = np.zeros((40, len(bow.index)))
    X[row, column] = value
    w = np.linalg.solve(X.T @ X + 0.7 * np.eye(X.shape[1]), X.T @ (ratings - ratings.mean()))
    assert np.allclose(bow.w, w, atol=1e-6) and np.allclose(bow.scores(texts), X @ w, atol=1e-6)
    assert np.allclose(np.linalg.norm(X, axis=1)[X.any(axis=1)], 1.0)
    assert bow.scores(["words nobody ever saw"]).tolist() == [0.0]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as m:
        fake_ratings.use_fake(m, tmp)
        main(["vader", f"--out={tmp / 'out'}", "--vocab_size=400"])
        rules = vader.load_rules(tmp / "out")
    return tmp / "out", rules


def test_the_table_of_baselines(prepared):
    out, rules = prepared
    train, test = (SomeAnswers(Examples(out / split)) for split in ("train", "test"))
    table = baselines(train, test, rules)
    assert set(table) == {"rules", "bow", "length", "human", "one_rater"}
    assert all(set(row) == set(GAPS) for row in table.values())
    assert table["rules"] == accuracy(np.array([rules(t) for t in test.texts]), test)
    assert table["bow"]["1"] > 0.95 and table["human"]["1"] > 0.95  # made-up moods are easy to see
    assert abs(table["length"]["all"] - 0.5) < 0.2
    assert baselines(train, test, rules) == table


def test_people_are_judged_by_other_people():
    class Pairs:
        def column(self, name):
            return {"pair_chosen": np.array([0, 1, 0]), "pair_rejected": np.array([1, 2, 2])}[name]

    judge, truth = np.array([3.0, 1.0, 1.0]), np.array([1.0, 1.0, -1.0])
    got = people(judge, truth, Pairs())  # (0, 1): no truth; (1, 2): the judge sees no difference; (0, 2): right
    assert got["all"] == 0.75 and got["1"] == 0.75 and math.isnan(got["2"])
    assert people(-judge, truth, Pairs())["all"] == 0.25
    assert people(judge, -truth, Pairs())["all"] == 0.25  # the truth decides the direction, not who was "chosen"


# --- the real thing ---


@pytest.mark.slow
def test_real_ratings(tmp_path):
    try:
        main(["vader", f"--out={tmp_path / 'vader'}"])
    except OSError as e:
        pytest.skip(f"no download possible: {e}")
    manifest = json.loads((tmp_path / "vader" / "manifest.json").read_text())
    # case and punctuation aside, 255 are duplicates
    assert manifest["rows"] == {"read": 23_703, "kept": 23_448, "rejected": 0, "duplicates": 255}
    most = dict.fromkeys(SPLITS, MOST_PAIRS) | {"train": MOST_TRAINING_PAIRS}
    files = {s: SomeAnswers(Examples(tmp_path / "vader" / s, verify=True), most_pairs=most[s]) for s in SPLITS}
    assert [round(len(f) / 23_448, 2) for f in files.values()] == [0.8, 0.1, 0.1]

    texts = {s: {key(t) for t in f.texts} for s, f in files.items()}
    assert not (
        texts["train"] & texts["validation"] | texts["train"] & texts["test"] | texts["validation"] & texts["test"]
    )
    assert not any(c in t for f in files.values() for t in f.texts for c in ("&amp;", "&lt;", "''", "\ufeff", "  "))
    for split, f in files.items():
        chosen, rejected, gap = f.column("pair_chosen"), f.column("pair_rejected"), f.column("pair_gap")
        assert (f.column("domain")[chosen] == f.column("domain")[rejected]).all() and (gap > 0).all()
        assert np.allclose(f.column("rating")[chosen] - f.column("rating")[rejected], gap)
        assert len(gap) == {"train": 40_000, "validation": 8_000, "test": 8_000}[split]

    rules = vader.load_rules(tmp_path / "vader")
    assert rules("VADER is smart, handsome, and funny.") == 0.8316  # the first line of its own examples
    table = baselines(files["train"], files["test"], rules)
    assert 0.74 < table["rules"]["1"] < 0.79 and 0.80 < table["bow"]["1"] < 0.86 and 0.48 < table["length"]["1"] < 0.56
    assert table["human"]["1"] > 0.98 and 0.90 < table["one_rater"]["1"] < 0.95
