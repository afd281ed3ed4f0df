"""Text from any checkpoint: one-shot, from a file of prompts, or interactive.

python sample.py --checkpoint=out/ppo --prompt="The film is"
python sample.py --checkpoint=out/ppo --prompts=prompts.txt
python sample.py --checkpoint=out/ppo                           # asks for prompts until an empty line
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data.chat import Chat
from data.loader import pad, prompts_from_text
from model.generate import Sampling, generate, row_uniforms
from rlhf.infra import config, distributed
from rlhf.lm.pretrained import open_pretrained


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/ppo"  # run or checkpoint directory, HF-format directory, GGUF file, or a model's name
    base: str | None = None  # the model that a run of layout adapters or branch was trained on, where it has moved
    prompt: str | None = None  # text to continue; none = a file of prompts, or interactive
    prompts: str | None = None  # file with one prompt per line
    chat: bool = False  # each prompt is a user's message in the model's chat template; prints the answer alone
    samples: int = 1  # continuations per prompt
    tokens: int = 24  # longest continuation
    temperature: float = 1.0  # 0 = always the likeliest token
    top_k: int = 0  # sample among the k likeliest tokens; 0 = all
    top_p: float = 1.0  # sample among the likeliest tokens that together have this probability
    seed: int = 1  # the same command with the same seed gives the same texts
    json: bool = False  # one JSON object per continuation, with its log-probability

    def __post_init__(self):
        if self.prompt is not None and self.prompts is not None:
            raise ValueError("give --prompt or --prompts, not both")
        if self.chat and self.prompts is not None:
            raise ValueError(
                "--chat takes --prompt, or messages from the keyboard; a file of prompts holds plain texts"
            )
        config.at_least(self, samples=1, tokens=1, temperature=0, top_k=0)
        if self.temperature == 0 and (self.samples > 1 or self.top_k or self.top_p < 1):
            raise ValueError("temperature 0 always takes the likeliest token: samples, top_k and top_p have no effect")


def main() -> None:
    cfg = config.parse(Config)
    device = distributed.setup().device
    opened = open_pretrained(cfg.checkpoint, device, base=cfg.base)
    tokenizer, model = opened.tokenizer, opened.model.eval()
    chat = Chat(tokenizer) if cfg.chat else None
    stop_ids = sorted({*opened.stop_ids, *chat.stop_ids()}) if chat else opened.stop_ids

    sampling = Sampling(cfg.tokens, stop_ids, tokenizer.pad, cfg.temperature, cfg.top_k, cfg.top_p)

    def encode(text: str) -> list[int]:
        if chat:
            return chat.render([{"role": "user", "content": text}], add_generation_prompt=True)
        return [tokenizer.start, *tokenizer.encode(text)]

    for turn, prompts in enumerate(batches(cfg, tokenizer, encode)):
        tokens, lengths = pad(prompts, tokenizer.pad)
        rows = range(len(prompts) * cfg.samples)
        uniforms = row_uniforms(cfg.seed, turn, rows, cfg.tokens).to(device) if cfg.temperature else None
        out = generate(model, tokens.to(device), lengths.to(device), sampling, uniforms)
        for row, start, end, logprob in zip(out.tokens, out.prompt_lengths, out.lengths, out.logprobs.sum(1)):
            text = tokenizer.decode(row[start if chat else 0 : end].tolist())
            prompt = tokenizer.decode(row[:start].tolist())
            record = {"prompt": prompt, "text": text, "logprob": float(logprob), "tokens": int(end - start)}
            print(json.dumps(record, ensure_ascii=False) if cfg.json else text, flush=True)


def batches(cfg: Config, tokenizer, encode: Callable[[str], list[int]]) -> Iterator[list[np.ndarray]]:
    """Groups of prompts as token ids: one, those of a file in groups of 64, or line by line from the keyboard."""
    if cfg.prompt is not None:
        yield [np.array(encode(cfg.prompt))]
    elif cfg.prompts is not None:
        prompts = prompts_from_text(cfg.prompts, tokenizer)
        for start in range(0, len(prompts), 64):
            yield prompts[start : start + 64]
    else:
        while line := read_line():
            yield [np.array(encode(line))]


def read_line() -> str:
    """A line from the keyboard, where the arrow keys move in it and to those before; "" at the end of the input."""
    if sys.stdin.isatty() and importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # input() uses it once it is there
    try:
        return input("> ")
    except EOFError:
        return ""


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    config.run(main, stopped="stopped")
