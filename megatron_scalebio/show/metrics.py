"""One record per step on disk: metrics.jsonl and weights.json."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scalebio.config import Config, UserError, config_sha256, flatten, load_config
from megatron_scalebio.show.record import StepRecord

# A weight that moved by more than this in the last quarter of the steps has not settled.
MOVING = 0.02
OUTPUTS = ("weights.json", "metrics.jsonl", "config.yaml", "checkpoints", "hf", "report.html", "profile")


def check_output_dir(config: Config) -> None:
    """Refuses an output folder that holds another run, or that nobody can write to; deletes nothing.

    Under `run.resume=auto` a run found there is this run if all settings are equal, those of `run` but its seed aside.

    Raises:
        UserError: naming the folder, what it holds and, under `auto`, the settings that differ.
    """
    folder = Path(config.run.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.output_dir={folder} is not a folder")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(f"run.output_dir={folder}: {existing} cannot be written to")
    found = [name for name in OUTPUTS if (folder / name).exists()]
    if not found:
        return
    if config.run.resume == "never":
        raise UserError(
            f"run.output_dir={folder} holds another run ({', '.join(found)}): name another folder, or continue that run"
            " with run.resume=auto"
        )
    if "config.yaml" not in found:
        raise UserError(
            f"run.output_dir={folder} holds {', '.join(found)} but no config.yaml to tell which run that was:"
            " name another folder"
        )
    other = load_config(str(folder / "config.yaml"), [])
    if config_sha256(other) != config_sha256(config):
        before, after = flatten(other), flatten(config)
        differing = [
            f"{key}: {before[key]} there, {after[key]} here"
            for key in after
            if before[key] != after[key] and (key == "run.seed" or not key.startswith("run."))
        ]
        raise UserError(
            f"run.output_dir={folder} holds a run with other settings, which run.resume=auto cannot continue:\n  "
            + "\n  ".join(differing)
        )


class MetricsFiles:
    """The writer of one run's metrics.jsonl and weights.json.

    `num_examples` is {source name: usable records}, in the order of the sources.
    """

    def __init__(self, config: Config, num_examples: dict[str, int]):
        self.num_examples, self.config_sha256 = num_examples, config_sha256(config)
        self.folder = Path(config.run.output_dir)

    def open(self) -> None:
        self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")

    def record(self, record: StepRecord, summary: dict[str, Any]) -> None:
        """On disk, flushed, before it returns."""
        line = record.to_dict()
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        self._metrics.flush()
        content = {
            "step": line["step"],
            "weights": summary["weights"],
            "weights_mean": summary["weights_mean"],
            "logits": line["logits"],
            "num_examples": self.num_examples,
            "still_moving": summary["still_moving"],
            "config_sha256": self.config_sha256,
        }
        replace_file(self.folder / "weights.json", json.dumps(content, indent=2, allow_nan=False) + "\n")

    def close(self, summary: dict[str, Any] | None) -> None:
        self._metrics.close()


def claim_folder(folder: Path) -> None:
    """Of two runs started into one folder at once the second ends here, before it touches the first's files."""
    try:
        (folder / "config.yaml").touch(exist_ok=False)
    except FileExistsError:
        raise UserError(f"run.output_dir={folder}: another run began there; name another folder") from None


def take_up_metrics(folder: Path, start_step: int) -> list[dict[str, Any]]:
    """The records up to `start_step`; what follows them in the file is moved aside, never deleted."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept: list[dict[str, Any]] = []
    for line in lines:
        record = _parse(line)
        if record is None or record["step"] != len(kept) + 1 or record["step"] > start_step:
            break
        kept.append(record)
    if len(kept) < start_step:
        raise UserError(
            f"{path} holds the records of steps 1 to {len(kept)}, but the run continues from step"
            f" {start_step}: weights_mean needs them all; restore the file, or start anew in another folder"
        )
    if lines[len(kept) :]:
        number = 1
        while (aside := folder / f"metrics.dropped-{number}.jsonl").exists():
            number += 1
        replace_file(aside, "".join(lines[len(kept) :]))
        replace_file(path, "".join(lines[: len(kept)]))
    return kept


def weights_summary(history: list[dict[str, float]]) -> dict[str, Any]:
    """{"weights", "weights_mean", "still_moving"} of the weights after each step so far.

    The mean is over the last ceil(step / 4) steps; a weight has moved if, from the step before them on, its largest and
    smallest values lie more than MOVING apart.
    """
    quarter = math.ceil(len(history) / 4)
    table = np.array([list(weights.values()) for weights in history[-quarter - 1 :]])  # [steps, sources]
    return {
        "weights": history[-1],
        "weights_mean": dict(zip(history[-1], table[-quarter:].mean(axis=0).tolist(), strict=True)),
        "still_moving": bool((table.max(axis=0) - table.min(axis=0) > MOVING).any()),
    }


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """All complete records of a run, in the order of their steps; a half-written last line is left out."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [record for record in map(_parse, lines) if record is not None]


def read_weights(output_dir: Path) -> dict[str, Any]:
    """The content of a run's weights.json."""
    return json.loads((output_dir / "weights.json").read_text(encoding="utf-8"))


def replace_file(path: Path, content: str) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)


def _parse(line: str) -> dict[str, Any] | None:
    """The record of a line, or None if the line was cut off while being written."""
    if not line.endswith("\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None
