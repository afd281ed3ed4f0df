"""One transformer for GPT-2, Llama, Qwen, SmolLM3, OLMo 2, Granite and Gemma: ids -> hidden -> logits, with or without a cache.

Sizes in the shape comments: B rows, T tokens, D width, H heads, G key/value heads, K head size, V vocabulary.
"""

import contextlib
import copy
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig, rope_type
from model.gated import again, gated, tanh_gelu


class RMSNorm(nn.RMSNorm):
    """x / rms(x) weight, in the type of its weight: where matrices are in half precision, norms are not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class OffsetRMSNorm(nn.RMSNorm):
    """x / rms(x) (1 + weight), computed in float32 at least: Gemma's."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.normalized_shape, 1 + self.weight.to(wide), self.eps).type_as(x)


NORMS = {"rms": RMSNorm, "layer": nn.LayerNorm, "offset_rms": OffsetRMSNorm}
ACTIVATIONS = {"silu": F.silu, "geglu": tanh_gelu, "gelu": tanh_gelu}


def rope_frequencies(config: ModelConfig, dtype: torch.dtype, device=None, local: bool = False) -> Tensor:
    """Radians per position of each pair, theta^(-2i/K) (arXiv:2104.09864), scaled for long contexts. (K/2,)

    local: those of the layers in local_rope, which are not scaled. linear: divided by factor. llama3: wavelengths shorter
    than original/high stay, those longer than original/low are divided by factor, and between them the two are mixed.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=dtype, device=device) / config.head_dim
    frequencies = 1.0 / (config.local_theta if local else config.rope_theta) ** exponents
    scaling = {} if local else config.rope_scaling or {}
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


Parts = list[tuple[slice, int]]  # neighbouring rows, and how many columns of the cache these read


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
        self.parts: Parts | None = None  # see `view`
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

    def view(self, rows: slice, lengths: list[int], longest: int, parts: "Parts | None" = None) -> "KVCache":
        """Some rows as a cache of their own that writes into the memory of this one; whoever views keeps the lengths.

        longest: at least max(lengths); columns up to it are attended to under the mask. parts: which rows attend together,
        and to how many columns, where each row gets one token; None: all to all.
        """
        view = copy.copy(self)
        view.keys, view.values = [x[rows] for x in self.keys], [x[rows] for x in self.values]
        view.lengths, view.longest = torch.tensor(lengths, dtype=torch.int64, device=self.lengths.device), longest
        view.parts = parts
        return view

    def copy_rows(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """The first `length` columns of the rows `targets` become those that the rows `sources` hold before. (n,) each"""
        for x in (*self.keys, *self.values):
            x[targets, :length] = x[sources, :length]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> Tensor:
    """softmax(scale q k) v, and scores s as cap tanh(s / cap) first: q (B, H, T, K), k and v (B, G, S, K) -> (B, H, T, K).

    mask (..., T, S), True = visible; where it is None, a query sees what stands up to its own column, or all with causal
    False. scale None: 1 / sqrt(K).
    """
    causal = causal and mask is None
    if softcap is None:
        gqa = q.shape[1] != k.shape[1]
        if gqa and q.shape[2] == 1 and mask is not None and not (q.is_cpu and q.itemsize < 4):
            # the query heads of a group as its queries: no head is copied or read twice. Not a CPU's half precision,
            # whose kernel gains nothing
            folded = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (B, G, H/G, K)
            return F.scaled_dot_product_attention(folded, k, v, mask, scale=scale).flatten(1, 2).unsqueeze(2)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    q = q.unflatten(1, (k.shape[1], -1))  # (B, G, H/G, T, K)
    scores = q @ k.unsqueeze(2).mT * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, G, H/G, T, S)
    scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(-3), -torch.inf)
    return (scores.softmax(-1) @ v.unsqueeze(2)).flatten(1, 2)


@dataclass
class Span:
    """Where the T new tokens of a call stand, worked out once for all layers."""

    positions: Tensor  # (1, T), or (B, T) with a cache
    ropes: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # cos and signed sin of a kind, (., T, 1, K)
    mask: Tensor | None = None  # (B, 1, T, end), True = visible; None: plain causal among the new tokens
    cache: KVCache | None = None
    rows: Tensor | None = None  # (B, 1) and
    columns: Tensor | None = None  # (B, T): where to write in the cache; None: from column 0
    end: int = 0  # columns of the cache that are attended to,
    parts: Parts | None = None  # or how many for which rows; None: all of them for all
    attend: Callable[..., Tensor] = attend  # a packed row has its own, see model/packed.py


def multiplied(x: Tensor) -> Tensor:
    """x as several products read it: autocast would round it for each of them."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def trainable(x: Tensor) -> Tensor:
    """What attention reads where a backward may follow: of half precision that is slower on a CPU than of float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_cpu else x


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.rope = "none" if layer in config.no_rope else "local" if layer in config.local_rope else "global"
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=config.out_bias)

        def norm(heads: int) -> nn.Module | None:
            kind = OffsetRMSNorm if config.norm == "offset_rms" else RMSNorm
            size = config.head_dim * (heads if config.qk_norm_over == "width" else 1)
            return kind(size, config.norm_eps) if config.qk_norm else None

        self.q_norm, self.k_norm = norm(config.heads), norm(config.kv_heads)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = multiplied(x)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def split(self, x: Tensor, norm: nn.Module | None, ropes: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Queries or keys of all heads, normalised and turned. (B, T, H K) -> (B, T, H, K)"""
        dtype = x.dtype
        if norm is not None:
            x = norm(x.unflatten(-1, (-1, *norm.normalized_shape))).flatten(-2)
        x = x.unflatten(-1, (-1, self.head_dim))
        return (rotate(x, *ropes[self.rope]) if self.rope in ropes else x).to(dtype)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        q, k, v = self.qkv(x)  # (B, T, H K), and twice (B, T, G K)
        dtype = q.dtype
        if span.cache is None:
            q, k, v = trainable(q), trainable(k), trainable(v)
        q, k = self.split(q, self.q_norm, span.ropes), self.split(k, self.k_norm, span.ropes)
        v = v.unflatten(-1, (-1, self.head_dim))  # (B, T, G, K)
        if span.cache is not None:
            k, v = span.cache.write(self.layer, k, v, span)
        return self.attended(q, k, v, span, dtype)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, span: Span, dtype: torch.dtype, **how) -> Tensor:
        """What the heads bring, put together: q (B, T, H, K), k and v (B, S, G, K), of one type -> (B, T, D).

        dtype: in which the layer's products are.
        """
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, ., K)
        how |= {"scale": self.scale, "softcap": self.softcap}
        with torch.autocast(q.device.type, enabled=False):  # it would take half precision where they come in float32
            if span.parts is None:
                y = span.attend(q, k, v, span.mask, **how)  # (B, H, T, K)
            else:
                parts = ((q[b], k[b, :, :end], v[b, :, :end], span.mask[b, ..., :end]) for b, end in span.parts)
                y = torch.cat([span.attend(*part, **how) for part in parts])
        return self.o_proj(y.transpose(1, 2).flatten(2).to(dtype))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = nn.Linear(config.width, config.ffn, bias=config.mlp_bias) if config.gated else None
        self.up_proj = nn.Linear(config.width, config.ffn, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.ffn, config.width, bias=config.mlp_bias)
        self.recompute = False  # see recompute_blocks

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        y = gated(self.activation, *self.gate_up(x))
        with contextlib.nullcontext() if self.recompute else again(y):
            return self.down_proj(y)

    def gate_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = multiplied(x)
        return self.gate_proj(x), self.up_proj(x)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()

        def norm(*places: str) -> nn.Module:
            here = config.norm_place in places
            return NORMS[config.norm](config.width, config.norm_eps) if here else nn.Identity()

        self.residual_scale = config.residual_scale
        self.input_layernorm = norm("before", "both")
        self.self_attn = Attention(config, layer)
        self.attention_output_norm = norm("after", "both")
        self.post_attention_layernorm = norm("before", "both")  # before the MLP; the name that Llama has for it
        self.mlp = MLP(config)
        self.mlp_output_norm = norm("after", "both")

    def forward(self, hidden: Tensor, span: Span, columns: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); of a packed row alone these columns (B,), the last of its texts: (1, N, D) -> (1, B, D)"""
        if columns is not None:
            return self.at(columns, hidden, span)
        return self.add(hidden, self.self_attn(self.input_layernorm(hidden), span))

    def at(self, columns: Tensor, hidden: Tensor, span: Span) -> Tensor:
        attention, x = self.self_attn, multiplied(self.input_layernorm(hidden))
        ropes = {kind: (cos[:, columns], sin[:, columns]) for kind, (cos, sin) in span.ropes.items()}
        q = attention.q_proj(x[:, columns])  # (1, B, H K)
        dtype, q = q.dtype, attention.split(trainable(q), attention.q_norm, ropes)  # (1, B, H, K)
        k = attention.split(trainable(attention.k_proj(x)), attention.k_norm, span.ropes)  # (1, N, G, K)
        v = trainable(attention.v_proj(x)).unflatten(-1, (-1, attention.head_dim))
        return self.add(hidden[:, columns], attention.attended(q, k, v, span, dtype, last=True))

    def add(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The residual stream with what attention and then the MLP add. Twice (B, T, D) -> (B, T, D)"""
        hidden = torch.add(hidden, self.attention_output_norm(attended), alpha=self.residual_scale)
        y = self.mlp(self.post_attention_layernorm(hidden))
        return torch.add(hidden, self.mlp_output_norm(y), alpha=self.residual_scale)


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
        if wanted_weight:  # for _Rows, which comes later
            weight.unembedded = torch._C._current_graph_task_id(), weakref.ref(grad_weight)
        return grad_x, grad_weight


