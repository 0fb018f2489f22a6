"""The command line: python -m megatron_scalebio train | launch.

Exit status: 0; 2 for a user's mistake, told in one message; 130 and 143 after SIGINT and SIGTERM; 1 otherwise.
Heavy imports happen inside the commands, so that --help answers at once.
"""

import argparse
import ctypes
import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_scalebio.config import Config
    from megatron_scalebio.data import Dataset

EXIT_USER_ERROR = 2
EXITS_ON_SIGNAL = (128 + signal.SIGINT, 128 + signal.SIGTERM)
# The ranks end the step and save a checkpoint before they go; only then is force right.
SHUTDOWN_SECONDS = 600
TOLD = "told"
LAUNCHER_PID = "MEGATRON_SCALEBIO_LAUNCHER_PID"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args = _parse(sys.argv[1:] if argv is None else list(argv))
    from megatron_scalebio.config import UserError

    try:
        return _launch(args) if args.command == "launch" else _train(args)
    except UserError as error:
        _report_user_error(str(error))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("megatron_scalebio", description="Learns source weights while it fine-tunes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | launch")
    dry_run = {"action": "store_true", "help": "check everything, print the plan, train nothing"}

    train = commands.add_parser("train", help="train in this process, or as one rank of torchrun or Slurm")
    train.add_argument("--config", metavar="FILE", help="YAML file with the settings")
    train.add_argument("--dry-run", **dry_run)
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file's")

    launch = commands.add_parser("launch", help="check everything in one process, then start the ranks")
    launch.add_argument("--nproc", type=int, required=True, metavar="N", help="number of ranks on this machine")
    launch.add_argument("--dry-run", **dry_run)
    launch.add_argument("train", nargs=argparse.REMAINDER, metavar="train ...", help="the train command to start")

    # What train's parser leaves over are overrides that follow an option; load_config refuses what is not one.
    args, surplus = parser.parse_known_args(argv)
    if args.command == "train":
        args.overrides += surplus
        return args
    if surplus or args.train[:1] != ["train"]:
        launch.error("expected: launch --nproc N train --config FILE section.key=value ...")
    if args.nproc < 1:
        launch.error(f"--nproc {args.nproc}: must be at least 1")
    nested = _parse(args.train)
    nested.dry_run |= args.dry_run
    return argparse.Namespace(**{**vars(nested), "command": "launch", "nproc": args.nproc})


def prepare(args: argparse.Namespace, world_size: int) -> "tuple[Config, Dataset]":
    """Loads and checks everything that can be checked without the model: settings, data, output folder."""
    from megatron_scalebio.config import UserError, given_settings, load_config
    from megatron_scalebio.config_rules import check_config
    from megatron_scalebio.metrics import check_output_dir

    config = load_config(args.config, args.overrides)
    if config.model.hf_path is not None:
        from megatron_scalebio.hf import adopt_checkpoint, check_checkpoint

        adopt_checkpoint(config, given_settings(args.config, args.overrides))
        if not args.dry_run:  # which needs config.json only
            check_checkpoint(config)
            if config.data.tokenizer == "bytes":
                raise UserError(
                    f"data.tokenizer=bytes does not fit model.hf_path={config.model.hf_path}, whose embedding belongs"
                    " to its own tokenizer: remove data.tokenizer, or name a folder"
                )
    check_config(config, world_size, None)  # what is quick to find, before the data is read
    if _is_main_rank():
        check_output_dir(config)

    from megatron_scalebio.device import check_device

    check_device(config.run.device, world_size if args.command == "launch" else 1)
    from megatron_scalebio.data import load_dataset

    dataset = load_dataset(config)
    check_config(config, world_size, dataset.tokenizer.vocab_size)
    return config, dataset


def _train(args: argparse.Namespace) -> int:
    _die_with_launcher()
    _adopt_slurm_environment()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config, dataset = prepare(args, world_size)
    if args.dry_run:
        if _is_main_rank():
            _print_plan(config, dataset, world_size)
        return 0
    # Megatron-Core warns, once per rank, of every optional package that is not there and of its own deprecations.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    from megatron_scalebio.report import write_report
    from megatron_scalebio.trainer import train

    status = train(config, dataset)
    if _is_main_rank() and (Path(config.run.output_dir) / "weights.json").exists():
        print(f"report: {write_report(config.run.output_dir)}")
        if (Path(config.run.output_dir) / "hf").exists():
            print(f"model: {config.run.output_dir}/hf")
        if status in EXITS_ON_SIGNAL:
            print("stopped by a signal, checkpoint saved: run.resume=auto continues from it")
    return status


def _launch(args: argparse.Namespace) -> int:
    config, dataset = prepare(args, args.nproc)
    if args.dry_run:
        _print_plan(config, dataset, args.nproc)
        return 0
    del dataset  # each rank reads its own; this process only waits

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Elastic's log repeats over several screens what the ranks have said already.
    elastic_log = logging.getLogger("torch.distributed.elastic")
    elastic_log.addHandler(logging.NullHandler())
    elastic_log.propagate = False

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // args.nproc)))
    os.environ[LAUNCHER_PID] = str(os.getpid())
    command = ["-m", "megatron_scalebio", "train", *args.overrides]
    if args.config is not None:
        command += ["--config", args.config]
    with tempfile.TemporaryDirectory(prefix="megatron_scalebio_") as log_dir:
        launch_config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=args.nproc,
            run_id="megatron_scalebio",
            rdzv_backend="static",
            rdzv_endpoint=f"127.0.0.1:{_free_port()}",
            rdzv_configs={"rank": 0},
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=log_dir),
            shutdown_timeout=SHUTDOWN_SECONDS,
        )
        try:
            elastic_launch(launch_config, sys.executable)(*command)
        except SignalException as error:
            return 128 + error.sigval
        except ChildFailedError as error:
            return _status_of_ranks(error, told=any(Path(log_dir).rglob(TOLD)))
    return 0


