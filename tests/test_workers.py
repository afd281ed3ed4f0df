"""The process above a server's workers: who is started again, and who has the weights when it says so."""

import asyncio
import multiprocessing
import os
import signal
from types import SimpleNamespace

from tiny import TIMEOUT

from rlhf.serve.weights import Weights
from rlhf.serve.workers import Crew, Member, Seat
from serve import pushed_or_own

FORK = multiprocessing.get_context("fork")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crew_of(work, *args) -> multiprocessing.Process:
    """A crew of two in a process of its own, as serve.py has it."""

    def above() -> None:
        Crew(2, lambda seat: FORK.Process(target=work, args=(seat, *args)), FORK.Barrier(2)).run()

    process = FORK.Process(target=above)
    process.start()
    return process


def dies_while_it_starts(seat) -> None:
    async def begin() -> None:
        member = Member(None, seat.line, 2)
        if seat.rank == 1:
            killed()
        seat.ready.wait()
        member.ready()

    try:
        asyncio.run(begin())
    except Exception:  # the barrier is broken
        pass


def test_a_worker_that_is_killed_while_it_starts_ends_the_server():
    """Started again, it would not come to the barrier at which the others wait."""
    process = crew_of(dies_while_it_starts)
    process.join(TIMEOUT)
    assert process.exitcode == 1


def exchanges(seat, heard, go) -> None:
    """Worker 0 asks for weights, loads them and dies; the other loads when it may."""
    seat.line.send(("ready",))
    if seat.rank == 0 and not seat.again:
        seat.line.send(("exchange", "path", "sha256"))
    while True:
        what = seat.line.recv()
        if seat.rank == 1:
            go.wait()
        heard.put((seat.rank, seat.again, seat.pushed, what))
        seat.line.send(("loaded", None))
        if seat.rank == 0 and not seat.again:
            heard.close()
            heard.join_thread()
            killed()


def test_a_worker_that_is_killed_after_it_loaded_loads_again():
    """It begins with the weights of before; without the second order all would be said to have the new ones."""
    heard, go = FORK.Queue(), FORK.Event()
    process = crew_of(exchanges, heard, go)
    order = ("load", "path", "sha256")
    try:
        assert heard.get(timeout=TIMEOUT) == (0, False, None, order)
        assert heard.get(timeout=TIMEOUT) == (0, True, None, order)
        go.set()
        assert heard.get(timeout=TIMEOUT) == (1, False, None, order)
    finally:
        process.terminate()
        process.join(TIMEOUT)


def test_weights_that_are_gone_do_not_end_a_worker(tmp_path, capsys):
    seat, weights = Seat(1, pushed=("weights_000001", "0" * 64)), Weights(None, "", "fp32", tmp_path)
    assert pushed_or_own(weights, seat, SimpleNamespace(digest="1" * 64)) == "1" * 64
    assert capsys.readouterr().err == "worker 1 begins with the weights of --init: no checkpoint at weights_000001\n"
