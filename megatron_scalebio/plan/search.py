"""The layouts that fit a number of GPUs, by predicted step time.

Searched: tensor and pipeline parallelism, layers per stage, micro-batch size, sequence parallelism, recomputation, and
how frozen weights and Adam's moments are stored. What a run learns is left alone: which blocks train, the batch, the
lengths. Of two plans that differ in time by less than 1% the one that rounds less is preferred.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from megatron_scalebio.config import SETTINGS, Config, UserError
from megatron_scalebio.plan.memory import saved_layer_bytes
from megatron_scalebio.plan.planner import Draws, Plan, draws_of, micro_batch_work
from megatron_scalebio.plan.seconds import Device, StageLoad, stage_seconds
from megatron_scalebio.plan.sizes import frozen_layer_bytes, stage_layers
from megatron_scalebio.rules import check_config

MOST_POSITIONS = 65_536  # of one micro-batch
SAME_TIME = 0.01
ROOM = 0.9  # of a GPU's memory that a layout found may fill: estimates err, and a run must not die of it in its middle


class _Given(NamedTuple):
    """What no layout changes, as `Plan.of` takes it."""

    world_size: int
    memory: int
    device: Device
    draws: Draws


def search_layouts(config: Config, world_size: int, memory: int, device: Device) -> list[Plan]:
    """Plans that fit, best first: the best of each (tensor, pipeline, frozen weights)."""
    best: dict[tuple[int, int, str | None], Plan] = {}
    given = _Given(world_size, memory, device, draws_of(config))
    too_large = set()  # where no micro-batch of a size fits, no larger one does
    for candidate in _candidates(config, world_size):
        parallel = candidate.parallel
        key = parallel.tensor, parallel.pipeline, candidate.precision.frozen_weights
        if (*key, parallel.sequence) in too_large:
            continue
        plan = _least_recomputed(candidate, given)
        if plan is None:
            too_large.add((*key, parallel.sequence))
            continue
        if key not in best or _order(plan) < _order(best[key]):
            best[key] = plan
    return sorted(best.values(), key=_order)


def _order(plan: Plan) -> tuple[int, int, float]:
    rounding = SETTINGS["optimizer.moments"].choices.index(plan.config.optimizer.moments)
    rounding += plan.config.precision.frozen_weights == "fp8"
    return round(math.log(plan.time.seconds) / SAME_TIME), rounding, plan.time.seconds


def _candidates(config: Config, world_size: int) -> Iterator[Config]:
    """Layouts that the rules accept, with equal stages and no recomputation; smaller micro-batches come first."""
    num_layers = config.model.shape.num_layers
    rounds = config.precision.compute in ("bf16", "fp8")
    frozen_choices = (None, "fp8") if rounds else (config.precision.frozen_weights,)
    for tensor, pipeline in product((1, 2, 4, 8), range(1, min(world_size, num_layers) + 1)):
        if world_size % (tensor * pipeline):
            continue
        stages = _fill([0.0] * pipeline, [1.0] * pipeline, num_layers)
        row_counts = _row_counts(config, world_size // (tensor * pipeline))
        for rows, sequence, frozen in product(row_counts, (False, True)[: min(tensor, 2)], frozen_choices):
            parallel = dict(tensor=tensor, pipeline=pipeline, layers_per_stage=stages, sequence=sequence)
            candidate = replace(
                config,
                parallel=replace(config.parallel, **parallel, recompute="none"),
                data=replace(config.data, micro_batch_size=rows),
                precision=replace(config.precision, frozen_weights=frozen),
            )
            if _is_allowed(candidate, world_size):
                yield candidate


def _row_counts(config: Config, data_parallel: int) -> Iterator[int]:
    """Micro-batch sizes: powers of two that a data-parallel rank's share of the batch and the largest size allow."""
    rows = 1
    while rows * data_parallel <= config.bilevel.global_batch_size:
        if rows > 1 and rows * config.data.max_length > MOST_POSITIONS:
            return
        yield rows
        rows *= 2


def _is_allowed(config: Config, world_size: int) -> bool:
    try:
        check_config(config, world_size, None)
    except UserError:
        return False
    return True


def _least_recomputed(candidate: Config, given: _Given) -> Plan | None:
    """The best plan that fits. Moments that round more are tried only for what they save in recomputation."""
    plans, allowed = [], list(SETTINGS["parallel.recompute"].choices)
    for moments in SETTINGS["optimizer.moments"].choices:
        if moments is not None and candidate.precision.compute == "fp64":
            continue
        for index, recompute in enumerate(allowed):
            layout = replace(
                candidate,
                parallel=replace(candidate.parallel, recompute=recompute),
                optimizer=replace(candidate.optimizer, moments=moments),
            )
            if not _is_allowed(layout, given.world_size):
                continue
            fitting = [plan for plan in _staged(layout, given) if plan.fullest.total <= ROOM * given.memory]
            if fitting:
                plans.append(min(fitting, key=lambda plan: plan.time.seconds))
                allowed = allowed[:index]
                break
    return min(plans, key=_order) if plans else None


def _staged(layout: Config, given: _Given) -> Iterator[Plan]:
    """The layout with equal stages, with stages balanced by time, and by memory."""
    equal = Plan.of(layout, *given)
    yield equal
    pipeline = layout.parallel.pipeline
    if pipeline == 1:
        return
    data_parallel, work = equal.data_parallel, micro_batch_work(layout)
    share = len(equal.draws[0][-1]) / layout.model.shape.num_layers
    sizes = data_parallel, given.device

    def seconds(load: StageLoad) -> list[float]:
        return [sum(pair) for pair in zip(*stage_seconds(layout, *sizes, [load] * pipeline, work), strict=True)]

    fixed = seconds(StageLoad(0, 0, 0))
    layer = [both - alone for both, alone in zip(seconds(StageLoad(1, 1, share)), fixed, strict=True)]
    splits = [_fill(fixed, layer, layout.model.shape.num_layers)]
    if equal.fullest.total > ROOM * given.memory:
        counts = [len(stage_layers(layout, stage)) for stage in range(pipeline)]
        per_layer = [
            2 * frozen_layer_bytes(layout, data_parallel) + (pipeline - stage) * saved_layer_bytes(layout, False)
            for stage in range(pipeline)
        ]
        totals = [stage.total for stage in equal.stages]
        rest = [total - count * size for total, count, size in zip(totals, counts, per_layer, strict=True)]
        splits.append(_fill(rest, per_layer, layout.model.shape.num_layers))
    for split in splits:
        parallel = replace(layout.parallel, layers_per_stage=split)
        yield Plan.of(replace(layout, parallel=parallel), *given)


def _fill(fixed: Sequence[float], per_layer: Sequence[float], num_layers: int) -> list[int]:
    """Layers of each stage such that the largest `fixed + layers * per_layer` is as small as can be."""
    counts = [1] * len(fixed)
    for _ in range(num_layers - len(counts)):
        stage = min(range(len(counts)), key=lambda s: fixed[s] + (counts[s] + 1) * per_layer[s])
        counts[stage] += 1
    return counts
