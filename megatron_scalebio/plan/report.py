"""What `plan` prints: a configuration's layout, its bytes, its step, and layouts that do better."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_scalebio.config import Config, UserError
from megatron_scalebio.plan.flops import six_n_equivalent
from megatron_scalebio.plan.memory import CUDA_CONTEXT, FRAGMENTATION, NCCL_COMMUNICATOR
from megatron_scalebio.plan.planner import Plan, layout_of
from megatron_scalebio.plan.search import ROOM, search_layouts
from megatron_scalebio.plan.seconds import EFFICIENCY, HOST_LINK, NETWORK, NVLINK, Device, device_of
from megatron_scalebio.plan.sizes import GIB, model_parameters
from megatron_scalebio.rules import check_config

MOST_LAYOUTS = 6


def write_plan(config: Config, num_gpus: int | None, gib: float, json_file: str | None) -> bool:
    """Print the plan of a resolved configuration and the best layouts, and write them to a file.

    Args:
        num_gpus: None: as many as the configuration's layout has.
        gib: memory of one GPU.

    Returns: whether the configuration fits.
    """
    started = time.perf_counter()
    own_size = config.parallel.tensor * config.parallel.pipeline
    world_size, memory, device = num_gpus or own_size, int(gib * GIB), device_of(int(gib * GIB))
    try:
        check_config(config, world_size, None)
        own = Plan.of(config, world_size, memory, device)
        verdict, lines = own.verdict, [*plan_lines(own)]
    except UserError as error:
        own, verdict = None, f"does not run on {world_size} GPUs: {error}"
        lines = [f"the configuration's own layout {verdict}"]
    best = search_layouts(config, world_size, memory, device)
    lines += ["", *search_lines(best, world_size, memory), f"(searched in {time.perf_counter() - started:.1f} s)", ""]
    print("\n".join([*lines, *ceiling_lines(device)]))
    if json_file is not None:
        content = {"fits": False, "gpu_memory_bytes": memory, "layout": layout_of(config, 0), "ranks": [], "step": None}
        content = own.as_json() if own else content
        content |= {"verdict": verdict, "best": [_summary(plan) for plan in best[:MOST_LAYOUTS]]}
        try:
            Path(json_file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {json_file}: {error.strerror or error}") from error
    return own is not None and own.fits


def _summary(plan: Plan) -> dict[str, Any]:
    return {
        "layout": layout_of(plan.config, plan.data_parallel),
        "settings": settings_of(plan.config),
        "total_bytes": plan.fullest.total,
        "bubble": plan.time.bubble,
        "predicted_seconds": plan.time.seconds,
    }


def plan_lines(plan: Plan) -> Iterator[str]:
    """The configuration's own layout: whether it fits, and what its step takes."""
    config, step, flops = plan.config, plan.time, plan.flops
    yield parameters_line(plan)
    yield layout_line(plan)
    yield batch_line(config)
    numbers = " + ".join(map(str, plan.num_microbatches))
    yield (
        f"assumed: every example fills {config.data.max_length} positions, and all carry loss (the most that can be);"
        f" so {numbers} micro-batches a step"
    )
    yield ""
    yield from memory_lines(plan)
    yield from compute_lines(config)
    yield plan.verdict
    yield ""
    yield f"a step, predicted from ceilings of {plan.device.name} below; nothing of it is measured:"
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in step.parts.items())
    yield f"  {step.seconds:.2f} s ({parts})"
    rate = flops.executed / step.seconds / plan.world_size
    full = six_n_equivalent(config, plan.positions)
    yield (
        f"  {flops.executed:.3g} FLOPs executed, {flops.model:.3g} of them the model's, the rest computed twice;"
        f" {rate / 1e12:.0f} TFLOP/s per GPU (6 N-equivalent of training all parameters: {full:.3g} FLOPs)"
    )
    if config.parallel.pipeline > 1:
        both = f"{step.bubble_fused:.1%} of it in one flush for all passes, {step.bubble_separate:.1%} in one for each"
        yield f"  bubble: stages wait {both}"
    sent = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in step.sent.items() if size)
    yield f"  sent by the busiest rank: {sent} GiB" if sent else "  nothing is sent between ranks"


def ceiling_lines(device: Device) -> Iterator[str]:
    """What the predictions stand on."""
    peaks = " and ".join(f"{peak / 1e12:.0f} {kind}" for kind, peak in device.flops.items())
    links = f"NVLink {NVLINK / 1e9:.0f}, network {NETWORK / 1e9:.0f}, host {HOST_LINK / 1e9:.0f} GB/s each way"
    yield f"ceilings ({device.name}, data sheet): {peaks} dense TFLOP/s, {device.bandwidth / 1e12:.2f} TB/s; {links}"
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in EFFICIENCY.items())
    yield f"assumed shares of them that are reached: {shares}; communication overlaps with nothing"
    yield (
        f"assumed memory of others: CUDA context {CUDA_CONTEXT / GIB:.2f} GiB, NCCL {NCCL_COMMUNICATOR / GIB:.2f} GiB"
        f" per communicator, fragmentation {FRAGMENTATION:.0%} of activations and loss buffers"
    )


