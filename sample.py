"""Text from any checkpoint: one-shot, from prompts, or a conversation.

python sample.py --checkpoint=out/ppo --prompt="The film is"
python sample.py --checkpoint=out/ppo --prompts=prompts.txt     # one a line, or messages as JSON lines, or data
python sample.py --checkpoint=out/ppo                           # asks for prompts until an empty line or Ctrl-D
python sample.py --checkpoint=out/chat --chat=true              # the same as a conversation, which remembers its turns
"""

import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data.chat import Chat
from data.containers import rows
from data.encoding import Encoder
from data.formats import reader_of
from data.loader import open_data, pad, prompts_of
from data.records import Record
from data.text import prompt_lines
from data.tokenizer import Detokenizer, Tokenizer, check_fingerprint
from model.generate import Generated, Sampling, generate, row_uniforms
from rlhf.infra import config, distributed, signals
from rlhf.infra.precision import SamplingPrecision, chosen
from rlhf.lm.int8 import stays_int8, to_compute_with
from rlhf.lm.pretrained import Pretrained, open_pretrained

AT_ONCE = 64  # prompts of a file that are answered together


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/ppo"  # run or checkpoint directory, HF-format directory, GGUF file, or a model's name
    base: str | None = None  # the model that a run of layout adapters or branch was trained on, where it has moved
    prompt: str | None = None  # text to continue; none = prompts, or interactive
    prompts: str | None = None  # file of prompts: one a line, or JSON lines with messages; or data.prepare's directory
    split: str = "test"  # whose prompts [prompts]
    chat: bool = False  # each prompt is a user's message in the model's chat template; the keyboard: a conversation
    system: str | None = None  # system message of conversations that bring none [chat]
    samples: int = 1  # continuations per prompt
    tokens: int = 24  # longest continuation
    temperature: float = 1.0  # 0 = always the likeliest token
    top_k: int = 0  # sample among the k likeliest tokens; 0 = all
    top_p: float = 1.0  # sample among the likeliest tokens that together have this probability
    precision: SamplingPrecision = "auto"  # of matrix products; auto = what is fast here; int8: of an int8 export
    seed: int = 1  # the same command with the same seed gives the same texts
    json: bool = False  # one JSON object per continuation, with its log-probability

    def __post_init__(self):
        if self.prompt is not None and self.prompts is not None:
            raise ValueError("give --prompt or --prompts, not both")
        config.at_least(self, samples=1, tokens=1, temperature=0, top_k=0)
        if self.temperature == 0 and (self.samples > 1 or self.top_k or self.top_p < 1):
            raise ValueError("temperature 0 always takes the likeliest token: samples, top_k and top_p have no effect")
        if self.system is not None and not (self.chat or self.prompts):
            raise ValueError("--system has no effect without --chat or --prompts")
        is_data = self.prompts is not None and Path(self.prompts).is_dir()
        if is_data and (self.chat or self.system is not None):
            raise ValueError(
                f"--prompts={self.prompts} is prepared data, in the form it was prepared in: --chat and --system have no effect"
            )
        if self.prompts is not None and not is_data and self.split != "test":
            raise ValueError(f"--split has no effect: --prompts={self.prompts} is no prepared data, which has splits")
        if self.chat and self.prompt is None and self.prompts is None and self.samples > 1:
            raise ValueError(
                "a conversation goes on from one answer: --samples has no effect with --chat and a keyboard"
            )


def main() -> None:
    cfg = config.parse(Config)
    keyboard = cfg.prompt is None and cfg.prompts is None
    if keyboard and sys.stdin is None:
        raise ValueError("standard input is closed: give --prompt or --prompts")
    device = distributed.setup().device
    opened = open_pretrained(cfg.checkpoint, device, base=cfg.base)
    asked, rows = cfg.precision, cfg.samples * (1 if cfg.prompts is None else AT_ONCE)
    cfg, dtype = chosen(cfg, device, quiet=True)  # nothing but texts on stdout
    int8 = stays_int8(opened.model, opened.spec, asked, dtype, [rows], quiet=True)
    opened = replace(opened, model=to_compute_with(opened.model.eval(), int8, dtype))
    if cfg.prompts is not None and Path(cfg.prompts).is_dir():
        for turn, (prompts, stop_ids) in enumerate(prepared(cfg, opened)):
            write(cfg, opened.tokenizer, answer(cfg, opened, prompts, stop_ids, turn), alone=True)
        return
    records = [] if keyboard else read_records(cfg)
    talks = cfg.chat or any(isinstance(record.prompt, list) for record in records)
    chat = Chat(opened.tokenizer) if talks else None
    stop_ids = {*opened.stop_ids, *(chat.stop_ids() if chat else ())}
    if keyboard:
        converse(cfg, opened, chat, stop_ids)
    encoder = Encoder(opened.tokenizer, chat)
    for turn, start in enumerate(range(0, len(records), AT_ONCE)):
        asked = records[start : start + AT_ONCE]
        prompts = [np.array(encoder.encode(record).prompt) for record in asked]
        write(cfg, opened.tokenizer, answer(cfg, opened, prompts, stop_ids, turn), alone=bool(chat))


