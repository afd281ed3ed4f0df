"""The transformer against a textbook version, and the KV cache against the full forward."""

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import FAMILIES, SMALL, random_ids, slow_logits, small_model

from model import transformer
from model.transformer import KVCache, ModelConfig, Transformer

pytestmark = pytest.mark.bits

every_family = pytest.mark.parametrize("family", FAMILIES)


def max_diff(a, b):
    return float((a.detach().double() - b.detach().double()).abs().max())


@every_family
def test_forward_equals_the_textbook(family):
    model, ids = small_model(family), random_ids(1, 2, 17)
    logits = model(ids)
    for row in range(2):
        assert max_diff(logits[row], slow_logits(model, ids[row].tolist())) < 1e-10


@every_family
def test_float32_forward_is_near_the_textbook(family):
    model, ids = small_model(family, torch.float32), random_ids(1, 1, 17)
    assert max_diff(model(ids)[0].log_softmax(-1), slow_logits(model, ids[0].tolist()).log_softmax(-1)) < 1e-4


def feed_in_ragged_pieces(model, ids, lengths, seed):
    """Log-probs (B, T, V) from a cache that is fed every row in pieces of random, different sizes, junk between them."""
    generator = torch.Generator().manual_seed(seed)
    B, T = ids.shape
    cache = KVCache(model.config, B, T, model.norm.weight.dtype)
    out = torch.zeros(B, T, model.config.vocab_size, dtype=torch.float64)
    for piece in (5, 3, 1, 1, T, 1):  # the last pieces find rows that are already complete
        left = lengths - cache.lengths
        new = torch.minimum(torch.randint(0 if piece > 1 else 1, piece + 1, (B,), generator=generator), left)
        if piece == T:
            new = left
        width = max(piece, int(new.max()))
        columns = (cache.lengths[:, None] + torch.arange(width)).clamp(max=T - 1)
        junk = torch.randint(0, model.config.vocab_size, (B, width), generator=generator)
        real = torch.arange(width) < new[:, None]
        start = cache.lengths
        logprobs = model(torch.where(real, ids.gather(1, columns), junk), cache, new).double().log_softmax(-1)
        for row in range(B):
            out[row, start[row] : start[row] + new[row]] = logprobs[row, : new[row]]
    assert torch.equal(cache.lengths, lengths)
    return out


@every_family
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_cached_ragged_rows_equal_the_full_forward(family, dtype, tolerance):
    model = small_model(family, dtype)
    with torch.no_grad():
        for seed in range(5):
            ids, lengths = random_ids(seed, 6, 24), torch.tensor([24, 1, 7, 16, 23, 2])
            cached = feed_in_ragged_pieces(model, ids, lengths, seed)
            full = model(ids).double().log_softmax(-1)
            for row, length in enumerate(lengths):
                assert max_diff(cached[row, :length], full[row, :length]) < tolerance


@every_family
def test_one_token_at_a_time_equals_the_full_forward(family):
    model, ids = small_model(family), random_ids(3, 3, 32)
    cache = KVCache(model.config, 3, 32, torch.float64)
    with torch.no_grad():
        steps = [model(ids[:, t : t + 1], cache) for t in range(32)]
        assert max_diff(torch.cat(steps, 1), model(ids)) < 1e-10


@settings(max_examples=40)
@given(st.sampled_from(list(FAMILIES)), st.lists(st.integers(1, 8), min_size=1, max_size=4), st.integers(0, 10**6))
def test_junk_in_the_padding_changes_nothing(family, lengths, seed):
    model, lengths = small_model(family, torch.float32), torch.tensor(lengths)
    ids, junk = random_ids(seed, len(lengths), 8), random_ids(seed + 1, len(lengths), 8)
    real = torch.arange(8) < lengths[:, None]
    other = torch.where(real, ids, junk)
    with torch.no_grad():
        assert torch.equal(model(ids)[real], model(other)[real])
        first, second = (KVCache(model.config, len(lengths), 12) for _ in range(2))
        assert torch.equal(model(ids, first, lengths)[real], model(other, second, lengths)[real])
        following = random_ids(seed + 2, len(lengths), 1)
        for _ in range(4):
            assert torch.equal(model(following, first), model(following, second))


