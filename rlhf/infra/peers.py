"""The other ranks of this run on this machine, and what has become of them: torch says only that a connection was closed."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

PIDS: dict[int, int] = {}  # rank -> process, of the others on this machine; distributed.setup knows them
POLL = 0.02  # seconds; torchrun looks every 0.1


def fates() -> dict[int, str]:
    """{rank: what has become of it} of those that have ended or were stopped; {} where the system does not tell."""
    found = {rank: fate(pid) for rank, pid in PIDS.items()}
    return {rank: word for rank, word in found.items() if word}


def fate(pid: int) -> str:
    """How this process has ended, or that it was stopped; "" while it runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "has ended" if Path("/proc/self/stat").exists() else ""
    if fields[0] in "tT":
        return "was stopped by a signal"
    if fields[0] not in "ZX":
        return ""
    status = int(fields[-1])  # as wait() gives it; a process of another user shows 0
    if not status & 127:
        return f"has ended with {status >> 8}"
    memory = " (by the kernel, perhaps, because memory ran out)" if status & 127 == signal.SIGKILL else ""
    return f"was killed by {signal_name(status & 127)}{memory}"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def watch(tell: Callable[[str], None]) -> None:
    """A thread that calls `tell` once, with the words, when another rank was killed by a signal.

    The main thread may compute for minutes before it meets the others; torchrun ends it before that, without a reason.
    """

    def look() -> None:
        while PIDS:
            for rank, word in fates().items():
                if word.startswith("was killed"):
                    return tell(f"rank {rank} {word}")
            time.sleep(POLL)

    if PIDS and os.path.exists("/proc/self/stat"):
        threading.Thread(target=look, daemon=True).start()
