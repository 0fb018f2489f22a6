"""Sums of losses per source and per example: exact, the same bits every time, none touched by another's NaN."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_scalebio.data import Example, MicroBatch, build_micro_batch
from megatron_scalebio.kernels.loss_sums import sums_by_id
from tests.distributed import run_distributed

BOTH = pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernel"])


@BOTH
def test_sums_are_exact_and_the_same_bits_every_time(interpret):
    run_distributed(1, check_exact, interpret=interpret)


@BOTH
def test_nothing_to_add_up_gives_zeros(interpret):
    run_distributed(1, check_empty, interpret=interpret)


@BOTH
def test_a_value_that_is_not_finite_stays_in_its_own_sum(interpret):
    run_distributed(1, check_non_finite, interpret=interpret)


@BOTH
def test_sums_per_example_are_the_same_packed_and_padded(interpret):
    run_distributed(1, check_examples, interpret=interpret)


def check_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (1, 7, 1024, 4000):
        losses = torch.randn(num_tokens, generator=generator) * 10
        coefs = torch.rand(num_tokens, generator=generator, dtype=torch.float64)
        ids = torch.randint(5, (num_tokens,), generator=generator)
        ids[:1] = 4
        sums = sums_by_id(losses, coefs, ids, 6)  # no token has the sixth id
        for each in range(6):
            own = (losses.double() * coefs)[ids == each].tolist()
            assert sums[each].item() == pytest.approx(math.fsum(own), abs=1e-14 * sum(map(abs, own)))
        assert sums[5] == 0.0
        assert all(torch.equal(sums_by_id(losses, coefs, ids, 6), sums) for _ in range(5))


def check_empty() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(sums_by_id(none.float(), none.double(), none, 4), torch.zeros(4, dtype=torch.float64))


def check_non_finite() -> None:
    ids = torch.tensor([0, 1, 2, 1, 0])
    coefs = torch.ones(5, dtype=torch.float64)
    for bad in (math.nan, math.inf):
        sums = sums_by_id(torch.tensor([1.0, bad, 2.0, 4.0, 8.0]), coefs, ids, 3)
        assert not sums[1].isfinite() and sums[0] == 9.0 and sums[2] == 2.0


def check_examples() -> None:
    """Each loss token counts its own id, so that an example's sum can be told from its tokens alone."""
    generator = np.random.default_rng(1)
    examples = []
    for length in (9, 2, 17, 24, 5):
        tokens, mask = generator.integers(100, size=length, dtype=np.int32), generator.random(length) < 0.5
        mask[0], mask[-1] = False, True
        examples.append(Example(tokens, mask, 0))
    expected = [float(example.tokens[example.loss_mask].sum()) for example in examples]
    packed = build_micro_batch([[examples[0], examples[1]], [examples[2]], [examples[3]], [examples[4]]], 24, 4, 0)
    padded = build_micro_batch([[example] for example in examples], 24, 5, 0)
    for micro_batch in (packed, padded):
        ids = example_ids(micro_batch)
        sums = sums_by_id(micro_batch.targets.float(), torch.ones(len(ids), dtype=torch.float64), ids, len(examples))
        assert sums.tolist() == expected


def example_ids(micro_batch: MicroBatch) -> Tensor:
    """The number of each loss token's example: of its segment among those that hold loss tokens."""
    segments = torch.searchsorted(micro_batch.cu_seqlens[1:].long(), micro_batch.loss_positions, right=True)
    return segments.unique(return_inverse=True)[1]
