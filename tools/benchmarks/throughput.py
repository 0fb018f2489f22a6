"""A throughput run: warm-up, timed steps, steps under the profiler, one flush against three."""

import argparse
import json
import os
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_scalebio.config import Config, UserError, to_dict
from megatron_scalebio.device import choose_device, reset_peak_memory
from megatron_scalebio.plan.planner import Plan
from megatron_scalebio.plan.seconds import H100
from megatron_scalebio.run import Run
from megatron_scalebio.trainer import Trainer
from tools.benchmarks.environment import environment
from tools.benchmarks.throughput_compare import compare, comparison_lines
from tools.benchmarks.throughput_report import (
    against_plan,
    log_line,
    peak_of,
    results_of,
    summary_lines,
)
from tools.benchmarks.throughput_run import (
    FLUSH_PAIRS,
    Step,
    device_memory,
    initial_weights,
    make_dataset,
    measured_memory,
    one_flush_against_three,
    read_config,
    resident_bytes,
    timed_step,
    traced_step,
    world_size,
)
from tools.benchmarks.throughput_split import PARTS

STEPS_WITHOUT_PERIODS = 10


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print on rank 0, write the file. Returns its content, complete on rank 0. Raises: UserError."""
    other = _read_other(args.compare)
    config = read_config(args.config, args.settings, args.synthetic)
    num_steps, num_split = _numbers_of_steps(args, config)
    last_timed = args.warmup + num_steps
    # The learning rates' schedule must have a rate for every step, those after the timed ones included.
    config.bilevel.steps = max(config.bilevel.steps, last_timed + num_split + 2 * (FLUSH_PAIRS + 1))
    device = choose_device(config.run.device)
    content: dict[str, Any] = {
        "environment": environment(device, args.settings, world_size()),
        "config": to_dict(config),
        "run": {
            "data": "synthetic" if args.synthetic else "the configuration's own",
            "weights": config.model.hf_path or "random",
            "warmup": args.warmup,
            "steps": num_steps,
        },
        "plan": None,
        "results": None,
    }
    try:
        _measure(args, content, config, num_steps, num_split)
    except torch.OutOfMemoryError as error:
        content["error"] = f"rank {_rank()} is out of memory: {error}"
        print(f"error: {content['error']}", flush=True)
        _write(args.out, content)
        raise
    if other is not None:
        content["comparison"] = compare(content, other)
        _tell(*comparison_lines(content["comparison"], args.compare))
    if _rank() == 0:
        _write(args.out, content)
    return content


def _measure(args: argparse.Namespace, content: dict[str, Any], config: Config, num_steps: int, num_split: int) -> None:
    """Fills in content["results"], first what the timed steps say, then what is measured apart."""
    dataset, memory = make_dataset(config, args.synthetic), device_memory(choose_device(config.run.device))
    plan = _plan(config, memory, args.warmup + num_steps)
    if memory is not None:
        content["plan"] = {"verdict": plan.verdict, "fits": plan.fits}
        _tell(f"plan: {plan.verdict}")
    resident_before = resident_bytes()
    trainer = Trainer(Run(config, dataset), initial_weights(config, choose_device(config.run.device)))
    _tell(f"{args.warmup} steps of warm-up, {num_steps} timed, {num_split} more under the profiler")
    for _ in range(args.warmup):
        timed_step(trainer)
    reset_peak_memory(trainer.device)
    steps = [_logged_step(trainer, args.warmup + num_steps) for _ in range(num_steps)]

    peak = peak_of(trainer.device, content["environment"]["device"], args.peak_tflops)
    results = content["results"] = results_of(steps, config, world_size(), peak)
    content["run"]["redraws"] = sum(step.redrew for step in steps)
    content["steps"] = [{"seconds": step.seconds, "redrew": step.redrew} for step in steps]
    peak_bytes = measured_memory(trainer.device, resident_before)
    results |= {"memory": _gathered(against_plan(_rank(), peak_bytes, plan)), "split": None, "flush": None}
    if _rank() == 0:
        _write(args.out, content)  # should the time be up during what follows, this is kept

    results["split"] = measure_split(trainer, num_split, steps)
    if trainer.groups.num_stages > 1 and config.bilevel.mode == "bilevel":
        results["flush"] = one_flush_against_three(trainer, steps[-1], plan.device, plan.draws)
    _tell("", *summary_lines(content))


def measure_split(trainer: Trainer, num_steps: int, untimed: list[Step]) -> dict[str, Any]:
    """Mean seconds of a step by part on every rank, and what the profiler adds to it."""
    steps, seconds = [], Counter()
    for _ in range(num_steps):
        step, parts = traced_step(trainer)
        steps.append(step)
        seconds.update(parts)
    redraws, total = sum(step.redrew for step in steps), sum(step.record.step_seconds for step in steps)
    # Whatever no span saw, on whichever clock, is in the rest: the parts are the step.
    seconds["other"] = total - sum(seconds[part] for part in PARTS if part != "other")
    mine = {
        "rank": trainer.groups.rank,
        "stage": trainer.groups.stage,
        "step_seconds": total / num_steps,
        "seconds": {part: seconds[part] / num_steps for part in PARTS},
    }
    ranks = _gathered(mine)
    # Steps of other draws have other work: what is compared is the time for a FLOP.
    rates = [statistics.median(step.seconds / step.flops.executed for step in group) for group in (steps, untimed)]
    redraw = max(rank["seconds"]["redraw"] for rank in ranks) * num_steps / redraws if redraws else None
    return {
        "steps": num_steps,
        "redraws": redraws,
        "seconds_per_redraw": redraw,
        "median_step_seconds": statistics.median(step.seconds for step in steps),
        "overhead": rates[0] / rates[1] - 1,
        "ranks": ranks,
    }


def _logged_step(trainer: Trainer, last: int) -> Step:
    step = timed_step(trainer)
    _tell(log_line(step, last, trainer.config.bilevel.global_batch_size, trainer.groups.world_size))
    return step


def _plan(config: Config, memory: int | None, last_step: int) -> Plan:
    """Of the steps up to the last timed one: later draws thaw more. On the CPU, where `memory` is None, an H100's."""
    config = replace(config, bilevel=replace(config.bilevel, steps=last_step))
    return Plan.of(config, world_size(), memory or H100.memory)


def _numbers_of_steps(args: argparse.Namespace, config: Config) -> tuple[int, int]:
    """(timed steps, steps under the profiler); tells of too few."""
    lisa = config.lisa
    if not lisa.enabled or lisa.num_active_layers >= config.model.shape.num_layers:
        return args.steps or STEPS_WITHOUT_PERIODS, args.steps or STEPS_WITHOUT_PERIODS
    num_steps = args.steps or 2 * lisa.period
    if num_steps < 2 * lisa.period:
        _tell(
            f"WARNING: --steps {num_steps} is less than two periods of lisa.period={lisa.period}"
            f" ({2 * lisa.period} steps): redraws do not weigh here what they weigh in a run"
        )
    return num_steps, min(num_steps, lisa.period)


def _read_other(file: str | None) -> dict[str, Any] | None:
    """Another run's content, read before anything is measured."""
    if file is None:
        return None
    try:
        other = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--compare {file}: {error}") from error
    if not isinstance(other, dict) or not other.get("results"):
        raise UserError(f"--compare {file}: holds no results of this tool")
    return other


def _gathered(mine: dict[str, Any]) -> list[dict[str, Any]]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def _tell(*lines: str) -> None:
    if _rank() == 0:
        print("\n".join(lines), flush=True)


def _write(file: str | None, content: dict[str, Any]) -> None:
    if file is not None:
        Path(file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
