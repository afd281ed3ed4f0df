"""Continuous batching (Orca, Yu et al. 2022): requests join and leave the batch between two decoding steps.

One thread owns the models and gives each scheduler a `step` in turn (`Turns`). A step prefills at most CHUNK tokens of
waiting prompts and gives every running request one token. Rows 0..n-1 of the cache belong to the running requests, each with
its own length; one row beyond them is where the next prompt is read before it moves in, so reading and decoding never mix.

A request with a seed gets the same text alone or in any company. It owns its uniforms, every prompt is read alone, and
decoding is made to be the same arithmetic for a row whatever lies beside it: `exact_shape` finds how many rows and columns
a call must have at least for that, on this model and machine. Where there is no such shape (`exact` is False), log-probs agree
up to rounding (`rounding`: as far as was seen at the start), and a text can differ only where a uniform lies that close to the
border between two tokens: about once in a million tokens for 1e-6.
"""

import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from data.tokenizer import Detokenizer, Tokenizer
from model.generate import Decoding, check_finite, drawn_on, row_uniforms, sample_step
from model.steering import Steering, steer
from model.transformer import Transformer
from rlhf.serve.grammar import Grammar

CHUNK = 256  # prompt tokens per step: others wait no longer than that for their next token
COLUMNS = 64  # attended columns are a multiple of it
PROBES = 64  # inputs that are put in every place of a step at the start: a tail's other bits show in 4% of its numbers


class Full(Exception):
    """The queue is full; try again later."""


@dataclass(frozen=True)
class Sampling:
    """How a text is continued."""

    max_tokens: int  # 0: nothing is sampled, the prompt is only read
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    seed: int | None = None  # None: another text every time
    row: int = 0  # which of the texts of this seed: the n-th choice
    logprobs: int | None = None  # how many alternatives to report for each token; None: no log-probs at all
    prompt_logprobs: bool = False  # also of the prompt's tokens, with as many alternatives
    iteration: int = 0  # which round of them
    processed: bool = False  # log-probs are those of the distribution that was sampled from, not the model's
    stop_ids: tuple[int, ...] = ()  # tokens that end the answer beside the model's own
    ignore_eos: bool = False  # or in place of them
    min_p: float = 0.0
    steering: Steering | None = None  # None: nothing is steered
    grammar: Grammar | None = None  # None: any text
    strip: bool = False  # the text starts afresh: without the space before sentencepiece's first word


class Token(NamedTuple):
    id: int
    logprob: float | None  # under the model, at temperature 1; None for the first token of a prompt
    top: list[tuple[int, float]]  # the likeliest ids with their log-probs


@dataclass
class Event:
    """What a step brought for one request."""

    request: "Request"
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None  # "stop" or "length" with the last event
    error: str | None = None  # or this, and
    status: int = 503  # the kind of error, in HTTP's numbers


@dataclass(eq=False)
class Request:
    """One text to be continued. The scheduler's from `submit` until its last event."""

    prompt: list[int]
    sampling: Sampling
    deadline: float = float("inf")  # time.monotonic(): what is not finished by then is cut off
    inbox: object = None  # the submitter's own
    cancelled: bool = False
    read: int = 0  # tokens of the prompt in the cache
    prompt_tokens: list[Token] = field(default_factory=list)  # with prompt_logprobs
    sampled: list[Token] = field(default_factory=list)  # all of them, also what ended the answer
    weights: str | None = None  # sha256 of those that it is sampled by; None before it begins
    submitted: float = field(default_factory=time.monotonic)

    @property
    def count(self) -> int:
        return len(self.sampled)

    def begin(self, tokenizer: Tokenizer, weights: str) -> None:
        s, self.weights = self.sampling, weights
        self.stream = TextStream(tokenizer, s.stop, s.strip)
        self.guide = s.grammar and s.grammar.start()
        seed = s.seed if s.seed is not None else secrets.randbits(63)
        self.uniforms = (
            row_uniforms(seed, s.iteration, [s.row], s.max_tokens)[0] if s.temperature else None
        )  # (max_tokens,)


