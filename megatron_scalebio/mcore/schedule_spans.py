"""The passes and transfers of Megatron-Core's schedules, as spans."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

from megatron_scalebio.active_layers import Role
from megatron_scalebio.spans import Span, span

FORWARD = {Role.LOWER: Span.LOWER_FORWARD, Role.UPPER: Span.UPPER_FORWARD}
BACKWARD = {Role.LOWER: Span.LOWER_BACKWARD, Role.UPPER: Span.UPPER_BACKWARD}


class ScheduleSpans:
    """Stands in for Megatron-Core's `config.timers` in one flush: its timers start and stop where spans should.

    The schedule does not tell whose backward pass it runs, but takes micro-batches in the order of their forward
    passes.

    Args:
        roles: the model of each micro-batch of the flush, in their order.
    """

    def __init__(self, roles: Iterable[Role]):
        roles = list(roles)
        self._forward, self._backward = iter(roles), iter(roles)
        self._open: list[AbstractContextManager[object]] = []

    def __call__(self, name: str, log_level: int | None = None) -> "_Timer":
        return _Timer(self, name)

    def span_of(self, timer: str) -> Span:
        """What a timer times; of the passes the next micro-batch's."""
        if timer == "forward-compute":
            return FORWARD[next(self._forward)]
        if timer == "backward-compute":
            return BACKWARD[next(self._backward)]
        if timer in ("forward-send", "backward-send"):
            return Span.SENDING
        return Span.WAITING if "recv" in timer else Span.FLUSH


class _Timer:
    def __init__(self, spans: ScheduleSpans, name: str):
        self.spans, self.name = spans, name

    def start(self, barrier: bool = False) -> None:
        """Enter the span. No barrier, whatever the schedule asks for: a look at the work must not change it."""
        entered = span(self.spans.span_of(self.name))
        entered.__enter__()
        self.spans._open.append(entered)

    def stop(self) -> None:
        """Leave the innermost span: timers nest."""
        self.spans._open.pop().__exit__(None, None, None)
