"""Which layout, and how many GPUs, for a model of this size: the plan of --plan at the shapes of known models.

    python bench/plan.py --gb=80
    python bench/plan.py --gb=80 --offload=true    # what sleeps between phases lies in the host's memory
    python bench/plan.py --measure=1,2,4 --layouts=full,shared  # the largest rank of real runs beside their plan, on CPUs

Float32 weights and moments, 32 responses a rank in micro-batches of 4, 512 + 512 tokens, a reward model on the frozen trunk.
Nothing is allocated (torch's meta device); nothing of this ran at these sizes. What --measure runs has random weights in the
shape of SmolLM2-135M, a reward model with a trunk of its own, 8 responses of 8 + 8 tokens over all ranks, micro-batches of 2,
two steps and a checkpoint; more than one rank means --shard=true.
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from data.tokenizer import load_tokenizer  # noqa: E402
from model.config import ModelConfig  # noqa: E402
from model.transformer import Transformer  # noqa: E402
from rlhf.infra import checkpoint, config  # noqa: E402
from rlhf.ppo.plan import SLEEPS, Sizes, fewest, peak, phases, plan  # noqa: E402
from rlhf.ppo.roles import LAYOUTS  # noqa: E402
from rlhf.reward.model import RewardModel  # noqa: E402

SHAPES = {  # of Qwen2.5 and Llama 3.1
    "0.5 B": dict(width=896, layers=24, heads=14, kv_heads=2, ffn=4864, vocab_size=151936, tied=True, qkv_bias=True),
    "1.5 B": dict(width=1536, layers=28, heads=12, kv_heads=2, ffn=8960, vocab_size=151936, tied=True, qkv_bias=True),
    "7 B": dict(width=3584, layers=28, heads=28, kv_heads=4, ffn=18944, vocab_size=152064, tied=False, qkv_bias=True),
    "70 B": dict(width=8192, layers=80, heads=64, kv_heads=8, ffn=28672, vocab_size=128256, tied=False),
}
SMOLLM2 = ModelConfig(49152, 576, 30, 9, kv_heads=3, ffn=1536, context=2048, rope_theta=1e5)
RUN = {"iterations": 1, "batch": 8, "minibatches": 1, "micro_batch": 2, "prompt_tokens": 8, "response_tokens": 8}
SAID = re.compile(r"peak memory .* GB, planned (.*) GB")  # by train_ppo.py, of rank 0

Layout = Literal["full", "shared", "adapters", "branch"]
Kind = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Config:
    gb: float = 80.0  # memory of a GPU
    rows: int = 32  # responses of an iteration on a rank
    micro_batch: int = 4  # responses per forward
    prompt: int = 512  # tokens
    response: int = 512  # tokens
    offload: bool = False  # reference, reward and moments, where they sleep
    measure: tuple[int, ...] = ()  # instead: so many processes each really run, and what they need is measured
    layouts: tuple[Layout, ...] = tuple(LAYOUTS)  # of these
    precision: Kind = "fp32"  # of what is measured; several processes store float32 in any [measure]

    def __post_init__(self):
        config.at_least(self, rows=1, micro_batch=1, prompt=1, response=1)
        if any(n not in (1, 2, 4) for n in self.measure):
            raise ValueError(f"--measure={','.join(map(str, self.measure))}: 8 responses are shared out over 1, 2 or 4")


def main() -> None:
    cfg = config.parse(Config)
    if cfg.measure:
        measure(cfg)
        return
    print(
        f"| model | layout | one rank, GB | fewest ranks with {cfg.gb:g} GB | then GB a rank: act, judge, learn | what stays |"
    )
    print("|---|---|---|---|---|---|")
    asleep = tuple(SLEEPS) if cfg.offload else ()
    sizes = Sizes(cfg.rows, cfg.micro_batch, cfg.prompt, cfg.response, recompute=True, offload=asleep)
    for name, shape in SHAPES.items():
        model = ModelConfig(context=4096, **shape)
        for layout in cfg.layouts:
            alone = peak(plan(model, sizes, layout), asleep)
            ranks, parts = fewest(model, lambda ranks: replace(sizes, ranks=ranks), layout, cfg.gb)
            sums = ", ".join(f"{x / 1e9:.0f}" for x in phases(parts, asleep).values())
            largest = max(parts, key=parts.get)
            stays = f"{largest} {parts[largest] / 1e9:.0f}"
            print(f"| {name} | {layout} | {alone / 1e9:.0f} | {ranks or 'none'} | {sums} | {stays} |")


def measure(cfg: Config) -> None:
    """A table of the largest rank's peak beside the plan."""
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch))
        print("| layout | processes | planned, GB | largest rank, GB | difference |\n|---|---|---|---|---|", flush=True)
        for layout in cfg.layouts:
            for ranks in cfg.measure:
                planned, found = ran(Path(scratch), layout, ranks, cfg.precision, cfg.offload)
                print(f"| {layout} | {ranks} | {planned:.2f} | {found:.2f} | {found / planned - 1:+.0%} |", flush=True)


def build(place: Path) -> None:
    """Texts, a language model and a reward model of random weights."""
    words = "a an as at by he in is it of on or so the to up us we good bad long short slow film plot cast end".split()
    texts = (" ".join(words[(i * k + k) % len(words)] for k in range(3, 40)) for i in range(200))
    (place / "texts.txt").write_text("".join(f"{text}\n\n" for text in texts))
    prepare = [sys.executable, "-m", "data.prepare", place / "texts.txt", f"--out={place / 'data'}"]
    subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    tokenizer, generator = load_tokenizer(place / "data"), torch.Generator().manual_seed(1)
    facts = {"model": SMOLLM2.stored(), "tokenizer": tokenizer.fingerprint, "stop_ids": [tokenizer.eos]}
    model = Transformer(SMOLLM2)
    model.init_weights(generator)
    checkpoint.save(place / "lm", model.state_dict(), {"kind": "lm", **facts}, files=[tokenizer.path])
    reward, kind = RewardModel(model, "last", generator), {"kind": "reward", "trunk": "full", "pooling": "last"}
    checkpoint.save(place / "rm", reward.state_dict(), kind | facts, files=[tokenizer.path])


def ran(place: Path, layout: str, ranks: int, precision: str, offload: bool = False) -> tuple[float, float]:
    """GB that a run of this layout planned, and GB of its largest process."""
    launcher = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [] if ranks == 1 else [f"--nproc_per_node={ranks}"]
    options = RUN | {"init": place / "lm", "reward": place / "rm", "data": place / "data", "precision": precision}
    if offload:
        options["offload"] = ",".join(x for x in SLEEPS if x != "reference" or layout in ("full", "shared"))
    options |= {"layout": layout, "out": place / f"{layout}-{ranks}", "shard": "true" if ranks > 1 else "false"}
    command = [*launcher, str(ROOT / "train_ppo.py"), *(f"--{name}={value}" for name, value in options.items())]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=env)
        _, status, usage = os.wait4(process.pid, 0)  # the largest of all processes below it
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise ValueError(f"{layout}, {ranks} processes: exit code {process.returncode}: {text[-2000:]}")
    return float(SAID.search(text)[1]), usage.ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    config.run(main)
