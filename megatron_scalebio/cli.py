"""The command line: python -m megatron_scalebio train | launch | plan | compare.

Exit status: 0; 2 for a user's mistake, told in one message; 130 and 143 after SIGINT and SIGTERM; 1 otherwise, and
where a planned layout does not fit.
Heavy imports happen inside the commands, so that --help answers at once.
"""

import argparse
import math
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_scalebio.launch import (
    EXIT_USER_ERROR,
    EXITS_ON_SIGNAL,
    LAUNCHER_PID,
    adopt_slurm_environment,
    die_with_launcher,
    is_main_rank,
    report_user_error,
    start_ranks,
)

if TYPE_CHECKING:
    from megatron_scalebio.run import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args = _parse(sys.argv[1:] if argv is None else list(argv))
    from megatron_scalebio.config import UserError

    try:
        return {"train": _train, "launch": _launch, "plan": _plan, "compare": _compare}[args.command](args)
    except UserError as error:
        report_user_error(str(error))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever reads the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("megatron_scalebio", description="Learns source weights while it fine-tunes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | launch | plan | compare")
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

    compare = commands.add_parser(
        "compare",
        help="whether learned weights pay: arms at equal FLOPs over seeds, on the test set",
        description="Trains arms one after another, each with the same executed FLOPs and seeds, the learning of"
        " weights included, and writes compare.json and compare.html into run.output_dir. Started again, it does what"
        " is missing. Arms are not told apart by their means but by their differences seed by seed.",
    )
    compare.add_argument("--config", metavar="FILE", help="YAML file with the settings")
    compare.add_argument("--arms", required=True, metavar="A,B,...", help="'all', or some of: see README")
    compare.add_argument("--seeds", type=int, default=3, metavar="N", help="1 to N; default: %(default)s")
    compare.add_argument("--budget", type=float, metavar="FLOPS", help="executed, of each arm with each seed")
    compare.add_argument("--steps", type=int, metavar="N", help="budget: that of N bilevel steps; default: the file's")
    compare.add_argument(
        *("--learning-share",),
        **{"type": float, "default": 0.5, "metavar": "S"},
        help="of the budget, to learn or to search for weights before a fresh model is trained; default: %(default)s",
    )
    compare.add_argument("--mixtures", type=int, default=8, metavar="N", help="of arm random; default: %(default)s")
    compare.add_argument("--nproc", type=int, metavar="N", help="ranks of a run; default: tensor * pipeline")
    compare.add_argument("--at-once", type=int, default=1, metavar="N", help="runs at a time; default: %(default)s")
    compare.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file's")

    # What these parsers leave over are overrides that follow an option; load_config refuses what is not one.
    args, surplus = parser.parse_known_args(argv)
    if args.command in ("train", "plan", "compare"):
        args.overrides += surplus
        return args
    if surplus or args.train[:1] != ["train"]:
        launch.error("expected: launch --nproc N train --config FILE section.key=value ...")
    if args.nproc < 1:
        launch.error(f"--nproc {args.nproc}: must be at least 1")
    nested = _parse(args.train)
    nested.dry_run |= args.dry_run
    return argparse.Namespace(**{**vars(nested), "command": "launch", "nproc": args.nproc})


def _train(args: argparse.Namespace) -> int:
    die_with_launcher()
    adopt_slurm_environment()
    from megatron_scalebio.plan.machine import check_machine
    from megatron_scalebio.run import open_run
    from megatron_scalebio.run_folder import RunFolder

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    run = open_run(args.config, args.overrides, world_size=world_size, dry=args.dry_run)
    if args.dry_run:
        return _dry_run(args, run, world_size) if is_main_rank() else 0
    if LAUNCHER_PID not in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":  # else launch has done it
        check_machine(run.config, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    _quiet_megatron()
    from megatron_scalebio.show.report import write_report
    from megatron_scalebio.trainer import train

    status, folder = train(run), RunFolder(Path(run.config.run.output_dir))
    if is_main_rank() and folder.weights.exists():
        print(f"report: {write_report(folder.path)}")
        for model in (folder.exported(role) for role in ("upper", "lower")):
            if model.exists():
                print(f"model: {model}")
        if status in EXITS_ON_SIGNAL:
            print("stopped by a signal, checkpoint saved: run.resume=auto continues from it")
    return status


def _launch(args: argparse.Namespace) -> int:
    from megatron_scalebio.plan.machine import check_machine
    from megatron_scalebio.run import open_run

    run = open_run(args.config, args.overrides, world_size=args.nproc, ranks_here=args.nproc, dry=args.dry_run)
    if args.dry_run:
        return _dry_run(args, run, args.nproc)
    check_machine(run.config, args.nproc, args.nproc)
    del run  # each rank reads its own data; this process only waits
    command = ["-m", "megatron_scalebio", "train", *args.overrides]
    if args.config is not None:
        command += ["--config", args.config]
    return start_ranks(command, args.nproc)


def _dry_run(args: argparse.Namespace, run: "Run", world_size: int) -> int:
    _quiet_megatron()
    from megatron_scalebio.dry_run import dry_run

    return 0 if dry_run(run, world_size, args.gpu_memory) else 1


def _quiet_megatron() -> None:
    """Megatron-Core warns, once per rank, of every optional package that is not there and of its own deprecations."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # torch announces that its collectives on whole tensors will be renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _plan(args: argparse.Namespace) -> int:
    from megatron_scalebio.config import UserError
    from megatron_scalebio.plan.report import write_plan
    from megatron_scalebio.run import open_config

    if not 0 < args.gpu_memory < math.inf or (args.gpus is not None and args.gpus < 1):
        raise UserError(f"--gpus {args.gpus}, --gpu-memory {args.gpu_memory}: must be positive and finite")
    config = open_config(args.config, args.overrides)
    return 0 if write_plan(config, args.gpus, args.gpu_memory, args.json) else 1


def _compare(args: argparse.Namespace) -> int:
    _quiet_megatron()
    from megatron_scalebio.compare import compare

    return compare(
        args.config,
        args.overrides,
        arms=None if args.arms == "all" else [name.strip() for name in args.arms.split(",")],
        seeds=args.seeds,
        budget_flops=args.budget,
        steps=args.steps,
        learning_share=args.learning_share,
        mixtures=args.mixtures,
        num_ranks=args.nproc,
        at_once=args.at_once,
    )
