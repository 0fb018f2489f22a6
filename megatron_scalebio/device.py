"""The seam between machines with and without CUDA.

Megatron-Core 0.19 names CUDA in its pipeline schedules and asks it for "the current device" wherever it allocates.
On a machine without CUDA, `install_cpu_seam` redirects exactly those places (`SEAM`, one entry each, so that a test
can tell when an upgrade moves one); everything else of Megatron-Core runs unedited.
"""

import importlib
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_scalebio.config import UserError

CPU = torch.device("cpu")

_reads_zeros = False


@dataclass(frozen=True)
class SeamLocation:
    module: str  # where Megatron-Core depends on CUDA
    source: str  # the text there, checked by a test
    why: str


SEAM = (
    SeamLocation(
        "megatron.core.pipeline_parallel.schedules",
        'torch.zeros([], dtype=torch.int, device="cuda")',
        "the count of tokens is created on CUDA by name",
    ),
    SeamLocation(
        "megatron.core.pipeline_parallel.p2p_communication",
        "device=torch.cuda.current_device()",
        "receive buffers of the pipeline",
    ),
    SeamLocation(
        "megatron.core.tensor_parallel.layers", "device=torch.cuda.current_device()", "weights and gather buffers"
    ),
    SeamLocation("megatron.core.tensor_parallel.mappings", "device=torch.cuda.current_device()", "gather and scatter"),
    SeamLocation(
        "megatron.core.dist_checkpointing.strategies.state_dict_saver",
        "device=torch.cuda.current_device()",
        "the ranks' agreement that a checkpoint is written",
    ),
    SeamLocation(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "torch.cuda.synchronize()",
        "the end of the copies to the host before a checkpoint is written",
    ),
)


class _TorchOnCpu:
    """`torch` as one Megatron-Core module sees it: factories that name CUDA allocate on the CPU instead."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return torch.zeros(*size, device=CPU if device == "cuda" else device, **kwargs)


def check_device(setting: str, ranks_here: int) -> None:
    """Check `run.device` for a number of ranks on this machine. Raises: UserError."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device=cuda, but torch finds no CUDA device on this machine; use run.device=cpu or auto")
    if setting != "cpu" and torch.cuda.is_available() and ranks_here > torch.cuda.device_count():
        raise UserError(
            f"{ranks_here} ranks on this machine, but it has {torch.cuda.device_count()} GPUs and each rank drives one:"
            " start fewer, or use run.device=cpu"
        )


def find_cuda() -> bool:
    """Whether this machine has a CUDA device that torch can use."""
    return torch.cuda.is_available()


def gpu_memory(ranks_here: int) -> int:
    """Bytes of the smallest GPU of those that so many ranks on this machine drive: the first ones, one each."""
    count = min(ranks_here, torch.cuda.device_count())
    return min(torch.cuda.get_device_properties(index).total_memory for index in range(count))


def device_name(device: torch.device) -> str:
    """A GPU as torch names it; "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def reset_peak_memory(device: torch.device) -> None:
    """Begin to look for the most that torch's allocator holds of a GPU; of the CPU there is no beginning anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that torch's tensors held since the reset; on the CPU the most that this process ever
    held of the machine's memory. Neither waits for the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)


def has_nccl() -> bool:
    """Whether torch can talk between GPUs."""
    return torch.distributed.is_available() and torch.distributed.is_nccl_available()


def choose_device(setting: str) -> torch.device:
    """The device of this process for `run.device`: auto | cpu | cuda. One process drives one GPU, `LOCAL_RANK`'s.

    Raises: UserError.
    """
    check_device(setting, ranks_here=1)
    if setting == "cpu" or not torch.cuda.is_available():
        return CPU
    local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if count == 1 and "SLURM_LOCALID" in os.environ:
        local_rank = 0  # Slurm may show each task its own GPU only
    if local_rank >= count:
        raise UserError(f"local rank {local_rank} has no GPU: this node has {count}; start at most {count} ranks on it")
    torch.cuda.set_device(local_rank)
    torch.set_float32_matmul_precision("highest")  # fp32 means fp32: NVIDIA's containers allow TF32 for it
    return torch.device("cuda", local_rank)


def install_cpu_seam() -> None:
    """Let Megatron-Core run in this process on the CPU. Idempotent.

    Only for a process that has chosen the CPU for all it does. CUDA may have been started in it all the same, as
    importing Transformer Engine does.
    """
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda device=None: None
    schedules: Any = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    if schedules.torch is torch:
        schedules.torch = _TorchOnCpu()


@contextmanager
def rehearsal() -> Iterator[None]:
    """Run Megatron-Core on fake tensors of the CPU, on a machine with or without CUDA: the seam is in place, and
    `read_back` reads zeros, since fake tensors hold no numbers. Afterwards both are as they were.
    """
    global _reads_zeros
    schedules: Any = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    before = torch.cuda.current_device, torch.cuda.synchronize, schedules.torch
    install_cpu_seam()
    _reads_zeros = True
    try:
        yield
    finally:
        torch.cuda.current_device, torch.cuda.synchronize, schedules.torch = before
        _reads_zeros = False


def backend(device: torch.device) -> str:
    """The torch.distributed backend of a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def read_back(tensor: Tensor) -> list[float]:
    """Device numbers as Python floats. The one place where the host waits for the device."""
    if _reads_zeros:
        return [0.0] * tensor.numel()
    return tensor.detach().to(device=CPU, dtype=torch.float64).reshape(-1).tolist()


def describe(device: torch.device) -> str:
    """The device in words, for the log."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)}, {memory / 2**30:.0f} GiB"
    return f"CPU, {torch.get_num_threads()} threads per rank"
