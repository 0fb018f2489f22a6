"""Which path a tensor takes: the Triton kernels, or the plain PyTorch reference beside each of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor

# Set by the tests, which run the kernels in Triton's interpreter with its rounding corrected. A user's
# TRITON_INTERPRET=1 must not: as shipped, the interpreter truncates where bf16 is rounded.
INTERPRET = False

_planning_for_cuda = False


@contextmanager
def planning_for_cuda() -> Iterator[None]:
    """Take the paths of a CUDA device on fake tensors of the CPU: every kernel's buffers are made, none is launched."""
    global _planning_for_cuda
    launch = triton.JITFunction.run
    triton.JITFunction.run = lambda self, *args, **kwargs: None
    _planning_for_cuda = True
    try:
        yield
    finally:
        triton.JITFunction.run = launch
        _planning_for_cuda = False


def device_type(device: torch.device) -> str:
    """The type of the device that decides between paths: "cuda", also where a CUDA device is planned for, or "cpu"."""
    return "cuda" if _planning_for_cuda else device.type


def on_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` runs as a Triton kernel: on CUDA.

    The kernels compute in fp32; fp64, which exists for parity, takes the reference on every device.
    """
    return tensor.dtype != torch.float64 and (device_type(tensor.device) == "cuda" or INTERPRET)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16: AVX-512's, beside which AMX comes. Without, fp32 is
    faster."""
    return torch.cpu._is_avx512_bf16_supported()


def require_dense(**tensors: Tensor) -> None:
    """Refuse what a kernel would address wrongly. Raises: ValueError, unless the last dimension's stride is 1."""
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension must have stride 1, not strides {tensor.stride()}")
