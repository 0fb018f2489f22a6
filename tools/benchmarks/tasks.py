"""What measurements train on: tasks in folders, and runs of them resolved as the command line resolves them.

A task is a folder with train/*.jsonl, one file per source, val.jsonl and, where a test set is needed, test.jsonl.
"""

import os
import subprocess
import sys
from pathlib import Path

from megatron_scalebio.config import Config, given_settings, load_config
from megatron_scalebio.data import Dataset, load_dataset
from megatron_scalebio.hf import adopt_checkpoint, check_checkpoint
from megatron_scalebio.rules import check_config

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "examples" / "quickstart.yaml")


def open_task(config_file: str | None, settings: list[str]) -> tuple[Config, Dataset]:
    """A run's settings, checked, and its data. Raises: UserError."""
    config, world_size = load_config(config_file, settings), int(os.environ.get("WORLD_SIZE", 1))
    if config.model.hf_path is not None:
        adopt_checkpoint(config, given_settings(config_file, settings))
        check_checkpoint(config)
    check_config(config, world_size, None)
    dataset = load_dataset(config)
    check_config(config, world_size, dataset.tokenizer.vocab_size)
    return config, dataset


def sources_of(folder: Path) -> list[str]:
    """The names of a task's sources, in the order in which `settings_of` names them."""
    return [file.stem for file in _train_files(folder)]


def settings_of(folder: Path) -> list[str]:
    """The settings that let a run train on a task."""
    sources = ", ".join(f"{{name: {file.stem}, path: '{file.absolute()}'}}" for file in _train_files(folder))
    validation, test = (folder.absolute() / name for name in ("val.jsonl", "test.jsonl"))
    return [f"data.sources=[{sources}]", f"data.validation={validation}", *([f"data.test={test}"] * test.is_file())]


def _train_files(folder: Path) -> list[Path]:
    return sorted((folder / "train").glob("*.jsonl"))


def make_arithmetic(folder: Path, seed: int) -> None:
    """Five sources of sums with 0, 25, 50, 75 and 100% wrong answers; what is there and equal stays."""
    command = [sys.executable, str(ROOT / "examples/arithmetic.py"), str(folder), "--seed", str(seed)]
    subprocess.run(command, check=True)
