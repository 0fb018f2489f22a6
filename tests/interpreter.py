"""Triton's interpreter, made to compute what a GPU computes: kernels run on CPU tensors, one program after the other.

As shipped (Triton 3.7) it truncates where a GPU rounds to the nearest bf16, carries wrongly into the exponent of an
fp8 number, and multiplies the bits of bf16 operands in `tl.dot`. What it cannot show: races, spills, illegal shapes.
"""

import os

import numpy as np
import torch

TORCH_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
}
NUMPY_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def install() -> None:
    """Make this process interpret kernels. Must come before anything imports Triton's language."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    interpreter._convert_float = lambda data, source, target, rounding: convert(data, source.name, target.name)
    interpreter.InterpreterBuilder.create_dot = create_dot
    from megatron_scalebio.kernels import dispatch

    dispatch.INTERPRET = True


def convert(data: np.ndarray, source: str, target: str) -> np.ndarray:
    """The bits of `data` in another floating-point type: to the nearest even, and fp8 saturates as PTX's satfinite."""
    bits = np.ascontiguousarray(data).view(NUMPY_BITS[data.dtype.itemsize]).reshape(-1)
    values = torch.from_numpy(bits.copy()).view(TORCH_DTYPES[source])
    if target == "fp8e4nv":
        values = values.float().clamp(-448, 448)  # keeps NaN
    converted = values.to(TORCH_DTYPES[target])
    width = converted.element_size()
    return converted.view(torch.uint8).numpy().view(NUMPY_BITS[width]).reshape(data.shape)


def create_dot(builder, a, b, accumulator, input_precision, max_num_imprecise_acc):
    """`tl.dot` by value, accumulated in the accumulator's type."""
    from triton.runtime.interpreter import TensorHandle

    def values(operand) -> np.ndarray:
        name = operand.dtype.scalar.name
        return operand.data if name == "fp32" else convert(operand.data, name, "fp32").view(np.float32)

    product = np.matmul(values(a), values(b), dtype=accumulator.data.dtype)
    return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)
