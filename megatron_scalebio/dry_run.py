"""`--dry-run`: what a run would do, and whether it fits, from the real step of every pipeline stage on fake tensors."""

import math
from collections.abc import Iterator
from dataclasses import replace

from megatron_scalebio.config import UserError
from megatron_scalebio.data import Dataset
from megatron_scalebio.device import find_cuda, gpu_memory
from megatron_scalebio.mcore.rehearsal import rehearse
from megatron_scalebio.plan.planner import Plan, StageMemory
from megatron_scalebio.plan.report import batch_line, compute_lines, layout_line, memory_lines, parameters_line
from megatron_scalebio.plan.seconds import H100
from megatron_scalebio.plan.sizes import GIB
from megatron_scalebio.resolution import changed_from_preset
from megatron_scalebio.run import Run


def dry_run(run: Run, world_size: int, gib: float | None) -> bool:
    """Print the layout, the batch, the data, what each stage holds, and what differs from the preset.

    For GPUs the memory is that of the real step, rehearsed on fake tensors; for the CPU it is arithmetic.

    Args:
        gib: memory of a GPU; None: this machine's, else an H100's.

    Returns: whether the run fits on its GPUs; of the CPU it is not asked. Raises: UserError.
    """
    if gib is not None and not 0 < gib < math.inf:
        raise UserError(f"--gpu-memory {gib:g}: must be positive and finite")
    config, plan = run.config, Plan.of(run.config, world_size)
    on_gpus = config.run.device != "cpu" and config.precision.compute != "fp64"
    if on_gpus:
        print("rehearsing a step of every pipeline stage on fake tensors ...", flush=True)
        stages = [rehearsed(plan, stage) for stage in range(config.parallel.pipeline)]
        memory = int(gib * GIB) if gib else gpu_memory(world_size) if find_cuda() else H100.memory
        plan = replace(plan, memory=memory, stages=stages)
    print("\n".join(_lines(plan, run.dataset)))
    if on_gpus:
        print(plan.verdict)
    return plan.fits or not on_gpus


def rehearsed(plan: Plan, stage: int) -> StageMemory:
    """What a stage holds of tensors at its peak, counted; the plan's reserves for what is no tensor, and its masters on
    the host, which are most in another period than the rehearsed one."""
    planned = plan.stages[stage]
    rank = stage * plan.world_size // plan.config.parallel.pipeline
    found = rehearse(plan.config, plan.world_size, rank, on_cuda=True)
    as_planned = ("communication buffers", "allocator reserve", "host masters")
    parts = dict.fromkeys(planned.parts, 0) | found.parts | {part: planned.parts[part] for part in as_planned}
    return StageMemory(stage, found.period, parts)


def _lines(plan: Plan, dataset: Dataset) -> Iterator[str]:
    config, bilevel = plan.config, plan.config.bilevel
    yield layout_line(plan)
    yield batch_line(config)
    for name, number in dataset.num_examples.items():
        truncated, dropped, twice = (
            of[name] for of in (dataset.num_truncated, dataset.num_dropped, dataset.num_duplicates)
        )
        repeated = f", {twice} exact duplicates" if twice else ""
        yield f"source {name}: {number} examples, {truncated} of them truncated{repeated}; {dropped} dropped"
    yield f"validation: {len(dataset.validation)} examples; test: {len(dataset.test)} examples"
    yield parameters_line(plan)
    yield from memory_lines(plan)
    yield from compute_lines(config)
    changes = changed_from_preset(config)
    yield f"differs from preset {bilevel.preset}:" if changes else f"settings as preset {bilevel.preset}"
    for key, (preset, value) in changes.items():
        yield f"  {key}: {value} (preset: {preset})"
    yield f"outputs: {config.run.output_dir}"
