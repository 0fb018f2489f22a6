"""What of both models a checkpoint holds, and how it comes back (`checkpoint.Checkpointable`)."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_scalebio.active_layers import Role
from megatron_scalebio.mcore.active_set import ActiveSet
from megatron_scalebio.mcore.process_groups import ProcessGroups
from megatron_scalebio.mcore.weight_store import WeightStore, data_parallel_shard, gather_weights


class Persistence:
    """The blocks of this rank's models, exact, and the optimizer state of those that train, or that is kept."""

    def __init__(self, store: WeightStore, active_sets: dict[Role, ActiveSet], groups: ProcessGroups):
        self.store, self.active_sets, self.groups = store, active_sets, groups

    def state(self) -> dict[str, Any]:
        """What a checkpoint must know before tensors are loaded: which blocks are still shared, which have a master on
        the host, and Adam's counts. Of all stages, equal on every rank; every rank must call it."""
        stages: list[Any] = [None] * self.groups.num_stages
        dist.all_gather_object(stages, self._stage_state(), group=self.groups.pipeline)
        return {
            "shared": [name for stage in stages for name in stage["shared"]],
            "host_masters": [entry for stage in stages for entry in stage["host_masters"]],
            "num_updates": {
                role: {name: count for stage in stages for name, count in stage["num_updates"][role].items()}
                for role in stages[0]["num_updates"]
            },
        }

    def _stage_state(self) -> dict[str, Any]:
        return {
            "shared": [name for name in self.store.blocks[Role.UPPER] if self.store.is_shared(name)],
            "host_masters": [[role.value, name] for role, name in self.store.masters],
            "num_updates": {
                role.value: {name: adam.num_updates for name, adam in active_set.adam_states().items()}
                for role, active_set in self.active_sets.items()
            },
        }

    def exact(self, role: Role, name: str) -> Tensor | None:
        """This rank's data-parallel shard of a block, exact; None for one in FP8 that has never been active."""
        active, block = self.active_sets[role].blocks.get(name), self.store.blocks[role][name]
        if active is not None:
            return active.master
        if (role, name) in self.store.masters:
            return self.store.masters[role, name]
        return None if block.weights is None else block.weights[data_parallel_shard(block.numel, self.groups)]

    def sharded_tensors(self) -> dict[str, ShardedTensor]:
        """This rank's tensors for a checkpoint, by key: every block's exact weights, cut over data parallelism.

        Blocks in FP8 that have never been active are left out: they are read from where they came from.
        """
        tensors = {}
        for role, blocks in self.store.blocks.items():
            for name in blocks:
                shared, exact = self.store.is_shared(name), self.exact(role, name)
                if exact is None or (shared and role is Role.UPPER):
                    continue
                key = f"{'shared' if shared else role.value}/{name}"
                tensors[f"{key}/weights"] = exact
                if (adam := self.active_sets[role].adam_states().get(name)) is not None:
                    tensors |= {f"{key}/{part}": tensor for part, tensor in adam.tensors().items()}
        cut = (0, self.groups.data.rank(), self.groups.data.size())
        return {
            key: ShardedTensor.from_rank_offsets(f"{key}/tensor_rank_{self.groups.tensor_rank}", tensor, cut)
            for key, tensor in tensors.items()
        }

    def prepare_to_load(self, state: dict[str, Any]) -> None:
        """Bring blocks and optimizer state into the shape that a checkpoint's `state` describes."""
        for role, blocks in self.store.blocks.items():
            for name, block in blocks.items():
                if name not in state["shared"]:
                    self.store.own(role, name)
                if [role.value, name] in state["host_masters"]:
                    length = block.numel // self.groups.data.size()
                    self.store.masters.put((role, name), torch.zeros(length, device=self.store.device))
            active_set = self.active_sets[role]
            for name in state["num_updates"][role.value]:
                if name in blocks and name not in active_set.blocks:
                    active_set.waiting[name] = active_set.new_adam_state(blocks[name])
            for name, adam in active_set.adam_states().items():
                adam.num_updates = state["num_updates"][role.value][name]

    def load_tensors(self, loaded: dict[str, Tensor]) -> None:
        """Copy a checkpoint's tensors in, then make each block what its exact weights say."""
        for key, target in self.sharded_tensors().items():
            target.data.copy_(loaded[key])
        for name in {name: None for _, name in self.store.masters}:
            self.store.restore(name)
        for role, blocks in self.store.blocks.items():
            for name, block in blocks.items():
                done = (role, name) in self.store.masters or (role is Role.UPPER and self.store.is_shared(name))
                if block.weights is not None and not done:
                    shard = data_parallel_shard(block.numel, self.groups)
                    exact = self.exact(role, name)
                    assert exact is not None
                    block.weights[shard] = exact
                    gather_weights(block.weights, shard, self.groups)
