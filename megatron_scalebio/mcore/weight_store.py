"""Where every weight of both models lives, block by block: shared-frozen, frozen or active.

A block is one flat tensor in the compute dtype whose slices are its parameters. A block that has never been active is
the same in both models and is stored once ("shared until thawed"): the first thaw gives the model that thaws it a
copy of its own. Below fp32 a frozen block's exact master survives on the host, this rank's data-parallel shard of it:
rounding it back would swallow updates smaller than the rounding.

A flat tensor is padded, so that data-parallel ranks have shards of one size. Within it matrices come first, which are
decayed, then vectors that are sharded over tensor parallelism, then replicated ones: the counting in global norms is by
region.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_scalebio.active_layers import Role
from megatron_scalebio.estimates import padded_block
from megatron_scalebio.mcore.parameters import NamedParameter


@dataclass(frozen=True)
class Region:
    """A range of a flat block whose parameters count alike."""

    start: int
    stop: int
    replicated: bool  # over tensor parallelism
    duplicate: bool  # counted in global norms on another rank


@dataclass
class Block:
    """The parameters of one model that freeze and thaw as one."""

    name: str
    parameters: list[NamedParameter]
    offsets: list[int]  # of each parameter in the flat tensor
    regions: list[Region]
    num_decayed: int  # weight decay: matrices only, which come first, never norms and biases
    numel: int  # of the flat tensor, padding included
    weights: Tensor = field(repr=False, default=None)  # [numel], compute dtype

    def hold(self, weights: Tensor) -> None:
        """Make a flat tensor this block's storage."""
        self.weights = weights
        for parameter, view in zip(self.parameters, self.views(weights), strict=True):
            parameter.tensor.data = view

    def views(self, flat: Tensor) -> list[Tensor]:
        """The slices of a flat tensor, in the parameters' shapes."""
        return [
            flat[offset : offset + parameter.tensor.numel()].view(parameter.tensor.shape)
            for parameter, offset in zip(self.parameters, self.offsets, strict=True)
        ]


def make_blocks(
    parameters: list[NamedParameter], data_parallel_size: int, like: dict[str, Block] | None = None
) -> dict[str, Block]:
    """Cut a model's parameters into blocks, each stored in one flat tensor: zeros until weights are loaded.

    Args:
        like: the blocks of the other model, whose storage these share.
    """
    members: dict[str, list[NamedParameter]] = {}
    for parameter in parameters:
        members.setdefault(parameter.block, []).append(parameter)
    blocks = {name: _make_block(name, group, data_parallel_size) for name, group in members.items()}
    for name, block in blocks.items():
        if like is not None:
            block.hold(like[name].weights)
        else:
            first = block.parameters[0].tensor
            block.hold(torch.zeros(block.numel, dtype=first.dtype, device=first.device))
    return blocks


def _make_block(name: str, parameters: list[NamedParameter], data_parallel_size: int) -> Block:
    def is_vector(parameter: NamedParameter) -> bool:
        return parameter.tensor.ndim < 2

    def counting(parameter: NamedParameter) -> tuple[bool, bool]:
        return parameter.shard_dim is None, parameter.duplicate

    ordered = sorted(parameters, key=lambda parameter: (is_vector(parameter), *counting(parameter)))
    offsets, regions, offset = [], [], 0
    for parameter in ordered:
        stop = offset + parameter.tensor.numel()
        if offsets and counting(ordered[len(offsets) - 1]) == counting(parameter):
            start = regions.pop().start
        else:
            start = offset
        offsets.append(offset)
        regions.append(Region(start, stop, *counting(parameter)))
        offset = stop
    num_decayed = sum(parameter.tensor.numel() for parameter in ordered if not is_vector(parameter))
    return Block(name, ordered, offsets, regions, num_decayed, padded_block(offset, data_parallel_size))


class WeightStore:
    """The blocks of the models of one rank, and the exact masters of frozen blocks that were once active."""

    def __init__(self, blocks: dict[Role, dict[str, Block]]):
        self.blocks = blocks
        self.masters: dict[tuple[Role, str], Tensor] = {}  # host memory

    def is_shared(self, name: str) -> bool:
        """Whether both models still hold one copy of a block."""
        if Role.LOWER not in self.blocks:
            return False
        lower, upper = self.blocks[Role.LOWER][name], self.blocks[Role.UPPER][name]
        return lower.weights.data_ptr() == upper.weights.data_ptr()

    def thaw(self, role: Role, name: str, master_dtype: torch.dtype, shard: slice) -> tuple[Block, Tensor]:
        """Make a block trainable, in storage of its own.

        Returns the block and this rank's master of `block.weights[shard]`, exact. Where the compute dtype is the
        master's, the master is that slice itself.
        """
        block = self.blocks[role][name]
        if self.is_shared(name):
            block.hold(block.weights.clone())
        for parameter in block.parameters:
            parameter.tensor.requires_grad_(True)
        weights = block.weights[shard]
        if weights.dtype == master_dtype:
            return block, weights
        kept = self.masters.pop((role, name), None)
        return block, weights.to(master_dtype) if kept is None else kept.to(weights.device)

    def freeze(self, role: Role, name: str, master: Tensor | None = None) -> None:
        """Stop training a block; its master, if it was active and rounds in the compute dtype, moves to the host."""
        block = self.blocks[role][name]
        for parameter in block.parameters:
            parameter.tensor.requires_grad_(False)
        if master is not None and master.dtype != block.weights.dtype:
            self.masters[role, name] = master.cpu()

    def num_bytes(self) -> dict[str, int]:
        """Bytes of weights by state (shared, own), and of the masters kept on the host."""
        shared = own = 0
        for role, blocks in self.blocks.items():
            for name, block in blocks.items():
                size = block.weights.nbytes
                if not self.is_shared(name):
                    own += size
                elif role is Role.LOWER:
                    shared += size
        return {"shared": shared, "own": own, "host_masters": sum(master.nbytes for master in self.masters.values())}
