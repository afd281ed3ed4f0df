"""What the ranks send each other, counted where torch dispatches it: DDP's and FSDP's collectives, our own, a checkpoint's.

    with counted() as sent: ...
    sum(x.bytes for x in sent)

Nothing is counted outside of it, and nothing costs.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = str(Path(__file__).resolve().parents[2])
KINDS = {  # torch's name of a collective -> ours, and which argument is the whole
    "allreduce_": ("all-reduce", 0),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "alltoall_base_": ("all-to-all", 0),
    "broadcast_": ("broadcast", 0),
    "gather_": ("gather", 0),
    "scatter_": ("scatter", 1),
    "all_reduce": ("all-reduce", 0),  # of a DTensor
}
NO_COLLECTIVES = ("_wrap_tensor_autograd", "wait_tensor")  # of the same library


class Sent(NamedTuple):
    """A collective: the bytes of all ranks together (or of the sum), and our functions that led to it, innermost first."""

    kind: str
    bytes: int
    callers: tuple[str, ...]


class Counter(TorchDispatchMode):
    """Writes down every collective that is dispatched. KeyError for one that it does not know."""

    def __init__(self):
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it comes back with the tensors inside of it
        library, _, name = function._schema.name.partition("::")
        if library in ("c10d", "_c10d_functional") and name not in NO_COLLECTIVES:
            kind, whole = KINDS[name]
            self.sent.append(Sent(kind, size_of(args[whole]), callers()))
        return function(*args, **(kwargs or {}))


def size_of(x: Tensor | list) -> int:
    """Bytes of a tensor, or of all in a list of lists."""
    return x.numel() * x.element_size() if isinstance(x, Tensor) else sum(map(size_of, x))


def callers() -> tuple[str, ...]:
    frame, names = sys._getframe(2), []
    while frame:
        if frame.f_code.co_filename.startswith(ROOT):
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return tuple(names)


@contextlib.contextmanager
def counted() -> Iterator[list[Sent]]:
    """What this rank takes part in, as it happens."""
    with Counter() as counter:
        yield counter.sent
