"""What the ranks of train_ppo.py send each other in an iteration, worked out for 1 to 512 of them.

    python bench/scale.py --model=0.5B --layout=shared              # DDP
    python bench/scale.py --model=7B --layout=full --shard=true     # FSDP
    python bench/scale.py --model=7B --layout=full --shard=true --per_node=8   # HSDP, a copy of the weights a machine

Nothing runs: see rlhf/ppo/traffic.py. tests/test_scale.py counts the same calls with the same bytes in runs of 2 and 4
processes, and in one that takes itself for a rank of up to 512. Bytes leave a rank as in a ring, which is the least it sends.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plan import SHAPES

from model.config import ModelConfig
from rlhf.infra import config
from rlhf.ppo.traffic import PURPOSES, Plan, calls

Model = Literal["0.5B", "1.5B", "7B", "70B"]
Layout = Literal["full", "shared", "adapters", "branch"]
RANKS = tuple(2**i for i in range(10))


@dataclass(frozen=True)
class Config:
    model: Model = "0.5B"  # shape of Qwen2.5 or Llama 3.1
    layout: Layout = "shared"  # as in train_ppo.py
    shard: bool = False  # weights over the ranks (FSDP) and not whole on each (DDP)
    per_node: int | None = None  # ranks over which a copy of the weights is cut; none = all [shard=true]
    rows: int = 32  # responses of an iteration on a rank
    micro_batch: int = 4  # responses per forward
    minibatches: int = 4  # optimiser steps per epoch
    epochs: int = 2  # passes over the responses
    tokens: int = 1024  # longest prompt and response
    branch_layers: int = 4  # top layers that are trained [layout=branch]
    recompute: bool = False  # as in train_ppo.py

    def __post_init__(self):
        config.at_least(self, per_node=2, rows=1, micro_batch=1, minibatches=1, epochs=1, tokens=2, branch_layers=1)
        if self.per_node is not None and (not self.shard or self.per_node not in RANKS):
            raise ValueError(
                f"--per_node={self.per_node} --shard={str(self.shard).lower()}: --shard=true cuts {RANKS[-1]} ranks and "
                "fewer into machines of a power of two"
            )
        if self.rows % (self.minibatches * self.micro_batch):
            unit = self.minibatches * self.micro_batch
            raise ValueError(f"rows {self.rows} is not a multiple of minibatches x micro_batch = {unit}")


def main() -> None:
    cfg = config.parse(Config)
    model = ModelConfig(context=max(4096, cfg.tokens), **SHAPES[cfg.model.replace("B", " B")])
    what = "sharded" if cfg.shard else "DDP"
    print(
        f"{cfg.model} {cfg.layout}, {what}, float32: GB that a rank sends in an iteration, {cfg.rows} responses of ..."
    )
    print("| ranks | responses | collectives | " + " | ".join(PURPOSES) + " | all |")
    print("|---" * (len(PURPOSES) + 4) + "|")
    for ranks in RANKS:
        shards = min(ranks, cfg.per_node or ranks) if cfg.shard else 1
        how = {name: getattr(cfg, name) for name in ("rows", "micro_batch", "minibatches", "epochs", "tokens")}
        plan = Plan(
            model, cfg.layout, ranks, branch_layers=cfg.branch_layers, recompute=cfg.recompute, shards=shards, **how
        )
        found = calls(plan)
        sent = [sum(n * call.sent for call, n in found.items() if call.purpose == purpose) for purpose in PURPOSES]
        gb = " | ".join(f"{x / 1e9:.3g}" for x in [*sent, sum(sent)])
        print(f"| {ranks} | {ranks * cfg.rows} | {sum(found.values())} | {gb} |")


if __name__ == "__main__":
    config.run(main)
