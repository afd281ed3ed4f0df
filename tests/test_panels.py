"""Packed products of a decoding step against the plain layers: the same texts, in any family, while rows end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import FAMILIES, random_ids, small_model

from model import panels
from model.generate import Sampling, generate, row_uniforms
from model.half import to_sample_with
from model.lora import activate, add_lora
from model.panels import Panels, Product
from rlhf.infra import optim
from rlhf.lm.trunks import LoRA
from rlhf.ppo.roles import CRITICS, LAYOUTS

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch was built without MKL")
KINDS = [pytest.param(True, id="mkl", marks=needs_mkl), pytest.param(False, id="onednn")]

PROMPTS = torch.stack([random_ids(i, 6) for i in range(8)])
LENGTHS = torch.tensor([6, 3, 6, 1, 5, 6, 2, 6])


@pytest.fixture(params=KINDS)
def small(monkeypatch, request):
    """Matrices of any size are laid out; -> the numbers of rows that the panels of a first product were made for."""
    monkeypatch.setattr(panels, "intel", lambda: request.param)
    rows, make = [], panels.Panels.put

    def put(self, module, method, layers):
        if method == "qkv" and module.layer == 0:
            rows.append(self.rows)
        make(self, module, method, layers)

    monkeypatch.setattr(panels, "WIDTH", 0)
    monkeypatch.setattr(panels, "STEPS", 4)
    monkeypatch.setattr(panels.Panels, "put", put)
    return rows


def texts(model, at_once=8):
    sampling = Sampling(20, (3,), 0)
    return generate(model, PROMPTS, LENGTHS, sampling, row_uniforms(1, 0, range(8), 20), at_once)


def with_adapters(model):
    """Of it, some layers without one, and nothing zero."""
    model = add_lora(model, 2, 4, ("q_proj", "o_proj", "up_proj"), "a", torch.Generator().manual_seed(1))
    for name, x in model.named_parameters():
        if ".lora_" in name:
            x.data = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(len(name)))
    activate(model, "a")
    return model


@pytest.mark.parametrize("change", [lambda model: model, with_adapters], ids=["plain", "adapters"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_the_plain_layers(family, change, small):
    model = change(small_model(family, torch.float32))
    plain = texts(model)
    assert not small
    model = to_sample_with(model, torch.float32)
    found = texts(model)
    assert small, "nothing was laid out"
    waiting = texts(model, at_once=5)
    for out in (found, waiting):
        assert torch.equal(out.tokens, plain.tokens) and torch.equal(out.finished, plain.finished)
        assert torch.allclose(out.logprobs, plain.logprobs, atol=2e-4)


@pytest.mark.parametrize("small", KINDS[:1], indirect=True)
def test_panels_are_kept_for_one_number_of_rows(small):
    """8 rows are filled up to 8 until 4 are left. Too few rows or steps make none, and so do too many rows."""
    laid, found = Panels(small_model("llama", torch.float32), any_rows=False), []
    for rows, steps in ((8, 9), (8, 1), (5, 4), (5, 3), (3, 9), (4, 3), (4, 4), (4, 4), (200, 4)):
        laid.lay(rows, steps)
        found.append(laid.rows)
        assert bool(laid.products) == bool(laid.rows)
    assert found == [8, 8, 5, 5, 0, 0, 4, 4, 0] and small == [8, 5, 4]
    laid.lay(8, 9)
    assert [laid.filled(n) for n in (9, 8, 5, 4, 1)] == [9, 8, 8, 4, 1]


@pytest.mark.parametrize("small", KINDS[1:], indirect=True)
def test_panels_for_any_number_of_rows_are_made_once(small):
    laid = Panels(small_model("llama", torch.float32), any_rows=True)
    for rows, steps in ((3, 9), (8, 3), (8, 9), (5, 4), (3, 1), (200, 4)):
        laid.lay(rows, steps)
    assert small == [8] and [laid.filled(n) for n in (9, 8, 5, 1)] == [9, 8, 5, 1]


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 40), st.booleans(), st.integers(0, 10**6))
def test_a_packed_product_is_the_plain_one(rows, K, N, bias, seed):
    """Of rows in any order in memory, for which the panels were not made."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((2, K, rows), (N, K)))
    x, b = x.transpose(1, 2), torch.randn(N, generator=generator) if bias else None
    y = panels.packed_linear(x, panels.packed(weight), b)
    assert y.is_contiguous()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, b), rtol=1e-5, atol=1e-4)


