"""What the kinds of cut mean for numbers: from transformers' tensors to a rank's shard, and back.

The one place that knows how the layouts differ: grouped query-key-value rows, gate above up, padded vocabulary.

Shapes: G query groups, H hidden.
"""

import torch
from torch import Tensor

from megatron_scalebio.anatomy.parameters import Cut, Parameter, sizes_of
from megatron_scalebio.config import ShapeConfig


def shard_of_parts(
    parameter: Parameter, parts: list[Tensor], shape: ShapeConfig, tensor_rank: int, tensor_size: int
) -> Tensor:
    """A tensor-parallel rank's shard, from transformers' tensors; a copy, and all the memory that is taken.

    `tensor_size` must divide what it cuts.
    """

    def cut(part: Tensor, dim: int = 0) -> Tensor:
        return part.unflatten(dim, (tensor_size, -1)).select(dim, tensor_rank)

    if parameter.cut is Cut.GROUPS:
        groups = [cut(part.unflatten(0, (shape.num_query_groups, -1))) for part in parts]  # [G_local, rows, H]
        return torch.cat(groups, dim=1).flatten(0, 1)
    if parameter.cut is Cut.HALVES:
        return torch.cat([cut(part) for part in parts])
    (part,) = parts
    if parameter.cut is Cut.VOCABULARY:
        rows = parameter.shape(shape, tensor_size)[0]
        shard = part.new_zeros(rows, part.shape[1])
        real = part[tensor_rank * rows : (tensor_rank + 1) * rows]
        shard[: len(real)] = real
        return shard
    return part.clone() if parameter.cut.dim is None else cut(part, parameter.cut.dim).clone()


def shard(parameter: Parameter, full: Tensor, tensor_rank: int, tensor_size: int) -> Tensor:
    """The slice of our full tensor that a tensor-parallel rank holds."""
    if parameter.cut.dim is None:
        return full
    parts = full.chunk(len(parameter.parts)) if parameter.cut is Cut.HALVES else (full,)
    return torch.cat([part.chunk(tensor_size, parameter.cut.dim)[tensor_rank] for part in parts])


def join_shards(parameter: Parameter, shards: list[Tensor]) -> Tensor:
    """Our full tensor from the shards of all tensor-parallel ranks."""
    if parameter.cut is Cut.HALVES:
        by_part = zip(*(shard.chunk(len(parameter.parts)) for shard in shards), strict=True)
        return torch.cat([piece for pieces in by_part for piece in pieces])
    return shards[0] if parameter.cut.dim is None else torch.cat(shards, dim=parameter.cut.dim)


def parts_of(parameter: Parameter, full: Tensor, shape: ShapeConfig) -> tuple[Tensor, ...]:
    """Transformers' tensors from our full one, without padding; views at times."""
    if parameter.cut is Cut.GROUPS:
        groups, sizes = shape.num_query_groups, [part.shape(sizes_of(shape))[0] for part in parameter.parts]
        by_group = full.unflatten(0, (groups, -1)).split([size // groups for size in sizes], dim=1)
        return tuple(part.flatten(0, 1) for part in by_group)
    if parameter.cut is Cut.HALVES:
        return full.chunk(len(parameter.parts))
    return (full[: shape.vocab_size] if parameter.cut is Cut.VOCABULARY else full,)
