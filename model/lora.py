"""Low-rank adapters (LoRA, arXiv:2106.09685) on a frozen trunk: several named ones, on and off, merged, alone in a file.

A transform after build: the model file knows nothing of it. Parameters of the base keep their names, so a plain
checkpoint loads before or after; an adapter's are `<module>.lora_A.<adapter>` and `<module>.lora_B.<adapter>`.

    model = add_lora(model, rank=8, alpha=16, targets=("q_proj", "v_proj"), name="policy", generator=generator)
    activate(model, "policy")        # or None: the base, bit for bit
    hidden = model.trunk(ids)

The file format of PEFT is in model/peft.py.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.families import show_names
from model.hf import NoInit


class _Updated(torch.autograd.Function):
    # x W^T + b + scale (x A^T) B^T of frozen W and b, for training: with few rows, half of the time of the operations that
    # autograd would put together goes into casts, sums of gradients and calls. All of one type but A and B, see `put`. With
    # several pairs of A and B the rows come in as many equal blocks, one for each.

    @staticmethod
    def forward(ctx, x, weight, bias, scale, *factors):
        ctx.scale, ctx.dtype = scale, factors[0].dtype
        rows, factors = x.reshape(-1, x.shape[-1]), [w.to(x.dtype) for w in factors]  # (N, in)
        y = F.linear(x, weight, bias)  # as the base computes it, to the bit
        downs = []
        for A, B, block, out in blocks(factors, rows, y.view(-1, y.shape[-1])):
            downs.append(block @ A.t())  # (N / blocks, r)
            out.addmm_(downs[-1], B.t(), alpha=scale)
        ctx.save_for_backward(rows, weight, *factors, *downs)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, weight, *kept = ctx.saved_tensors
        count = len(kept) // 3
        factors, downs = kept[: 2 * count], kept[2 * count :]
        shape, grad = grad.shape[:-1], grad.reshape(-1, grad.shape[-1])
        with torch.autocast(grad.device.type, enabled=False):  # in the forward's type, wherever backward is called
            grad_x = torch.mm(grad, weight) if ctx.needs_input_grad[0] else None
            grads = []
            for (A, B, block, g), down, i in zip(blocks(factors, rows, grad), downs, range(count)):
                up = (g @ B).mul_(ctx.scale)  # (N / blocks, r), the gradient of `down`
                if grad_x is not None:
                    grad_x.chunk(count)[i].addmm_(up, A)
                grads += [(up.t() @ block).to(ctx.dtype), (g.t() @ down).mul_(ctx.scale).to(ctx.dtype)]
        return grad_x if grad_x is None else grad_x.view(*shape, -1), None, None, None, *grads


def blocks(factors: list[Tensor], *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A, B and an equal block of each of `rows` (N, ...), one after the other."""
    count = len(factors) // 2
    return zip(factors[::2], factors[1::2], *(x.chunk(count) for x in rows))


class LoRALinear(nn.Linear):
    """A linear layer with named low-rank updates, of which one or none is active.

    y = W x + b + scale B A x (eq. 3 there), scale = alpha / rank; A (r, in), B (out, r). W and b are those of the
    layer that it replaces, not copies.
    """

    def __init__(self, base: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scale: dict[str, float] = {}
        self.active: str | None = None
        self.beside: tuple[LoRALinear, ...] = ()  # see `beside`

    def put(self, name: str, A: Tensor, B: Tensor, scale: float) -> None:
        """A and B stay float32 (float64 on a float64 base) on a half-precision base: their updates are small."""
        to = {"device": self.weight.device, "dtype": torch.promote_types(self.weight.dtype, torch.float32)}
        self.lora_A[name], self.lora_B[name] = (nn.Parameter(x.detach().to(**to, copy=True)) for x in (A, B))
        self.scale[name] = scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype)
        if self.active not in self.lora_A:  # off, or an adapter that leaves this layer alone
            return F.linear(x, self.weight, self.bias)
        weight, bias = (w if w is None else w.to(x.dtype) for w in (self.weight, self.bias))
        if torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in (weight, bias)):
            raise ValueError(
                f"a layer ({self.in_features} to {self.out_features}) with an adapter has a weight or a bias that is not "
                "frozen: it would get no gradient; freeze it, or merge the adapter"
            )
        factors = [
            w for layer in (self, *self.beside) for w in (layer.lora_A[layer.active], layer.lora_B[layer.active])
        ]
        return _Updated.apply(x, weight, bias, self.scale[self.active], *factors)

    def merged(self, name: str) -> Tensor:
        """W + scale B A, computed in float32 at least, as W's type. (out, in)"""
        A, B = self.lora_A[name].detach(), self.lora_B[name].detach()
        return (self.weight.detach().to(A.dtype) + self.scale[name] * (B @ A)).to(self.weight.dtype)


# 1. adding, choosing, merging


def lora_layers(model: nn.Module, name: str | None = None) -> dict[str, LoRALinear]:
    """Path -> layer of all layers with adapters, or of those that `name` changes; ValueError where it changes none."""
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    if name is None:
        return layers
    chosen = {path: layer for path, layer in layers.items() if name in layer.lora_A}
    if not chosen:
        raise ValueError(f"there is no adapter {name!r}; there are: {', '.join(adapter_names(model)) or 'none'}")
    return chosen


def adapter_names(model: nn.Module) -> list[str]:
    return sorted({name for layer in lora_layers(model).values() for name in layer.lora_A})


