"""Megatron-Core's schedules start and stop timers; ours are spans."""

import inspect
import re
from unittest import mock

import pytest
from megatron.core.pipeline_parallel import p2p_communication, schedules

from megatron_scalebio.active_layers import Role
from megatron_scalebio.mcore import schedule_spans
from megatron_scalebio.mcore.schedule_spans import ScheduleSpans
from megatron_scalebio.spans import Span


def test_backward_passes_belong_to_the_models_in_the_order_of_their_forward_passes():
    """As 1F1B mixes them: two micro-batches ahead, then one backward after each one forward."""
    lower, upper = Role.LOWER, Role.UPPER
    timers, entered = ScheduleSpans([lower, lower, lower, upper, upper]), []
    with mock.patch.object(schedule_spans, "span", side_effect=lambda name: entered.append(name) or mock.MagicMock()):
        for way in ("forward", "forward", "backward", "forward", "backward", "forward", "backward", "forward"):
            timers(f"{way}-compute", log_level=2).start()
            timers(f"{way}-compute").stop()
        for _ in range(2):
            timers("backward-compute", log_level=2).start()
            timers("backward-compute").stop()
    assert [name for name in entered if "forward" in name] == [Span.LOWER_FORWARD] * 3 + [Span.UPPER_FORWARD] * 2
    assert [name for name in entered if "backward" in name] == [Span.LOWER_BACKWARD] * 3 + [Span.UPPER_BACKWARD] * 2


@pytest.mark.parametrize("module", [schedules, p2p_communication])
def test_every_timer_of_the_schedules_is_a_span_and_ends_as_it_began(module):
    """Read from their source: an upgrade that renames the timers of the passes would leave the passes without spans."""
    source = inspect.getsource(module)
    started = re.findall(r"timers\('([a-z-]+)', log_level=\d\)\.start\(", source)
    stopped = re.findall(r"timers\('([a-z-]+)'\)\.stop\(", source)
    assert set(started) == set(stopped)
    expected = {
        **{"forward-compute": Span.UPPER_FORWARD, "backward-compute": Span.UPPER_BACKWARD},
        **{"forward-backward": Span.FLUSH, "forward-send": Span.SENDING, "backward-send": Span.SENDING},
    }
    for name in set(started):
        assert ScheduleSpans([Role.UPPER]).span_of(name) == expected.get(name, Span.WAITING)
    if module is schedules:
        assert {"forward-compute", "backward-compute", "forward-backward"} <= set(started)
    else:
        assert {"forward-send", "backward-send", "forward-recv", "backward-recv"} <= set(started)
