"""Responses from servers: the other side of the sampler's wall, behind `--sampler=URL,URL`.

Token ids go out, token ids and their log-probs come back (/v1/completions). Before an iteration the policy's weights are laid
into a directory that the servers see, and each server is told. serve.py takes them (POST /v1/weights, docs/serve.md) and draws
from the uniforms of (seed, iteration, row) that the built-in sampler has: a row's tokens are the same here and there. Others,
vLLM, are given the weights by a function of the user's, and draw by their own random numbers.

Every answer of serve.py says by which weights it was sampled: one by others is asked for again, after the server got the right
ones. What does not answer is asked again, the servers in turn, for `patience` seconds; then the run ends in one line.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.generate import Generated, Sampling
from model.hf import empty_model, save_hf
from model.lora import lora_layers
from model.transformer import Transformer
from rlhf.infra import checkpoint
from rlhf.infra.client import Lines, Lost, Refused, Server
from rlhf.infra.distributed import Dist
from rlhf.infra.metrics import say

KEY = "PLAIN_RLHF_KEY"  # the environment variable with the servers' key
MOST_THREADS = 128  # requests of a rank that are under way
MOST_CHOICES = 128  # of a request to a server that does not say
LONGEST_PAUSE = 2.0  # seconds between two tries
FIRST_CHECK = 30.0  # seconds that a server has to say who it is
QUICK = 3  # tries for a server that does not take weights while another has
FAILURES = 3  # failed answers to one request (status 500, or cut off): they will go on to fail on it
PRECISIONS = ("fp32", "fp16", "bf16")  # the coarsest last
NEUTRAL = {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}  # else the model's own
PLACE = re.compile(r"weights_(\d{6})")


class Question(NamedTuple):
    """Neighbouring rows of this rank that answer the same prompt."""

    first: int  # of the rows
    prompt: list[int]
    ids: list[int]  # global ids of the rows


class Answer(NamedTuple):
    """One response."""

    ids: list[int]  # what ended it included
    logprobs: list[float]  # under the distribution that was sampled from
    finished: bool  # ended with a stop token


class About(NamedTuple):
    """What a server can do."""

    precision: str
    choices: int  # texts of one request
    at_once: int  # texts that decode together


def questions(prompts: Tensor, lengths: Tensor, ids: Tensor, most: int) -> list[Question]:
    """Right-padded prompts (B, P) of these lengths (B,), `most` equal neighbours together."""
    found: list[Question] = []
    for row, (prompt, length, i) in enumerate(zip(prompts.tolist(), lengths.tolist(), ids.tolist())):
        if found and found[-1].prompt == prompt[:length] and len(found[-1].ids) < most:
            found[-1].ids.append(i)
        else:
            found.append(Question(row, prompt[:length], [i]))
    return found


def pauses() -> Iterator[float]:
    """Seconds between tries: each twice the one before."""
    return (min(LONGEST_PAUSE, 0.05 * 2 ** min(n, 10)) for n in count())


# ---- weights


def sampled_weights(model: Transformer) -> dict[str, Tensor]:
    """What samples, by the names of a plain transformer: active adapters merged."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for path, layer in lora_layers(model).items():
        if layer.active in layer.lora_A:
            tensors[f"{path}.weight"] = layer.merged(layer.active)
    return {name: tensors[name].detach() for name in empty_model(model.config).state_dict()}


class Room:
    """The directory through which weights go: each time a place of its own, of which the last one stays.

    config and files: of the checkpoints in it, see checkpoint.save. hf: they are HF directories instead.
    """

    def __init__(self, path: str | Path, config: dict, files: list[Path], hf: bool = False):
        self.path, self.config, self.files, self.hf = Path(path).resolve(), config, files, hf

    def place(self, number: int) -> Path:
        return self.path / f"weights_{number:06d}"

    def taken(self) -> list[int]:
        return [int(found[1]) for found in map(PLACE.fullmatch, (x.name for x in self.path.glob("*"))) if found]

    def lay(self, model: Transformer) -> tuple[int, str]:
        """The weights into the next place, beside those of before; -> its number, and their sha256."""
        number, tensors = max(self.taken(), default=0) + 1, sampled_weights(model)
        where = self.place(number)
        if not self.hf:
            checkpoint.save(where, tensors, self.config, files=self.files)
            return number, checkpoint.load(where).digest
        plain = empty_model(model.config)
        plain.load_state_dict(tensors, assign=True)
        save_hf(where, plain, eos_ids=self.config["stop_ids"], files=self.files)
        return number, checkpoint.sha256(where / "model.safetensors")

    def keep(self, number: int) -> None:
        checkpoint.remove(self.place(other) for other in self.taken() if other != number)


# ---- two kinds of servers