def converse(cfg: Config, opened: Pretrained, chat: Chat | None, stop_ids: set[int]) -> None:
    """Answers from the keyboard until an empty line; with a template they remember what was said, while it fits.

    Whoever sits before it reads along, Ctrl-C ends an answer, and a text that is refused is told and forgotten.
    """
    encoder, room, turn = Encoder(opened.tokenizer, chat), opened.model.config.context - cfg.tokens, 0
    talk, first, somebody = [], 1 if cfg.system else 0, sys.stdin.isatty()
    reply = watched if somebody and not cfg.json else finished
    tell("Ctrl-C stops an answer; Ctrl-D or an empty line ends", somebody)
    while line := read_line():
        asked = said(cfg, line)
        before, talk = talk, [*talk, *(asked if not talk else asked[-1:])] if chat else asked
        try:
            while len(prompt := encoder.encode(Record(talk)).prompt) > room and chat and len(talk) > first + 1:
                del talk[first : first + 2]  # the oldest question and its answer
            text = reply(cfg, opened, np.array(prompt), stop_ids, turn, bool(chat))
        except ValueError as error:
            if not somebody:
                raise
            tell(f"error: {error}")
            talk = before
            continue
        except KeyboardInterrupt as stop:  # before its first word, or with nobody to read along
            if not (somebody and by_keyboard(stop)):
                raise
            tell("stopped")
            talk = before
            continue
        if chat:
            talk.append({"role": "assistant", "content": text})
        turn += 1


def finished(cfg: Config, opened: Pretrained, prompt: np.ndarray, stop_ids: set[int], turn: int, alone: bool) -> str:
    """Prints the answers when all are there, and returns the first."""
    return write(cfg, opened.tokenizer, answer(cfg, opened, [prompt], stop_ids, turn), alone)[0]


def watched(cfg: Config, opened: Pretrained, prompt: np.ndarray, stop_ids: set[int], turn: int, alone: bool) -> str:
    """The same answers one after the other, token by token; Ctrl-C ends this one, and spares those after it."""
    texts = []
    for sample in range(cfg.samples):
        show("" if alone else opened.tokenizer.decode(prompt.tolist()))
        stream, pieces = Detokenizer(opened.tokenizer, afresh=alone), []

        def hear(row: int, i: int, stream=stream, pieces=pieces) -> None:
            pieces.append(stream.push(i))
            show(pieces[-1])

        try:
            answer(cfg, opened, [prompt], stop_ids, turn, [sample], hear)
            stopped = False
        except KeyboardInterrupt as stop:
            stopped = by_keyboard(stop)
        pieces.append(stream.flush())
        show(pieces[-1] + "\n")
        texts.append("".join(pieces))
        if stopped:
            tell("stopped")
            break
    return texts[0]


def by_keyboard(stop: KeyboardInterrupt) -> bool:
    """True for Ctrl-C; what else ends the program goes on its way."""
    if getattr(stop, "number", signals.SIGINT) != signals.SIGINT:
        raise stop
    return True


def answer(
    cfg: Config,
    opened: Pretrained,
    prompts: list[np.ndarray],
    stop_ids,
    turn: int,
    samples: Sequence[int] | None = None,
    on_token: Callable[[int, int], object] | None = None,
) -> Generated:
    """All samples of these prompts, or those of one prompt that are named."""
    device = opened.model.embed_tokens.weight.device
    sampling = Sampling(cfg.tokens, sorted(stop_ids), opened.tokenizer.pad, cfg.temperature, cfg.top_k, cfg.top_p)
    tokens, lengths = pad(prompts, opened.tokenizer.pad)
    ids = range(len(prompts) * cfg.samples) if samples is None else samples
    uniforms = row_uniforms(cfg.seed, turn, ids, cfg.tokens) if cfg.temperature else None
    return generate(opened.model, tokens.to(device), lengths.to(device), sampling, uniforms, on_token=on_token)


