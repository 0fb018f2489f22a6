"""Exact masters of frozen blocks, in the host's memory; on CUDA page-locked, and copied beside the device's work."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_scalebio.active_layers import Role
from megatron_scalebio.device import CPU

Key = tuple[Role, str]  # the model, and the block's name


class HostMasters:
    """Tensors by model and block. A copy to the host runs on a stream of its own: training goes on while it does."""

    def __init__(self, device: torch.device):
        self.device = device
        self._tensors: dict[Key, Tensor] = {}
        self._arrived: dict[Key, torch.Event] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __contains__(self, key: Key) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[Key]:
        return iter(self._tensors)

    def __getitem__(self, key: Key) -> Tensor:
        """The tensor on the host, once it has arrived."""
        if key in self._arrived:
            self._arrived.pop(key).synchronize()
        return self._tensors[key]

    def put(self, key: Key, master: Tensor) -> None:
        """Keep a copy of `master`, which the caller may drop at once but not change before the device gets there."""
        host = torch.empty(master.shape, dtype=master.dtype, device=CPU, pin_memory=self._stream is not None)
        self._tensors[key] = host
        if self._stream is None:
            host.copy_(master)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            host.copy_(master, non_blocking=True)
            self._arrived[key] = self._stream.record_event()
        master.record_stream(self._stream)  # its memory is not another tensor's before the copy is done

    def take(self, key: Key) -> Tensor | None:
        """The tensor on the device, in the order of its work, and no longer on the host; None if there is none."""
        if key not in self._tensors:
            return None
        if key in self._arrived:
            torch.cuda.current_stream(self.device).wait_event(self._arrived.pop(key))
        # Page-locked memory is not handed out again before the copies that read it are done: torch sees to that.
        return self._tensors.pop(key).to(self.device, non_blocking=True)

    def values(self) -> list[Tensor]:
        return [self[key] for key in self]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())
