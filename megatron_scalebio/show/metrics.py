"""One record per step: metrics.jsonl, weights.json and the console."""

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scalebio.config import Config, UserError, config_sha256, write_config
from megatron_scalebio.resolution import changed_from_preset
from megatron_scalebio.run_folder import RunFolder, replace_file
from megatron_scalebio.show.console import RunConsole

# A weight that moved by more than this in the last quarter of the steps has not settled.
MOVING = 0.02


class MetricsWriter:
    """Writes one run's metrics.jsonl, weights.json and config.yaml, and shows the run; ranks but the main do nothing.

    Used as a context manager. `num_examples` is {source name: usable records}, in the order of the sources.
    `start_step` is the number of steps already done: 0, or the step of the checkpoint that the run continues from.
    Records of later steps that an interrupted run has left behind are moved to metrics.dropped-N.jsonl.
    """

    def __init__(self, config: Config, num_examples: dict[str, int], start_step: int, is_main_rank: bool):
        self.config, self.num_examples, self.start_step = config, num_examples, start_step
        self.is_main_rank = is_main_rank
        self.folder = RunFolder(Path(config.run.output_dir))
        self.history: list[dict[str, float]] = []  # weights after each step, from step 1
        self._stack = ExitStack()

    def __enter__(self) -> "MetricsWriter":
        if not self.is_main_rank:
            return self
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self._claim_folder()
        write_config(self.config, self.folder.config)
        self.history = [record["weights"] for record in self._take_up_metrics()]
        self._metrics = self._stack.enter_context(open(self.folder.metrics, "a", encoding="utf-8"))
        total, eval_every = self.config.bilevel.steps, self.config.run.eval_every
        self._console = self._stack.enter_context(RunConsole(total, max(1, (eval_every or total) // 10)))
        self._console.print(f"outputs: {self.folder.path}")
        changes = changed_from_preset(self.config)
        self._console.print(f"differs from preset {self.config.bilevel.preset}:" if changes else "as the preset")
        for key, (preset, value) in changes.items():
            self._console.print(f"  {key}: {value} (preset: {preset})")
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._stack.close()
        if self.is_main_rank and kind is None and self.history:
            self._console.print_weights(self.num_examples, self.history[-1], **weights_summary(self.history))

    def record(self, record: dict[str, Any]) -> None:
        """Takes one step's record: the keys of metrics.jsonl, `logits` {name: x} among them, as Python numbers.

        A number that is not finite is written as null. On disk, flushed, before it returns.
        """
        if not self.is_main_rank:
            return
        record = _finite(record)
        self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
        self._metrics.flush()
        self.history.append(record["weights"])
        summary = weights_summary(self.history)
        content = {
            "step": record["step"],
            "weights": record["weights"],
            "weights_mean": summary["weights_mean"],
            "logits": record["logits"],
            "num_examples": self.num_examples,
            "still_moving": summary["still_moving"],
            "config_sha256": config_sha256(self.config),
        }
        replace_file(self.folder.weights, json.dumps(content, indent=2, allow_nan=False) + "\n")
        self._console.show(record)

    def _claim_folder(self) -> None:
        """Of two runs started into one folder at once the second ends here, before it touches the first's files."""
        if self.start_step == 0 and self.config.run.resume == "never":
            try:
                self.folder.config.touch(exist_ok=False)
            except FileExistsError:
                raise UserError(
                    f"run.output_dir={self.folder.path}: another run began there; name another folder"
                ) from None

    def _take_up_metrics(self) -> list[dict[str, Any]]:
        """The records up to `start_step`; what follows them in the file is moved aside, never deleted."""
        path = self.folder.metrics
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept: list[dict[str, Any]] = []
        for line in lines:
            record = _parse(line)
            if record is None or record["step"] != len(kept) + 1 or record["step"] > self.start_step:
                break
            kept.append(record)
        if len(kept) < self.start_step:
            raise UserError(
                f"{path} holds the records of steps 1 to {len(kept)}, but the run continues from step"
                f" {self.start_step}: weights_mean needs them all; restore the file, or start anew in another folder"
            )
        if lines[len(kept) :]:
            number = 1
            while (aside := self.folder.path / f"metrics.dropped-{number}.jsonl").exists():
                number += 1
            replace_file(aside, "".join(lines[len(kept) :]))
            replace_file(path, "".join(lines[: len(kept)]))
        return kept


def weights_summary(history: list[dict[str, float]]) -> dict[str, Any]:
    """{"weights_mean", "still_moving"} of the weights after each step so far.

    The mean is over the last ceil(step / 4) steps; a weight has moved if, from the step before them on, its largest and
    smallest values lie more than MOVING apart.
    """
    quarter = math.ceil(len(history) / 4)
    table = np.array([list(weights.values()) for weights in history[-quarter - 1 :]])  # [steps, sources]
    return {
        "weights_mean": dict(zip(history[-1], table[-quarter:].mean(axis=0).tolist(), strict=True)),
        "still_moving": bool((table.max(axis=0) - table.min(axis=0) > MOVING).any()),
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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
