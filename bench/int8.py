"""Decoding with float32, with int8 and, where that is fast, with bf16 weights in the same loop, taken in turns; and with
llama.cpp's Q8_0 where it installs.

    python bench/int8.py                                 # SmolLM2-135M-Instruct, batch 1
    python bench/int8.py --batch=16
    pip install cyllama; python bench/int8.py --llama    # llama.cpp, by its Python binding

No EOS, the likeliest token in ours, random tokens in llama.cpp. CPU seconds of one thread, so that a busy machine matters
less; what counts is the ratio of neighbouring rounds.
"""

import copy
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import figures
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.generate import Sampling, generate  # noqa: E402
from model.gguf import save_gguf  # noqa: E402
from model.half import to_sample_with  # noqa: E402
from model.quantize import quantize, stored_tensors  # noqa: E402
from rlhf.infra import config  # noqa: E402
from rlhf.infra.precision import has_fast_bf16  # noqa: E402
from rlhf.lm.pretrained import open_pretrained  # noqa: E402


@dataclass(frozen=True)
class Config:
    init: str = "smollm2-135m-instruct"  # language model: run, HF directory, GGUF file or name
    embedding: Literal["bf16", "int8"] = "bf16"  # rows of the int8 model's embedding
    batch: int = 1  # rows that decode together
    tokens: int = 32  # decoded per row and round, after 8 of a prompt
    rounds: int = 7  # of each, in turns, after one to warm up
    llama: bool = False  # measure llama.cpp with a Q8_0 file too; needs the package cyllama


def main() -> None:
    cfg = config.parse(Config)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    opened = open_pretrained(cfg.init)
    original = opened.model.eval()
    int8 = quantize(copy.deepcopy(original), cfg.embedding)
    sizes = [sum(x.nbytes for x in tensors.values()) for tensors in (original.state_dict(), stored_tensors(int8))]
    print(f"weights {sizes[0] / 1e6:.1f} MB -> {sizes[1] / 1e6:.1f} MB, {sizes[1] / sizes[0]:.3f} of it")
    prompts = torch.randint(3, original.config.vocab_size, (cfg.batch, 8), generator=torch.Generator().manual_seed(2))
    lengths = torch.full((cfg.batch,), 8)

    def ours(model, tokens: int):
        generate(model, prompts, lengths, Sampling(tokens, [], 0, temperature=0.0))

    decoders = {"float32": lambda n: ours(original, n), "int8": lambda n: ours(int8, n)}
    if has_fast_bf16(torch.device("cpu")):
        half = to_sample_with(copy.deepcopy(original), torch.bfloat16)
        decoders["bf16"] = lambda n: ours(half, n)
    with tempfile.TemporaryDirectory() as directory:
        if cfg.llama:
            save_gguf(f"{directory}/model.gguf", original, "Q8_0", opened.tokenizer.parts())
            decoders["llama.cpp Q8_0"] = llama_decoder(f"{directory}/model.gguf", cfg.batch, original.config.vocab_size)
        seconds = {name: [] for name in decoders}  # per step of all rows
        for _ in range(1 + cfg.rounds):
            for name, decode in decoders.items():
                seconds[name].append((cpu_seconds(decode, 1 + cfg.tokens) - cpu_seconds(decode, 1)) / cfg.tokens)
    for name, rounds in seconds.items():
        step = statistics.median(rounds[1:])
        print(f"{name:<16}{1e3 * step:8.1f} ms a step{cfg.batch / step:10.1f} tokens/s, median of {cfg.rounds} rounds")
    for name in list(decoders)[1:]:
        ratios = [a / b for a, b in zip(seconds["float32"][1:], seconds[name][1:])]
        what = f"{name} decoding, batch {cfg.batch}"
        print(f"{name}, speed of float32's: {figures.ratio(what, 'float32', ratios)}")
    if "bf16" in seconds:
        ratios = [a / b for a, b in zip(seconds["bf16"][1:], seconds["int8"][1:])]
        print(f"int8, speed of bf16's: {figures.ratio(f'int8 decoding, batch {cfg.batch}', 'bf16', ratios)}")
    print(f"{figures.cpu()}; {torch.backends.cpu.get_cpu_capability()}; {cfg}")


def cpu_seconds(decode, tokens: int) -> float:
    """Prefill and `tokens` steps; the difference of two such calls is decoding alone."""
    start = time.process_time()
    decode(tokens)
    return time.process_time() - start


def llama_decoder(file: str, batch: int, vocab_size: int):
    """decode(n) by llama.cpp: a prompt of 8 tokens a row, then n - 1 steps of one token a row, one thread."""
    try:
        import cyllama.llama.llama_cpp as llama
    except ImportError:
        raise ValueError("llama.cpp's binding is not installed: pip install cyllama") from None
    llama.disable_logging()
    llama.llama_backend_init()
    options = llama.LlamaModelParams()
    options.n_gpu_layers = 0
    model = llama.LlamaModel(file, options, verbose=False)
    settings = llama.LlamaContextParams()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 128 * batch, 512, 512, batch
    settings.n_threads = settings.n_threads_batch = 1
    context = llama.LlamaContext(model, settings, verbose=False)
    draw = random.Random(0)

    def feed(positions: range):
        tokens = llama.LlamaBatch(n_tokens=len(positions) * batch, embd=0, n_seq_max=1)
        for row in range(batch):
            for at in positions:
                tokens.add(draw.randrange(20, vocab_size), at, [row], at == positions[-1])
        context.decode(tokens)
        context.synchronize()

    def decode(n: int):
        context.kv_cache_clear()
        feed(range(8))
        for at in range(8, 7 + n):
            feed(range(at, at + 1))

    return decode


if __name__ == "__main__":
    config.run(main, stopped="stopped")