class _Rows(torch.autograd.Function):
    # F.embedding, of an embedding that _WideLinear may read too. Its gradient is zero but for a few rows: where the other's
    # is there already, they are added to it in place, and no second (V, D) tensor is made. That one lives until autograd hands
    # on the sum of all gradients of the weight, and is the sum so far: what autograd had added to another would be gone.

    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(weight, ids)
        return F.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, ids = ctx.saved_tensors
        task, known = getattr(weight, "unembedded", (None, None))
        total = known() if task == torch._C._current_graph_task_id() else None
        if total is None:
            return torch.zeros_like(weight).index_add_(0, ids.flatten(), grad.flatten(0, -2)), None
        total.index_add_(0, ids.flatten(), grad.flatten(0, -2))
        return None, None


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
        self.recompute = False  # see recompute_blocks
        self.logits_in_parts = True  # where they are recomputed; see rlhf/infra/shards.py

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal with deviation 0.02; what writes to the residual stream, 0.02 / sqrt(2 layers), as in GPT-2."""
        one = 0.0 if self.config.norm == "offset_rms" else 1.0  # a norm that changes nothing
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(one if name.endswith("norm.weight") else 0.0)
                continue
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02
            # drawn where the generator lives, so that every device starts from the same numbers
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device=generator.device).mul_(std))

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states: that of the norms, which stay float32 where matrices are stored in half precision."""
        return next(x for name, x in self.layers[0].named_parameters() if "norm" in name).dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values: what multiplies, by autocast or as the weights are stored."""
        device, weight = self.embed_tokens.weight.device.type, self.layers[0].self_attn.k_proj.weight
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return weight.dtype if weight.is_floating_point() else self.dtype

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
            span.parts = cache.parts
        span.ropes = self.rotations(span.positions)
        return span

    def rotations(self, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Cosine and signed sine of every kind of RoPE at these positions: (., T) -> pairs of (., T, 1, K); {} without."""
        kinds = ["global", *(["local"] if self.config.local_rope else [])] if self.config.positions == "rope" else []
        # float32 at least: the angle of a late position does not fit a half
        dtype = torch.promote_types(next(self.layers[0].parameters()).dtype, torch.float32)
        ropes = {}
        for kind in kinds:
            frequencies = rope_frequencies(self.config, dtype, positions.device, local=kind == "local")  # (K/2,)
            angles = positions[..., None, None] * frequencies  # (., T, 1, K/2)
            cos, sin = angles.cos(), angles.sin()
            ropes[kind] = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return ropes

    def embed(self, ids: Tensor, span: Span) -> Tensor:
        """(B, T) -> (B, T, D)"""
        weight, device = self.embed_tokens.weight, ids.device.type
        wide = self.config.tied and weight.is_cpu and len(weight) > 2 * VOCABULARY_PART
        hidden = _Rows.apply(weight, ids) if wide else self.embed_tokens(ids)
        if torch.is_autocast_enabled(device):  # rounded as other weights are: a frozen copy in half is the same
            hidden = hidden.to(torch.get_autocast_dtype(device))
        hidden = hidden.to(self.dtype)
        if (scale := self.config.embedding_scale) != 1:  # rounded to the embedding's type first, as in Gemma's own code
            hidden = hidden * torch.full((), scale, dtype=hidden.dtype, device=hidden.device)
        if self.embed_positions is not None:  # padding may stand beyond the table
            hidden = hidden + self.embed_positions(span.positions.clamp(max=self.config.context - 1))
        return hidden

    def blocks(self, hidden: Tensor, span: Span, first: int = 0, last: int | None = None) -> Tensor:
        """Layers first to last - 1. (B, T, D) -> (B, T, D)"""
        again = self.recompute and torch.is_grad_enabled()
        for block in self.layers[first:last]:
            if again:  # nothing in a block is random
                hidden = checkpoint(block, hidden, span, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = block(hidden, span)
        return hidden

    def trunk(self, ids: Tensor, cache: KVCache | None = None, new_lengths: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm. (B, T) -> (B, T, D)

        Without a cache: plain causal attention. Rows are right-padded, so no real token sees padding and no mask is
        needed. With a cache: row b appends its first new_lengths[b] ids (None: all T) at cache.lengths[b] and attends
        to everything it has cached; hidden states beyond new_lengths[b] are garbage.
        """
        return self.trunk_and_states(ids, (), cache, new_lengths)[0]

    def trunk_and_states(
        self, ids: Tensor, depths: Iterable[int], cache: KVCache | None = None, new_lengths: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """`trunk`, and the states above so many layers, in ascending order, without the final norm: (B, T, D) each."""
        span = self.span(ids, cache, new_lengths)
        hidden, states, done = self.embed(ids, span), [], 0
        for depth in depths:
            hidden, done = self.blocks(hidden, span, done, depth), depth
            states.append(hidden)
        hidden = self.blocks(hidden, span, done)
        if cache is not None:
            cache.lengths = cache.lengths + (ids.shape[1] if new_lengths is None else new_lengths)
            cache.longest = span.end
        return self.norm(hidden), states

    def unembed(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)"""
        logits, cap = self.project(hidden), self.config.logit_softcap
        if self.config.logit_divisor != 1:
            logits = logits / self.config.logit_divisor
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def project(self, hidden: Tensor) -> Tensor:
        if self.lm_head is not None:
            return self.lm_head(hidden)
        weight = self.embed_tokens.weight
        wide = weight.dtype.itemsize >= 4 and not torch.is_autocast_enabled("cpu")
        if hidden.is_cpu and len(weight) > 2 * VOCABULARY_PART and wide:
            return _WideLinear.apply(hidden, weight)
        return F.linear(hidden.to(weight.dtype), weight)

    def forward(self, ids: Tensor, cache: KVCache | None = None, new_lengths: Tensor | None = None) -> Tensor:
        """Logits of every position. (B, T) -> (B, T, V)"""
        return self.unembed(self.trunk(ids, cache, new_lengths))


def recompute_blocks(module: nn.Module, on: bool = True) -> None:
    """The transformers in it keep what goes into a block alone, and compute the rest again for the backward pass
    (arXiv:1604.06174): the same gradients with less memory, for a third more products. So does whoever unembeds.
    """
    for part in module.modules():
        if isinstance(part, Transformer | MLP):
            part.recompute = on
