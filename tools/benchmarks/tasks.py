"""What measurements train on: tasks in folders.

A task is a folder with train/*.jsonl, one file per source, val.jsonl and, where a test set is needed, test.jsonl.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "examples" / "quickstart.yaml")


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
