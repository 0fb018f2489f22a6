"""Where a step's time goes: named spans, entered where the work is, which torch.profiler records while it runs.

Spans nest as the work does, and the innermost one says what a moment is. Collectives need none: torch's profiler names
each of them, wherever it is called.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum

import torch
from torch.profiler import ProfilerActivity, profile, record_function


class Span(StrEnum):
    """The names, as a trace shows them."""

    STEP = "step"
    BATCH = "batch"  # drawing and packing the examples; moving them to the device
    REDRAW = "redraw"  # freezing and thawing at a period's start
    FLUSH = "flush"  # one run of the pipeline's schedule, in which the passes lie
    LOWER_FORWARD = "lower forward"
    LOWER_BACKWARD = "lower backward"
    UPPER_FORWARD = "upper forward"
    UPPER_BACKWARD = "upper backward"
    LOSS = "loss"  # the head and its cross-entropy, in both models
    SENDING = "sending"  # to another stage, where nothing is waited for in return
    WAITING = "waiting"  # for what another stage sends, and for the slowest rank where losses are added up
    OPTIMIZER = "optimizer"  # zeroing, reducing and clipping gradients, AdamW over the active blocks
    EVALUATION = "evaluation"


_NOTHING = nullcontext()


def profiling() -> bool:
    """Whether a profiler records this thread."""
    return torch.autograd._profiler_enabled()


def span(name: Span) -> AbstractContextManager[object]:
    """What runs inside is `name`. Without a profiler this does nothing: `record_function` alone would take 20 us."""
    return record_function(name.value) if profiling() else _NOTHING


def profiler(device: torch.device) -> profile:
    """torch's profiler of this process and, where it drives one, its GPU; not yet started."""
    # Kineto writes to stderr whenever it starts or stops, and where it finds no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    on_cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *on_cuda])
