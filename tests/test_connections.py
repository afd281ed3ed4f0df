"""Clients that send nothing, half of something, too much or too many: the server answers the others, and says little."""

import contextlib
import http.client
import json
import logging
import resource
import socket
import sys
import time
import urllib.parse

import pytest
import tiny_server
from tiny_server import serving

CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
GREETING = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny_server.build(tmp_path_factory.mktemp("connected"))


@pytest.fixture(scope="module")
def server(home):
    options = "--patience=1 --max_body=20000 --max_batch=4 --cache_tokens=512 --queue=4 --key=secret"
    with serving(home, *options.split(), says="WARNING: Invalid HTTP request received.\n") as server:
        yield server


def connect(server) -> socket.socket:
    url = urllib.parse.urlparse(server.url)
    connection = socket.create_connection((url.hostname, url.port), timeout=300)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def everything(connection) -> bytes:
    """All that comes until the server closes; a reset is a close."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


def answers(server) -> bool:
    return server.request("/health")[0] == 200


AUTHORIZED = CHAT + b"Authorization: Bearer secret\r\n"


@pytest.mark.parametrize(
    "sent, status",
    [
        (b"", b""),  # idle from the start
        (b"GE", b""),
        (GREETING[:-2], b""),  # headers without their end
        (GREETING, b"200"),  # idle after an answer
        (GREETING + b"GET /heal", b"200"),
        (AUTHORIZED + b"Content-Length: 100\r\n\r\n{", b"408"),  # half a body
        (AUTHORIZED + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{    \r\n", b"408"),
        (CHAT + b"Content-Length: 100\r\n\r\n{", b"401"),  # without a key: refused before its body
        (AUTHORIZED + b"Content-Length: 100000\r\n\r\n{", b"413"),
    ],
)
def test_no_wait_is_for_ever(server, sent, status):
    with connect(server) as connection:
        connection.sendall(sent)
        found = everything(connection)
    assert found.startswith(b"HTTP/1.1 " + status if status else b"") and bool(found) == bool(status)
    assert answers(server)


@pytest.mark.parametrize("start", [b"GET /health HTTP/1.1\r\nA: ", AUTHORIZED + b"Content-Length: 20000\r\n\r\n"])
def test_one_byte_more_now_and_then_changes_nothing(server, start):
    """A client that dribbles is cut off as one that is silent: the clock runs for all of the headers, all of the body."""
    with connect(server) as connection:
        connection.sendall(start)
        connection.settimeout(0.05)
        for _ in range(1200):  # a minute
            try:
                connection.send(b"x")
                if not connection.recv(65536):
                    break
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                break
        else:
            raise AssertionError("still open")
    assert answers(server)


def test_who_reads_nothing_is_dropped(server):
    """Answers that nobody reads fill what the kernel holds; then the server waits for the client, but not for ever."""
    with connect(server) as connection:
        connection.settimeout(1)
        ask = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer secret\r\n\r\n"
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(100_000):
                with contextlib.suppress(TimeoutError):
                    connection.send(ask * 100)
    assert answers(server)


def test_too_many_headers(server):
    for count, status in ((90, 200), (101, 431), (20_000, 400)):
        with connect(server) as connection:
            lines = b"".join(b"A%d: b\r\n" % i for i in range(count))
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(GREETING[:-2] + lines + b"\r\n")
            assert everything(connection).startswith(b"HTTP/1.1 %d" % status)


@pytest.mark.parametrize("size", [20_001, 300_000, 8_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_413_arrives_at_a_client_that_sends_first_and_reads_then(server, size, chunked):
    url = urllib.parse.urlparse(server.url)
    for _ in range(3):
        with contextlib.closing(http.client.HTTPConnection(url.hostname, url.port, timeout=300)) as connection:
            parts = [b"x" * min(65536, size - at) for at in range(0, size, 65536)]
            headers = {"Authorization": "Bearer secret"} | ({} if chunked else {"Content-Length": str(size)})
            connection.request("POST", "/v1/completions", iter(parts), headers, encode_chunked=chunked)
            answer = connection.getresponse()
            assert answer.status == 413 and "20000 bytes" in json.loads(answer.read())["error"]["message"]
            connection.request("GET", "/health")  # on the same connection
            assert connection.getresponse().status == 200


def test_a_body_that_waits_to_be_asked_for_is_not_asked_for_in_vain(server):
    """Expect: 100-continue. After a refusal, what comes next on the connection might be the body or not: it is closed."""
    for headers, status in (
        (AUTHORIZED + b"Content-Length: 100000\r\n", b"413"),
        (CHAT + b"Content-Length: 9\r\n", b"401"),
    ):
        with connect(server) as connection:
            connection.sendall(headers + b"Expect: 100-continue\r\n\r\n")
            found = everything(connection)
        assert found.startswith(b"HTTP/1.1 " + status) and b"connection: close" in found
    with connect(server) as connection:
        connection.sendall(AUTHORIZED + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(b"{}")
        assert everything(connection).startswith(b"HTTP/1.1 400")


def test_one_line_a_second():
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")
    from rlhf.serve.connections import OncePerSecond

    rule, kept = OncePerSecond(), []
    for at, message in [(0.0, "a"), (0.2, "a"), (0.4, "b"), (0.9, "a"), (1.1, "a"), (1.2, "b"), (1.5, "b"), (9.0, "a")]:
        record = logging.makeLogRecord({"name": "x", "msg": message, "created": at})
        if rule.filter(record):
            kept.append((at, record.getMessage()))
    assert kept == [(0.0, "a"), (0.4, "b"), (1.1, "a (2 more of these)"), (1.5, "b (1 more of these)"), (9.0, "a")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["idle", "half"])
def test_more_clients_than_descriptors(home, kind):
    """400 sockets under `ulimit -n 300`, idle or with half a body: /health and a request are answered all the while."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1024:
        pytest.skip(f"a process may open only {hard} files here; this test opens 400 sockets")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    process = tiny_server.start(
        "--init=lm", "--port=0", "--max_batch=4", "--cache_tokens=512", cwd=home,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300)),
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        server = tiny_server.Server(process, "http://127.0.0.1:" + line.partition("127.0.0.1:")[2].split()[0], line)
        held, worst = [], 0.0
        for number in range(400):
            held.append(connect(server))
            if kind == "half":
                held[-1].sendall(CHAT + b"Content-Length: 100\r\n\r\n{")
            if number % 8 == 7:
                started = time.monotonic()
                assert server.request("/health")[0] == 200
                worst = max(worst, time.monotonic() - started)
        print(f"{kind}: /health in at most {worst:.3f} s", file=sys.stderr)
        body = {"prompt": "a", "max_tokens": 5}
        assert server.request("/v1/completions", body)[0] == 200
        process.terminate()
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and len(err.splitlines()) < 100, err[-2000:]
    finally:
        for connection in held:
            connection.close()
        process.kill()
        process.wait()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
