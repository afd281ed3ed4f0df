"""A slow textbook transformer in float64, and small models of every family with weights large enough to matter.

One row, loops over layers, heads and positions, no cache, no batching: written from the papers' formulas, not from
model/transformer.py.
"""

import cmath
import math

import torch

from model.transformer import ModelConfig, Transformer

# ffn as real ones: a multiple of the floats that a CPU works on at once, or a row's last bits depend on its place
SMALL = dict(vocab_size=13, width=24, layers=2, heads=4, ffn=32, context=32, tied=True)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=40
)
GEMMA = dict(
    norm="offset_rms",
    norm_place="both",
    activation="geglu",
    head_dim=10,
    embedding_scale=24**0.5,
    attention_scale=9**-0.5,
)
FAMILIES = {
    "gpt2": dict(norm="layer", activation="gelu", positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True),
    "llama": dict(kv_heads=2, tied=False),
    "smollm2": dict(kv_heads=1, rope_theta=1e5, norm_eps=1e-3),
    "llama_linear": dict(kv_heads=2, rope_scaling={"type": "linear", "factor": 4.0}),
    "llama3": dict(kv_heads=2, rope_theta=50.0, rope_scaling=LLAMA3, head_dim=12),
    "qwen2": dict(kv_heads=2, qkv_bias=True, rope_theta=1e6, norm_eps=1e-6),
    "qwen3": dict(kv_heads=2, qk_norm=True, head_dim=10, rope_theta=1e6, norm_eps=1e-6),  # heads * head_dim != width
    "smollm3": dict(kv_heads=2, no_rope=(1,), rope_theta=100.0),
    "olmo2": dict(kv_heads=2, norm_place="after", qk_norm=True, qk_norm_over="width", tied=False),
    "granite": dict(
        kv_heads=2, embedding_scale=1.5, attention_scale=0.7, residual_scale=0.4, logit_divisor=3.0, norm_eps=1e-6
    ),
    "gemma2": GEMMA | dict(kv_heads=2, attention_softcap=3.0, logit_softcap=5.0),
    "gemma3_text": GEMMA
    | dict(
        kv_heads=1, qk_norm=True, local_rope=(0,), local_theta=20.0, rope_scaling={"rope_type": "linear", "factor": 2.0}
    ),
}


def small_model(family: str, dtype=torch.float64, seed: int = 0, **changes) -> Transformer:
    """A model whose every parameter matters: nothing is zero or one, and attention is far from uniform."""
    model = Transformer(ModelConfig(**{**SMALL, **FAMILIES[family], **changes})).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            one = 0.0 if model.config.norm == "offset_rms" else 1.0
            parameter.copy_(one + 0.3 * noise if name.endswith("norm.weight") else 0.4 * noise)
    return model


def random_ids(seed: int, *shape: int, vocab_size: int = SMALL["vocab_size"]) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def slow_norm(config, w, name, x):
    """x (n,), a plain list of floats in, a list out."""
    weight = w[name + ".weight"].tolist()
    if config.norm == "layer" and not name.endswith(("q_norm", "k_norm")):
        mean = sum(x) / len(x)
        variance = sum((a - mean) ** 2 for a in x) / len(x)
        bias = w[name + ".bias"].tolist()
        return [(a - mean) / math.sqrt(variance + config.norm_eps) * g + b for a, g, b in zip(x, weight, bias)]
    rms = math.sqrt(sum(a * a for a in x) / len(x) + config.norm_eps)
    if config.norm == "offset_rms":
        weight = [1 + g for g in weight]
    return [a / rms * g for a, g in zip(x, weight)]


def slow_linear(w, name, x):
    y = w[name + ".weight"] @ torch.tensor(x, dtype=torch.float64)
    return (y + w[name + ".bias"] if name + ".bias" in w else y).tolist()


