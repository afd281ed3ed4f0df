"""Byte-level BPE: golden ids, HF's tokenizers, a slow textbook BPE, every form of vocabulary there and back, refusals."""

import base64
import io
import json
import random
import unicodedata
from functools import cache

import fake_gguf
import pytest
import regex
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data import bpe
from data.bpe import BPE_FILE, BPETokenizer, read_hf, read_ranks
from data.chat import Chat
from data.fetch import GPT2_RANKS, fetch_model, fetch_packed
from data.tokenizer import (
    Detokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    tokenizer_from_parts,
    train_sentencepiece,
    write_hf,
)
from data.words import GPT2, NAMED, normalized, words_of
from model.gguf import read_gguf, tokenizer_parts

LETTERS = fake_gguf.LETTERS
MERGES = [
    *fake_gguf.MERGES,
    "e r",
    "\u0120 \u010a",
    "\u010a \u010a",
    "' s",
    "\u00c3 \u00a9",
    "a n",
    "an d",
    "\u0120t h",
    "l l",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@cache
def tiny(pre="smollm", without=(), specials_first=True, **changes) -> BPETokenizer:
    """A vocabulary of bytes and a dozen merges, in an order of its own; `without` are bytes that have no token."""
    absent = {bpe.LETTERS[byte] for byte in without}
    letters = [letter for letter in sorted(LETTERS, key=ord) if letter not in absent]
    merges = [merge for merge in MERGES if not absent & set(merge)]
    merged = [merge.replace(" ", "") for merge in merges]
    normal = [*letters, *dict.fromkeys(merged)]
    tokens = [*SPECIAL, *normal] if specials_first else [*normal, *SPECIAL]
    types = [3 if token in SPECIAL else 1 for token in tokens]
    special = {
        "bos": tokens.index("<|im_start|>"),
        "eos": tokens.index("<|im_end|>"),
        "pad": tokens.index("<|im_end|>"),
    }
    return BPETokenizer(**{"tokens": tokens, "types": types, "merges": merges, "pre": pre, **special, **changes})


def slow_encode(tokenizer: BPETokenizer, text: str) -> list[int]:
    """Sennrich et al. 2016 to the letter: split into words, then apply the earliest merge until none applies."""
    words = words_of(tokenizer.pre)
    if words.normalizer:
        text = unicodedata.normalize("NFC", text)
    ids = {token: i for i, (token, kind) in enumerate(zip(tokenizer.tokens, tokenizer.types)) if kind == 1}
    merges = {tuple(merge.split(" ")): rank for rank, merge in reversed(list(enumerate(tokenizer.merges)))}
    out = []
    for word in split_into_words(words, text):
        letters = [bpe.LETTERS[byte] for byte in word.encode()]
        if words.ignore_merges and "".join(letters) in ids:
            out.append(ids["".join(letters)])
            continue
        letters = [letter for letter in letters if letter in ids]
        while pairs := [pair for pair in zip(letters, letters[1:]) if pair in merges]:
            first = min(pairs, key=merges.get)
            i = next(i for i, pair in enumerate(zip(letters, letters[1:])) if pair == first)
            letters[i : i + 2] = ["".join(first)]
        out += [ids[letter] for letter in letters]
    return out


def split_into_words(words, text: str) -> list[str]:
    """HF's steps, one after another: each cuts the stretches that the one before left at every match of its pattern."""
    stretches = [text]
    for split in words.splits:
        stretches = [part for s in stretches for part in regex.split(f"({split.pattern})", s) if part]
    return stretches


ATOMS = """
a the Hello world 's 'S 'll 'LL n't '\u017f \u212a 1 12 123 \u0663 \u0661\u0662 \uff14 \u00bd \u2167 \u4e00 ! ?! ... -- __
# < | > <|im_start|> <|endoftext|> <think> {} / ' " \u2019 \u00e9 e\u0301 \u00f1 \ufb01 A\u030a \u1e9b\u0323 \u03a9 \u044f
\u05e9\u05dc \u0645\u0631 \u0939\u093f \u0e44\u0e17 \u6f22\u5b57 \ud55c \u1112\u1161\u11ab \U0001f600 \U0001f1e9\U0001f1ea
\U0001f468\u200d\U0001f469 \u20e3 \U0001d518 \U000f0000 \U00040000 \U0010ffff \u0378 def return http://a.b/c?d=1
""".split()
ATOMS += [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n", "\n ", "\u00a0", "\u2003", "\u3000", "\x85", "\u2028"]
ATOMS += [
    " the",
    " 5",
    " world",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1d",
    "\x1f",
    "\u200b",
    "\ufeff",
    "\u180e",
    "\0",
    "\4",
    "\x80",
]


def fuzz_strings(n: int, seed: int = 7):
    rng = random.Random(seed)
    for k in range(n):
        if k % 5:
            yield "".join(rng.choices(ATOMS, k=rng.randrange(1, 9)))
        else:
            codes = (rng.randrange(rng.choice([128, 0x800, 0x10000, 0x110000])) for _ in range(rng.randrange(12)))
            yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


# --- the algorithm ---


@pytest.mark.parametrize("pre", NAMED)
@pytest.mark.parametrize("without", [(), (0x04, 0x1D, 0xC3, 0xF1, ord("!"))], ids=["all bytes", "bytes missing"])
def test_against_the_textbook(pre, without):
    tokenizer = tiny(pre, without)
    for text in fuzz_strings(1000):
        assert tokenizer.encode(text) == slow_encode(tokenizer, text), text


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_every_text_comes_back(text):
    for pre in NAMED:
        composed = normalized(text, NAMED[pre].normalizer)
        tokenizer = tiny(pre)
        assert tokenizer.decode(tokenizer.encode(text)) == composed


def test_spaces_before_a_digit_end_a_piece():
    """The trap of splitting digits: two spaces before a digit stay together, before a word the last one leaves."""
    tokenizer = tiny("smollm")
    double = tokenizer.tokens.index("\u0120\u0120")
    assert tokenizer.encode("a  1") == [tokenizer.encode("a")[0], double, tokenizer.encode("1")[0]]
    assert double not in tokenizer.encode("a  b") and double not in tiny("gpt-2").encode("a  1")
    assert tokenizer.tokens.index("12") not in tokenizer.encode("12") and tiny("gpt-2").encode(
        "12"
    ) != tokenizer.encode("12")


def test_a_missing_byte_leaves_and_its_neighbours_merge():
    tokenizer = tiny(without=(0x04,))
    assert tokenizer.encode("!\x04!") == tokenizer.encode("!!") and len(tokenizer.encode("!!")) == 1
    assert tokenizer.encode("\x04") == [] and tokenizer.encode("a\x04b") == tokenizer.encode("a") + tokenizer.encode(
        "b"
    )


def test_long_texts_of_one_character():
    """tiktoken's pattern matcher gives up on a million spaces, with an exception that no `except Exception` catches."""
    for pre in NAMED:
        tokenizer = tiny(pre)
        for text in (" " * 12_000 + "x", "\n" * 11_000, " \t" * 6_000 + "1"):
            assert tokenizer.encode_array(text).tobytes() == tokenizer._encode_words(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tiny("gpt-2").encode("\t" * 1_000_001 + "x")) == 1_000_002


SPACES = [" ", "  ", "\n", "\t", "\r\n", "\xa0", "\u2003", "\x1c", "\x85", "\u2028"]
LETTERS_AND_MORE = [
    "a",
    "the",
    "A",
    "'s",
    "'",
    "1",
    "12",
    "!",
    "?!",
    "é",
    "e\u0301",
    "中",
    "\u0378",
    "\U0001f600",
    "\u200d",
    "_",
]


@pytest.mark.parametrize("pre", NAMED)
@given(st.lists(st.sampled_from([*SPACES, *[" "] * 9, *LETTERS_AND_MORE]), max_size=24).map("".join))
def test_ids_of_pieces_between_spaces_are_those_of_words(pre, text):
    """Pieces are remembered; words, which the regex module finds in the whole text, are the slow way."""
    tokenizer = tiny(pre)
    for _ in range(2):
        words = tokenizer._encode_words(normalized(text, tokenizer._words.normalizer))
        assert tokenizer.encode_array(text).tobytes() == words


@pytest.mark.parametrize("step", [{"type": "Prepend", "prepend": "!"}, {"type": "Strip", "strip_left": True}])
def test_what_goes_on_from_a_text_is_not_its_beginning(step):
    """A normaliser that puts something before a text, or takes the space there, leaves what continues one alone."""
    tokenizer = tiny.__wrapped__({"splits": [[GPT2, "Isolated", False]], "normalizer": [step], "ignore_merges": False})
    for text in (" a", "a", "\n the"):
        assert tokenizer.decode(tokenizer.encode(text, "text")) == text
    assert tokenizer.decode(tokenizer.encode(" a")) != " a"


def test_half_a_surrogate_pair_is_refused(sentencepiece_tokenizer):
    for tokenizer in (tiny(), sentencepiece_tokenizer):
        with pytest.raises(ValueError, match=r"character 1 of 'a.ud800b' is half a surrogate pair, which has no bytes"):
            tokenizer.encode("a\ud800b")


# --- control tokens ---


@given(text=st.lists(st.sampled_from([*SPECIAL, " ", "the", "\n", "<|", "im_end|>"]), max_size=8).map("".join))
def test_user_text_never_becomes_a_control_token(text):
    for specials_first in (True, False):
        tokenizer = tiny(specials_first=specials_first)
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.control.values()) and tokenizer.decode(ids) == text


def test_what_decode_shows():
    tokenizer = tiny()
    ids = tokenizer.encode("the end")
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad, tokenizer.pad]) == "the end"
    assert tokenizer.decode([10**6, -1, *ids]) == "the end"  # models may have more rows than there are tokens
    assert tokenizer.decode(tokenizer.encode("\u6f22")[:2]) == "\ufffd"
    for i in range(tokenizer.vocab_size):
        assert isinstance(tokenizer.decode([i, i]), str)


