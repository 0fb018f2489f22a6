"""What Adam's moments in bf16 or 8 bits do to a run of the arithmetic task.

The task, model and settings of examples/quickstart.yaml (examples/arithmetic.py, its seed the run's), computing in
bf16 with masters in fp32. "To the nearest" is no setting: the draws that round moments up or down are replaced by a
half.
"""

import argparse
from contextlib import AbstractContextManager
from unittest import mock

import torch

from megatron_scalebio.kernels import moments
from tools.benchmarks.tasks import QUICKSTART
from tools.studies import presets
from tools.studies.runner import Arm, Study

SEEDS, PROCESSES = 4, presets.PROCESSES
add_options = presets.add_options


def to_the_nearest() -> AbstractContextManager[object]:
    def halves(numel: int, first_index: int, key: int, device: torch.device) -> torch.Tensor:
        return torch.full((numel,), -0x7FFF8000, dtype=torch.int32, device=device)  # half of 2^16, and of 2^32

    return mock.patch.object(moments, "_random_bits_reference", halves)


ARMS = (
    Arm("fp32", ("optimizer.moments=null",)),
    Arm("bf16", ("optimizer.moments=bf16",)),
    Arm("bf16, to the nearest", ("optimizer.moments=bf16",), to_the_nearest),
    Arm("fp8", ("optimizer.moments=fp8",)),
    Arm("fp8, to the nearest", ("optimizer.moments=fp8",), to_the_nearest),
)


def declare(args: argparse.Namespace) -> Study:
    return Study(
        *("moments", ARMS, lambda seed: presets.arithmetic(args.data, seed), QUICKSTART),
        # The default preset's own, and the precision.
        settings=(*presets.SETTINGS, *presets.shared_draws(1, "AdamW").settings, "precision.compute=bf16"),
        order=presets.ORDER,
        baseline="fp32",
    )
