"""Families of HF models: what their config.json says in the fields of ModelConfig, what their tensors are called, and back.

Our parameters carry the names of HF's Llama, so for most families a name is a prefix. GPT-2 has names of its own, keeps q, k
and v in one matrix and stores its linear layers transposed ("Conv1D", [in, out]); Phi-3 fuses q, k, v and gate, up. Mistral
and Phi-3 compute what Llama does, and are written as Llamas. What is not understood is refused by name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch

from model.config import LARGEST_REAL, LARGEST_SIZE, MOST_LAYERS, ROPE_KEYS, ModelConfig, rope_type, show

HEADS = {"LMHeadModel": "causal", "ForCausalLM": "causal", "Model": "causal", "ForSequenceClassification": "classifier"}
GELUS = ("gelu_new", "gelu_pytorch_tanh")
PLAIN = {  # settings that change what a model computes, and the values that mean what ours computes
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1),
    "pruned_heads": (None, {}),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "add_cross_attention": (None, False),
    "use_bidirectional_attention": (None, False),
}


# 1. values of a stranger's JSON


def show_names(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return show(first, 100) + (f" and {len(others)} more" if others else "")


def size(raw: dict, key: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
    value = default if raw.get(key) is None else raw[key]
    if value is None:
        raise ValueError(f"{key} is missing")
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{key} is {show(value)}; a whole number from 1 to {most} was expected")
    return value


def real(raw: dict, key: str, default: float | None = None, least: float = 0.0) -> float:
    value = default if raw.get(key) is None else raw[key]
    if value is None:
        raise ValueError(f"{key} is missing")
    if type(value) not in (int, float) or not least < value < LARGEST_REAL:
        raise ValueError(f"{key} is {show(value)}; a number above {least} was expected")
    return value


def flag(raw: dict, key: str, default: bool) -> bool:
    value = default if raw.get(key) is None else raw[key]
    if type(value) is not bool:
        raise ValueError(f"{key} is {show(value)}; true or false was expected")
    return value


def one_of(raw: dict, key: str, known: tuple) -> None:
    if raw.get(key) not in known:
        raise ValueError(f"{key} is {show(raw[key])}; only {' or '.join(map(repr, known))} is understood")


def per_layer(raw: dict, key: str, known: tuple) -> list | None:
    """One of the known values for every layer; None where the key is missing."""
    values, layers = raw.get(key), raw.get("num_hidden_layers")
    if values is None or values == []:
        return None
    if not isinstance(values, list) or any(x not in known or type(x) is not type(known[0]) for x in values):
        raise ValueError(f"{key} are {show(values)}; only {' and '.join(map(str, known))} are understood")
    if len(values) != layers:
        raise ValueError(f"{key} has {len(values)} entries; one for each of {show(layers)} layers was expected")
    return values


def rope(raw: dict, theta: float = 10000.0) -> dict:
    """rope_theta and rope_scaling of both dialects: `rope_parameters` holds both (transformers 5), or each has a key."""
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise ValueError(f"the rope parameters are {show(scaling)}; one set for all layers was expected")
    kind = rope_type(scaling)
    if kind not in list(ROPE_KEYS):
        raise ValueError(f"rope_type {show(kind)} is not one of {', '.join(ROPE_KEYS)}")
    if scaling.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"partial_rotary_factor is {show(scaling['partial_rotary_factor'])}; only 1 is understood")
    values = {key: real(scaling, key) for key in ROPE_KEYS[kind]}
    theta = float(real(scaling, "rope_theta", real(raw, "rope_theta", theta)))
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **values} if values else None}


# 2. from config.json, family by family


def gpt2(raw: dict) -> dict:
    one_of(raw, "activation_function", (None, *GELUS))
    return dict(norm="layer", activation="gelu", positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True)


def llama(raw: dict) -> dict:
    bias = flag(raw, "attention_bias", False)
    return dict(qkv_bias=bias, out_bias=bias, mlp_bias=flag(raw, "mlp_bias", False), **rope(raw))


def qwen2(raw: dict) -> dict:
    return dict(qkv_bias=True, **rope(raw))  # q, k and v always have a bias, and no key says so


def qwen3(raw: dict) -> dict:
    return llama(raw | {"mlp_bias": False}) | dict(qk_norm=True)


def smollm3(raw: dict) -> dict:
    with_rope = per_layer(raw, "no_rope_layers", (1, 0))  # 1: with RoPE, whatever the name says
    every = size(raw, "no_rope_layer_interval", 4)
    layers = range(size(raw, "num_hidden_layers", most=MOST_LAYERS))
    without = [i for i in layers if (with_rope[i] == 0 if with_rope else (i + 1) % every == 0)]
    return llama(raw) | rope(raw, 2e6) | dict(no_rope=tuple(without))


def olmo2(raw: dict) -> dict:
    return llama(raw | {"mlp_bias": False}) | dict(norm_place="after", qk_norm=True, qk_norm_over="width")


def granite(raw: dict) -> dict:
    return llama(raw) | dict(
        embedding_scale=real(raw, "embedding_multiplier", 1.0),
        attention_scale=real(raw, "attention_multiplier", 1.0),
        residual_scale=real(raw, "residual_multiplier", 1.0),
        logit_divisor=real(raw, "logits_scaling", 1.0),
    )


def gemma(raw: dict) -> dict:
    """What Gemma 2 and 3 have in common, but for RoPE."""
    bias, cap = flag(raw, "attention_bias", False), raw.get("final_logit_softcapping")
    return dict(
        norm="offset_rms",
        norm_place="both",
        activation="geglu",
        qkv_bias=bias,
        out_bias=bias,
        embedding_scale=size(raw, "hidden_size") ** 0.5,
        attention_scale=size(raw, "query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=None if cap is None else real(raw, "final_logit_softcapping"),
    )


def gemma2(raw: dict) -> dict:
    cap = raw.get("attn_logit_softcapping")
    cap = None if cap is None else real(raw, "attn_logit_softcapping")
    return gemma(raw) | rope(raw) | dict(attention_softcap=cap)


def gemma3(raw: dict) -> dict:
    """Its sliding layers turn by a theta of their own, which transformers 5 writes as one set of parameters a kind."""
    one_of(raw, "attn_logit_softcapping", (None,))
    kinds = raw.get("rope_parameters")
    if isinstance(kinds, dict) and kinds.keys() & {"full_attention", "sliding_attention"}:
        full, local = (kinds.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
        full, local = rope({"rope_parameters": full}, 1e6), rope({"rope_parameters": local})
    else:
        full, local = rope(raw, 1e6), rope({"rope_theta": raw.get("rope_local_base_freq")})
    if local["rope_scaling"]:
        raise ValueError(
            f"the rope scaling of sliding layers is {show(local['rope_scaling'])}; only none is understood"
        )
    sliding = tuple(i for i, kind in enumerate(attention_kinds(raw)) if kind == "sliding_attention")
    return gemma(raw) | full | dict(qk_norm=True, local_rope=sliding, local_theta=local["rope_theta"])


@dataclass(frozen=True)
class Family:
    """How one model_type of HF is read."""

    name: str  # its classes': LlamaForCausalLM
    fields: Callable[[dict], dict]  # config.json -> fields of ModelConfig beside the sizes
    defaults: dict = None  # what a missing key means to its class, where that is not what it means to Llama's
    act: tuple = (None, "silu", "swish")  # activations that are understood
    act_key: str = "hidden_act"


GEMMA = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEGLU = dict(act=(None, *GELUS), act_key="hidden_activation")
FAMILIES = {
    "gpt2": Family("GPT2", gpt2, {"tie_word_embeddings": True}),
    "llama": Family("Llama", llama),
    "mistral": Family("Mistral", rope, {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family("Qwen2", qwen2, {"num_key_value_heads": 32, "sliding_window": 4096}),
    "qwen3": Family("Qwen3", qwen3, {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096}),
    "smollm3": Family("SmolLM3", smollm3, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "olmo2": Family("Olmo2", olmo2, {"rms_norm_eps": 1e-5}),
    "phi3": Family("Phi3", rope, {"rms_norm_eps": 1e-5}),
    "granite": Family("Granite", granite),
    "gemma2": Family("Gemma2", gemma2, GEMMA | CAPS, **GEGLU),
    "gemma3_text": Family("Gemma3", gemma3, GEMMA, **GEGLU),
}


def attention_kinds(raw: dict) -> list[str]:
    """full_attention | sliding_attention of every layer, as its class makes them where no list says so."""
    full, sliding = "full_attention", "sliding_attention"
    family, layers = raw["model_type"], range(size(raw, "num_hidden_layers", most=MOST_LAYERS))
    everywhere, on = raw.get("sliding_window") is not None, flag(raw, "use_sliding_window", False)
    if family in ("mistral", "phi3"):
        return [sliding if everywhere else full for _ in layers]
    kinds, every, first = per_layer(raw, "layer_types", (full, sliding)), None, None
    if family in ("qwen2", "qwen3"):
        first = size(raw, "max_window_layers", 28)
        made = [sliding if i >= first else full for i in layers]
    elif family == "smollm3":
        made = [sliding if i in smollm3(raw)["no_rope"] else full for i in layers]
    elif family in ("gemma2", "gemma3_text"):
        every = size(raw, "sliding_window_pattern", 6) if family == "gemma3_text" else 2
        return kinds or [sliding if (i + 1) % every else full for i in layers]
    else:
        made, everywhere = [full for _ in layers], False
    if on and not everywhere:
        raise ValueError(f"use_sliding_window is true; {family} has no sliding_window")
    if not on and sliding in (kinds or ()):
        raise ValueError(f"layer_types are {show(kinds)}; without use_sliding_window only full_attention is understood")
    return kinds or made if on else [full for _ in layers]


def model_config(raw: dict) -> ModelConfig:
    """Our shape of a config.json; a missing key has the default of its model_type. ValueError for what is not ours.

    Where layers attend through a sliding window, the context is no longer than that: up to there it hides nothing.
    """
    family = raw.get("model_type")
    if family is None:
        raise ValueError("there is no model_type: not the config.json of an HF-format model")
    if family not in list(FAMILIES):
        raise ValueError(f"model_type {show(family)} is not one of {', '.join(FAMILIES)}")
    known = FAMILIES[family]
    raw = (known.defaults or {}) | raw
    for key, plain in PLAIN.items():
        one_of(raw, key, plain)
    one_of(raw, known.act_key, known.act)
    if family == "gpt2":
        width = size(raw, "n_embd")
        return ModelConfig(
            vocab_size=size(raw, "vocab_size"),
            width=width,
            layers=size(raw, "n_layer", most=MOST_LAYERS),
            heads=size(raw, "n_head"),
            ffn=size(raw, "n_inner", 4 * width),
            context=size(raw, "n_positions"),
            norm_eps=real(raw, "layer_norm_epsilon", 1e-5),
            tied=flag(raw, "tie_word_embeddings", True),
            **gpt2(raw),
        )
    if family != "smollm3":
        one_of(raw, "no_rope_layers", (None, []))
    heads, context = size(raw, "num_attention_heads"), size(raw, "max_position_embeddings")
    if "sliding_attention" in attention_kinds(raw):
        context = min(context, size(raw, "sliding_window"))
    return ModelConfig(
        vocab_size=size(raw, "vocab_size"),
        width=size(raw, "hidden_size"),
        layers=size(raw, "num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        kv_heads=size(raw, "num_key_value_heads", heads),
        head_dim=None if raw.get("head_dim") is None else size(raw, "head_dim"),
        ffn=size(raw, "intermediate_size"),
        context=context,
        norm_eps=real(raw, "rms_norm_eps", 1e-6),
        tied=flag(raw, "tie_word_embeddings", False),
        **known.fields(raw),
    )


def model_kind(raw: dict) -> str:
    """causal | classifier, by the class that the directory was saved from."""
    name = FAMILIES[raw["model_type"]].name
    named = raw.get("architectures") or [name + "Model"]
    suffix = str(named[0]).removeprefix(name).removeprefix("Text") if isinstance(named, list) else ""
    if suffix not in HEADS:
        raise ValueError(f"architectures is {show(named)}; a causal LM or a sequence classifier was expected")
    return HEADS[suffix]


# 3. to config.json

ANY = object()
# what a family can say beside the sizes; every other field has its default
LLAMA = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "tied", "rope_theta", "rope_scaling"), ANY)
QWEN3 = LLAMA | dict(qk_norm=True, mlp_bias=False)
OF_GEMMA = LLAMA | dict(norm="offset_rms", norm_place="both", activation="geglu", mlp_bias=False)
OF_GEMMA |= dict.fromkeys(("embedding_scale", "attention_scale", "logit_softcap"), ANY)
SAYS = {
    "gpt2": dict(norm="layer", activation="gelu", positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True)
    | dict(tied=ANY, rope_theta=ANY, rope_scaling=ANY),
    "qwen3": QWEN3,
    "qwen2": LLAMA | dict(qkv_bias=True, out_bias=False, mlp_bias=False),
    "llama": LLAMA,
    "smollm3": LLAMA | dict(no_rope=ANY),
    "olmo2": QWEN3 | dict(norm_place="after", qk_norm_over="width"),
    "granite": LLAMA | dict.fromkeys(("embedding_scale", "attention_scale", "residual_scale", "logit_divisor"), ANY),
    "gemma2": OF_GEMMA | dict(attention_softcap=ANY),
    "gemma3_text": OF_GEMMA | dict(qk_norm=True, local_rope=ANY, local_theta=ANY),
}
SIZES = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn", "context", "norm_eps")
DEFAULT = {field.name: field.default for field in fields(ModelConfig) if field.name not in SIZES}


def differences(config: ModelConfig, family: str) -> list[str]:
    """What of the config a family has no place for, as "field=value"."""
    expected = DEFAULT | SAYS[family]
    found = {name: getattr(config, name) for name in expected}
    odd = [name for name, value in expected.items() if value is not ANY and found[name] != value]
    own_head_dim = family in ("llama", "qwen3", "gemma2", "gemma3_text")
    if not own_head_dim and config.heads * config.head_dim != config.width:
        odd.append("head_dim")
    if family not in ("qwen2", "qwen3") and config.width % config.heads:
        odd.append("heads")
    if family == "gpt2" and config.kv_heads != config.heads:
        odd.append("kv_heads")
    if family not in ("gpt2", "qwen2") and config.qkv_bias != config.out_bias:
        odd.append("out_bias")
    if family in ("gemma2", "gemma3_text"):
        if config.embedding_scale != config.width**0.5:
            odd.append("embedding_scale")
        if config.attention_scale is None or pre_attention_scalar(config) ** -0.5 != config.attention_scale:
            odd.append("attention_scale")
    return [f"{name}={getattr(config, name)}" for name in odd]


def pre_attention_scalar(config: ModelConfig) -> int:
    """Gemma's way to say 1 / scale^2."""
    return max(1, round(config.attention_scale**-2))