class TextStream:
    """The text of sampled ids, given out as soon as it cannot be part of a stop string any more, with its tokens."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), strip: bool = False):
        self.stop, self.detokenizer = stop, Detokenizer(tokenizer, afresh=strip)
        self.held, self.pending = "", deque()  # text not yet given out; (its tokens, where each begins in it)
        self.stopped = False

    def push(self, token: Token) -> tuple[str, list[Token]]:
        """Text and tokens to give out now; `stopped` says whether a stop string has ended it."""
        piece = self.detokenizer.push(token.id)
        self.pending.append((token, len(self.held)))
        self.held += piece
        return self._give()

    def flush(self) -> tuple[str, list[Token]]:
        """The rest, half characters as U+FFFD. Also when it is stopped, with nothing."""
        if self.stopped:
            return "", []
        self.held += self.detokenizer.flush()
        text, tokens = self._give()
        if not self.stopped:
            text, tokens = text + self.held, tokens + [token for token, _ in self.pending]
            self.held = ""
        return text, tokens

    def _give(self) -> tuple[str, list[Token]]:
        found = [at for at in (self.held.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped, end = True, min(found)
        else:
            end = len(self.held) - max((overlap(self.held, stop) for stop in self.stop), default=0)
        text, self.held = self.held[:end], self.held[end:]
        tokens = []
        while self.pending and self.pending[0][1] < end:  # one whose text is still held back waits with it
            tokens.append(self.pending.popleft()[0])
        self.pending = deque((token, max(0, at - end)) for token, at in self.pending)
        return text, tokens


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Scheduler:
    """rows: requests that decode together. width: longest prompt and answer together. queue: requests that may wait.

    `deliver` gets the events of every step, in the thread that calls `step`: that of `Turns`, or a test's.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        stop_ids: Iterable[int],
        rows: int,
        width: int,
        queue: int,
        deliver: Callable[[list[Event]], object],
    ):
        self.model, self.tokenizer, self.stop_ids = model.eval(), tokenizer, frozenset(stop_ids)
        self.rows, self.queue, self.deliver = rows, queue, deliver
        self.device = model.embed_tokens.weight.device
        # a multiple of 8 columns: the last, shorter vector of a row would be added up in another order
        self.width = min(width, model.config.context) // 8 * 8 or min(width, model.config.context)
        self.decoding = Decoding(model, rows + 1, self.width)
        self.spare = rows  # the row that prompts are read in
        self.active: list[Request] = []  # active[i] decodes in row i
        self.next: list[int] = []  # its newest token, which the cache does not hold yet
        self.reading: Request | None = None
        self.in_spare: tuple[list[int], Tensor] | None = None  # a prompt that lies there, and its last hidden state
        self.waiting: deque[Request] = deque()
        self.jobs: deque[tuple[Callable, Future]] = deque()
        self.changes: deque[tuple[Callable, Future]] = deque()  # of the weights: they wait until no text is under way
        self.weights = ""  # sha256 of the model's
        self.wake, self.stopping = threading.Condition(), False
        self.counts = Counter()  # what /metrics shows
        with torch.no_grad():
            self.exact, self.rounding = self.exact_shape()

    # ---- what other threads call

    def submit(self, requests: list[Request]) -> None:
        """Queues all or none of them. Full when they would make more than `queue` wait; ValueError for what never fits."""
        for request in requests:
            if not request.prompt:
                raise ValueError("the prompt is empty")
            if len(request.prompt) + request.sampling.max_tokens > self.width:
                raise ValueError(
                    f"{len(request.prompt)} tokens of prompt and {request.sampling.max_tokens} of answer exceed the "
                    f"{self.width} that there is room for"
                )
        with self.wake:
            free = self.rows - len(self.active) - (self.reading is not None)
            if self.stopping or len(self.waiting) + len(requests) > self.queue + free:
                self.counts["rejected"] += len(requests)
                raise Full
            self.waiting.extend(requests)
            self.counts["requests"] += len(requests)
            self.wake.notify()

    def cancel(self, request: Request) -> None:
        """Its row is free from the next step on; no more events come."""
        with self.wake:
            request.cancelled = True
            self.wake.notify()

    def call(self, function: Callable, *args) -> Future:
        """The function's result, between two steps, in the thread that owns the model. Full as for `submit`."""
        return self._queued(self.jobs, self.queue, function, *args)

    def change(self, function: Callable, *args) -> Future:
        """The same, when no text is under way: those that are end before, those that wait begin after. It may change the
        model: what was read of prompts is forgotten. The function returns the sha256 of the weights that it leaves.
        """
        return self._queued(self.changes, 8, self._change, function, *args)

    def _queued(self, queue: deque, most: int, function: Callable, *args) -> Future:
        future = Future()
        with self.wake:
            if self.stopping or len(queue) >= most:
                self.counts["rejected"] += 1
                raise Full
            queue.append((lambda: function(*args), future))
            self.wake.notify()
        return future

    @property
    def idle(self) -> bool:
        return not (self.active or self.reading or self.waiting or self.jobs or self.changes)

    # ---- the thread that owns the model

    def end(self) -> None:
        """Tells those who are still there that nothing more comes."""
        left = [*self.active, *self.waiting, *([self.reading] if self.reading else [])]
        self.deliver([Event(request, error="the server stops") for request in left])
        for _, future in [*self.jobs, *self.changes]:
            future.cancel()

    def attempt(self) -> None:
        """A step; after out of memory, or a bug, those in it are told that they are lost, and the server goes on."""
        try:
            self.step()
        except Exception:
            logging.getLogger(__name__).exception("a step failed")
            lost = [*self.active, *([self.reading] if self.reading else [])]
            self.active, self.next, self.reading, self.in_spare, self.decoding.lengths = [], [], None, None, []
            self.deliver([Event(request, error="the server failed", status=500) for request in lost])

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Drops who left, runs a job or change, reads prompts, decodes a token of every row; -> events, which are delivered."""
        self._drop()
        with self.wake:
            queue = self.changes if self.changes and not (self.active or self.reading) else self.jobs
            job = queue.popleft() if queue else None
        if job and job[1].set_running_or_notify_cancel():
            try:
                job[1].set_result(job[0]())
            except Exception as error:  # the caller's to report
                job[1].set_exception(error)
        events = []
        try:
            if self.active:
                self._decode(events)
            self._read(events)
        finally:  # an answer that has ended is not lost with a step that fails after it
            if events:
                self.deliver(events)
        return events

    def _change(self, function: Callable, *args) -> None:
        self.in_spare = None  # read by the weights of before
        self.weights = function(*args)

    def _drop(self) -> None:
        now = time.monotonic()
        with self.wake:
            gone = [r for r in self.waiting if r.cancelled]
            late = [r for r in self.waiting if now > r.deadline and not r.cancelled]
            if gone or late:
                self.waiting = deque(r for r in self.waiting if not r.cancelled and now <= r.deadline)
            if self.reading and self.reading.cancelled:
                gone.append(self.reading)
                self.reading = None
        left = {row for row, request in enumerate(self.active) if request.cancelled}
        gone += (self.active[row] for row in left)
        self._leave(left)
        self.counts["cancelled"] += len(gone)
        if late:
            self.deliver([Event(request, error="it waited too long") for request in late])

    def _leave(self, rows: set[int]) -> None:
        if rows:
            stay = self.decoding.leave(rows)
            self.active, self.next = [self.active[row] for row in stay], [self.next[row] for row in stay]

    def _forward(self, ids: list[int], seeded: bool) -> Tensor:
        """Logits (B, V) after one more token in each of the rows that decode."""
        rows, columns = self.shape if seeded else (1, 1)
        longest = min(-(-(max(self.decoding.lengths) + 1) // COLUMNS) * COLUMNS, self.width)
        columns = max(columns, longest) if seeded else None
        hidden = self.decoding.step(torch.tensor(ids, device=self.device), rows, columns)
        return self.model.unembed(hidden)[: len(ids)]

    def exact_shape(self) -> tuple[bool, float]:
        """Sets `shape`, the fewest rows and columns from which on a row's logits do not depend, bit by bit, on what lies
        beside it; -> (True, 0.0), or (False, the largest difference between log-probs) at the shape where the fewest differ.

        Libraries choose their kernel by the shape: on a CPU a product of fewer than four rows is added up in another
        order. And what is left of a step behind the last whole block of vectors (32 floats with AVX-512) is worked on one
        by one, with other last bits: in the last row, where an MLP's width is no multiple of such a block.
        """
        generator, vocabulary = torch.Generator().manual_seed(0), self.model.config.vocab_size
        longest = min(100, self.width)
        prompt = torch.randint(vocabulary, (1, longest), generator=generator).to(self.device)
        ids = torch.randint(vocabulary, (self.rows,), generator=generator)
        lengths = torch.tensor([37 * row % longest for row in range(self.rows)])
        self._read_chunk(prompt[0].tolist(), 0)

        def logits(order: Tensor) -> Tensor:
            self._join(longest, len(order))
            self.decoding.lengths = lengths[order].tolist()
            try:
                return self._forward(ids[order].tolist(), seeded=True)
            finally:
                self.decoding.lengths = []

        def company():
            """Logits (n, V) of steps of `shape`, and what they should be."""
            rows = self.shape[0]
            for n in sorted({min(n, self.rows) for n in (1, rows, rows + 1, self.rows // 2 + 1, self.rows)}):
                for order in (everybody[:n], everybody.flip(0)[:n]):
                    yield logits(order), full[order]

        def places():
            """What an MLP makes of one input in every place of a step, before its last product, and in the first place."""
            mlp, seen = self.model.layers[0].mlp, []
            handle = mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            try:
                for probe in range(PROBES):
                    n = min(self.shape[0] + probe % 8, self.rows)
                    x = 20 * torch.randn(self.model.config.width, generator=generator)
                    mlp(x.to(full.device, self.model.norm.weight.dtype).expand(n, 1, -1).contiguous())
                    yield seen[-1], seen[-1][:1].expand_as(seen[-1])
            finally:
                handle.remove()

        everybody = torch.arange(self.rows)
        self.shape = (self.rows, self.width)
        full = logits(everybody)
        if not bool(full.isfinite().all()):
            raise ValueError("the model's logits are not finite: it has diverged; serve an earlier checkpoint")
        shapes = [*((2**k, 1) for k in range(10) if 2**k < self.rows), (self.rows, 1), (self.rows, self.width)]
        for self.shape in shapes:
            if all(torch.equal(*pair) for pairs in (company, places) for pair in pairs()):
                return True, 0.0
        unequal = {}  # logits in each shape
        for self.shape in shapes:
            unequal[self.shape] = sum(int((a != b).sum()) for a, b in company())
        self.shape = min(unequal, key=unequal.get)
        pairs = ((a.cpu().double(), b.cpu().double()) for a, b in company())
        return False, max(float((a.log_softmax(-1) - b.log_softmax(-1)).abs().max()) for a, b in pairs)

    def _decode(self, events: list[Event]) -> None:
        """One token of every row."""
        started = time.perf_counter()
        seeded = any(request.sampling.seed is not None for request in self.active)
        tokens, ended = self._sample(self._forward(self.next, seeded), self.active), set()
        for row, request in enumerate(self.active):
            event = self._advance(request, tokens[row])
            events.append(event)
            if event.finish or event.error:
                ended.add(row)
            else:
                self.next[row] = tokens[row].id
        self._leave(ended)
        self.counts["steps"] += 1
        self.counts["step_rows"] += len(tokens)
        self.counts["decode_seconds"] += time.perf_counter() - started

    def _sample(self, logits: Tensor, requests: list[Request]) -> list[Token | str]:
        """One token for each row of logits (B, V), by its own settings and uniforms; an error where there is none."""
        groups, (steered, sampled) = {}, self._steer(logits, requests)
        for row, request in enumerate(requests):
            s = request.sampling
            if sampled[row] is None:
                groups.setdefault((s.temperature, s.top_k, s.top_p, s.min_p), []).append(row)

        def draw(how: tuple, rows: list[int]) -> None:
            uniforms = None
            if how[0]:
                uniforms = torch.stack([requests[row].uniforms[requests[row].count] for row in rows]).to(
                    drawn_on(self.device)
                )
            some = steered if len(rows) == len(steered) else steered[rows]
            try:
                chosen, logprobs = (x.tolist() for x in sample_step(some, uniforms, *how))
            except ValueError as error:  # not finite: in one of them, perhaps
                if len(rows) == 1:
                    sampled[rows[0]] = str(error)
                for row in rows if len(rows) > 1 else ():
                    draw(how, [row])
                return
            for row, i, logprob in zip(rows, chosen, logprobs):
                sampled[row] = Token(i, logprob if requests[row].sampling.processed else None, [])

        for how, rows in groups.items():
            draw(how, rows)
        wanted = [
            row for row, request in enumerate(requests)
            if request.sampling.logprobs is not None and isinstance(sampled[row], Token) and not request.sampling.processed
        ]  # fmt: skip
        if wanted:
            most = max(requests[row].sampling.logprobs for row in wanted)
            reports = report(logits[wanted], [sampled[row].id for row in wanted], most)
            for row, token in zip(wanted, reports):
                sampled[row] = token._replace(top=token.top[: requests[row].sampling.logprobs])
        return sampled

    def _steer(self, logits: Tensor, requests: list[Request]) -> tuple[Tensor, list[str | None]]:
        """Logits (B, V) with those rows changed that ask for it, each by its own tokens (the same tensor where none does),
        and for each row why it goes on with none.
        """
        rows, errors = [row for row, r in enumerate(requests) if r.guide or r.sampling.steering], [None] * len(requests)
        if not rows:
            return logits, errors
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        for row in rows:
            request, how = requests[row], requests[row].sampling.steering
            if how:
                logits[row] = steer(logits[row], how, request.prompt, [token.id for token in request.sampled])
            if request.guide:
                try:
                    allowed = request.guide.allowed(logits.shape[-1], self.stop_ids).to(logits.device)
                except ValueError as error:
                    errors[row] = str(error)
                    continue
                logits[row] = logits[row].masked_fill(~allowed, -torch.inf)
        return logits, errors

    def _advance(self, request: Request, token: Token | str) -> Event:
        """Appends a sampled token to the request's text."""
        if isinstance(token, str):
            return Event(request, error=token, status=500)
        if request.count == 0:
            self.counts["first_tokens"] += 1
            self.counts["first_token_seconds"] += time.monotonic() - request.submitted
        request.sampled.append(token)
        self.counts["tokens"] += 1
        event = Event(request)
        s = request.sampling
        if token.id in s.stop_ids or token.id in self.stop_ids and not s.ignore_eos:
            event.finish = "stop"
        else:
            event.text, event.tokens = request.stream.push(token)
            if request.guide:
                request.guide.push(token.id)
            if request.stream.stopped:
                event.finish = "stop"
            elif request.count == s.max_tokens or time.monotonic() > request.deadline:
                event.finish = "length"
        if event.finish:
            text, tokens = request.stream.flush()
            event.text, event.tokens = event.text + text, event.tokens + tokens
            event.finish = "stop" if request.stream.stopped else event.finish
            self.counts["finished"] += 1
        return event

    def _read(self, events: list[Event]) -> None:
        """Up to CHUNK tokens of prompts go into the spare row, and from there whole ones into the batch."""
        budget = CHUNK
        while budget > 0 and len(self.active) < self.rows:
            with self.wake:
                if self.reading is None:
                    if not self.waiting or self.changes:
                        break
                    self.reading = self.waiting.popleft()
            request, started = self.reading, time.perf_counter()
            if request.read == 0:
                request.begin(self.tokenizer, self.weights)
            if self.in_spare and self.in_spare[0] == request.prompt and not request.sampling.prompt_logprobs:
                hidden, request.read = self.in_spare[1], len(request.prompt)  # another choice for the same prompt
            else:
                # chunks begin at multiples of CHUNK whatever else happens: the same arithmetic every time
                self.in_spare, start = None, request.read
                hidden = self._read_chunk(request.prompt[start : start + CHUNK], start)  # (T, D)
                if request.sampling.prompt_logprobs:
                    try:
                        self._report_prompt(request, hidden)
                    except ValueError as error:  # not finite
                        self.reading = None
                        events.append(Event(request, error=str(error), status=500))
                        continue
                hidden, request.read = hidden[-1:], start + len(hidden)
                budget -= request.read - start
                self.counts["prompt_tokens"] += request.read - start
            self.counts["prefill_seconds"] += time.perf_counter() - started
            if request.read < len(request.prompt):
                continue
            self.in_spare = (request.prompt, hidden)
            if request.sampling.max_tokens == 0:
                self.counts["finished"] += 1
                event = Event(request, finish="length")
            else:
                token = self._sample(self.model.unembed(hidden), [request])[0]
                event = self._advance(request, token)
            going = not event.finish and not event.error
            if going:
                self._join(len(request.prompt))
            self.reading = None  # only now: until here a failure must find it
            events.append(event)
            if going:
                self.active.append(request)
                self.next.append(token.id)

    def _read_chunk(self, ids: list[int], start: int) -> Tensor:
        """Hidden states (T, D) of a part of a prompt, which goes into the spare row from column `start` on."""
        row = self.decoding.cache.view(slice(self.spare, self.spare + 1), [start], start)
        return self.model.trunk(torch.tensor([ids], device=self.device), row)[0]

    def _join(self, length: int, copies: int = 1) -> None:
        """The spare row, of so many tokens, joins those that decode."""
        first = len(self.decoding.lengths)
        spare, rows = torch.full((copies,), self.spare), torch.arange(first, first + copies)
        self.decoding.cache.copy_rows(spare.to(self.device), rows.to(self.device), length)
        self.decoding.lengths += [length] * copies

    def _report_prompt(self, request: Request, hidden: Tensor) -> None:
        """Log-probs of the tokens that the positions just read (T, D) predict; the first token has none."""
        if request.read == 0:
            request.prompt_tokens.append(Token(request.prompt[0], None, []))
        after = request.prompt[request.read + 1 : request.read + 1 + len(hidden)]
        if after:
            logits = self.model.unembed(hidden[: len(after)])
            request.prompt_tokens += report(logits, after, request.sampling.logprobs or 0)


