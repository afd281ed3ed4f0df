"""Damaged and malicious HF and PEFT directories: a model, or one clear line; never a crash, never a huge allocation.

Thousands of mutations of tiny files: raw bytes, the header of a safetensors file, the index of a sharded one, and every
value of the JSON files. Address space is limited while they are read, so an allocation by a false count shows.
"""

import copy
import json
import resource
from contextlib import contextmanager
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.hf import load_hf, save_hf
from model.lora import add_lora, merge
from model.peft import load_peft, save_peft
from model.transformer import ModelConfig, Transformer

ROOM = 2**30  # bytes of address space beyond what the process has
CASES = [pytest.param(0.3, id="quick"), pytest.param(1, marks=pytest.mark.slow, id="long")]
GPT2 = dict(norm="layer", activation="gelu", positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True)
GEMMA3 = dict(
    norm="offset_rms", norm_place="both", activation="geglu", embedding_scale=2.0, attention_scale=0.5, qk_norm=True
)
GEMMA3 |= dict(local_rope=(0,))
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def tiny(family: str) -> Transformer:
    sizes = dict(vocab_size=5, width=4, layers=2, heads=2, ffn=4, context=8)
    scaling = {**SCALING, "original_max_position_embeddings": 4}
    own = {"gpt2": GPT2, "smollm3": dict(no_rope=(1,)), "gemma3_text": GEMMA3}
    model = Transformer(ModelConfig(**sizes, **own.get(family, dict(kv_heads=1, rope_scaling=scaling))))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@contextmanager
def limited_memory():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module", autouse=True)
def limit():
    if not Path("/proc/self/statm").exists():
        pytest.skip("the address space of a process is limited through /proc")
    with limited_memory():
        yield


def attempt(read, counts):
    """read() gives a model that runs, or one line."""
    try:
        model = read()
    except (ValueError, OSError) as error:
        text = str(error)
        assert text and len(text) < 1000 and text.isprintable(), text
        counts["refused"] += 1
        return
    counts["read"] += 1
    if model.config.context >= 2:
        with torch.no_grad():
            assert model(torch.zeros(1, 2, dtype=torch.int64)).shape == (1, 2, model.config.vocab_size)


def fuzz(strategy, read, examples: float, at_least: int):
    """Feeds `examples` mutations to read(mutation); at least so many of a hundred must be refused, or nothing is tested."""
    counts = {"read": 0, "refused": 0}

    @settings(max_examples=int(examples), suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(mutation):
        attempt(lambda: read(mutation), counts)

    run()
    assert counts["refused"] >= at_least / 100 * sum(counts.values()) > 0, counts


# Mutations of bytes


def damaged(content: bytes, hot: int):
    """1 to 4 edits of `content`; half of them fall into its first `hot` bytes."""
    position = st.integers(0, len(content) - 1) | st.integers(0, hot - 1)
    edit = st.one_of(
        st.tuples(st.just("set"), position, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("insert"), position, st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("delete"), position, st.integers(1, 40)),
        st.tuples(st.just("cut"), position, st.just(0)),
        st.tuples(st.just("repeat"), position, st.integers(1, 60)),
        st.tuples(st.just("length"), st.just(0), st.integers(0, 2**64 - 1) | st.integers(0, 2 * len(content))),
    )
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: apply(content, edits))


def apply(content: bytes, edits) -> bytes:
    for kind, at, x in edits:
        at = min(at, len(content))
        if kind == "set":
            content = content[:at] + x + content[at + len(x) :]
        elif kind == "insert":
            content = content[:at] + x + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + x :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "repeat":
            content = content[:at] + content[at : at + x] * 3 + content[at + x :]
        elif kind == "length":
            content = x.to_bytes(8, "little") + content[8:]
    return content


# Mutations of JSON

NASTY = [
    None, True, False, 0, 1, 2, 3, 5, -1, 0.5, 2**31, 2**63, 2**64, 10**400, -(10**400), 1e-300, 1e300, float("nan"),
    float("inf"), "", "x", "../x", "../../etc/passwd", "/etc/passwd", "/dev/zero", ".", "..", "a/b.safetensors",
    "../x.safetensors", "/x.safetensors", "..\\x.safetensors", "\0.safetensors", "\n.safetensors", "\ud800.safetensors",
    "x" * 5000, "x" * 5000 + ".safetensors", "model-00002-of-00002.safetensors", "model.safetensors", [], {}, [[]], [0],
    [2**62, 4], [-1, 4], [0, 2**64], [1, 2, 3, 4, 5, 6, 7, 8], ["full_attention"], [None], {"a": {"b": []}}, "F32", "I64",
    "F8_E4M3", "llama", "gpt2", "qwen2", "qwen3", "mistral", "llama3", "linear", "yarn", {"rope_type": "llama3"},
    {"rope_type": "linear", "factor": 1e300}, ["LlamaForSequenceClassification"], ["LlamaForCausalLM"],
]  # fmt: skip
values = (
    st.sampled_from(NASTY) | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers(), max_size=3)
)


