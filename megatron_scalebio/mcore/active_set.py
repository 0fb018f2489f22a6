"""What trains: the active blocks of one model, their gradients and optimizer state.

State exists for the active blocks only, sharded over data parallelism: per block one full gradient in the master dtype
(the parameters' `main_grad` are its slices), and this rank's shard of master and moments. A block that stays active
over a redraw keeps its state; one that freezes loses it, and one that thaws starts anew, unless `lisa.keep_moments`
has Adam's state wait on the device, as the original's optimizer does.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron_scalebio.active_layers import Role
from megatron_scalebio.anatomy.storage import Region
from megatron_scalebio.config import Config
from megatron_scalebio.kernels.adamw import adamw_update
from megatron_scalebio.kernels.moments import Moment
from megatron_scalebio.kernels.sum_of_squares import sum_of_squares
from megatron_scalebio.mcore.parameters import Weights
from megatron_scalebio.mcore.process_groups import ProcessGroups
from megatron_scalebio.mcore.weight_store import Block, WeightStore, data_parallel_shard, gather_weights

TIED_BLOCKS = ("embedding", "head")


@dataclass
class AdamState:
    """Of this rank's shard of a block."""

    exp_avg: Moment
    exp_avg_sq: Moment
    num_updates: int = 0  # Adam's bias correction counts each block's own

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, by name; views to save from and to load into."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {f"{name}/{part}": x for name, moment in moments.items() for part, x in moment.tensors().items()}

    @property
    def nbytes(self) -> int:
        return self.exp_avg.nbytes + self.exp_avg_sq.nbytes


@dataclass
class ActiveBlock:
    """An active block's training state. `shard` is this rank's range of the flat block."""

    block: Block
    shard: slice
    gradient: Tensor  # [numel] master dtype
    master: Tensor  # [numel / DP]
    adam: AdamState  # of numel / DP parameters

    def local_regions(self) -> list[tuple[Region, slice]]:
        """The regions that reach into this rank's shard, with their range within it."""
        low, high = self.shard.start, self.shard.stop
        bounds = [(region, max(region.start, low), min(region.stop, high)) for region in self.block.regions]
        return [(region, slice(start - low, stop - low)) for region, start, stop in bounds if start < stop]

    @property
    def has_own_master(self) -> bool:
        """Whether the master is more than the weights themselves."""
        return self.master.dtype != self.block.flat.dtype

    def num_bytes(self) -> int:
        """Bytes of gradient, moments and, where it is not the weights themselves, master."""
        parts = [self.gradient, *([self.master] if self.has_own_master else [])]
        return sum(part.nbytes for part in parts) + self.adam.nbytes