@settings(max_examples=25)
@given(st.sampled_from(list(FAMILIES)), st.data())
def test_rows_in_any_order(family, data):
    """Rows may be dropped, reordered and repeated between any two steps, and each goes on as if it were alone."""
    model = small_model(family)
    rows = [random_ids(row, 1 + 2 * row)[None] for row in range(5)]
    lengths = torch.tensor([row.shape[1] for row in rows])
    prompts = torch.cat([torch.nn.functional.pad(row, (0, 9 - row.shape[1])) for row in rows])
    whole = KVCache(model.config, 6, 20, torch.float64)
    cache = whole.view(slice(0, 5), [0] * 5, 0)
    with torch.no_grad():
        model(prompts, cache, lengths)
        for step in range(4):
            if data.draw(st.booleans()):
                order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
                rows = [rows[i] for i in order]
                lengths = [row.shape[1] for row in rows]
                whole.copy_rows(torch.tensor(order), torch.arange(len(order)), max(lengths))
                cache = whole.view(slice(0, len(order)), lengths, max(lengths))
            new = random_ids(100 + step, len(rows), 1)
            rows = [torch.cat((row, new[i : i + 1]), 1) for i, row in enumerate(rows)]
            logits = model(new, cache)[:, 0]
            for i, row in enumerate(rows):
                assert max_diff(logits[i], model(row)[0, -1]) < 1e-10
            assert cache.longest == max(row.shape[1] for row in rows) == int(cache.lengths.max())


@every_family
def test_layers_may_run_in_two_parts(family):
    model, ids = small_model(family), random_ids(4, 2, 9)
    span = model.span(ids)
    lower = model.blocks(model.embed(ids, span), span, last=1)
    assert torch.equal(model.norm(model.blocks(lower, span, first=1)), model.trunk(ids))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_bfloat16(family):
    """Half precision stays near float32, with and without a cache; the cache has the model's type."""
    ids, lengths = random_ids(5, 3, 12), torch.tensor([12, 4, 9])
    exact = small_model(family, torch.float32)(ids).log_softmax(-1)
    model = small_model(family, torch.bfloat16)
    with torch.no_grad():
        assert model(ids).dtype == torch.bfloat16
        assert max_diff(model(ids).float().log_softmax(-1), exact) < 0.5
        cached = feed_in_ragged_pieces(model, ids, lengths, 0)
        for row, length in enumerate(lengths):
            assert max_diff(cached[row, :length], exact[row, :length]) < 0.5


def test_positions_are_exact_in_half_precision():
    """At position 1000 a bfloat16 angle would be off by radians; the rotation is computed in float32."""
    config = dict(context=2048, vocab_size=13, width=32, layers=1, heads=1)
    exact, half = Transformer(ModelConfig(**config)), Transformer(ModelConfig(**config)).bfloat16()
    ids = torch.zeros(1, 1001, dtype=torch.int64)
    for a, b in zip(exact.span(ids).ropes["global"], half.span(ids).ropes["global"]):
        assert b.dtype == torch.float32 and torch.equal(a, b)


def test_state_dict_names():
    attention = [f"self_attn.{p}_proj.weight" for p in "qkvo"]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    down = ["mlp.up_proj.weight", "mlp.down_proj.weight"]

    def names(family):
        state = small_model(family).state_dict()
        assert not [name for name in state if name.startswith("layers.") and name.split(".")[1] not in "01"]
        top = {name for name in state if not name.startswith("layers.")}
        return top, {name.removeprefix("layers.1.") for name in state if name.startswith("layers.1.")}

    llama = {*attention, *norms, *down, "mlp.gate_proj.weight"}
    assert names("smollm2") == ({"embed_tokens.weight", "norm.weight"}, llama)
    assert names("llama") == ({"embed_tokens.weight", "norm.weight", "lm_head.weight"}, llama)
    assert names("qwen2")[1] == llama | {f"self_attn.{p}_proj.bias" for p in "qkv"}
    assert names("qwen3")[1] == llama | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    weights = {*attention, *norms, *down}
    assert names("gpt2") == (
        {"embed_tokens.weight", "embed_positions.weight", "norm.weight", "norm.bias"},
        weights | {name.replace("weight", "bias") for name in weights},
    )


