"""Words and merges of byte-level BPEs: ids of HF's library for every published kind, a slow textbook for the steps."""

import json
import random
import unicodedata

import pytest
import tiktoken
from hf_tokenizers import ADDED, KINDS, byte_level, differences, strings, theirs, write

from data.beside import Added, Cut
from data.bpe import made_as_listed, merge, rank_pieces
from data.tokenizer import gguf_parts, load_tokenizer, tokenizer_from_parts, write_hf
from data.words import NAMED, Split, Words, normalized, pieces, words_of, words_of_hf

QUICK = ("qwen3.5", "deepseek")


@pytest.mark.parametrize("added", [False, True], ids=["", "added tokens"])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k not in QUICK)) for k in KINDS])
def test_ids_of_every_kind_are_those_of_hf(tmp_path, kind, added):
    write(tmp_path / "a", byte_level(kind, added), eos_token="<|eos|>")
    ours = load_tokenizer(tmp_path / "a")
    texts = list(strings(800 if kind in QUICK else 3000, ADDED if added else ()))
    if kind in ("punctuation", "stripped"):  # by what a character is, which Python's and HF's Unicode must agree upon
        old = unicodedata.ucd_3_2_0.category
        texts = [text for text in texts if all(old(c) == unicodedata.category(c) != "Cn" for c in text)]
        assert len(texts) > 200
    assert differences(ours, theirs(tmp_path / "a"), texts) == []
    write_hf(ours, tmp_path / "b")  # there and back, and what HF makes of it
    back = load_tokenizer(tmp_path / "b")
    assert differences(back, theirs(tmp_path / "b"), texts[:300]) == [] and back.fingerprint == ours.fingerprint
    saved = load_tokenizer(ours.save(tmp_path / "c").parent)
    assert [saved.encode(text) for text in texts[:300]] == [ours.encode(text) for text in texts[:300]]
    assert saved.parts() == ours.parts() and saved.added == ours.added and saved.special == ours.special
    if isinstance(ours.pre, str) and not added:
        again = tokenizer_from_parts(gguf_parts(ours))
        assert again.parts() == ours.parts() and again.fingerprint == ours.fingerprint
    else:
        with pytest.raises(
            ValueError, match="GGUF (has no name for the tokenizer's words|cannot say that added token)"
        ):
            gguf_parts(ours)


def test_names_of_words():
    assert words_of("llama3") == NAMED["llama-bpe"] and words_of(NAMED["smollm"].spec()) == NAMED["smollm"]
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    sequence = {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": [digits]}, byte_level]}
    assert words_of_hf(sequence, None, False) == NAMED["smollm"]
    for spec in (
        {},
        {"splits": [["a"]]},
        {"splits": [["a", "Isolated", 1, 2]], "normalizer": [], "ignore_merges": 0},
        [1],
    ):
        with pytest.raises(ValueError, match="is no description of one|is not supported"):
            words_of(spec)


def slow_pieces(text: str, letter: str, behavior: str, invert: bool) -> list[str]:
    """The five behaviors, one character at a time, for a pattern of one letter."""
    cut = [(character, (character == letter) != invert) for character in text]
    runs = []  # what is no match goes together; each match is one piece, whichever of both `invert` calls so
    for character, is_match in cut:
        plain = character != letter
        if runs and plain and runs[-1][2]:
            runs[-1][0] += character
        else:
            runs.append([character, is_match, plain])
    if behavior == "Removed":
        return [piece for piece, is_match, _ in runs if not is_match]
    out, previous = [], None
    ordered = runs[::-1] if behavior == "MergedWithNext" else runs
    for piece, is_match, _ in ordered:
        if out and behavior == "Contiguous" and is_match == previous:
            out[-1] += piece
        elif out and behavior.startswith("Merged") and is_match and not previous:
            out[-1] = piece + out[-1] if behavior == "MergedWithNext" else out[-1] + piece
        else:
            out.append(piece)
        previous = is_match
    return out[::-1] if behavior == "MergedWithNext" else out


@pytest.mark.parametrize("behavior", ["Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"])
@pytest.mark.parametrize("invert", [False, True])
def test_behaviors_of_a_split(behavior, invert):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("abx", k=rng.randrange(9)))
        if (
            behavior == "Contiguous"
            and text[:1] == "x"
            and not invert
            or behavior == "Contiguous"
            and text[:1] != "x"
            and invert
        ):
            continue  # HF's own first step: a match at the very start begins alone either way
        assert pieces(text, Split("x", behavior, invert)) == slow_pieces(text, "x", behavior, invert), text


