"""The middle of a gated MLP, f(gate) * up, of which training keeps gate and up alone.

    y = gated(F.silu, gate, up)
    with again(y):
        y = down_proj(y)  # what would be kept of y for the backward pass is computed again there

Plain autograd keeps gate, f(gate), up and their product, the widest numbers of a block. Half of them are two cheap passes over
the other half, with the same bits.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


SLOPES = {  # f -> (gradient of f(x), x) -> gradient of x, in the memory of the first
    F.silu: lambda grad, x: torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad),
    tanh_gelu: lambda grad, x: torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad),
}


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, f, slope):
        ctx.f, ctx.slope, ctx.opened = f, slope, None
        ctx.save_for_backward(gate, up)
        return f(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (gate, up, opened), ctx.opened = ctx.opened or reopened(ctx), None
        return ctx.slope(grad * up, gate), opened.mul_(grad), None, None


def reopened(ctx) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and f(gate). Once a pass: a checkpoint hands out what it kept no second time."""
    gate, up = ctx.saved_tensors
    return gate, up, ctx.f(gate)


def gated(f: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """f(gate) * up, of the same shape, f one of SLOPES."""
    return _Gated.apply(gate, up, f, SLOPES[f]) if torch.is_grad_enabled() else f(gate) * up


@contextlib.contextmanager
def again(y: Tensor) -> Iterator[None]:
    """Operations within it that would keep y = gated(...), or a view of all of it, for their backward keep nothing of it.

    Not around what a checkpoint computes again: of two pairs of hooks torch asks the inner one alone.
    """
    node = y.grad_fn
    if node is None or not y.is_contiguous():
        yield
        return
    place, size = y.data_ptr(), y.numel()

    def keep(x: Tensor) -> Tensor | torch.Size:  # knows no y: the graph holds on to this function
        return x.shape if x.data_ptr() == place and x.numel() == size and x.is_contiguous() else x

    def bring(x: Tensor | torch.Size) -> Tensor:
        if isinstance(x, Tensor):
            return x
        _, up, opened = node.opened = node.opened or reopened(node)  # its own backward, the next, wants them too
        return (opened * up).view(x)

    with torch.autograd.graph.saved_tensors_hooks(keep, bring):
        yield
