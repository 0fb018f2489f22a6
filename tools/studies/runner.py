"""A study: arms compared over seeds, each arm with each seed one run, and one file that holds them all.

An arm is a name and the settings that tell it from the others. What is finished is not run again: the file is written
after every run, and a study that is started on it goes on where it ended, with more seeds or further arms if need be.
Arms are compared seed by seed.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from megatron_scalebio.bilevel import NonFinite
from megatron_scalebio.config import UserError
from megatron_scalebio.device import read_back
from megatron_scalebio.run import open_run
from megatron_scalebio.trainer import Trainer
from tools.benchmarks.environment import environment, write_results

Run = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """`within`: entered around a run, for what no setting does; importable by name, as other processes must."""

    name: str
    settings: tuple[str, ...]
    within: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Study:
    name: str
    arms: tuple[Arm, ...]
    task_of: Callable[[int], list[str]]  # the settings that name a seed's data, which are made if need be
    config_file: str | None = None
    settings: tuple[str, ...] = ()  # of every arm
    about: dict[str, str] = field(default_factory=dict)  # model and data, where a study may be of several
    order: tuple[str, ...] = ()  # the sources that ought to lead all others, the first most
    baseline: str | None = None  # the arm that the others' test losses are held against


@dataclass(frozen=True)
class Job:
    """A run to do."""

    arm: Arm
    seed: int
    config_file: str | None
    settings: list[str]  # all of them
    given: list[str]  # of these, what the command line added
    threads: int


def run_study(
    study: Study, seeds: Sequence[int], given: Sequence[str], file: Path | None, processes: int, threads: int
) -> dict[str, Any]:
    """Do what `file` lacks; returns the file's content.

    Args:
        given: settings for every run, over those of the study and of the arms.
        processes: runs at a time, each in a process of its own; with 1, one after the other in this one.
        threads: of each run.

    Raises:
        UserError: the file holds another study, or runs of these arms under other settings.
    """
    content = read_study(study, file, given)
    finished = {(run["arm"], run["seed"]) for run in content["runs"]}
    todo = [(arm, seed) for seed in seeds for arm in study.arms if (arm.name, seed) not in finished]
    tasks = {seed: study.task_of(seed) for _, seed in todo}
    jobs = [
        Job(arm, seed, study.config_file, [*study.settings, *tasks[seed], *arm.settings, *given], list(given), threads)
        for arm, seed in todo
    ]
    for job, outcome in _outcomes(jobs, processes):
        where = _index_of(outcome.pop("environment"), content["environments"])
        row = {"arm": job.arm.name, "seed": job.seed, "settings": [*job.arm.settings, *given], "environment": where}
        content["runs"].append(row | outcome)
        content["summary"] = summarise(study, content["runs"])
        print(run_line(content["runs"][-1]), flush=True)
        write_results(file, content)
    return content


def read_study(study: Study, file: Path | None, given: Sequence[str]) -> dict[str, Any]:
    """What a file holds of this study, nothing if there is none. Raises: UserError, if it holds something else."""
    head = {"study": study.name, "about": study.about}
    if file is None or not file.exists():
        return head | {"environments": [], "summary": [], "runs": []}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = {key: content[key] for key in head}
        settings = {run["arm"]: run["settings"] for run in content["runs"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out {file}: cannot be continued, it is no study's file ({error!r}); name another") from None
    if found != head:
        raise UserError(f"--out {file}: holds {found}, which is not {head}; name another file")
    for arm in study.arms:
        here = [*arm.settings, *given]
        if settings.get(arm.name, here) != here:
            raise UserError(
                f"--out {file}: holds runs of arm '{arm.name}' under {settings[arm.name]}, here it would run under"
                f" {here}; name another file"
            )
    return content | {"summary": summarise(study, content["runs"])}


def _index_of(found: dict[str, Any], environments: list[dict[str, Any]]) -> int:
    """Where the environments have this one, at whatever time; it is added if need be."""
    for index, other in enumerate(environments):
        if found | {"date": None} == other | {"date": None}:
            return index
    environments.append(found)
    return len(environments) - 1


def _outcomes(jobs: list[Job], processes: int) -> Iterator[tuple[Job, Run]]:
    """In the order in which they are finished."""
    if processes == 1:
        yield from ((job, run_job(job)) for job in jobs)
        return
    # One process per run: a process hosts one layout and one pair of models at a time.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(run_job, job): job for job in jobs}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        except BaseException:  # the others would all run before it is told
            pool.shutdown(cancel_futures=True)
            raise


def run_job(job: Job) -> Run:
    """Train in this process; returns what the run came to. Raises: UserError; RuntimeError, where it diverged."""
    torch.set_num_threads(job.threads)
    with job.arm.within():
        run = open_run(job.config_file, [f"run.seed={job.seed}", *job.settings], writes=False)
        config, dataset = run.config, run.dataset
        if not dataset.test:
            raise UserError("data.test is not set: a study compares losses on a test set")
        trainer = Trainer(run)
        found = {"environment": environment(trainer.device, job.given), "test_loss_before": trainer.evaluate()}
        step_seconds, hypergradients = [], []
        try:
            for _ in range(config.bilevel.steps):
                started = time.perf_counter()
                _, result = trainer.take_step()
                read_back(next(iter(result.grad_norm.values())))  # the step is over on the device
                step_seconds.append(time.perf_counter() - started)
                hypergradients.append(result.hypergradient)
        except NonFinite as error:  # which no other process could read
            reason = error.describe({"train": dataset.source_names})
            raise RuntimeError(f"arm '{job.arm.name}', seed {job.seed}, step {trainer.step + 1}: {reason}") from None
        return found | {
            "test_loss": trainer.evaluate(),
            "weights": trainer.weights,
            "signal_to_noise": signal_to_noise(hypergradients),
            "steps": len(step_seconds),
            "seconds": sum(step_seconds),
            "median_step_seconds": statistics.median(step_seconds),
        }


def signal_to_noise(hypergradients: list[torch.Tensor | None]) -> float | None:
    """|mean over steps| / |standard deviation over steps|; None where nothing is learned, or in a single step."""
    if len(hypergradients) < 2 or hypergradients[0] is None:
        return None
    stacked = torch.stack([found for found in hypergradients if found is not None])
    return (stacked.mean(dim=0).norm() / stacked.std(dim=0).norm()).item()


def summarise(study: Study, runs: list[Run]) -> list[dict[str, Any]]:
    """One row per arm: means over seeds, counts of seeds, and the test loss less the baseline's, seed by seed."""
    by_arm = {arm.name: [run for run in runs if run["arm"] == arm.name] for arm in study.arms}
    baseline = {run["seed"]: run["test_loss"] for run in by_arm.get(study.baseline or "", [])}
    rows = []
    for arm, mine in by_arm.items():
        if not mine:
            continue
        weights = {name: [run["weights"][name] for run in mine] for name in mine[0]["weights"]}
        signals = [run["signal_to_noise"] for run in mine if run["signal_to_noise"] is not None]
        row = {
            "arm": arm,
            "seeds": sorted(run["seed"] for run in mine),
            "weights_mean": {name: statistics.fmean(values) for name, values in weights.items()},
            "weights_range": {name: [min(values), max(values)] for name, values in weights.items()},
            "test_loss": statistics.fmean(run["test_loss"] for run in mine),
            "signal_to_noise": statistics.fmean(signals) if signals else None,
            "median_step_seconds": statistics.median(run["median_step_seconds"] for run in mine),
        }
        if study.order:
            row["leads"] = sum(in_order(run["weights"], study.order[:1]) for run in mine)
            row["in_order"] = sum(in_order(run["weights"], study.order) for run in mine)
        differences = [run["test_loss"] - baseline[run["seed"]] for run in mine if run["seed"] in baseline]
        if differences:
            mean = statistics.fmean(differences)
            row["test_loss_minus_baseline"] = {"mean": mean, "range": [min(differences), max(differences)]}
        rows.append(row)
    return rows