class Turns:
    """The thread that owns the models: every scheduler that has something to do makes a step in its turn.

    So a text of one model waits for one step of each other model, however many texts those have.
    """

    def __init__(self, *schedulers: Scheduler):
        self.schedulers, self.stopping, self.wake = schedulers, False, threading.Condition()
        for scheduler in schedulers:
            scheduler.wake = self.wake
        self.thread = threading.Thread(target=self._run, name="schedulers", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Takes nothing more, ends what runs, and waits for the thread."""
        with self.wake:
            self.stopping = True
            for scheduler in self.schedulers:
                scheduler.stopping = True
            self.wake.notify()
        if self.thread.is_alive():
            self.thread.join()

    def _run(self) -> None:
        torch.set_grad_enabled(False)  # of this thread
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.stopping or any(not s.idle for s in self.schedulers))
                if self.stopping:
                    break
            for scheduler in self.schedulers:
                if not scheduler.idle:
                    scheduler.attempt()
        for scheduler in self.schedulers:
            scheduler.end()


def report(logits: Tensor, ids: list[int], most: int) -> list[Token]:
    """Log-probs at temperature 1 of `ids` (N) and of the `most` likeliest tokens of each row. logits (N, V)

    ValueError for logits that are not finite.
    """
    check_finite(logits.amax(-1))
    logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    chosen = logprobs.gather(-1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    values, tops = (x.tolist() for x in logprobs.topk(min(most, logits.shape[-1]), dim=-1))
    return [Token(i, p, list(zip(t, v))) for i, p, t, v in zip(ids, chosen, tops, values)]