def search_lines(plans: Sequence[Plan], world_size: int, memory: int) -> Iterator[str]:
    """The best layouts as a table, and the settings of each."""
    room, gpus = f"{ROOM:.0%}", f"{world_size} GPU{'s' if world_size > 1 else ''} of {memory / GIB:.1f} GiB"
    if not plans:
        yield f"no layout fits {room} of {gpus}"
        yield (
            "  less is taken with more GPUs, a smaller data.max_length, or embedding and head left frozen"
            " (lisa.always_active=[final_norm])"
        )
        return
    shown = plans[:MOST_LAYOUTS]
    yield f"best layouts that fit {room} of {gpus}, by predicted step time:"
    rows = [
        ["", "seconds", "TFLOP/s", "bubble", "GiB", "layout", "micro-batch", "recompute", "frozen weights", "moments"]
    ]
    for number, plan in enumerate(shown, 1):
        layout = layout_of(plan.config, plan.data_parallel)
        rows.append(
            [
                str(number),
                f"{plan.time.seconds:.2f}",
                f"{plan.flops.executed / plan.time.seconds / world_size / 1e12:.0f}",
                f"{plan.time.bubble:.1%}",
                f"{plan.fullest.total / GIB:.1f}",
                f"tensor {layout['tensor']}{' + sequence' if layout['sequence'] else ''} x pipeline"
                f" {layout['pipeline']} x data {layout['data']}",
                f"{layout['micro_batch_size']} x {plan.config.data.max_length}",
                layout["recompute"],
                layout["frozen_weights"] or plan.config.precision.compute,
                layout["moments"] or ("fp64" if plan.config.precision.compute == "fp64" else "fp32"),
            ]
        )
    yield from _table(rows)
    yield "their settings, to copy:"
    for number, plan in enumerate(shown, 1):
        yield f"  {number}  {' '.join(settings_of(plan.config))}"


def settings_of(config: Config) -> list[str]:
    """A layout as the overrides that choose it, quoted for a shell where need be."""
    parallel, stages = config.parallel, config.parallel.layers_per_stage
    values: dict[str, Any] = {
        "parallel.tensor": parallel.tensor,
        "parallel.pipeline": parallel.pipeline,
        "parallel.layers_per_stage": "null" if len(set(stages)) == 1 else f"[{','.join(map(str, stages))}]",
        "parallel.sequence": str(parallel.sequence).lower(),
        "parallel.recompute": parallel.recompute,
        "data.micro_batch_size": config.data.micro_batch_size,
        "precision.frozen_weights": config.precision.frozen_weights or "null",
        "optimizer.moments": config.optimizer.moments or "null",
    }
    return [f"'{key}={value}'" if "[" in str(value) else f"{key}={value}" for key, value in values.items()]


def layout_line(plan: Plan) -> str:
    layout = layout_of(plan.config, plan.data_parallel)
    counts = layout["layers_per_stage"]
    layers = f"{counts[0]} layers per stage" if len(set(counts)) == 1 else f"layers per stage {counts}"
    return (
        f"layout: {plan.world_size} ranks = tensor {layout['tensor']} x pipeline {layout['pipeline']}"
        f" x data {layout['data']}; {layers}"
    )


def batch_line(config: Config) -> str:
    bilevel, data = config.bilevel, config.data
    examples = f"{bilevel.global_batch_size} training examples"
    if bilevel.mode == "bilevel":
        examples += f" and {bilevel.validation_batch_size} validation examples"
    return (
        f"batch: {examples} per step, {data.sampling}, {'packed' if data.packing else 'padded'} into"
        f" micro-batches of {data.micro_batch_size} x {data.max_length} positions; {bilevel.steps} steps"
    )


def parameters_line(plan: Plan) -> str:
    models = "lower and upper" if plan.config.bilevel.mode == "bilevel" else "upper"
    count = model_parameters(plan.config.model)
    return f"parameters: {count:,} each of {models}; vocabulary {plan.config.model.shape.vocab_size:,}"


def compute_lines(config: Config) -> Iterator[str]:
    """What a plan leaves out of the compute dtype."""
    if config.precision.compute == "fp8":
        yield (
            "precision.compute=fp8 is planned as bf16: products of what trains take bf16's time, and what Transformer"
            " Engine keeps in FP8 is not counted"
        )


def memory_lines(plan: Plan) -> Iterator[str]:
    """One column for each stage."""
    unit, size = ("GiB", GIB) if plan.fullest.total > 4 * GIB else ("MiB", GIB / 1024)
    yield f"{unit} per rank, each stage in its fullest period:"
    rows = [["", *(f"stage {stage.stage}" for stage in plan.stages)]]
    for part in dict.fromkeys(part for stage in plan.stages for part in stage.parts):
        if part != "host masters":
            rows.append([part, *(f"{stage.parts.get(part, 0) / size:.2f}" for stage in plan.stages)])
    rows.append(["total on the device", *(f"{stage.total / size:.2f}" for stage in plan.stages)])
    rows.append(["masters on the host", *(f"{stage.parts['host masters'] / size:.2f}" for stage in plan.stages)])
    yield from _table(rows)


def _table(rows: list[list[str]]) -> Iterator[str]:
    """Columns as wide as their widest entry, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_number = [column[-1].replace(".", "").replace("%", "").isdigit() for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            entry.rjust(width) if right else entry.ljust(width)
            for entry, width, right in zip(row, widths, is_number, strict=True)
        )
        yield "  " + "  ".join(cells).rstrip()
