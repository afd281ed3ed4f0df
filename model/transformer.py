"""One transformer for the GPT-2, Llama, Qwen2 and Qwen3 families: ids -> hidden -> logits, with or without a KV cache.

Sizes in the shape comments: B rows, T tokens, D width, H heads, G key/value heads, K head size, V vocabulary.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
ROPE_KEYS = {  # what each kind of rope scaling must say about itself
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a transformer; the defaults make a small Llama. ValueError when the numbers do not fit together."""

    vocab_size: int = 2048
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: width / heads
    ffn: int | None = None  # None: 8/3 of the width, rounded up to a multiple of 64
    context: int = 256
    norm: str = "rms"  # rms | layer (with bias)
    norm_eps: float = 1e-5
    activation: str = "silu"  # silu: gated (SwiGLU) | gelu: tanh approximation, not gated
    positions: str = "rope"  # rope | learned
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3", "factor": ...}
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's query and key, before RoPE
    tied: bool = True  # the embedding is the output matrix too

    def __post_init__(self):
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; set head_dim")
        resolved = {
            "kv_heads": self.heads if self.kv_heads is None else self.kv_heads,
            "head_dim": self.width // self.heads if self.head_dim is None else self.head_dim,
            "ffn": math.ceil(self.width * 8 / 3 / 64) * 64 if self.ffn is None else self.ffn,
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        for name, known in (("norm", NORMS), ("activation", ("silu", "gelu")), ("positions", ("rope", "learned"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not supported; known: {', '.join(known)}")
        if self.positions == "rope":
            if self.head_dim % 2:
                raise ValueError(f"head_dim {self.head_dim} is odd; RoPE turns pairs")
            scaling = self.rope_scaling or {}
            kind = rope_type(scaling)
            if kind not in ROPE_KEYS:
                raise ValueError(f"rope type {kind!r} is not supported; known: {', '.join(ROPE_KEYS)}")
            missing = [key for key in ROPE_KEYS[kind] if key not in scaling]
            if missing:
                raise ValueError(f"rope scaling {kind!r} lacks {', '.join(missing)}")


def rope_type(scaling: dict | None) -> str:
    """Kind of rope scaling; old config files call the key "type"."""
    return (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))


def rope_frequencies(config: ModelConfig, dtype: torch.dtype, device=None) -> Tensor:
    """Radians per position of each pair, theta^(-2i/K) (arXiv:2104.09864), scaled for long contexts. (K/2,)

    linear: divided by factor. llama3: wavelengths shorter than original/high stay, those longer than original/low are
    divided by factor, and between them the two are mixed.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=dtype, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling or {}
    kind = rope_type(scaling)
    if kind == "linear":
        frequencies = frequencies / scaling["factor"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the old context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split layout: pair (i, i + K/2) turns by its angle. x (B, T, H, K), cos and sin (., T, 1, K).

    `sin` carries the sign of the pair's first half, so [x1 c - x2 s, x2 c + x1 s] is one product and one addcmul.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin).type_as(x)


class KVCache:
    """Keys and values of every layer, one length per row, so ragged rows decode together without left padding.

    Columns at or beyond a row's length hold garbage: they are overwritten before any query of that row may see them.
    """

    def __init__(self, config: ModelConfig, batch: int, max_length: int, dtype=torch.float32, device="cpu"):
        if max_length > config.context:
            raise ValueError(f"a cache of {max_length} tokens exceeds the model's context of {config.context}")
        # one spare column takes what padding writes; zeros, because a masked NaN is still NaN
        shape = (batch, max_length + 1, config.kv_heads, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]  # L x (B, S, G, K)
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)  # (B,)
        self.longest = 0  # max(lengths), known without asking the device
        self.max_length = max_length

    def write(self, layer: int, k: Tensor, v: Tensor, span: "Span") -> tuple[Tensor, Tensor]:
        """Stores new keys and values (B, T, G, K); returns all that the queries of this span attend to."""
        keys, values = self.keys[layer], self.values[layer]
        if span.columns is None:  # nothing cached yet: the new ones are all there is
            keys[:, : k.shape[1]] = k
            values[:, : v.shape[1]] = v
            return k, v
        keys[span.rows, span.columns] = k.to(keys.dtype)
        values[span.rows, span.columns] = v.to(values.dtype)
        return keys[:, : span.end], values[:, : span.end]

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows, in this order; a row may be taken several times (several samples of one prompt)."""
        self.keys = [keys.index_select(0, rows) for keys in self.keys]
        self.values = [values.index_select(0, rows) for values in self.values]
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max()) if len(rows) else 0

    def view(self, rows: slice, lengths: list[int], longest: int) -> "KVCache":
        """Some rows as a cache of their own that writes into the memory of this one; whoever views keeps the lengths.

        longest: at least max(lengths); columns up to it are attended to under the mask.
        """
        view = copy.copy(self)
        view.keys, view.values = [x[rows] for x in self.keys], [x[rows] for x in self.values]
        view.lengths, view.longest = torch.tensor(lengths, device=self.lengths.device), longest
        return view

    def copy_row(self, source: int, target: int, length: int) -> None:
        """The first `length` columns of row `target` become those of row `source`."""
        for x in (*self.keys, *self.values):
            x[target, :length] = x[source, :length]


@dataclass
class Packed:
    """Texts one after the other in a single row, see model/packed.py."""

    sizes: list[int]  # tokens of every text that stand in the row
    shared: list[int]  # tokens that come before them, and stand at the beginning of the text before
    ends: Tensor | None = None  # (B,) columns of the texts' last tokens, where nobody reads the other states


@dataclass
class Span:
    """Where the T new tokens of a call stand, worked out once for all layers."""

    positions: Tensor  # (1, T), or (B, T) with a cache
    rope: tuple[Tensor, Tensor] | None = None  # cos and signed sin, (., T, 1, K)
    mask: Tensor | None = None  # (B, 1, T, end), True = visible; None: plain causal among the new tokens
    cache: KVCache | None = None
    rows: Tensor | None = None  # (B, 1) and
    columns: Tensor | None = None  # (B, T): where to write in the cache; None: from column 0
    end: int = 0  # columns of the cache that are attended to
    packed: Packed | None = None  # of a packed row, B = 1 and T = all tokens


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed, gqa: bool) -> Tensor:
    """Causal attention of every text to itself: k and v (1, G, N, K), q (1, H, N, K), or (1, H, B, K) of the last tokens."""
    last, out = packed.ends is not None, []
    texts = zip(q.split(1 if last else packed.sizes, 2), k.split(packed.sizes, 2), v.split(packed.sizes, 2))
    before = None
    for (own_q, own_k, own_v), size, shared in zip(texts, packed.sizes, packed.shared):
        mask, keys, values = None, own_k, own_v
        if shared:
            keys, values = (torch.cat((x[:, :, :shared], y), 2) for x, y in zip(before, (own_k, own_v)))
            if not last:
                mask = torch.ones(size, shared + size, dtype=torch.bool, device=q.device).tril(shared)
        causal = mask is None and not last
        out.append(
            F.scaled_dot_product_attention(own_q, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=gqa)
        )
        before = own_k, own_v
    return torch.cat(out, 2)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.gqa = config.kv_heads != config.heads
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=config.out_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        ends = None if span.packed is None else span.packed.ends
        q, k, v = self.qkv(x) if ends is None else (self.q_proj(x[:, ends]), self.k_proj(x), self.v_proj(x))
        q = q.unflatten(-1, heads[2:])  # (B, T, H, K)
        k, v = k.view(heads), v.view(heads)  # (B, T, G, K)
        if self.q_norm is not None:
            dtype = self.q_norm.weight.dtype  # under autocast q and k are half, the norm's weights are not
            q, k = self.q_norm(q.to(dtype)), self.k_norm(k.to(dtype))
        if span.rope is not None:
            rope = span.rope if ends is None else [x[:, ends] for x in span.rope]
            q, k = rotate(q, *rope), rotate(k, *span.rope)
        if span.cache is not None:
            k, v = span.cache.write(self.layer, k, v, span)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, ., K)
        if span.packed is not None:
            y = packed_attention(q, k, v, span.packed, self.gqa)  # (1, H, N, K)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=span.mask, is_causal=span.mask is None, enable_gqa=self.gqa
            )  # (B, H, T, K)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        gated = config.activation == "silu"
        self.gate_proj = nn.Linear(config.width, config.ffn, bias=config.mlp_bias) if gated else None
        self.up_proj = nn.Linear(config.width, config.ffn, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.ffn, config.width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        gate, up = self.gate_up(x)
        return self.down_proj(F.silu(gate) * up)

    def gate_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate_proj(x), self.up_proj(x)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = NORMS[config.norm](config.width, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = NORMS[config.norm](config.width, config.norm_eps)  # before the MLP; HF's name
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, span: Span) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden), span)
        if span.packed is not None and span.packed.ends is not None:
            hidden = hidden[:, span.packed.ends]
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


