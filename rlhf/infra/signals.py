"""The end of a command that somebody asks for: Ctrl-C, a scheduler's SIGTERM, a terminal that closes. Exit code 128 + n."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Self

SIGINT = signal.SIGINT
NUMBERS = (SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME = 0.3  # seconds; torchrun passes on what the terminal has sent to the whole group already: that is one request


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command where it stands."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def name_of(number: int) -> str:
    return signal.Signals(number).name


def raise_interrupted(number: int, frame) -> None:
    raise Interrupted(number)


@contextlib.contextmanager
def handled(handler) -> Iterator[None]:
    """All of NUMBERS go to `handler`, but for those that are ignored (nohup), until the end of the block."""
    may = threading.current_thread() is threading.main_thread()  # Python lets no other set a handler
    before = {number: signal.getsignal(number) for number in NUMBERS if may}
    ours = [number for number in before if before[number] != signal.SIG_IGN]
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number] or signal.SIG_DFL)  # None: set by another language


class Stop:
    """`with Stop() as stop:` the first signal sets stop.number, for a loop that then ends after its step; a second one, or
    none of the loop's doing, ends the process at once.

    A thread reads them: the main thread may wait within a collective of torch, where Python's handlers do not run.
    """

    def __init__(self):
        self.number = 0  # of the signal; 0 = none yet
        self.first = 0.0

    def __enter__(self) -> Self:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.handlers = handled(lambda number, frame: None)  # a handler in Python: without one, no byte is written
        self.handlers.__enter__()
        self.before = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        threading.Thread(target=self.read, args=(self.reader,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        signal.set_wakeup_fd(self.before)
        self.handlers.__exit__(None, None, None)
        os.close(self.writer)  # ends the thread

    def read(self, reader: int) -> None:
        while byte := os.read(reader, 1):
            if byte[0] in NUMBERS:
                self.receive(byte[0])
        os.close(reader)

    def receive(self, number: int) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self.first = number, now
            self.say(f"{name_of(number)}: this step is finished and saved first; once more ends at once")
        elif now - self.first > SAME:
            self.say(f"{name_of(number)} again: ended at once; the same command goes on from the last checkpoint")
            os._exit(128 + number)

    def say(self, line: str) -> None:
        if "RANK" not in os.environ:  # torchrun also sends it to those that are left when a rank has died
            print(line, file=sys.stderr, flush=True)
