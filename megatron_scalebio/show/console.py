"""What a person sees while a run goes on: a live view on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.bar import Bar
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

MOST_SOURCES_SHOWN = 20
REFRESH_SECONDS = 0.1


class RunConsole:
    """Shows records as they come; `show` takes the keys of metrics.jsonl. Use it as a context manager."""

    def __init__(self, total_steps: int, plain_every: int, console: Console | None = None):
        self.total_steps, self.plain_every = total_steps, plain_every
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._seconds: list[float] = []  # of the latest steps
        self._refreshed = 0.0

    def __enter__(self) -> "RunConsole":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def print(self, text: str) -> None:
        """Prints above the live view."""
        self.console.print(Text(text))

    def print_weights(
        self,
        num_examples: dict[str, int],
        weights: dict[str, float],
        weights_mean: dict[str, float],
        still_moving: bool,
    ) -> None:
        """Prints the table that a run ends with."""
        table = Table("source")
        for head in ("examples", "final weight", "mean of last quarter"):
            table.add_column(head, justify="right")
        for name, weight in weights.items():
            table.add_row(Text(name), str(num_examples[name]), f"{weight:.3f}", f"{weights_mean[name]:.3f}")
        self.console.print(table)
        if still_moving:
            self.print("The weights are still moving: more steps would move them further.")

    def show(self, record: dict[str, Any]) -> None:
        """Shows one step's record; plain output shows the first, the last, every `plain_every`th and evaluations."""
        step, last = record["step"], record["step"] == self.total_steps
        first = not self._seconds
        self._seconds = [*self._seconds, record.get("step_seconds") or 0.0][-20:]
        if self.live:
            if last or time.monotonic() - self._refreshed > REFRESH_SECONDS:
                self.live.update(self._view(record), refresh=True)
                self._refreshed = time.monotonic()
        elif first or last or step % self.plain_every == 0 or "test_loss" in record:
            numbers, pace, weights = self._numbers(record), self._pace(record), _weights_text(record["weights"])
            self.print(f"step {step}/{self.total_steps}  {numbers}  {pace}  {weights}")

    def _numbers(self, record: dict[str, Any]) -> str:
        """Losses and gap."""
        parts = []
        for name, key in (("lower", "train_loss_lower"), ("upper", "train_loss_upper")):
            losses = [loss for loss in (record.get(key) or {}).values() if loss is not None]
            if losses:
                parts.append(f"{name} {sum(losses) / len(losses):.4f}")
        for name, key in (("val", "val_loss"), ("test", "test_loss")):
            if record.get(key) is not None:
                parts.append(f"{name} {record[key]:.4f}")
        if record.get("penalty_gap") is not None:
            parts.append(f"gap {record['penalty_gap']:+.1e}")
        return "  ".join(parts)

    def _pace(self, record: dict[str, Any]) -> str:
        seconds = sum(self._seconds) / len(self._seconds)
        return f"{seconds:.2f} s/step  ETA {duration(seconds * (self.total_steps - record['step']))}"

    def _view(self, record: dict[str, Any]) -> Group:
        progress = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self.total_steps, completed=record["step"], width=30)
        progress.add_row(Text(f"step {record['step']}/{self.total_steps}"), bar, Text(self._pace(record)))
        weights = record["weights"]
        shown = sorted(weights, key=weights.get, reverse=True)[:MOST_SOURCES_SHOWN] if weights else []
        largest = max(weights.values(), default=1.0)
        chart = Table.grid(padding=(0, 1))
        for name in (name for name in weights if name in shown):
            bar = Bar(size=largest, begin=0, end=weights[name], width=40, color="cyan")
            chart.add_row(Text(name), bar, Text(f"{weights[name]:.3f}"))
        if len(weights) > len(shown):
            chart.add_row(Text(f"and {len(weights) - len(shown)} more", style="dim"))
        return Group(progress, Text(self._numbers(record)), chart)


def duration(seconds: float) -> str:
    """Seconds as 42s, 3:07 or 2:03:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest}s"


def _weights_text(weights: dict[str, float]) -> str:
    """name=.123 of each source; of many, the heaviest."""
    shown = sorted(weights, key=weights.get, reverse=True)[:8]
    text = " ".join(f"{name}={weights[name]:.3f}".replace("=0.", "=.") for name in weights if name in shown)
    return text + (f" and {len(weights) - len(shown)} more" if len(weights) > len(shown) else "")
