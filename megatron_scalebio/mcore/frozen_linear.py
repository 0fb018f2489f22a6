"""Frozen FP8 linear layers over tensor parallelism: Megatron-Core's ColumnParallelLinear(gather_output=False) and
RowParallelLinear(input_is_parallel=True), with their collectives, around the product with an FP8 weight.

What travels between ranks is what travels there: activations and their gradients in the compute dtype. Only a
product's operands are rounded to FP8, on each rank for itself, so every rank's weight shard has its own blocks.

Shapes: S sequence, B micro-batch, K input features, N output features, TP ranks of the tensor-parallel group;
S_local is S / TP under sequence parallelism and S without.
"""

from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_scalebio.kernels.fp8 import BlockScaled
from megatron_scalebio.kernels.frozen_linear import frozen_linear


def column_parallel(
    x: Tensor, weight: BlockScaled, bias: Tensor | None, group: ProcessGroup, sequence_parallel: bool
) -> Tensor:
    """This rank's columns of the output.

    Args:
        x: [S_local, B, K]; without sequence parallelism equal on every rank of `group`.
        weight: [N / TP, K], this rank's rows of the whole weight.
        bias: [N / TP].

    Returns: [S, B, N / TP]. The gradient of `x` is summed over `group`, and under sequence parallelism scattered.
    """
    if sequence_parallel:
        x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    else:
        x = copy_to_tensor_model_parallel_region(x, group=group)
    y = frozen_linear(x, weight)
    return y if bias is None else y + bias


def row_parallel(
    x: Tensor, weight: BlockScaled, bias: Tensor | None, group: ProcessGroup, sequence_parallel: bool
) -> Tensor:
    """The whole output, summed over the ranks' columns of the input.

    Args:
        x: [S, B, K / TP], this rank's columns.
        weight: [N, K / TP], this rank's columns of the whole weight.
        bias: [N], added once, to the sum.

    Returns: [S_local, B, N]; without sequence parallelism equal on every rank.
    """
    y = frozen_linear(x, weight)
    if sequence_parallel:
        y = reduce_scatter_to_sequence_parallel_region(y, group=group)
    else:
        y = reduce_from_tensor_model_parallel_region(y, group=group)
    return y if bias is None else y + bias