def test_user_defined_tokens_are_text_of_one_piece():
    """As in HF and llama.cpp: Qwen3's <think> is one id wherever it stands, also in the middle of a word."""
    parts = tiny().parts()
    parts["tokens"] = [*parts["tokens"], "", "", "<think>", "<think>!"]
    parts["types"] = [*parts["types"], 3, 4, 4, 4]  # without a spelling, as in damaged files: never found
    tokenizer = tokenizer_from_parts(parts)
    think, longer = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    a, mark = tokenizer.encode("a!")
    assert tokenizer.encode("a<think>a<think>!!") == [a, think, a, longer, mark]
    assert tokenizer.decode(tokenizer.encode("a<think>b")) == "a<think>b"


def test_pad_is_no_token_that_ends_a_text():
    tokenizer = tiny()
    assert tokenizer.pad == tokenizer.tokens.index("<|endoftext|>") != tokenizer.eos
    assert tiny(pad=0).pad == 0
    alone = BPETokenizer([*LETTERS, "<|endoftext|>"], [1] * 256 + [3], [], "gpt-2", eos=256)
    assert (alone.bos, alone.eos, alone.pad) == (256, 256, 256) and not alone.add_bos


# --- forms ---


def test_save_and_load(tmp_path):
    tokenizer = tiny(chat_template="{{ messages }}", add_bos=True)
    path = tokenizer.save(tmp_path / "checkpoint")
    assert path == tokenizer.path == tmp_path / "checkpoint" / BPE_FILE
    for directory in (tmp_path / "checkpoint", tmp_path / "prepared"):
        if directory.name == "prepared":
            load_tokenizer(tmp_path / "checkpoint").save(directory / "tokenizer")
        back = load_tokenizer(directory)
        assert back.parts() == tokenizer.parts() and back.fingerprint == tokenizer.fingerprint
        assert back.path.read_bytes() == path.read_bytes()


