"""What sm_90 would run of the kernels that are bound by memory, at the shapes of Qwen-2.5-32B under TP8.

Spills and narrow accesses cost bandwidth outright; registers bound how many programs an SM holds, and so how many
loads are in flight. Budgets are what the compilers of Triton 3.6 and 3.7 gave, rounded up to a multiple of 8, the unit
of allocation.
"""

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_scalebio.kernels import adamw, cross_entropy, loss_sums, sum_of_squares
from megatron_scalebio.kernels.moments import Moment
from tests.hopper import Kernel, compiled_for_hopper

TOKENS, V_LOCAL, NUMEL = 4096, 19_008, 5120 * 3456
FP32, BF16 = torch.float32, torch.bfloat16
ONE_RANK = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


@dataclass(frozen=True)
class Budget:
    """Of one kernel: at most these registers, exactly these 16-byte loads and stores, exponentials at most."""

    name: str
    registers: int
    wide_loads: int
    wide_stores: int = 0
    exponentials: int = 0


def launch_cross_entropy(logits: torch.dtype, grad: torch.dtype, softcap: float | None) -> None:
    shard = torch.empty(TOKENS, V_LOCAL, dtype=logits)
    place = shard if grad == logits else torch.empty_like(shard, dtype=grad)
    targets, coefs = torch.zeros(TOKENS, dtype=torch.int64), torch.ones(TOKENS)
    cross_entropy.cross_entropy(shard, targets, coefs, V_LOCAL, ONE_RANK, softcap, place)


def launch_update(weights: torch.dtype, moments: str | None) -> None:
    master, gradient = torch.empty(NUMEL), torch.empty(NUMEL)
    pair = [Moment.zeros(NUMEL, moments, FP32, torch.device("cpu")) for _ in range(2)]
    adamw.adamw_update(
        *(master if weights == FP32 else torch.empty(NUMEL, dtype=weights), master, gradient, *pair),
        **dict(num_decayed=NUMEL - 5120, step=3, lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=5e-4),
        gradient_scale=torch.ones(()),
    )


def launch_norm() -> None:
    sum_of_squares.sum_of_squares(torch.empty(NUMEL))


def launch_sums() -> None:
    ids, coefs = torch.zeros(TOKENS, dtype=torch.int64), torch.ones(TOKENS, dtype=torch.float64)
    loss_sums.sums_by_id(torch.ones(TOKENS), coefs, ids, 18)


# A program's tile is 16 KB of logits over 256 threads: four 16-byte loads a thread. One exponential for each of a
# thread's 16 fp32 (32 bf16) logits, and one for the shift; the softcap's tanh takes one more each, and the target's.
LAUNCHES = {
    "cross-entropy, fp32 to bf16": (
        *(launch_cross_entropy, FP32, BF16, None),
        [Budget("_statistics_kernel", 48, 4, 0, 17), Budget("_gradient_kernel", 32, 4, 2, 16)],
    ),
    "cross-entropy, bf16 in place": (
        *(launch_cross_entropy, BF16, BF16, None),
        [Budget("_statistics_kernel", 80, 4, 0, 33), Budget("_gradient_kernel", 48, 4, 4, 32)],
    ),
    "cross-entropy, fp32 to bf16, softcap": (
        *(launch_cross_entropy, FP32, BF16, 30.0),
        [Budget("_statistics_kernel", 64, 4, 0, 34), Budget("_gradient_kernel", 32, 4, 2, 32)],
    ),
    "update, bf16 weights": (launch_update, BF16, None, [Budget("_update_kernel", 56, 8, 7)]),
    "update, fp32 weights": (launch_update, FP32, None, [Budget("_update_kernel", 56, 8, 6)]),
    "update, bf16 weights and moments": (launch_update, BF16, "bf16", [Budget("_update_kernel", 64, 6, 5)]),
    # A thread's share of a moment in 8 bits is 8 bytes.
    "update, bf16 weights, fp8 moments": (launch_update, BF16, "fp8", [Budget("_update_kernel", 80, 4, 3)]),
    "norm": (launch_norm, [Budget("_squares_kernel", 64, 4)]),
    "sums per source": (launch_sums, [Budget("_sums_kernel", 40, 4)]),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_kernel_keeps_to_its_budget(name):
    launch, *arguments, budgets = LAUNCHES[name]
    for kernel, budget in zip(compiled(launch, *arguments), budgets, strict=True):
        found = Budget(
            kernel.name,
            kernel.registers,
            kernel.count("LDG.E.128"),
            kernel.count("STG.E.128"),
            kernel.count("MUFU.EX2"),
        )
        assert kernel.spills == kernel.stack_bytes == 0 and kernel.shared_bytes <= 4096, kernel
        assert found.registers <= budget.registers and found.exponentials <= budget.exponentials, (found, budget)
        assert (found.name, found.wide_loads, found.wide_stores) == (
            *(budget.name, budget.wide_loads, budget.wide_stores),
        )


def compiled(launch, *arguments) -> list[Kernel]:
    """The kernels of an operation, launched on CPU tensors as if they were a GPU's."""
    with contextlib.ExitStack() as stack:
        for module in (adamw, cross_entropy, loss_sums, sum_of_squares):
            stack.enter_context(mock.patch.object(module, "on_triton", lambda tensor: True))
        kernels = stack.enter_context(compiled_for_hopper())
        launch(*arguments)
    return kernels
