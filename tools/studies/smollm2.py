"""A real pretrained model on tasks with a known order: which weights, and what they are worth.

Four arms of equal steps: bilevel with the default preset and with the paper's, and two that train one model with fixed
weights, uniform and on the oracle's source alone.
"""

import argparse
from pathlib import Path

from megatron_scalebio.config import UserError
from tools.benchmarks.tasks import settings_of, sources_of
from tools.studies.runner import Arm, Study

SEEDS, PROCESSES = 1, 1
UNIFORM = "fixed, uniform"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a Hugging Face folder; tools/get_smollm2.py makes one")
    parser.add_argument("--task", type=Path, required=True, help="a folder with train/*.jsonl, val.jsonl, test.jsonl")
    parser.add_argument("--oracle", required=True, help="the source that ought to lead")


def declare(args: argparse.Namespace) -> Study:
    """Raises: UserError."""
    names = sources_of(args.task)
    if args.oracle not in names:
        raise UserError(f"--oracle {args.oracle}: the sources of {args.task} are {', '.join(names) or 'none'}")
    weights = ", ".join(f"{name}: {int(name == args.oracle)}" for name in names)
    return Study(
        "smollm2",
        arms=(
            Arm("bilevel, preset default", ("bilevel.preset=default",)),
            Arm("bilevel, preset paper", ("bilevel.preset=paper",)),
            Arm(UNIFORM, ("bilevel.mode=fixed",)),
            Arm("fixed, oracle", ("bilevel.mode=fixed", f"bilevel.weights={{{weights}}}")),
        ),
        task_of=lambda seed: settings_of(args.task),
        settings=(f"model.hf_path={args.model}", "data.template=plain"),
        about={"model": args.model, "task": str(args.task)},
        order=(args.oracle,),
        baseline=UNIFORM,
    )