def test_fingerprint_is_of_what_ids_mean():
    tokenizer = tiny()
    assert tiny().fingerprint == tokenizer.fingerprint == tiny(chat_template="{{ 1 }}").fingerprint
    others = [tiny("gpt-2"), tiny(add_bos=True), tiny(eos=0), tiny(specials_first=False), tiny(without=(4,))]
    assert len({tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 6


@pytest.mark.parametrize("pre", NAMED)
@pytest.mark.parametrize("add_bos", [False, True])
def test_hf_directories_there_and_back(tmp_path, pre, add_bos):
    tokenizer = tiny(pre, add_bos=add_bos, chat_template="{{ bos_token }}")
    files = write_hf(tokenizer, tmp_path)
    assert {file.name for file in files} == {"tokenizer.json", "tokenizer_config.json"}
    back = load_tokenizer(tmp_path)
    assert back.parts() == tokenizer.parts() and back.fingerprint == tokenizer.fingerprint and back.path is None


def edited(directory, change):
    """tokenizer.json after change(content)."""
    content = json.loads((directory / "tokenizer.json").read_text())
    change(content)
    (directory / "tokenizer.json").write_text(json.dumps(content))


def test_what_hf_files_leave_out_or_spell_otherwise(tmp_path):
    tokenizer = tiny(specials_first=False)
    write_hf(tokenizer, tmp_path)

    def older(content):  # merges as pairs, specials beside the vocabulary, a lone ByteLevel
        content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
        for token in content["added_tokens"]:
            del content["model"]["vocab"][token["content"]]

    edited(tmp_path, older)
    assert read_hf(tmp_path).parts() == tokenizer.parts()
    tokenizer = tiny()
    write_hf(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": config["eos_token"], "lstrip": False}
    config["chat_template"] = [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_hf(tmp_path).eos == tokenizer.eos and read_hf(tmp_path).chat_template == "y"
    (tmp_path / "chat_template.jinja").write_text("z")
    assert read_hf(tmp_path).chat_template == "z"
    (tmp_path / "tokenizer_config.json").unlink()  # the first GPT-2 says it in config.json alone
    with pytest.raises(ValueError, match="the tokenizer's eos is None"):
        read_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 0], "bos_token_id": 1}))
    assert (read_hf(tmp_path).eos, read_hf(tmp_path).bos) == (2, 1)
    edited(tmp_path, lambda content: content["model"]["vocab"].update({"z": 400}))
    holes = read_hf(tmp_path)
    assert holes.vocab_size == 401 and holes.types[399] == 5 and holes.decode([399]) == ""


