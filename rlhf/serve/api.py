"""The API over HTTP: OpenAI's endpoints, ours beside them, the page, and who may use them.

Starlette gives routes, uvicorn the sockets; both are imported where they are needed, so that only a server needs them.
"""

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import secrets
import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data.chat import Chat
from data.tokenizer import Tokenizer
from rlhf.serve import live, protocol
from rlhf.serve.answers import Writer
from rlhf.serve.http import (
    Stream,
    allowed,
    error_reply,
    failed,
    is_loopback,
    name_of,
    overloaded,
    reply,
    too_slow,
    unless_gone,
)
from rlhf.serve.live import Watched
from rlhf.serve.protocol import ApiError, Call, Limits
from rlhf.serve.responses import ResponsesWriter, parse_responses
from rlhf.serve.scheduler import Event, Full, Scheduler
from rlhf.serve.scorer import Scorer
from rlhf.serve.weights import Weights
from rlhf.serve.workers import Alone, Member

PAGE = Path(__file__).with_name("page")
LOG = logging.getLogger(__name__)
SLOW = frozenset(("messages", "input", "response_format"))
SMALL_BODY = 16_384  # bytes; a larger one is taken apart in a thread, so that streams go on


@dataclass(frozen=True)
class Served:
    """A model, under the name that clients call it by."""

    name: str
    scheduler: Scheduler
    scorer: Scorer
    limits: Limits


