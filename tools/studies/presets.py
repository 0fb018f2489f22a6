"""Does the run find the planted order? Presets, penalties and logits optimizers on the arithmetic task.

Five sources of sums with 0, 25, 50, 75 and 100% wrong answers (examples/arithmetic.py, its seed the run's), the model
and the batch of examples/quickstart.yaml, from random weights.
"""

import argparse
import os
from pathlib import Path

from tools.benchmarks.tasks import QUICKSTART, make_arithmetic, settings_of
from tools.studies.runner import Arm, Study

SEEDS = 5
PROCESSES = os.cpu_count() or 1  # small models
SETTINGS = ("parallel.tensor=1", "run.device=cpu")
ORDER = ("clean", "wrong_025")
LOGITS = {
    "AdamW": ("bilevel.logits_optimizer=adamw", "bilevel.logits_lr=2e-2"),
    "exponentiated gradient": ("bilevel.logits_optimizer=exponentiated_gradient", "bilevel.logits_lr=0.5"),
}


def shared_draws(alpha: int, logits: str) -> Arm:
    shared = ("lisa.pairing=shared", "bilevel.logits_schedule=constant")
    settings = (f"bilevel.penalty_alpha={alpha}", *shared, *LOGITS[logits])
    return Arm(f"shared draws, alpha {alpha}, {logits}", settings)


ARMS = (
    Arm("preset paper (alpha 100, independent draws)", ("bilevel.preset=paper", "bilevel.logits_lr=2e-2")),
    *(shared_draws(alpha, logits) for alpha in (1, 10, 100) for logits in LOGITS),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder for the generated data, one folder per seed")


def declare(args: argparse.Namespace) -> Study:
    return Study("presets", ARMS, lambda seed: arithmetic(args.data, seed), QUICKSTART, settings=SETTINGS, order=ORDER)


def arithmetic(folder: Path, seed: int) -> list[str]:
    """A seed's task, made where it is not there."""
    folder = folder / f"seed_{seed}"
    make_arithmetic(folder, seed)
    return settings_of(folder)