REFUSED = {
    "type 'Unigram' is not supported": lambda c: c["model"].update(type="Unigram"),
    "end_of_word_suffix '</w>' is not supported": lambda c: c["model"].update(end_of_word_suffix="</w>"),
    "unk_token '<unk>' is not supported: some bytes": lambda c: (
        c["model"].update(unk_token="<unk>"),
        c["model"]["vocab"].pop("q"),
    ),
    "normalizer 'Precompiled' is not supported; known: NFC": lambda c: c.update(normalizer={"type": "Precompiled"}),
    "pre-tokenizer 'Whitespace' is not supported: ByteLevel was": lambda c: c.update(
        pre_tokenizer={"type": "Whitespace"}
    ),
    "pre-tokenizer 'Metaspace' is not supported before": lambda c: c["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Metaspace"}
    ),
    "ByteLevel with add_prefix_space is not": lambda c: c["pre_tokenizer"]["pretokenizers"][-1].update(
        add_prefix_space=True
    ),
    "pattern .* is not supported": lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(?<x"}),
    "behaviors are Isolated": lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Cut"),
    "merge 'q q' does not make a token": lambda c: c["model"]["merges"].append("q q"),
    "merge 'qq' does not make a token": lambda c: c["model"]["merges"].append("qq"),
    "token 'a b' is not spelled in the letters": lambda c: c["model"]["vocab"].update({"a b": 300}),
    "token ids must be whole numbers below 16777216": lambda c: c["model"]["vocab"].update({"ab": 2**40}),
    "is not a tokenizer.json as HF writes it: KeyError": lambda c: c.pop("model"),
    "type 'BPE' is not supported: byte-level BPE is": lambda c: c["model"].update(vocab=[]),
    "pre-tokenizer None is not supported": lambda c: c.update(pre_tokenizer=None),
    "is not a tokenizer.json as HF writes it: TypeError": lambda c: c.update(pre_tokenizer=[1]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_hf_files_that_would_give_other_ids(tmp_path, message):
    write_hf(tiny(), tmp_path)
    edited(tmp_path, REFUSED[message])
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "message, changes",
    [
        ("pre-tokenizer 'falcon' is not supported; known: gpt-2, smollm", {"pre": "falcon"}),
        ("the tokenizer's eos is 1000; an id below", {"eos": 1000}),
        ("the tokenizer's bos is -1", {"bos": -1}),
        ("the tokenizer has 2 tokens, but types of 1", {"tokens": ["a", "b"], "types": [1]}),
        ("the tokenizer's tokens are no list of str", {"tokens": [1, 2]}),
        ("the tokenizer's merges are no list of str: None", {"merges": None}),
        ("tokenizer model 'bert' is not supported; known: gpt2, llama", {"model": "bert"}),
        ("the tokenizer lacks its scores", {"model": "llama"}),
    ],
)
def test_lists_that_are_no_tokenizer(message, changes):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_parts({**tiny().parts(), **changes})


def test_damaged_files_of_ours(tmp_path):
    path = tiny().save(tmp_path)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-10], "is not JSON"),
        (b"[]", "a JSON object was expected"),
        (b"{}", "it lacks eos, merges, pre"),
        (whole.replace(b'"pre":', b'"prefix":'), "it lacks pre"),
        (whole.replace(b'"pre":', b'"more":1,"pre":'), "unexpected keyword"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            load_tokenizer(tmp_path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_of_ranks(tmp_path):
    """Bytes in GPT-2's order and two merged pieces, as tiktoken writes them."""
    tokenizer = tiny("gpt-2", specials_first=False)
    pieces = [token.translate(bpe.TO_BYTES).encode("latin-1") for token in tokenizer.tokens[:-3]]
    file = tmp_path / "ranks.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)))
    ranks = read_ranks(file, special=SPECIAL)
    assert [ranks.tokens[i] for i in (0, 200, -1)] == [tokenizer.tokens[i] for i in (0, 200, -1)]
    for text in fuzz_strings(300):
        assert ranks.encode(text) == tokenizer.encode(text)
    for content in (b"YQ== 0\nYg== 7\n", b"YQ== 0 1\n", b"????\n", b"YQ== x\n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="ranks"):
            read_ranks(file)


# --- sentencepiece models in GGUF files ---


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory):
    words = "the film was a warm and funny story of two people who never meet again".split()
    texts = [" ".join(random.Random(i).choices(words, k=12)) for i in range(200)]
    return train_sentencepiece(texts, tmp_path_factory.mktemp("sp") / "tokenizer.model", 330, control=SPECIAL[1:])


def test_sentencepiece_from_plain_lists(sentencepiece_tokenizer, tmp_path):
    parts = sentencepiece_tokenizer.parts()
    back = tokenizer_from_parts(parts)
    assert isinstance(back, SentencePieceTokenizer) and back.path is None and back.parts() == parts
    assert back.control == sentencepiece_tokenizer.control and set(SPECIAL[1:]) <= set(back.control)
    for text in [*fuzz_strings(500), "the film was <s> funny</s>", "<|im_end|>"]:
        assert back.encode(text) == sentencepiece_tokenizer.encode(text)
        assert not set(back.encode(text)) & set(back.control.values())
    back.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == back.fingerprint
    with pytest.raises(ValueError, match="330 tokens, 1 scores and 330 types"):
        tokenizer_from_parts({**parts, "scores": [0.0]})
    with pytest.raises(ValueError, match="the tokenizer's eos is 330; an id below 330"):
        tokenizer_from_parts({**parts, "eos": 330})


def test_sentencepiece_in_hf_directories(sentencepiece_tokenizer, tmp_path):
    files = write_hf(sentencepiece_tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == sentencepiece_tokenizer.fingerprint
    assert {file.name for file in files} == {file.name for file in tmp_path.iterdir()}
    nfkc = io.BytesIO()
    options = dict(vocab_size=300, byte_fallback=True, pad_id=3, minloglevel=2, model_type="bpe")
    texts = iter(["a film", "the film"] * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=nfkc, hard_vocab_limit=False, **options
    )
    with pytest.raises(ValueError, match="rewrites texts before it splits them"):
        write_hf(SentencePieceTokenizer(None, nfkc.getvalue()), tmp_path)
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[compare]'")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in [*fuzz_strings(2000), "the the film film", "aaaa hahaha"]:
        assert sentencepiece_tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    assert theirs.encode("the film").ids == [sentencepiece_tokenizer.bos, *sentencepiece_tokenizer.encode("the film")]


# --- streams ---


@given(text=st.text(max_size=30), data=st.data())
def test_streams_never_show_half_a_character(sentencepiece_tokenizer, text, data):
    for tokenizer in (tiny("gpt-2"), sentencepiece_tokenizer):
        text = text.encode("utf-8", "replace").decode().replace("\u2581", "_")
        stream, shown = Detokenizer(tokenizer), ""
        for i in tokenizer.encode(text):
            shown += stream.push(i)
            assert "\ufffd" in text or "\ufffd" not in shown
        shown += stream.flush()
        assert shown.removeprefix(" " if tokenizer is sentencepiece_tokenizer else "") == text


def test_streams_of_any_ids_are_the_whole_text():
    tokenizer, rng = tiny(), random.Random(0)
    for _ in range(300):
        ids = rng.choices(range(tokenizer.vocab_size + 3), k=12)
        stream = Detokenizer(tokenizer)
        assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


# --- against HF's tokenizers, and real vocabularies ---


def hf_tokenizer(tokenizer: BPETokenizer, directory):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[compare]'")
    write_hf(tokenizer, directory)
    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    theirs.encode_special_tokens = True  # "<|im_end|>" in a text is ordinary for us
    return theirs


@pytest.mark.parametrize("pre", NAMED)
def test_ids_are_those_of_hf_tokenizers(tmp_path, pre):
    for without in ((), (0x04, 0x1D, 0xC3, 0xF1, ord("!"))):
        tokenizer = tiny(pre, without)
        theirs = hf_tokenizer(tokenizer, tmp_path)
        for text in fuzz_strings(500):
            assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


def downloaded(fetch, *args):
    try:
        return fetch(*args)
    except OSError as error:
        pytest.skip(f"cannot be downloaded: {error}")


@pytest.fixture(scope="module")
def smollm2():
    return tokenizer_from_parts(tokenizer_parts(read_gguf(downloaded(fetch_model, "smollm2-135m-instruct")).metadata))


@pytest.fixture(scope="module")
def gpt2():
    return read_ranks(downloaded(fetch_packed, GPT2_RANKS))


@pytest.mark.slow
def test_smollm2_golden_ids(smollm2, golden_dir):
    golden = json.loads((golden_dir / "smollm2_tokenizer.json").read_text())
    assert {token: smollm2.control[token] for token in golden["special_tokens"]} == golden["special_tokens"]
    assert (smollm2.bos, smollm2.eos, smollm2.add_bos) == (golden["bos"], golden["eos"], golden["adds_bos"])
    assert smollm2.chat_template == golden["chat_template"] and smollm2.pad not in (smollm2.bos, smollm2.eos)
    for case in golden["items"]:
        written = "{{ " + json.dumps(case["text"], ensure_ascii=False) + " }}"  # by a template, so control tokens count
        assert Chat(smollm2, written).render([]) == case["ids"], case["text"]
        shown = case["decoded"]
        for token in golden["special_tokens"]:
            shown = shown.replace(token, "")
        assert smollm2.decode(case["ids"]) == shown
    example = golden["control_bytes_example"]
    assert smollm2.encode(example["text"]) == example["ids"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gpt2"])
def test_real_vocabularies_against_hf_tokenizers(tmp_path, request, name):
    tokenizer = request.getfixturevalue(name)
    theirs = hf_tokenizer(tokenizer, tmp_path)
    differences = [
        text
        for text in fuzz_strings(4000)
        if tokenizer.encode(text) != theirs.encode(text, add_special_tokens=False).ids
    ]
    assert differences == []


@pytest.mark.slow
def test_gpt2_ranks(gpt2):
    assert (gpt2.vocab_size, gpt2.eos) == (50257, 50256) and gpt2.encode("Hello world!") == [15496, 995, 0]
    assert len(gpt2.merges) == 50000 and gpt2.merges[:3] == ["\u0120 t", "\u0120 a", "h e"]
    for text in fuzz_strings(300):
        assert gpt2.encode(text) == gpt2._core.encode_ordinary(text)  # there, ranks are ids
