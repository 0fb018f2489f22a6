"""Bytes of tensors that are alive, and at their most, by part: of real tensors and of fake ones alike.

A storage counts from the operation that made it until nothing refers to it: no tensor, no view, no saved tensor of
autograd. What an operation holds while it runs, and frees before it returns, is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROUNDING = 512  # bytes: what torch's CUDA allocator rounds a size up to


class MemoryTracker(TorchDispatchMode):
    """While it is entered, every new storage counts towards the part that `counting_as` names, else `default`.

    Attributes:
        live: bytes by part now.
        peak: bytes by part when their sum was largest since `reset_peak`.
    """

    def __init__(self, default: str):
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._part = default
        self._part_of: dict[int, str | None] = {}  # by the id of a live storage; None: not counted
        self._live_total = self._peak_total = 0

    @contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """New storages count towards a part."""
        outer, self._part = self._part, part
        try:
            yield
        finally:
            self._part = outer

    def assign(self, part: str | None, tensors: Iterable[Tensor]) -> None:
        """Count tensors' storages towards a part from now on, whether they were seen before or not; None: nowhere."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._see(storage, part)
            self._count(self._part_of[id(storage)], -_size(storage))
            self._part_of[id(storage)] = part
            self._count(part, _size(storage))

    def reset_peak(self) -> None:
        """The peak is what is alive now, until more is."""
        self.peak, self._peak_total = self.live.copy(), self._live_total

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage(), self._part)
        return result

    def _see(self, storage: UntypedStorage, part: str | None) -> None:
        if id(storage) not in self._part_of:
            self._part_of[id(storage)] = part
            forget: Any = weakref.finalize(storage, self._forget, id(storage), _size(storage))
            forget.atexit = False
            self._count(part, _size(storage))

    def _forget(self, key: int, size: int) -> None:
        self._count(self._part_of.pop(key), -size)

    def _count(self, part: str | None, size: int) -> None:
        if part is None:
            return
        self.live[part] += size
        self._live_total += size
        if self._live_total > self._peak_total:
            self.reset_peak()


def _size(storage: UntypedStorage) -> int:
    return -(-storage.nbytes() // ROUNDING) * ROUNDING