def test_smollm2_has_its_number_of_parameters():
    config = ModelConfig(49152, 576, 30, 9, 3, ffn=1536, context=8192, rope_theta=1e5)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_a_model_built_without_memory_takes_tensors_as_they_are():
    source, ids = small_model("llama3"), random_ids(6, 1, 5)
    with torch.device("meta"):
        model = Transformer(source.config)
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(ids), source(ids))
    assert model.embed_tokens.weight.data_ptr() == source.embed_tokens.weight.data_ptr()


@every_family
def test_init_depends_on_the_generator_alone(family):
    def fresh(global_seed, seed):
        torch.manual_seed(global_seed)
        model = Transformer(ModelConfig(**{**SMALL, **FAMILIES[family]}))
        model.init_weights(torch.Generator().manual_seed(seed))
        return model.state_dict()

    a, b, c = fresh(0, 7), fresh(1, 7), fresh(0, 8)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embed_tokens.weight"], c["embed_tokens.weight"])


def test_init_deviations():
    model = Transformer(ModelConfig(vocab_size=500, width=192, layers=8, tied=False, qkv_bias=True))
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.state_dict().items():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            expected = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert abs(float(parameter.std()) / expected - 1) < 0.03 and abs(float(parameter.mean())) < expected / 30


def test_config_round_trip_and_defaults():
    for family in FAMILIES:
        config = ModelConfig(**{**SMALL, **FAMILIES[family]})
        for fields in (dataclasses.asdict(config), config.stored()):
            assert ModelConfig(**json.loads(json.dumps(fields))) == config
    assert len(ModelConfig().stored()) == 19 and ModelConfig(logit_divisor=2.0).stored()["logit_divisor"] == 2
    config = ModelConfig(width=576, heads=9)
    assert (config.kv_heads, config.head_dim, config.ffn) == (9, 64, 1536)


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(width=100, heads=3), ["100", "3"]),
        (dict(heads=4, kv_heads=3), ["4", "3"]),
        (dict(layers=0), ["layers", "0"]),
        (dict(norm="batch"), ["norm", "batch", "rms"]),
        (dict(activation="relu"), ["relu", "silu"]),
        (dict(positions="alibi"), ["alibi", "rope"]),
        (dict(head_dim=7), ["7"]),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ["yarn", "llama3"]),
        (dict(rope_scaling={"type": "dynamic", "factor": 4.0}), ["dynamic"]),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), ["low_freq_factor"]),
    ],
)
def test_config_that_does_not_fit(changes, words):
    with pytest.raises(ValueError) as error:
        ModelConfig(**changes)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@torch.no_grad()
def test_overflow_says_both_numbers():
    model = small_model("llama")  # context 32
    with pytest.raises(ValueError, match="33.*context of 32"):
        model(random_ids(0, 1, 33))
    with pytest.raises(ValueError, match="40.*32"):
        KVCache(model.config, 1, 40)
    cache = KVCache(model.config, 2, 10, torch.float64)
    model(random_ids(0, 2, 12), cache, torch.tensor([9, 3]))  # padding may stand beyond the end, real tokens may not
    before = copy.deepcopy(cache.keys)
    with pytest.raises(ValueError, match="11.*cache of 10"):
        model(random_ids(0, 2, 2), cache)
    assert cache.lengths.tolist() == [9, 3] and all(torch.equal(a, b) for a, b in zip(before, cache.keys))


@every_family
def test_padding_beyond_the_end_of_the_cache(family):
    """A row that just fits keeps its last token although its neighbour's padding reaches past the end."""
    model, ids = small_model(family), random_ids(2, 2, 32)
    cache = KVCache(model.config, 2, 32, torch.float64)
    with torch.no_grad():
        model(ids[:, :28], cache, torch.tensor([28, 20]))
        logits = model(torch.stack((ids[0, 28:], ids[1, 20:24])), cache, torch.tensor([3, 4]))
        assert max_diff(logits[0, :3], model(ids)[0, 28:31]) < 1e-10
        assert max_diff(logits[1], model(ids)[1, 20:24]) < 1e-10
        last = model(torch.stack((ids[0, 31:], ids[1, 24:25])), cache)
        assert max_diff(last[0, 0], model(ids)[0, 31]) < 1e-10


