"""The runs of a comparison: their settings, how many steps a budget buys, and each in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_scalebio.active_layers import draw_active_layers
from megatron_scalebio.compare.arms import Result
from megatron_scalebio.config import Config, UserError, changed, write_config
from megatron_scalebio.data import Sampler
from megatron_scalebio.data.shares import draw_limits
from megatron_scalebio.launch import EXIT_USER_ERROR, EXITS_ON_SIGNAL
from megatron_scalebio.plan.utilization import batch_flops
from megatron_scalebio.rules import check_config
from megatron_scalebio.run import Run, open_run
from megatron_scalebio.run_folder import RunFolder
from megatron_scalebio.show.metrics import read_metrics, read_weights
from megatron_scalebio.trainer import make_source_weights

# Batches whose FLOPs are averaged for the cost of a step: they differ by what their rows happen to hold.
BATCHES = 8


@dataclass(frozen=True)
class Terms:
    """What all runs of a comparison share."""

    config: Config  # resolved
    num_ranks: int  # of each run
    at_once: int  # runs
    budget_flops: float
    learning_share: float
    mixtures: int
    folder: Path


@dataclass
class ArmRuns:
    """One arm with one seed; see `arms.Runs`. `dry`: nothing is trained, all is checked."""

    terms: Terms
    arm: str
    seed: int
    num_examples: dict[str, int]
    processes: "Processes"
    dry: bool = False
    config: Config = field(init=False)
    budget_flops: float = field(init=False)
    learning_share: float = field(init=False)
    mixtures: int = field(init=False)

    def __post_init__(self) -> None:
        terms = self.terms
        self.config, self.budget_flops = terms.config, terms.budget_flops
        self.learning_share, self.mixtures = terms.learning_share, terms.mixtures

    def train(self, name: str, settings: Mapping[str, Any], flops: float) -> Result:
        """Raises: UserError, where `flops` are too few for a step; Failed, Stopped."""
        terms, folder = self.terms, self.terms.folder / "runs" / self.arm / f"seed_{self.seed}" / name
        of_run = {"seed": self.seed, "output_dir": str(folder), "resume": "auto", "eval_every": 0}
        of_run |= {"export": False, "save_last": False, "stop": "steps", "export_model": "upper", "profile": None}
        config = changed(terms.config, {**{f"run.{key}": value for key, value in of_run.items()}, **settings})
        run = open_run(without_limit(config), world_size=terms.num_ranks, writes=False)
        each = flops_of_step(run, terms.num_ranks)
        steps = int(flops / each)
        if steps < 1:
            raise UserError(
                f"--arms {self.arm}: {max(flops, 0.0) / terms.budget_flops:.3g} of a budget of"
                f" {terms.budget_flops:.3g} FLOPs buys no step of run '{name}', which takes {each:.3g}: raise --budget"
                " or --steps"
            )
        config = changed(config, {"bilevel.steps": steps})
        check_config(config, terms.num_ranks, run.dataset.tokenizer.vocab_size)
        draw_limits(config, list(run.dataset.num_examples.values()))
        if self.dry:
            even = {source: 1 / len(run.dataset.source_names) for source in run.dataset.source_names}
            return Result(0.0, even, steps, steps * each, 0, 0.0, 0.0)
        if (found := read_result(folder, steps)) is not None:
            return found
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".yaml")
        write_config(config, file)
        self.processes.train(file, folder.with_suffix(".log"), terms)
        result = read_result(folder, steps)
        if result is None:
            raise Failed(f"{folder}: the run ended without its last record; see {folder.with_suffix('.log')}")
        return result


def without_limit(config: Config) -> Config:
    """Before it is known for how many steps it is, which is what `data.max_epochs` is checked against."""
    return changed(config, {"data.max_epochs": None})


def flops_of_step(run: Run, num_ranks: int) -> float:
    """Executed FLOPs of a step of all ranks, the mean over some steps and draws of layers."""
    config, total = without_limit(run.config), 0.0
    data_parallel = num_ranks // (config.parallel.tensor * config.parallel.pipeline)
    sampler = Sampler(run.dataset, config, 0, data_parallel)
    weights = make_source_weights(config, run.dataset.source_names).weights.tolist()
    for number in range(BATCHES):
        drawn = draw_active_layers(config.lisa, config.model.shape.num_layers, config.run.seed, number)
        active = list(drawn.values())[-1 if config.bilevel.mode == "fixed" else 0 :]
        total += batch_flops(config, active, sampler.step(number + 1, weights)).executed
    return total / BATCHES


def read_result(folder: Path, steps: int) -> Result | None:
    """What a run came to, or None where it has not been finished."""
    if not RunFolder(folder).metrics.exists() or not RunFolder(folder).weights.exists():
        return None
    records = read_metrics(folder)
    if not records or records[-1]["step"] != steps or records[-1].get("test_loss") is None:
        return None
    return Result(
        test_loss=records[-1]["test_loss"],
        weights=read_weights(folder)["weights"],
        steps=steps,
        flops=sum(record["flops"] for record in records),
        tokens=sum(record["num_tokens"] for record in records),
        seconds=sum(record["step_seconds"] for record in records),
        test_loss_lower=records[-1].get("test_loss_lower"),
    )


class Failed(Exception):
    """A run ended for a reason of its own."""


class Stopped(Exception):
    """A signal ended the comparison."""


class Processes:
    """The runs' processes. A signal to this process is passed on once to each, which then saves a checkpoint."""

    def __init__(self) -> None:
        self.received = 0
        self._live: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def stop(self, number: int) -> None:
        with self._lock:
            self.received = number
            for process in self._live:
                process.send_signal(signal.SIGTERM)

    def train(self, config_file: Path, log: Path, terms: Terms) -> None:
        """Run to its end. Raises: UserError, Failed, Stopped."""
        command = [sys.executable, "-m", "megatron_scalebio"]
        command += ["launch", "--nproc", str(terms.num_ranks)] if terms.num_ranks > 1 else []
        command += ["train", "--config", str(config_file)]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = str(max(1, cores // (terms.num_ranks * terms.at_once)))
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        with open(log, "ab") as output:
            with self._lock:
                if self.received:
                    raise Stopped
                # In a session of its own: a terminal's Ctrl-C would reach it beside the signal that is passed on.
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
                self._live.add(process)
            status = process.wait()
            with self._lock:
                self._live.discard(process)
        if self.received or status in EXITS_ON_SIGNAL:
            raise Stopped
        if status != 0:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
            told = lines[-1] if lines else f"exit status {status}"
            kind = UserError if status == EXIT_USER_ERROR else Failed
            raise kind(f"{config_file}: {told.removeprefix('error: ')}; see {log}")
