"""Tokens per second of our sampler beside transformers' `generate`, on the same weights, taken in turns.

    python bench/sampler.py --batch=16                 # needs the extra "compare"
    python bench/sampler.py --shape=smollm2 --batch=64 --precision=bf16
    python bench/sampler.py --shape=smollm2 --ragged   # ours alone: what texts that end early save
    python bench/sampler.py --init=out/lm --response=48

Random weights and no EOS, or with --init a trained model whose texts end where it ends them: then the rows differ in length,
as in PPO's rollouts, and a token counts only up to its row's EOS. Sampling at temperature 1 in both. CPU seconds of one
thread, so that a busy machine matters less; what counts is the ratio of neighbouring rounds.

--ragged: four times as many prompts, of which `batch` decode together and the others wait for rows that end, with so many
tokens that end a text that the mean is a quarter of response (random weights are nearly indifferent between tokens). Beside
it: no text that ends early; the same texts in one batch after the other; all of them at once.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import figures
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.generate import Sampling, generate, row_uniforms  # noqa: E402
from model.half import to_sample_with  # noqa: E402
from model.hf import save_hf  # noqa: E402
from model.transformer import ModelConfig, Transformer  # noqa: E402
from rlhf.infra import config  # noqa: E402
from rlhf.infra.precision import chosen  # noqa: E402
from rlhf.lm.pretrained import open_pretrained  # noqa: E402

SHAPES = {
    "small": ModelConfig(vocab_size=2048, width=128, layers=4, heads=4, context=256),
    "smollm2": ModelConfig(49152, width=576, layers=30, heads=9, kv_heads=3, ffn=1536, context=2048, rope_theta=1e5),
}


@dataclass(frozen=True)
class Config:
    shape: Literal["small", "smollm2"] = "small"  # random weights: as from scratch, or SmolLM2-135M's [init=none]
    init: str | None = None  # a trained model instead: run, HF directory, GGUF file or name
    precision: Literal["auto", "fp32", "bf16"] = "fp32"  # of both sides; auto = bf16 where it is fast
    ragged: bool = False  # texts that end at a quarter of the length on average, of our own full ones [init=none]
    batch: int = 16  # prompts that decode together
    prompt: int = 16  # tokens of a prompt
    response: int = 32  # tokens sampled
    rounds: int = 5  # of each, in turns, after one to warm up


def main() -> None:
    cfg = config.parse(Config)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if cfg.init is None:
        ours, stop_ids = Transformer(SHAPES[cfg.shape]).eval(), ()
        ours.init_weights(torch.Generator().manual_seed(1))
    else:
        opened = open_pretrained(cfg.init)
        ours, stop_ids = opened.model.eval(), opened.stop_ids
    sides = full_and_ragged(cfg, ours) if cfg.ragged else ours_and_theirs(cfg, ours, stop_ids)
    first, *others = sides
    speed = {name: [] for name in sides}
    for _ in range(1 + cfg.rounds):
        for name, sampler in sides.items():
            start = time.process_time()
            done = sampler()
            speed[name].append(done / (time.process_time() - start))
    for name, rounds in speed.items():
        unit = "rows/s" if cfg.ragged else "tokens/s"
        print(f"{name:<28}{statistics.median(rounds[1:]):10.1f} {unit}, median of {cfg.rounds} rounds")
    kind = str(dtype(cfg)).removeprefix("torch.")
    what = (
        f"sampling {cfg.batch} rows, {kind}, {cfg.shape}" if cfg.init is None else f"sampling {cfg.batch} rows, {kind}"
    )
    what += ", texts of a quarter of the length" if cfg.ragged else ""
    for other in others:
        ratios = [a / b for a, b in zip(speed[first][1:], speed[other][1:])]
        print(f"{what}: {figures.ratio(what, other, ratios)} times {other}")
    print(f"{figures.cpu()}; {cfg}")


def dtype(cfg: Config) -> torch.dtype:
    return chosen(cfg, torch.device("cpu"), quiet=True)[1]


def inputs(cfg: Config, model: Transformer, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(3, model.config.vocab_size, (rows, cfg.prompt), generator=generator)
    return prompts, torch.full((rows,), cfg.prompt), row_uniforms(1, 0, range(rows), cfg.response)


def ours_and_theirs(cfg: Config, model: Transformer, stop_ids) -> dict[str, Callable[[], int]]:
    """Tokens that each of the two samples."""
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed: pip install -e '.[compare]'") from None
    with tempfile.TemporaryDirectory() as directory:
        save_hf(f"{directory}/model", model)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{directory}/model").eval()
    theirs = theirs.to(dtype(cfg))
    prompts, lengths, uniforms = inputs(cfg, model, cfg.batch)
    ours = to_sample_with(model, dtype(cfg))
    kwargs = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts)}
    kwargs |= {"max_new_tokens": cfg.response, "eos_token_id": list(stop_ids) or None}

    def we() -> int:
        return int(generate(ours, prompts, lengths, Sampling(cfg.response, stop_ids, 0), uniforms).mask.sum())

    def they() -> int:
        response = theirs.generate(prompts, **kwargs)[:, cfg.prompt :]  # (B, T), padded behind EOS
        ended = torch.isin(response, torch.tensor(stop_ids, dtype=torch.int64)).int()
        return int((ended.cumsum(1) - ended == 0).sum())  # up to the first EOS, which counts

    return {"ours": we, "transformers": they}


def full_and_ragged(cfg: Config, model: Transformer) -> dict[str, Callable[[], int]]:
    """Rows that our sampler ends, where they end early and others wait; and beside that."""
    rows, ours = 4 * cfg.batch, to_sample_with(model, dtype(cfg))
    whole = inputs(cfg, model, rows)
    early = range(model.config.vocab_size * 4 // cfg.response)

    def side(stop_ids=early, at_once: int = cfg.batch, size: int = rows) -> int:
        for prompts, lengths, uniforms in zip(*(x.split(size) for x in whole)):
            generate(ours, prompts, lengths, Sampling(cfg.response, stop_ids, 0), uniforms, at_once)
        return rows

    return {
        "ragged": side,
        "rows of full length": lambda: side(()),
        "one batch after the other": lambda: side(size=cfg.batch),
        "all at once": lambda: side(at_once=rows),
    }


if __name__ == "__main__":
    config.run(main, stopped="stopped")
