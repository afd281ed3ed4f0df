"""GGUF files written byte by byte from the format's description, apart from the writer of model/gguf.py."""

import struct

import numpy as np

FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind, x) -> bytes:
    """kind: a type, or (ARRAY, its items' type)."""
    if isinstance(kind, tuple):
        items = b"".join(value(kind[1], item) for item in x)
        return struct.pack("<IQ", kind[1], len(x)) + items
    return string(x) if kind == STRING else struct.pack("<" + FORMATS[kind], x)


def build(metadata, tensors, version=3, alignment=32, counts=None) -> bytes:
    """metadata: [(key, kind, value)]; tensors: [(name, shape as in torch, type, bytes)] -> the file."""
    out = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(metadata))))
    for key, kind, x in metadata:
        out += string(key) + struct.pack("<I", kind[0] if isinstance(kind, tuple) else kind) + value(kind, x)
    data = b""
    for name, shape, kind, raw in tensors:
        out += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(data))
        data += raw + bytes(-len(raw) % alignment)
    return out + bytes(-len(out) % alignment) + data


LETTERS = [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256)]]
LETTERS += [chr(256 + i) for i in range(256 - len(LETTERS))]
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ", "i n", "1 2", "! !"]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
TYPES = [3] * 3 + [1] * (len(TOKENS) - 3)
TOKENIZER = [
    ("tokenizer.ggml.model", STRING, "gpt2"),
    ("tokenizer.ggml.pre", STRING, "smollm"),
    ("tokenizer.ggml.tokens", (ARRAY, STRING), TOKENS),
    ("tokenizer.ggml.token_type", (ARRAY, I32), TYPES),
    ("tokenizer.ggml.merges", (ARRAY, STRING), MERGES),
    ("tokenizer.ggml.bos_token_id", U32, 1),
    ("tokenizer.ggml.eos_token_id", U32, 2),
    ("tokenizer.ggml.padding_token_id", U32, 2),
    ("tokenizer.ggml.add_bos_token", BOOL, False),
    ("tokenizer.chat_template", STRING, "{% for m in messages %}{{ m.content }}{% endfor %}"),
]
LLAMA = [
    ("general.architecture", STRING, "llama"),
    ("general.alignment", U32, 32),
    ("llama.block_count", U32, 1),
    ("llama.context_length", U32, 16),
    ("llama.embedding_length", U32, 32),
    ("llama.feed_forward_length", U32, 64),
    ("llama.attention.head_count", U32, 2),
    ("llama.attention.head_count_kv", U32, 1),
    ("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
    ("llama.rope.freq_base", F32, 10000.0),
]
SHAPES = {
    "token_embd.weight": (len(TOKENS), 32),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (16, 32),
    "blk.0.attn_v.weight": (16, 32),
    "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.ffn_gate.weight": (64, 32),
    "blk.0.ffn_up.weight": (64, 32),
    "blk.0.ffn_down.weight": (32, 64),
    "output_norm.weight": (32,),
}
BLOCKS = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "BF16": (30, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q8_0": (8, 32, 34),
}


def random_bytes(kind: str, numbers: int, seed: int) -> bytes:
    """Blocks of random bits whose scales are small finite numbers."""
    rng = np.random.default_rng(seed)
    _, per_block, block = BLOCKS[kind]
    if per_block == 1:
        values = rng.normal(0, 0.3, numbers).astype("<f4")
        return (
            {"F32": values, "F16": values.astype("<f2"), "BF16": values.view("<u4") >> 16}[kind]
            .astype({"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[kind])
            .tobytes()
        )
    raw = rng.integers(0, 256, (numbers // 32, block), dtype=np.uint8)
    raw[:, :2] = rng.normal(0, 0.02, (numbers // 32, 1)).astype("<f2").view(np.uint8)
    if kind == "Q4_1":
        raw[:, 2:4] = rng.normal(0, 0.1, (numbers // 32, 1)).astype("<f2").view(np.uint8)
    return raw.tobytes()


def tensors(kinds=None, shapes=SHAPES) -> list:
    """Random weights; kinds: name -> type, F32 where nothing else is said."""
    made = []
    for seed, (name, shape) in enumerate(shapes.items()):
        kind = (kinds or {}).get(name, "F32")
        made.append((name, shape, BLOCKS[kind][0], random_bytes(kind, int(np.prod(shape)), seed)))
    return made


def slow_numbers(raw: bytes, kind: str) -> list[float]:
    """The numbers of blocks, one at a time, as the format's description has them."""

    def half(i):
        return struct.unpack_from("<e", raw, i)[0]

    _, per_block, block = BLOCKS[kind]
    out = []
    for at in range(0, len(raw), block):
        if kind == "F32":
            out.append(struct.unpack_from("<f", raw, at)[0])
        elif kind == "F16":
            out.append(half(at))
        elif kind == "BF16":
            out.append(struct.unpack("<f", b"\0\0" + raw[at : at + 2])[0])
        elif kind == "Q8_0":
            out += [half(at) * struct.unpack_from("<b", raw, at + 2 + i)[0] for i in range(32)]
        else:
            first = at + (2 if kind == "Q4_0" else 4)
            for i in range(32):
                byte = raw[first + i % 16]
                q = byte % 16 if i < 16 else byte // 16
                out.append(half(at) * (q - 8) if kind == "Q4_0" else half(at) * q + half(at + 2))
    return out
