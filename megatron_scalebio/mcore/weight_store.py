"""Where every weight of both models lives, block by block: shared-frozen, frozen or active.

A block in the compute dtype is one flat tensor whose slices are its parameters. Under `precision.frozen_weights=fp8`
the matrices of a frozen decoder layer exist in FP8 alone: thawing restores the flat tensor, freezing rounds it anew. A
block that has never been active is the same in both models and is stored once ("shared until thawed"): the first thaw
gives the model that thaws it a copy of its own.

A layer that has trained is frozen in both models at once: lower's in FP8, upper's as that and, in FP8, what it differs
by. The gap lives on that difference, far smaller than a step of FP8: rounded each for itself, the two came to differ by
whole steps where a number had crossed the middle of one. That was noise as large as the gap of SmolLM2 after 30 steps,
and the same one for a whole period, so that no mean over steps takes it out. A difference costs no memory. Products of
FP8 with FP8 (`precision.frozen_inputs=fp8`) have no place for a sum: there each model rounds for itself.

What rounds loses nothing: the exact master of a block that was active survives on the host while it is frozen, this
rank's data-parallel shard of it, and is what thaws. Rounding back would swallow updates smaller than the rounding. A
block in FP8 that has never been active has no master: it is read from where it came from.

A flat tensor is padded, so that data-parallel ranks have shards of one size; how parameters lie in it is told in
`anatomy.storage`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalebio.active_layers import Role
from megatron_scalebio.anatomy.decoder import OUTER_BLOCKS
from megatron_scalebio.anatomy.storage import Region, flat_layout, padded_block
from megatron_scalebio.kernels.fp8 import SCALE_BLOCK, BlockScaled, quantize
from megatron_scalebio.mcore.host_masters import HostMasters
from megatron_scalebio.mcore.parameters import NamedParameter
from megatron_scalebio.mcore.process_groups import ProcessGroups


@dataclass(frozen=True)
class QuantizedWeights:
    """A frozen layer's weights: FP8 matrices, and vectors in the compute dtype."""

    matrices: list[BlockScaled]  # in the order of the block's parameters, which matrices begin
    vectors: Tensor  # the rest of the flat block

    @property
    def nbytes(self) -> int:
        """What upper's layer is beside is lower's."""
        own = [matrix.difference or matrix for matrix in self.matrices]
        return self.vectors.nbytes + sum(matrix.data.nbytes + matrix.scale.nbytes for matrix in own)


@dataclass
class Block:
    """The parameters of one model that freeze and thaw as one. It holds either of `weights` and `quantized`."""

    name: str
    parameters: list[NamedParameter]
    offsets: list[int]  # of each parameter in the flat tensor
    regions: list[Region]
    num_decayed: int  # weight decay: matrices only, which come first, never norms and biases
    numel: int  # of the flat tensor, padding included
    weights: Tensor | None = field(repr=False, default=None)  # [numel], compute dtype
    quantized: QuantizedWeights | None = field(repr=False, default=None)

    @property
    def is_layer(self) -> bool:
        return self.name not in OUTER_BLOCKS

    @property
    def flat(self) -> Tensor:
        """The weights of a block that is not quantized."""
        assert self.weights is not None
        return self.weights

    @property
    def stored(self) -> Tensor | QuantizedWeights:
        """What holds the weights; one object for two blocks that share it."""
        return self.flat if self.quantized is None else self.quantized

    def hold(self, stored: Tensor | QuantizedWeights) -> None:
        """Make a flat tensor, or what `quantize` made of one, this block's storage."""
        quantized = isinstance(stored, QuantizedWeights)
        self.weights, self.quantized = (None, stored) if quantized else (stored, None)
        if not quantized:
            for parameter, view in zip(self.parameters, self.views(stored), strict=True):
                parameter.tensor.data, parameter.tensor.quantized = view, None
            return
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            tensor, start = parameter.tensor, offset - self.num_decayed
            if start >= 0:
                tensor.data = stored.vectors[start : start + tensor.numel()]
            else:  # one number, not this one's to compute with
                tensor.data = tensor.new_full((), torch.nan).expand(tensor.shape)
        for parameter, matrix in zip(self.parameters, stored.matrices, strict=False):
            parameter.tensor.quantized = matrix

    def quantize(self) -> QuantizedWeights:
        """What the flat tensor holds, in FP8: a function of its numbers alone, equal for equal weights."""
        matrices = [quantize(view, SCALE_BLOCK) for view in self.views(self.flat) if view.ndim == 2]
        return QuantizedWeights(matrices, self.flat[self.num_decayed :].clone())

    def quantize_beside(self, other: "Block", quantized: QuantizedWeights) -> QuantizedWeights:
        """What the flat tensor holds, as what it differs by from `other`'s, of which `quantized` has been made."""
        views = zip(self.views(self.flat), other.views(other.flat), strict=True)
        differences = [quantize(mine - others, SCALE_BLOCK) for mine, others in views if mine.ndim == 2]
        pairs = zip(quantized.matrices, differences, strict=True)
        matrices = [replace(matrix, difference=difference) for matrix, difference in pairs]
        return QuantizedWeights(matrices, self.flat[self.num_decayed :].clone())

    def views(self, flat: Tensor) -> list[Tensor]:
        """The slices of a flat tensor, in the parameters' shapes."""
        return [
            flat[offset : offset + parameter.tensor.numel()].view(parameter.tensor.shape)
            for parameter, offset in zip(self.parameters, self.offsets, strict=True)
        ]


