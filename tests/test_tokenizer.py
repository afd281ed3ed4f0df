"""The tokenizer: every text comes back unchanged, user text is never a control token, the same texts give the same file."""

import hashlib
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.text import clean
from data.tokenizer import MODEL_FILE, SentencePieceTokenizer, check_fingerprint, load_tokenizer, train_sentencepiece

WORDS = "the film was a warm and funny story of two people who never meet again camera plot good bad very not".split()
CORPUS = [" ".join(random.Random(i).choices(WORDS, k=12)) + random.Random(i).choice(".!?") for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(CORPUS, tmp_path_factory.mktemp("tokenizer") / MODEL_FILE, vocab_size=330)


@given(text=st.text(max_size=60))
@example("  two  spaces ")
@example("<s> </s> <pad> <unk> <0x41>")
@example("\u2581 is sentencepiece's own space")
@example("\U0001f468\u200d\U0001f469 \u0645\u0631\u062d\u0628\u0627 \u6f22\u5b57 e\u0301 \u00e9 \ufb01")
@example("&amp;lt; \ufeff\x00\x85 ''quoted''")
def test_cleaned_text_comes_back_unchanged(tokenizer, text):
    text = clean(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(alphabet=st.characters(exclude_characters="\u2581", exclude_categories=("Cs",)), max_size=60))
@example("a\n\nb\tc \r\n")
@example("\x00")
@example(" leading and trailing ")
def test_any_other_text_comes_back_unchanged_too(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(
    text=st.lists(
        st.sampled_from(["<s>", "</s>", "<pad>", "<unk>", "<0x00>", " ", "film", "\n", "\u2581"]), max_size=8
    ).map("".join)
)
def test_user_text_never_becomes_a_control_token(tokenizer, text):
    ids = tokenizer.encode(text)
    control = {tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.model.unk_id()}
    assert len(control) == 4 and not control & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_decode_drops_control_tokens_and_survives_any_ids(tokenizer):
    ids = tokenizer.encode("the film")
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad, tokenizer.pad]) == "the film"
    assert tokenizer.decode([]) == ""
    for i in range(tokenizer.vocab_size):
        assert isinstance(tokenizer.decode([i, i]), str)


def test_training_again_elsewhere_gives_the_same_bytes(tokenizer, tmp_path):
    again = train_sentencepiece(iter(CORPUS), tmp_path / "another" / "name.model", vocab_size=330)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.fingerprint == hashlib.sha256((tmp_path / "another" / "name.model").read_bytes()).hexdigest()
    other = train_sentencepiece(CORPUS[:200], tmp_path / "other.model", vocab_size=330)
    assert other.fingerprint != tokenizer.fingerprint
    assert again.vocab_size == 330


def test_long_texts_are_trained_on_too(tmp_path):
    long = " ".join(CORPUS)
    assert len(long) > 5000 and train_sentencepiece([long], tmp_path / MODEL_FILE, vocab_size=330).encode(
        "the film was"
    )


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "checkpoint")
    loaded = load_tokenizer(tmp_path / "checkpoint")
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.encode("a film") == tokenizer.encode("a film")
    tokenizer.save(tmp_path / "data" / "tokenizer")  # prepared data keeps it one level down
    assert load_tokenizer(tmp_path / "data").fingerprint == tokenizer.fingerprint


def test_a_missing_or_damaged_model_file_is_one_clear_line(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*run `python -m data.prepare`"):
        load_tokenizer(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"tokenizer.model \(8 bytes\) is not a sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(tokenizer.path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        SentencePieceTokenizer(tmp_path / MODEL_FILE)


@pytest.mark.parametrize(
    "texts, size, why", [(CORPUS, 100_000, "too high"), (CORPUS, 50, "smaller"), ([], 300, "no text")]
)
def test_training_that_cannot_work_says_why(texts, size, why, tmp_path):
    with pytest.raises(ValueError, match=f"cannot train a tokenizer of {size} pieces.*{why}") as e:
        train_sentencepiece(texts, tmp_path / MODEL_FILE, vocab_size=size)
    assert "\n" not in str(e.value) and not (tmp_path / MODEL_FILE).exists()


def test_check_fingerprint():
    check_fingerprint("abc", "abc", "out/lm")
    with pytest.raises(
        ValueError, match="wrong tokenizer for out/lm: it was made with aaaaaaaaaaaa, this one is bbbbbbbbbbbb"
    ):
        check_fingerprint("a" * 64, "b" * 64, "out/lm")
