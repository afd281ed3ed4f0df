"""A terminal of its own for a command: what a person sees and types, without waiting for anything but words."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

from tiny import ROOT

PATIENCE = 300  # seconds; a hang fails, a busy machine does not


def hear_ctrl_c() -> None:
    """In the child: the terminal is its own, and what a job in the background ignores, it does not."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """The screen and the keys of a running command."""

    def __init__(self, master: int, process: subprocess.Popen):
        self.master, self.process, self.seen = master, process, b""

    def until(self, text: str) -> str:
        """What has come since the last call, `text` included, with Unix's ends of lines."""
        wanted, end = text.encode(), time.monotonic() + PATIENCE
        while wanted not in (shown := self.seen.replace(b"\r\n", b"\n")):
            assert self.read(end - time.monotonic()), (text, shown)
        before, found, self.seen = shown.partition(wanted)
        return (before + found).decode(errors="replace")

    def read(self, patience: float = PATIENCE) -> bool:
        """More of the screen; False where the command has ended, or nothing comes."""
        if not select.select([self.master], [], [], max(0, patience))[0]:
            return False
        try:
            more = os.read(self.master, 1 << 16)
        except OSError:  # Linux's way to say that the other side is closed
            return False
        self.seen += more
        return bool(more)

    def type(self, keys: str | bytes) -> None:
        os.write(self.master, keys.encode() if isinstance(keys, str) else keys)

    def interrupt(self) -> None:
        """Ctrl-C at a prompt, again while nothing comes: between readline's prompt and its wait a signal rests until a key."""
        self.type("\x03")
        while self.process.poll() is None and not self.read(5):
            self.type("\x03")

    def end(self) -> tuple[int, str]:
        """The exit code, and what was shown at last."""
        while self.read():
            pass
        return self.process.wait(PATIENCE), self.seen.replace(b"\r\n", b"\n").decode(errors="replace")


@contextlib.contextmanager
def terminal(
    command: list[str],
    place: str | Path = ROOT,
    env: dict[str, str] | None = None,
    size: tuple[int, int] = (24, 80),
    term: str = "dumb",
) -> Iterator[Terminal]:
    """`python script ...` or `python -m module ...` in a terminal of size (rows, columns)."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    script = command if command[0] == "-m" else [str(ROOT / command[0]), *command[1:]]
    known = {name: value for name, value in (env or os.environ).items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, *script], cwd=place, env=known | {"TERM": term, "PYTHONUTF8": "1"},
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)
