"""The processes of a server: a worker that is killed is started again, and new weights reach all before anybody is told so.

With one worker there is no process above it, and nobody to start it again. Of several, the one that is asked to exchange
weights tells the process above, which tells all workers and waits for each; one that is started later begins with them.
"""

import asyncio
import contextlib
import multiprocessing.connection
import signal
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from rlhf.infra.metrics import say
from rlhf.infra.peers import signal_name
from rlhf.serve.weights import Weights

Pushed = tuple[str, str]  # path and sha256 of weights


@dataclass(frozen=True)
class Seat:
    """Which worker a process is."""

    rank: int = 0
    line: Connection | None = None  # to the process above; None: there is none
    ready: object = None  # the barrier at which the first ones wait for each other
    pushed: Pushed | None = None  # the weights to begin with, where they are not those of the command line

    @property
    def again(self) -> bool:
        """Does it take the place of one that was killed?"""
        return self.line is not None and self.ready is None


class Alone:
    """The one worker of a server."""

    workers = 1

    def __init__(self, weights: Weights):
        self.weights = weights

    async def exchange(self, path: str, sha256: str) -> None:
        await asyncio.wrap_future(self.weights.exchange(path, sha256))


class Member:
    """One of several workers, in its own process.

    Messages up: ("ready",), ("exchange", path, sha256), ("loaded", error or None); down: ("load", path, sha256), and
    ("done", error or None) for the oldest exchange that it asked for.
    """

    def __init__(self, weights: Weights | None, line: Connection, workers: int):
        self.weights, self.line, self.workers = weights, line, workers
        self.loop, self.asked = asyncio.get_running_loop(), deque()
        self.loop.add_reader(line.fileno(), self.hear)

    def ready(self) -> None:
        """It serves: from here on it is started again when it is killed."""
        self.line.send(("ready",))

    async def exchange(self, path: str, sha256: str) -> None:
        """Returns when all workers have the weights; RuntimeError where one has not."""
        done = self.loop.create_future()
        self.asked.append(done)
        self.line.send(("exchange", path, sha256))
        if error := await done:
            raise RuntimeError(error)

    def hear(self) -> None:
        try:
            what, *about = self.line.recv()
        except (EOFError, OSError):  # the process above has ended
            self.loop.remove_reader(self.line.fileno())
            return
        if what == "load":
            try:
                self.weights.exchange(*about).add_done_callback(
                    lambda done: self.loop.call_soon_threadsafe(self.tell, done)
                )
            except Exception as error:  # Full: it stops
                self.line.send(("loaded", f"a worker takes no weights: {error!r}"))
        elif not (waiting := self.asked.popleft()).done():  # its client may have left
            waiting.set_result(*about)

    def tell(self, done: Future) -> None:
        error = "it stops" if done.cancelled() else done.exception()
        self.line.send(("loaded", error and f"a worker could not load the weights: {error}"))


class Crew:
    """The workers, as the process above them sees it. process(seat) makes one that does not run yet."""

    def __init__(self, count: int, process: Callable[[Seat], BaseProcess], ready):
        self.process, self.ready, self.stopping = process, ready, False
        self.processes: list[BaseProcess] = [None] * count
        self.lines: list[Connection] = [None] * count
        self.serving: set[int] = set()  # those that have been ready
        self.pushed: Pushed | None = None
        self.asked: deque[tuple[int, BaseProcess, Pushed]] = deque()  # who wants which weights; the first is under way
        self.left: set[int] = set()  # who has still to load those
        self.error: str | None = None
        for k in range(count):
            self.begin(k, ready)

    def begin(self, k: int, ready=None) -> None:
        self.lines[k], line = multiprocessing.connection.Pipe()
        self.processes[k] = self.process(Seat(k, line, ready, self.pushed))
        self.serving.discard(k)
        self.processes[k].start()
        line.close()

    def stop(self, *_) -> None:
        if not self.stopping:  # once, before any is ended: one that ends on its way there keeps the lock for ever
            self.stopping = True
            self.ready.abort()  # who waits there for one that has failed would never end
        for process in self.processes:
            if process is not None and process.is_alive():
                process.terminate()

    def run(self) -> None:
        """Until all have ended; SystemExit with the code of one that failed."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        while not self.stopping:
            # ends first: what one said before its end is then found with it
            found = multiprocessing.connection.wait([*(process.sentinel for process in self.processes), *self.lines])
            for k, line in enumerate(self.lines):
                if line in found:
                    self.hear(k, line)
            for k, process in enumerate(self.processes):
                if process.sentinel in found and process.exitcode is not None and not self.stopping:
                    self.lost(k, process)
            self.exchange()
        self.stop()  # one that was begun while the signal came
        for process in self.processes:
            process.join()
        if failed := [process.exitcode for process in self.processes if process.exitcode]:
            raise SystemExit(2 if 2 in failed else 1)

    def hear(self, k: int, line: Connection) -> None:
        try:
            what, *about = line.recv()
        except (EOFError, OSError):  # it has ended: `lost` sees to it
            return
        if what == "ready":
            self.serving.add(k)
        elif what == "exchange":
            self.asked.append((k, self.processes[k], tuple(about)))
        elif k in self.left:
            self.left.discard(k)
            self.error = self.error or about[0]
            if not self.left:
                self.finish()

    def lost(self, k: int, process: BaseProcess) -> None:
        """One that was killed while it served is started again; one that ended by itself, or before that, ends the others."""
        if process.exitcode >= 0 or k not in self.serving:
            self.stop()
            return
        say(f"worker {k} was killed by {signal_name(-process.exitcode)}: it is started again")
        self.begin(k)
        if self.left:  # an exchange is under way, which it may have been through: it begins with the weights of before
            self.left.add(k)
            self.send(k, "load", *self.asked[0][2])

    def exchange(self) -> None:
        """Begins the next exchange where none is under way."""
        if self.asked and not self.left:
            self.left, self.error = set(range(len(self.processes))), None
            for k in self.left:
                self.send(k, "load", *self.asked[0][2])

    def finish(self) -> None:
        k, process, pushed = self.asked.popleft()
        self.pushed = self.pushed if self.error else pushed
        if self.processes[k] is process:
            self.send(k, "done", self.error)

    def send(self, k: int, *message) -> None:
        with contextlib.suppress(OSError):  # it has ended: `lost` sees to it
            self.lines[k].send(message)
