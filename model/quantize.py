"""Weight-only int8: every row of a matrix as int8 numbers and one scale, w ~ scale q. For sampling and scoring.

model = quantize(model) transforms a built model in place; the model file mentions nothing of it. Norms, biases and learned
positions keep their dtype. The embedding is kept as bfloat16, or as int8 rows; a tied output matrix shares those rows, or
gets int8 rows of its own, which are made from the bfloat16 ones and not stored.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.transformer import VOCABULARY_PART, ModelConfig, Transformer

FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines  # x86
FEW_ROWS = 64 if FBGEMM else 8  # a CPU multiplies up to so many rows by int8; more, by float32 weights in parts, faster
KERNEL_STEP = 16  # torch's int8 kernel reads beyond the end of a row whose length is no multiple of this
PART, REST = 63, 126  # integers of an activation: x ~ max|x| / PART (a + b / REST), so that none leaves 7 bits


def quantize_rows(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per output channel: q = round(w / s), s = max|w| / 127. (N, K) -> int8 (N, K), scales (N,)

    A scale_dtype that is coarser than float32 is rounded up, so that no q leaves [-127, 127]. A row of zeros has scale 1.
    """
    weight = weight.detach().float()
    exact = weight.abs().amax(dim=1) / 127  # (N,)
    scale = torch.where(exact > 0, exact, 1).to(scale_dtype)
    scale = torch.where(scale.float() < exact, scale.nextafter(torch.full_like(scale, torch.inf)), scale)
    return (weight / scale.float()[:, None]).round().to(torch.int8), scale


def pack(weight: Tensor, scale: Tensor):
    """int8 (N, K) with scales (N,) in the order in which FBGEMM reads them, for `integer_product`."""
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*quantized tensor creation functions.* are deprecated")  # in torch 2.13
            zeros = torch.zeros(len(weight), dtype=torch.int64)
            rows = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(rows, None)
    finally:
        torch.backends.quantized.engine = before


def scripted(function: Callable) -> Callable:
    """The function as TorchScript. What it multiplies passes through the caches, after which every small operation called
    from Python takes 10 us: the ten around a product of one row as long as the product (SmolLM2-135M, 121 products a token).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)  # in torch 2.13
        return torch.jit.script(function)


@scripted
def integer_product(
    x: Tensor, packed: torch.classes.quantized.LinearPackedParamsBase, part: int = PART, rest: int = REST
) -> Tensor:
    """scale (q x) in integers: x as two of 7 bits each, a and b, in one reading of q. (..., K) -> (..., N)

    a + b / 126 = 63 x / max|x|, to 2^-13 of the largest. Without VNNI a CPU adds two products of 8 bits in 16, which 7 bits
    of x never overflow: so sums are exact, and a row's result does not depend on the other rows.
    """
    rows = x.reshape(-1, x.shape[-1]).float()  # (M, K)
    unit = torch.linalg.vector_norm(rows, float("inf"), dim=[-1], keepdim=True).mul_(1 / part)  # (M, 1)
    t = rows / unit  # a row of zeros gives NaN, and some integers, which the zero below multiplies
    a = t.round()
    both = torch.cat((a, t.sub_(a).mul_(rest)))  # (2M, K), rounded by FBGEMM
    y, b = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(both, 1.0, 64, packed).chunk(2)
    return torch.add(y, b, alpha=1 / rest).mul_(unit).to(x.dtype).view(x.shape[:-1] + y.shape[1:])


class Int8Linear(nn.Module):
    """y = scale (q x) + bias, with x in any floating-point dtype. The scales are bfloat16, which every path multiplies by.

    On a CPU: up to `few_rows` rows in integers by FBGEMM, whose own copy of q is made with the first product, or where there
    is none (ARM) by torch's int8 kernel, whose activations are bfloat16; more rows, and float64, in x's own dtype, some
    weights at a time. On CUDA: int8 converted and multiplied, which torch.compile fuses into one read (gpt-fast's form).
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.few_rows = FEW_ROWS
        self.packed = None
        self.register_buffer("weight", weight)  # (N, K) int8
        self.register_buffer("scale", scale)  # (N,) bfloat16
        self.register_buffer("bias", bias)  # (N,)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("int8 weights cannot be trained, nor trained through: train the model that was exported")
        if not x.is_cpu:
            y = F.linear(x, self.weight.to(x.dtype))
            y = y * self.scale.to(y.dtype)
        elif not self.takes(x):
            y = self.in_parts(x)
        elif FBGEMM:
            if self.packed is None:
                self.packed = pack(self.weight, self.scale)
            y = integer_product(x, self.packed)
        else:
            # the kernel is fast with bfloat16 alone; a row's result does not depend on the other rows
            rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale).to(x.dtype)
            y = y.view(*x.shape[:-1], len(self.weight))
        return y if self.bias is None else y + self.bias

    def takes(self, x: Tensor) -> bool:
        """Whether the integer kernel of this CPU multiplies x."""
        few = x.numel() <= self.few_rows * x.shape[-1] and x.dtype != torch.float64
        return few and x.is_cpu and (FBGEMM or x.shape[-1] % KERNEL_STEP == 0)

    def in_parts(self, x: Tensor) -> Tensor:
        """The product with weights that are converted a part at a time, so that they are still in the cache."""
        rows = x.reshape(-1, x.shape[-1])  # (M, K)
        y = rows.new_empty(len(rows), len(self.weight))
        for start in range(0, len(self.weight), VOCABULARY_PART):
            part = slice(start, start + VOCABULARY_PART)
            torch.mm(rows, self.weight[part].to(x.dtype).t(), out=y[:, part])
        return y.mul_(self.scale.to(x.dtype)).view(*x.shape[:-1], len(self.weight))


