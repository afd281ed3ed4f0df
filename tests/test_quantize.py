"""Weight-only int8: against gpt-fast's and torch's numbers, against the definition, and as a model that samples."""

import copy
import dataclasses
import re

import golden
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_model import FAMILIES, random_ids, slow_logits, small_model

from model.generate import Sampling, generate, row_uniforms
from model.half import to_sample_with
from model.quantize import (
    FBGEMM,
    FEW_ROWS,
    Int8Linear,
    decoding_path,
    dequantize,
    integer_product,
    load_quantized,
    pack,
    quantize,
    quantize_rows,
    stored_tensors,
)
from model.transformer import KVCache
from rlhf.lm.int8 import is_int8, stays_int8, to_compute_with

pytestmark = pytest.mark.bits

EMBEDDINGS = ("bf16", "int8")
WHOLE_STEPS = dict(width=32, heads=4, kv_heads=2, head_dim=8, ffn=64)  # what torch's kernel takes


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def random_weight(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dequantized(model, embedding: str = "bf16"):
    """A float64 model with the weights that the int8 one multiplies by, worked out row by row."""

    def rows(weight):
        q, scale = quantize_rows(weight, torch.bfloat16)
        return torch.stack([s.double() * row.double() for s, row in zip(scale, q)])

    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(rows(module.weight))
    stored = model.embed_tokens.weight.detach().to(torch.bfloat16)
    looked_up = stored.double() if embedding == "bf16" else rows(model.embed_tokens.weight)
    if model.config.tied:  # the output matrix may differ from what is looked up
        model.lm_head = torch.nn.Linear(*model.embed_tokens.weight.shape[::-1], bias=False, dtype=torch.float64)
        model.lm_head.weight = torch.nn.Parameter(rows(stored) if embedding == "bf16" else looked_up)
        model.config = dataclasses.replace(model.config, tied=False)
    model.embed_tokens.weight = torch.nn.Parameter(looked_up)
    return model


def test_torch_quantizes_the_same(golden_dir):
    file = golden.load(golden_dir, "int8_per_channel_torch")
    q, scale = quantize_rows(file.inputs["weight(out,in)"])
    assert torch.equal(q.long(), file.outputs["int8"])
    assert torch.allclose(scale[:3].double(), file.inputs["scales(max|w|/127)"][:3], rtol=1e-6)
    assert torch.allclose(q.double() * scale.double()[:, None], file.outputs["dequantised"], rtol=1e-6)


def test_gpt_fast_quantizes_nearly_the_same(golden_dir):
    """Its scale is max|w| / 127.5, so that a largest weight above zero is clipped; ours / theirs = 127.5 / 127."""
    file = golden.load(golden_dir, "int8_per_channel_gptfast")
    weight, x = file.inputs["weight(out,in)"], file.inputs["x"]
    q, scale = quantize_rows(weight)
    assert torch.allclose(scale[:3].double(), file.outputs["scales"][:3] * 127.5 / 127, rtol=1e-6)
    assert (q - file.outputs["int8"]).abs().max() <= 1
    layer = Int8Linear(file.outputs["int8"].to(torch.int8), file.outputs["scales"])
    assert torch.allclose(layer.in_parts(x), file.outputs["linear_out"], atol=1e-5)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rounding_is_to_the_nearest(N, K, seed, dtype):
    weight = random_weight(seed, N, K) * 10.0 ** (seed % 9 - 4)
    weight[seed % N] *= seed % 3  # rows of zeros too
    q, scale = quantize_rows(weight, dtype)
    assert q.dtype == torch.int8 and scale.dtype == dtype and q.abs().max() <= 127
    largest = weight.abs().amax(1) / 127
    assert (scale >= largest.to(torch.float32)).all() and (
        scale[largest > 0] <= largest[largest > 0] * (1 + 2**-7)
    ).all()
    error = (weight.double() - scale.double()[:, None] * q.double()).abs()
    assert (error <= scale.double()[:, None] * 0.5001).all()


@pytest.mark.parametrize("rows", [0, 1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_the_dequantized_weights(rows, bias):
    weight, x = random_weight(1, 1100, 48), random_weight(2, rows, 48)  # more outputs than are converted at a time
    q, scale = quantize_rows(weight, torch.bfloat16)
    b = random_weight(3, 1100) if bias else None
    exact = x.double() @ (q.double() * scale.double()[:, None]).T + (b.double() if bias else 0)
    y = Int8Linear(q, scale, b)(x)
    assert y.shape == exact.shape and y.dtype == x.dtype
    few = rows <= FEW_ROWS and not FBGEMM  # bfloat16 activations and results: 8 bits
    assert torch.allclose(y.double(), exact, atol=0.15 if few else 0.01, rtol=2**-7 if few else 1e-5)


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
def test_rows_of_any_length(N, K, seed):
    """torch's kernel gives wrong numbers, or ends the process, for lengths that are no multiple of its step."""
    q, scale = quantize_rows(random_weight(seed, N, K), torch.bfloat16)
    x = random_weight(seed + 1, 2, K)
    exact = x.double() @ (q.double() * scale.double()[:, None]).T
    assert torch.allclose(Int8Linear(q, scale)(x).double(), exact, atol=0.1, rtol=2**-6)


def test_a_row_does_not_depend_on_the_others():
    q, scale = quantize_rows(random_weight(1, 70, 48), torch.bfloat16)
    layer, x = Int8Linear(q, scale), random_weight(2, FEW_ROWS, 48)
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


def slow_integer_product(x, q, scale):
    """Python's integers and fractions: x as max|x| / 63 (a + b / 126), a and b rounded to the even neighbour at a tie."""
    unit = max(abs(v) for v in x) / 63
    a = [round(v / unit) if unit else 0 for v in x]
    b = [round((v / unit - i) * 126) if unit else 0 for v, i in zip(x, a)]
    return [
        unit * s * (sum(i * w for i, w in zip(a, row)) + sum(i * w for i, w in zip(b, row)) / 126)
        for row, s in zip(q, scale)
    ]


needs_fbgemm = pytest.mark.skipif(not FBGEMM, reason="this CPU has no FBGEMM")


@needs_fbgemm
@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 99), st.sampled_from([0.0, 1e-30, 1.0, 1e4]))
def test_integers_against_a_slow_product(N, K, seed, size):
    q, scale = quantize_rows(random_weight(seed, N, K), torch.bfloat16)
    x = random_weight(seed + 1, 3, K)
    x[0, seed % K] *= 100  # an outlier: the others' integers are small
    x[1] *= size
    y = integer_product(x, pack(q, scale))
    for row, result in zip(x.double(), y.double()):
        expected = torch.tensor(slow_integer_product(row.tolist(), q.tolist(), scale.tolist())).double()
        # where float32 divides to the other side of a tie, one integer moves: 1 / 126 of the unit, times 127
        one_off = row.abs().max() / 63 / 126 * 127 * scale.double()
        assert ((result - expected).abs() <= 1.01 * one_off + 1e-5 * expected.abs()).all()
        exact = (q.double() * scale.double()[:, None]) @ row
        bound = row.abs().max() / 63 / 126 * 0.51 * (q.double().abs().sum(1) * scale.double())
        assert ((result - exact).abs() <= bound + 1e-5 * exact.abs() + 1e-6 * bound).all()


@needs_fbgemm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (3, 2, 48), (0, 48), (FEW_ROWS + 1, 48)])
def test_a_compiled_product_takes_any_shape(shape, dtype):
    """TorchScript specializes on the first calls' shapes and dtypes; later ones must not be taken for them."""
    packed = pack(*quantize_rows(random_weight(1, 70, 48), torch.bfloat16))
    for rows in (random_weight(2, 1, 48), random_weight(3, 5, 48), random_weight(4, *shape).to(dtype)):
        alone = [integer_product(row, packed) for row in rows.reshape(-1, 48)]
        y = integer_product(rows, packed)
        assert y.dtype == rows.dtype and y.shape == (*rows.shape[:-1], 70)
        assert torch.equal(y.reshape(-1, 70), torch.stack(alone) if alone else y.reshape(-1, 70))


