"""Which example lies in which row, which row on which rank, and the tensors of a micro-batch.

The plan needs the examples' lengths only, so every rank makes the same plan of the whole batch and builds its own rows.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_scalebio.data.batch import MicroBatch, Rows
from megatron_scalebio.data.dataset import Example


def pack_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """First-fit decreasing: rows of example indices whose lengths sum to at most `row_length`.

    Deterministic: of equal lengths the lower index goes first, and each example goes in the first row with room.
    """
    remaining = np.full(len(lengths), row_length)
    rows: list[list[int]] = []
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        row = int(np.argmax(remaining >= lengths[index]))  # rows not yet open have room for any example
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        remaining[row] -= lengths[index]
    return rows


def plan_microbatches(
    lengths: Sequence[int],
    row_length: int,
    packing: bool,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> list[list[list[int]]]:
    """This rank's micro-batches, each a list of `micro_batch_size` rows of example indices, empty rows included.

    Every rank gets equally many. Rows go, fullest first, to the rank with the fewest filled positions that has a row
    left, so that ranks wait little for each other.
    """
    rows = _rows(lengths, row_length, packing)
    filled = [sum(lengths[index] for index in row) for row in rows]
    num_microbatches = -(-len(rows) // (micro_batch_size * data_parallel_size))
    rows_per_rank = num_microbatches * micro_batch_size
    rows_of_rank: list[list[list[int]]] = [[] for _ in range(data_parallel_size)]
    load = [0] * data_parallel_size
    for row in np.argsort(-np.asarray(filled, dtype=np.int64), kind="stable").tolist():
        open_ranks = [r for r in range(data_parallel_size) if len(rows_of_rank[r]) < rows_per_rank]
        rank = min(open_ranks, key=lambda r: load[r])
        rows_of_rank[rank].append(rows[row])
        load[rank] += filled[row]
    own = rows_of_rank[data_parallel_rank]
    own += [[]] * (rows_per_rank - len(own))
    return [own[index::num_microbatches] for index in range(num_microbatches)]


def rows_of(
    lengths: Sequence[int], row_length: int, packing: bool, micro_batch_size: int, data_parallel_size: int
) -> Rows:
    """What `plan_microbatches` makes of the examples on all ranks together."""
    rows = _rows(lengths, row_length, packing)
    tails = [row_length - sum(lengths[index] for index in row) for row in rows]
    num_empty = -len(rows) % (micro_batch_size * data_parallel_size)
    return Rows(list(lengths), [tail for tail in tails if tail] + [row_length] * num_empty)


def _rows(lengths: Sequence[int], row_length: int, packing: bool) -> list[list[int]]:
    return pack_rows(lengths, row_length) if packing else [[index] for index in range(len(lengths))]


def build_micro_batch(rows: list[list[Example]], row_length: int, micro_batch_size: int, pad_id: int) -> MicroBatch:
    """The tensors of at most `micro_batch_size` rows; missing rows are all padding.

    Shapes: T = micro_batch_size * row_length positions, N of which carry loss.
    """
    tokens = np.full(micro_batch_size * row_length, pad_id, dtype=np.int64)
    ends = [0]
    loss_positions, targets, counts, source_ids = [], [], [], []
    for row in range(micro_batch_size):
        start, row_end = row * row_length, (row + 1) * row_length
        examples = rows[row] if row < len(rows) else []
        num_positions = sum(example.num_positions for example in examples)
        if num_positions > row_length:
            raise ValueError(f"row {row} holds {num_positions} positions, more than {row_length}")
        for example in examples:
            tokens[start : start + example.num_positions] = example.tokens[:-1]
            loss_targets = np.flatnonzero(example.loss_mask)  # target j is predicted at position j - 1
            loss_positions.append(start + loss_targets - 1)
            targets.append(example.tokens[loss_targets])
            counts.append(example.num_loss_tokens)
            source_ids.append(example.source_id)
            start += example.num_positions
            ends.append(start)
        if start < row_end:
            ends.append(row_end)
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        row_length=row_length,
        loss_positions=_joined(loss_positions),
        targets=_joined(targets),
        source_ids=torch.from_numpy(np.repeat(np.array(source_ids, dtype=np.int64), counts)),
        example_loss_tokens=torch.from_numpy(np.repeat(np.array(counts, dtype=np.int64), counts)),
    )


def _joined(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts], dtype=np.int64))