VOCABULARY_PART = 1024  # rows of the output matrix that a CPU multiplies at a time


class _WideLinear(torch.autograd.Function):
    # F.linear with far more outputs than inputs. The CPU's library multiplies a whole vocabulary at 0.6 of the rate that
    # it reaches on a part of it whose weights stay in the cache.

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        y = x.new_empty(*x.shape[:-1], len(weight))
        rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, len(weight))  # (N, D), (N, V)
        for start in range(0, len(weight), VOCABULARY_PART):
            part = slice(start, start + VOCABULARY_PART)
            torch.mm(rows, weight[part].t(), out=out[:, part])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wanted_x, wanted_weight = ctx.needs_input_grad
        grad_x = grad @ weight if wanted_x else None
        grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2) if wanted_weight else None
        return grad_x, grad_weight


class Transformer(nn.Module):
    """Decoder-only transformer whose parameters carry the names of HF's Llama, without the prefix "model."."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = NORMS[config.norm](config.width, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal with deviation 0.02; what writes to the residual stream, 0.02 / sqrt(2 layers), as in GPT-2."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
                continue
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02
            # drawn where the generator lives, so that every device starts from the same numbers
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator, device=generator.device))

    def span(self, ids: Tensor, cache: KVCache | None = None, new_lengths: Tensor | None = None) -> Span:
        """Positions, rotations, mask and cache columns of a call. ValueError when it runs past the context."""
        T, limit = ids.shape[1], cache.max_length if cache else self.config.context
        steps = torch.arange(T, device=ids.device)[None]  # (1, T)
        if cache is None:
            longest, span = T, Span(steps)
        else:
            longest = cache.longest + T if new_lengths is None else int((cache.lengths + new_lengths).max())
            span = Span(cache.lengths[:, None] + steps, cache=cache, end=longest)
        if longest > limit:
            where = "model's context" if cache is None else "cache"
            raise ValueError(f"a sequence of {longest} tokens exceeds the {where} of {limit}")
        if cache is not None and (cache.longest > 0 or T > limit):
            span.rows = torch.arange(len(ids), device=ids.device)[:, None]
            span.columns = span.positions
            if new_lengths is not None:  # padding goes to the spare column
                span.columns = torch.where(steps < new_lengths[:, None], span.positions, cache.max_length)
            span.mask = torch.arange(longest, device=ids.device) <= span.positions[:, None, :, None]  # (B, 1, T, end)
        span.rope = self.rotations(span.positions)
        return span

    def rotations(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosine and signed sine of RoPE at these positions, (., T) -> two of (., T, 1, K); None without RoPE."""
        if self.config.positions != "rope":
            return None
        # float32 at least: the angle of a late position does not fit a half
        dtype = torch.promote_types(self.layers[0].input_layernorm.weight.dtype, torch.float32)
        frequencies = rope_frequencies(self.config, dtype, positions.device)  # (K/2,)
        angles = positions[..., None, None] * frequencies  # (., T, 1, K/2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def embed(self, ids: Tensor, span: Span) -> Tensor:
        """(B, T) -> (B, T, D)"""
        hidden = self.embed_tokens(ids)
        if self.embed_positions is not None:  # padding may stand beyond the table
            hidden = hidden + self.embed_positions(span.positions.clamp(max=self.config.context - 1))
        return hidden

    def blocks(self, hidden: Tensor, span: Span, first: int = 0, last: int | None = None) -> Tensor:
        """Layers first to last - 1. (B, T, D) -> (B, T, D)"""
        for block in self.layers[first:last]:
            hidden = block(hidden, span)
        return hidden

    def trunk(self, ids: Tensor, cache: KVCache | None = None, new_lengths: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm. (B, T) -> (B, T, D)

        Without a cache: plain causal attention. Rows are right-padded, so no real token sees padding and no mask is
        needed. With a cache: row b appends its first new_lengths[b] ids (None: all T) at cache.lengths[b] and attends
        to everything it has cached; hidden states beyond new_lengths[b] are garbage.
        """
        span = self.span(ids, cache, new_lengths)
        hidden = self.blocks(self.embed(ids, span), span)
        if cache is not None:
            cache.lengths = cache.lengths + (ids.shape[1] if new_lengths is None else new_lengths)
            cache.longest = span.end
        return self.norm(hidden)

    def unembed(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)"""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        weight = self.embed_tokens.weight
        if hidden.is_cpu and len(weight) > 2 * VOCABULARY_PART and not torch.is_autocast_enabled("cpu"):
            return _WideLinear.apply(hidden, weight)
        return F.linear(hidden, weight)

    def forward(self, ids: Tensor, cache: KVCache | None = None, new_lengths: Tensor | None = None) -> Tensor:
        """Logits of every position. (B, T) -> (B, T, V)"""
        return self.unembed(self.trunk(ids, cache, new_lengths))
