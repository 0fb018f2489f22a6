"""The two models on Megatron-Core, behind the protocol that a bilevel step needs (`bilevel.Models`)."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_scalebio.active_layers import Role
from megatron_scalebio.bilevel import NonFinite, Pass
from megatron_scalebio.config import Config
from megatron_scalebio.data.batch import MicroBatch
from megatron_scalebio.device import read_back
from megatron_scalebio.hf import Checkpoint
from megatron_scalebio.hf.mapping import read_shard
from megatron_scalebio.losses import TokenCoefs
from megatron_scalebio.mcore.active_set import ActiveSet
from megatron_scalebio.mcore.build import build_model
from megatron_scalebio.mcore.dual_model import DualModel, run_flush
from megatron_scalebio.mcore.parameters import NamedParameter, layer_block, named_parameters, random_shard
from megatron_scalebio.mcore.process_groups import ProcessGroups
from megatron_scalebio.mcore.weight_store import WeightStore, data_parallel_shard, gather_weights, make_blocks
from megatron_scalebio.spans import Span, span


class MegatronModels:
    """Lower and upper model (upper alone in mode fixed) of this rank, equal at the start.

    Args:
        vocab_size: the model's vocabulary, before padding.
        initial_weights: this rank's shard of a parameter before training; by default from `model.hf_path`, else random.
        loads: begin at the initial weights. Without, a checkpoint must be loaded; what it leaves out, blocks in FP8
            that never trained, begins there all the same.
    """

    def __init__(
        self,
        config: Config,
        groups: ProcessGroups,
        device: torch.device,
        vocab_size: int,
        initial_weights: Callable[[NamedParameter], Tensor] | None = None,
        loads: bool = True,
    ):
        self.config, self.groups, self.device = config, groups, device
        self.shape = replace(config.model.shape, vocab_size=vocab_size)
        roles = list(Role) if config.bilevel.mode == "bilevel" else [Role.UPPER]
        models = {role: build_model(config, groups, device, vocab_size) for role in roles}
        blocks = {role: make_blocks(named_parameters(models[role], groups), groups.data.size()) for role in roles}
        quantizes = config.precision.frozen_weights == "fp8"
        initial = initial_weights or self._initial_weights()
        self.store = WeightStore(blocks, groups, device, initial if loads or quantizes else None, quantizes)
        self.dtype = models[Role.UPPER].config.params_dtype
        te = config.model.implementation == "te"
        self.chunk = DualModel(models, groups, vocab_size, device, te)
        self.active_sets = {role: ActiveSet(role, self.store, groups, config) for role in roles}

    def _initial_weights(self) -> Callable[[NamedParameter], Tensor]:
        model, place = self.config.model, (self.groups.tensor_rank, self.groups.tensor.size())
        if model.hf_path is None:
            return partial(random_shard, model.shape, self.config.run.seed, *place)
        checkpoint = Checkpoint(model.hf_path)
        return lambda parameter: read_shard(checkpoint, model.family, self.shape, parameter.name, *place)

    def redraw(self, active_layers: dict[Role, list[int]]) -> None:
        """Make the given decoder layers active, and what always trains; freeze the rest."""
        always = self.config.lisa.always_active
        with span(Span.REDRAW):
            for role, active_set in self.active_sets.items():
                active_set.redraw(always + [layer_block(layer) for layer in active_layers[role]])
                self.chunk.redraw(role, active_layers[role], embedding="embedding" in always)

    def forward_backward(self, passes: list[Pass], fingerprint: int) -> list[Tensor]:
        """See `bilevel.Models`. One flush carries all passes; `parallel.fused_pipeline=false` runs one flush each."""
        with span(Span.OPTIMIZER):
            for active_set in self.active_sets.values():
                active_set.zero_gradients()
        sums = self._run(passes, forward_only=False)
        losses = self._add_over_ranks(passes, sums, fingerprint)
        with span(Span.OPTIMIZER):
            on_device = torch.stack([active_set.reduce_gradients() for active_set in self.active_sets.values()])
        norms = dict(zip(self.active_sets, read_back(on_device), strict=True))
        if not all(map(math.isfinite, norms.values())):
            own = [active.gradient for active_set in self.active_sets.values() for active in active_set.blocks.values()]
            raise NonFinite(self._first_rank_with_non_finite(own), passes, losses, norms)
        return losses

    def evaluate(self, part: Pass) -> float:
        """Mean loss of a pass, without gradients."""
        with torch.no_grad():
            (loss,) = self._add_over_ranks([part], self._run([part], forward_only=True), fingerprint=0)
        return loss.item()

    def token_losses(self, micro_batch: MicroBatch) -> Tensor:
        """The upper model's raw loss of every loss token, [N] fp64 on the host, equal on every rank; data-parallel
        ranks must be given the same micro-batch."""
        num_tokens = len(micro_batch.targets)
        ones = torch.ones(num_tokens, dtype=torch.float64)
        each = replace(micro_batch, source_ids=torch.arange(num_tokens))
        part = Pass(Role.UPPER, "test", [each], [TokenCoefs(ones, ones)], num_tokens)
        with torch.no_grad():
            (sums,) = self._add_over_ranks([part], self._run([part], forward_only=True), fingerprint=0)
        return sums / self.groups.data.size()

    def step(self, role: Role, lr: float, max_norm: float | None) -> Tensor:
        """See `bilevel.Models`."""
        with span(Span.OPTIMIZER):
            return self.active_sets[role].step(lr, max_norm)

    def state(self) -> dict:
        """What a checkpoint must know before tensors are loaded: which blocks are still shared, which have a master on
        the host, and Adam's counts. Of all stages, equal on every rank; every rank must call it."""
        stages: list = [None] * self.groups.num_stages
        dist.all_gather_object(stages, self._stage_state(), group=self.groups.pipeline)
        return {
            "shared": [name for stage in stages for name in stage["shared"]],
            "host_masters": [entry for stage in stages for entry in stage["host_masters"]],
            "num_updates": {
                role: {name: count for stage in stages for name, count in stage["num_updates"][role].items()}
                for role in stages[0]["num_updates"]
            },
        }

    def _stage_state(self) -> dict:
        return {
            "shared": [name for name in self.store.blocks[Role.UPPER] if self.store.is_shared(name)],
            "host_masters": [[role.value, name] for role, name in self.store.masters],
            "num_updates": {
                role.value: {name: active.num_updates for name, active in active_set.blocks.items()}
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
                if (active := self.active_sets[role].blocks.get(name)) is not None:
                    moments = {"exp_avg": active.exp_avg, "exp_avg_sq": active.exp_avg_sq}
                    for moment, parts in moments.items():
                        tensors |= {f"{key}/{moment}/{part}": tensor for part, tensor in parts.tensors().items()}
        cut = (0, self.groups.data.rank(), self.groups.data.size())
        return {
            key: ShardedTensor.from_rank_offsets(f"{key}/tensor_rank_{self.groups.tensor_rank}", tensor, cut)
            for key, tensor in tensors.items()
        }

    def prepare_to_load(self, state: dict) -> None:
        """Bring blocks and optimizer state into the shape that a checkpoint's `state` describes."""
        for role, blocks in self.store.blocks.items():
            for name, block in blocks.items():
                if name not in state["shared"]:
                    self.store.own(role, name)
                if [role.value, name] in state["host_masters"]:
                    length = block.numel // self.groups.data.size()
                    self.store.masters.put((role, name), torch.zeros(length, device=self.device))
            for name, active in self.active_sets[role].blocks.items():
                active.num_updates = state["num_updates"][role.value][name]

    def load_tensors(self, loaded: dict[str, Tensor]) -> None:
        """Copy a checkpoint's tensors in, then make each block what its exact weights say."""
        for key, target in self.sharded_tensors().items():
            target.data.copy_(loaded[key])
        for role, blocks in self.store.blocks.items():
            for name, block in blocks.items():
                if (role, name) in self.store.masters:
                    self.store.restore(role, name)
                elif block.weights is not None and not (role is Role.UPPER and self.store.is_shared(name)):
                    shard = data_parallel_shard(block.numel, self.groups)
                    block.weights[shard] = self.exact(role, name)
                    gather_weights(block.weights, shard, self.groups)

    def _run(self, passes: list[Pass], forward_only: bool) -> list[Tensor]:
        if self.config.parallel.fused_pipeline:
            return run_flush(self.chunk, passes, forward_only)
        return [run_flush(self.chunk, [part], forward_only)[0] for part in passes]

    def _add_over_ranks(self, passes: list[Pass], sums: list[Tensor], fingerprint: int) -> list[Tensor]:
        """Global losses per pass on the host, equal on every rank, by one all-reduce of a few fp64 numbers.

        The fingerprint rides along: with h its value, sum(h) and sum(h^2) equal world * h and world * h^2 on every
        rank only if all ranks hold the same h (exact in fp64 for 20 bits).
        """
        local = torch.cat(sums)
        mine = local if self.groups.tensor_rank == 0 else torch.zeros_like(local)
        check = torch.tensor([fingerprint, fingerprint**2], dtype=torch.float64, device=self.device)
        total = torch.cat([mine, check])
        with span(Span.WAITING):
            dist.all_reduce(total)
            *values, first, second = read_back(total)
        world = self.groups.world_size
        if (first, second) != (world * fingerprint, world * fingerprint**2):
            raise RuntimeError(
                f"rank {self.groups.rank}: the ranks disagree on the step, the logits or the active layers "
                f"(fingerprint {fingerprint} here); the run stops before any update"
            )
        losses = list(torch.tensor(values, dtype=torch.float64).split([len(part) for part in sums]))
        if not all(map(math.isfinite, values)):
            raise NonFinite(self._first_rank_with_non_finite([local]), passes, losses)
        return losses

    def _first_rank_with_non_finite(self, tensors: list[Tensor]) -> int:
        bad = not all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
        rank = torch.tensor(self.groups.rank if bad else self.groups.world_size, device=self.device)
        dist.all_reduce(rank, op=dist.ReduceOp.MIN)
        return int(rank)
