"""A step's time by part: lower, upper, loss, optimizer, redraw, communication, waiting, other.

The product has no timers: its functions, and Megatron-Core's, are wrapped from outside while a split is taken. Sections
nest, and each moment counts towards the innermost one, so the parts add up to the step.

    lower, upper    a model's forward and backward passes, recomputation included
    loss            the head and its cross-entropy, in both models
    optimizer       zeroing, norm and AdamW over the active blocks
    redraw          freezing and thawing at a period's start
    communication   collectives, wherever they are called, and what is sent to another stage
    waiting         for what another stage sends, and for the slowest rank where the losses are added up
    other           the rest: the batch, the schedule, the losses' sums, the logits

A collective that runs beside other work counts for as long as the call takes to return control; what is waited for
later counts where it is waited for. On CUDA the sections are times on the device's main stream, between events.
"""

import importlib
import inspect
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron_scalebio.kernels import head_loss

from megatron_scalebio.mcore.dual_model import DualModel, Task
from megatron_scalebio.trainer import Trainer

PARTS = ("lower", "upper", "loss", "optimizer", "redraw", "communication", "waiting", "other")

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
TENSOR_PARALLEL = ("megatron.core.tensor_parallel.layers", "megatron.core.tensor_parallel.mappings")
ITS_COLLECTIVES = ("dist_all_gather_func", "dist_reduce_scatter_func")  # Megatron-Core's own names for two of them
RECEIVING = ("recv_forward", "recv_backward", "send_forward_recv_backward", "send_backward_recv_forward")
SENDING = ("send_forward", "send_backward")


class Stopwatch:
    """Seconds by section since `start`, each moment in the innermost one only.

    Args:
        mark: notes the present moment.
        between: seconds from one mark to a later one, asked for after `finish`.
        finish: waits until all marks have been passed.
    """

    def __init__(
        self, mark: Callable[[], Any], between: Callable[[Any, Any], float], finish: Callable[[], None] = lambda: None
    ):
        self._mark, self._between, self._finish = mark, between, finish
        self._open: list[str] = []
        self._marks: list[tuple[Any, str]] = []  # a moment, and the section from there on

    def start(self) -> None:
        self._open, self._marks = ["other"], [(self._mark(), "other")]

    @contextmanager
    def section(self, part: str) -> Iterator[None]:
        """What runs inside counts towards `part`; nothing that happens while waiting is anything else."""
        self._open.append("waiting" if self._open[-1] == "waiting" else part)
        self._marks.append((self._mark(), self._open[-1]))
        try:
            yield
        finally:
            self._open.pop()
            self._marks.append((self._mark(), self._open[-1]))

    def stop(self) -> Counter[str]:
        """Seconds by section."""
        self._marks.append((self._mark(), "other"))
        self._finish()
        seconds: Counter[str] = Counter()
        for (start, part), (end, _) in zip(self._marks, self._marks[1:], strict=False):
            seconds[part] += self._between(start, end)
        return seconds


def stopwatch(device: torch.device) -> Stopwatch:
    """On the device's clock: events on CUDA, which make neither the host nor the device wait."""
    if device.type != "cuda":
        return Stopwatch(time.perf_counter, lambda start, end: end - start)

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return Stopwatch(mark, lambda start, end: start.elapsed_time(end) / 1e3, torch.cuda.synchronize)


@contextmanager
def sections(trainer: Trainer, watch: Stopwatch) -> Iterator[None]:
    """While entered, the parts of the trainer's steps are sections of the watch."""
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    p2p = importlib.import_module("megatron.core.pipeline_parallel.p2p_communication").P2PCommunicator
    models, operation = trainer.models, head_loss._HeadLoss
    wrapped = [(models, "redraw", "redraw"), (models, "_add_over_ranks", "waiting")]
    wrapped += [(operation, name, "loss") for name in ("forward", "backward")]
    for active_set in models.active_sets.values():
        wrapped += [(active_set, name, "optimizer") for name in ("zero_gradients", "reduce_gradients", "step")]
    wrapped += [(dist, name, "communication") for name in COLLECTIVES]
    wrapped += [
        (importlib.import_module(module), name, "communication")
        for module in TENSOR_PARALLEL
        for name in ITS_COLLECTIVES
    ]
    wrapped += [(p2p, name, "waiting") for name in RECEIVING] + [(p2p, name, "communication") for name in SENDING]
    with ExitStack() as stack:
        for owner, name, part in wrapped:
            stack.enter_context(_replaced(owner, name, _timed(getattr(owner, name), watch, part)))
        forward, backward = _timed_passes(schedules.backward_step, watch)
        stack.enter_context(_replaced(DualModel, "forward", forward))
        stack.enter_context(_replaced(schedules, "backward_step", backward))
        yield


def _timed(function: Callable, watch: Stopwatch, part: str) -> Callable:
    def call(*args: Any, **keywords: Any) -> Any:
        with watch.section(part):
            return function(*args, **keywords)

    return call


def _timed_passes(backward_step: Callable, watch: Stopwatch) -> tuple[Callable, Callable]:
    """A model's forward pass, and the schedule's backward pass. The schedule does not tell whose backward pass it is,
    but takes micro-batches in the order of their forward passes."""
    original, in_flight = DualModel.forward, deque()

    def forward(chunk: DualModel, task: Task) -> Any:
        in_flight.append(task.role)
        with watch.section(task.role.value):
            return original(chunk, task)

    def backward(*args: Any) -> Any:
        with watch.section(in_flight.popleft().value):
            return backward_step(*args)

    return forward, backward


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module, class or instance has another value; afterwards it is where and what it was."""
    before, own = inspect.getattr_static(owner, name), name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
