"""Sentencepiece spelled in tokenizer.json, with files beside it, through GGUF: ids of HF's library, and the same again."""

import io
import json

import pytest
import sentencepiece
from hf_tokenizers import ADDED, differences, library, strings, theirs, training_texts, with_added, write
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bpe import fuzz_strings

from data.beside import bos_first
from data.spm import DOUBLED, MODEL_FILE, SPACE, SentencePieceTokenizer, field, fields, split_blob
from data.tokenizer import gguf_parts, load_tokenizer, tokenizer_from_parts, write_hf

SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}
NFC = {"type": "NFC"}
PREFIXES = ("prepend", "never", "always", "first")


def trained(**options) -> bytes:
    """A sentencepiece BPE of many scripts."""
    texts = (text.replace("\0", "").replace(SPACE, "_").replace("\n", " ") for text in training_texts())
    texts = [text for text in texts if text.strip()] + ["the cat sat on the mat with a word and thinker world"] * 300
    blob = io.BytesIO()
    settings = dict(vocab_size=1400, character_coverage=0.98, byte_fallback=True, model_type="bpe", minloglevel=2)
    settings |= dict(normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False)
    settings |= dict(unk_id=0, bos_id=1, eos_id=2, pad_id=-1) | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=blob, **settings)
    return blob.getvalue()


@pytest.fixture(scope="module")
def blob():
    return trained()


