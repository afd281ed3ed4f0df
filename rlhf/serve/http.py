"""HTTP beneath the endpoints: answers and streams of events, what is turned away before it is read, pages of other origins."""

import asyncio
import ipaddress
import json
import re
from collections.abc import Callable, Coroutine

from rlhf.serve.protocol import ApiError
from rlhf.serve.scheduler import Event

MOST_HEADERS = 100
ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


# ---- answers


def dumps(value) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def reply(value: dict, status: int = 200, headers: dict | None = None):
    from starlette.responses import Response

    return Response(dumps(value), status, headers, "application/json")


def error_reply(error: ApiError):
    return reply(error.body(), error.status, error.headers)


def overloaded() -> ApiError:
    return ApiError(503, "the server is busy; try again later", None, "overloaded", Retry_After="1")


def too_slow() -> ApiError:
    return ApiError(408, "the body did not arrive in time", None, None, Connection="close")


def failed(event: Event) -> ApiError:
    return ApiError(event.status, event.error, None, None, **({"Retry_After": "1"} if event.status == 503 else {}))


class Stream:
    """Server-sent events of a call, as an ASGI response.

    writer: a Writer of answers.py or responses.py; its events of so many texts come from the queue. leave: what to do at
    the end, and when the client has left.
    """

    def __init__(self, writer, texts: int, queue: asyncio.Queue, leave: Callable[[], object]):
        self.writer, self.texts, self.queue, self.leave = writer, texts, queue, leave

    async def __call__(self, scope, receive, send) -> None:
        task = asyncio.ensure_future(self.write(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            await ended(task, gone)
            self.leave()

    async def write(self, send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        writer, left, begun = self.writer, self.texts, set()
        chunks = writer.opening()
        while left:
            if chunks:
                await send({"type": "http.response.body", "body": events(chunks), "more_body": True})
            batch, chunks = [await self.queue.get()], []  # and whatever else is there: one write
            while not self.queue.empty():
                batch.append(self.queue.get_nowait())
            for index, event in batch:
                if event.error:
                    chunks.append(writer.failed(failed(event)))
                    left = 0
                    break
                if index not in begun:
                    begun.add(index)
                    chunks += writer.begin(index)
                if event.text or event.tokens:
                    chunks += writer.piece(index, event.text, event.tokens)
                if event.finish:
                    chunks += writer.end(index, event.finish)
                    left -= 1
        if not event.error:
            chunks += writer.closing()
        await send({"type": "http.response.body", "body": events(chunks) + writer.LAST, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def events(chunks: list[dict]) -> bytes:
    """Server-sent events; those that have a type are named after it too, as the openai client wants of /v1/responses."""
    named = ((f"event: {chunk['type']}\n" if "type" in chunk else "").encode() for chunk in chunks)
    return b"".join(name + b"data: " + dumps(chunk) + b"\n\n" for name, chunk in zip(named, chunks))


async def disconnected(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request, work: Coroutine):
    """The reply that `work` comes to; it ends when the client leaves first."""
    from starlette.responses import Response

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return reply(task.result()) if task.done() else Response(status_code=499)
    finally:
        await ended(task, gone)


async def ended(*tasks) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# ---- before the endpoints


class Bounded:
    """An ASGI application that works on at most `most` requests at a time and turns more away before it reads them.

    The scheduler's queue bounds texts; this bounds the bodies that are still coming in and the jobs beside them. Where all
    places are taken, the body that has been coming for the longest time is given up: half bodies keep nobody out. Whether the
    server is alive can always be asked.
    """

    def __init__(self, app, most: int):
        self.app, self.most, self.open = app, most, 0
        self.coming: dict[asyncio.Event, None] = {}  # bodies that still come in, oldest first: set one to give it up

    def stop(self) -> None:
        """Waits for no half body any more."""
        for body in self.coming:
            body.set()

    async def __call__(self, scope, receive, send) -> None:
        waits = any(name == b"expect" for name, _ in scope["headers"])  # to be asked for the body, with status 100
        given_up, asked, whole = asyncio.Event(), False, False

        async def answer(message):
            if waits and not asked and message["type"] == "http.response.start":  # is what comes next the body?
                message = message | {"headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        async def part():
            nonlocal asked, whole
            asked = True
            if whole:
                return await receive()
            self.coming.setdefault(given_up)
            arrived, ended_early = asyncio.ensure_future(receive()), asyncio.ensure_future(given_up.wait())
            try:
                await asyncio.wait((arrived, ended_early), return_when=asyncio.FIRST_COMPLETED)
                if given_up.is_set():
                    raise too_slow()
                whole = not arrived.result().get("more_body", False)
                return arrived.result()
            finally:
                await ended(arrived, ended_early)
                if whole:
                    self.coming.pop(given_up, None)

        if len(scope["headers"]) > MOST_HEADERS:
            return await error_reply(ApiError(431, f"more than {MOST_HEADERS} headers"))(scope, receive, answer)
        if scope["path"] == "/health":
            return await self.app(scope, receive, answer)
        if self.open >= self.most:
            if not self.coming:
                return await error_reply(overloaded())(scope, receive, answer)
            oldest = next(iter(self.coming))
            del self.coming[oldest]
            oldest.set()
        self.open += 1
        try:
            await self.app(scope, part, answer)
        finally:
            self.open -= 1
            self.coming.pop(given_up, None)


# ---- who asks


def name_of(host: str) -> str:
    """The name in a Host header, without the port; "" where it is malformed."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:/@]+))(?::[0-9]*)?", host)
    return (found[1] or found[2]).lower() if found else ""


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_origins(text: str | None, key: str | None) -> frozenset[str]:
    """The origins in "https://a.example,http://localhost:3000", or {"*"}. ValueError for what no browser sends as one."""
    origins = frozenset(one.strip().rstrip("/").lower() for one in (text or "").split(",") if one.strip())
    if "*" in origins and (key is None or len(origins) > 1):
        raise ValueError("--origins=* lets every page use the server: it stands alone, and needs a key")
    if wrong := sorted(one for one in origins - {"*"} if not ORIGIN.fullmatch(one)):
        raise ValueError(
            f"--origins: {wrong[0]!r:.100} is no origin, such as https://a.example or http://localhost:3000"
        )
    return origins


class Origins:
    """An ASGI application that tells browsers that pages of some other origins may use it (CORS, fetch.spec.whatwg.org).

    A page asks with OPTIONS before it sends what is more than a form could; whoever is not in `origins` gets no such answer,
    and its requests are refused by `Service.guard` besides.
    """

    def __init__(self, app, origins: frozenset[str]):
        self.app, self.origins = app, origins

    async def __call__(self, scope, receive, send) -> None:
        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not allowed(origin, self.origins):
            return await self.app(scope, receive, send)
        told = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            told += [(b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", b"600")]
            if wanted := headers.get(b"access-control-request-headers"):
                told.append((b"access-control-allow-headers", wanted))
            await send({"type": "http.response.start", "status": 204, "headers": told})
            return await send({"type": "http.response.body", "body": b""})

        async def answer(message) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], *told]}
            await send(message)

        await self.app(scope, receive, answer)


def allowed(origin: str, origins: frozenset[str]) -> bool:
    """Is this Origin header of one of them?"""
    return bool(origin) and ("*" in origins or origin.lower() in origins)
