"""The shape of a transformer: every field that a model of ours can differ in, and what may stand in it."""

import math
from dataclasses import asdict, dataclass, fields

CHOICES = {
    "norm": ("rms", "layer", "offset_rms"),
    "norm_place": ("before", "after", "both"),
    "activation": ("silu", "geglu", "gelu"),
    "positions": ("rope", "learned"),
    "qk_norm_over": ("head", "width"),
}
PER_LAYER = ("no_rope", "local_rope")  # fields that number layers
MOST_LAYERS = 1024  # the deepest published models have 130; a module is built for each before any tensor is looked for
LARGEST_SIZE = 2**24  # of anything that a config counts; a vocabulary has 2**18, the longest contexts 10 million
LARGEST_REAL = 1e30
ROPE_KEYS = {  # what each kind of rope scaling must say about itself
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a transformer; the defaults make a small Llama. ValueError when the values do not fit together."""

    vocab_size: int = 2048
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: width / heads
    ffn: int | None = None  # None: 8/3 of the width, rounded up to a multiple of 64
    context: int = 256
    norm: str = "rms"  # rms | layer (with bias) | offset_rms (times 1 + weight)
    norm_eps: float = 1e-5
    activation: str = "silu"  # silu, gated (SwiGLU) | geglu, gated, and gelu, not: the tanh approximation
    positions: str = "rope"  # rope | learned
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3", "factor": ...}
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # query and key are normalised before RoPE
    tied: bool = True  # the embedding is the output matrix too
    # of OLMo 2, SmolLM3, Granite and Gemma, see `stored`
    norm_place: str = "before"  # norms stand before attention and MLP | after them | both
    qk_norm_over: str = "head"  # each head's query and key | all heads' together (width)
    no_rope: tuple[int, ...] = ()  # layers whose attention knows no positions
    local_rope: tuple[int, ...] = ()  # layers that turn by local_theta, without scaling
    local_theta: float = 10000.0
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # of q k; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # scores s become cap tanh(s / cap)
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_divisor: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self):
        for name in ("width", "heads"):
            self._check_count(name)
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; set head_dim")
        resolved = {
            "kv_heads": self.heads if self.kv_heads is None else self.kv_heads,
            "head_dim": self.width // self.heads if self.head_dim is None else self.head_dim,
            "ffn": math.ceil(self.width * 8 / 3 / 64) * 64 if self.ffn is None else self.ffn,
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)
        for name in ("vocab_size", "kv_heads", "head_dim", "ffn", "context"):
            self._check_count(name)
        self._check_count("layers", MOST_LAYERS)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in list(known):
                raise ValueError(f"{name} is {show(getattr(self, name))}; known: {', '.join(known)}")
        for name in ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "tied"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {show(getattr(self, name))}; true or false was expected")
        for name in ("norm_eps", "rope_theta", "local_theta", "embedding_scale", "residual_scale", "logit_divisor"):
            check_real(name, getattr(self, name))
        for name in ("attention_scale", "attention_softcap", "logit_softcap"):
            if getattr(self, name) is not None:
                check_real(name, getattr(self, name))
        for name in PER_LAYER:
            layers = getattr(self, name)
            if not isinstance(layers, list | tuple) or not all(type(i) is int and 0 <= i < self.layers for i in layers):
                raise ValueError(f"{name} is {show(layers)}; layers from 0 to {self.layers - 1} were expected")
            object.__setattr__(self, name, tuple(layers))  # JSON makes it a list
        if self.positions == "rope":
            if self.head_dim % 2:
                raise ValueError(f"head_dim {self.head_dim} is odd; RoPE turns pairs")
            check_rope_scaling(self.rope_scaling)

    def stored(self) -> dict:
        """The fields, for JSON; those of the newer families only where they say something: older code reads the rest."""
        names = [field.name for field in fields(self)]
        newer = names[names.index("norm_place") :]
        return {name: x for name, x in asdict(self).items() if name not in newer or x != getattr(ModelConfig, name)}

    @property
    def gated(self) -> bool:
        return self.activation in ("silu", "geglu")

    def _check_count(self, name: str, most: int = LARGEST_SIZE) -> None:
        value = getattr(self, name)
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name} is {show(value)}; a whole number from 1 to {most} was expected")


def show(value, length: int = 60) -> str:
    """A stranger's value in one short line."""
    try:
        text = repr(value)
    except RecursionError:  # json reads deeper than repr writes
        text = f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= length else text[: length - 3] + "..."


def check_real(name: str, value) -> None:
    if type(value) not in (int, float) or not 0 < value < LARGEST_REAL:
        raise ValueError(f"{name} is {show(value)}; a number above 0 was expected")


def check_rope_scaling(scaling: dict | None) -> None:
    if scaling is not None and not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling is {show(scaling)}; an object was expected")
    kind = rope_type(scaling)
    if kind not in list(ROPE_KEYS):
        raise ValueError(f"rope type {show(kind)} is not supported; known: {', '.join(ROPE_KEYS)}")
    missing = [key for key in ROPE_KEYS[kind] if key not in scaling]
    if missing:
        raise ValueError(f"rope scaling {kind!r} lacks {', '.join(missing)}")
    for key in ROPE_KEYS[kind]:
        check_real(f"rope scaling {kind}: {key}", scaling[key])
    if kind == "llama3" and not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
        raise ValueError(f"high_freq_factor {scaling['high_freq_factor']} must exceed low_freq_factor")


def rope_type(scaling: dict | None) -> str:
    """Kind of rope scaling; old config files call the key "type"."""
    return (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
