"""Thousands of damaged GGUF files: each is read, or refused in one line; none crashes or takes much memory."""

import resource
import struct
from contextlib import contextmanager

import fake_gguf
import pytest
from fake_gguf import ARRAY, F32, I32, LLAMA, STRING, TOKENIZER, U32
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import tokenizer_from_parts
from model.gguf import load_gguf, tokenizer_parts

KINDS = {"blk.0.ffn_up.weight": "Q8_0", "blk.0.ffn_gate.weight": "Q4_0", "blk.0.ffn_down.weight": "Q4_1"}
KINDS |= {"blk.0.attn_q.weight": "F16", "blk.0.attn_k.weight": "BF16"}
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
SENTENCEPIECE = [
    ("tokenizer.ggml.model", STRING, "llama"),
    ("tokenizer.ggml.tokens", (ARRAY, STRING), PIECES),
    ("tokenizer.ggml.scores", (ARRAY, F32), [0.0] * 259 + [-float(i) for i in range(5)]),
    ("tokenizer.ggml.token_type", (ARRAY, I32), [2, 3, 3] + [6] * 256 + [1] * 5),
    ("tokenizer.ggml.bos_token_id", U32, 1),
    ("tokenizer.ggml.eos_token_id", U32, 2),
    ("tokenizer.ggml.unknown_token_id", U32, 0),
]
SEEDS = [fake_gguf.build([*LLAMA, *tokenizer], fake_gguf.tensors(KINDS)) for tokenizer in (TOKENIZER, SENTENCEPIECE)]
EXTREME = [0, 1, 2, 8, 9, 31, 255, 2**16, 2**24 + 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
MEMORY = 256 * 2**20  # bytes beyond what the process has; a seed has 60,000


@contextmanager
def limited_memory():
    """Allocations beyond MEMORY fail."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def read_all(path, content: bytes) -> bool:
    """Whether the file is accepted; anything but a ValueError of one line is a failure."""
    path.write_bytes(content)
    with limited_memory():
        try:
            _, metadata = load_gguf(path)
            tokenizer = tokenizer_from_parts(tokenizer_parts(metadata))
            tokenizer.decode(tokenizer.encode("A film, 12\x04 caf\u00e9 <|im_end|> \U0001f600"))
            return True
        except ValueError as error:
            assert "\n" not in str(error) and 10 < len(str(error)) < 700, str(error)
            return False


@pytest.mark.parametrize("seed", SEEDS)
def test_the_seeds_are_accepted(tmp_path, seed):
    assert read_all(tmp_path / "m.gguf", seed)


@st.composite
def mutated(draw):
    """A seed with some of its bytes, numbers or stretches changed; mostly in the header, which is its first part."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(len(content) - 1, draw(st.sampled_from([200, 900, 9000, 60000])))))
        kind = draw(st.sampled_from(["flip", "number", "cut", "insert", "repeat", "drop"]))
        if kind == "flip":
            content[at] ^= draw(st.integers(1, 255))
        elif kind == "number":
            n, size = draw(st.sampled_from(EXTREME)), draw(st.sampled_from([4, 8]))
            content[at : at + size] = struct.pack("<Q", n)[:size]
        elif kind == "cut":
            del content[max(1, at) :]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=16))
        elif kind == "repeat":
            content[at:at] = content[at : at + draw(st.integers(1, 64))]
        else:
            del content[at : at + draw(st.integers(1, 64))]
        if not content:
            content = bytearray(b"G")
    return bytes(content)


@given(content=mutated())
@settings(max_examples=400)
def test_mutations(tmp_path_factory, content):
    read_all(tmp_path_factory.getbasetemp() / "mutated.gguf", content)


@pytest.mark.slow
@given(content=mutated())
@settings(max_examples=2500)
def test_many_more_mutations(tmp_path_factory, content):
    read_all(tmp_path_factory.getbasetemp() / "mutated.gguf", content)


def numbers_of_the_header(seed: bytes) -> list[int]:
    """Where the counts, lengths, types, dimensions and offsets stand."""
    places = [4, 8, 16]
    for key, *_ in [*LLAMA, *TOKENIZER, *SENTENCEPIECE]:
        at = seed.find(fake_gguf.string(key))
        if at >= 0:
            places += [at, *(at + 8 + len(key) + i for i in (0, 4, 8, 12))]
    for name in fake_gguf.SHAPES:
        at = seed.find(fake_gguf.string(name))
        places += [at, *(at + 8 + len(name) + i for i in (0, 4, 8, 12, 16, 20, 24))]
    return places


@pytest.mark.parametrize("seed", SEEDS, ids=["bpe", "sentencepiece"])
def test_extreme_numbers_in_every_place(tmp_path, seed):
    refused = 0
    for at in numbers_of_the_header(seed):
        for i, n in enumerate(EXTREME):
            if (at + i) % 8 == 0:  # an eighth of all
                raw = struct.pack("<Q", n)[: 4 if n < 2**32 else 8]
                refused += not read_all(tmp_path / "m.gguf", seed[:at] + raw + seed[at + len(raw) :])
    assert refused > 100