class Ours:
    """serve.py, with --weights_dir and a key."""

    def __init__(self, room: Room):
        self.room = room

    def check(self, server: Server, longest: int, response: int, end: float) -> About:
        """ValueError where it does not serve this model, or has no room for prompts and responses of these lengths."""
        about = server.ask("GET", "/v1/weights", None, end, Lines())
        asked, room, wanted = longest + response, self.room, json.loads(json.dumps(self.room.config["model"]))
        try:
            if about["model"] != wanted:
                names = sorted(name for name in wanted | about["model"] if wanted.get(name) != about["model"].get(name))
                found = ", ".join(f"{name} {about['model'].get(name)} for {wanted.get(name)}" for name in names)
                raise ValueError(f"serves another model than --init: {found}")
            if about["tokenizer"] != room.config["tokenizer"]:
                raise ValueError("serves a model with another tokenizer than --init")
            if not room.path.is_relative_to(about["weights_dir"]):
                raise ValueError(
                    f"takes weights from {about['weights_dir']}, this run lays them into {room.path}: start it with "
                    f"--weights_dir={room.path}, or choose --sampler_dir"
                )
            if about["max_length"] < asked or about["max_tokens"] < response:
                raise ValueError(
                    f"has room for {about['max_length']} tokens and answers of {about['max_tokens']}; this run needs {asked} "
                    f"and {response}: raise its --cache_tokens, or --max_tokens"
                )
            choices, rows = about["max_choices"], about["max_batch"] * about["workers"]
            if about["precision"] not in PRECISIONS or min(choices, rows) < 1:
                raise ValueError(f"says precision {about['precision']}, {choices} choices and {rows} rows")
        except (KeyError, TypeError, AttributeError):
            raise ValueError("does not say what serve.py says at /v1/weights") from None
        return About(about["precision"], choices, rows)

    def give(self, server: Server, path: str, sha256: str, end: float, lines: Lines) -> None:
        server.ask("POST", "/v1/weights", {"path": path, "sha256": sha256}, end, lines)

    def fields(self, one: Question, seed: int, iteration: int) -> dict:
        """What decides the draws, and which log-probs are asked for."""
        drawn = {"seed": seed, "iteration": iteration, "rows": one.ids}
        return {"uniforms": drawn, "logprobs_mode": "processed_logprobs"}

    def sampled_by(self, told: dict, sha256: str) -> bool:
        """Was this answer sampled by these weights?"""
        return told.get("system_fingerprint") == sha256[:16]


class Others:
    """Servers that speak vLLM's dialect of OpenAI's API. push(url, directory) gives one the weights of an HF directory."""

    def __init__(self, push: Callable[[str, str], object]):
        self.push, self.names = push, {}

    def check(self, server: Server, longest: int, response: int, end: float) -> About:
        told = server.ask("GET", "/v1/models", None, end, Lines())
        try:
            model = told["data"][0]  # the others are adapters of it, or its reference
            self.names[server.url], width = str(model["id"]), model.get("max_model_len")
        except (LookupError, TypeError, AttributeError):
            raise ValueError("does not say at /v1/models which model it serves") from None
        if width is not None and (type(width) is not int or width < longest + response):
            raise ValueError(f"has room for {width} tokens; this run needs {longest + response}")
        return About("bf16", MOST_CHOICES, MOST_THREADS)  # it does not say; a coarser tolerance is no harm

    def give(self, server: Server, path: str, sha256: str, end: float, lines: Lines) -> None:
        try:
            self.push(server.url, path)
        except OSError as error:  # of a connection, too
            raise Lost(f"--sampler_push failed for {server.url} ({error})") from None
        except Exception as error:  # the user's function is wrong
            raise ValueError(f"--sampler_push failed for {server.url} ({type(error).__name__}: {error})") from error

    def fields(self, one: Question, seed: int, iteration: int) -> dict:
        """A seed that no other question has, and nothing that vLLM would take from the model's generation_config.json."""
        digest = hashlib.blake2b(f"{seed}/{iteration}/{one.ids[0]}".encode(), digest_size=8).digest()
        return {"seed": int.from_bytes(digest, "little") >> 1} | NEUTRAL

    def sampled_by(self, told: dict, sha256: str) -> bool:
        return True  # it does not say


