"""JSON over HTTP with a server that may be slow, busy, gone, or hostile: every wait has an end, and so has every body."""

import http.client
import json
import socket
import threading
import time
import urllib.parse

LARGEST_ANSWER = 2**28  # bytes
CONNECT = 10.0  # seconds in which a machine that is there takes a connection


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
    """One URL. ValueError where it is none, or where a header cannot hold the key."""

    def __init__(self, url: str, key: str | None):
        try:
            parts = urllib.parse.urlsplit(url)
            self.port = parts.port
        except ValueError as error:
            raise ValueError(f"{url} is no URL: {error}") from None
        shown = parts.scheme in ("http", "https") and parts.hostname and url.isprintable() and " " not in url
        if not shown or "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(f"{url} is not of the form http://HOST:PORT")
        if key and not (key.isascii() and key.isprintable()):  # http.client would quote it
            raise ValueError(
                f"the key for {url} has a character that is not printable ASCII (the end of a line, a letter with an accent?)"
            )
        self.secure, self.host, self.key = parts.scheme == "https", parts.hostname, key
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        self.url, self.lock = url, threading.Lock()
        self.given = 0.0  # when it last got weights, time.monotonic()

    def ask(self, method: str, path: str, body: dict | None, end: float, lines: Lines) -> dict:
        """The JSON object of an answer with status 200. Refused for one of 4xx, Lost for what may be better next time."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=min(CONNECT, max(0.01, end - time.monotonic())))
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        lines.add(connection)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.connect()
            connection.sock.settimeout(max(0.01, end - time.monotonic()))
            connection.request(method, self.base + path, data, headers | {"Content-Type": "application/json"})
            lines.check()  # from here on `end` of the lines reaches it
            answer = connection.getresponse()
            told = parsed(read_before(connection, answer, end))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Lost(f"{self.url} does not answer ({type(error).__name__}: {error})") from None
        finally:
            lines.drop(connection)
        if answer.status == 200 and told is not None:
            return told
        text = f"{self.url}{path} answers {answer.status} {answer.reason}"
        if told is None:
            text += ", and no JSON object"
        elif isinstance(error := told.get("error"), dict):
            text += f": {str(error.get('message', '')):.300}"
        if answer.status not in (200, 408, 429) and answer.status < 500:
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


def parsed(content: bytes) -> dict | None:
    """The JSON object of a body, {} of an empty one; None where it is something else."""
    try:
        value = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
