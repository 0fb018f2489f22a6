"""A step's time by part, from a trace of it: lower, upper, loss, optimizer, redraw, communication, waiting, other.

A trace is what torch.profiler exports (`run.profile` writes such files): the spans that the product marks
(`megatron_scalebio.spans`), torch's operations, and on CUDA what the device did. Each moment counts towards the
innermost span, so the parts add up to the step.

    lower, upper    a model's forward and backward passes, recomputation included
    loss            the head and its cross-entropy, in both models
    optimizer       zeroing, norm and AdamW over the active blocks
    redraw          freezing and thawing at a period's start
    communication   collectives, wherever they are called, and what is sent to another stage
    waiting         for what another stage sends, and for the slowest rank where the losses are added up
    other           the rest: the batch, the schedule, the losses' sums, the logits

A collective that runs beside other work is that work's time. On CUDA a part's time is that of the kernels and copies
that were launched in its spans, with the device's idle time before each of them.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_scalebio.spans import Span

PARTS = ("lower", "upper", "loss", "optimizer", "redraw", "communication", "waiting", "other")

PART_OF: dict[Span, str] = {
    Span.LOWER_FORWARD: "lower",
    Span.LOWER_BACKWARD: "lower",
    Span.UPPER_FORWARD: "upper",
    Span.UPPER_BACKWARD: "upper",
    Span.LOSS: "loss",
    Span.OPTIMIZER: "optimizer",
    Span.REDRAW: "redraw",
    Span.SENDING: "communication",
    Span.WAITING: "waiting",
}

# What else the host does, as the profiler calls it.
COLLECTIVES = ("c10d::", "gloo:", "nccl:")  # called here; gloo's threads run it; NCCL's are done when they are launched
OPERATIONS = "aten::"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")

Event = dict[str, Any]  # of a Chrome trace: ts and dur are microseconds


def seconds_by_part(events: Iterable[Event]) -> Counter[str]:
    """Seconds of a trace's steps by part, on the device if it ran anything, else on the host.

    Args:
        events: `traceEvents` of one process.
    """
    # Without an end an event has no moment. Of two that begin at once the longer one holds the other.
    events = [event for event in events if event.get("ph") == "X" and event["dur"] > 0]
    events.sort(key=lambda event: (event["ts"], -event["dur"]))
    moments = list(_host_moments(events))
    on_device = [event for event in events if event["cat"] in ON_DEVICE]
    seconds: Counter[str] = Counter()
    for part, microseconds in _on_device(events, on_device, moments) if on_device else _on_host(moments):
        seconds[part] += microseconds / 1e6  # type: ignore[unsupported-operation]  # typeshed counts in integers
    return seconds


def _host_moments(events: list[Event]) -> Iterator[tuple[float, str | None]]:
    """(a moment, the part from there on) in order; None outside of any step."""
    edges = []
    for number, event in enumerate(events):
        kind = _kind(event)
        if kind is not None:
            edges += [(event["ts"], 1, number, kind), (event["ts"] + event["dur"], 0, number, kind)]
    spans: dict[int, str] = {}  # those open, in the order in which they were entered
    beside: Counter[str] = Counter()
    for time, begins, number, kind in sorted(edges, key=lambda edge: edge[:2]):
        if kind in (OPERATIONS, "communication"):
            beside[kind] += 1 if begins else -1
        elif begins:
            spans[number] = kind
        else:
            del spans[number]
        yield time, _part(list(spans.values()), beside)


def _kind(event: Event) -> str | None:
    """A span's part, what else matters, or None."""
    name = event["name"]
    if event["cat"] == "user_annotation" and name in Span:
        return PART_OF.get(Span(name), "other")
    if name.startswith(COLLECTIVES):
        return "communication"
    return OPERATIONS if name.startswith(OPERATIONS) else None


def _part(spans: list[str], beside: Counter[str]) -> str | None:
    if not spans:
        return None
    if "waiting" in spans:  # nothing that happens while waiting is anything else
        return "waiting"
    return "communication" if beside["communication"] and not beside[OPERATIONS] else spans[-1]


def _on_host(moments: list[tuple[float, str | None]]) -> Iterator[tuple[str, float]]:
    for (start, part), (end, _) in zip(moments, moments[1:], strict=False):
        if part is not None:
            yield part, end - start


def _on_device(
    events: list[Event], on_device: list[Event], moments: list[tuple[float, str | None]]
) -> Iterator[tuple[str, float]]:
    """Of all streams together: a moment belongs to what ends first of what is running or comes next."""
    launched = {_correlation(event): event["ts"] for event in events if event["cat"] in LAUNCHES}
    times = [time for time, _ in moments]
    reached = times[0]
    for event in sorted(on_device, key=lambda event: event["ts"] + event["dur"]):
        index = bisect_right(times, launched.get(_correlation(event), event["ts"])) - 1
        part, end = moments[index][1] if index >= 0 else None, event["ts"] + event["dur"]
        if part is not None and end > reached:
            yield part, end - reached
        reached = max(reached, end)


def _correlation(event: Event) -> int | None:
    """What a launch and what it launched have in common."""
    return event.get("args", {}).get("correlation")
