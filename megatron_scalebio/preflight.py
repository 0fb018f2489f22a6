"""What a run needs of this machine, checked in its first seconds: GPUs' memory, NCCL, host memory, shared memory, disk.

What is needed comes from the plan, by arithmetic; what is there is asked of the system. Every problem is told at once.
"""

import shutil
from pathlib import Path

from megatron_scalebio.config import Config, UserError
from megatron_scalebio.device import find_cuda, gpu_memory, has_nccl
from megatron_scalebio.estimates import model_parameters
from megatron_scalebio.planner import Plan, make_plan
from megatron_scalebio.step_memory import GIB
from megatron_scalebio.step_time import device_of

SHARED_MEMORY = 2**30  # bytes that NCCL may take of /dev/shm with eight ranks; Docker gives 64 MiB unless asked
EXPORT_BYTES = {"bf16": 2, "fp32": 4}
# On the CPU these parts are the host's memory; what else the plan counts is of CUDA.
STATE = ("frozen weights", "active weights", "gradients", "masters", "moments", "host masters")


def check_machine(config: Config, vocab_size: int, world_size: int, ranks_here: int) -> None:
    """Check this machine for `ranks_here` of the run's ranks. Raises: UserError, with all that is missing."""
    on_cuda = config.run.device != "cpu" and find_cuda()
    memory = gpu_memory() if on_cuda else 0
    plan = make_plan(config, vocab_size, world_size, memory, device_of(memory / GIB))
    problems = _host_memory(plan, ranks_here, on_cuda) + _disk(plan)
    if on_cuda:
        problems += _gpus(plan) + _communication(ranks_here, world_size)
    if problems:
        raise UserError("\n".join(problems))


def _gpus(plan: Plan) -> list[str]:
    if plan.fits:
        return []
    return [f"on this machine's GPUs the run {plan.verdict}; python -m megatron_scalebio plan searches other layouts"]


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
    parts = ("host masters",) if on_cuda else STATE
    by_stage = sorted((sum(stage.parts[part] for part in parts) for stage in plan.stages), reverse=True)
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


def host_memory() -> int | None:
    """Bytes that this machine, or the container's limit, has left for programs; None where Linux does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    try:  # control groups, version 2
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return available
    if limit == "max" or available is None:
        return available
    return min(available, int(limit) - used)


def _disk(plan: Plan) -> list[str]:
    config = plan.config
    folder = Path(config.run.output_dir)
    while not folder.exists():
        folder = folder.parent
    number, size = checkpoints(plan)
    export = export_bytes(config, plan.vocab_size) if config.run.export else 0
    needed, free = number * size + export, shutil.disk_usage(folder).free
    if needed <= free:
        return []
    return [
        f"run.output_dir={config.run.output_dir}: {number} checkpoints of up to {size / GIB:.1f} GiB and an export of"
        f" {export / GIB:.1f} GiB need {needed / GIB:.1f} GiB, and {free / GIB:.1f} are free: raise"
        f" run.save_every={config.run.save_every}, set run.export=false, or write elsewhere"
    ]


def checkpoints(plan: Plan) -> tuple[int, int]:
    """Number of checkpoints of the run, and bytes of its largest: exact weights of what has trained, moments of what
    trains, and what both models share unless it is read again from where it came from (FP8)."""
    config, run = plan.config, plan.config.run
    number = 1 if run.save_every == 0 else -(-config.bilevel.steps // run.save_every)
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
    return number, size


def export_bytes(config: Config, vocab_size: int) -> int:
    """Bytes of the upper model as it is exported."""
    dtype = config.run.export_dtype or config.precision.compute
    return model_parameters(config.model.family, config.model.shape, vocab_size) * EXPORT_BYTES.get(dtype, 4)