class Joint:
    """Several Int8Linear layers of the same x, by one product where FBGEMM computes it."""

    def __init__(self, *layers: Int8Linear):
        self.layers, self.packed = layers, None

    def __call__(self, x: Tensor) -> list[Tensor]:
        if not (FBGEMM and self.layers[0].takes(x)):
            return [layer(x) for layer in self.layers]
        if self.packed is None:
            weights, scales = zip(*((layer.weight, layer.scale) for layer in self.layers))
            self.packed = pack(torch.cat(weights), torch.cat(scales))
        parts = integer_product(x, self.packed).split([len(layer.weight) for layer in self.layers], -1)
        return [y if layer.bias is None else y + layer.bias for y, layer in zip(parts, self.layers)]


class SmallEmbedding(nn.Module):
    """nn.Embedding whose rows are bfloat16, or int8 with a scale each; what it returns has the dtype of the model."""

    def __init__(self, weight: Tensor, scale: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight", weight)  # (V, D)
        self.register_buffer("scale", scale)  # (V,)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight[ids].to(self.dtype)
        return rows if self.scale is None else rows * self.scale[ids].to(self.dtype)[..., None]


@torch.no_grad()
def quantize(model: Transformer, embedding: Literal["bf16", "int8"] = "bf16") -> Transformer:
    """Replace the linear layers and the embedding of a built float model by int8 ones, in place; returns the model.

    ValueError for a model that carries adapters or is quantized already.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Linear) or ".lora_" in name:
            raise ValueError(f"{name} is an adapter or int8 already: quantize a merged model of floating-point weights")
        if type(module) is nn.Linear:
            bias = None if module.bias is None else module.bias.detach()
            model.set_submodule(name, Int8Linear(*quantize_rows(module.weight, torch.bfloat16), bias))
    weight, dtype = model.embed_tokens.weight.detach(), model.norm.weight.dtype
    small = {"bf16": lambda: (weight.to(torch.bfloat16), None), "int8": lambda: quantize_rows(weight, torch.bfloat16)}
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        attention.qkv = Joint(attention.q_proj, attention.k_proj, attention.v_proj)
        if mlp.gate_proj is not None:
            mlp.gate_up = Joint(mlp.gate_proj, mlp.up_proj)
    model.embed_tokens = SmallEmbedding(*small[embedding](), dtype)
    tie(model)
    return model.requires_grad_(False)


def tie(model: Transformer) -> None:
    """Give a tied model its int8 output matrix: the embedding's rows."""
    if model.config.tied:
        embedding = model.embed_tokens
        rows = (embedding.weight, embedding.scale) if embedding.scale is not None else None
        model.lm_head = Int8Linear(*(rows or quantize_rows(embedding.weight, torch.bfloat16)))


@torch.no_grad()
def dequantize(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Undo `quantize`, but for its rounding, in place: linear layers and embedding hold scale q in `dtype`; -> the model.

    A tied model's output matrix is its embedding again, whose bfloat16 rows are nearer to the original than their int8.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Int8Linear):
            plain = nn.Linear(*layer.weight.shape[::-1], bias=layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(scaled(layer.weight, layer.scale, dtype), requires_grad=False)
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias, requires_grad=False)
            model.set_submodule(name, plain)
    for block in model.layers:
        del block.self_attn.qkv
        if block.mlp.gate_proj is not None:
            del block.mlp.gate_up
    rows = model.embed_tokens
    model.embed_tokens = nn.Embedding.from_pretrained(scaled(rows.weight, rows.scale, dtype))
    if model.config.tied:
        model.lm_head = None
    return model


def scaled(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale q, rounded once. (N, K), (N,) or None -> (N, K)"""
    return weight.to(dtype) if scale is None else (weight.float() * scale.float()[:, None]).to(dtype)


def stored_tensors(model: Transformer) -> dict[str, Tensor]:
    """What a file of the quantized model holds; a tied output matrix is made anew from the embedding."""
    tensors = model.state_dict()
    return {name: x for name, x in tensors.items() if not (model.config.tied and name.startswith("lm_head."))}


def load_quantized(
    config: ModelConfig, tensors: dict[str, Tensor], where: str | Path, device: torch.device | str = "cpu"
) -> Transformer:
    """The model on `device` whose `stored_tensors` these are; ValueError in one line unless names, shapes and dtypes are its
    own.
    """
    embedding = "int8" if "embed_tokens.scale" in tensors else "bf16"
    with torch.device("meta"):
        model = quantize(Transformer(config), embedding)
    own = stored_tensors(model)
    for name in sorted(own.keys() | tensors.keys()):
        there, here = (describe(x.get(name)) for x in (tensors, own))
        if there != here:
            raise ValueError(f"{where} is no int8 model of this architecture: {name} is {there} there, {here} here")
    model.lm_head = None if config.tied else model.lm_head
    model.load_state_dict(tensors, assign=True)
    tie(model.to(device))  # after the move: buffers move one by one, and shared rows would get two copies
    return model.requires_grad_(False)


def describe(x: Tensor | None) -> str:
    return "missing" if x is None else f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


@contextmanager
def decoding_path(model: Transformer) -> Iterator[None]:
    """Every product as decoding computes it, however many rows there are: to measure long texts."""
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    for layer in layers:
        layer.few_rows = 1 << 60
    try:
        yield
    finally:
        for layer in layers:
            layer.few_rows = FEW_ROWS