@dataclass(frozen=True)
class Service:
    """What the endpoints need."""

    models: tuple[Served, ...]  # the first is --init's, which a request gets that names none; () = a run is shown alone
    created: int  # seconds since 1970: when the server was started
    tokenizer: Tokenizer | None
    chat: Chat | None
    timeout: float  # seconds a request may take
    patience: float  # seconds its body may take to arrive
    max_body: int  # bytes
    key: str | None = None
    origins: frozenset[str] = frozenset()  # whose pages may use it beside ours
    feedback: object | None = None  # a FeedbackStore
    weights: Weights | None = None  # that may be exchanged
    shared: Alone | Member | None = None  # with which workers
    run: Watched | None = None  # a run of training that the page shows
    origin: dict = field(default_factory=dict)  # what the page says of the model, see rlhf/serve/about.py
    page_text: str | None = field(default_factory=lambda: whole_page())  # read once

    # ---- who may do what

    def guard(self, request, public: bool) -> None:
        """ApiError unless this request may be answered.

        Without a key the server listens on loopback alone: a name in Host that is none of loopback's means a web page whose
        name was pointed here. A browser says in Origin which page sends a request; only our own may change anything. It
        leaves Origin out of a GET whose answer the page may not read, but says in Sec-Fetch-Site that it comes from elsewhere.
        """
        host = request.headers.get("host", "")
        if self.key is None and host and not is_loopback(name_of(host)):
            raise ApiError(403, f"this server is not {host!r:.100}; without a key it answers on loopback only")
        origin = request.headers.get("origin")
        welcome = allowed(origin or "", self.origins)
        if not welcome and not public and request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise ApiError(403, "a page of another origin may not use this server")
        if request.method not in ("GET", "HEAD") and origin is not None and not welcome:
            if origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
                raise ApiError(403, "a page of another origin may not use this server")
        if self.key is not None and not public:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            sent = given.strip().encode("latin-1")  # the bytes of the header
            if scheme.lower() != "bearer" or not hmac.compare_digest(sent, self.key.encode()):
                raise ApiError(401, "a key is needed: Authorization: Bearer KEY", None, "invalid_api_key")

    async def body(self, request) -> dict:
        """The JSON object of a request. ApiError for one that is too large, too slow or none."""
        try:
            raw = await asyncio.wait_for(self.read(request), self.patience)
        except asyncio.TimeoutError:
            raise too_slow() from None
        body = protocol.parse_body(raw)
        request.state.slow = len(raw) > SMALL_BODY or not SLOW.isdisjoint(body)
        return body

    async def read(self, request) -> bytes:
        raw, most = bytearray(), self.max_body
        length = int(request.headers.get("content-length", 0))  # h11 has checked it
        if length <= most:
            async for part in request.stream():
                raw += part
                if len(raw) > most:
                    break
        if max(length, len(raw)) > most:  # the connection stays open: who still sends would not read the answer before
            raise ApiError(413, f"the body has more than {most} bytes")
        return bytes(raw)

    async def aside(self, request, function, *args):
        """function(*args), in a thread where the body is large, or has a template to render or a schema to compile."""
        return await asyncio.to_thread(function, *args) if request.state.slow else function(*args)

    # ---- OpenAI

    def served(self, body: dict) -> Served:
        """The model that a body asks for."""
        return self.models[protocol.model_of(body, [model.name for model in self.models])]

    async def chat_completions(self, request):
        body = await self.body(request)
        served = self.served(body)
        call = await self.aside(request, protocol.parse_chat, body, self.tokenizer, self.chat, served.limits)
        return await self.answer(request, served, call)

    async def responses(self, request):
        body = await self.body(request)
        served = self.served(body)
        call = await self.aside(request, parse_responses, body, self.tokenizer, self.chat, served.limits)
        return await self.answer(request, served, call, partial(ResponsesWriter, body=body))

    async def embeddings(self, request):
        body = await self.body(request)
        served = self.served(body)
        sizes = served.scorer.model.config.width, served.scorer.model.config.context
        texts, skip, encoded = await self.aside(request, protocol.parse_embeddings, body, self.tokenizer, *sizes)
        return await unless_gone(request, self.embedded(served, texts, skip, encoded))

    async def embedded(self, served: Served, texts: list[list[int]], skip: int, encoded: bool) -> dict:
        deadline, data = time.monotonic() + self.timeout, []
        for index, ids in enumerate(texts):  # one by one: others have steps between them
            if time.monotonic() > deadline:
                raise overloaded()
            numbers = await self.job(served, served.scorer.embed, ids, skip)
            packed = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode() if encoded else None
            data.append({"object": "embedding", "index": index, "embedding": packed or numbers})
        count = sum(len(ids) - skip for ids in texts)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": served.name, "usage": usage}

    async def completions(self, request):
        body = await self.body(request)
        served = self.served(body)
        call = await self.aside(request, protocol.parse_completion, body, self.tokenizer, served.limits)
        return await self.answer(request, served, call)

    def about(self, served: Served) -> dict:
        about = {"id": served.name, "object": "model", "created": self.created, "owned_by": "plain-rlhf"}
        return about | {"max_model_len": served.limits.width}

    async def list_models(self, request):
        return reply({"object": "list", "data": list(map(self.about, self.models))})

    async def model(self, request):
        return reply(self.about(self.served({"model": request.path_params["name"]})))

    async def answer(self, request, served: Served, call: Call, kind=Writer):
        """Submits the call's requests and gives their answer, whole or as a stream; a client that leaves frees the rows.

        kind: what makes the writer of the answer.
        """
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        deadline = time.monotonic() + self.timeout
        for index, one in enumerate(call.requests):
            one.inbox, one.deadline = (queue, index), deadline
        try:
            served.scheduler.submit(call.requests)
        except Full:
            raise overloaded() from None
        writer = kind(call, self.tokenizer, served.name, secrets.token_hex(12))
        if call.stream:
            return Stream(writer, len(call.requests), queue, lambda: leave(served, call))
        try:
            return await unless_gone(request, self.collect(call, writer, queue))
        finally:
            leave(served, call)

    @staticmethod
    async def collect(call: Call, writer, queue: asyncio.Queue) -> dict:
        texts, tokens, finishes = [[] for _ in call.requests], [[] for _ in call.requests], [None] * len(call.requests)
        while None in finishes:
            index, event = await queue.get()
            if event.error:
                raise failed(event)
            texts[index].append(event.text)
            tokens[index] += event.tokens
            finishes[index] = event.finish
        return writer.whole(["".join(pieces) for pieces in texts], tokens, finishes)

    # ---- ours

    async def job(self, served: Served, function, *args):
        try:
            future = served.scheduler.call(function, *args)
        except Full:
            raise overloaded() from None
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.timeout)
        except (asyncio.TimeoutError, asyncio.CancelledError):
            raise overloaded() from None
        except ValueError as error:  # a number that is none, a reward function that gives none
            LOG.error("%s", error)
            raise ApiError(500, str(error)) from None

    def parts(self, served: Served, body: dict) -> tuple[list[int], list[int], int]:
        """Ids of the prompt and the response of a body, and of what ends it. ApiError where they do not fit."""
        prompt = protocol.prompt_of(body, self.tokenizer, self.chat)
        response = protocol.continuation(body, self.tokenizer)
        longest = served.scorer.context
        if len(prompt) + len(response) > longest:
            message = f"{len(prompt)} tokens of prompt and {len(response)} of response exceed the context of {longest}"
            raise ApiError(400, message, "response", "context_length_exceeded")
        return prompt, response, self.chat.end if "messages" in body else self.tokenizer.eos

    async def score(self, request):
        body = await self.body(request)
        served = self.served(body)
        prompt, response, end = await self.aside(request, self.parts, served, body)
        if served.scorer.reward is None:
            raise ApiError(400, "the server has no reward model: start it with --reward", None, "no_reward")
        if not response:
            raise ApiError(400, "the response is empty", "response")
        return reply({"score": await self.job(served, served.scorer.score, prompt, response, end)})

    async def tokens(self, request):
        body = await self.body(request)
        served = self.served(body)
        prompt, response, end = await self.aside(request, self.parts, served, body)
        top = protocol.take(body, "top", int, 0, 0, protocol.MOST_ALTERNATIVES)
        records = await self.job(served, served.scorer.tokens, prompt, response, end, top) if response else []
        for record, text in zip(records, protocol.token_texts(self.tokenizer, response)):
            own = record.pop("id")
            record["text"] = text
            for other in record.get("top", ()):
                i = other.pop("id")
                text = self.tokenizer.token_bytes(i).decode("utf-8", "backslashreplace")  # a byte alone as \\xe2
                other |= {"text": text, "chosen": i == own}
        return reply({"tokens": records})

    # ---- the weights

    async def weights_now(self, request):
        self.check_exchange()
        limits, exact = self.models[0].limits, self.models[0].scheduler.exact
        about = self.weights.about() | {"max_length": limits.width, "max_tokens": limits.max_tokens}
        about |= {"workers": self.shared.workers, "exact": exact, "timeout": self.timeout}
        return reply(about | {"weights_dir": str(self.weights.directory.resolve())})

    async def new_weights(self, request):
        """Other weights for all workers; answered when all have them."""
        self.check_exchange()
        body = await self.body(request)
        path, sha256 = protocol.take(body, "path", str), protocol.take(body, "sha256", str)
        if not path:
            raise ApiError(400, "path must be that of a checkpoint directory", "path")
        try:
            digest = await asyncio.to_thread(lambda: self.weights.read(path, sha256)[1])
        except ValueError as error:
            raise ApiError(400, str(error), "path") from None
        try:
            await self.shared.exchange(path, digest)
        except Full:
            raise overloaded() from None
        except (RuntimeError, ValueError, OSError) as error:
            LOG.error("%s", error)
            raise ApiError(500, f"not all workers have the weights: {error}") from None
        return reply({"sha256": digest, "workers": self.shared.workers})

    def check_exchange(self) -> None:
        if self.key is None or self.weights is None:
            raise ApiError(403, "this server exchanges no weights: start it with --weights_dir=DIRECTORY and a key")

    async def health(self, request):
        if not self.models:
            return reply({"status": "ok", "model": self.run.name, "models": [], "has": ["run"]})
        first, every = self.models[0], [served.scheduler for served in self.models]
        s, scorer = first.scheduler, first.scorer
        features = {"reward": scorer.reward, "reference": scorer.reference, "value": scorer.values}
        features |= {"chat": self.chat, "feedback": self.feedback, "run": self.run}
        state = {
            "status": "stopping" if s.stopping else "ok",
            "model": first.name,
            "models": [served.name for served in self.models],
            "running": sum(len(x.active) for x in every),
            "waiting": sum(len(x.waiting) for x in every),
            "rows": s.rows,
            "max_length": first.limits.width,
            "max_tokens": first.limits.max_tokens,
            "exact": all(x.exact for x in every),
            "rounding": max(x.rounding for x in every),
        }
        return reply(state | {"has": [name for name, there in features.items() if there is not None]})

    async def tuned_for(self, request):
        return reply(self.origin)

    async def metrics(self, request):
        from starlette.responses import PlainTextResponse

        schedulers = [served.scheduler for served in self.models]
        return PlainTextResponse(prometheus(schedulers), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request):
        from starlette.responses import HTMLResponse, PlainTextResponse

        if self.page_text is None:
            return PlainTextResponse("no page here; the API is at /v1", status_code=404)
        headers = {"Content-Security-Policy": policy(self.page_text), "Cache-Control": "no-cache"}
        return HTMLResponse(self.page_text, headers=headers)

    # ---- feedback

    async def comparison(self, request):
        from starlette.responses import Response

        rater = self.rater(request.query_params.get("rater"))
        shown = await self.ask(self.feedback.next_comparison, rater)
        if shown is None:
            return Response(status_code=204)
        done, of = await self.ask(self.feedback.progress, rater)
        asked = {"prompt": shown.prompt, "messages": shown.asked if isinstance(shown.asked, list) else None}
        sides = {"left": {"text": shown.left}, "right": {"text": shown.right}}
        return reply({"id": str(shown.id)} | asked | sides | {"progress": {"done": done, "of": of}})

    async def new_comparison(self, request):
        """Of two answers that a rater has before them now, as the page shows them; then it is voted on as any other is."""
        body = await self.body(request)
        asked = protocol.messages_of(body) if "messages" in body else protocol.text(body.get("prompt"), "prompt")
        names, sides = [model.name for model in self.models], []
        for side in ("left", "right"):
            answer = protocol.take(body, side, dict, {})
            model = names[protocol.model_of(answer, names)]
            sides.append((model, protocol.text(answer.get("text"), side), protocol.take(answer, "sampling", dict, {})))
        return reply(
            {"id": str(await self.ask(self.feedback.lay_before, self.rater(body.get("rater")), asked, *sides))}
        )

    async def vote(self, request):
        body, comparison = await self.body(request), number(request.path_params["id"])
        args = (
            protocol.take(body, "choice", str, ""), protocol.take(body, "strength", int, None, 1, 3),
            protocol.take(body, "seconds", float, None, 0), protocol.take(body, "nonce", str, ""),
        )  # fmt: skip
        vote = await self.ask(self.feedback.vote, comparison, self.rater(body.get("rater")), *args)
        return reply({"vote": str(vote)})

    async def undo(self, request):
        body, vote = await self.body(request), number(request.path_params["vote"])
        await self.ask(self.feedback.undo, vote, self.rater(body.get("rater")))
        return reply({"undone": True})

    async def statistics(self, request):
        return reply(await self.ask(self.feedback.statistics))

    @staticmethod
    def rater(name) -> str:
        name = protocol.text(name, "rater").strip()
        if not 1 <= len(name) <= 100:
            raise ApiError(400, "rater must have between 1 and 100 characters", "rater")
        return name

    @staticmethod
    async def ask(method, *args):
        """A call of the feedback store, which waits for the disk, in a thread."""
        from rlhf.feedback.store import Unavailable, Unknown

        try:
            return await asyncio.to_thread(method, *args)
        except Unknown as error:
            raise ApiError(404, str(error)) from None
        except Unavailable as error:  # locked, or the disk is full; the path is for the log alone
            LOG.error("%s", error)
            raise ApiError(503, "the votes cannot be stored now; try again later", Retry_After="1") from None
        except ValueError as error:
            raise ApiError(400, str(error)) from None