def in_order(weights: dict[str, float], order: Sequence[str]) -> bool:
    """Whether the sources of `order` lead all others, each the next."""
    leaders, others = [weights[name] for name in order], [weights[name] for name in weights if name not in order]
    return all(a > b for a, b in pairwise([*leaders, max(others, default=-1.0)]))


def run_line(run: Run) -> str:
    weights = "  ".join(f"{name} {weight:.3f}" for name, weight in run["weights"].items())
    losses = f"test loss {run['test_loss_before']:.4f} -> {run['test_loss']:.4f}"
    return f"seed {run['seed']}  {run['arm']}:  {weights}  {losses}  {run['median_step_seconds']:.2f} s/step"


def table_lines(study: Study, summary: list[dict[str, Any]]) -> Iterator[str]:
    """The summary in Markdown."""
    if not summary:
        return
    leads = [f"{study.order[0]} leads", " > ".join([*study.order, "rest"])] if study.order else []
    against = [f"minus {study.baseline}'s"] if study.baseline else []
    headings = [study.name, *summary[0]["weights_mean"], *leads, "test loss", *against, "SNR", "s/step"]
    yield f"| {' | '.join(headings)} |"
    yield "|" + "---|" * len(headings)
    for row in summary:
        cells = [row["arm"], *(f"{weight:.3f}" for weight in row["weights_mean"].values())]
        cells += [f"{row[key]}/{len(row['seeds'])}" for key in ("leads", "in_order") if key in row]
        cells.append(f"{row['test_loss']:.4f}")
        if study.baseline:
            difference = row.get("test_loss_minus_baseline")
            cells.append("" if difference is None else f"{difference['mean']:+.4f}")
        signal = row["signal_to_noise"]
        cells += ["" if signal is None else f"{signal:.2f}", f"{row['median_step_seconds']:.3f}"]
        yield f"| {' | '.join(cells)} |"
