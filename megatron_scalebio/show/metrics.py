"""One record per step on disk: metrics.jsonl and weights.json."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scalebio.config import Config, UserError, config_sha256
from megatron_scalebio.run_folder import RunFolder, replace_file
from megatron_scalebio.show.record import StepRecord

# A weight has settled if its trend over the last quarter of the steps is below TREND of itself (of LEAST of an equal
# share, where it is lower), or within NOISE times its scatter about that trend. Fewer than FEWEST steps say nothing.
TREND, LEAST, NOISE, FEWEST = 0.1, 0.1, 2.0, 5


class MetricsFiles:
    """The writer of one run's metrics.jsonl and weights.json.

    `num_examples` is {source name: usable records}, in the order of the sources.
    """

    def __init__(self, config: Config, num_examples: dict[str, int]):
        self.num_examples, self.config_sha256 = num_examples, config_sha256(config)
        self.folder = RunFolder(Path(config.run.output_dir))

    def open(self) -> None:
        self._metrics = open(self.folder.metrics, "a", encoding="utf-8")

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
            "epochs": summary["epochs"],
            "epochs_planned": summary["epochs_planned"],
            "settled": summary["settled"],
            "still_moving": summary["still_moving"],
            "config_sha256": self.config_sha256,
        }
        replace_file(self.folder.weights, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def close(self, summary: dict[str, Any] | None) -> None:
        self._metrics.close()


def claim_folder(folder: RunFolder) -> None:
    """Of two runs started into one folder at once the second ends here, before it touches the first's files."""
    try:
        folder.config.touch(exist_ok=False)
    except FileExistsError:
        raise UserError(f"run.output_dir={folder.path}: another run began there; name another folder") from None


def take_up_metrics(folder: RunFolder, start_step: int) -> list[dict[str, Any]]:
    """The records up to `start_step`; what follows them in the file is moved aside, never deleted."""
    path = folder.metrics
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
        while (aside := folder.path / f"metrics.dropped-{number}.jsonl").exists():
            number += 1
        replace_file(aside, "".join(lines[len(kept) :]))
        replace_file(path, "".join(lines[: len(kept)]))
    return kept


def weights_summary(history: list[dict[str, float]]) -> dict[str, Any]:
    """{"weights", "weights_mean", "settled", "still_moving"} of the weights after each step so far.

    The last quarter is the last ceil(step / 4) steps. The trend is what the line of least squares rises or falls over
    it; a weight whose trend is smaller than the noise about it would not be elsewhere after more such steps.
    """
    quarter, names = math.ceil(len(history) / 4), list(history[-1])
    table = np.array([list(weights.values()) for weights in history[-quarter:]])  # [steps, sources]
    mean, times = table.mean(axis=0), np.arange(quarter) - (quarter - 1) / 2
    slope = times @ (table - mean) / max(times @ times, 1.0)
    scatter = (table - mean - np.outer(times, slope)).std(axis=0)
    trend = np.abs(slope) * quarter
    small = trend < TREND * np.maximum(mean, LEAST / len(names))
    settled = (small | (trend < NOISE * scatter)) & (quarter >= FEWEST)
    return {
        "weights": history[-1],
        "weights_mean": dict(zip(names, mean.tolist(), strict=True)),
        "settled": dict(zip(names, settled.tolist(), strict=True)),
        "still_moving": not settled.all(),
    }


def epochs_summary(drawn: list[dict[str, int]], num_examples: dict[str, int], num_steps: int) -> dict[str, Any]:
    """{"epochs", "epochs_planned"}: how often a source's records have been seen, and will have been after all steps at
    the pace of the last quarter of those so far.

    Args:
        drawn: training examples of each source in each step so far; empty where a step's are not known.
    """
    quarter, left = drawn[-math.ceil(len(drawn) / 4) :], num_steps - len(drawn)
    done = {name: sum(step.get(name, 0) for step in drawn) for name in num_examples}
    pace = {name: sum(step.get(name, 0) for step in quarter) / len(quarter) for name in num_examples}
    return {
        "epochs": {name: done[name] / size for name, size in num_examples.items()},
        "epochs_planned": {name: (done[name] + left * pace[name]) / size for name, size in num_examples.items()},
    }


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """All complete records of a run, in the order of their steps; a half-written last line is left out."""
    lines = RunFolder(output_dir).metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    return [record for record in map(_parse, lines) if record is not None]


def read_weights(output_dir: Path) -> dict[str, Any]:
    """The content of a run's weights.json."""
    return json.loads(RunFolder(output_dir).weights.read_text(encoding="utf-8"))


def _parse(line: str) -> dict[str, Any] | None:
    """The record of a line, or None if the line was cut off while being written."""
    if not line.endswith("\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None
