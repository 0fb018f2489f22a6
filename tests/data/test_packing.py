import numpy as np
import pytest
import torch

from megatron_scalebio.data.dataset import Example
from megatron_scalebio.data.packing import build_micro_batch, pack_rows, plan_microbatches, rows_of

PAD = 99


def random_lengths(seed: int, count: int, largest: int = 64) -> list[int]:
    return np.random.default_rng(seed).integers(1, largest + 1, count).tolist()


def example(length: int, first_loss: int, source_id: int = 0, base: int = 0) -> Example:
    mask = np.arange(length) >= first_loss
    return Example(np.arange(base, base + length, dtype=np.int32), mask, source_id)


def first_fit_decreasing(lengths: list[int], row_length: int) -> list[list[int]]:
    """The definition, row by row."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row in rows:
            if sum(lengths[i] for i in row) + lengths[index] <= row_length:
                row.append(index)
                break
        else:
            rows.append([index])
    return rows


@pytest.mark.parametrize("seed, count", [(0, 0), (1, 1), (2, 7), (3, 200)])
def test_packing_is_first_fit_decreasing(seed, count):
    lengths = random_lengths(seed, count)
    assert pack_rows(lengths, 64) == first_fit_decreasing(lengths, 64)


def test_packing_keeps_each_of_many_examples_once_and_never_overfills():
    lengths = random_lengths(0, 10_000, 1024)
    rows = pack_rows(lengths, 1024)
    assert sorted(index for row in rows for index in row) == list(range(10_000))
    assert all(0 < sum(lengths[index] for index in row) <= 1024 for row in rows)
    assert len(rows) <= 11 / 9 * sum(lengths) / 1024 + 1


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 64])
def test_every_layout_carries_the_same_rows_in_equally_many_microbatches(packing, micro_batch_size, size, count):
    lengths = random_lengths(count, count)
    plans = [plan_microbatches(lengths, 64, packing, micro_batch_size, rank, size) for rank in range(size)]
    assert len({len(plan) for plan in plans}) == 1
    assert all(len(rows) == micro_batch_size for plan in plans for rows in plan)
    rows = sorted(row for plan in plans for rows in plan for row in rows if row)
    assert rows == sorted(pack_rows(lengths, 64) if packing else [[index] for index in range(count)])
    num_slots = sum(len(plan) for plan in plans) * micro_batch_size
    assert num_slots - len(rows) < micro_batch_size * size  # no rank runs a micro-batch that none needs


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 64])
def test_rows_are_what_the_micro_batches_of_all_ranks_hold(packing, micro_batch_size, size, count):
    """Counted from what is handed to the models. Every example carries loss, so a segment without it is padding."""
    examples = [example(length + 1, 1, 0, 0) for length in random_lengths(count, count)]
    lengths = [each.num_positions for each in examples]
    found: dict[bool, list[int]] = {True: [], False: []}
    for rank in range(size):
        for plan in plan_microbatches(lengths, 64, packing, micro_batch_size, rank, size):
            rows = [[examples[index] for index in row] for row in plan]
            part = build_micro_batch(rows, 64, micro_batch_size, PAD)
            ends = part.cu_seqlens.numpy()
            carries_loss = np.histogram(part.loss_positions.numpy(), ends)[0] > 0
            for length, is_example in zip(np.diff(ends).tolist(), carries_loss.tolist(), strict=True):
                found[is_example].append(length)
    rows = rows_of(lengths, 64, packing, micro_batch_size, size)
    assert sorted(rows.examples) == sorted(found[True]) and sorted(rows.padding) == sorted(found[False])
    assert rows.num_positions % (64 * micro_batch_size * size) == 0


@pytest.mark.parametrize("seed", range(5))
def test_real_tokens_are_balanced_over_ranks(seed):
    lengths = random_lengths(seed, 64)
    loads = []
    for rank in range(4):
        plan = plan_microbatches(lengths, 64, False, 2, rank, 4)
        loads.append(sum(lengths[index] for rows in plan for row in rows for index in row))
    assert max(loads) - min(loads) <= max(lengths)


def test_a_micro_batch_lays_out_every_position_as_specified():
    """B = 2 rows of S = 8 positions: two examples and a tail; one that fills its row."""
    rows = [[example(4, 2, 1, 10), example(3, 1, 2, 20)], [example(9, 7, 0, 30)]]
    batch = build_micro_batch(rows, 8, 2, PAD)
    assert batch.tokens.tolist() == [10, 11, 12, 20, 21, PAD, PAD, PAD, 30, 31, 32, 33, 34, 35, 36, 37]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8, 16]
    assert batch.loss_positions.tolist() == [1, 2, 3, 4, 14, 15]
    assert batch.targets.tolist() == [12, 13, 21, 22, 37, 38]
    assert batch.source_ids.tolist() == [1, 1, 2, 2, 0, 0]
    assert batch.example_loss_tokens.tolist() == [2] * 6
    assert batch.row_length == 8
    assert batch.cu_seqlens.dtype == torch.int32
    for tensor in (batch.tokens, batch.loss_positions, batch.targets, batch.source_ids, batch.example_loss_tokens):
        assert tensor.dtype == torch.int64


def test_missing_and_empty_rows_are_padding_segments_of_their_own():
    for rows in ([], [[], []]):
        batch = build_micro_batch(rows, 4, 2, PAD)
        assert batch.tokens.tolist() == [PAD] * 8
        assert batch.cu_seqlens.tolist() == [0, 4, 8]
        assert batch.loss_positions.shape == batch.targets.shape == batch.source_ids.shape == (0,)


def test_targets_lie_one_behind_their_position_inside_the_same_segment():
    examples = [example(length + 1, 1 + length // 2, base=1000 * i) for i, length in enumerate(random_lengths(4, 20))]
    rows = [[examples[i] for i in row] for row in pack_rows([e.num_positions for e in examples], 64)]
    batch = build_micro_batch(rows, 64, len(rows), PAD)
    assert torch.equal(batch.targets, batch.tokens[batch.loss_positions] + 1)  # tokens count up within an example
    ends = batch.cu_seqlens.tolist()
    assert ends == sorted(set(ends)) and set(range(0, 64 * len(rows) + 1, 64)) <= set(ends)
    assert bool((batch.loss_positions.diff() > 0).all())
    assert len(batch.targets) == sum(e.num_loss_tokens for e in examples)


def test_a_row_that_is_too_full_is_refused():
    with pytest.raises(ValueError, match="row 0 holds 9 positions, more than 8"):
        build_micro_batch([[example(10, 1)]], 8, 1, PAD)