def check_free(model: nn.Module, name: str) -> None:
    if not name.isidentifier() or hasattr(nn.ParameterDict, name):
        raise ValueError(f"{name!r} cannot name an adapter; use a word such as 'policy'")
    if name in adapter_names(model):
        raise ValueError(f"there is an adapter {name!r} already")


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def as_lora_layer(model: nn.Module, path: str) -> LoRALinear:
    """The layer at `path`, replaced in place unless it carries adapters already."""
    layer = model.get_submodule(path)
    if not isinstance(layer, LoRALinear):
        layer = LoRALinear(layer)
        replace_module(model, path, layer)
    return layer


def freeze_base(model: nn.Module) -> None:
    for path, parameter in model.named_parameters():
        if ".lora_" not in path:
            parameter.requires_grad_(False)


@torch.no_grad()
def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Iterable[str] | None = None,
    name: str = "default",
    generator: torch.Generator | None = None,
    rslora: bool = False,
) -> nn.Module:
    """Put an adapter on every linear layer whose last name is in `targets` (None: all in the blocks); -> the model.

    Scale alpha / rank, or alpha / sqrt(rank) with `rslora` (arXiv:2312.03732). A is uniform in +-1/sqrt(in), which is
    Kaiming's with a = sqrt(5), and B zero: the adapter starts as no change. All other parameters of `model` are frozen.
    It starts inactive, see `activate`. ValueError for a target that no layer has, or a name that is taken.
    """
    check_free(model, name)
    if rank < 1:
        raise ValueError(f"rank {rank} must be at least 1")
    linear = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    known = {path.rpartition(".")[2] for path in linear}
    if unknown := sorted(set(targets or ()) - known):
        raise ValueError(f"no linear layer is called {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    for path in linear:
        if path.rpartition(".")[2] in targets if targets is not None else "layers." in path:
            layer = as_lora_layer(model, path)
            shape = (rank, layer.in_features)
            device = generator.device if generator is not None else None  # every device starts from the same numbers
            A = (2 * torch.rand(shape, generator=generator, device=device) - 1) / math.sqrt(layer.in_features)
            scale = alpha / math.sqrt(rank) if rslora else alpha / rank
            layer.put(name, A, torch.zeros(layer.out_features, rank), scale)
    freeze_base(model)
    return model


def activate(model: nn.Module, name: str | None) -> None:
    """From now on the model computes with this adapter; None: as the base, bit for bit. ValueError if there is none."""
    if name is not None:
        lora_layers(model, name)
    for layer in lora_layers(model).values():
        layer.active = name


@contextlib.contextmanager
def beside(model: nn.Module, other: nn.Module) -> Iterator[None]:
    """Within it, the second half of `model`'s rows is computed with the active adapter of `other`, on the same frozen trunk.

    Both have adapters of one scale on the same layers. A frozen matrix is then read once for both: with few rows, reading
    is what it costs.
    """
    pairs = [(layer, other.get_submodule(path)) for path, layer in lora_layers(model).items()]
    for layer, second in pairs:
        layer.beside = (second,)
    try:
        yield
    finally:
        for layer, _ in pairs:
            layer.beside = ()


@torch.no_grad()
def merge(model: nn.Module, name: str | None) -> nn.Module:
    """Add the adapter to the weights and make plain linear layers again, in place; all adapters are gone; -> the model.

    None: the base as it was. Parameters stay frozen or trainable as they were; the base's tensors are not written to.
    """
    changed = lora_layers(model, name) if name is not None else {}
    for path, layer in lora_layers(model).items():
        with NoInit():
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        if path in changed:  # a new tensor: the old one may be another model's too, or a file's
            plain.weight = nn.Parameter(layer.merged(name), layer.weight.requires_grad)
        replace_module(model, path, plain)
    return model


# 2. adapters alone


def adapter_scale(model: nn.Module, name: str) -> float:
    """alpha / rank of an adapter."""
    return next(iter(lora_layers(model, name).values())).scale[name]


def load_adapter(model: nn.Module, tensors: dict[str, Tensor], scale: float, name: str = "default") -> nn.Module:
    """Put a stored adapter on the model, as `add_lora` does; -> the model.

    tensors: {"layers.0.self_attn.q_proj.lora_A": (r, in), "... .lora_B": (out, r)}, without the adapter's name.
    ValueError where it names a layer that is not there, in other shapes, with several ranks or one of A and B alone.
    """
    check_free(model, name)
    linear = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if not tensors:
        raise ValueError("the adapter is empty")
    paths = list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
    expected = {f"{path}.{which}" for path in paths for which in ("lora_A", "lora_B")}
    if unknown := [path for path in paths if path not in linear]:
        raise ValueError(f"the adapter changes {len(unknown)} layers that this model has not: {show_names(unknown)}")
    if odd := expected ^ tensors.keys():
        raise ValueError(f"the adapter's A and B do not match: {show_names(odd)}")
    rank = len(tensors[f"{paths[0]}.lora_A"])
    for path in paths:
        layer = linear[path]
        for which, shape in (("lora_A", (rank, layer.in_features)), ("lora_B", (layer.out_features, rank))):
            found = tuple(tensors[f"{path}.{which}"].shape)
            if found != shape:
                raise ValueError(f"the adapter's {path}.{which} has shape {found}; {shape} was expected")
    for path in paths:
        as_lora_layer(model, path).put(name, tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"], scale)
    freeze_base(model)
    return model
