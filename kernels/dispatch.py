"""Which path a tensor takes: the Triton kernels, or the plain PyTorch reference beside each of them."""

import torch
from torch import Tensor

# Set by the tests, which run the kernels in Triton's interpreter with its rounding corrected. A user's
# TRITON_INTERPRET=1 must not: as shipped, the interpreter truncates where bf16 is rounded.
INTERPRET = False


def on_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` runs as a Triton kernel: on CUDA.

    The kernels compute in fp32; fp64, which exists for parity, takes the reference on every device.
    """
    return tensor.dtype != torch.float64 and (tensor.is_cuda or INTERPRET)


def require_dense(**tensors: Tensor) -> None:
    """Refuse what a kernel would address wrongly. Raises: ValueError, unless the last dimension's stride is 1."""
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension must have stride 1, not strides {tensor.stride()}")
