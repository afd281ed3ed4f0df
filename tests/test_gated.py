"""The gated MLP's middle against plain autograd: the same bits, and less kept."""

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model.gated import SLOPES, again, gated
from model.lora import activate, add_lora
from model.transformer import ModelConfig, Transformer, recompute_blocks

pytestmark = pytest.mark.bits


def inputs(dtype) -> tuple[list[torch.Tensor], torch.nn.Linear]:
    """Gate and up as matrices make them of x, and what comes after."""
    generator = torch.Generator().manual_seed(0)
    x, *weights = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, 5, 8), (12, 8), (12, 8), (8, 12))
    )
    down = torch.nn.Linear(12, 8, bias=False, dtype=dtype)
    down.weight.data = weights.pop()
    return [x, *(w.requires_grad_() for w in weights)], down


def plain(f, x, gate, up, down):
    return down(f(F.linear(x, gate)) * F.linear(x, up))


def ours(f, x, gate, up, down):
    y = gated(f, F.linear(x, gate), F.linear(x, up))
    with again(y):
        return down(y)


def numbers(way, f, given, down) -> list[torch.Tensor]:
    y = way(f, *given, down)
    return [
        y.detach(),
        *torch.autograd.grad(y.float().square().sum(), [*given[1:], *down.parameters()], allow_unused=True),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("f", SLOPES, ids=lambda f: f.__name__)
def test_value_and_gradients_have_the_bits_of_autograd(f, dtype):
    given, down = inputs(dtype)
    for a, b in zip(numbers(ours, f, given, down), numbers(plain, f, given, down)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("f", SLOPES, ids=lambda f: f.__name__)
def test_within_a_checkpoint_too(f):
    given, down = inputs(torch.float32)
    within = numbers(lambda *args: checkpoint(ours, *args, use_reentrant=False), f, given, down)
    for a, b in zip(within, numbers(plain, f, given, down)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_product_is_not_kept(adapter, bf16):
    """By a layer, trained or frozen with an adapter, in float32 and under autocast: its storage goes with the last name."""
    given, down = inputs(torch.float32)
    layer = torch.nn.ModuleDict({"down": down})
    if adapter:
        add_lora(layer, 2, 4, ("down",), "a", torch.Generator().manual_seed(1))
        activate(layer, "a")
    x, gate, up = given
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        gates = F.linear(x, gate), F.linear(x, up)
        kept = gated(F.silu, *gates)
        product = gated(F.silu, *gates)
        there, gone = (StorageWeakRef(y.untyped_storage()) for y in (kept, product))
        with again(product):
            out = layer["down"](product)
        other = layer["down"](kept)
        del product, kept
    assert gone.expired() and not there.expired()
    sums = [torch.autograd.grad(y.float().square().sum(), (gate, up), retain_graph=True) for y in (out, other)]
    assert all(torch.equal(a, b) for a, b in zip(*sums))


def test_a_checkpoint_keeps_none_of_the_casts_of_its_blocks():
    """Under autocast, of a model that recomputes: what autocast made of the weights goes with the forward."""
    model = Transformer(ModelConfig(17, 32, layers=3, heads=2, ffn=48, kv_heads=2))
    model.init_weights(torch.Generator().manual_seed(0))
    recompute_blocks(model)
    made: list[StorageWeakRef] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if function is torch.ops.aten._to_copy.default and out.shape == (32, 48):  # of down_proj's weight
                made.append(StorageWeakRef(out.untyped_storage()))
            return out

    with torch.autocast("cpu", torch.bfloat16), Watch():
        hidden = model.trunk(torch.arange(6)[None])
    assert len(made) >= 3 and all(x.expired() for x in made)
    hidden.float().sum().backward()


def test_other_tensors_are_kept_as_they_are():
    """One of another size that begins where the product does, one that lies transposed, a product that needs no gradient."""
    given, down = inputs(torch.float32)
    y = gated(F.silu, F.linear(given[0], given[1]), F.linear(given[0], given[2]))
    with again(y):
        turned = y.flatten(0, 1).t()
        found = (y[:1].exp() * y[:1]).sum() + down(y.view(10, 12)).sum() + (turned.sin() * turned).sum()
    expected = (y[:1].exp() * y[:1]).sum() + down(y).sum() + (y.sin() * y).sum()
    for a, b in zip(*(torch.autograd.grad(x, given[1:], retain_graph=True) for x in (found, expected))):
        torch.testing.assert_close(a, b)
    column = gated(
        F.silu, F.linear(given[0], given[1])[0].t(), F.linear(given[0], given[2])[0].t()
    )  # as the matrix lies
    with again(column):
        found = (column.t().sin() * column.t()).sum()
    expected = (column.t().sin() * column.t()).sum()
    for a, b in zip(*(torch.autograd.grad(x, given[1:], retain_graph=True) for x in (found, expected))):
        assert torch.equal(a, b)
    constant = gated(F.silu, given[0], given[0])
    with again(constant):
        constant = torch.nn.Linear(8, 3)(constant)
    constant.sum().backward()