def family_of(config: ModelConfig) -> str:
    """The model_type that computes what `config` does; ValueError where no family of HF does."""
    odd = {family: differences(config, family) for family in SAYS}
    for family, names in odd.items():
        if not names:
            return family
    nearest = min(odd, key=lambda family: len(odd[family]))
    raise ValueError(
        f"no HF family ({', '.join(SAYS)}) has this shape: {nearest}, which is the nearest, cannot have "
        f"{', '.join(odd[nearest])}"
    )


def hf_config(config: ModelConfig) -> dict:
    """config.json in the dialect that transformers 4 and 5, vLLM and llama.cpp read: rope_theta beside rope_scaling."""
    family = family_of(config)
    if family == "gpt2":
        return {
            "model_type": family,
            "vocab_size": config.vocab_size,
            "n_embd": config.width,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_inner": None if config.ffn == 4 * config.width else config.ffn,
            "n_positions": config.context,
            "n_ctx": config.context,  # llama.cpp reads this one
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": "gelu_new",
            "tie_word_embeddings": config.tied,
            "attn_pdrop": 0.0,  # the class would say 0.1: nobody trained with dropout here
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    scaling = config.rope_scaling and {"rope_type": rope_type(config.rope_scaling)}
    scaling = scaling and {**scaling, **{key: config.rope_scaling[key] for key in ROPE_KEYS[scaling["rope_type"]]}}
    content = {
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        FAMILIES[family].act_key: "gelu_pytorch_tanh" if config.activation == "geglu" else "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tied,
    }
    return content | own_keys(config, family)


def own_keys(config: ModelConfig, family: str) -> dict:
    """What a family's config.json says beside what all do."""
    layers = range(config.layers)
    bias = {"attention_bias": config.qkv_bias}
    biases = bias | {"mlp_bias": config.mlp_bias}
    no_window = {"use_sliding_window": False, "sliding_window": None}
    if family in ("gemma2", "gemma3_text"):
        gemma = bias | {
            "head_dim": config.head_dim,
            "query_pre_attn_scalar": pre_attention_scalar(config),
            "final_logit_softcapping": config.logit_softcap,
            "attn_logit_softcapping": config.attention_softcap,
            "sliding_window": config.context,  # hides nothing: the context is no longer than the model's own window
        }
        if family == "gemma2":
            return gemma
        kinds = ["sliding_attention" if i in config.local_rope else "full_attention" for i in layers]
        return gemma | {"layer_types": kinds, "rope_local_base_freq": config.local_theta}
    return {
        "llama": {"head_dim": config.head_dim, **biases},
        "qwen2": no_window,
        "qwen3": {"head_dim": config.head_dim, **bias, **no_window},
        "smollm3": {"no_rope_layers": [int(i not in config.no_rope) for i in layers], **biases, **no_window},
        "olmo2": bias,
        "granite": biases
        | {
            "embedding_multiplier": config.embedding_scale,
            "attention_multiplier": config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
            "residual_multiplier": config.residual_scale,
            "logits_scaling": config.logit_divisor,
        },
    }[family]


# 4. names

RENAMED = {  # our module -> the family's, where it is not Llama's name
    "gpt2": {
        "embed_tokens": "wte",
        "embed_positions": "wpe",
        "norm": "ln_f",
        "input_layernorm": "ln_1",
        "self_attn.q_proj": "attn.c_attn",  # three thirds of one matrix
        "self_attn.k_proj": "attn.c_attn",
        "self_attn.v_proj": "attn.c_attn",
        "self_attn.o_proj": "attn.c_proj",
        "post_attention_layernorm": "ln_2",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
    "phi3": dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.qkv_proj")
    | dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up_proj"),
    "olmo2": {
        "attention_output_norm": "post_attention_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
}
RENAMED["gemma2"] = RENAMED["olmo2"] | {"post_attention_layernorm": "pre_feedforward_layernorm"}
RENAMED["gemma3_text"] = RENAMED["gemma2"]
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # stored transposed


def hf_prefix(family: str) -> str:
    return "transformer." if family == "gpt2" else "model."


def hf_module(module: str, family: str) -> str:
    """The HF path of one of our modules: layers.0.self_attn.q_proj -> model.layers.0... or transformer.h.0.attn.c_attn"""
    if module == "lm_head":
        return module
    names, place = RENAMED.get(family, {}), hf_prefix(family)
    if module.startswith("layers."):
        _, layer, module = module.split(".", 2)
        place += f"h.{layer}." if family == "gpt2" else f"layers.{layer}."
    return place + names.get(module, module)


def hf_layout(names: Iterable[str], family: str) -> dict[str, list[str]]:
    """HF tensor -> those of our parameters whose rows, in this order, it is made of."""
    layout: dict[str, list[str]] = {}
    for name in names:  # a state_dict lists q, k, v and gate, up in this order, which is that of the fused ones
        module, _, parameter = name.rpartition(".")
        layout.setdefault(f"{hf_module(module, family)}.{parameter}", []).append(name)
    return layout


def hf_shape(name: str, parts: list[torch.Size]) -> tuple[int, ...]:
    """Shape in the file of the tensor that is made of these parts."""
    shape = (sum(part[0] for part in parts), *parts[0][1:])
    return shape[::-1] if name.endswith(CONV1D) else shape
