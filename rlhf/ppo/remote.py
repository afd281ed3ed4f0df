"""Responses from servers: the other side of the sampler's wall, behind `--sampler=URL,URL`.

Token ids go out, token ids and their log-probs come back (/v1/completions); before an iteration the policy's weights are laid
into a directory that the servers see, and each is told to take them (POST /v1/weights, docs/serve.md). serve.py draws from the
uniforms of (seed, iteration, row) that the built-in sampler has, so a row's tokens are the same here and there.

Every answer says by which weights it was sampled: one by others is asked for again, after its server got the right ones. What
does not answer is asked again, the other servers in turn, for `patience` seconds; then the run ends in one line.
"""

import http.client
import json
import math
import os
import re
import socket
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from model.generate import Generated, Sampling
from model.lora import lora_layers
from model.transformer import Transformer
from rlhf.infra import checkpoint
from rlhf.infra.distributed import Dist
from rlhf.infra.metrics import say
from rlhf.lm.checkpoints import empty

KEY = "PLAIN_RLHF_KEY"  # the environment variable with the servers' key
LARGEST_ANSWER = 2**28  # bytes
MOST_THREADS = 128  # requests of a rank that are under way
LONGEST_PAUSE = 2.0  # seconds between two tries
QUICK = 3  # tries for a server that does not take weights while another has
FAILURES = 3  # answers with status 500 to one request: a server that fails on it will go on to do so
PRECISIONS = ("fp32", "bf16", "fp16")
PLACE = re.compile(r"weights_(\d{6})")


class Lost(Exception):
    """A try that brought no answer; another may. failed: the server met an error of its own."""

    def __init__(self, text: str, failed: bool = False):
        super().__init__(text)
        self.failed = failed


class Refused(ValueError):
    """An answer that says no."""


class Lines:
    """The connections of one round of requests, so that they can be ended together."""

    def __init__(self):
        self.over = threading.Event()
        self.open: set[http.client.HTTPConnection] = set()
        self.lock = threading.Lock()

    def add(self, connection: http.client.HTTPConnection) -> None:
        with self.lock:
            self.open.add(connection)

    def check(self) -> None:
        if self.over.is_set():
            raise Lost("the requests were ended")

    def drop(self, connection: http.client.HTTPConnection) -> None:
        with self.lock:
            self.open.discard(connection)
        connection.close()

    def end(self) -> None:
        self.over.set()
        with self.lock:
            for connection in self.open:
                if connection.sock is not None:
                    try:
                        connection.sock.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        pass  # it has ended


