"""Losses of a short run, kept in git, so that a refactor can show that it changed no number.

    python tests/golden/make.py            writes tests/golden/arithmetic.json; fp64, so that machines agree closely
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FILE = HERE / "arithmetic.json"
SETTINGS = ["parallel.tensor=1", "precision.compute=fp64", "bilevel.preset=default", "lisa.period=2", "run.device=cpu"]
STEPS = 6
LOSSES = ("train_loss_lower", "train_loss_upper", "val_loss", "penalty_gap")
KEYS = (*LOSSES, "hypergradient", "grad_norm_lower", "grad_norm_upper", "weights")


def golden_run(data: str) -> list[dict]:
    """The records of the first steps of examples/quickstart.yaml on the arithmetic data in a folder."""
    from megatron_scalebio.config import load_config
    from megatron_scalebio.data import load_dataset
    from megatron_scalebio.trainer import Trainer

    config = load_config(str(ROOT / "examples/quickstart.yaml"), SETTINGS)
    for source in config.data.sources:
        source.path = str(Path(data) / "train" / Path(source.path).name)
    config.data.validation, config.data.test = str(Path(data) / "val.jsonl"), None
    trainer = Trainer(config, load_dataset(config))
    records = []
    for _ in range(STEPS):
        record = trainer.record(*trainer.take_step()).to_dict()
        records.append({key: record[key] for key in KEYS})
    return records


def make_data(folder: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "examples/arithmetic.py"), folder, "--seed", "1"], check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        make_data(folder)
        FILE.write_text(json.dumps(golden_run(folder), indent=1) + "\n", encoding="utf-8")
