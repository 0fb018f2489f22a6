"""Do the weights stand still where there is nothing to learn, and move where there is?

The task and the model of examples/quickstart.yaml; with --copies its clean source five times under five names, whose
weights should stay a fifth each.
"""

import argparse
import os
from functools import partial

from tools.benchmarks.tasks import QUICKSTART
from tools.studies import presets, sampling
from tools.studies.runner import Arm, Study

SEEDS = 5
PROCESSES = os.cpu_count() or 1  # small models
UNGATED = "no gate"
ARMS = (
    Arm(UNGATED, ("bilevel.logits_gate=0",)),
    Arm("gate 3", ("bilevel.logits_gate=3",)),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    sampling.add_options(parser)
    parser.add_argument("--copies", action="store_true", help="five copies of the clean source")


def declare(args: argparse.Namespace) -> Study:
    about = sampling.about(args) | {"sources": "five copies" if args.copies else "the task's"}
    order = () if args.copies else presets.ORDER
    return Study("gate", ARMS, partial(task, args), QUICKSTART, presets.SETTINGS, about, order, baseline=UNGATED)


def task(args: argparse.Namespace, seed: int) -> list[str]:
    found = sampling.task(args, seed)
    if not args.copies:
        return found
    clean = args.data / f"seed_{seed}" / "train" / "clean.jsonl"
    copies = ", ".join(f"{{name: copy_{number}, path: '{clean}'}}" for number in range(1, 6))
    return [*found, f"data.sources=[{copies}]"]