class Server:
    """One URL. ValueError where it is none."""

    def __init__(self, url: str, key: str | None):
        try:
            parts = urllib.parse.urlsplit(url)
            self.port = parts.port
        except ValueError as error:
            raise ValueError(f"--sampler={url} is no URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError(f"--sampler={url} is not of the form http://HOST:PORT (the key is read from {KEY})")
        self.secure, self.host, self.key = parts.scheme == "https", parts.hostname, key
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        self.url, self.lock = url, threading.Lock()
        self.given = 0.0  # when it last got weights, time.monotonic()

    def ask(self, method: str, path: str, body: dict | None, end: float, lines: Lines) -> dict:
        """The JSON object of an answer with status 200. Refused for one of 4xx, Lost for what may be better next time."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=max(0.01, end - time.monotonic()))
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        lines.add(connection)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self.base + path, data, headers | {"Content-Type": "application/json"})
            lines.check()  # from here on `end` of the lines reaches it
            answer = connection.getresponse()
            content = read_before(connection, answer, end)
            told = json.loads(content) if content else {}
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Lost(f"{self.url} does not answer ({type(error).__name__}: {error})") from None
        finally:
            lines.drop(connection)
        if answer.status == 200 and isinstance(told, dict):
            return told
        error = told.get("error") if isinstance(told, dict) else None
        why = str(error.get("message", "")) if isinstance(error, dict) else ""
        text = f"{self.url}{path} answers {answer.status} {answer.reason}" + (f": {why:.300}" if why else "")
        if 400 <= answer.status < 500 and answer.status not in (408, 429):
            raise Refused(text)
        raise Lost(text, failed=answer.status == 500)


def read_before(connection: http.client.HTTPConnection, answer: http.client.HTTPResponse, end: float) -> bytes:
    """The body; an error where it is too large, or not there at time `end`, however slowly it comes."""
    parts, size = [], 0
    while part := answer.read1(1 << 20):
        parts.append(part)
        size += len(part)
        if size > LARGEST_ANSWER:
            raise ValueError(f"more than {LARGEST_ANSWER} bytes")
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("it answers too slowly")
        if connection.sock is not None:
            connection.sock.settimeout(left)
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(parts)


@dataclass(frozen=True)
class Question:
    """Neighbouring rows of this rank that answer the same prompt."""

    first: int  # of the rows
    prompt: list[int]
    ids: list[int]  # global ids of the rows


def questions(prompts: Tensor, lengths: Tensor, ids: Tensor, most: int) -> list[Question]:
    """Right-padded prompts (B, P) of these lengths (B,), `most` equal neighbours together."""
    found: list[Question] = []
    for row, (prompt, length, i) in enumerate(zip(prompts.tolist(), lengths.tolist(), ids.tolist())):
        if found and found[-1].prompt == prompt[:length] and len(found[-1].ids) < most:
            found[-1].ids.append(i)
        else:
            found.append(Question(row, prompt[:length], [i]))
    return found


def sampled_weights(model: Transformer) -> dict[str, Tensor]:
    """What samples, by the names of a plain transformer: active adapters merged."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for path, layer in lora_layers(model).items():
        if layer.active in layer.lora_A:
            tensors[f"{path}.weight"] = layer.merged(layer.active)
    return {name: tensors[name].detach() for name in empty(model.config).state_dict()}


class Room:
    """The directory through which weights go: each time a place of its own, of which the last one stays."""

    def __init__(self, path: str | Path, config: dict, files: list[Path]):
        self.path, self.config, self.files = Path(path).resolve(), config, files

    def place(self, number: int) -> Path:
        return self.path / f"weights_{number:06d}"

    def taken(self) -> list[int]:
        return [int(found[1]) for found in map(PLACE.fullmatch, (x.name for x in self.path.glob("*"))) if found]

    def lay(self, model: Transformer) -> tuple[int, str]:
        """The weights into the next place, beside those of before; -> its number, and their sha256."""
        number = max(self.taken(), default=0) + 1
        checkpoint.save(self.place(number), sampled_weights(model), self.config, files=self.files)
        return number, checkpoint.load(self.place(number)).digest

    def keep(self, number: int) -> None:
        checkpoint.remove(self.place(other) for other in self.taken() if other != number)


class Servers:
    """servers(prompts, lengths, ids, iteration) -> Generated, as rollout.act has it, of servers that hold `model`'s weights.

    refresh() gives them the weights of now, through the room: all ranks call it together. longest: tokens of the longest
    prompt. ValueError, naming the URL, where one does not answer, is not of this model, or cannot do what is asked for.
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
    ):
        self.servers = [Server(url, os.environ.get(KEY) or None) for url in urls]
        self.model, self.sampling, self.seed, self.dist = model, sampling, seed, dist
        self.room, self.patience = room, patience
        self.sha256, self.path = "", ""  # of the weights that are sampled by, and where they lie
        about = [self.check(server, longest) for server in self.servers]
        self.precision = max((each["precision"] for each in about), key=PRECISIONS.index)  # the coarsest
        self.choices = min(each["max_choices"] for each in about)
        self.threads = max(1, min(MOST_THREADS, sum(x["max_batch"] * x["workers"] for x in about) // dist.world))

    def check(self, server: Server, longest: int) -> dict:
        """What the server says of itself. ValueError where it cannot serve this run."""
        try:
            about = server.ask("GET", "/v1/weights", None, time.monotonic() + min(self.patience, 30), Lines())
        except (Lost, Refused) as error:
            what = "; it is no serve.py of this version" if " answers 404 " in str(error) else ""
            raise ValueError(f"--sampler: {error}{what}") from None
        asked, s, room = longest + self.sampling.max_new_tokens, self.sampling, self.room
        wanted = json.loads(json.dumps(room.config["model"]))
        wrong = ""
        try:
            if about["model"] != wanted:
                names = sorted(name for name in wanted | about["model"] if wanted.get(name) != about["model"].get(name))
                found = ", ".join(f"{name} {about['model'].get(name)} for {wanted.get(name)}" for name in names)
                wrong = f"serves another model than --init: {found}"
            elif about["tokenizer"] != room.config["tokenizer"]:
                wrong = "serves a model with another tokenizer than --init"
            elif not room.path.is_relative_to(about["weights_dir"]):
                wrong = (
                    f"takes weights from {about['weights_dir']}, this run lays them into {room.path}: start it with "
                    f"--weights_dir={room.path}, or choose --sampler_dir"
                )
            elif about["max_length"] < asked or about["max_tokens"] < s.max_new_tokens:
                wrong = (
                    f"has room for {about['max_length']} tokens and answers of {about['max_tokens']}; this run needs {asked} "
                    f"and {s.max_new_tokens}: raise its --cache_tokens, or --max_tokens"
                )
            counts = [about[name] for name in ("max_choices", "max_batch", "workers")]
            if about["precision"] not in PRECISIONS or min(counts) < 1:
                wrong = f"says precision {about['precision']} and {counts} for its rows and workers"
        except (KeyError, TypeError, AttributeError):
            wrong = "does not say what serve.py says at /v1/weights"
        if wrong:
            raise ValueError(f"--sampler={server.url} {wrong}")
        return about

    # ---- weights

    def refresh(self) -> None:
        """The servers get the policy's weights of now. All ranks call it together; ValueError on all where it fails."""
        error, told = None, torch.zeros(1, 33, dtype=torch.int64)  # the number of the place, and the sha256
        with self.dist.whole(self.model):
            if self.dist.is_main:
                try:
                    number, self.sha256 = self.room.lay(self.model)
                    self.path = str(self.room.place(number))
                    self.push()
                    self.room.keep(number)
                    told = torch.tensor([[number, *bytes.fromhex(self.sha256)]])
                except (ValueError, OSError) as caught:
                    error = caught
        number, *digest = self.dist.all_gather_rows(told)[0].tolist()
        if not number:
            raise error or ValueError("the servers of --sampler did not get the weights")
        self.sha256, self.path = bytes(digest).hex(), str(self.room.place(number))

    def push(self) -> None:
        """To every server. One that does not answer in a few tries gets them when it samples by others; ValueError where that
        are all of them, until their time is over.
        """
        left, end, lines = self.servers, time.monotonic() + self.patience, Lines()
        for n, pause in enumerate(pauses()):
            with ThreadPoolExecutor(len(left)) as pool:
                errors = [*pool.map(lambda server: self.give(server, end, lines), left)]
            left, lost = [x for x, error in zip(left, errors) if error], [error for error in errors if error]
            if not left or n >= QUICK and len(left) < len(self.servers):
                break
            if time.monotonic() + pause > end:
                raise ValueError(f"--sampler: no server took the weights in {self.patience:g} s: {'; '.join(lost)}")
            lines.over.wait(pause)
        for line in lost:
            say(f"{line}; the other servers are asked for its rows")

    def give(self, server: Server, end: float, lines: Lines, since: float = math.inf) -> str:
        """The weights to this server, unless it got some after `since`; -> why it did not take them, "" where it did."""
        try:
            with server.lock:
                if server.given < since:
                    body = {"path": self.path, "sha256": self.sha256}
                    server.ask("POST", "/v1/weights", body, end, lines)
                    server.given = time.monotonic()
        except Lost as error:
            return str(error)
        return ""

    # ---- responses

    def __call__(self, prompts: Tensor, lengths: Tensor, ids: Tensor, iteration: int) -> Generated:
        """Responses to right-padded prompts (B, P) of these lengths (B,), on this rank's device."""
        asked = questions(prompts, lengths, ids, self.choices)
        lines, found = Lines(), {}
        with ThreadPoolExecutor(min(len(asked), self.threads)) as pool:
            futures = {pool.submit(self.answer, k, one, iteration, lines): one for k, one in enumerate(asked)}
            try:
                for future in as_completed(futures):
                    found |= {futures[future].first + k: row for k, row in enumerate(future.result())}
            except BaseException:  # one that fails, or Ctrl-C: the others would be waited for
                lines.end()
                pool.shutdown(cancel_futures=True)
                raise
        return self.assembled(prompts, lengths, [found[row] for row in range(len(ids))])

    def answer(self, turn: int, one: Question, iteration: int, lines: Lines) -> list["Answer"]:
        """The answer to each row of a question, from the turn-th server or the next that gives one."""
        s, end, failed = self.sampling, time.monotonic() + self.patience, 0
        most = min(s.max_new_tokens, self.model.config.context - len(one.prompt))
        body = {
            "prompt": one.prompt, "max_tokens": most, "temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p,
            "n": len(one.ids), "uniforms": {"seed": self.seed, "iteration": iteration, "rows": one.ids},
            "stop_token_ids": [*s.stop_ids], "ignore_eos": True, "return_token_ids": True, "logprobs": 0,
            "logprobs_mode": "processed_logprobs",
        }  # fmt: skip
        for step, pause in zip(count(turn), pauses()):
            server = self.servers[step % len(self.servers)]
            began = time.monotonic()
            try:
                told = server.ask("POST", "/v1/completions", body, end, lines)
                if told.get("system_fingerprint") == self.sha256[:16]:
                    return answers(told, len(one.ids), most, self, server.url)
                # it was started again, or somebody else has given it others
                raise Lost(self.give(server, end, lines, began) or f"{server.url} sampled by other weights")
            except Lost as error:
                failed += getattr(error, "failed", False)
                if failed >= FAILURES or time.monotonic() + pause > end or lines.over.wait(pause):
                    tried = f"{step - turn + 1} tries in {self.patience + time.monotonic() - end:.0f} s"
                    raise ValueError(
                        f"--sampler gave no responses for iteration {iteration}, {tried}: {error}"
                    ) from None

    def assembled(self, prompts: Tensor, lengths: Tensor, rows: list["Answer"]) -> Generated:
        """Prompts and answers as `generate` puts them together."""
        starts, pad, device = lengths.tolist(), self.sampling.pad, self.dist.device
        whole = torch.tensor([start + len(row.ids) for start, row in zip(starts, rows)])
        T = int(whole.max())
        tokens = torch.full((len(rows), T), pad, dtype=torch.int64)
        logprobs = torch.zeros(len(rows), T)
        for i, (start, row) in enumerate(zip(starts, rows)):
            tokens[i, :start] = prompts[i, :start]
            tokens[i, start : start + len(row.ids)] = torch.tensor(row.ids)
            logprobs[i, start : start + len(row.ids)] = torch.tensor(row.logprobs)
        columns, begin = torch.arange(T), lengths.cpu()
        mask = (columns >= begin[:, None]) & (columns < whole[:, None])
        finished = torch.tensor([row.finished for row in rows])
        return Generated(*(x.to(device) for x in (tokens, whole, begin, mask, logprobs, finished)))


def pauses():
    """Seconds between tries: each twice the one before."""
    return (min(LONGEST_PAUSE, 0.05 * 2 ** min(n, 10)) for n in count())


@dataclass(frozen=True)
class Answer:
    """One response."""

    ids: list[int]  # what ended it included
    logprobs: list[float]  # under the distribution that was sampled from
    finished: bool  # ended with a stop token


def answers(told: dict, n: int, most: int, of: Servers, url: str) -> list[Answer]:
    """The n choices of an answer of /v1/completions, each checked. ValueError for what no sampler gives."""

    def check(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"--sampler={url} gave {what}")

    choices = told.get("choices")
    check(isinstance(choices, list) and all(isinstance(x, dict) for x in choices), "an answer without choices")
    check(
        [x.get("index") for x in choices] == list(range(n)), f"{len(choices)} choices, not the {n} asked for in order"
    )
    found, vocabulary, ends = [], of.model.config.vocab_size, set(of.sampling.stop_ids)
    for choice in choices:
        ids, reason, logprobs = choice.get("token_ids"), choice.get("finish_reason"), choice.get("logprobs")
        numbers = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        check(isinstance(ids, list) and isinstance(numbers, list), "a choice without token_ids or token_logprobs")
        known = all(type(i) is int and 0 <= i < vocabulary for i in ids)
        check(known and 1 <= len(ids) <= most, f"no 1 to {most} token ids below {vocabulary}, but {str(ids):.60}")
        real = all(type(x) in (int, float) and -1e9 < x <= 1e-6 for x in numbers)
        check(real and len(numbers) == len(ids), f"log-probs {str(numbers):.60} for {len(ids)} tokens")
        finished = ids[-1] in ends
        check(ends.isdisjoint(ids[:-1]), "tokens after one that ends an answer")
        check(reason == ("stop" if finished else "length"), f"finish_reason {reason!r:.20} after token {ids[-1]}")
        cut = f"{len(ids)} of {most} tokens: it ran into the time that a request may take there, raise its --timeout"
        check(finished or len(ids) == most, cut)
        found.append(Answer(ids, [float(x) for x in numbers], finished))
    return found
