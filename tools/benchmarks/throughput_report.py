"""What the numbers of a throughput run are, say and compare to: rates, utilisation, tables, Megatron-LM's log line."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch

from megatron_scalebio.config import Config
from megatron_scalebio.plan.flops import Flops, six_n_equivalent
from megatron_scalebio.plan.planner import Plan
from megatron_scalebio.plan.sizes import GIB
from megatron_scalebio.plan.utilization import PEAKS
from tools.benchmarks.throughput_run import Step
from tools.benchmarks.throughput_split import PARTS

# What the plan counts that is no tensor of torch's allocator, or not only.
NOT_TENSORS = ("host masters", "communication buffers", "allocator reserve")


@dataclass(frozen=True)
class Peak:
    """What a GPU does at best: TFLOP/s by the operands' type, or why it is not known."""

    name: str
    tflops: dict[str, float]
    reason: str | None = None


def peak_of(device: torch.device, device_name: str, given: float | None) -> Peak:
    """Args: given: --peak-tflops."""
    if given is not None:
        return Peak("given by --peak-tflops", {"given": given})
    if device.type != "cuda":
        return Peak("none", {}, "no peak is known of a CPU; --peak-tflops gives one")
    if device_name not in PEAKS:
        return Peak("none", {}, f"no peak is known of {device_name}; --peak-tflops gives one")
    tflops = {kind: peak / 1e12 for kind, peak in PEAKS[device_name].items()}
    return Peak(f"{device_name}, dense, NVIDIA's data sheet", tflops)


def results_of(steps: Sequence[Step], config: Config, world_size: int, peak: Peak) -> dict[str, Any]:
    """Times, rates and utilisation of steps; rates are totals over total time, redraws included."""
    seconds = [step.seconds for step in steps]
    total = sum(seconds)
    tokens = {
        "train_real": sum(step.train.real for step in steps),
        "train_padded": sum(step.train.work.positions for step in steps),
        "validation_real": sum(step.validation.real for step in steps),
        "validation_padded": sum(step.validation.work.positions for step in steps),
    }
    done = sum((step.flops for step in steps), Flops())
    flops = {
        "executed": done.executed,
        "model": done.model,
        "six_n_equivalent": six_n_equivalent(config, sum(step.positions for step in steps)),
    }
    rates = {kind: number / total / world_size / 1e12 for kind, number in flops.items()}
    deciles = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds
    return {
        "step_seconds": {
            "median": statistics.median(seconds),
            "p10": deciles[0],
            "p90": deciles[-1],
            "mean": total / len(steps),
        },
        "tokens_per_step": {kind: number / len(steps) for kind, number in tokens.items()},
        "tokens_per_second_per_gpu": {kind: number / total / world_size for kind, number in tokens.items()},
        "flops_per_step": {kind: number / len(steps) for kind, number in flops.items()},
        "tflops_per_gpu": rates,
        "utilization": {
            "peak": peak.name,
            "peak_tflops": peak.tflops,
            "reason": peak.reason,
            "mfu": {kind: rates["model"] / most for kind, most in peak.tflops.items()} or None,
            "hfu": {kind: rates["executed"] / most for kind, most in peak.tflops.items()} or None,
        },
    }


def against_plan(rank: int, measured: dict[str, int], plan: Plan) -> dict[str, Any]:
    """A rank's measured bytes beside the planned ones. On the CPU the process's growth counts: all that it holds and
    keeps, so this says little of a small model."""
    memory = plan.stages[plan.stage_of(rank)]
    tensors = sum(size for part, size in memory.parts.items() if part not in NOT_TENSORS)
    growth = measured.get("resident_bytes", 0) - measured.get("resident_before_bytes", 0)
    return {
        "rank": rank,
        "stage": memory.stage,
        **measured,
        "planned_tensor_bytes": tensors,
        "planned_total_bytes": memory.total,
        "planned_parts": memory.parts,
        "measured_over_planned": measured.get("allocated_bytes", growth) / tensors,
    }


def log_line(step: Step, num_steps: int, batch_size: int, world_size: int) -> str:
    """Megatron-LM's wording, order and formats (megatron/training/training.py, `training_log`, 0.19.2). The loss is the
    upper model's mean over the training sources, the norm the upper model's; FLOPs are the model's under LISA."""
    record = step.record
    losses = [loss for loss in record.train_loss_upper.values() if loss is not None]
    tflops = step.flops.model / step.seconds / world_size / 1e12
    return (
        f" [{datetime.now().strftime('%Y-%m-%d %H:%M:%S.%f')}]"
        f" iteration {record.step:8d}/{num_steps:8d} |"
        f" consumed samples: {record.step * batch_size:12d} |"
        f" elapsed time per iteration (ms): {step.seconds * 1000.0:.1f} |"
        f" throughput per GPU (TFLOP/s/GPU): {tflops:.1f} |"
        f" learning rate: {record.lr:.6E} |"
        f" global batch size: {batch_size:5d} |"
        f" lm loss: {statistics.fmean(losses):.6E} |"
        f" loss scale: {1.0:.1f} |"
        f" grad norm: {record.grad_norm_upper:.3f} |"
        f" number of skipped iterations: {0:3d} |"
        f" number of nan iterations: {0:3d} |"
    )


