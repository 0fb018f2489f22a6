"""Whether a configuration fits on given GPUs, and what its step takes: bytes by rank and part, FLOPs, seconds.

All of it is arithmetic on the settings and the model's shape; neither weights nor data are read. Where the data are not
there, every example is taken to fill a row of `data.max_length` positions and every position to carry loss: the most
that can be. Masters on the host are listed, and do not count towards the GPU's memory. `precision.compute=fp8` is
planned as bf16: products of what trains take bf16's time, and what Transformer Engine keeps in FP8 is not counted.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megatron_scalebio.active_layers import Role, draw_active_layers, period_of
from megatron_scalebio.config import Config
from megatron_scalebio.plan.flops import Flops, Work, six_n_equivalent, step_flops, work_of
from megatron_scalebio.plan.memory import pass_bytes
from megatron_scalebio.plan.seconds import H100, Device, StepTime, device_of, predict_step, stage_loads
from megatron_scalebio.plan.sizes import GIB, on_device, rank_bytes, stage_layers

Draws = Sequence[Sequence[Collection[int]]]  # by period, by model

# Means over the draws are taken over so many periods at most.
MOST_PERIODS = 64


@dataclass(frozen=True)
class StageMemory:
    """What each rank of a stage holds when its device holds most; masters on the host are the most of any period."""

    stage: int
    period: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return on_device(self.parts)

    @property
    def largest_part(self) -> str:
        return max((part for part in self.parts if part != "host masters"), key=self.parts.__getitem__)


@dataclass(frozen=True)
class Plan:
    """One configuration on `world_size` GPUs of `memory` bytes."""

    config: Config
    world_size: int
    memory: int
    device: Device
    draws: Draws
    stages: list[StageMemory]

    @staticmethod
    def of(
        config: Config,
        world_size: int,
        memory: int = H100.memory,
        device: Device | None = None,
        draws: Draws | None = None,
    ) -> "Plan":
        """The plan of a resolved configuration on `world_size` GPUs.

        Args:
            memory: bytes of one GPU.
            device: whose ceilings count; None: that of a GPU of so much memory.
            draws: `draws_of(config)`, where they are at hand: no layout changes them.

        Raises: ValueError, for a configuration that is not resolved, or a number of GPUs that it does not divide.
        """
        parallel = config.parallel
        if parallel.layers_per_stage is None or config.model.shape.vocab_size is None:
            raise ValueError("Plan.of takes a resolved configuration: that of open_config(...) or open_run(...)")
        if world_size % (parallel.tensor * parallel.pipeline):
            raise ValueError(f"{world_size} GPUs are no multiple of {parallel.tensor} x {parallel.pipeline}")
        draws = draws or draws_of(config)
        plan = Plan(config, world_size, memory, device or device_of(memory), draws, [])
        plan.stages.extend(
            stage_memory(config, plan.data_parallel, stage, draws) for stage in range(config.parallel.pipeline)
        )
        return plan

    @property
    def data_parallel(self) -> int:
        return self.world_size // (self.config.parallel.tensor * self.config.parallel.pipeline)

    @property
    def fullest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        return self.fullest.total <= self.memory

    def stage_of(self, rank: int) -> int:
        """Tensor-parallel ranks are innermost, then data-parallel ones; stages are outermost."""
        return rank // (self.world_size // self.config.parallel.pipeline)

    @property
    def verdict(self) -> str:
        """One sentence."""
        stage = self.fullest
        rank = stage.stage * (self.world_size // self.config.parallel.pipeline)
        needs = f"rank {rank} (stage {stage.stage}) needs {stage.total / GIB:.1f} GiB of {self.memory / GIB:.1f}"
        if self.fits:
            return f"fits: the fullest, {needs}"
        part = stage.largest_part
        return f"does not fit: {needs}; largest part: {part}, {stage.parts[part] / GIB:.1f} GiB"

    @cached_property
    def num_microbatches(self) -> list[int]:
        """Of each pass of a step, on one data-parallel rank."""
        return num_microbatches(self.config, self.data_parallel)

    @cached_property
    def time(self) -> StepTime:
        loads = stage_loads(self.config, self.draws[:MOST_PERIODS])
        work = micro_batch_work(self.config)
        sizes = (self.config, self.data_parallel, self.device)
        return predict_step(*sizes, loads, work, self.num_microbatches)

    @cached_property
    def flops(self) -> Flops:
        """Of one step on all ranks, the mean over the draws."""
        work, draws = micro_batch_work(self.config) * self.data_parallel, self.draws[:MOST_PERIODS]
        train, validation = (work * number for number in (self.num_microbatches[0], self.num_microbatches[-1]))
        total = sum((step_flops(self.config, draw, train, validation) for draw in draws), Flops())
        return total * (1 / len(draws))

    @property
    def positions(self) -> int:
        """Of one step on all ranks, those of all passes."""
        return sum(self.num_microbatches) * self.data_parallel * micro_batch_work(self.config).positions

    def as_json(self) -> dict[str, Any]:
        """The plan for other programs; bytes are whole numbers, times seconds."""
        ranks = [
            {
                "rank": rank,
                "stage": self.stage_of(rank),
                "total_bytes": self.stages[self.stage_of(rank)].total,
                "parts": self.stages[self.stage_of(rank)].parts,
            }
            for rank in range(self.world_size)
        ]
        step = {
            "flops": self.flops.executed,
            "bubble": self.time.bubble,
            "predicted_seconds": self.time.seconds,
            "model_flops": self.flops.model,
            "six_n_equivalent": six_n_equivalent(self.config, self.positions),
            "bubble_of_one_flush": self.time.bubble_fused,
            "bubble_of_separate_flushes": self.time.bubble_separate,
            "sent_bytes": self.time.sent,
            "seconds_by_part": self.time.parts,
        }
        return {
            "fits": self.fits,
            "verdict": self.verdict,
            "gpu_memory_bytes": self.memory,
            "layout": layout_of(self.config, self.data_parallel),
            "ranks": ranks,
            "step": step,
        }


def draws_of(config: Config) -> list[list[list[int]]]:
    """The active layers of every period, of each model that the run has, upper last."""
    roles = list(Role) if config.bilevel.mode == "bilevel" else [Role.UPPER]
    draws = []
    for period in range(period_of(config.bilevel.steps, config.lisa) + 1):
        drawn = draw_active_layers(config.lisa, config.model.shape.num_layers, config.run.seed, period)
        draws.append([drawn[role] for role in roles])
    return draws


def stage_memory(config: Config, data_parallel: int, stage: int, draws: Draws) -> StageMemory:
    """A stage at its fullest over all periods. Masters on the host grow as layers train, and peak in another period
    than the device: they are the most of all periods."""
    layers = set(stage_layers(config, stage))
    frozen_embedding = "embedding" not in config.lisa.always_active
    flush = sum(num_microbatches(config, data_parallel))
    thawed: list[set[int]] = [set() for _ in draws[0]]
    fullest: dict[tuple[int, ...], StageMemory] = {}
    of_pass: dict[tuple[int, int], dict[str, int]] = {}
    for period, draw in enumerate(draws):
        active = [layers.intersection(drawn) for drawn in draw]
        thawed = [before | new for before, new in zip(thawed, active, strict=True)]
        # All layers are of one size, so that periods alike in these numbers hold equal bytes: they are counted once.
        lowest = [min(drawn) if frozen_embedding else 0 for drawn in draw]
        counts = [len(own) for own in (*active, *thawed, set().union(*active), set().union(*thawed))]
        key = (*lowest, *counts)
        if key not in fullest:
            parts = rank_bytes(config, data_parallel, stage, active, thawed)
            for alike, drawn in zip(zip(lowest, counts, strict=False), draw, strict=True):
                if alike not in of_pass:
                    of_pass[alike] = pass_bytes(config, data_parallel, stage, drawn, flush)
            parts |= max((of_pass[alike] for alike in zip(lowest, counts, strict=False)), key=lambda p: sum(p.values()))
            fullest[key] = StageMemory(stage, period, parts)
    peak = max(fullest.values(), key=lambda memory: memory.total)
    host_masters = max(memory.parts["host masters"] for memory in fullest.values())
    return replace(peak, parts=peak.parts | {"host masters": host_masters})


def num_microbatches(config: Config, data_parallel: int) -> list[int]:
    """Of each pass of a step on one data-parallel rank, every example filling a row of its own."""
    bilevel = config.bilevel
    rows = [bilevel.global_batch_size]
    if bilevel.mode == "bilevel":
        rows = [rows[0], rows[0], bilevel.validation_batch_size]
    return [-(-number // (config.data.micro_batch_size * data_parallel)) for number in rows]


def micro_batch_work(config: Config) -> Work:
    """Rows that one example fills, every position carrying loss."""
    rows, length = config.data.micro_batch_size, config.data.max_length
    return work_of([length] * rows, rows * length, rows * length, config.model.shape.sliding_window)


def layout_of(config: Config, data_parallel: int) -> dict[str, Any]:
    """What a layout is, in the settings' words."""
    parallel = config.parallel
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "data": data_parallel,
        "layers_per_stage": [len(stage_layers(config, stage)) for stage in range(parallel.pipeline)],
        "sequence": parallel.sequence,
        "micro_batch_size": config.data.micro_batch_size,
        "recompute": parallel.recompute,
        "frozen_weights": config.precision.frozen_weights,
        "moments": config.optimizer.moments,
    }
