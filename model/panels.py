"""Weights laid out once for the products of many decoding steps, on a CPU.

    keep_panels(model)                    # of a model in float32 that nobody trains, or that sleeps while it is trained
    model.panels.lay(16, steps=100)       # for steps of 16 rows
    with model.panels:
        hidden = decoding.step(ids, model.panels.filled(len(ids)))[: len(ids)]

A library brings a weight matrix into panels, the order in which its kernel reads, anew in every product; with few rows that
takes up to a third of it. Packed products keep them. Two libraries have some: MKL's are for one number of rows, take several
times the bytes of a weight and gain more on Intel's CPUs, where nobody trains beside them; oneDNN's are for any and take the
same bytes again. Active adapters are merged into them. What they are not made for meets the layers as they are.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from model.lora import LoRALinear, lora_layers
from model.transformer import Transformer

FEWEST, MOST = 4, 64  # rows with which packed products were measured to gain
FEW = 16  # rows that oneDNN's panels are made for
LARGEST = 2 << 30  # bytes of the matrices: a second copy of more may not fit
WIDTH = 512  # of the model: smaller matrices stay in a CPU's caches, and gain nothing
STEPS = 16  # making panels takes as long as they save in about 10 steps of 16 rows


class Product:
    """Linear layers of the same x as one product with oneDNN's panels, for any number of rows: of what the layers are now,
    made at the first product, and anew where a weight has changed.
    """

    def __init__(self, layers: list[nn.Module], dtype: torch.dtype = torch.float32):
        self.layers, self.dtype, self.sizes = layers, dtype, [len(layer.weight) for layer in layers]
        self.numbers = [x for layer in layers for x in layer.parameters()]
        self.drop()

    def __call__(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.known != versions(self.numbers):
            self.lay()
        y = self.multiply(x.to(self.dtype))
        return y if len(self.sizes) == 1 else y.split(self.sizes, -1)

    @torch.no_grad()
    def lay(self) -> None:
        self.known = versions(self.numbers)
        biases = [x for layer in self.layers if (x := getattr(layer, "bias", None)) is not None]
        self.bias = torch.cat(biases).to(self.dtype) if biases else None  # (N,); all have one, or none
        self.pack(torch.cat([merged(layer).to(self.dtype) for layer in self.layers]))  # (N, K)

    def drop(self) -> None:
        self.known = self.panels = self.bias = None

    def pack(self, weight: Tensor) -> None:
        self.panels = packed(weight)

    def multiply(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.panels, self.bias)


class ProductOfRows(Product):
    """The same with MKL's, for one number of rows; `plain` is what others meet."""

    def __init__(self, layers: list[nn.Linear], rows: int, plain):
        super().__init__(layers)
        self.rows, self.plain = rows, plain

    def pack(self, weight: Tensor) -> None:
        self.panels = torch.ops.mkl._mkl_reorder_linear_weight(weight, self.rows)
        self.shape = weight.new_empty(1).expand(weight.shape)  # all that is read of a weight whose panels fit

    def __call__(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return super().__call__(x) if x.numel() == self.rows * x.shape[-1] else self.plain(x)

    def multiply(self, x: Tensor) -> Tensor:
        return torch.ops.mkl._mkl_linear(x, self.panels, self.shape, self.bias, self.rows)


def versions(numbers: list[Tensor]) -> list[tuple[int, int]]:
    """What is another list where one of the numbers was changed in place, or lies elsewhere."""
    return [(x.data_ptr(), x._version) for x in numbers]


def packed(weight: Tensor) -> Tensor:
    """oneDNN's panels of a weight (N, K): opaque, with the bytes of the weight. Made for few rows, and right for many."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, FEW)


def packed_linear(x: Tensor, panels: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by oneDNN's panels. (..., K), panels of (N, K), (N,) -> (..., N)"""
    return torch.ops.mkldnn._linear_pointwise(x, panels, bias, "none", [], "")


def can_pack(dtype: torch.dtype) -> bool:
    """Does oneDNN have panels of this type for this CPU?"""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


@cache
def intel() -> bool:
    """Does MKL have its best kernels for this CPU? Where nobody says who made it, it is taken for one of Intel's."""
    try:
        return "AuthenticAMD" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


def merged(layer: nn.Linear) -> Tensor:
    active = isinstance(layer, LoRALinear) and layer.active in layer.lora_A
    return layer.merged(layer.active) if active else layer.weight.detach()


class Panels:
    """The panels of a model's matrices. Within the context its layers multiply with them. any_rows: by oneDNN's."""

    def __init__(self, model: Transformer, any_rows: bool):
        self.model, self.layers, self.any_rows = model, list(model.layers), any_rows
        self.weights = [*model.layers.parameters(), output_of(model).weight]
        self.adapters = list(lora_layers(model).values())
        self.sleep()

    def sleep(self) -> None:
        """The panels give their memory back, until they are laid again."""
        self.known = None  # the weights and adapters that the panels were made of
        self.rows = 0  # that the panels are made for; 0: there are none
        self.products: list[tuple[nn.Module, str, Product]] = []  # what stands in for which method

    @torch.no_grad()
    def lay(self, rows: int, steps: int) -> None:
        """For steps of so many rows, at most so many steps. Panels that are there already stay, if they fit."""
        known = versions(self.weights) + [layer.active for layer in self.adapters]
        if known == self.known and (rows == self.rows or self.rows and self.any_rows):
            return
        self.sleep()  # which frees the old ones first
        self.known = known
        if FEWEST <= rows <= MOST and steps >= STEPS:
            self.rows = rows
            if self.any_rows:
                self.put(self.model, "project", [output_of(self.model)])
            for block in self.layers:
                attention, mlp = block.self_attn, block.mlp
                self.put(attention, "qkv", [attention.q_proj, attention.k_proj, attention.v_proj])
                self.put(attention.o_proj, "forward", [attention.o_proj])
                if mlp.gate_proj is None:
                    self.put(mlp.up_proj, "forward", [mlp.up_proj])
                else:
                    self.put(mlp, "gate_up", [mlp.gate_proj, mlp.up_proj])
                self.put(mlp.down_proj, "forward", [mlp.down_proj])

    def put(self, module: nn.Module, method: str, layers: list[nn.Linear]) -> None:
        product = Product(layers) if self.any_rows else ProductOfRows(layers, self.rows, getattr(module, method))
        self.products.append((module, method, product))

    def filled(self, rows: int) -> int:
        """Of how many rows a step of `rows` is best made, with some that nobody reads: of those of the panels, or as it is."""
        return self.rows if rows <= self.rows < 2 * rows and not self.any_rows else rows

    def __enter__(self) -> None:
        for module, method, product in self.products:
            module.__dict__[method] = product

    def __exit__(self, *failure) -> None:
        for module, method, _ in self.products:
            del module.__dict__[method]


def keep_panels(model: Transformer, trains: bool = False) -> Transformer:
    """The same model, whose steps in `generate` multiply with panels where that gains: float32 on a CPU, matrices large
    enough, and not too many. They stay between two calls, until rows or weights are others.

    trains: between the calls it does; whoever trains it lets them sleep.
    """
    mkl = torch.backends.mkl.is_available() and intel() and not trains
    if output_of(model).weight.is_cpu and gain(model) and (mkl or can_pack(torch.float32)):
        model.panels = Panels(model, any_rows=not mkl)
    return model


def gain(model: Transformer) -> bool:
    """Are the model's matrices such that a CPU gains by panels of them?"""
    matrices = matrices_of(model)
    small = sum(x.weight.nbytes for x in matrices) <= LARGEST
    return model.config.width >= WIDTH and small and all(map(fits, matrices))


def matrices_of(model: Transformer) -> list[nn.Module]:
    """The layers that there are panels of: of the blocks, and the output matrix."""
    layers = [x for block in model.layers for x in block.modules() if hasattr(x, "weight") and x.weight.ndim == 2]
    return [*layers, output_of(model)]


def output_of(model: Transformer) -> nn.Module:
    """What has the output matrix (V, D)."""
    return model.lm_head or model.embed_tokens


def fits(layer: nn.Module) -> bool:
    weight = layer.weight
    plain = type(layer) in (nn.Linear, LoRALinear, nn.Embedding) and type(weight) is nn.Parameter
    return plain and weight.dtype == torch.float32