def test_the_model_is_left_as_it_was(small):
    model = to_sample_with(small_model("llama", torch.float32), torch.float32)
    texts(model)
    assert small and not left_behind(model)
    model.panels.lay(8, 10)
    with pytest.raises(KeyError), model.panels:
        assert left_behind(model)
        raise KeyError
    assert not left_behind(model)


def test_other_weights_get_other_panels(small):
    """Between two calls the panels stay, but not those of weights or adapters that have changed in place."""
    model, changed = (to_sample_with(small_model("llama", torch.float32, seed), torch.float32) for seed in (0, 1))
    for _ in range(2):
        texts(model)
    first = small.copy()
    model.load_state_dict(changed.state_dict())
    assert torch.equal(texts(model).tokens, texts(changed).tokens)
    assert first == [8] and small == [8, 8, 8]  # one of them of `changed`
    model = to_sample_with(with_adapters(small_model("llama", torch.float32)), torch.float32)
    adapted = texts(model).logprobs
    activate(model, None)
    assert not torch.equal(texts(model).logprobs, adapted) and small[3:] == [8, 8]


@pytest.mark.parametrize("small", KINDS[1:], indirect=True)
def test_the_output_matrix_has_panels_too(small):
    """Of a tied model and of one with a head of its own; MKL's would take too much."""
    for family in ("llama", "gemma2"):
        model = to_sample_with(small_model(family, torch.float32), torch.float32)
        model.panels.lay(8, 9)
        output = model.lm_head or model.embed_tokens
        assert [x.layers for module, name, x in model.panels.products if name == "project"] == [[output]]
    model = panels.Panels(model, any_rows=False)
    model.lay(8, 9)
    assert model.products and not [name for _, name, _ in model.products if name == "project"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_policy_that_trains_samples_with_panels_of_its_weights_of_now(layout, family, small):
    """Where all of it trains, and gradients will be as large; they are gone while nobody samples."""
    roles = LAYOUTS[layout](small_model(family, torch.float32), CRITICS[layout], 1.0, LoRA(2), 1)
    beside = roles.stored_in(torch.float32, alone=False)
    elsewhere = roles.stored_in(torch.float32, sampler=False)
    assert not hasattr(beside.sampler(), "panels") and not hasattr(elsewhere.sampler(), "panels")
    roles = roles.stored_in(torch.float32)
    model = roles.sampler()
    assert hasattr(model, "panels") == (layout in ("full", "shared"))
    if not hasattr(model, "panels"):
        return
    optimizer = optim.make_optimizer(model, 0.01)
    for step in range(3):
        found = texts(model)
        assert model.panels.any_rows and model.panels.products and len(small) == step + 1
        roles.rest()
        assert not model.panels.products
        kept = model.__dict__.pop("panels")
        plain = texts(model)
        model.panels = kept
        assert torch.equal(found.tokens, plain.tokens)
        assert torch.allclose(found.logprobs, plain.logprobs, atol=2e-4)
        for x in model.parameters():
            x.grad = torch.ones_like(x)
        optim.step(optimizer, model, optim.amp(torch.device("cpu")).scaler, 0.0)


@pytest.mark.parametrize("small", KINDS[1:], indirect=True)
def test_a_step_of_the_optimiser_is_seen(small):
    """By whoever did not let the panels sleep: the kernel itself does not count up a version."""
    model = panels.keep_panels(small_model("llama", torch.float32), trains=True)
    texts(model)
    for x in model.parameters():
        x.grad = torch.ones_like(x)
    optim.step(optim.make_optimizer(model, 0.1), model, optim.amp(torch.device("cpu")).scaler, 0.0)
    texts(model)
    assert len(small) == 2


def left_behind(model):
    return [x for module in model.modules() for x in vars(module).values() if isinstance(x, Product)]


def test_who_gains_nothing_is_left_alone(small, monkeypatch):
    for kind in (torch.float64, torch.bfloat16):
        texts(panels.keep_panels(small_model("llama", kind)))
    with torch.autocast("cpu", torch.bfloat16):
        texts(panels.keep_panels(small_model("llama", torch.float32)))
    monkeypatch.setattr(panels, "LARGEST", 1000)
    texts(panels.keep_panels(small_model("llama", torch.float32)))
    assert not small