def leave(served: Served, call: Call) -> None:
    for request in call.requests:
        served.scheduler.cancel(request)


def number(word: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", word):
        raise ApiError(404, "no such id")
    return int(word)


def whole_page(directory: Path = PAGE) -> str | None:
    """The page as one text: skeleton.html with every {{file}} of the directory in its place; None where there is no page."""
    if not directory.is_dir():
        return None
    skeleton = (directory / "skeleton.html").read_text(encoding="utf-8")
    return re.sub(
        r"\{\{([\w.]+)\}\}", lambda name: (directory / name[1]).read_text(encoding="utf-8").rstrip(), skeleton
    )


def policy(page: str) -> str:
    """Content-Security-Policy of the page: its own inline scripts, by their hashes, and nothing from elsewhere."""
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes or chr(39) + 'none' + chr(39)}; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


METRICS = {  # name -> help; counters that schedulers keep
    "requests": "texts asked for",
    "finished": "texts that came to their end",
    "cancelled": "texts whose client left",
    "rejected": "texts turned away because the queue was full",
    "prompt_tokens": "prompt tokens read",
    "tokens": "tokens sampled",
    "first_tokens": "texts that got their first token",
    "first_token_seconds": "seconds from arrival to first token, summed over those",
    "steps": "decoding steps",
    "step_rows": "rows of all decoding steps",
    "decode_seconds": "seconds spent decoding",
    "prefill_seconds": "seconds spent reading prompts",
}


