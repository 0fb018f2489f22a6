"""Frozen FP8 layers over tensor parallelism against Megatron-Core's own layers, which hold the dequantised weights.

Where FP8 holds all numbers exactly, every sum is exact in fp32 in any order, so the outputs and gradients must be equal
bit for bit, whatever the ranks add up when.

Shapes: S sequence, B micro-batch, K input features, N output features, TP ranks.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_scalebio.config import ParallelConfig
from megatron_scalebio.device import CPU
from megatron_scalebio.kernels.fp8 import SCALE_BLOCK, dequantize, quantize
from megatron_scalebio.kernels.frozen_linear import frozen_linear
from megatron_scalebio.mcore.linear import column_parallel, row_parallel
from megatron_scalebio.mcore.process_groups import start_process_groups
from tests.distributed import run_distributed
from tests.kernels.test_frozen_linear import whole_numbers

S, B, N, K = 8, 3, 264, 200  # per rank 66 and 50 on 4 ranks: cut-off blocks everywhere


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_outputs_and_gradients_are_megatron_cores_bit_for_bit(world_size, sequence_parallel):
    run_distributed(world_size, check_both, sequence_parallel)


def check_both(sequence_parallel: bool) -> None:
    check_column_parallel(sequence_parallel)
    check_row_parallel(sequence_parallel)


def start(sequence_parallel: bool):
    size = dist.get_world_size()
    group = start_process_groups(ParallelConfig(tensor=size, sequence=sequence_parallel), CPU).tensor
    config = TransformerConfig(
        num_layers=1,
        hidden_size=K,
        num_attention_heads=4,
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel and size > 1,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    return group, dict(config=config, init_method=None, skip_bias_add=False, tp_group=group)


def mine(tensor: Tensor, dim: int) -> Tensor:
    """This rank's shard along `dim`."""
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()].contiguous()


def check_column_parallel(sequence_parallel: bool) -> None:
    group, arguments = start(sequence_parallel)
    x, grad = whole_numbers(S, B, K, seed=1), mine(whole_numbers(S, B, N, seed=2), dim=2)
    weight, bias = whole_numbers(N, K, seed=3), whole_numbers(N, seed=4)
    layer = ColumnParallelLinear(K, N, bias=True, gather_output=False, **arguments)
    x = mine(x, dim=0) if sequence_parallel else x
    compare(layer, column_parallel, group, sequence_parallel, x, grad, mine(weight, dim=0), mine(bias, dim=0))


def check_row_parallel(sequence_parallel: bool) -> None:
    group, arguments = start(sequence_parallel)
    x, grad = mine(whole_numbers(S, B, K, seed=1), dim=2), whole_numbers(S, B, N, seed=2)
    weight, bias = whole_numbers(N, K, seed=3), whole_numbers(N, seed=4)
    layer = RowParallelLinear(K, N, bias=True, input_is_parallel=True, **arguments)
    grad = mine(grad, dim=0) if sequence_parallel else grad
    compare(layer, row_parallel, group, sequence_parallel, x, grad, mine(weight, dim=1), bias)


def compare(layer, frozen, group, sequence_parallel, x, grad, weight, bias) -> None:
    """A rank's output, and gradients of its input and bias, with its inputs and the gradient of its output."""
    stored = quantize(weight, SCALE_BLOCK)
    assert torch.equal(dequantize(stored, torch.float32), weight)
    product = partial(frozen_linear, weight=stored)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, none = layer(theirs)
    expected.backward(grad.clone())
    our_bias = bias.clone().requires_grad_()
    found = frozen(ours, product, our_bias, group, sequence_parallel)
    found.backward(grad.clone())
    assert none is None and torch.equal(found, expected)
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(our_bias.grad, layer.bias.grad.view_as(bias))
    without = frozen(x, product, None, group, sequence_parallel)
    assert torch.equal(without + bias, expected)
