"""What a run needs of this machine, checked in its first seconds: GPUs' memory, NCCL, host memory, shared memory, disk.

What is needed comes from the plan, by arithmetic; what is there is asked of the system. Every problem is told at once.
"""

import shutil
import sys
from pathlib import Path

from megatron_scalebio.anatomy.decoder import OUTER_BLOCKS
from megatron_scalebio.anatomy.storage import padded_block
from megatron_scalebio.config import Config, UserError
from megatron_scalebio.device import find_cuda, gpu_memory, has_nccl
from megatron_scalebio.plan.planner import Plan
from megatron_scalebio.plan.sizes import (
    GIB,
    MASTER_BYTES,
    WEIGHT_BYTES,
    layer_numel,
    model_parameters,
    stage_blocks,
)
from megatron_scalebio.run_folder import RunFolder

SHARED_MEMORY = 2**30  # bytes that NCCL may take of /dev/shm with eight ranks; Docker gives 64 MiB unless asked
MEMORY_INFO, CONTROL_GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
# On the CPU these parts are the host's memory; what else the plan counts is of CUDA.
STATE = ("frozen weights", "active weights", "gradients", "masters", "moments", "host masters")


def check_machine(config: Config, world_size: int, ranks_here: int) -> None:
    """Check this machine for `ranks_here` of the run's ranks. Raises: UserError, with all that is missing."""
    on_cuda = config.run.device != "cpu" and find_cuda()
    memory = gpu_memory(ranks_here) if on_cuda else 0
    plan = Plan.of(config, world_size, memory)
    problems = _host_memory(plan, ranks_here, on_cuda) + _disk(plan)
    if on_cuda and config.precision.compute == "fp64":
        problems.append(
            f"precision.compute=fp64 is for parity on the CPU, and run.device={config.run.device} takes this machine's"
            " GPU: set run.device=cpu"
        )
    elif on_cuda:
        problems += _gpus(plan) + _communication(ranks_here, world_size)
    if problems:
        raise UserError("\n".join(problems))


def _gpus(plan: Plan) -> list[str]:
    """What does not fit even without the assumed reserve is a problem; what needs part of it may fit, and is tried."""
    if plan.fits:
        return []
    told = f"on this machine's GPUs the run {plan.verdict}"
    if max(stage.total - stage.parts["allocator reserve"] for stage in plan.stages) > plan.memory:
        return [f"{told}; python -m megatron_scalebio plan searches other layouts"]
    print(f"warning: {told}; without the allocator reserve, which is assumed, it fits, so it is tried", file=sys.stderr)
    return []


def _communication(ranks_here: int, world_size: int) -> list[str]:
    if world_size > 1 and not has_nccl():
        return ["this torch has no NCCL, which ranks on GPUs talk through: install one that has, or use run.device=cpu"]
    shared = Path("/dev/shm")
    if ranks_here > 1 and shared.is_dir() and (size := shutil.disk_usage(shared).total) < SHARED_MEMORY:
        return [
            f"/dev/shm has {size / GIB:.2f} GiB, and NCCL needs {SHARED_MEMORY / GIB:.0f} for {ranks_here} ranks: start"
            " the container with --shm-size=16g or --ipc=host, as examples/ngc.sh does"
        ]
    return []


def _host_memory(plan: Plan, ranks_here: int, on_cuda: bool) -> list[str]:
    """The fullest of the machine's ranks are taken: which ranks will be here is the launcher's to say."""
    available = host_memory()
    if available is None:
        return []
    if on_cuda:
        by_stage = [_page_locked(plan, stage.parts["host masters"]) for stage in plan.stages]
    else:
        by_stage = [sum(stage.parts[part] for part in STATE) for stage in plan.stages]
    by_stage.sort(reverse=True)
    per_stage = plan.world_size // len(plan.stages)
    by_rank = [size for size in by_stage for _ in range(per_stage)]
    needed = sum(by_rank[:ranks_here])
    if needed <= available:
        return []
    what, remedy = "weights, gradients and optimizer state", "use a smaller model, or GPUs"
    if on_cuda:
        what = "exact masters of layers that have trained"
        remedy = "take fewer bilevel.steps or a longer lisa.period, so that fewer layers train, or more machines"
    return [
        f"the host's memory: {ranks_here} ranks need {needed / GIB:.1f} GiB of it for {what}, and"
        f" {available / GIB:.1f} GiB are available: {remedy}"
    ]