def test_normalizers():
    steps = [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": False}]
    assert normalized(" \ufb01 \u0130\u03a3 ", steps) == "fi i\u0307\u03c3 "
    replace = {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "\\1"}
    assert normalized("baab", [replace]) == "b\\1b" and normalized("", [{"type": "Prepend", "prepend": "x"}]) == ""
    assert Words((), (replace,)).of("ab") == ["ab"] and Words(()).of("") == []


# --- merges ---


def slow_merge(symbols, pairs):
    symbols = list(symbols)
    while found := [(pairs[pair][0], i) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in pairs]:
        i = min(found)[1]
        symbols[i : i + 2] = [pairs[tuple(symbols[i : i + 2])][1]]
    return symbols


def test_merges_by_the_list_and_by_rank():
    """`merge` is the textbook's; where `made_as_listed` says so, tiktoken's merging by rank is the same on every word."""
    rng, seen = random.Random(0), [0, 0]
    for _ in range(400):
        letters, known, merges = "abcd"[: rng.randrange(2, 5)], list("abcd"), []
        for _ in range(rng.randrange(1, 9)):
            left, right = rng.choice(known), rng.choice(known)
            if (left, right) not in merges and len(left + right) < 7:
                merges.append((left, right))
                known = [*known, left + right] if left + right not in known else known
        normal = {bytes([byte]): byte for byte in range(256)}
        normal |= {piece.encode(): 256 + i for i, piece in enumerate(known[4:])}
        ranks, _, _, pairs = rank_pieces(normal, [f"{left} {right}" for left, right in merges], False)
        core = tiktoken.Encoding("", pat_str="(?!)", mergeable_ranks=ranks, special_tokens={})
        same, as_listed = True, made_as_listed(len(ranks), 256, pairs)
        for _ in range(40):
            word = "".join(rng.choices(letters, k=rng.randrange(1, 14))).encode()
            expected = slow_merge([ranks[bytes([byte])] for byte in word], pairs)
            assert merge([ranks[bytes([byte])] for byte in word], pairs) == expected, (merges, word)
            same &= core._encode_single_piece(word) == expected
        assert same or not as_listed, merges
        seen[as_listed] += 1
    assert min(seen) > 20


def test_a_list_that_makes_pieces_in_another_way(tmp_path):
    """ "abc" is listed as a + bc, but b goes to a first: HF never makes it, tiktoken would."""
    content = byte_level("gpt-2", False)
    content["model"]["vocab"] = {
        token: i for i, token in enumerate(sorted(t for t in content["model"]["vocab"] if len(t) == 1))
    }
    for token in ("ab", "bc", "abc", "<|eos|>"):
        content["model"]["vocab"][token] = len(content["model"]["vocab"])
    content["model"]["merges"] = [["a", "b"], ["b", "c"], ["a", "bc"]]
    content["added_tokens"][0]["id"] = content["model"]["vocab"]["<|eos|>"]
    write(tmp_path, content, eos_token="<|eos|>")
    ours, vocabulary = load_tokenizer(tmp_path), content["model"]["vocab"]
    assert ours.encode("abcbc") == [vocabulary["ab"], vocabulary["c"], vocabulary["bc"]]
    assert differences(ours, theirs(tmp_path), ["abc", "abcabc", "aabbcc", " abc bcabc"]) == []
    content["model"]["ignore_merges"] = True
    write(tmp_path, content, eos_token="<|eos|>")
    assert differences(load_tokenizer(tmp_path), theirs(tmp_path), ["abc", "abcabc", "aabbcc", " abc bcabc"]) == []


# --- added tokens ---


def test_added_tokens_in_a_text():
    added = {"<a>": Added(1, False), "<ab>": Added(2, False), "<|x|>": Added(3, True), "x": Added(4, False)}
    cut = Cut(added | {"w": Added(5, False, single_word=True), "r": Added(6, False, lstrip=True, rstrip=True)})
    assert list(cut.of("1<ab><a>x2")) == [("1", None), ("<ab>", 2), ("<a>", 1), ("x", 4), ("2", None)]
    assert list(cut.of("<|x|>")) == [("<|x|>", None)]  # a control token of a user, and no x in it
    assert [i for _, i in cut.of("w ww w.1w")] == [5, None, 5, None]
    assert list(cut.of("a  r\n\u3000r \x1cb")) == [("a", None), ("  r\n\u3000", 6), ("r ", 6), ("\x1cb", None)]


def edited(directory, name: str, **values) -> None:
    file = directory / name
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | values))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt-2", "llama-3"])
def test_files_beside_a_vocabulary(tmp_path, kind):
    """added_tokens.json, special_tokens_map.json and added_tokens_decoder, as transformers 5 reads them."""
    transformers = pytest.importorskip("transformers", reason="needs the extra compare")
    content = byte_level(kind, False)
    size = len(content["model"]["vocab"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    cases = {
        "listed": ({}, {"added_tokens.json": {"<tool>": size, "<x>": size + 1}}),
        "mapped": ({}, {"special_tokens_map.json": {"eos_token": {"content": "<|eos|>"}, "pad_token": "<pad>"}}),
        "new eos": ({"eos_token": "<end>"}, {"added_tokens.json": {"<tool>": size}}),
        "extra": ({"extra_special_tokens": ["<u>", "<v>"]}, {}),
        "decoder": (
            {"added_tokens_decoder": {str(size): {"content": "<r>", "special": False} | flags | {"rstrip": True}}},
            {"added_tokens.json": {"ignored": 7}},
        ),
        "a word of the vocabulary": ({}, {"added_tokens.json": {"in": content["model"]["vocab"]["in"]}}),
    }
    texts = [*strings(200), "a<tool> b<x>in", "in <r>  in", "<u><end>|<|eos|> <v>", "inin"]
    for name, (config, files) in cases.items():
        place = tmp_path / name
        write(place, content, **{"tokenizer_class": "PreTrainedTokenizerFast"} | config)
        (place / "config.json").write_text(json.dumps({"eos_token_id": content["model"]["vocab"]["<|eos|>"]}))
        for file, values in files.items():
            edited(place, file, **values)
        ours, tokenizer = load_tokenizer(place), transformers.AutoTokenizer.from_pretrained(place)
        tokenizer._tokenizer.encode_special_tokens = True
        assert differences(ours, tokenizer._tokenizer, texts) == [], name
        if tokenizer.eos_token_id is not None:
            assert ours.eos == tokenizer.eos_token_id and ours.special["eos_token"] == tokenizer.eos_token
        control = {t: i for t, i in tokenizer.get_added_vocab().items() if tokenizer.added_tokens_decoder[i].special}
        assert {t: i for t, i in control.items() if ours.control.get(t) != i} in ({}, {"<pad>": size}), name
    edited(tmp_path / "listed", "added_tokens.json", **{"<late>": size + 9})
    with pytest.raises(
        ValueError, match=f"added token '<late>' has id {size + 9} in its file, but {size + 2} in HF's code"
    ):
        load_tokenizer(tmp_path / "listed")
    for bad in ({"added_tokens_decoder": [1]}, {"added_tokens_decoder": {"x": {}}}, {"extra_special_tokens": 5}):
        write(tmp_path / "bad", content, **bad)
        with pytest.raises(ValueError, match="not as HF writes them|is not a tokenizer.json|invalid literal"):
            load_tokenizer(tmp_path / "bad")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        write(tmp_path / "deep", content, eos_token="<|eos|>")
        (tmp_path / "deep" / name).write_text('{"a": ' + "[" * 100_000)
        with pytest.raises(ValueError, match=f"{name} is not JSON") as error:
            load_tokenizer(tmp_path / "deep")
        assert "\n" not in str(error.value)
        (tmp_path / "deep" / name).unlink()