class ActiveSet:
    """The active blocks of one model on this rank: gradients reduced, clipped and applied by AdamW."""

    def __init__(self, role: Role, store: WeightStore, groups: ProcessGroups, config: Config):
        self.role, self.store, self.groups, self.optimizer = role, store, groups, config.optimizer
        self.sequence_parallel, self.tied = config.parallel.sequence, config.model.shape.tied_embeddings
        self.master_dtype = torch.float64 if config.precision.compute == "fp64" else torch.float32
        self.keeps_moments = config.lisa.keep_moments
        self.blocks: dict[str, ActiveBlock] = {}
        self.waiting: dict[str, AdamState] = {}  # of frozen blocks, where moments are kept
        self.norm: Tensor | None = None  # of the gradient at hand, before the clip
        self._hooks: dict[str, list[RemovableHandle]] = {}

    def redraw(self, names: list[str]) -> None:
        """Make exactly the named blocks active, of those that this stage holds."""
        for name in [name for name in self.blocks if name not in names]:
            self._freeze(name)
        for name in names:
            if name in self.store.blocks[self.role] and name not in self.blocks:
                self._thaw(name)

    def zero_gradients(self) -> None:
        for active in self.blocks.values():
            active.gradient.zero_()

    def reduce_gradients(self) -> Tensor:
        """Add up what the ranks hold of each gradient; after this the rank's shard of `gradient` is the global batch's.

        Over tensor parallelism, what is replicated and has seen a part of the sequence or of the heads only. Tied
        embeddings add up over the first and the last stage. Then one reduction over data parallelism.

        Returns: the L2 norm of the whole model's gradient, a scalar equal on every rank; every parameter counts once.
        """
        for name, active in self.blocks.items():
            for region in active.block.regions:
                if self._is_partial(region):
                    dist.all_reduce(active.gradient[region.start : region.stop], group=self.groups.tensor)
            if self.tied and name in TIED_BLOCKS and self.groups.num_stages > 1:
                dist.all_reduce(active.gradient, group=self.groups.embedding)
        if self.groups.data.size() > 1:
            for active in self.blocks.values():
                reduced = torch.empty_like(active.gradient[active.shard])
                dist.reduce_scatter_tensor(reduced, active.gradient, group=self.groups.data)
                active.gradient[active.shard] = reduced
        self.norm = self._gradient_norm()
        return self.norm

    def _is_partial(self, region: Region) -> bool:
        """Whether a rank's gradient of replicated parameters is one of the tensor-parallel ranks' summands."""
        counting, parallel = region.counting, self.groups.tensor.size() > 1
        return parallel and counting.replicated and (self.sequence_parallel or counting.sums_over_heads)

    def _gradient_norm(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.store.device)
        for active in self.blocks.values():
            gradient = active.gradient[active.shard]
            for region, local in active.local_regions():
                if not region.counting.duplicate:
                    total += sum_of_squares(gradient[local])
        dist.all_reduce(total)
        return total.sqrt()

    def adam_states(self) -> dict[str, AdamState]:
        """Of the active blocks, and of those whose state waits."""
        return {name: active.adam for name, active in self.blocks.items()} | self.waiting

    def new_adam_state(self, block: Block) -> AdamState:
        size = block.numel // self.groups.data.size()
        kind, device = self.optimizer.moments, self.store.device
        first, second = (Moment.zeros(size, kind, self.master_dtype, device) for _ in range(2))
        return AdamState(first, second)

    def step(self, lr: float, max_norm: float | None) -> Tensor:
        """Clip to `max_norm`, update the active blocks; returns the norm before the clip. Needs `reduce_gradients`."""
        norm = self.norm
        assert norm is not None
        unclipped = torch.ones_like(norm)
        scale = unclipped if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for active in self.blocks.values():
            self._update(active, lr, scale)
        return norm

    def _update(self, active: ActiveBlock, lr: float, scale: Tensor) -> None:
        adam = active.adam
        adam.num_updates += 1
        weights, gradient = active.block.flat[active.shard], active.gradient[active.shard]
        beta1, beta2 = self.optimizer.betas
        of_matrices = min(max(active.block.num_decayed - active.shard.start, 0), len(gradient))
        adamw_update(
            weights if active.has_own_master else active.master,
            active.master,
            gradient,
            adam.exp_avg,
            adam.exp_avg_sq,
            num_decayed=len(gradient) if self.optimizer.decayed == "all" else of_matrices,
            step=adam.num_updates,
            lr=lr,
            betas=(beta1, beta2),
            eps=self.optimizer.eps,
            weight_decay=self.optimizer.weight_decay,
            gradient_scale=scale.to(gradient.dtype),
            first_index=active.shard.start,
        )
        gather_weights(active.block.flat, active.shard, self.groups)

    def _thaw(self, name: str) -> None:
        block, master = self.store.thaw(self.role, name, self.master_dtype)
        gradient = torch.zeros(block.numel, dtype=self.master_dtype, device=master.device)
        adam = self.waiting.pop(name, None) or self.new_adam_state(block)
        shard = data_parallel_shard(block.numel, self.groups)
        self.blocks[name] = ActiveBlock(block, shard, gradient, master, adam)
        views = block.views(gradient)
        for parameter, view in zip(block.parameters, views, strict=True):
            parameter.tensor.main_grad = view
        self._hooks[name] = [
            parameter.tensor.register_post_accumulate_grad_hook(_accumulate_in_master_dtype)
            for parameter in block.parameters
        ]

    def _freeze(self, name: str) -> None:
        active = self.blocks.pop(name)
        for hook in self._hooks.pop(name):
            hook.remove()
        for parameter in active.block.parameters:
            del parameter.tensor.main_grad
            parameter.tensor.grad = None
        if self.keeps_moments:
            self.waiting[name] = active.adam
        self.store.freeze(self.role, name, active.master)


def _accumulate_in_master_dtype(parameter: Weights) -> None:
    """Move a micro-batch's gradient, in the compute dtype, into the fp32 sum over micro-batches.

    The head's has been added there by `head_loss`: autograd calls this all the same, with none.
    """
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None
