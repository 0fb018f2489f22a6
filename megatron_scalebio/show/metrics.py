"""One record per step on disk: metrics.jsonl and weights.json."""

import json
from pathlib import Path
from typing import Any

from megatron_scalebio.config import Config, UserError, config_sha256
from megatron_scalebio.run_folder import RunFolder, replace_file
from megatron_scalebio.show.record import StepRecord


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
            "intervals": summary["intervals"],
            "logits": line["logits"],
            "num_examples": self.num_examples,
            "num_duplicates": summary["num_duplicates"],
            "epochs": summary["epochs"],
            "epochs_planned": summary["epochs_planned"],
            "overfitting": summary["overfitting"],
            "moved": summary["moved"],
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
