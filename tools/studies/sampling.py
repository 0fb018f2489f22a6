"""Does it pay that the batch follows the weights, and how much of it should go round equally?

The task and the model of examples/quickstart.yaml, from random weights; with --validation-records as few as users have.
"""

import argparse
import os
from functools import partial

from tools.benchmarks.tasks import QUICKSTART, make_arithmetic, settings_of
from tools.studies import presets
from tools.studies.runner import Arm, Study

SEEDS = 5
PROCESSES = os.cpu_count() or 1  # small models
STRATIFIED = "stratified"
EXPLORATIONS = (0.1, 0.25, 0.5)
ARMS = (
    Arm(STRATIFIED, ("data.sampling=stratified",)),
    *(Arm(f"adaptive, {share}", ("data.sampling=adaptive", f"data.exploration={share}")) for share in EXPLORATIONS),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    presets.add_options(parser)
    parser.add_argument("--validation-records", type=int, help="the first of the task's 1,000; default: all")


def declare(args: argparse.Namespace) -> Study:
    settings, order = presets.SETTINGS, presets.ORDER
    return Study("sampling", ARMS, partial(task, args), QUICKSTART, settings, about(args), order, baseline=STRATIFIED)


def task(args: argparse.Namespace, seed: int) -> list[str]:
    """A seed's task, made where it is not there, with as many validation records as asked for."""
    folder = args.data / f"seed_{seed}"
    make_arithmetic(folder, seed)
    if args.validation_records is None:
        return settings_of(folder)
    few = folder / f"val_{args.validation_records}.jsonl"
    lines = (folder / "val.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    few.write_text("".join(lines[: args.validation_records]), encoding="utf-8")
    return [*settings_of(folder), f"data.validation={few}"]


def about(args: argparse.Namespace) -> dict[str, str]:
    return {"validation records": "all" if args.validation_records is None else str(args.validation_records)}
