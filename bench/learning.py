"""Learning as a share of the product rate: a step of `shared` PPO, and its matrix products alone, in one process by turns.

    python bench/learning.py                      # SmolLM2's shape, 1,536 tokens a micro-batch
    python bench/learning.py --rows=2 --length=48 # the micro-batch of bench/ppo.py
    python bench/learning.py --precision=bf16
    python bench/learning.py --ragged=true        # what rows save that end early

A step is forward, loss, backward, clipping and AdamW on random tokens, of which the second half of each row is the response.
Its products are run again alone, of the same sizes and as often: every linear layer forward, backward to its input and to its
weight, and the output matrix for the response, in the same precision. One thread, CPU seconds; share = seconds of the
products / of the step.

--ragged: responses end anywhere, and with --groups=4 each prompt has four of them. A step packs such rows, see
model/packed.py; beside it is the same step with padding, and with every prompt once for each answer.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import figures  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from model import packed  # noqa: E402
from model.transformer import ModelConfig, Transformer  # noqa: E402
from rlhf.infra import config, distributed, optim  # noqa: E402
from rlhf.lm.trunks import LoRA  # noqa: E402
from rlhf.ppo import update as ppo  # noqa: E402
from rlhf.ppo.roles import LAYOUTS, ActorCritic  # noqa: E402
from rlhf.ppo.rollout import Experience  # noqa: E402


@dataclass(frozen=True)
class Config:
    rows: int = 8  # of a micro-batch
    length: int = 192  # tokens of a row
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, as trainers do it
    ragged: bool = False  # rows that end early, packed against padded
    groups: int = 1  # neighbours that answer the same prompt [ragged=true]
    rounds: int = 3  # a step and what it is held against once per round, after one to warm up

    def __post_init__(self):
        config.at_least(self, rows=1, length=2, groups=1, rounds=1)


def main() -> None:
    cfg = config.parse(Config)
    torch.set_num_threads(1)
    model = ModelConfig(49152, 576, 30, 9, kv_heads=3, ffn=1536, context=2048, rope_theta=1e5)
    base = Transformer(model)
    base.init_weights(torch.Generator().manual_seed(1))
    policy = LAYOUTS["shared"](base, "shared", 1.0, LoRA(), 1).policy
    optimizer = optim.make_optimizer(policy, 3e-6, betas=(0.9, 0.999), eps=1e-5)
    batch, sizes = experience(cfg, model), [*products(policy, cfg)]
    precision = optim.amp(torch.device("cpu"), cfg.precision)
    if cfg.ragged:
        return packed_and_padded(cfg, policy, optimizer, batch, precision)
    operands = {
        size: [torch.randn(size[i], size[j]).to(precision.dtype) for i, j in ((0, 1), (2, 1), (0, 2))]
        for size in set(sizes)
    }
    found = []
    for _ in range(cfg.rounds + 1):
        start = time.process_time()
        step(policy, optimizer, batch, precision)
        middle = time.process_time()
        for size in sizes:
            x, weight, grad = operands[size]
            x @ weight.t(), grad @ weight, grad.t() @ x
        found.append((middle - start, time.process_time() - middle))
    flops = sum(6 * n * d * v for n, d, v in sizes)
    shares = [alone / whole for whole, alone in found[1:]]
    rates = [flops / alone / 1e9 for _, alone in found[1:]]
    print(json.dumps({"step_seconds": found[1:][0][0], "gflop": flops / 1e9, "shares": shares, "rates": rates}))
    said = figures.ratio(
        f"learning, SmolLM2, {cfg.rows} x {cfg.length} tokens, {cfg.precision}", "its products", shares
    )
    print(f"share {said} of the products' {statistics.median(rates):.0f} GFLOP/s")


def products(policy: ActorCritic, cfg: Config) -> Iterator[tuple[int, int, int]]:
    """(rows, inputs, outputs) of every matrix product of a forward."""
    tokens = cfg.rows * (cfg.length - 1)
    for module in policy.model.layers.modules():
        if isinstance(module, nn.Linear):
            yield tokens, module.in_features, module.out_features
    vocabulary, width = policy.model.embed_tokens.weight.shape
    yield cfg.rows * (cfg.length // 2), width, vocabulary


def experience(cfg: Config, model: ModelConfig) -> Experience:
    """Random tokens with random credit."""
    shape, generator = (cfg.rows, cfg.length), torch.Generator().manual_seed(2)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, cfg.length - cfg.length // 2 :] = True

    def random() -> Tensor:
        return torch.where(mask, torch.randn(shape, generator=generator), 0)

    blank = torch.zeros(shape)
    return Experience(
        tokens=torch.randint(3, model.vocab_size, shape, generator=generator), mask=mask, scores=blank[:, 0],
        lengths=torch.full((cfg.rows,), cfg.length), finished=mask[:, -1], logprobs=blank, entropy=blank,
        ref_logprobs=blank, values=blank, base_values=blank, sampler_logprobs=blank, parts=blank[:, :0],
        features=blank[..., None][..., :0],
        rewards=blank, advantages=random(), returns=random(),
    )  # fmt: skip


def packed_and_padded(
    cfg: Config, policy: ActorCritic, optimizer, whole: Experience, precision: optim.Precision
) -> None:
    start, limit = cfg.length - cfg.length // 2, packed.MOST_LEFT
    ends = torch.randint(start + 1, cfg.length + 1, (cfg.rows,), generator=torch.Generator().manual_seed(3))
    beyond, tokens = torch.arange(cfg.length) >= ends[:, None], whole.tokens.clone()
    tokens[:, :start] = tokens[torch.arange(cfg.rows) // cfg.groups * cfg.groups, :start]
    batch = replace(whole, tokens=tokens, lengths=ends)
    batch = batch.map_columns(lambda x: x.masked_fill(beyond, 0) if x.dim() == 2 else x).trim()
    found = {0.0: [], limit: []}
    for _ in range(cfg.rounds + 1):
        for packed.MOST_LEFT, seconds in found.items():
            began = time.process_time()
            step(policy, optimizer, batch, precision)
            seconds.append(time.process_time() - began)
    ratios = [a / b for a, b in list(zip(*found.values()))[1:]]
    what = f"learning, SmolLM2, {cfg.rows} x {start} to {cfg.length} tokens, {int(ends.sum())} in all, {cfg.groups} a prompt"
    print(f"{what}: {figures.ratio(what, 'padded', ratios)} times as fast as padded; {figures.cpu()}")


def step(policy: ActorCritic, optimizer: optim.AdamW, batch: Experience, precision: optim.Precision) -> None:
    ppo.accumulate_gradient(policy, batch, ppo.Objective(), len(batch), distributed.Dist(), precision)
    optim.step(optimizer, policy, precision.scaler, 1.0)


if __name__ == "__main__":
    config.run(main, stopped="stopped")
