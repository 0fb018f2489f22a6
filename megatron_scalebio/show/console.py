"""What a person sees while a run goes on: a live view on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from typing import Any

from rich.bar import Bar
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_scalebio.config import Config
from megatron_scalebio.resolution import changed_from_preset
from megatron_scalebio.show.record import StepRecord

MOST_SOURCES_SHOWN = 20
REFRESH_SECONDS = 0.1
MOST_STEPS_AVERAGED = 20


class RunConsole:
    """The writer that a person watches. `num_examples` is {source name: usable records}."""

    def __init__(self, config: Config, num_examples: dict[str, int], console: Console | None = None):
        self.config, self.num_examples, self.total_steps = config, num_examples, config.bilevel.steps
        self.plain_every = max(1, (config.run.eval_every or self.total_steps) // 10)
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._latest: list[StepRecord] = []
        self._held_back: set[str] = set()
        self._refreshed = 0.0

    def open(self) -> None:
        if self.live:
            self.live.start()
        self._print(f"outputs: {self.config.run.output_dir}")
        changes, preset = changed_from_preset(self.config), self.config.bilevel.preset
        self._print(f"differs from preset {preset}:" if changes else "as the preset")
        for key, (preset_value, value) in changes.items():
            self._print(f"  {key}: {value} (preset: {preset_value})")

    def record(self, record: StepRecord, summary: dict[str, Any]) -> None:
        """Plain output shows the first step, the last, every `plain_every`th and evaluations."""
        step, last = record.step, record.step == self.total_steps
        first = not self._latest
        self._tell_held_back(record)
        self._latest = [*self._latest, record][-MOST_STEPS_AVERAGED:]
        if self.live:
            if last or time.monotonic() - self._refreshed > REFRESH_SECONDS:
                self.live.update(self._view(record), refresh=True)
                self._refreshed = time.monotonic()
        elif first or last or step % self.plain_every == 0 or record.test_loss is not None:
            numbers, pace, weights = _numbers(record), self._pace(), _weights_text(record.weights)
            self._print(f"step {step}/{self.total_steps}  {numbers}  {pace}  {weights}")

    def close(self, summary: dict[str, Any] | None) -> None:
        """Ends the live view; prints the table that a run ends with."""
        if self.live:
            self.live.stop()
        if summary is None:
            return
        self.console.print(self._table(summary))
        self._print(movement(summary, self.config))
        for line in warnings_of(summary):
            self._print(line)

    def _table(self, summary: dict[str, Any]) -> Table:
        table, intervals = Table(), summary["intervals"]
        table.add_column("source", min_width=min(24, max(map(len, summary["weights"]))))  # others wrap before it is cut
        for head in (
            "examples",
            "final weight",
            *interval_head(intervals),
            "mean of last quarter",
            "settled",
            "epochs",
        ):
            table.add_column(head, justify="right")
        for name, weight in summary["weights"].items():
            mean = summary["weights_mean"][name]
            settled, epochs = "yes" if summary["settled"][name] else "no", f"{summary['epochs'][name]:.2f}"
            numbers = f"{weight:.3f}", *interval_text(intervals, name), f"{mean:.3f}"
            table.add_row(Text(name), str(self.num_examples[name]), *numbers, settled, epochs)
        return table

    def _tell_held_back(self, record: StepRecord) -> None:
        """Once of each source."""
        new = [name for name, kept in record.kept.items() if kept < 1 and name not in self._held_back]
        self._held_back.update(new)
        if new:
            limit = f"data.max_epochs={self.config.data.max_epochs:g}"
            self._print(f"step {record.step}: {limit} holds {', '.join(new)} back; the others take that share")

    def _print(self, text: str) -> None:
        """Above the live view."""
        self.console.print(Text(text))

    def _pace(self) -> str:
        """Of the latest steps, as one: totals over total time."""
        seconds = sum(record.step_seconds for record in self._latest)
        per_step, last = seconds / len(self._latest), self._latest[-1]

        def mean(rate: Callable[[StepRecord], float]) -> float:
            return sum(rate(record) * record.step_seconds for record in self._latest) / seconds

        tokens, tflops = mean(lambda record: record.tokens_per_second), mean(lambda record: record.tflops_per_gpu)
        mfu = "" if last.mfu is None else f"  MFU {mean(lambda record: record.mfu or 0.0):.0%}"
        left = duration(per_step * (self.total_steps - last.step))
        return f"{per_step:.2f} s/step  {tokens:,.0f} tokens/s  {tflops:.3g} TFLOP/s per rank{mfu}  ETA {left}"

    def _view(self, record: StepRecord) -> Group:
        progress = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self.total_steps, completed=record.step, width=30)
        progress.add_row(Text(f"step {record.step}/{self.total_steps}"), bar, Text(self._pace()))
        weights = record.weights
        shown = sorted(weights, key=weights.__getitem__, reverse=True)[:MOST_SOURCES_SHOWN] if weights else []
        largest = max(weights.values(), default=1.0)
        chart = Table.grid(padding=(0, 1))
        for name in (name for name in weights if name in shown):
            bar = Bar(size=largest, begin=0, end=weights[name], width=40, color="cyan")
            chart.add_row(Text(name), bar, Text(f"{weights[name]:.3f}"))
        if len(weights) > len(shown):
            chart.add_row(Text(f"and {len(weights) - len(shown)} more", style="dim"))
        return Group(progress, Text(_numbers(record)), chart)


def interval_head(intervals: dict[str, tuple[float, float]] | None) -> tuple[str, ...]:
    """Of the column that a run has where it was long enough for one."""
    return () if intervals is None else ("95% interval",)


def interval_text(intervals: dict[str, tuple[float, float]] | None, name: str) -> tuple[str, ...]:
    """The cell below `interval_head`."""
    return () if intervals is None else ("{:.3f}-{:.3f}".format(*intervals[name]).replace("0.", "."),)


def movement(summary: dict[str, Any], config: Config) -> str:
    """Whether the weights have come to rest; of runs of earlier versions that have moved is taken for granted."""
    if config.bilevel.mode == "fixed":
        return "The weights are fixed."
    if not summary.get("moved", True):
        gate = f"within bilevel.logits_gate={config.bilevel.logits_gate:g} standard errors of the mean gap"
        return f"No weight has moved: the gap of every source was {gate}, or no step had a logits_lr."
    if summary["still_moving"]:
        return "Some weights were still moving at the end: more steps would move them further."
    return "The weights have settled."


def warnings_of(summary: dict[str, Any]) -> list[str]:
    """What a user should know of the sources' records."""
    lines = []
    for name, twice in summary["num_duplicates"].items():
        if twice:
            lines.append(f"{name}: {twice} of its examples are exact duplicates of others in it")
    for name, found in summary["overfitting"].items():
        if found:
            seen = f"its records have been seen {summary['epochs'][name]:.1f} times"
            lines.append(f"{name} is overfitting: {seen}, its training loss falls, the validation loss does not")
    return lines


def _numbers(record: StepRecord) -> str:
    """Losses and gap."""
    parts = []
    for name, by_source in (("lower", record.train_loss_lower), ("upper", record.train_loss_upper)):
        losses = [loss for loss in by_source.values() if loss is not None]
        if losses:
            parts.append(f"{name} {sum(losses) / len(losses):.4f}")
    sets = ("val", record.val_loss, record.val_losses), ("test", record.test_loss, record.test_losses or {})
    for name, loss, by_set in sets:
        if loss is not None:
            each = ", ".join(f"{own} {value:.4f}" for own, value in by_set.items())
            parts.append(f"{name} {loss:.4f}" + (f" ({each})" if each else ""))
    if record.penalty_gap is not None:
        parts.append(f"gap {record.penalty_gap:+.1e}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as 42s, 3:07 or 2:03:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest}s"


def _weights_text(weights: dict[str, float]) -> str:
    """name=.123 of each source; of many, the heaviest."""
    shown = sorted(weights, key=weights.__getitem__, reverse=True)[:8]
    text = " ".join(f"{name}={weights[name]:.3f}".replace("=0.", "=.") for name in weights if name in shown)
    return text + (f" and {len(weights) - len(shown)} more" if len(weights) > len(shown) else "")
