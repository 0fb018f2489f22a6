"""Starting the ranks of a run on this machine, and how launcher and ranks tell each other what happened."""

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
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

EXIT_USER_ERROR = 2
EXITS_ON_SIGNAL = (128 + signal.SIGINT, 128 + signal.SIGTERM)
# The ranks end the step and save a checkpoint before they go; only then is force right.
SHUTDOWN_SECONDS = 600
TOLD = "told"
LAUNCHER_PID = "MEGATRON_SCALEBIO_LAUNCHER_PID"


def is_main_rank() -> bool:
    """Whether this process is rank 0 of its run, which alone reads and writes the output folder."""
    return os.environ.get("RANK", "0") == "0"


def start_ranks(command: list[str], num_ranks: int) -> int:
    """Run `python COMMAND` as so many ranks, through torch's elastic launcher. Returns the exit status of the whole."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Elastic's log repeats over several screens what the ranks have said already.
    elastic_log = logging.getLogger("torch.distributed.elastic")
    elastic_log.addHandler(logging.NullHandler())
    elastic_log.propagate = False

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_ranks)))
    os.environ[LAUNCHER_PID] = str(os.getpid())
    with tempfile.TemporaryDirectory(prefix="megatron_scalebio_") as log_dir:
        launch_config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
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


def _status_of_ranks(error: "ChildFailedError", told: bool) -> int:
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


def report_user_error(message: str) -> None:
    """Rank 0 prints; another rank leaves the message where the launcher finds it, should rank 0 not share the error.

    Rank 0 leaves a mark, too: once another has failed it may be stopped before its own exit status tells. Under Slurm
    without torchrun nobody reads the message, so a node's first rank, which checks the node, prints it.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if is_main_rank():
        print(f"error: {message}", file=sys.stderr, flush=True)
        if error_file:
            Path(error_file).with_name(TOLD).touch()
    elif error_file:
        Path(error_file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
    elif os.environ.get("LOCAL_RANK") == "0":
        rank = os.environ["RANK"]
        print(f"error: {socket.gethostname()}, rank {rank}: {message}", file=sys.stderr, flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_launcher() -> None:
    """Asks the kernel to kill this rank should `launch` be killed without a chance to stop it (Linux)."""
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None or sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before the call
        os._exit(1)


def adopt_slurm_environment() -> None:
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
    assert first is not None, nodes
    environment.setdefault("MASTER_ADDR", first[1] + (first[2] or ""))
    environment.setdefault("MASTER_PORT", str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000))