def make_blocks(parameters: list[NamedParameter], data_parallel_size: int) -> dict[str, Block]:
    """Cut a model's parameters into blocks, which hold nothing yet."""
    members: dict[str, list[NamedParameter]] = {}
    for parameter in parameters:
        members.setdefault(parameter.block, []).append(parameter)
    return {name: _make_block(name, group, data_parallel_size) for name, group in members.items()}


def _make_block(name: str, parameters: list[NamedParameter], data_parallel_size: int) -> Block:
    layout = flat_layout([parameter.item for parameter in parameters])
    ordered = [parameters[index] for index in layout.order]
    numel = padded_block(layout.numel, data_parallel_size)
    return Block(name, ordered, layout.offsets, layout.regions, layout.num_decayed, numel)


class WeightStore:
    """The blocks of the models of one rank, and the exact masters of frozen blocks that were once active.

    Args:
        blocks: of each model; they begin frozen, and share their storage.
        initial: this rank's shard of a parameter before training, on any device; None: zeros, until a checkpoint's
            weights are loaded.
        quantizes: hold frozen decoder layers in FP8.
        differences: upper's that have trained as what they differ by from lower's.
    """

    def __init__(
        self,
        blocks: dict[Role, dict[str, Block]],
        groups: ProcessGroups,
        device: torch.device,
        initial: Callable[[NamedParameter], Tensor] | None,
        quantizes: bool,
        differences: bool,
    ):
        self.blocks, self.groups, self.initial = blocks, groups, initial
        self.quantizes, self.differences = quantizes, differences
        self.device, self.masters = device, HostMasters(device)
        for name, block in next(iter(blocks.values())).items():
            block.hold(self.initial_weights(block))
            if self._rounds_frozen(block):
                block.hold(block.quantize())
            for role in blocks:
                blocks[role][name].hold(block.stored)
                for parameter in blocks[role][name].parameters:
                    parameter.tensor.requires_grad_(False)

    def initial_weights(self, block: Block) -> Tensor:
        """A block's flat tensor before training."""
        flat = torch.zeros(block.numel, dtype=block.parameters[0].tensor.dtype, device=self.device)
        if self.initial is not None:
            for parameter, view in zip(block.parameters, block.views(flat), strict=True):
                view.copy_(self.initial(parameter))
        return flat

    def is_shared(self, name: str) -> bool:
        """Whether both models still hold one copy of a block."""
        if Role.LOWER not in self.blocks:
            return False
        return self.blocks[Role.LOWER][name].stored is self.blocks[Role.UPPER][name].stored

    def thaw(self, role: Role, name: str, master_dtype: torch.dtype) -> tuple[Block, Tensor]:
        """Make a block trainable, in storage of its own.

        Returns the block and this rank's master of its shard of the weights, exact. Where the compute dtype is the
        master's, the master is that slice of the weights itself.
        """
        block, master = self.blocks[role][name], self.masters.take((role, name))
        if block.quantized is not None:
            block.hold(self._never_active(role, name) if master is None else self._rounded(block, master))
        elif self.is_shared(name):
            block.hold(block.flat.clone())
        for parameter in block.parameters:
            parameter.tensor.requires_grad_(True)
        weights = block.flat[data_parallel_shard(block.numel, self.groups)]
        if weights.dtype == master_dtype:
            return block, weights
        return block, weights.to(master_dtype) if master is None else master

    def freeze(self, role: Role, name: str, master: Tensor) -> None:
        """Stop training a block; its master moves to the host if what stays on the device is not it."""
        block = self.blocks[role][name]
        for parameter in block.parameters:
            parameter.tensor.requires_grad_(False)
        if self._rounds_frozen(block) or master.dtype != block.flat.dtype:
            self.masters.put((role, name), master)
        # Draws are shared: what one model freezes, the other freezes in this very redraw.
        self._round(name, list(self.blocks) if self.differences else [role])

    def own(self, role: Role, name: str) -> None:
        """Give a block that is still shared storage of its own, which a checkpoint is about to fill."""
        block = self.blocks[role][name]
        if self.is_shared(name):  # FP8 is not written over, but replaced
            block.hold(block.flat.clone() if block.quantized is None else replace(block.quantized))

    def restore(self, name: str) -> None:
        """Make a block, of the models that hold it frozen and once active, what its masters on the host say."""
        roles = [role for role in self.blocks if (role, name) in self.masters]
        for role in roles:
            block = self.blocks[role][name]
            block.hold(self._rounded(block, self.masters[role, name].to(self.device)))
        self._round(name, roles)

    def _round(self, name: str, roles: list[Role]) -> None:
        """Hold a frozen block in FP8, in those of these models that hold it flat; of both, in one and a difference."""
        of_models = [self.blocks[role][name] for role in roles]
        blocks = [block for block in of_models if self._rounds_frozen(block) and block.quantized is None]
        made: list[QuantizedWeights] = []
        for block in blocks:
            beside = self.differences and made
            made.append(block.quantize_beside(blocks[0], made[0]) if beside else block.quantize())
        for block, quantized in zip(blocks, made, strict=True):
            block.hold(quantized)

    def _never_active(self, role: Role, name: str) -> Tensor:
        """The flat tensor of a block in FP8 that has never been active in this model.

        FP8 needs shared draws: if the other model holds the block flat, it has thawed it in this very redraw, and no
        update has come since. Its weights are the initial ones, which need not be read a second time.
        """
        for other in self.blocks.keys() - {role}:
            if (weights := self.blocks[other][name].weights) is not None:
                return weights.clone()
        return self.initial_weights(self.blocks[role][name])

    def _rounds_frozen(self, block: Block) -> bool:
        return self.quantizes and block.is_layer

    def _rounded(self, block: Block, master: Tensor) -> Tensor:
        """The flat tensor of the compute dtype that the ranks' shards of an exact master make."""
        shard = data_parallel_shard(block.numel, self.groups)
        flat = torch.empty(block.numel, dtype=block.parameters[0].tensor.dtype, device=self.device)
        flat[shard] = master
        gather_weights(flat, shard, self.groups)
        return flat

    def num_bytes(self) -> dict[str, int]:
        """Bytes of weights by state (shared, own), and of the masters kept on the host."""
        shared = own = 0
        for role, blocks in self.blocks.items():
            for name, block in blocks.items():
                size = block.stored.nbytes
                if not self.is_shared(name):
                    own += size
                elif role is Role.LOWER:
                    shared += size
        return {"shared": shared, "own": own, "host_masters": self.masters.nbytes}


def data_parallel_shard(numel: int, groups: ProcessGroups) -> slice:
    """This rank's range of a flat block of `numel` numbers, a multiple of the data-parallel size."""
    length = numel // groups.data.size()
    return slice(groups.data.rank() * length, (groups.data.rank() + 1) * length)


def gather_weights(flat: Tensor, shard: slice, groups: ProcessGroups) -> None:
    """Make a block's weights whole again where each data-parallel rank has changed its own shard."""
    if groups.data.size() > 1:
        dist.all_gather_into_tensor(flat, flat[shard].clone(), group=groups.data)