class Servers:
    """servers(prompts, lengths, ids, iteration) -> Generated, as rollout.act has it, of servers that hold `model`'s weights.

    refresh() gives them the weights of now, through the room: all ranks call it together. longest: tokens of the longest
    prompt. group: rows that have the same one. push: see `Others`; None for serve.py. ValueError, naming the URL, where one
    does not answer, is not of this model, or cannot do what is asked for.
    """

    def __init__(
        self,
        urls: tuple[str, ...],
        model: Transformer,
        sampling: Sampling,
        seed: int,
        room: Room,
        longest: int,
        patience: float,
        dist: Dist,
        push: Callable[[str, str], object] | None = None,
        group: int = 1,
    ):
        try:
            self.servers = [Server(url, os.environ.get(KEY) or None) for url in urls]
        except ValueError as error:
            raise ValueError(f"--sampler: {error}") from None
        self.model, self.sampling, self.seed, self.dist = model, sampling, seed, dist
        self.room, self.patience, self.kind = room, patience, Others(push) if push else Ours(room)
        self.part = patience / min(
            2, len(urls)
        )  # of the patience, for a try: another server is left time where one hangs
        self.sha256, self.path = "", ""  # of the weights that are sampled by, and where they lie
        about = [self.check(server, longest) for server in self.servers]
        self.precision = max((each.precision for each in about), key=PRECISIONS.index)  # the coarsest
        self.choices = min(each.choices for each in about)
        texts = sum(each.at_once for each in about) // dist.world  # of this rank that decode together
        self.threads = max(1, min(MOST_THREADS, texts // min(group, self.choices)))

    def check(self, server: Server, longest: int) -> About:
        end = time.monotonic() + min(self.patience, FIRST_CHECK)
        try:
            return self.kind.check(server, longest, self.sampling.max_new_tokens, end)
        except (Lost, Refused) as error:
            other = isinstance(self.kind, Ours) and " answers 404 " in str(error)
            what = "; it is no serve.py of this version, see --sampler_push" if other else ""
            raise ValueError(f"--sampler: {error}{what}") from None
        except ValueError as error:
            raise ValueError(f"--sampler={server.url} {error}") from None

    def refresh(self) -> None:
        """The servers get the policy's weights of now. All ranks call it together; ValueError on all where it fails."""
        error, told = None, torch.zeros(1, 33, dtype=torch.int64)  # the number of the place, and the sha256
        with self.dist.whole(self.model):
            if self.dist.is_main:
                try:
                    number, self.sha256 = self.room.lay(self.model)
                    self.path = str(self.room.place(number))
                    self.give_all()
                    self.room.keep(number)
                    told = torch.tensor([[number, *bytes.fromhex(self.sha256)]])
                except (ValueError, OSError) as caught:
                    error = caught
        number, *digest = self.dist.all_gather_rows(told)[0].tolist()
        if not number:
            raise error or ValueError("the servers of --sampler did not get the weights")
        self.sha256, self.path = bytes(digest).hex(), str(self.room.place(number))

    def give_all(self) -> None:
        """The weights to every server. One that does not answer in a few tries gets them when it samples by others; ValueError
        where that are all of them, until their time is over.
        """
        left, start, lines = self.servers, time.monotonic(), Lines()
        for n, pause in enumerate(pauses()):
            with ThreadPoolExecutor(len(left)) as pool:
                errors = [*pool.map(lambda server: self.give(server, self.end_of_try(start), lines), left)]
            left, lost = [x for x, error in zip(left, errors) if error], [error for error in errors if error]
            others = isinstance(self.kind, Ours) and len(left) < len(self.servers)
            waited = time.monotonic() + pause - start
            if not left or others and (n >= QUICK or waited > self.part):
                break
            if waited > self.patience:
                raise ValueError(f"--sampler: no weights were taken in {self.patience:g} s: {'; '.join(lost)}")
            lines.over.wait(pause)
        for line in lost:
            say(f"{line}; the other servers are asked for its rows")

    def end_of_try(self, start: float) -> float:
        """When a try that begins now ends, of a request that began at `start`."""
        return min(start + self.patience, time.monotonic() + self.part)

    def give(self, server: Server, end: float, lines: Lines, since: float = math.inf) -> str:
        """The weights to this server, unless it got some after `since`; -> why it did not take them, "" where it did."""
        try:
            with server.lock:
                if server.given < since:
                    self.kind.give(server, self.path, self.sha256, end, lines)
                    server.given = time.monotonic()
        except Lost as error:
            return str(error)
        return ""

    def __call__(self, prompts: Tensor, lengths: Tensor, ids: Tensor, iteration: int) -> Generated:
        """Responses to right-padded prompts (B, P) of these lengths (B,), on this rank's device."""
        prompts, lengths = prompts.cpu(), lengths.cpu()
        asked = questions(prompts, lengths, ids, self.choices)
        lines, found = Lines(), {}
        with ThreadPoolExecutor(self.threads) as pool:
            futures = {pool.submit(self.answer, k, one, iteration, lines): one for k, one in enumerate(asked)}
            try:
                for future in as_completed(futures):
                    found |= {futures[future].first + k: row for k, row in enumerate(future.result())}
            except BaseException:  # one that fails, or Ctrl-C: the others would be waited for
                lines.end()
                pool.shutdown(cancel_futures=True)
                raise
        return self.assembled(prompts, lengths, [found[row] for row in range(len(ids))])

    def answer(self, turn: int, one: Question, iteration: int, lines: Lines) -> list[Answer]:
        """The answer to each row of a question, from the turn-th server or the next that gives one."""
        s, start, failed = self.sampling, time.monotonic(), 0
        most = min(s.max_new_tokens, self.model.config.context - len(one.prompt))
        body = {
            "prompt": one.prompt, "max_tokens": most, "temperature": s.temperature, "top_p": s.top_p,
            "n": len(one.ids), "stop_token_ids": [*s.stop_ids], "ignore_eos": True, "return_token_ids": True, "logprobs": 0,
            "top_k": s.top_k or -1,
        }  # fmt: skip
        body |= self.kind.fields(one, self.seed, iteration)
        for step, pause in zip(count(turn), pauses()):
            server, began = self.servers[step % len(self.servers)], time.monotonic()
            named = {"model": self.kind.names[server.url]} if isinstance(self.kind, Others) else {}
            try:
                told = server.ask("POST", "/v1/completions", body | named, self.end_of_try(start), lines)
                if self.kind.sampled_by(told, self.sha256):
                    return answers(told, len(one.ids), most, self.model.config.vocab_size, s.stop_ids, server.url)
                # it was started again, or somebody else has given it others
                why = self.give(server, self.end_of_try(start), lines, began)
                raise Lost(why or f"{server.url} sampled by other weights")
            except Lost as error:
                failed += error.failed
                late = time.monotonic() + pause > start + self.patience
                if failed >= FAILURES or late or lines.over.wait(pause):
                    tried = f"{step - turn + 1} tries in {time.monotonic() - start:.1f} s"
                    raise ValueError(
                        f"--sampler gave no responses for iteration {iteration}, {tried}: {error}"
                    ) from None

    def assembled(self, prompts: Tensor, lengths: Tensor, rows: list[Answer]) -> Generated:
        """Prompts and answers as `generate` puts them together."""
        starts, pad, device = lengths.tolist(), self.sampling.pad, self.dist.device
        whole = torch.tensor([start + len(row.ids) for start, row in zip(starts, rows)])
        T = int(whole.max())
        tokens, logprobs = torch.full((len(rows), T), pad, dtype=torch.int64), torch.zeros(len(rows), T)
        for i, (start, row) in enumerate(zip(starts, rows)):
            tokens[i, :start] = prompts[i, :start]
            tokens[i, start : start + len(row.ids)] = torch.tensor(row.ids)
            logprobs[i, start : start + len(row.ids)] = torch.tensor(row.logprobs)
        columns = torch.arange(T)
        mask = (columns >= lengths[:, None]) & (columns < whole[:, None])
        finished = torch.tensor([row.finished for row in rows])
        return Generated(*(x.to(device) for x in (tokens, whole, lengths, mask, logprobs, finished)))


def answers(told: dict, n: int, most: int, vocabulary: int, stop_ids, url: str) -> list[Answer]:
    """The n choices of an answer of /v1/completions, each checked. ValueError for what no sampler gives, Lost for one that was
    cut off.
    """

    def check(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"--sampler={url} gave {what}")

    choices, ends, found = told.get("choices"), set(stop_ids), []
    check(isinstance(choices, list) and all(isinstance(x, dict) for x in choices), "an answer without choices")
    check(
        [x.get("index") for x in choices] == list(range(n)), f"{len(choices)} choices, not the {n} asked for in order"
    )
    for choice in choices:
        ids, reason, logprobs = choice.get("token_ids"), choice.get("finish_reason"), choice.get("logprobs")
        numbers = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        check(isinstance(ids, list) and isinstance(numbers, list), "a choice without token_ids or token_logprobs")
        known = all(type(i) is int and 0 <= i < vocabulary for i in ids)
        check(known and 1 <= len(ids) <= most, f"no 1 to {most} token ids below {vocabulary}, but {str(ids):.60}")
        real = all(type(x) in (int, float) and -1e9 < x <= 1e-4 for x in numbers)  # rounding may lead above 0
        check(real and len(numbers) == len(ids), f"log-probs {str(numbers):.60} for {len(ids)} tokens")
        finished = ids[-1] in ends
        check(ends.isdisjoint(ids[:-1]), "tokens after one that ends an answer")
        both = finished and len(ids) == most  # the last token ends it in two ways, of which servers name either
        right = reason == ("stop" if finished else "length") or both and reason == "length"
        check(right, f"finish_reason {reason!r:.20} after token {ids[-1]}")
        if not finished and len(ids) < most:
            cut = (
                f"{len(ids)} of {most} tokens: it ran into the time that a request may take there, raise its --timeout"
            )
            raise Lost(f"{url} gave {cut}", failed=True)
        found.append(Answer(ids, [float(x) for x in numbers], finished))
    return found