def _status_of_ranks(error: "ChildFailedError", told: bool) -> int:  # noqa: F821
    """The launch's exit status from the failed ranks', the user's mistakes first."""
    statuses = {rank: failure.exitcode for rank, failure in error.failures.items()}
    if EXIT_USER_ERROR in statuses.values():
        if not told:
            rank = next(rank for rank, status in statuses.items() if status == EXIT_USER_ERROR)
            print(f"error: {error.failures[rank].message}", file=sys.stderr)
        return EXIT_USER_ERROR
    rank, failure = error.get_first_failure()
    if failure.exitcode in EXITS_ON_SIGNAL:
        return failure.exitcode
    cause = f"signal {failure.signal_name()}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
    print(f"error: rank {rank} failed with {cause}; the other ranks were stopped", file=sys.stderr)
    return 1


def _report_user_error(message: str) -> None:
    """Rank 0 prints; another rank leaves the message where the launcher finds it, should rank 0 not share the error.

    Rank 0 leaves a mark, too: once another has failed it may be stopped before its own exit status tells.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if _is_main_rank():
        print(f"error: {message}", file=sys.stderr, flush=True)
        if error_file:
            Path(error_file).with_name(TOLD).touch()
    elif error_file:
        Path(error_file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))


def _is_main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _die_with_launcher() -> None:
    """Asks the kernel to kill this rank should `launch` be killed without a chance to stop it (Linux)."""
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None or sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before the call
        os._exit(1)


def _adopt_slurm_environment() -> None:
    """Under `srun` without torchrun: torch's names for what Slurm says about this task of the step.

    SLURM_STEP_* exist only inside a step, so an `sbatch` script that calls `train` directly stays one process.
    """
    environment = os.environ
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    nodes = environment["SLURM_STEP_NODELIST"]  # node[03-04,09],other1
    first = re.match(r"([^\[,]+)(?:\[([^-,\]]+))?", nodes)
    environment.setdefault("MASTER_ADDR", first[1] + (first[2] or ""))
    environment.setdefault("MASTER_PORT", str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000))


def _print_plan(config: "Config", dataset: "Dataset", world_size: int) -> None:
    """What `--dry-run` shows: layout, batch arithmetic, data, parameters, bytes, and what differs from the preset."""
    from megatron_scalebio.active_layers import draw_active_layers, period_of
    from megatron_scalebio.config import changed_from_preset
    from megatron_scalebio.estimates import model_parameters, peak_rank_bytes

    shape, parallel, bilevel = config.model.shape, config.parallel, config.bilevel
    vocab_size = shape.vocab_size or dataset.tokenizer.vocab_size
    data_parallel = world_size // (parallel.tensor * parallel.pipeline)
    print(
        f"layout: {world_size} ranks = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {data_parallel};"
        f" {shape.num_layers // parallel.pipeline} layers per stage"
    )
    examples = f"{bilevel.global_batch_size} training examples"
    if bilevel.mode == "bilevel":
        examples += f" and {bilevel.validation_batch_size or bilevel.global_batch_size} validation examples"
    print(
        f"batch: {examples} per step, {config.data.sampling}, {'packed' if config.data.packing else 'padded'} into"
        f" micro-batches of {config.data.micro_batch_size} x {config.data.max_length} positions; {bilevel.steps} steps"
    )
    for name, examples in zip(dataset.source_names, dataset.train, strict=True):
        truncated, dropped = dataset.num_truncated[name], dataset.num_dropped[name]
        print(f"source {name}: {len(examples)} examples, {truncated} of them truncated; {dropped} dropped")
    print(f"validation: {len(dataset.validation)} examples; test: {len(dataset.test)} examples")
    roles = ["lower", "upper"] if bilevel.mode == "bilevel" else ["upper"]
    count = model_parameters(config.model.family, shape, vocab_size)
    print(f"parameters: {count:,} each of {' and '.join(roles)}; vocabulary {vocab_size:,}")
    draws = []
    for period in range(period_of(bilevel.steps, config.lisa) + 1):
        drawn = draw_active_layers(config.lisa, shape.num_layers, config.run.seed, period)
        draws.append([drawn[role] for role in roles])
    stage, period, parts = peak_rank_bytes(config, vocab_size, data_parallel, draws)
    print(f"bytes per rank without activations, at their most (stage {stage}, period {period}):")
    for part, size in parts.items():
        print(f"  {part}: {size:,}")
    changes = changed_from_preset(config)
    print(f"differs from preset {bilevel.preset}:" if changes else f"settings as preset {bilevel.preset}")
    for key, (preset, value) in changes.items():
        print(f"  {key}: {value} (preset: {preset})")
    print(f"outputs: {config.run.output_dir}")