@needs_fbgemm
def test_no_sum_overflows():
    """The largest integers throughout: without VNNI a CPU adds two products in 16 bits, and saturates."""
    q, scale = torch.full((5, 4096), 127, dtype=torch.int8), torch.ones(5, dtype=torch.bfloat16)
    q[1] = -127
    y = integer_product(torch.tensor([[1.0], [-1.0]]).expand(2, 4096), pack(q, scale))
    expected = torch.tensor([1, -1, 1, 1, 1]) * 127 * 4096.0
    assert torch.allclose(y, torch.stack((expected, -expected)), rtol=1e-6)


def test_numbers_that_are_not_finite_show():
    q, scale = quantize_rows(random_weight(1, 7, 48), torch.bfloat16)
    x = random_weight(2, 3, 48)
    x[0, 5], x[1, 5] = torch.nan, torch.inf
    finite = Int8Linear(q, scale)(x).isfinite()
    assert not finite[:2].any() and finite[2].all()


def test_a_copy_of_a_model_that_has_sampled():
    model = quantize(small_model("llama", torch.float32, **WHOLE_STEPS))
    ids = random_ids(1, 2, 3)
    before = model(ids)
    again = copy.deepcopy(model)
    assert torch.equal(again(ids), before)
    with torch.no_grad():  # and has weights of its own
        again.layers[0].mlp.up_proj.scale.zero_()
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_the_same_input_are_multiplied_together(family):
    model, x = quantize(small_model(family, torch.float32, **WHOLE_STEPS | {"kv_heads": 4})), random_weight(1, 2, 3, 32)
    attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
    expected = [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert all(torch.equal(y, e) for y, e in zip(attention.qkv(x), expected))
    if mlp.gate_proj is not None:
        assert all(torch.equal(y, layer(x)) for y, layer in zip(mlp.gate_up(x), (mlp.gate_proj, mlp.up_proj)))


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_with_its_dequantized_weights(family, embedding):
    model = small_model(family, torch.float32)
    expected, ids = slow_logits(dequantized(model, embedding), [3, 1, 4, 1, 5]), torch.tensor([[3, 1, 4, 1, 5]])
    quantized = quantize(copy.deepcopy(model), embedding)
    for layer in quantized.modules():
        if isinstance(layer, Int8Linear):
            layer.few_rows = 0  # float32 throughout
    assert torch.allclose(quantized(ids)[0].double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_made_of_int8(family, embedding, dtype):
    """scale q by the definition; a tied output matrix is the rows that are looked up. As a model: alone, and to sample with."""
    model = small_model(family, torch.float32)
    expected = dequantized(model, embedding)
    if model.config.tied:
        expected.lm_head.weight = expected.embed_tokens.weight
    made = dequantize(quantize(copy.deepcopy(model), embedding), dtype)
    there, ids = expected.state_dict(), random_ids(1, 2, 9)
    for name, x in made.state_dict().items():
        norm = x.ndim < 2 or "positions" in name
        assert x.dtype == (torch.float32 if norm else dtype)
        torch.testing.assert_close(x.double(), there[name], rtol=2**-8 * (dtype == torch.bfloat16 and not norm), atol=0)
    assert made.config == model.config and not any(x.requires_grad for x in made.parameters())
    logits = to_sample_with(made, dtype)(ids).double()
    off = 1e-4 if dtype == torch.float32 else 0.05
    assert (logits - expected(ids)).abs().mean() < off * expected(ids).std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_faster_is_met_and_said(dtype, capsys):
    """auto takes a side by the ratios that it prints, and to meet them changes no model; a word decides without."""
    exported = quantize(small_model("llama", torch.float32, **WHOLE_STEPS))
    ids = random_ids(1, 2, 9)
    before = exported(ids)
    stays = stays_int8(exported, "here", "auto", dtype, (1, 5))
    said, name = capsys.readouterr().out, {torch.float32: "float32", torch.bfloat16: "bf16"}[dtype]
    one, five = map(
        float,
        re.fullmatch(r"int8 weights .*: of .* speed (\S+) times with 1 and (\S+) times with 5 rows\n", said).groups(),
    )
    assert ("stay int8" if stays else f"become {name}") in said and f"of {name}'s" in said
    assert stays == (one * five >= 1) or one * five == pytest.approx(1, abs=0.05)
    assert torch.equal(exported(ids), before)
    assert stays_int8(exported, "here", "int8", dtype, (1,)) and not stays_int8(exported, "here", "fp32", dtype, (1,))
    assert to_compute_with(exported, True, dtype) is exported
    as_dtype = to_compute_with(exported, False, dtype)
    assert not is_int8(as_dtype) and as_dtype.cache_dtype == dtype
    assert (as_dtype(ids) - before).abs().mean() < 0.1 * before.std()
    assert capsys.readouterr().out == ""


def test_int8_of_a_model_that_is_not():
    plain = small_model("llama", torch.float32)
    with pytest.raises(ValueError, match="--precision=int8: here has no int8 weights; export some"):
        stays_int8(plain, "here", "int8", torch.float32, (1,))
    assert not stays_int8(plain, "here", "auto", torch.float32, (1,))
    assert to_compute_with(plain, False, torch.float32) is plain


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_continues_a_text(family):
    """Token by token with a cache is the same as all at once by the same kernel, but for the order of float32 sums."""
    changes = WHOLE_STEPS | ({"kv_heads": 4} if family == "gpt2" else {})
    model, ids = quantize(small_model(family, torch.float32, **changes)), random_ids(1, 3, 9)
    cache = KVCache(model.config, 3, 9)
    steps = torch.cat([model(ids[:, t : t + 1], cache) for t in range(9)], 1)
    with decoding_path(model):
        whole = model(ids)
    # a sum that is rounded to bfloat16 the other way moves what follows
    assert (steps - whole).abs().mean() < 0.02 * whole.std()


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_a_text_is_the_same_alone_and_in_company(embedding):
    model = quantize(small_model("llama", torch.float32, **WHOLE_STEPS), embedding)
    prompts, lengths, draws = random_ids(5, 6, 4), torch.tensor([4, 1, 3, 2, 4, 4]), row_uniforms(1, 0, range(6), 8)
    with decoding_path(model):
        together = generate(model, prompts, lengths, Sampling(8, [], 0), draws)
        for row in range(6):
            own, length = slice(row, row + 1), lengths[row]
            alone = generate(model, prompts[own, :length], lengths[own], Sampling(8, [], 0), draws[own])
            assert torch.equal(alone.tokens[0], together.tokens[row, : length + 8])


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_stored_comes_back(family, embedding):
    model, ids = quantize(small_model(family, torch.float32), embedding), random_ids(1, 2, 12)
    tensors = {name: x.clone() for name, x in stored_tensors(model).items()}
    back = load_quantized(model.config, tensors, "here")
    assert torch.equal(back(ids), model(ids)) and torch.equal(back(ids[:1, :3]), model(ids[:1, :3]))
    assert not any(parameter.requires_grad for parameter in back.parameters())
    if model.config.tied:
        assert not any(name.startswith("lm_head") for name in tensors)


def test_tied_rows_are_shared_on_another_device():
    model = quantize(small_model("llama", torch.float32, tied=True), "int8")
    there = load_quantized(model.config, stored_tensors(model), "here", "meta")
    assert there.lm_head.weight is there.embed_tokens.weight and there.norm.weight.is_meta


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_another_architecture_is_refused(change):
    model = quantize(small_model("llama", torch.float32))
    tensors, name = stored_tensors(model), "layers.0.mlp.up_proj.weight"
    tensors |= {
        "shape": {name: tensors[name][:1]},
        "dtype": {name: tensors[name].float()},
        "extra": {"more": tensors[name]},
    }.get(change, {})
    if change == "missing":
        del tensors[name]
    with pytest.raises(
        ValueError, match=r"here is no int8 model .*: (more|layers.0.mlp.up_proj.weight) is .* there, .* here"
    ):
        load_quantized(model.config, tensors, "here")


def test_it_is_smaller():
    model = small_model("llama", torch.float32)
    before = sum(x.nbytes for x in model.state_dict().values())
    sizes = {e: sum(x.nbytes for x in stored_tensors(quantize(copy.deepcopy(model), e)).values()) for e in EMBEDDINGS}
    assert sizes["int8"] < sizes["bf16"] < 0.5 * before


def test_training_is_refused():
    model = quantize(small_model("llama", torch.float32))
    model.requires_grad_(True)  # as train_lm.py --init= asks for
    with torch.enable_grad(), pytest.raises(ValueError, match="int8 weights cannot be trained"):
        model(random_ids(1, 2, 12))


def test_twice_is_refused():
    with pytest.raises(ValueError, match="int8 already"):
        quantize(quantize(small_model("llama", torch.float32)))
