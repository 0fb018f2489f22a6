"""Which path a tensor takes: the Triton kernels, or the plain PyTorch reference beside each of them."""

import torch
import triton
from torch import Tensor


def on_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` runs as a Triton kernel: on CUDA, and under Triton's interpreter.

    The kernels compute in fp32; fp64, which exists for parity, takes the reference on every device.
    """
    return tensor.dtype != torch.float64 and (tensor.is_cuda or triton.knobs.runtime.interpret)