@every_family
def test_gradients_reach_every_parameter(family):
    model, ids = small_model(family), random_ids(8, 2, 6)
    model(ids).log_softmax(-1)[..., 0].sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wide_vocabulary_in_parts_equals_one_product(dtype, monkeypatch):
    """Logits and both gradients of the product in parts, the last part ragged, are those of F.linear."""
    monkeypatch.setattr(transformer, "VOCABULARY_PART", 9)
    model = Transformer(ModelConfig(40, 16, layers=1, heads=2)).to(dtype)
    weight, generator = model.embed_tokens.weight, torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 3, model.config.width, generator=generator, dtype=dtype, requires_grad=True)
    logits, plain = model.unembed(hidden), torch.nn.functional.linear(hidden, weight)
    assert "_WideLinear" in type(logits.grad_fn).__name__
    up = torch.randn(logits.shape, generator=generator, dtype=dtype)
    ours, theirs = (torch.autograd.grad(x, (hidden, weight), up) for x in (logits, plain))
    for a, b in zip((logits, *ours), (plain, *theirs)):
        torch.testing.assert_close(a, b)


def test_an_embeddings_gradient_in_place_is_the_sum_in_any_graph(monkeypatch):
    """Of trunks with an output, without one, under autocast, and other readers of the weight, in any order in one backward."""
    monkeypatch.setattr(transformer, "VOCABULARY_PART", 9)
    model = Transformer(ModelConfig(40, 16, layers=1, heads=2))
    model.init_weights(torch.Generator().manual_seed(1))
    weight = model.embed_tokens.weight
    F = torch.nn.functional

    def rounded():
        with torch.autocast("cpu", torch.bfloat16):
            return model(random_ids(5, 2, 5)).float().log_softmax(-1)[..., 0].sum()

    def thrice():
        hidden = model.trunk(random_ids(3, 2, 5))
        return sum(model.unembed(hidden[:, k]).log_softmax(-1)[..., 2].sum() for k in (1, 3, 4))

    parts = {
        "output": lambda: model(random_ids(0, 3, 12)).log_softmax(-1)[..., 0].sum(),
        "another": lambda: model(random_ids(1, 2, 7)).log_softmax(-1)[..., 1].sum(),
        "thrice": thrice,
        "trunk": lambda: model.trunk(random_ids(2, 2, 6)).square().sum(),
        "plain": lambda: F.linear(model.trunk(random_ids(4, 2, 5)), weight).log_softmax(-1)[..., 3].sum(),
        "norm": lambda: weight.square().sum(),
        "rounded": rounded,
    }

    def gradient(*names: str) -> torch.Tensor:
        return torch.autograd.grad(sum(parts[name]() for name in names), weight)[0]

    alone = {"rounded": gradient("rounded")}
    with monkeypatch.context() as plain:
        plain.setattr(model, "embed", lambda ids, span: model.embed_tokens(ids))
        plain.setattr(model, "project", lambda hidden: F.linear(hidden, weight))
        alone |= {name: gradient(name) for name in parts if name != "rounded"}
    for names in itertools.permutations(parts, 3):
        expected = sum(alone[name] for name in names)
        torch.testing.assert_close(gradient(*names), expected, msg=lambda text, names=names: f"{names}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tied_embeddings_gradient_by_rows_is_the_dense_one(dtype, monkeypatch):
    """Two micro-batches in which ids come again, then a trunk without an output: as F.embedding and F.linear have it."""
    monkeypatch.setattr(transformer, "VOCABULARY_PART", 9)
    model = Transformer(ModelConfig(40, 16, layers=1, heads=2)).to(dtype)
    model.init_weights(torch.Generator().manual_seed(1))
    weight, found = model.embed_tokens.weight, []
    plain = dict(
        embed=lambda ids, span: model.embed_tokens(ids), project=lambda x: torch.nn.functional.linear(x, weight)
    )
    for changed in ({}, plain):
        for name, function in changed.items():
            monkeypatch.setattr(model, name, function)
        model.zero_grad()
        for seed in range(2):
            model(random_ids(seed, 3, 12) % 5).log_softmax(-1)[..., 0].sum().backward()
        found.append([weight.grad.clone()])
        model.trunk(random_ids(2, 2, 6)).square().sum().backward()
        found[-1] += [weight.grad, *torch.autograd.grad(model.trunk(random_ids(3, 2, 6)).sum(), weight)]
    for a, b in zip(*found):
        assert a.layout == torch.strided
        torch.testing.assert_close(a, b)
