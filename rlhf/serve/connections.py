"""Connections that cannot hold the server up: every wait for a client has an end, and so has their number.

uvicorn speaks HTTP. It bounds the bytes of headers and ends connections that are idle between two requests; here is what it
leaves open: clients that never finish their headers, that read nothing, or that are more than there are descriptors for.
"""

import asyncio
import contextlib
import logging
import os
import resource

SPARE = 96  # descriptors for files, and for connections that are accepted but not begun
BURST = 16  # connections accepted at once
IDLE = 1024  # connections beside those whose requests are worked on
SLICE = 16_384  # bytes of a connection that are looked at together: h11 bounds headers that are not yet complete


def room(wanted: int) -> tuple[int, int]:
    """How many connections may be open, and how many of them with a request that is worked on, `wanted` at most.

    ValueError where the process may open too few files for any.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    free = limit - len(os.listdir("/dev/fd")) - SPARE
    if free < 32:
        raise ValueError(
            f"a process may open {limit} files here, which leaves {free} connections; raise it: ulimit -n 1024"
        )
    connections = min(free, wanted + IDLE)
    return connections, min(wanted, connections - 16)  # who asks for /health always finds a place


class Waiting(dict):
    """The connections whose client has to act next, oldest first; at most `most` connections in all.

    patience: seconds that a client may take for a request's headers, or to read something of what there is for it.
    """

    def __init__(self, most: int, patience: float):
        super().__init__()
        self.most, self.patience = most, patience


class Patient:
    """Before uvicorn's H11Protocol: closed when its client does nothing, and first of all when there are too many."""

    waiting: Waiting

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.timer, self.unread = None, 0

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.settle()
        if len(self.connections) > self.waiting.most:
            next(iter(self.waiting), self).give_up()

    def connection_lost(self, error) -> None:
        self.stop()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), SLICE):
            if not self.transport.is_closing():
                super().data_received(data[start : start + SLICE])
        self.settle()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.settle()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.settle()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.settle()

    def settle(self) -> None:
        """Starts the clock where the client has to act; one byte more of the same headers does not start it anew."""
        asks = self.cycle is not None and not self.cycle.response_complete  # a request that we have to answer
        if self.transport.is_closing() or asks and not self.flow.write_paused:
            self.stop()
        elif self.timer is None:
            self.waiting[self] = None
            self.unread = self.transport.get_write_buffer_size()
            self.timer = self.loop.call_later(self.waiting.patience, self.late)

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
            self.waiting.pop(self, None)

    def late(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left < self.unread:  # it reads, slowly
            self.unread = left
            self.timer = self.loop.call_later(self.waiting.patience, self.late)
        else:
            self.give_up()

    def give_up(self) -> None:
        self.stop()
        self.transport.abort()


def server(app, waiting: Waiting, grace: float):
    """uvicorn's server with such connections. It accepts few at once: those too many close before descriptors run out."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Server(uvicorn.Server):
        capture_signals = contextlib.nullcontext  # ours do the same, and the exit code stays 0

        async def startup(self, sockets) -> None:
            await super().startup(sockets=sockets)  # which listens for BURST
            for listener in sockets:
                listener.listen(2048)  # but so many may wait

    config = uvicorn.Config(
        app, http=type("Connection", (Patient, H11Protocol), {"waiting": waiting}), ws="none", lifespan="off", backlog=BURST,
        log_config=None, log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=max(1, round(grace)),
    )  # fmt: skip
    return Server(config)


class OncePerSecond(logging.Filter):
    """One line a second of each kind; the next one says how many were left out."""

    def __init__(self):
        super().__init__()
        self.said: dict[tuple, tuple[float, int]] = {}  # when, and how many since

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[0] is asyncio.CancelledError:
            record.exc_info = None  # the server stops: where it was then says nothing
        kind = (record.name, record.msg, record.exc_info and record.exc_info[0])
        last, more = self.said.get(kind, (-1.0, 0))
        if record.created < last + 1:
            self.said[kind] = (last, more + 1)
            return False
        if len(self.said) > 1000:
            self.said.clear()
        self.said[kind] = (record.created, 0)
        if more:
            record.msg = f"{record.msg} ({more} more of these)"
        return True