def _page_locked(plan: Plan, host_masters: int) -> int:
    """Bytes that a rank's masters on the host take page-locked: torch rounds each, the shard of a decoder layer, up to
    a power of two."""
    config = plan.config
    layer = layer_numel(config.model, config.parallel.tensor)
    shard = padded_block(layer, plan.data_parallel) // plan.data_parallel * MASTER_BYTES[config.precision.compute]
    return host_masters // shard * 2 ** (shard - 1).bit_length()


def host_memory() -> int | None:
    """Bytes that this machine, or the container's limit, has left for programs; None where Linux does not tell."""
    try:
        lines = MEMORY_INFO.read_text().splitlines()
    except OSError:
        return None
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    try:  # control groups, version 2
        limit = (CONTROL_GROUP / "memory.max").read_text().strip()
        used = int((CONTROL_GROUP / "memory.current").read_text())
        used_for = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return available
    if limit == "max" or available is None:
        return available
    file_cache = int(used_for["active_file"]) + int(used_for["inactive_file"])  # given up for whoever needs memory
    return min(available, int(limit) - used + file_cache)


def _disk(plan: Plan) -> list[str]:
    config = plan.config
    folder = Path(config.run.output_dir)
    while not folder.exists():
        folder = folder.parent
    number, size = checkpoints(plan)
    export = export_bytes(config)
    needed, free = number * size + export, shutil.disk_usage(folder).free
    if needed <= free:
        return []
    remedies = [f"raise run.save_every={config.run.save_every}"] if number > 1 else []
    remedies += ["set run.export=false"] if export else []
    return [
        f"run.output_dir={config.run.output_dir}: {number} checkpoint{'' if number == 1 else 's'} of up to"
        f" {size / GIB:.1f} GiB and an export of {export / GIB:.1f} GiB need {needed / GIB:.1f} GiB, and"
        f" {free / GIB:.1f} are free: {', or '.join([*remedies, 'write elsewhere'])}"
    ]


def checkpoints(plan: Plan) -> tuple[int, int]:
    """Number of checkpoints that the run has yet to write, and bytes of its largest: exact weights of what has trained,
    moments of what trains, and what both models share unless it is a layer that is read again from where it came from
    (FP8)."""
    config, run = plan.config, plan.config.run
    last = config.bilevel.steps
    regular = range(run.save_every, last + 1, run.save_every) if run.save_every else ()
    number = sum(step > _steps_done(config) for step in {*regular, *[last] * run.save_last})
    parts = ["masters", "host masters", "moments"]
    if config.precision.frozen_weights != "fp8":
        parts += ["frozen weights"]
    if not any(stage.parts["masters"] for stage in plan.stages):
        parts += ["active weights"]  # they are the masters
    ranks_per_stage = plan.world_size // len(plan.stages)
    replicas = {"frozen weights", "active weights"}  # over data parallelism; the rest is sharded
    size = sum(
        stage.parts[part] * ranks_per_stage // (plan.data_parallel if part in replicas else 1)
        for stage in plan.stages
        for part in parts
    )
    if config.precision.frozen_weights == "fp8":
        size += _frozen_tables(plan)
    return number, size


def _steps_done(config: Config) -> int:
    """The step that the run continues from: its newest checkpoint's, 0 where it begins."""
    if config.run.resume != "auto":
        return 0
    return RunFolder(Path(config.run.output_dir)).newest_step() or 0


def _frozen_tables(plan: Plan) -> int:
    """Bytes, over all ranks, of the frozen blocks that are no decoder layer. They are stored once and never in FP8, so
    a checkpoint has them whatever it does with frozen layers."""
    config = plan.config
    always = config.lisa.always_active
    numels = [
        padded_block(numel, plan.data_parallel)
        for stage in range(config.parallel.pipeline)
        for block, numel in stage_blocks(config, stage).items()
        if block in OUTER_BLOCKS and block not in always
    ]
    return sum(numels) * config.parallel.tensor * WEIGHT_BYTES[config.precision.compute]


def export_bytes(config: Config) -> int:
    """Bytes of the models that the run has yet to export."""
    run, folder = config.run, RunFolder(Path(config.run.output_dir))
    chosen = ["upper", "lower"] if run.export_model == "both" else [run.export_model]
    left = [role for role in chosen if run.resume == "never" or not folder.exported(role).exists()]
    each = model_parameters(config.model) * WEIGHT_BYTES[run.export_dtype]
    return len(left) * each if run.export else 0