def write(cfg: Config, tokenizer: Tokenizer, out: Generated, alone: bool) -> list[str]:
    """Prints every text, `alone` without its prompt, and returns them."""
    texts = []
    for row, start, end, logprob in zip(out.tokens, out.prompt_lengths, out.lengths, out.logprobs.sum(1)):
        texts.append(tokenizer.decode(row[start if alone else 0 : end].tolist()))
        prompt = tokenizer.decode(row[:start].tolist())
        record = {"prompt": prompt, "text": texts[-1], "logprob": float(logprob), "tokens": int(end - start)}
        print(json.dumps(record, ensure_ascii=False) if cfg.json else texts[-1], flush=True)
    return texts


# prompts


def prepared(cfg: Config, opened: Pretrained) -> Iterator[tuple[list[np.ndarray], tuple[int, ...]]]:
    """The prompts of a split of prepared data, AT_ONCE at a time, and what ends their answers."""
    data = open_data(cfg.prompts, cfg.split)
    check_fingerprint(data.fingerprint, opened.tokenizer.fingerprint, cfg.checkpoint)
    stop_ids = opened.ends_of(data.template)
    loader = prompts_of(data, 1, cfg.seed, context=opened.model.config.context, response_tokens=cfg.tokens)
    for start in range(0, len(loader), AT_ONCE):
        batch = loader.take(np.arange(start, min(start + AT_ONCE, len(loader))))
        yield [row[:n].numpy() for row, n in zip(batch.prompts, batch.prompt_lengths)], stop_ids


def read_records(cfg: Config) -> list[Record]:
    """The prompts of a file: JSON lines or an array of rows that data.prepare knows, else one a line.

    Of messages the history, up to the last answer if they end with one. ValueError for a row without a prompt.
    """
    if cfg.prompt is not None:
        return [Record(said(cfg, cfg.prompt))]
    with open(cfg.prompts, "rb") as f:
        first = f.read(1 << 12).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if first not in (b"{", b"[") or Path(cfg.prompts).suffix == ".txt":
        return [Record(said(cfg, line)) for line in prompt_lines(cfg.prompts)]
    found, reader = [], None
    for where, row in rows([cfg.prompts]):
        if isinstance(row, dict) and ends_with_user(row.get("messages")):
            row = {"prompt": row["messages"]}
        reader = reader or reader_of([row], chat=cfg.chat, system=cfg.system or "")
        try:
            asked = reader.records(row)[1][0].prompt
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not asked:
            raise ValueError(f"{where}: the row has neither a prompt nor messages")
        found.append(Record(asked))
    return found


def ends_with_user(messages) -> bool:
    """A conversation that waits for an answer; in data for training that would be a row without one."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "user"


def said(cfg: Config, text: str) -> str | list[dict]:
    """A text, or with --chat what a user says, behind the system message."""
    before = [{"role": "system", "content": cfg.system}] if cfg.system else []
    return [*before, {"role": "user", "content": text}] if cfg.chat else text


# the terminal


def read_line() -> str:
    """A line from the keyboard, where the arrow keys move in it and to those before; "" at the end of the input."""
    somebody = sys.stdin.isatty()
    if somebody:
        try:
            import readline  # noqa: F401  input() uses it once it is there
        except ImportError:  # Python was built without it: the terminal's own keys are left
            pass
    while True:
        try:
            return input("> ")
        except EOFError:
            show("\n" * somebody)
            return ""
        except KeyboardInterrupt as stop:
            if not (somebody and by_keyboard(stop)):
                raise
            tell("\nCtrl-D ends")


def show(text: str) -> None:
    """A part of a text, at once. What controls a terminal is none: a model may say anything."""
    if sys.stdout.isatty():
        text = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
    print(text, end="", flush=True)


def tell(line: str, somebody: bool = True) -> None:
    """A line that is no text of the model."""
    if somebody:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    config.run(main, stopped="stopped")