def prometheus(schedulers: list[Scheduler]) -> str:
    """The numbers of all models together in Prometheus' text format."""
    lines, counts = [], sum((scheduler.counts for scheduler in schedulers), Counter())
    for name, meaning in METRICS.items():
        full = f"plain_rlhf_{name}_total"
        lines += [f"# HELP {full} {meaning}", f"# TYPE {full} counter", f"{full} {counts[name]}"]
    gauges = [(len(s.active), len(s.waiting), s.rows) for s in schedulers]
    for name, value in zip(("running", "waiting", "rows"), map(sum, zip(*gauges))):
        lines += [f"# TYPE plain_rlhf_{name} gauge", f"plain_rlhf_{name} {value}"]
    return "\n".join(lines) + "\n"


def application(service: Service):
    """The ASGI application."""
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response
    from starlette.routing import Route

    def route(path: str, endpoint, method: str = "GET", public: bool = False) -> Route:
        async def guarded(request):
            try:
                service.guard(request, public)
                return await endpoint(request)
            except ApiError as problem:
                return error_reply(problem)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception:  # a bug: its traceback is for the log, not for the client
                LOG.exception("%s failed", path)
                return error_reply(ApiError(500, "the server failed"))

        return Route(path, guarded, methods=[method])

    async def http_error(request, problem):
        return error_reply(ApiError(problem.status_code, problem.detail, **dict(problem.headers or {})))

    routes = [
        route("/", service.page, public=True),
        route("/health", service.health, public=True),
        route("/metrics", service.metrics),
        route("/v1/about", service.tuned_for),
        route("/v1/models", service.list_models),
        route("/v1/models/{name:path}", service.model),
        route("/v1/chat/completions", service.chat_completions, "POST"),
        route("/v1/completions", service.completions, "POST"),
        route("/v1/responses", service.responses, "POST"),
        route("/v1/embeddings", service.embeddings, "POST"),
        route("/v1/score", service.score, "POST"),
        route("/v1/tokens", service.tokens, "POST"),
        route("/v1/weights", service.weights_now),
        route("/v1/weights", service.new_weights, "POST"),
    ]
    if service.run is not None:
        if not service.models:
            del routes[2:]
        routes.append(route("/v1/run", live.endpoint(service.run)))
    if service.feedback is not None:
        routes += [
            route("/v1/comparison", service.comparison),
            route("/v1/comparison", service.new_comparison, "POST"),
            route("/v1/comparison/{id}/vote", service.vote, "POST"),
            route("/v1/votes/{vote}/undo", service.undo, "POST"),
            route("/v1/feedback/statistics", service.statistics),
        ]
    return Starlette(routes=routes, exception_handlers={404: http_error, 405: http_error})


def deliver_to(loop: asyncio.AbstractEventLoop):
    """A Scheduler's `deliver`: events go to the queue in each request's inbox, in the loop's thread."""

    def put(events: list[Event]) -> None:
        for event in events:
            queue, index = event.request.inbox
            queue.put_nowait((index, event))

    return lambda events: loop.call_soon_threadsafe(put, events)