def places(content, at=()):
    """Paths of all values inside nested objects and lists."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path for key, value in items for path in [(*at, key), *places(value, (*at, key))]]


def changed(content: dict):
    """`content` with 1 to 3 of its values replaced, removed, copied from elsewhere in it, or under another key."""
    path = st.sampled_from(places(content))
    edit = st.one_of(
        st.tuples(st.just("set"), path, values),
        st.tuples(st.just("remove"), path, st.none()),
        st.tuples(
            st.just("rename"), path, st.text(max_size=9) | st.sampled_from(["num_labels", "n_inner", "score.weight"])
        ),
        st.tuples(st.just("copy"), path, path),
    )
    return st.lists(edit, min_size=1, max_size=3).map(lambda edits: change(content, edits))


def change(content: dict, edits) -> dict:
    content = copy.deepcopy(content)
    for kind, path, x in edits:
        try:
            parent = reduce(getitem, path[:-1], content)
            value = copy.deepcopy(reduce(getitem, x if kind == "copy" else path, content))
            if kind in ("remove", "rename"):
                del parent[path[-1]]
            if kind == "rename":
                parent[x] = value
            elif kind != "remove":
                parent[path[-1]] = value if kind == "copy" else x
        except (LookupError, TypeError):  # an earlier edit changed the place
            pass
    return content


def header(content: bytes) -> tuple[dict, bytes]:
    """(header, data) of a safetensors file"""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(entries: dict, data: bytes) -> bytes:
    text = json.dumps(entries).encode("utf-8", "replace")
    return len(text).to_bytes(8, "little") + text + data


# The readers


@pytest.fixture
def hf(request, tmp_path):
    score = torch.ones(1, 4) if request.param == "reward" else None
    return save_hf(tmp_path / "hf", tiny(request.param), score=score, bos_id=1, eos_ids=[2], pad_id=0)


llama = pytest.mark.parametrize("hf", ["llama"], indirect=True)
every = pytest.mark.parametrize("hf", ["llama", "gpt2", "reward"], indirect=True)
cases = pytest.mark.parametrize("scale", CASES)


def reader(directory: Path, name: str, encode):
    """Writes encode(mutation) as one of the directory's files, then loads the directory."""

    def read(mutation):
        (directory / name).write_bytes(encode(mutation))
        return load_hf(directory)[0]

    return read


def as_json(content) -> bytes:
    return json.dumps(content).encode()


@every
@cases
def test_bytes_of_a_safetensors_file(hf, scale):
    file = hf / "model.safetensors"
    content = file.read_bytes()
    hot = 8 + int.from_bytes(content[:8], "little")
    fuzz(damaged(content, hot), reader(hf, file.name, bytes), 200 * scale, at_least=50)


@every
@cases
def test_header_of_a_safetensors_file(hf, scale):
    entries, data = header((hf / "model.safetensors").read_bytes())
    read = reader(hf, "model.safetensors", lambda entries: with_header(entries, data))
    fuzz(changed(entries), read, 200 * scale, at_least=50)


@pytest.mark.parametrize("hf", ["llama", "gpt2", "reward", "smollm3", "gemma3_text"], indirect=True)
@cases
def test_config(hf, scale):
    content = json.loads((hf / "config.json").read_text())
    fuzz(changed(content), reader(hf, "config.json", as_json), 200 * scale, at_least=10)


@llama
@cases
def test_generation_config(hf, scale):
    content = json.loads((hf / "generation_config.json").read_text())
    fuzz(changed(content), reader(hf, "generation_config.json", as_json), 100 * scale, at_least=10)


@llama
@cases
def test_bytes_of_a_config(hf, scale):
    content = (hf / "config.json").read_bytes()
    fuzz(damaged(content, len(content)), reader(hf, "config.json", bytes), 150 * scale, at_least=30)


@pytest.fixture
def sharded(hf):
    """Two shards and their index."""
    entries, data = header((hf / "model.safetensors").read_bytes())
    names = [name for name in entries if name != "__metadata__"]
    weight_map = {}
    for number, half in enumerate((names[::2], names[1::2]), 1):
        own, kept = {}, b""
        for name in half:
            start, end = entries[name]["data_offsets"]
            own[name] = {**entries[name], "data_offsets": [len(kept), len(kept) + end - start]}
            kept += data[start:end]
        shard = f"model-{number:05}-of-00002.safetensors"
        (hf / shard).write_bytes(with_header(own, kept))
        weight_map |= dict.fromkeys(half, shard)
    (hf / "model.safetensors").unlink()
    index = {"metadata": {"total_size": len(data)}, "weight_map": weight_map}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    load_hf(hf)
    return hf


@llama
@cases
def test_index(sharded, scale):
    name = "model.safetensors.index.json"
    content = json.loads((sharded / name).read_text())
    fuzz(changed(content), reader(sharded, name, as_json), 500 * scale, at_least=50)


@llama
@cases
def test_bytes_of_an_index(sharded, scale):
    name = "model.safetensors.index.json"
    content = (sharded / name).read_bytes()
    fuzz(damaged(content, len(content)), reader(sharded, name, bytes), 300 * scale, at_least=50)


@pytest.fixture
def adapter(tmp_path):
    return save_peft(tmp_path / "adapter", add_lora(tiny("llama"), rank=2))


@cases
@pytest.mark.parametrize("part", ["config", "header", "bytes"])
def test_peft_directory(adapter, part, scale):
    config, file = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    entries, data = header(content)
    strategy, target, encode = {
        "config": (changed(json.loads(config.read_text())), config, as_json),
        "header": (changed(entries), file, lambda entries: with_header(entries, data)),
        "bytes": (damaged(content, len(content) - len(data)), file, bytes),
    }[part]

    def read(mutation):
        target.write_bytes(encode(mutation))
        return merge(load_peft(adapter, tiny("llama")), "default")

    fuzz(strategy, read, 100 * scale, at_least=30)


def test_the_limit_is_one():
    with pytest.raises(RuntimeError):
        torch.empty(2 * ROOM, dtype=torch.uint8)
