"""A short run whose losses are kept in git (tests/golden), so that a refactor can show that it changed no number."""

import tempfile
from pathlib import Path
from typing import Any

from megatron_scalebio import Trainer, open_run
from tools.benchmarks.tasks import QUICKSTART, make_arithmetic, settings_of

SETTINGS = ["parallel.tensor=1", "precision.compute=fp64", "bilevel.preset=default", "lisa.period=2", "run.device=cpu"]
SETTINGS += ["data.sampling=stratified", "bilevel.logits_gate=0"]
STEPS = 6
LOSSES = ("train_loss_lower", "train_loss_upper", "val_loss", "penalty_gap")
KEYS = (*LOSSES, "hypergradient", "grad_norm_lower", "grad_norm_upper", "weights")


def golden_run(*settings: str) -> list[dict[str, Any]]:
    """The records of the first steps of examples/quickstart.yaml; fp64 on the CPU, so that machines agree closely.

    Args:
        settings: section.key=value, over those of the golden run.
    """
    with tempfile.TemporaryDirectory() as folder:
        make_arithmetic(Path(folder), seed=1)
        task = [*settings_of(Path(folder)), "data.test=null"]
        trainer = Trainer(open_run(QUICKSTART, [*SETTINGS, *task, *settings], writes=False))
    records = []
    for _ in range(STEPS):
        record = trainer.record(*trainer.take_step()).to_dict()
        records.append({key: record[key] for key in KEYS})
    return records
