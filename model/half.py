"""Half precision where it costs nothing: frozen matrices stored in it, and a copy of a model for sampling.

    store(model, torch.bfloat16)         # frozen matrices, in place, for every model that shares them
    copy = half_copy(policy, torch.bfloat16)  # copy.refresh() -> a model to sample with, of the policy's weights of now
    copy.sleep()                         # its memory is free until it samples again

Transforms of a built model; the model file mentions neither. Matrices, biases of linear layers and the embedding get the
type, norms and learned positions stay float32, and so do the hidden states between the layers. A product then is what
autocast makes of it (both factors rounded to half precision, added up in float32), with or without autocast around it.
"""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.lora import LoRALinear, replace_module
from model.panels import LARGEST, Product, can_pack, keep_panels, output_of
from model.transformer import Transformer

FEW_ROWS = 256  # up to so many, a CPU multiplies weights as they lie


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for sampling, all in one type, where no panels are kept. (..., K), (N, K), (N,) -> (..., N)

    Few rows of bfloat16 on a CPU as (W x^T)^T: F.linear packs the weights anew in every call, this reads them where they lie,
    1.4 to 2 times as fast with AMX. The result lies transposed in memory. Its last bits are not F.linear's, so what is
    judged and learned, whose first ratio must be 1, does not pass here.
    """
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    if not (x.is_cpu and x.dtype == torch.bfloat16 and 1 < len(rows) <= FEW_ROWS):
        return F.linear(x, weight, bias)
    # (N, M); the bias before rounding, as there
    y = torch.mm(weight, rows.t()) if bias is None else torch.addmm(bias[:, None], weight, rows.t())
    return y.t().unflatten(0, x.shape[:-1])


class HalfLinear(nn.Linear):
    """nn.Linear whose weight and bias are in half precision; x may be in any type."""

    samples = False  # a layer of a copy that only samples

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return (product if self.samples else F.linear)(x.to(self.weight.dtype), self.weight, self.bias)


class Joint:
    """Several linear layers of the same x, by one product with all their rows: weight (N1 + N2 + ..., K)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: list[int], contiguous: bool = False):
        self.weight, self.bias, self.sizes, self.contiguous = weight, bias, sizes, contiguous

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        y = product(x.to(self.weight.dtype), self.weight, self.bias)
        return (y.contiguous() if self.contiguous else y).split(self.sizes, -1)


@torch.no_grad()
def store(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Frozen matrices in `dtype` from here on, in place, also for other models that share these parameters; -> the model.

    What is trained stays as it is, and so do adapters. float32 changes nothing.
    """
    if dtype == torch.float32:
        return model
    for path, layer in linear_layers(model):
        if not layer.weight.requires_grad:
            for x in (layer.weight, layer.bias):
                to_half(x, dtype)
            if type(layer) is nn.Linear:
                replace_module(model, path, HalfLinear(layer.weight, layer.bias))
    if isinstance(model.embed_tokens, nn.Embedding) and not model.embed_tokens.weight.requires_grad:
        to_half(model.embed_tokens.weight, dtype)
    return model


def store_all(models: Iterable[Transformer], dtype: torch.dtype) -> None:
    for model in models:
        store(model, dtype)


def to_sample_with(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The same model, which nobody trains, by `Half`, or in float32 with panels; int8 models stay as they are."""
    if not isinstance(model.embed_tokens, nn.Embedding):
        return model
    if dtype == torch.float32:
        return keep_panels(model)
    return half_copy(model.requires_grad_(False), dtype).refresh()


def to_half(x: Tensor | None, dtype: torch.dtype) -> None:
    if x is not None and x.dtype != dtype:
        x.data = x.data.to(dtype)


def linear_layers(model: Transformer) -> list[tuple[str, nn.Linear]]:
    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]


