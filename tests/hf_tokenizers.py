"""Small tokenizers of every published kind, trained with HF's own library, and awkward strings to compare ids on."""

import json
import random

import pytest
from test_bpe import ATOMS

from data.words import CL100K, ENDINGS, GPT2, O200K, QWEN35

MORE = """aaaaaaa ab12 \u00dcn\u00ef \ufb00 \u2460 \u304c \u304b\u3099 \ud55c\uad6d\uc5b4 \u4e2d\u6587\u5b57 !"#$%
\u2019s \u0130 \u1e9e \u03a3\u03b1\u03c2 \uff11\uff12\uff13 \u0301 \u200d \ufe0f \u0939\u093f\u0928\u094d \u0e44\u0e17\u0e22
\U0001f3f3\ufe0f\u200d\U0001f308
word words theword wordx <s> </s> <0x41>""".split()
MORE += [" " * 40, "\n" * 9, "\t\t", "x=1;\r\n", "\u2581", " the cat sat on the mat", "e\u0301"]
ADDED = {  # content -> flags; the last three are control tokens
    "<think>": "", "<tool>": "normalized", "word": "single_word", "<l>": "lstrip", "<r>": "rstrip", "thinker": "",
    "<lr>": "lstrip rstrip normalized", "<|im": "", "the": "single_word lstrip normalized",
    "<|user|>": "special rstrip", "<|end|>": "special", "[X]": "special lstrip normalized",
}  # fmt: skip


def strings(n: int, more=(), seed: int = 5):
    """Pieces of many scripts thrown together, and characters that were assigned long ago."""
    rng, atoms = random.Random(seed), [*ATOMS, *MORE, *list(more) * 3]
    for k in range(n):
        if k % 6:
            yield "".join(rng.choices(atoms, k=rng.randrange(1, 10)))
        else:
            codes = (rng.randrange(rng.choice([128, 0x800, 0x3000, 0xD800])) for _ in range(rng.randrange(14)))
            yield "".join(map(chr, codes))


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def steps(kind: str, *inner: dict) -> dict:
    return {"type": "Sequence", f"{kind}s": list(inner)}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT = BYTES | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
NFC = {"type": "NFC"}
DEEPSEEK = [
    split("[\r\n]"),
    split("\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba]+"),
    split("\\s?[!-/:-~\uff01-\uff0f]+"),
]
DEEPSEEK += [split("\\s+$"), split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"), DIGITS, BYTES]
DEEPSEEK3 = [split("\\p{N}{1,3}"), split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+")]
DEEPSEEK3 += [
    split(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
    BYTES,
]
KINDS = {  # name -> normalizer, steps of the pre-tokenizer, ignore_merges
    "gpt-2": (None, [GPT]),
    "gpt-neox": (NFC, [GPT]),
    "smollm": (None, [DIGITS, GPT]),
    "starcoder": (None, [{"type": "Digits", "individual_digits": False}, GPT]),
    "command-r": (NFC, [DIGITS, GPT]),
    "qwen2": (NFC, [split(CL100K % ""), BYTES]),
    "qwen3.5": (NFC, [split(QWEN35), BYTES]),
    "llama-3": (None, [split(CL100K % "{1,3}"), BYTES], True),
    "olmo-2": (None, [split(CL100K % "{1,3}"), BYTES]),
    "o200k": (None, [split(O200K % (ENDINGS, ENDINGS, "{1,3}")), BYTES]),
    "tekken": (None, [split(O200K % ("", "", "")), BYTES], True),
    "deepseek": (None, DEEPSEEK),
    "deepseek-v3": (None, DEEPSEEK3),
    "bloom": (None, [split(" ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"), BYTES]),
    "punctuation": (None, [{"type": "Punctuation", "behavior": "Contiguous"}, split("\\p{N}{1,2}"), BYTES]),
    "merged with previous": (None, [split("[aeiou]", "MergedWithPrevious"), BYTES]),
    "merged with next": (None, [split("\\s", "MergedWithNext"), split("x", "MergedWithNext", True), BYTES]),
    "contiguous": (None, [split("[\\p{P}\\s]", "Contiguous"), split("\\p{L}", "Contiguous", True), BYTES]),
    "removed": (None, [split("\\s", "Removed"), split("[a-zA-Z<>|]+", "Isolated", True), BYTES]),
    "a string": (None, [{**split(""), "pattern": {"String": " the"}, "behavior": "MergedWithPrevious"}, BYTES]),
    "lower": (steps("normalizer", {"type": "NFKC"}, {"type": "Lowercase"}), [split(GPT2), BYTES]),
    "stripped": (
        steps(
            "normalizer", {"type": "NFD"}, {"type": "StripAccents"}, {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
            {"type": "Replace", "pattern": {"String": "a"}, "content": "bb"},
        ),
        [split(GPT2), BYTES],
    ),
}  # fmt: skip


def library():
    return pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[compare]'")


def training_texts() -> list[str]:
    return [text.replace("<|", "").replace("<0x", "").replace("s>", "") for text in strings(1200, seed=1)]


def byte_level(kind: str, added: bool) -> dict:
    """A tokenizer.json of that kind."""
    tokenizers = library()
    normalizer, words, *ignore_merges = KINDS[kind]
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    content = json.loads(plain.to_str()) | {"normalizer": normalizer, "pre_tokenizer": steps("pretokenizer", *words)}
    plain = tokenizers.Tokenizer.from_str(json.dumps(content))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|eos|>"],
        show_progress=False,
    )  # fmt: skip
    plain.train_from_iterator(training_texts(), trainer)
    content = json.loads(plain.to_str()) | {"decoder": GPT}
    content["model"]["ignore_merges"] = bool(ignore_merges)
    return with_added(content) if added else content


def with_added(content: dict) -> dict:
    """The tokens of ADDED behind the vocabulary, or where they lie in it."""
    vocabulary, ids = content["model"]["vocab"], len(content["model"]["vocab"])
    for token, flags in ADDED.items():
        inside = token in vocabulary
        content["added_tokens"].append(
            {"id": vocabulary[token] if inside else ids, "content": token, "special": "special" in flags}
            | {flag: flag in flags.split() for flag in ("single_word", "lstrip", "rstrip", "normalized")}
        )
        ids += not inside
    return content


def write(directory, content: dict, **config) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def theirs(directory):
    """HF's tokenizer of a directory, with users' control tokens as plain text, as ours has them."""
    tokenizer = library().Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def differences(ours, tokenizer, texts) -> list:
    found = ((text, ours.encode(text), tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    return [each for each in found if each[1] != each[2]]
