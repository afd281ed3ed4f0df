"""Memory of one rank before anything is allocated: what each layout of the roles needs for weights, training and passes.

The models are built without memory (torch's meta device), so weights, gradients and moments are counted, not estimated;
activations, logits and cache follow from the sizes of a micro-batch. The parts are not all needed at the same moment: acting,
judging and learning have their own sums, and the largest is the peak; what --offload names is left out where it sleeps. Of
shards a rank keeps its part; what it gathers comes on top: the whole policy to sample, the layers at work to learn. In half
precision frozen matrices, the copy that samples and the cache take it, what autocast makes of the trained ones (`casts`)
comes on top, and gradients, moments and the residual stream stay float32.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from model.half import has_room_for_panels
from model.hf import NoInit, empty_model
from model.panels import FEWEST, MOST, STEPS, can_pack, gain, matrices_of
from model.transformer import VOCABULARY_PART, ModelConfig, Transformer
from rlhf.lm.checkpoints import count
from rlhf.lm.trunks import LoRA
from rlhf.ppo.roles import CRITICS, LAYOUTS, trains

FLOAT = 4  # bytes
HELD = ("baseline", "weights", "reference", "reward", "bound", "states", "optimiser")  # in every phase
PASS = ("logits", "gathered", "casts")  # of a forward
PARTS = (*HELD[:6], "sampler", "gradients", "optimiser", "cache", "activations", "logits", "whole", *PASS[1:])
PHASES = {  # which parts are there at once
    "act": (*HELD, "sampler", "cache", "logits", "whole"),
    "judge": (*HELD, *PASS),
    "learn": (*HELD, "gradients", "activations", *PASS),
}
CUT = ("weights", "sampler", "reference", "reward", "bound", "optimiser")  # of which a shard keeps its part
RANKS = tuple(2**k for k in range(10))  # over which a model is tried
SLEEPS = {  # what --offload names: its part, and the phases in which it lies elsewhere
    "reference": ("reference", ("act", "learn")),
    "reward": ("reward", ("act", "learn")),
    "optimizer": ("optimiser", ("act", "judge")),
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
    depths: frozenset[int] = frozenset()  # whose states of the trunk a reward model reads that is a head there
    recompute: bool = False  # --recompute
    sampler: bool = True  # does this process sample, or do servers?
    drawn: int | None = None  # rows whose next tokens are drawn together; None: of the whole batch
    ranks: int = 1  # over which --shard=true cuts weights, gradients and moments
    baseline: int = 0  # bytes that the process holds before: Python, torch, libraries
    dtype: torch.dtype = torch.float32  # in which frozen matrices are stored
    product: torch.dtype | None = None  # in which matrices are multiplied; None: as they are stored
    offload: tuple[str, ...] = ()  # --offload
    bounded: bool = False  # --max_kl: trained weights of the last policy that kept it stay
    on_cpu: bool = False  # a CPU samples by panels, where it has some of the type
    alone: bool = True  # no other rank learns with it: its gradients go when a step is taken


def plan(config: ModelConfig, sizes: Sizes, layout: str) -> dict[str, int]:
    """Bytes of every part; ValueError where the layout does not fit the model."""
    s, base, critic = sizes, empty_model(config), sizes.critic or CRITICS[layout]
    critic = "separate" if layout == "full" and critic == "shared" else critic
    with NoInit():
        roles = LAYOUTS[layout](base, critic, 1.0, s.lora, min(s.branch_layers, config.layers))
    roles = roles.stored_in(s.dtype, s.sampler)
    policy, half = roles.policy, (s.product or s.dtype).itemsize
    trained = count(x for x in policy.parameters() if x.requires_grad)
    models = [model for model in (policy.model, policy.value_trunk) if model is not None]
    # a tied embedding's gradient comes beside what there is of it: in two parts, or where a CPU adds up in place in one
    in_place = s.on_cpu and half == FLOAT and not s.recompute and config.vocab_size > 2 * VOCABULARY_PART
    embeddings = sum(model.embed_tokens.weight.numel() for model in models if trains_embedding(model))
    beside = embeddings if in_place else 2 * embeddings
    cast = count(x for x in policy.parameters() if x.requires_grad and x.ndim > 1) if half < FLOAT else 0
    if half < s.dtype.itemsize:  # of frozen matrices too, for the gradient of what goes in
        learned = (block for model in models for block in model.layers if learns(block))
        cast += count(x for block in learned for x in block.parameters() if not x.requires_grad and x.ndim > 1)
    length = s.prompt + s.response - 1
    kept = sum(kept_per_token(config, length, half) for model in models for block in model.layers if learns(block))
    if s.recompute:  # what goes into every block, and all of one
        blocks = sum(learns(block) for model in models for block in model.layers)
        kept = kept // max(1, blocks) + FLOAT * config.width * blocks
    kept += sum(2 * FLOAT * config.width for _ in models)  # the final norm
    # and gradient; or those of a step of sampling, and what is drawn from: scaled, and their probabilities
    sampled = (FLOAT if half == FLOAT else 2 * half) * s.batch + 3 * FLOAT * min(s.batch, s.drawn or s.batch)
    logits = max(2 * half * s.micro_batch * s.response, sampled * s.sampler) * config.vocab_size
    columns = min(s.prompt + s.response, config.context) + 1
    # of a rollout's tokens: those that are kept for all epochs, and those that the sampler has seen
    roles.frozen.read(s.depths)
    seen = roles.seen()
    states = 1 + s.sampler * len(seen) if seen else 0
    alone = {id(x) for x in base.parameters()}.isdisjoint(id(x) for x in policy.parameters())
    reference = size_of(base.parameters()) if alone else 0  # otherwise the policy computes with it too
    own = size_of([*base.parameters(), *policy.parameters()])
    if s.on_cpu and roles.half and has_room_for_panels(policy.model, s.dtype):
        embedding = policy.model.embed_tokens.weight
        sampler = in_panels(policy.model, s.dtype) + s.dtype.itemsize * embedding.requires_grad * embedding.numel()
    elif s.on_cpu and s.alone and s.sampler and half == FLOAT and keeps_panels(policy.model, s.batch, s.response):
        sampler = in_panels(policy.model, s.dtype)
    else:
        sampler = size_of([*base.parameters(), *policy.parameters(), *roles.sampler().parameters()]) - own
    parts = {
        "baseline": s.baseline,
        "weights": own - reference,
        "sampler": sampler,
        "reference": reference,
        "reward": s.dtype.itemsize * s.reward,
        "bound": FLOAT * trained * s.bounded,
        "states": FLOAT * s.batch * columns * config.width * states,
        "casts": half * cast,
        "gradients": FLOAT * (trained + beside),
        "optimiser": 2 * FLOAT * trained,
        "cache": half * 2 * config.layers * s.sampler * s.batch * columns * config.kv_heads * config.head_dim,
        "activations": s.micro_batch * length * kept,
        "logits": logits,
    }
    if s.ranks > 1:
        parts |= {name: FLOAT * -(-parts[name] // FLOAT // s.ranks) for name in CUT}
        parts["gradients"] = FLOAT * -(-trained // s.ranks)
        # the policy that samples; before it, a reward model that is opened and not yet cut
        parts["whole"] = FLOAT * max(count(policy.model.parameters()), s.reward)
        # outside of the layers the weights stay for the backward, and their gradient, in two parts or in what it is sent in
        outside = sum(count(model.parameters()) - count(model.layers.parameters()) for model in models)
        learned = sum(count(x for x in model.parameters() if x.requires_grad) for model in models) - sum(
            count(x for x in model.layers.parameters() if x.requires_grad) for model in models
        )
        layer = count(base.layers[0].parameters())  # two of them, a gradient and what it is sent in
        parts["gathered"] = FLOAT * (outside + 2 * learned + 4 * layer)
    return {name: parts.get(name, 0) for name in PARTS}


def phases(parts: dict[str, int], offload: Iterable[str] = ()) -> dict[str, int]:
    """Bytes of every phase, without what sleeps in it."""
    asleep = {(part, phase) for part, when in map(SLEEPS.get, offload) for phase in when}
    return {phase: sum(parts[x] for x in names if (x, phase) not in asleep) for phase, names in PHASES.items()}


def peak(parts: dict[str, int], offload: Iterable[str] = ()) -> int:
    """Bytes of the phase that needs most."""
    return max(phases(parts, offload).values())


def fewest(
    config: ModelConfig, on: Callable[[int], Sizes], layout: str, gb: float
) -> tuple[int | None, dict[str, int]]:
    """The fewest of RANKS on which no rank needs more than `gb` GB, None where that are more; and the plan of a rank there.

    on: what a run makes of the model on so many ranks.
    """
    for ranks in RANKS:
        sizes = on(ranks)
        parts = plan(config, sizes, layout)
        if peak(parts, sizes.offload) <= gb * 1e9:
            return ranks, parts
    return None, parts


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes; what shares its memory counts once."""
    storages = [x.untyped_storage() for x in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def in_panels(model: Transformer, dtype: torch.dtype) -> int:
    """Bytes of the panels of all that a model multiplies by."""
    return dtype.itemsize * sum(x.weight.numel() for x in matrices_of(model))


def keeps_panels(model: Transformer, rows: int, steps: int) -> bool:
    """Does it sample with panels in float32?"""
    return can_pack(torch.float32) and trains(model) and gain(model) and FEWEST <= rows <= MOST and steps >= STEPS


def trains_embedding(model: Transformer) -> bool:
    return model.config.tied and model.embed_tokens.weight.requires_grad


def learns(module: torch.nn.Module) -> bool:
    return any(x.requires_grad for x in module.parameters())


def kept_per_token(c: ModelConfig, length: int, half: int = FLOAT) -> int:
    """Bytes that a block keeps for its backward pass: inputs of norms, matrices, attention and activation.

    length: tokens of a row, whose scores are kept where they are capped. half: bytes of a number that is multiplied.
    """
    # q, k, v and what comes out, in float32 also where matrices are not; and that again, for o_proj
    attention = FLOAT * 2 * (c.heads + c.kv_heads) * c.head_dim + half * c.heads * c.head_dim
    if c.qk_norm:
        attention += FLOAT * (c.heads + c.kv_heads) * c.head_dim
    if c.attention_softcap is not None:  # two steps of the scores; k and v once for every head
        attention += FLOAT * c.heads * (2 * length + 2 * c.head_dim)
    mlp = half * 2 * c.ffn  # gate and up (model/gated.py); or up and its GELU
    # x and x normalised, and the input of the matrices
    norms = (FLOAT * (8 if c.norm_place == "both" else 4) + half * 2) * c.width
    return norms + attention + mlp


def table(config: ModelConfig, sizes: Sizes, layout: str) -> str:
    """The plans of all layouts as text, GB: every part, and what a phase needs together; a star marks the run's own."""
    plans = {name: plan(config, sizes, name) for name in LAYOUTS}
    asleep = f", asleep between its phases: {', '.join(sizes.offload)}" if sizes.offload else ""
    cut, kind = (
        f", one of {sizes.ranks} shards" if sizes.ranks > 1 else "",
        str(sizes.product or sizes.dtype).removeprefix("torch."),
    )
    lines = [
        f"memory of one rank in GB, {kind}{cut}: {sizes.batch} x ({sizes.prompt} + {sizes.response}) tokens{asleep}"
    ]
    lines += [" " * 14 + "".join(f"{name + '*' * (name == layout):>11}" for name in plans)]
    rows = {part: [parts[part] for parts in plans.values()] for part in PARTS if any(p[part] for p in plans.values())}
    sums = [phases(parts, sizes.offload) for parts in plans.values()]
    rows |= {phase: [each[phase] for each in sums] for phase in PHASES}
    rows["peak"] = [max(each.values()) for each in sums]
    return "\n".join(
        lines + [f"{name:<14}" + "".join(f"{x / 1e9:>11.3f}" for x in numbers) for name, numbers in rows.items()]
    )


def gpus(config: ModelConfig, on: Callable[[int], Sizes], layout: str, gb: float) -> str:
    """How many GPUs of `gb` GB every layout needs, and what each then holds, as text; a star marks the run's own."""
    found = {name: fewest(config, on, name, gb) for name in LAYOUTS}
    cells = {
        "": [name + "*" * (name == layout) for name in found],
        "GPUs": [str(ranks or f"> {RANKS[-1]}") for ranks, _ in found.values()],
        "GB on each": [f"{peak(parts, on(ranks or RANKS[-1]).offload) / 1e9:.3f}" for ranks, parts in found.values()],
    }
    head = f"fewest GPUs of {gb:g} GB, which share the batch; --shard=true where there are several"
    return "\n".join([head, *(f"{name:<14}" + "".join(f"{x:>11}" for x in row) for name, row in cells.items())])
