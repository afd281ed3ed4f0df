"""Memory of one rank before anything is allocated: what each layout of the roles needs for weights, training and passes.

The models are built without memory (torch's meta device), so weights, gradients and moments are counted, not estimated;
activations, logits and cache follow from the sizes of a micro-batch. Everything is float32; the parts are not all needed
at the same moment: acting and learning have their own sums, and the larger is the peak. Of shards a rank keeps its part;
what it gathers comes on top: the whole policy to sample, the layers at work to learn.
"""

from dataclasses import dataclass

import torch

from model.transformer import ModelConfig, Transformer
from rlhf.lm.checkpoints import count, empty
from rlhf.lm.trunks import LoRA
from rlhf.ppo.roles import CRITICS, LAYOUTS

FLOAT = 4  # bytes
PARTS = ("baseline", "weights", "gradients", "optimiser", "cache", "activations", "logits", "whole", "gathered")
PHASES = {  # which parts are there at once; judging needs less than either
    "act": ("baseline", "weights", "optimiser", "cache", "logits", "whole"),
    "learn": ("baseline", "weights", "gradients", "optimiser", "activations", "logits", "gathered"),
}


@dataclass(frozen=True)
class Sizes:
    """What a run makes of a model, on one rank."""

    batch: int  # responses of an iteration
    micro_batch: int  # responses per forward
    prompt: int  # tokens
    response: int  # tokens
    critic: str | None = None  # None: as the layout says
    lora: LoRA = LoRA()
    branch_layers: int = 4
    reward: int = 0  # parameters of a reward model that shares none
    recompute: bool = False  # --recompute
    ranks: int = 1  # over which --shard=true cuts weights, gradients and moments
    baseline: int = 0  # bytes that the process holds before: Python, torch, libraries


def plan(config: ModelConfig, sizes: Sizes, layout: str) -> dict[str, int]:
    """Bytes of every part; ValueError where the layout does not fit the model."""
    s, base, critic = sizes, empty(config), sizes.critic or CRITICS[layout]
    critic = "separate" if layout == "full" and critic == "shared" else critic
    policy = LAYOUTS[layout](base, critic, 1.0, s.lora, min(s.branch_layers, config.layers)).policy
    trained = count(x for x in policy.parameters() if x.requires_grad)
    models = [model for model in (policy.model, policy.value_trunk) if model is not None]
    # the gradient of a tied embedding comes in two parts as large as itself, which are added up
    twice = sum(2 * model.embed_tokens.weight.numel() for model in models if trains_embedding(model))
    tokens = s.micro_batch * (s.prompt + s.response - 1)
    kept = sum(
        kept_per_token(config, s.prompt + s.response - 1) for model in models for block in model.layers if learns(block)
    )
    if s.recompute:  # what goes into every block, and all of one
        blocks = sum(learns(block) for model in models for block in model.layers)
        kept = kept // blocks + config.width * blocks
    kept += sum(2 * config.width for _ in models)  # the final norm
    logits = (
        max(2 * s.micro_batch * s.response, 4 * s.batch) * config.vocab_size
    )  # and gradient; or what sampling makes
    columns = min(s.prompt + s.response, config.context) + 1
    floats = {
        "weights": count([*base.parameters(), *policy.parameters()]) + s.reward,
        "gradients": trained + twice,
        "optimiser": 2 * trained,
        "cache": 2 * config.layers * s.batch * columns * config.kv_heads * config.head_dim,
        "activations": tokens * kept,
        "logits": logits,
    }
    if s.ranks > 1:
        floats |= {name: -(-floats[name] // s.ranks) for name in ("weights", "optimiser")}
        floats["gradients"] = -(-trained // s.ranks)
        floats["whole"] = count(policy.model.parameters())
        # outside of the layers the weights stay for the backward, and their whole gradient until it is handed out
        outside = sum(count(model.parameters()) - count(model.layers.parameters()) for model in models)
        learned = sum(count(x for x in model.parameters() if x.requires_grad) for model in models) - sum(
            count(x for x in model.layers.parameters() if x.requires_grad) for model in models
        )
        layer = count(base.layers[0].parameters())
        floats["gathered"] = outside + 2 * learned + twice + 4 * layer  # two layers, a gradient and what it is sent in
    return {"baseline": s.baseline} | {name: FLOAT * floats.get(name, 0) for name in PARTS[1:]}


def peak(parts: dict[str, int]) -> int:
    """Bytes of the phase that needs most."""
    return max(sum(parts[name] for name in names) for names in PHASES.values())


def trains_embedding(model: Transformer) -> bool:
    return model.config.tied and model.embed_tokens.weight.requires_grad


def learns(module: torch.nn.Module) -> bool:
    return any(x.requires_grad for x in module.parameters())


def kept_per_token(c: ModelConfig, length: int) -> int:
    """Numbers that a block keeps for its backward pass: inputs of norms, matrices, attention and activation.

    length: tokens of a row, whose scores are kept where they are capped.
    """
    attention = 3 * c.heads * c.head_dim + 2 * c.kv_heads * c.head_dim  # q, what comes out, again for o_proj; k, v
    if c.attention_softcap is not None:  # two steps of the scores; k and v once for every head
        attention += c.heads * (2 * length + 2 * c.head_dim)
    mlp = (4 if c.gated else 2) * c.ffn  # gate, its activation, up, their product; or up and its GELU
    norms = (10 if c.norm_place == "both" else 6) * c.width  # x, x normalised, and the input of the matrices
    return norms + attention + mlp


def table(config: ModelConfig, sizes: Sizes, layout: str) -> str:
    """The plans of all layouts as text, GB: every part, and what a phase needs together; a star marks the run's own."""
    plans = {name: plan(config, sizes, name) for name in LAYOUTS}
    cut = f", one of {sizes.ranks} shards" if sizes.ranks > 1 else ""
    lines = [f"memory of one rank in GB, float32{cut}: {sizes.batch} x ({sizes.prompt} + {sizes.response}) tokens"]
    lines += [" " * 14 + "".join(f"{name + '*' * (name == layout):>11}" for name in plans)]
    rows = {part: [parts[part] for parts in plans.values()] for part in PARTS if any(p[part] for p in plans.values())}
    rows |= {phase: [sum(parts[name] for name in PHASES[phase]) for parts in plans.values()] for phase in PHASES}
    rows["peak"] = [peak(parts) for parts in plans.values()]
    return "\n".join(
        lines + [f"{name:<14}" + "".join(f"{x / 1e9:>11.3f}" for x in numbers) for name, numbers in rows.items()]
    )