def as_json(blob: bytes, directory, prefix: str, normalizers=()) -> dict:
    """The tokenizer.json that HF's library has for the model, with spaces put where `prefix` says."""
    write_hf(SentencePieceTokenizer(None, blob), directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    own = {"prepend": [PREPEND, SPACES], "never": [SPACES]}.get(prefix, [])
    content["normalizer"] = json.loads(json.dumps({"type": "Sequence", "normalizers": [*normalizers, *own]}))
    meta = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": prefix, "split": False}
    content["pre_tokenizer"] = None if own else meta
    return content


def check_trips(ours, place, texts) -> None:
    """The same ids in files of HF's, in our own file, and through a GGUF's lists."""
    write_hf(ours, place / "hf")
    again, saved = load_tokenizer(place / "hf"), load_tokenizer(ours.save(place / "own").parent)
    assert differences(again, theirs(place / "hf"), texts) == []
    (place / "hf" / MODEL_FILE).unlink(missing_ok=True)
    for other in (again, saved, load_tokenizer(place / "hf")):
        assert [other.encode(text) for text in texts] == [ours.encode(text) for text in texts]
        known = (other.bos, other.eos, other.pad, other.control, other.special, other.add_bos, other.chat_template)
        assert known == (ours.bos, ours.eos, ours.pad, ours.control, ours.special, ours.add_bos, ours.chat_template)
    assert saved.fingerprint == ours.fingerprint and saved.parts() == ours.parts()
    if any(set(token.flags) - {"normalized"} for token in ours.added.values()) or "merges" in ours.beside:
        with pytest.raises(ValueError, match="GGUF (cannot say that added token|has no place for the merges)"):
            gguf_parts(ours)
        return
    back = tokenizer_from_parts(gguf_parts(ours))
    assert [back.encode(text) for text in texts] == [
        ours.encode(text) for text in texts
    ] and back.parts() == ours.parts()
    assert (back.control, back.special, back.eos) == (ours.control, ours.special, ours.eos)


@pytest.mark.parametrize("added", [False, True], ids=["", "added tokens"])
@pytest.mark.parametrize("with_model", [False, True], ids=["", "tokenizer.model"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_spelled_in_tokenizer_json(tmp_path, blob, prefix, with_model, added):
    """Gemma's, Llama 2's and Mistral's, as transformers 4 and 5 save them."""
    library()
    content = as_json(blob, tmp_path / "x", prefix, (NFC,) * (not with_model))
    write(
        tmp_path / "a", with_added(content) if added else content, bos_token="<s>", unk_token="<unk>",
        eos_token="<|end|>" if added else "</s>", chat_template="{{ 1 }}",
    )  # fmt: skip
    if with_model:
        (tmp_path / "a" / MODEL_FILE).write_bytes(blob)
    ours, texts = load_tokenizer(tmp_path / "a"), list(strings(500, ADDED))
    assert differences(ours, theirs(tmp_path / "a"), texts) == []
    assert ours.eos == ours.control["<|end|>" if added else "</s>"] and ours.chat_template == "{{ 1 }}"
    assert ours.special == {"bos_token": "<s>", "eos_token": "<|end|>" if added else "</s>", "unk_token": "<unk>"}
    check_trips(ours, tmp_path, texts[:150])


@pytest.mark.slow
@pytest.mark.parametrize("prefix", PREFIXES)
def test_many_strings(tmp_path, blob, prefix):
    content = as_json(blob, tmp_path / "x", prefix)
    for name, each in (("plain", content), ("added", with_added(json.loads(json.dumps(content))))):
        write(tmp_path / name, each, bos_token="<s>", eos_token="</s>")
        ours = load_tokenizer(tmp_path / name)
        assert differences(ours, theirs(tmp_path / name), [*strings(3000, ADDED), *fuzz_strings(1000)]) == []


@pytest.mark.parametrize("split", [True, False], ids=["words", "no words"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_trained_by_hf(tmp_path, prefix, split):
    """One merge a piece, U+0000 among them; without words, pieces span spaces and come about in their own order."""
    tokenizers = library()
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    own = {"prepend": [PREPEND, SPACES], "never": [SPACES]}.get(prefix, [])
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": prefix, "split": split}
    content = json.loads(plain.to_str()) | {"normalizer": {"type": "Sequence", "normalizers": own} if own else None}
    plain = tokenizers.Tokenizer.from_str(json.dumps(content | {"pre_tokenizer": None if own else metaspace}))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, limit_alphabet=150, show_progress=False
    )
    plain.train_from_iterator(training_texts(), trainer)
    content = json.loads(plain.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if "0x" not in token["content"]]
    content["post_processor"] = bos_first("<s>", 1)
    assert "\0" in content["model"]["vocab"]
    write(tmp_path / "a", content, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    ours, texts = load_tokenizer(tmp_path / "a"), [*strings(700), "a\0b", "\ufdd0\0\ufdd0"]
    assert differences(ours, theirs(tmp_path / "a"), texts) == []
    assert ours.decode(ours.encode("x\0y")) == "x\0y" and ours.add_bos
    check_trips(ours, tmp_path, texts[-100:])


def test_merges_that_scores_do_not_follow(tmp_path, blob):
    content = as_json(blob, tmp_path / "x", "never")
    kept = {token: i for token, i in content["model"]["vocab"].items() if i < 259}
    for token in ("a", "b", "c", SPACE, "ab", "bc", "abc"):
        kept[token] = len(kept)
    content["model"] |= {"vocab": kept, "merges": [["a", "b"], ["b", "c"], ["a", "bc"]]}
    write(tmp_path / "a", content, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    ours = load_tokenizer(tmp_path / "a")
    assert ours.encode("abcbc") == [kept["ab"], kept["c"], kept["bc"]] and "merges" in ours.beside
    texts = [*strings(200), "abcabc a bcab", "\u00e9abc"]
    assert differences(ours, theirs(tmp_path / "a"), texts) == []
    check_trips(ours, tmp_path, texts)


def test_the_form_of_transformers_5_for_a_model_file(tmp_path, blob):
    """A space before every text, even where there is one: a Replace before its Metaspace, which would not."""
    content = as_json(blob, tmp_path / "x", "always")
    content["normalizer"]["normalizers"] = json.loads(json.dumps([SPACES, DOUBLED]))
    added = with_added(json.loads(json.dumps(content)))
    write(tmp_path / "late", added, bos_token="<s>", eos_token="</s>")
    with pytest.raises(ValueError, match="added token '<tool>' behind a Replace of the first space is not supported"):
        load_tokenizer(tmp_path / "late")
    for token in added["added_tokens"]:
        token["normalized"] = False
    for name, each in (("plain", content), ("added", added)):
        write(tmp_path / name, each, bos_token="<s>", eos_token="</s>")
        ours = load_tokenizer(tmp_path / name)
        assert ours.prefix == "prepend" and ours.encode(" x") == SentencePieceTokenizer(None, blob).encode(" x")
        assert differences(ours, theirs(tmp_path / name), strings(500, ADDED)) == []
    content["normalizer"]["normalizers"] = json.loads(json.dumps([SPACES]))
    write(tmp_path / "early", with_added(content), bos_token="<s>", eos_token="</s>")
    assert differences(load_tokenizer(tmp_path / "early"), theirs(tmp_path / "early"), strings(500, ADDED)) == []


@pytest.mark.slow
def test_saved_by_transformers_5(tmp_path, blob):
    """Its own classes of Llama 2 and Gemma, with tokens added, saved and read; eos and names as it knows them."""
    transformers = pytest.importorskip("transformers", reason="needs the extra compare")
    write_hf(SentencePieceTokenizer(None, blob), tmp_path / "x")
    model = json.loads((tmp_path / "x" / "tokenizer.json").read_text())["model"]
    merges = [tuple(merge.split(" ")) for merge in model["merges"]]
    for name, kind, config in (
        ("new", "LlamaTokenizer", {}),
        ("legacy", "LlamaTokenizer", {"legacy": True}),
        ("bare", "LlamaTokenizer", {"add_prefix_space": False}),
        ("gemma", "GemmaTokenizer", {}),
    ):
        made = getattr(transformers, kind)(vocab=model["vocab"], merges=merges, **config)
        made.add_tokens(["<tool>", transformers.AddedToken("<x>", special=True)])
        made.add_special_tokens({"extra_special_tokens": ["<|u|>"], "eos_token": "<x>"})
        made.save_pretrained(tmp_path / name)
        ours = load_tokenizer(tmp_path / name)
        made._tokenizer.encode_special_tokens = True
        assert differences(ours, made._tokenizer, strings(1000, ADDED)) == [], name
        assert (ours.eos, ours.bos, ours.special) == (made.eos_token_id, made.bos_token_id, made.special_tokens_map)
        check_trips(ours, tmp_path / f"{name} trips", list(strings(100, ADDED)))


def test_pieces_that_the_model_itself_cuts_out(tmp_path):
    """User-defined symbols keep their type in every form, and a text its ids."""
    library()
    blob = trained(user_defined_symbols=["<tool>", "<think>", "cat"], pad_id=3)
    ours, texts = (
        SentencePieceTokenizer(None, blob),
        ["say <tool>cat", "<think>", "cats", " <tool> ", *strings(200, ADDED)],
    )
    assert ours.parts()["types"][4:7] == [4, 4, 4] and ours.encode("a<tool>")[-1] == 4
    back = tokenizer_from_parts(ours.parts())
    assert [back.encode(text) for text in texts] == [
        ours.encode(text) for text in texts
    ] and back.parts() == ours.parts()
    check_trips(ours, tmp_path, texts)


def test_a_model_file_alone_with_names_beside(tmp_path, blob):
    """Older directories: tokenizer.model, added_tokens.json and a config; the template and the ends of text are read."""
    plain, size = SentencePieceTokenizer(None, blob), SentencePieceTokenizer(None, blob).vocab_size
    (tmp_path / MODEL_FILE).write_bytes(blob)
    assert load_tokenizer(tmp_path).fingerprint == plain.fingerprint
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": size, "<|end|>": size + 1}))
    config = {"eos_token": "<|end|>", "chat_template": "{{ eos_token }}", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    assert (ours.eos, ours.bos, ours.add_bos, ours.chat_template) == (size + 1, 1, False, "{{ eos_token }}")
    assert ours.encode("the<|user|>cat") == [*plain.encode("the"), size, *plain.encode("cat")]
    assert ours.encode("<|end|>") == plain.encode("<|end|>") and "<|end|>" in ours.control and ours.pad == 0
    assert ours.fingerprint != plain.fingerprint == load_tokenizer_without_names(tmp_path, plain).fingerprint
    assert ours.decode(ours.encode("the <|user|> cat")) == "the <|user|>  cat"  # each stretch begins with a space
    ours.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.parts() == ours.parts() and again.fingerprint == ours.fingerprint
    sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "saved" / MODEL_FILE))  # for others still a model


def load_tokenizer_without_names(place, plain):
    """A template alone changes no id."""
    return load_tokenizer(
        SentencePieceTokenizer(None, plain._model, chat_template="{{ 1 }}").save(place / "template").parent
    )


def test_a_text_that_goes_on(blob):
    """Behind other text no space is put before a word; behind a control token there is one, where the model has it so."""
    ours = SentencePieceTokenizer(None, blob)
    bare = ours.encode("cat", after="text")
    assert ours.encode("cat", after="token") == ours.encode("cat") != bare
    assert ours.encode(" cat", after="text") == ours.encode("cat") and b"".join(map(ours.token_bytes, bare)) == b"cat"
    first = SentencePieceTokenizer(None, blob, beside={"prefix": "first"})
    assert first.encode("cat") == ours.encode("cat") and first.encode("cat", after="token") == bare


REFUSED = {
    "type 'Unigram' is not supported|is not a tokenizer.json": lambda c: c["model"].update(type="Unigram"),
    "dropout 0.1 is not supported for a vocabulary with bytes": lambda c: c["model"].update(dropout=0.1),
    "ignore_merges True is not supported": lambda c: c["model"].update(ignore_merges=True),
    "normalizer 'Precompiled' is not supported": lambda c: c.update(normalizer={"type": "Precompiled"}),
    "spaces come last": lambda c: c["normalizer"]["normalizers"].append(NFC),
    "whose spaces do not become": lambda c: c.update(normalizer=None),
    "is what is put before a text": lambda c: c["normalizer"]["normalizers"][0].update(prepend="x"),
    "pre-tokenizer 'Whitespace' is not supported beside": lambda c: c.update(pre_tokenizer={"type": "Whitespace"}),
    "byte_fallback without a token for byte 65": lambda c: c["model"]["vocab"].update(
        {"<0xx>": c["model"]["vocab"].pop("<0x41>")}
    ),
    "the ids of its .* tokens are not 0 to": lambda c: c["model"]["vocab"].update({"new": 10**6}),
    "merge .* does not make a token of two others": lambda c: c["model"]["merges"].append(["q", "zz"]),
    "is not a tokenizer.json as HF writes it": lambda c: c["model"].update(merges=7),
}


@pytest.mark.parametrize("message", REFUSED)
def test_files_that_would_give_other_ids(tmp_path, blob, message):
    content = as_json(blob, tmp_path / "x", "prepend")
    REFUSED[message](content)
    write(tmp_path / "a", content, eos_token="</s>")
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path / "a")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_model_and_a_tokenizer_json_of_two_vocabularies(tmp_path, blob):
    write(tmp_path, as_json(blob, tmp_path / "x", "prepend"), eos_token="</s>")
    (tmp_path / MODEL_FILE).write_bytes(trained(pad_id=3))
    with pytest.raises(ValueError, match="token 3 is .* in tokenizer.model beside it"):
        load_tokenizer(tmp_path)


@settings(max_examples=100)
@given(data=st.data())
def test_damaged_fields_are_one_line(blob, data):
    """Whatever lies in our own field of a model file: a tokenizer, or a ValueError."""
    keys = st.sampled_from(
        ["added", "prefix", "normalizer", "bos", "eos", "pad", "special", "chat_template", "merges", "x"]
    )
    values = st.recursive(
        st.none() | st.integers(-5, 10**6) | st.text(max_size=5) | st.booleans(),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
        max_leaves=5,
    )
    beside = data.draw(st.dictionaries(keys, values, max_size=3))
    raw = json.dumps(beside).encode()
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    try:
        SentencePieceTokenizer(None, blob + field(200, raw)).encode("the cat")
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 400


def test_fields_of_a_message(blob):
    model, beside = split_blob(blob + field(200, b'{"eos": 5}'), "x")
    assert model == blob and beside == {"eos": 5} and {number for number, *_ in fields(blob)} == {1, 2, 3}
    for damaged in (
        blob + field(200, b"["),
        blob + field(200, b"[]"),
        blob + field(200, b"{}") * 2,
        blob[:-7] + field(200, b"{"),
    ):
        with pytest.raises(ValueError, match="x .*is not a sentencepiece model|x is damaged: . fields of ours"):
            split_blob(damaged, "x")
