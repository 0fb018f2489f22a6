"""Who takes a run's records as they come, and who hands them on: see `MetricsWriter.writers`."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from megatron_scalebio.config import Config, write_config
from megatron_scalebio.run_folder import RunFolder
from megatron_scalebio.show.console import RunConsole
from megatron_scalebio.show.metrics import MetricsFiles, claim_folder, take_up_metrics
from megatron_scalebio.show.record import StepRecord
from megatron_scalebio.show.summary import (
    Rows,
    epochs_summary,
    overfitting_summary,
    weight_intervals,
    weights_summary,
)


class Writer(Protocol):
    """Shows or keeps one run's records, on the main rank. `summary` is what show/summary.py makes of all so far, and
    "num_duplicates"."""

    def open(self) -> None:
        """Before the first record: the output folder is this run's, and holds config.yaml and what a run that this one
        continues has written."""

    def record(self, record: StepRecord, summary: dict[str, Any]) -> None:
        """One step, as soon as it is known."""

    def close(self, summary: dict[str, Any] | None) -> None:
        """After the last record. `summary` is None where there was none, or where an exception ends the run."""


class MetricsWriter:
    """Hands each record of a run to its writers; ranks but the main do nothing. Used as a context manager.

    Records of later steps that an interrupted run has left behind are moved to metrics.dropped-N.jsonl.

    Args:
        num_examples, num_duplicates: `Dataset`'s, by source, in the order of the sources.
        start_step: steps already done: 0, or the step of the checkpoint that the run continues from.
    """

    def __init__(
        self,
        config: Config,
        num_examples: dict[str, int],
        num_duplicates: dict[str, int],
        start_step: int,
        is_main_rank: bool,
    ):
        self.config, self.start_step, self.is_main_rank = config, start_step, is_main_rank
        self.folder = RunFolder(Path(config.run.output_dir))
        self.writers: list[Writer] = [MetricsFiles(config, num_examples), RunConsole(config, num_examples)]
        self.num_examples, self.num_duplicates = num_examples, num_duplicates
        self.names = list(num_examples)
        self.history = Rows(len(self.names))  # weights after each step, from step 1
        self.drawn = Rows(len(self.names))  # examples of each source in each step
        self.losses = Rows(len(self.names) + 1)  # of the upper model in each step, by source, and on validation
        self._stack = ExitStack()

    def __enter__(self) -> "MetricsWriter":
        if not self.is_main_rank:
            return self
        self.folder.path.mkdir(parents=True, exist_ok=True)
        if self.start_step == 0 and self.config.run.resume == "never":
            claim_folder(self.folder)
        write_config(self.config, self.folder.config)
        records = take_up_metrics(self.folder, self.start_step)
        for record in records:
            self._remember(record)
        with ExitStack() as stack:  # what was opened is closed, should the next not open
            for writer in self.writers:
                writer.open()
                stack.push(self._closing(writer))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def record(self, record: StepRecord) -> None:
        """Takes one step's record. On disk, flushed, before it returns."""
        if not self.is_main_rank:
            return
        self._remember(record.to_dict())
        summary = self._summary()
        for writer in self.writers:
            writer.record(record, summary)

    def settled(self, *coming: dict[str, float]) -> bool:
        """Whether a run that stops when its weights have settled has its last step behind it; False on ranks but the
        main. Not before a quarter of the planned steps after the logits' warm-up.

        Args:
            coming: weights after a step that is not recorded yet.
        """
        rows = [[weights[name] for name in self.names] for weights in coming]
        history = np.vstack([self.history.table, *rows])[self.config.bilevel.logits_warmup_steps :]
        if not self.is_main_rank or len(history) < max(1, self.config.bilevel.steps / 4):
            return False
        return all(weights_summary(self.names, history)["settled"].values())

    def _remember(self, record: dict[str, Any]) -> None:
        drawn = record.get("num_examples", {})
        self.history.append([record["weights"][name] for name in self.names])
        self.drawn.append([drawn.get(name, 0) for name in self.names])
        self.losses.append([*(record["train_loss_upper"].get(name) for name in self.names), record["val_loss"]])

    def _summary(self) -> dict[str, Any]:
        weights, learned = self.history.table, self.config.bilevel.mode == "bilevel"
        epochs = epochs_summary(self.drawn.table, self.num_examples, self.config.bilevel.steps)
        found: dict[str, Any] = {
            "num_duplicates": self.num_duplicates,
            "overfitting": overfitting_summary(self.losses.table, epochs["epochs"]),
            "intervals": weight_intervals(self.names, weights),
        }
        return weights_summary(self.names, weights, learned) | epochs | found

    def _closing(self, writer: Writer) -> Any:
        """What closes a writer when the run ends: the end of an ExitStack's context."""

        def close(kind: type[BaseException] | None, *_: object) -> None:
            writer.close(self._summary() if kind is None and len(self.history.table) else None)

        return close
