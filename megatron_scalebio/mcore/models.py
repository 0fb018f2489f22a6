"""The two models on Megatron-Core, behind the protocol that a bilevel step needs (`bilevel.Models`)."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalebio.active_layers import Role
from megatron_scalebio.anatomy import FAMILIES
from megatron_scalebio.anatomy.decoder import layer_block
from megatron_scalebio.bilevel import NonFinite, Pass
from megatron_scalebio.config import Config
from megatron_scalebio.data.batch import MicroBatch
from megatron_scalebio.device import read_back
from megatron_scalebio.hf import Checkpoint, read_shard
from megatron_scalebio.losses import TokenCoefs
from megatron_scalebio.mcore.active_set import ActiveSet
from megatron_scalebio.mcore.build import build_model
from megatron_scalebio.mcore.dual_model import DualModel, run_flush
from megatron_scalebio.mcore.parameters import NamedParameter, named_parameters, random_shard
from megatron_scalebio.mcore.persistence import Persistence
from megatron_scalebio.mcore.process_groups import ProcessGroups
from megatron_scalebio.mcore.weight_store import WeightStore, make_blocks
from megatron_scalebio.spans import Span, span


class MegatronModels:
    """Lower and upper model (upper alone in mode fixed) of this rank, equal at the start.

    Args:
        initial_weights: this rank's shard of a parameter before training; by default from `model.hf_path`, else random.
        loads: begin at the initial weights. Without, a checkpoint must be loaded; what it leaves out, blocks in FP8
            that never trained, begins there all the same.
    """

    def __init__(
        self,
        config: Config,
        groups: ProcessGroups,
        device: torch.device,
        initial_weights: Callable[[NamedParameter], Tensor] | None = None,
        loads: bool = True,
    ):
        self.config, self.groups, self.device = config, groups, device
        roles = list(Role) if config.bilevel.mode == "bilevel" else [Role.UPPER]
        models = {role: build_model(config, groups, device) for role in roles}
        family, ranks = FAMILIES[config.model.family], groups.data.size()
        blocks = {role: make_blocks(named_parameters(models[role], family, groups), ranks) for role in roles}
        quantizes = config.precision.frozen_weights == "fp8"
        initial = initial_weights or self._initial_weights()
        # Products of FP8 with FP8 have no place for the sum of a weight and a difference.
        differences = quantizes and config.precision.frozen_inputs == "compute"
        self.store = WeightStore(
            blocks, groups, device, initial if loads or quantizes else None, quantizes, differences
        )
        self.dtype = models[Role.UPPER].config.params_dtype
        te = config.model.implementation == "te"
        self.chunk = DualModel(models, groups, device, te)
        self.active_sets = {role: ActiveSet(role, self.store, groups, config) for role in roles}
        self.persistence = Persistence(self.store, self.active_sets, groups)

    def _initial_weights(self) -> Callable[[NamedParameter], Tensor]:
        model, place = self.config.model, (self.groups.tensor_rank, self.groups.tensor.size())
        if model.hf_path is None:
            return partial(random_shard, model.shape, self.config.run.seed, *place)
        checkpoint = Checkpoint(model.hf_path)
        return lambda parameter: read_shard(checkpoint, model, parameter.name, *place)

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

    def evaluate(self, part: Pass) -> Tensor:
        """Mean losses of a pass, [num_sources] fp64 on the host, without gradients."""
        with torch.no_grad():
            (losses,) = self._add_over_ranks([part], self._run([part], forward_only=True), fingerprint=0)
        return losses

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
