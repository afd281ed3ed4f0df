"""Tokens per second of our sampler beside transformers' `generate`, on the same weights, taken in turns.

    python bench/sampler.py --batch=16                 # needs the extra "compare"
    python bench/sampler.py --init=out/lm --response=48

Random weights and no EOS, or with --init a trained model whose texts end where it ends them: then the rows differ in length,
as in PPO's rollouts, and a token counts only up to its row's EOS. Sampling at temperature 1 in both. CPU seconds of one
thread, so that a busy machine matters less; what counts is the ratio of neighbouring rounds.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.generate import Sampling, generate, row_uniforms  # noqa: E402
from model.hf import save_hf  # noqa: E402
from model.transformer import ModelConfig, Transformer  # noqa: E402
from rlhf.infra import config  # noqa: E402
from rlhf.lm.pretrained import open_pretrained  # noqa: E402

SHAPES = {
    "small": ModelConfig(vocab_size=2048, width=128, layers=4, heads=4, context=256),
    "smollm2": ModelConfig(49152, width=576, layers=30, heads=9, kv_heads=3, ffn=1536, context=2048, rope_theta=1e5),
}


@dataclass(frozen=True)
class Config:
    shape: Literal["small", "smollm2"] = "small"  # random weights: as from scratch, or SmolLM2-135M's [init=none]
    init: str | None = None  # a trained model instead: run, HF directory, GGUF file or name
    batch: int = 16  # prompts
    prompt: int = 16  # tokens of a prompt
    response: int = 32  # tokens sampled
    rounds: int = 5  # of each, in turns, after one to warm up


def main() -> None:
    cfg = config.parse(Config)
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed: pip install -e '.[compare]'") from None
    torch.set_num_threads(1)
    if cfg.init is None:
        ours, stop_ids = Transformer(SHAPES[cfg.shape]).eval(), ()
        ours.init_weights(torch.Generator().manual_seed(1))
    else:
        opened = open_pretrained(cfg.init)
        ours, stop_ids = opened.model.eval(), opened.stop_ids
    with tempfile.TemporaryDirectory() as directory:
        save_hf(f"{directory}/model", ours)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{directory}/model").eval()
    prompts = torch.randint(
        3, ours.config.vocab_size, (cfg.batch, cfg.prompt), generator=torch.Generator().manual_seed(2)
    )
    lengths, uniforms = torch.full((cfg.batch,), cfg.prompt), row_uniforms(1, 0, range(cfg.batch), cfg.response)
    kwargs = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts)}
    kwargs |= {"max_new_tokens": cfg.response, "eos_token_id": list(stop_ids) or None}

    def we() -> int:
        return int(generate(ours, prompts, lengths, Sampling(cfg.response, stop_ids, 0), uniforms).mask.sum())

    def they() -> int:
        response = theirs.generate(prompts, **kwargs)[:, cfg.prompt :]  # (B, T), padded behind EOS
        ended = torch.isin(response, torch.tensor(stop_ids, dtype=torch.int64)).int()
        return int((ended.cumsum(1) - ended == 0).sum())  # up to the first EOS, which counts

    speed = {"ours": [], "transformers": []}
    for _ in range(1 + cfg.rounds):
        for name, sampler in (("ours", we), ("transformers", they)):
            start = time.process_time()
            speed[name].append(sampler() / (time.process_time() - start))
    for name, rounds in speed.items():
        print(f"{name:<14}{statistics.median(rounds[1:]):10.0f} tokens/s, median of {cfg.rounds} rounds")
    ratios = [a / b for a, b in zip(speed["ours"][1:], speed["transformers"][1:])]
    print(f"ratio {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}], {cfg}")


if __name__ == "__main__":
    config.run(main, stopped="stopped")
