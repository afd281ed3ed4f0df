"""Many streaming clients against one, on the same server: throughput, waiting times, memory, and nothing mixed up.

    python bench/serve.py --init=out/scratch/lm                      # needs the extra "serve"
    python bench/serve.py --init=out/scratch/lm --requests=10000     # and the server's memory over that many requests

One client first sends `each` requests one after the other; then `clients` do so at the same time, with the same seeds. Every
streamed answer must be the one that the request gets alone. Then more come at once than the server's rows and queue hold:
some are turned away with status 503, the others get their own answers, and afterwards everybody is served again. With
--requests as many short ones follow, from all clients, and the server's resident memory is read ten times on the way. Wall
seconds of client and server on one machine.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rlhf.infra import config  # noqa: E402

PROMPTS = [
    "The film is",
    "I have never seen",
    "A story about",
    "The actors",
    "Nobody would",
    "It was a",
    "When the",
    "This",
]


@dataclass(frozen=True)
class Config:
    init: str  # what is served
    clients: int = 64  # at the same time
    each: int = 4  # requests of each client
    tokens: int = 48  # of each answer; there is no eos before them only where the model does not sample it
    seeded: bool = True  # requests have seeds, as they need to be compared; false: what a chat without seeds costs
    requests: int = 0  # more of them at the end, eight tokens each, to watch the memory
    max_batch: int = 64  # rows of the server


class Busy(Exception):
    """The server says 503, with Retry-After."""


async def ask(port: int, body: dict) -> tuple[str, list[float], float]:
    """The streamed text, the moment of every piece of it, and that of the question, by perf_counter."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    start = time.perf_counter()
    writer.write(head.encode() + data)
    text, moments = "", []
    try:
        status = await reader.readline()
        if b" 503 " in status and b"retry-after" in (await reader.readuntil(b"\r\n\r\n")).lower():
            raise Busy
        if b" 200 " not in status:
            raise ValueError(f"the server answers {status.decode().strip()}")
        async for line in reader:
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                if choice["text"]:
                    moments.append(time.perf_counter())
                    text += choice["text"]
                if choice["finish_reason"]:
                    return text, moments, start
    finally:
        writer.close()
    raise ValueError("a stream ended before its answer did")


def body(cfg: Config, k: int, tokens: int | None = None) -> dict:
    seed = {"seed": k} if cfg.seeded else {}
    return {"prompt": PROMPTS[k % len(PROMPTS)], "max_tokens": tokens or cfg.tokens, "stream": True} | seed


async def crowd(port: int, bodies: list[dict], clients: int) -> tuple[list, float]:
    """All answers, asked by so many clients, and the seconds that took."""
    answers, waiting = [None] * len(bodies), list(range(len(bodies)))[::-1]

    async def client() -> None:
        while waiting:
            k = waiting.pop()
            answers[k] = await ask(port, bodies[k])

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return answers, time.perf_counter() - start


def describe(name: str, answers: list, seconds: float) -> float:
    """Prints a line and returns pieces per second."""
    first = [1000 * (moments[0] - start) for _, moments, start in answers if moments]
    gaps = [1000 * (b - a) for _, moments, _ in answers for a, b in zip(moments, moments[1:])]
    pieces = sum(len(moments) for _, moments, _ in answers)
    print(
        f"{name:<12}{pieces / seconds:8.0f} tokens/s   first token {percentile(first, 50):.0f} / {percentile(first, 99):.0f} ms"
        f"   between tokens {percentile(gaps, 50):.1f} / {percentile(gaps, 99):.1f} ms (p50 / p99)",
        flush=True,
    )
    return pieces / seconds


def percentile(values: list[float], share: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * share / 100))] if values else float("nan")


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def measure(cfg: Config, port: int, pid: int) -> None:
    bodies = [body(cfg, k) for k in range(cfg.clients * cfg.each)]
    some = bodies[: max(8, 2 * cfg.each)]
    await crowd(port, some, 4)  # warm
    alone, seconds = await crowd(port, some, 1)
    one = describe("1 client", alone, seconds)
    together, seconds = await crowd(port, bodies, cfg.clients)
    many = describe(f"{cfg.clients} clients", together, seconds)
    print(f"ratio {many / one:.2f}, {cfg}")
    if cfg.seeded:
        alone, _ = await crowd(port, bodies, 1)
        wrong = sum(a[0] != b[0] for a, b in zip(alone, together))
        print(f"{len(together)} answers, {wrong} other than alone")  # a lost one ends the bench with its error
    await overload(cfg, port, [answer[0] for answer in alone] if cfg.seeded else None)
    if cfg.requests:
        part = -(-cfg.requests // 10)
        print(f"memory: {resident_mb(pid):.1f} MB", end="", flush=True)
        for k in range(10):
            await crowd(port, [body(cfg, k * part + i, 8) for i in range(part)], cfg.clients)
            print(f" {resident_mb(pid):.1f}", end="", flush=True)
        print(f" after every {part} of {10 * part} requests")


async def overload(cfg: Config, port: int, texts: list[str] | None) -> None:
    """Twice as many requests at once as the server holds, and once more the usual crowd. texts: of the seeds alone."""
    many = 2 * (cfg.max_batch + cfg.clients)
    bodies = [body(cfg, k % (cfg.clients * cfg.each)) for k in range(many)]
    answers = await asyncio.gather(*(ask(port, one) for one in bodies), return_exceptions=True)
    busy = sum(isinstance(answer, Busy) for answer in answers)
    served = {k: answer for k, answer in enumerate(answers) if not isinstance(answer, Busy)}
    if lost := [answer for answer in served.values() if isinstance(answer, BaseException)]:
        raise lost[0]
    again, _ = await crowd(port, bodies[: cfg.clients], cfg.clients)  # a 503 would end the bench
    line = f"{many} at once: {busy} times 503, {len(served)} served; then {len(again)} of {cfg.clients} served"
    if texts:
        wrong = sum(
            answer[0] != texts[k % len(texts)]
            for answers in (served, dict(enumerate(again)))
            for k, answer in answers.items()
        )
        line += f", {wrong} other than alone"
    print(line, flush=True)


def main() -> None:
    cfg = config.parse(Config)
    config.at_least(cfg, clients=1, each=1, tokens=1, requests=0, max_batch=1)
    room = 256
    options = [
        f"--init={cfg.init}",
        "--port=0",
        f"--max_batch={cfg.max_batch}",
        f"--cache_tokens={room * cfg.max_batch}",
    ]
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "serve.py"), *options, f"--queue={cfg.clients}"], stdout=subprocess.PIPE, text=True
    )
    try:
        line = server.stdout.readline()
        if "http://" not in line:
            raise ValueError("the server does not start")
        print(line.strip())
        asyncio.run(measure(cfg, int(line.split("http://")[1].split()[0].rpartition(":")[2]), server.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.send_signal(signal.SIGTERM)
        server.wait()


if __name__ == "__main__":
    config.run(main, stopped="stopped")
