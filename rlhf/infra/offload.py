"""What a phase does not need leaves the device's memory: a GPU's for the host's, a CPU's for a file in the run's directory.

    moments = Sleeper(lambda: state_of(optimizer), elsewhere(device, out))
    moments.sleep()               # their numbers lie elsewhere, and the device's memory is free
    with moments.awake(): ...     # back, bit for bit, for the phase that computes with them

A tensor that sleeps stays the tensor that it was, in every module that has it, and can be read. On a GPU nothing computes with
it by accident, since it lies in another memory.
"""

import contextlib
import ctypes
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from rlhf.infra import checkpoint
from rlhf.infra.adamw import AdamW

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
FAILED = ctypes.c_void_p(-1).value


class Rest(NamedTuple):
    """Where the numbers of a tensor lie while it sleeps."""

    numbers: Tensor
    let_go: Callable[[], None]  # of what reading or writing them brought into memory


Place = Callable[[Tensor], Rest]  # puts a tensor's numbers there for the first time


def host(x: Tensor) -> Rest:
    """Memory of the host that stays where it is (pinned): a GPU copies to and from it at the full speed of its bus."""
    return Rest(torch.empty_like(x, device="cpu", pin_memory=True).copy_(x), lambda: None)


class File:
    """A file without a name in this directory, which is gone when the process ends, however it ends.

    OSError where there is no space for it.
    """

    def __init__(self, directory: str | Path):
        self.directory, self.file, self.end = str(directory), None, 0

    def __call__(self, x: Tensor) -> Rest:
        self.file: IO[bytes] = self.file or tempfile.TemporaryFile(dir=self.directory)
        begin = -(-self.end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        numbers = x.detach().contiguous().flatten().view(torch.uint8).numpy()
        try:
            self.file.seek(begin)
            self.file.write(numbers)
            self.file.flush()
        except OSError as error:  # it does not say where
            raise OSError(error.errno, error.strerror, self.directory) from None
        self.end = begin + numbers.size
        there, let_go = mapped(self.file.fileno(), begin, numbers.size, self.directory)
        return Rest(torch.frombuffer(there, dtype=x.dtype).view(x.shape), let_go)


def mapped(descriptor: int, begin: int, size: int, where: str) -> tuple[ctypes.Array, Callable[[], None]]:
    """Bytes of an open file, written to it where they change; and what lets go of the memory that they fill.

    Python's own mmap keeps a file descriptor for each, and a model has more tensors than a process may open files.
    """
    place = LIBC.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, begin)
    if place == FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), where)
    pages = (ctypes.c_char * size).from_address(place)
    weakref.finalize(pages, LIBC.munmap, place, size).atexit = False  # others may still read it then
    return pages, lambda: LIBC.madvise(place, size, mmap.MADV_DONTNEED)


def elsewhere(device: torch.device, directory: str | Path) -> Place:
    """The memory below this device's: the host's of a GPU, and of a CPU the disk. Apple's GPU shares the host's."""
    return {"cuda": host, "mps": nowhere}.get(device.type) or File(directory)


def nowhere(x: Tensor) -> Rest:
    raise ValueError(
        "--offload: Apple's GPU (mps) shares the host's memory, there is nowhere to put anything; leave it out"
    )


class Sleeper:
    """Tensors that lie elsewhere while nobody computes with them; `tensors` says which, whenever they fall asleep.

    frozen: their numbers never change, and are put there once. No tensors: nothing happens.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], place: Place, frozen: bool = False):
        self.tensors, self.place, self.frozen = tensors, place, frozen
        self.rests: dict[int, tuple[Tensor, Rest]] = {}  # by id of the tensor, which this keeps
        self.asleep: list[tuple[Tensor, torch.device]] = []
        self.users = 0

    @torch.no_grad()
    def sleep(self) -> None:
        for x in {id(x): x for x in map(kept, self.tensors())}.values() if not self.asleep else ():
            if x.numel() == 0:  # another rank has all of its rows
                continue
            self.asleep.append((x, x.device))
            if id(x) not in self.rests:
                self.rests[id(x)] = (x, self.place(x))
            elif not self.frozen:
                self.rests[id(x)][1].numbers.copy_(x)
            rest = self.rests[id(x)][1]
            x.data = rest.numbers
            rest.let_go()

    @torch.no_grad()
    def wake(self) -> None:
        while self.asleep:
            x, device = self.asleep.pop()
            rest = self.rests[id(x)][1]
            x.data = torch.empty_like(rest.numbers, device=device).copy_(rest.numbers)
            rest.let_go()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Within, they are there to compute with; they fall asleep when the outermost ends."""
        self.users += 1
        self.wake()
        yield
        self.users -= 1
        if self.users == 0:
            self.sleep()

    def during(self, steps: Iterable) -> Iterator:
        """The same steps, with the tensors awake from the first to the last."""
        with self.awake():
            yield from steps


def kept(x: Tensor) -> Tensor:
    """What this rank keeps of a tensor: its part of a frozen unit or its rows under shards, otherwise all of it."""
    if hasattr(x, "unit"):
        return x.unit.part
    return x.to_local() if checkpoint.is_sharded(x) else x


def moments(optimizer: AdamW) -> list[Tensor]:
    """Those of every parameter."""
    return [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
