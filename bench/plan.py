"""Which layout, and how many GPUs, for a model of this size: the plan of --plan at the shapes of known models.

    python bench/plan.py --gb=80
    python bench/plan.py --gb=80 --offload=true    # what sleeps between phases lies in the host's memory

Float32 weights and moments, 32 responses a rank in micro-batches of 4, 512 + 512 tokens, a reward model on the frozen trunk.
Nothing is allocated (torch's meta device); nothing of this ran at these sizes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.config import ModelConfig
from rlhf.infra import config
from rlhf.ppo.plan import SLEEPS, Sizes, peak, phases, plan
from rlhf.ppo.roles import LAYOUTS

SHAPES = {  # of Qwen2.5 and Llama 3.1
    "0.5 B": dict(width=896, layers=24, heads=14, kv_heads=2, ffn=4864, vocab_size=151936, tied=True, qkv_bias=True),
    "1.5 B": dict(width=1536, layers=28, heads=12, kv_heads=2, ffn=8960, vocab_size=151936, tied=True, qkv_bias=True),
    "7 B": dict(width=3584, layers=28, heads=28, kv_heads=4, ffn=18944, vocab_size=152064, tied=False, qkv_bias=True),
    "70 B": dict(width=8192, layers=80, heads=64, kv_heads=8, ffn=28672, vocab_size=128256, tied=False),
}
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Config:
    gb: float = 80.0  # memory of a GPU
    rows: int = 32  # responses of an iteration on a rank
    micro_batch: int = 4  # responses per forward
    prompt: int = 512  # tokens
    response: int = 512  # tokens
    offload: bool = False  # reference, reward and moments, where they sleep


def main() -> None:
    cfg = config.parse(Config)
    print(
        f"| model | layout | one rank, GB | fewest ranks with {cfg.gb:g} GB | then GB a rank: act, judge, learn | what stays |"
    )
    print("|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        model = ModelConfig(context=4096, **shape)
        for layout in LAYOUTS:
            how = dict(batch=cfg.rows, micro_batch=cfg.micro_batch, prompt=cfg.prompt, response=cfg.response)
            alone, asleep = 0, tuple(SLEEPS) if cfg.offload else ()
            for ranks in RANKS:
                parts = plan(model, Sizes(**how, recompute=True, ranks=ranks), layout)
                alone = alone or peak(parts, asleep)
                if fits := peak(parts, asleep) <= cfg.gb * 1e9:
                    break
            sums = ", ".join(f"{x / 1e9:.0f}" for x in phases(parts, asleep).values())
            largest = max(parts, key=parts.get)
            stays = f"{largest} {parts[largest] / 1e9:.0f}"
            print(f"| {name} | {layout} | {alone / 1e9:.0f} | {ranks if fits else 'none'} | {sums} | {stays} |")


if __name__ == "__main__":
    config.run(main)
