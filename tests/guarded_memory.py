"""Memory in which a number that is never computed, and an access beyond the end, show."""

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """What `torch.empty` and `torch.empty_like` allocate holds NaN, and ends before a page that nobody may touch."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(factory):
        return lambda *args, **kwargs: poisoned(factory(*args, **kwargs))

    def poisoned(tensor: Tensor) -> Tensor:
        return guarded(tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor)

    with mock.patch.multiple(torch, empty=poison(empty), empty_like=poison(empty_like)):
        yield


def guarded(tensor: Tensor) -> Tensor:
    """A row-major copy whose last byte is the last before a page that nobody may touch: to read or write beyond it
    ends the process."""
    size = tensor.numel() * tensor.element_size()
    end = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = torch.frombuffer(mmap.mmap(-1, end + mmap.PAGESIZE), dtype=torch.uint8)
    protected = ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(memory.data_ptr() + end), mmap.PAGESIZE, 0)
    assert protected == 0, ctypes.get_errno()
    return memory[end - size : end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
