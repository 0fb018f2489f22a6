"""Linear layers over tensor parallelism: Megatron-Core's ColumnParallelLinear(gather_output=False) and
RowParallelLinear(input_is_parallel=True), with their collectives, around an FP8 product where there is one.

    a frozen weight in the FP8 store            our own product with it
    a weight that trains, precision.compute=fp8 Transformer Engine's
    any other                                   Megatron-Core's layer as it is

What travels between ranks is what travels there: activations and their gradients in the compute dtype. Only a
product's operands are rounded to FP8, on each rank for itself, so every rank's weight shard has its own blocks.

Shapes: S sequence, B micro-batch, K input features, N output features, TP ranks of the tensor-parallel group;
S_local is S / TP under sequence parallelism and S without.
"""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron_scalebio.kernels.frozen_linear import frozen_linear
from megatron_scalebio.mcore.te_linear import FP8Product

Product = Callable[[Tensor], Tensor]  # [S, B, K] -> [S, B, N], of this rank's shards


class _Products:
    """Which product a layer computes with."""

    weight: Parameter
    config: Any  # a DecoderConfig

    @cached_property  # made when the layer first trains, and no module of the model's
    def _trained_product(self) -> FP8Product:
        return FP8Product(self.weight, self.config.active_fp8_recipe)

    def fp8_product(self) -> Product | None:
        """None: Megatron-Core's, in the compute dtype."""
        quantized = getattr(self.weight, "quantized", None)
        if quantized is not None:
            return partial(frozen_linear, weight=quantized, rounds_inputs=self.config.rounds_frozen_inputs)
        trains_in_fp8 = self.config.active_fp8_recipe is not None and self.weight.requires_grad
        return self._trained_product if trains_in_fp8 else None


class ColumnLinear(_Products, ColumnParallelLinear):
    """Computes with the FP8 product of its weight, where there is one."""

    def forward(self, input_: Tensor, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        """[S_local, B, K] -> [S, B, N / TP], and the bias if the caller is to add it."""
        product = self.fp8_product()
        if product is None:
            return super().forward(input_, *args, **keywords)
        added, returned = (None, self.bias) if self.skip_bias_add else (self.bias, None)
        return column_parallel(input_, product, added, self.tp_group, self.sequence_parallel), returned


class RowLinear(_Products, RowParallelLinear):
    """Computes with the FP8 product of its weight, where there is one."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S, B, K / TP] -> [S_local, B, N], and the bias if the caller is to add it."""
        product = self.fp8_product()
        if product is None:
            return super().forward(input_)
        added, returned = (None, self.bias) if self.skip_bias_add else (self.bias, None)
        return row_parallel(input_, product, added, self.tp_group, self.sequence_parallel), returned


def column_parallel(
    x: Tensor, product: Product, bias: Tensor | None, group: ProcessGroup, sequence_parallel: bool
) -> Tensor:
    """This rank's columns of the output.

    Args:
        x: [S_local, B, K]; without sequence parallelism equal on every rank of `group`.
        product: with this rank's rows of the whole weight, [N / TP, K].
        bias: [N / TP].

    Returns: [S, B, N / TP]. The gradient of `x` is summed over `group`, and under sequence parallelism scattered.
    """
    if sequence_parallel:
        x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    else:
        x = copy_to_tensor_model_parallel_region(x, group=group)
    y = product(x)
    return y if bias is None else y + bias


def row_parallel(
    x: Tensor, product: Product, bias: Tensor | None, group: ProcessGroup, sequence_parallel: bool
) -> Tensor:
    """The whole output, summed over the ranks' columns of the input.

    Args:
        x: [S, B, K / TP], this rank's columns.
        product: with this rank's columns of the whole weight, [N, K / TP].
        bias: [N], added once, to the sum.

    Returns: [S_local, B, N]; without sequence parallelism equal on every rank.
    """
    y = product(x)
    if sequence_parallel:
        y = reduce_scatter_to_sequence_parallel_region(y, group=group)
    else:
        y = reduce_from_tensor_model_parallel_region(y, group=group)
    return y if bias is None else y + bias