def summary_lines(content: dict[str, Any]) -> Iterator[str]:
    """The results as a table for a person."""
    results, run = content["results"], content["run"]
    times, tokens, flops = (results[key] for key in ("step_seconds", "tokens_per_second_per_gpu", "tflops_per_gpu"))
    environment = content["environment"]
    yield f"{environment['world_size']} rank{'s' * (environment['world_size'] > 1)} on {environment['device']}"
    yield f"{run['steps']} steps after {run['warmup']} of warm-up, {run['redraws']} with a redraw of the active layers"
    yield f"step             median {_shown(times['median'])} s, p10 {_shown(times['p10'])}, p90 {_shown(times['p90'])}"
    for split in ("train", "validation"):
        if padded := tokens[f"{split}_padded"]:
            real = tokens[f"{split}_real"]
            yield f"{split:<16} {real:,.0f} tokens/s per GPU; {padded:,.0f} with padding ({real / padded:.0%} real)"
    yield "                 (tokens counted once, though both models run the training tokens)"
    yield f"executed         {_shown(flops['executed'])} TFLOP/s per GPU by the LISA formula, recomputation included"
    yield f"model            {_shown(flops['model'])} TFLOP/s per GPU, nothing counted twice"
    yield f"6 N equivalent   {_shown(flops['six_n_equivalent'])} TFLOP/s per GPU: not executed; full training's count"
    yield from _utilization_lines(results["utilization"])
    yield from _memory_lines(results["memory"])
    if results["split"] is not None:
        yield from _split_lines(results["split"])
    if results["flush"] is not None:
        yield from _flush_lines(results["flush"])


def _utilization_lines(utilization: dict[str, Any]) -> Iterator[str]:
    if utilization["mfu"] is None:
        yield f"MFU              none: {utilization['reason']}"
        return
    for kind, most in utilization["peak_tflops"].items():
        mfu, hfu = utilization["mfu"][kind], utilization["hfu"][kind]
        yield f"MFU              {mfu:.1%} of {most:g} {kind} TFLOP/s ({utilization['peak']}); executed: {hfu:.1%}"


def _memory_lines(ranks: list[dict[str, Any]]) -> Iterator[str]:
    yield "GiB per rank, at most in the timed steps:"
    if "allocated_bytes" in ranks[0]:
        shown = {"allocated_bytes": "allocated", "planned_tensor_bytes": "planned tensors"}
        shown |= {"reserved_bytes": "reserved", "planned_total_bytes": "planned in all"}
    else:
        shown = {"resident_bytes": "whole process", "resident_before_bytes": "before the models"}
        shown |= {"planned_tensor_bytes": "planned tensors"}
    rows = [["rank", *(str(rank["rank"]) for rank in ranks)]]
    rows += [[label, *(f"{rank[name] / GIB:.2f}" for rank in ranks)] for name, label in shown.items()]
    yield from _table(rows)


def _split_lines(split: dict[str, Any]) -> Iterator[str]:
    yield f"ms of a step by part, the mean of {split['steps']} more steps:"
    rows = [["rank", *(str(rank["rank"]) for rank in split["ranks"])]]
    for part in PARTS:
        rows.append([part, *(f"{1e3 * rank['seconds'][part]:.2f}" for rank in split["ranks"])])
    rows.append(["step", *(f"{1e3 * rank['step_seconds']:.2f}" for rank in split["ranks"])])
    yield from _table(rows)
    yield (
        f"  under the profiler a step took {_shown(split['median_step_seconds'])} s (median), for equal FLOPs"
        f" {split['overhead']:+.0%} of the timed steps' time"
    )
    if split["seconds_per_redraw"] is not None:
        yield f"  one redraw: {1e3 * split['seconds_per_redraw']:.1f} ms on the slowest rank"


def _flush_lines(flush: dict[str, Any]) -> Iterator[str]:
    counts = " + ".join(map(str, flush["num_microbatches"]))
    spread = f"{flush['measured_ratio_least']:.3f} to {flush['measured_ratio_greatest']:.3f}"
    bubbles = (flush[f"planned_bubble_of_{flushes}"] for flushes in ("one_flush", "three"))
    yield f"time of one flush for all passes ({counts} micro-batches) over that of one for each:"
    yield f"  measured {flush['measured_ratio']:.3f} (median; {spread} in {flush['pairs']} pairs)"
    yield f"  planned  {flush['planned_ratio']:.3f} (bubble {' instead of '.join(f'{share:.1%}' for share in bubbles)})"
    yield f"  {flush['even_stages_ratio']:.3f} were all stages equally fast, each on hardware of its own"


def _table(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        numbers = (entry.rjust(width) for entry, width in zip(rest, widths[1:], strict=True))
        yield "  " + "  ".join([first.ljust(widths[0]), *numbers])


def _shown(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"