class Half:
    """A copy of `source` to sample with: matrices in `dtype`, q-k-v and gate-up joined, active adapters merged.

    What is frozen is stored in `dtype` from here on, in the source too, and shared with it, as norms and learned positions
    are. `refresh` copies what was trained.
    """

    @torch.no_grad()
    def __init__(self, source: Transformer, dtype: torch.dtype):
        store(source, dtype)
        self.dtype, self.model = dtype, copy.deepcopy(source, {id(x): x for x in source.parameters()})
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (in the copy, in the source)
        self.sums: list[tuple[Tensor, LoRALinear]] = []  # (in the copy, the layer whose adapter is merged into it)
        for block in self.model.layers:
            attention, mlp = block.self_attn, block.mlp
            # kernels of attention want the numbers of a head side by side
            attention.qkv = self.join(attention, "q_proj", "k_proj", "v_proj", contiguous=True)
            self.alone(attention, "o_proj")
            if mlp.gate_proj is None:
                self.alone(mlp, "up_proj")
            else:
                mlp.gate_up = self.join(mlp, "gate_proj", "up_proj")
            self.alone(mlp, "down_proj")
        if self.model.lm_head is not None:
            self.alone(self.model, "lm_head")
        embedding = self.model.embed_tokens.weight
        if embedding.requires_grad:
            self.model.embed_tokens.weight = frozen(self.copied(embedding))
        self.model.project = self.project
        theirs = {x.untyped_storage()._cdata for x in source.parameters()}
        mine = [x.untyped_storage() for x, _ in (*self.pairs, *self.sums)]
        self.own = {x._cdata: (x, x.nbytes()) for x in mine if x._cdata not in theirs}

    def project(self, hidden: Tensor) -> Tensor:
        return product(hidden.to(self.dtype), output_of(self.model).weight).contiguous()  # a row's logits side by side

    def alone(self, module: nn.Module, name: str) -> None:
        """This layer of a module, by products of its own."""
        if type(getattr(module, name)) is not HalfLinear:
            self.join(module, name)
        getattr(module, name).samples = True

    def join(self, module: nn.Module, *names: str, contiguous: bool = False) -> Joint:
        """The layers of these names put into one matrix, of which each then has its rows."""
        layers = [getattr(module, name) for name in names]
        weight = torch.cat([layer.weight.detach().to(self.dtype) for layer in layers])  # (N, K)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        bias = torch.cat([x.detach().to(self.dtype) for x in biases]) if biases else None  # (N,); all have one, or none
        sizes = [layer.out_features for layer in layers]
        rows = zip(names, layers, weight.split(sizes), bias.split(sizes) if biases else [None] * len(layers))
        for name, layer, w, b in rows:
            setattr(module, name, self.layer(layer, w, b))
        return Joint(weight, bias, sizes, contiguous)

    def layer(self, layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> HalfLinear:
        """`layer` of the copy, with these numbers for its own."""
        if type(layer) is HalfLinear:  # frozen: the source reads them there too
            layer.weight.data = weight
            if bias is not None:
                layer.bias.data = bias
            return layer
        if isinstance(layer, LoRALinear):
            self.sums.append((weight, layer))
        else:
            self.pairs.append((weight, layer.weight))
        if bias is not None:
            self.pairs.append((bias, layer.bias))
        return HalfLinear(frozen(weight), frozen(bias))

    def copied(self, x: nn.Parameter) -> Tensor:
        mine = x.detach().to(self.dtype)
        self.pairs.append((mine, x))
        return mine

    @torch.no_grad()
    def refresh(self) -> Transformer:
        """The copy, with what the source holds now."""
        for storage, size in self.own.values():
            storage.resize_(size)
        if self.pairs:
            torch._foreach_copy_(*map(list, zip(*self.pairs)))
        for mine, layer in self.sums:
            mine.copy_(layer.merged(layer.active) if layer.active in layer.lora_A else layer.weight)
        return self.model

    def sleep(self) -> None:
        """What the copy does not share gives its memory back, until `refresh`."""
        for storage, _ in self.own.values():
            storage.resize_(0)


class PackedHalf(Half):
    """The same on a CPU that has panels of `dtype`: all products are by them, and the copy's only matrix is the embedding.
    Panels are made at each refresh, of the source's layers, and are gone when it sleeps.
    """

    def __init__(self, source: Transformer, dtype: torch.dtype):
        self.products: list[Product] = []
        super().__init__(source, dtype)
        self.output = self.model.lm_head or self.pack(self.model.embed_tokens)

    def project(self, hidden: Tensor) -> Tensor:
        return self.output(hidden)

    def pack(self, *layers: nn.Module) -> Product:
        self.products.append(Product(list(layers), self.dtype))
        return self.products[-1]

    def join(self, module: nn.Module, *names: str, contiguous: bool = False) -> Product:
        layers = [getattr(module, name) for name in names]
        for name, layer in zip(names, layers):
            if type(layer) is not HalfLinear:  # numbers that are nowhere: not even the type is the source's
                kept = (
                    None if x is None else frozen(x.detach().to("meta", self.dtype)) for x in (layer.weight, layer.bias)
                )
                setattr(module, name, HalfLinear(*kept))
        return self.pack(*layers)

    def alone(self, module: nn.Module, name: str) -> None:
        getattr(module, name).forward = self.join(module, name)

    def refresh(self) -> Transformer:
        super().refresh()
        for product in self.products:
            product.lay()
        return self.model

    def sleep(self) -> None:
        super().sleep()
        for product in self.products:
            product.drop()


def half_copy(source: Transformer, dtype: torch.dtype) -> Half:
    """The copy that samples fastest on the source's device."""
    on_cpu = source.embed_tokens.weight.is_cpu
    return (PackedHalf if on_cpu and has_room_for_panels(source, dtype) else Half)(source, dtype)


def has_room_for_panels(source: Transformer, dtype: torch.dtype) -> bool:
    """Does a copy on a CPU keep panels: has it some of the type, and are they not too many?"""
    return can_pack(dtype) and sum(dtype.itemsize * x.numel() for x in source.parameters() if x.ndim == 2) <= LARGEST


def frozen(x: Tensor | None) -> nn.Parameter | None:
    return None if x is None else nn.Parameter(x, requires_grad=False)
