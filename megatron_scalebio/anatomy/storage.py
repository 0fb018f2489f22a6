"""How the parameters of a block lie in one flat tensor, as plain arithmetic: what stores them and what plans agree.

Matrices come first, which are decayed, then vectors that are sharded over tensor parallelism, then replicated ones: the
counting in global norms, and what is summed over tensor parallelism, are by region.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 128


@dataclass(frozen=True, order=True)
class Counting:
    """What parameters of one region have in common."""

    replicated: bool = False  # over tensor parallelism
    sums_over_heads: bool = False  # replicated, and a rank's gradient is that of its own heads alone
    duplicate: bool = False  # counted in global norms on another rank


@dataclass(frozen=True)
class Item:
    """A parameter, as far as its place in the flat tensor depends on it."""

    numel: int  # of this rank's shard
    is_matrix: bool
    counting: Counting


@dataclass(frozen=True)
class Region:
    """A range of a flat block whose parameters count alike."""

    start: int
    stop: int
    counting: Counting


@dataclass(frozen=True)
class FlatLayout:
    order: list[int]  # the items, as they lie
    offsets: list[int]  # of each, in that order
    regions: list[Region]
    num_decayed: int  # where the matrices end, which come first; padding between their regions included
    numel: int  # padding between regions included, padding at the end not


def flat_layout(items: Sequence[Item]) -> FlatLayout:
    """Where each item lies. Every region begins at a multiple of 128 (`aligned`)."""
    order = sorted(range(len(items)), key=lambda index: (not items[index].is_matrix, items[index].counting))
    offsets: list[int] = []
    regions: list[Region] = []
    offset = 0
    for item in (items[index] for index in order):
        if regions and regions[-1].counting == item.counting:
            start = regions.pop().start
        else:
            start = offset = aligned(offset)
        offsets.append(offset)
        offset += item.numel
        regions.append(Region(start, offset, item.counting))
    ends = [start + items[index].numel for index, start in zip(order, offsets, strict=True) if items[index].is_matrix]
    return FlatLayout(order, offsets, regions, max(ends, default=0), offset)


def aligned(numel: int) -> int:
    """The next multiple of 128, where a range of a flat block may begin: there begins a block of an 8-bit moment's
    scales, so that no scale is shared by numbers that are sharded and numbers that ranks hold alike."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def padded_block(numel: int, data_parallel: int) -> int:
    """Numbers that a flat block of `numel` is stored in: every data-parallel rank's shard of it is `aligned`."""
    return aligned(-(-numel // data_parallel)) * data_parallel
