"""Tensors that lie in a file, each mapped into memory for itself: what was read of one leaves the memory with it.

A library that maps a whole file keeps every page that was read for as long as one tensor of it lives; and a whole mapping for
every tensor would fill the address space.
"""

import ctypes
import mmap
import os
import weakref
from pathlib import Path

import torch
from torch import Tensor

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
FAILED = ctypes.c_void_p(-1).value


def mapped(file: Path, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The numbers that lie in a file from byte `begin` on. What is written into them stays in this process.

    Python's own mmap keeps a file descriptor for each. OSError where the file or memory for it is not there. The caller has
    looked that the file is so long: behind its end lies nothing but a SIGBUS.
    """
    size = dtype.itemsize * torch.Size(shape).numel()
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    ahead = begin % mmap.ALLOCATIONGRANULARITY
    with open(file, "rb") as stream:
        how = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, stream.fileno(), begin - ahead
        place = LIBC.mmap(None, ahead + size, *how)
    if place == FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    pages = (ctypes.c_char * (ahead + size)).from_address(place)
    weakref.finalize(pages, LIBC.munmap, place, ahead + size).atexit = False  # others may still read it then
    return torch.frombuffer(pages, dtype=dtype, offset=ahead).view(shape)