def slow_frequency(config, pair: int, local: bool) -> float:
    """theta^(-2i/d), then the published recipes of linear and Llama 3 scaling, in terms of wavelengths."""
    if local:
        return config.local_theta ** (-2 * pair / config.head_dim)
    frequency = config.rope_theta ** (-2 * pair / config.head_dim)
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "linear":
        return frequency / scaling["factor"]
    if kind == "llama3":
        wavelength = 2 * math.pi / frequency
        old, low, high = (
            scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        if wavelength < old / high:
            return frequency
        if wavelength > old / low:
            return frequency / scaling["factor"]
        smooth = (old / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
    return frequency


def slow_rope(config, x, position, layer):
    """Pair (i, i + d/2) is a complex number, turned by position * frequency."""
    if config.positions == "learned" or layer in config.no_rope:
        return x
    half = config.head_dim // 2
    angles = [position * slow_frequency(config, i, layer in config.local_rope) for i in range(half)]
    turned = [complex(x[i], x[i + half]) * cmath.exp(1j * angles[i]) for i in range(half)]
    return [z.real for z in turned] + [z.imag for z in turned]


def slow_attention(config, w, name, xs, layer):
    """xs: one list per position. Every head of every position on its own."""
    K, group = config.head_dim, config.heads // config.kv_heads
    scale = 1 / math.sqrt(K) if config.attention_scale is None else config.attention_scale

    def heads(which, x):
        y = slow_linear(w, f"{name}.{which}_proj", x)
        if config.qk_norm and config.qk_norm_over == "width" and which != "v":
            y = slow_norm(config, w, f"{name}.{which}_norm", y)
        return [y[i : i + K] for i in range(0, len(y), K)]

    def capped(score):
        return score if (cap := config.attention_softcap) is None else cap * math.tanh(score / cap)

    queries, keys, values = ([heads(which, x) for x in xs] for which in "qkv")  # [position][head][K]
    for which, all_heads in (("q", queries), ("k", keys)):
        for position, row in enumerate(all_heads):
            for head, x in enumerate(row):
                if config.qk_norm and config.qk_norm_over == "head":
                    x = slow_norm(config, w, f"{name}.{which}_norm", x)
                row[head] = slow_rope(config, x, position, layer)
    out = []
    for t in range(len(xs)):
        mixed = []
        for head in range(config.heads):
            scores = [
                capped(scale * sum(a * b for a, b in zip(queries[t][head], keys[s][head // group])))
                for s in range(t + 1)
            ]
            weights = [math.exp(score - max(scores)) for score in scores]
            for i in range(K):
                terms = (weights[s] * values[s][head // group][i] for s in range(t + 1))
                mixed.append(sum(terms) / sum(weights))
        out.append(slow_linear(w, f"{name}.o_proj", mixed))
    return out


def slow_mlp(config, w, name, x):
    def gelu(a):  # GPT-2's tanh approximation
        return 0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))

    up = slow_linear(w, f"{name}.up_proj", x)
    if config.activation == "gelu":
        inner = [gelu(a) for a in up]
    else:
        gate = slow_linear(w, f"{name}.gate_proj", x)
        inner = [(gelu(g) if config.activation == "geglu" else g / (1 + math.exp(-g))) * a for g, a in zip(gate, up)]
    return slow_linear(w, f"{name}.down_proj", inner)


def slow_logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    """(T,) ids -> (T, V) float64 logits."""
    config, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    xs = [[a * config.embedding_scale for a in w["embed_tokens.weight"][i].tolist()] for i in ids]
    if config.positions == "learned":
        xs = [[a + b for a, b in zip(x, w["embed_positions.weight"][t].tolist())] for t, x in enumerate(xs)]

    def normed(name, x):
        """Where a layer has no such norm, x."""
        return slow_norm(config, w, name, x) if name + ".weight" in w else x

    def plus(x, y):
        return [a + config.residual_scale * b for a, b in zip(x, y)]

    for layer in range(config.layers):
        name = f"layers.{layer}"
        ys = slow_attention(config, w, f"{name}.self_attn", [normed(f"{name}.input_layernorm", x) for x in xs], layer)
        xs = [plus(x, normed(f"{name}.attention_output_norm", y)) for x, y in zip(xs, ys)]
        for t, x in enumerate(xs):
            y = slow_mlp(config, w, f"{name}.mlp", normed(f"{name}.post_attention_layernorm", x))
            xs[t] = plus(x, normed(f"{name}.mlp_output_norm", y))
    head = {"head.weight": w["embed_tokens.weight" if config.tied else "lm_head.weight"]}
    logits = [slow_linear(head, "head", slow_norm(config, w, "norm", x)) for x in xs]
    logits = [[a / config.logit_divisor for a in row] for row in logits]
    if cap := config.logit_softcap:
        logits = [[cap * math.tanh(a / cap) for a in row] for row in logits]
    return torch.tensor(logits, dtype=torch.float64)
