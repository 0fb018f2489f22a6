"""The command line: python -m megatron_scalebio train | launch | plan.

Exit status: 0; 2 for a user's mistake, told in one message; 130 and 143 after SIGINT and SIGTERM; 1 otherwise, and
where a planned layout does not fit.
Heavy imports happen inside the commands, so that --help answers at once.
"""

import argparse
import ctypes
import json
import logging
import math
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
        return {"train": _train, "launch": _launch, "plan": _plan}[args.command](args)
    except UserError as error:
        _report_user_error(str(error))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever reads the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("megatron_scalebio", description="Learns source weights while it fine-tunes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | launch | plan")
    dry_run = {"action": "store_true", "help": "check everything, print the plan, train nothing"}

    train = commands.add_parser("train", help="train in this process, or as one rank of torchrun or Slurm")
    train.add_argument("--config", metavar="FILE", help="YAML file with the settings")
    train.add_argument("--dry-run", **dry_run)
    train.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="with --dry-run: of a GPU; default: this machine's, else 79.1"
    )
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file's")

    launch = commands.add_parser("launch", help="check everything in one process, then start the ranks")
    launch.add_argument("--nproc", type=int, required=True, metavar="N", help="number of ranks on this machine")
    launch.add_argument("--dry-run", **dry_run)
    launch.add_argument("train", nargs=argparse.REMAINDER, metavar="train ...", help="the train command to start")

    plan = commands.add_parser(
        "plan",
        help="say whether the layout fits and what its step takes, search better ones; needs no GPU, weights or data",
        description="Plans by arithmetic: memory by rank and part, FLOPs, bubble, communication and predicted step time"
        " of the configuration's own layout, then the best layouts for the GPUs. Of model.hf_path only config.json is"
        " read. Exit status: 0 if the configuration's own layout fits, 1 if it does not, 2 for a mistake.",
    )
    plan.add_argument("--config", metavar="FILE", help="YAML file with the settings")
    plan.add_argument("--gpus", type=int, metavar="N", help="default: parallel.tensor * parallel.pipeline")
    plan.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        default=79.1,
        help="what torch sees of a GPU's memory: 79.1 (default) of an H100-80GB, 139.8 of an H200-141GB",
    )
    plan.add_argument("--json", metavar="FILE", help="write the plan there, too")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file's")

    # What these parsers leave over are overrides that follow an option; load_config refuses what is not one.
    args, surplus = parser.parse_known_args(argv)
    if args.command in ("train", "plan"):
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
    from megatron_scalebio.rules import check_config
    from megatron_scalebio.show.metrics import check_output_dir

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
    if not args.dry_run:
        from megatron_scalebio.mcore.te_linear import check_transformer_engine

        check_transformer_engine(config.precision)
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
        return _dry_run(args, config, dataset, world_size) if _is_main_rank() else 0
    if LAUNCHER_PID not in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":  # else launch has done it
        _check_machine(config, dataset, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    _quiet_megatron()
    from megatron_scalebio.show.report import write_report
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
        return _dry_run(args, config, dataset, args.nproc)
    _check_machine(config, dataset, args.nproc, args.nproc)
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

    Rank 0 leaves a mark, too: once another has failed it may be stopped before its own exit status tells. Under Slurm
    without torchrun nobody reads the message, so a node's first rank, which checks the node, prints it.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if _is_main_rank():
        print(f"error: {message}", file=sys.stderr, flush=True)
        if error_file:
            Path(error_file).with_name(TOLD).touch()
    elif error_file:
        Path(error_file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
    elif os.environ.get("LOCAL_RANK") == "0":
        rank = os.environ["RANK"]
        print(f"error: {socket.gethostname()}, rank {rank}: {message}", file=sys.stderr, flush=True)


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
    environment.setdefault("LOCAL_WORLD_SIZE", environment.get("SLURM_NTASKS_PER_NODE", "1"))
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    nodes = environment["SLURM_STEP_NODELIST"]  # node[03-04,09],other1
    first = re.match(r"([^\[,]+)(?:\[([^-,\]]+))?", nodes)
    environment.setdefault("MASTER_ADDR", first[1] + (first[2] or ""))
    environment.setdefault("MASTER_PORT", str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000))


def _dry_run(args: argparse.Namespace, config: "Config", dataset: "Dataset", world_size: int) -> int:
    _quiet_megatron()
    from megatron_scalebio.dry_run import dry_run

    return 0 if dry_run(config, dataset, world_size, args.gpu_memory) else 1


def _quiet_megatron() -> None:
    """Megatron-Core warns, once per rank, of every optional package that is not there and of its own deprecations."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # torch announces that its collectives on whole tensors will be renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _check_machine(config: "Config", dataset: "Dataset", world_size: int, ranks_here: int) -> None:
    from megatron_scalebio.plan.machine import check_machine

    check_machine(config, config.model.shape.vocab_size or dataset.tokenizer.vocab_size, world_size, ranks_here)


def _plan(args: argparse.Namespace) -> int:
    from megatron_scalebio.config import UserError, given_settings, load_config
    from megatron_scalebio.plan.report import write_plan

    if not 0 < args.gpu_memory < math.inf or (args.gpus is not None and args.gpus < 1):
        raise UserError(f"--gpus {args.gpus}, --gpu-memory {args.gpu_memory}: must be positive and finite")
    config = load_config(args.config, args.overrides)
    if config.model.hf_path is not None:
        from megatron_scalebio.hf import adopt_checkpoint

        adopt_checkpoint(config, given_settings(args.config, args.overrides))
    return 0 if write_plan(config, args.gpus, args.gpu_memory, args.json) else 1
