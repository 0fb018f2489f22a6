"""What a benchmark of one operation at one shape consists of, and the check that comes before its times.

The truth is fp64. An output of ours, or a gradient, may be off by twice what plain PyTorch code in the same dtypes is
off by, plus the rounding of the output's dtype. Where an operation rounds its operands, and the truth is that of the
operands before, a case says what error that must make: half of it would mean that nothing was rounded. A peer's
rounding is its own choice, shown beside its time: it must only compute the same function, which one that takes one
token's coefficient for all, say, does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]

# Relative errors that are no more than rounding, by the dtype of the output: a few units in the last place. FP8 data
# must be the reference's but for a number in some thousands that lies between two.
ROUNDING = {torch.float8_e4m3fn: 1e-3, torch.bfloat16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-12}
PEER_BOUND = 0.1
OF_ROUNDING = (0.5, 1.5)  # least and most that an error may be of the one that rounding must make


class Unsupported(Exception):
    """A peer does not have this operation at this shape."""


@dataclass(frozen=True)
class Contender:
    """`run(inputs)` does the operation and returns its outputs and gradients by name."""

    name: str
    run: Callable[[Any], Outputs]
    recomputes: bool = False  # the logits, in its backward pass
    num_bytes: int | None = None  # that its design moves, where that is known


@dataclass(frozen=True)
class Probe:
    """Something else that must hold of ours: `least` <= measure(inputs) <= `most`."""

    name: str
    measure: Callable[[Any], float]
    least: float
    most: float


@dataclass(frozen=True)
class Target:
    """Our time may be `at_most` so many times the time of `against`: a contender's name, RECOMPUTE, or BANDWIDTH."""

    against: str
    at_most: float


RECOMPUTE = "the fastest that recomputes the logits"
BANDWIDTH = "its bytes at the bandwidth of a copy"
NEAR_BANDWIDTH = (Target(BANDWIDTH, 1 / 0.85),)


@dataclass(frozen=True)
class Case:
    """One operation at one shape. Targets and probes are those of the first of `ours`."""

    operation: str
    shape: dict[str, int | float | str]
    make_inputs: Callable[[], Any]  # the same every time; outputs are poisoned with NaN
    # (inputs, exact): plain PyTorch code, computing in fp64 if exact, else in the operation's own dtypes.
    reference: Callable[[Any, bool], Outputs]
    ours: tuple[Contender, ...]
    floors: tuple[Contender, ...] = ()  # part of the operation, or another one that it replaces: timed, not checked
    peers: tuple[Contender, ...] = ()
    flops: int = 0
    targets: tuple[Target, ...] = ()
    rows: Tensor | None = None  # those of every output that `reference` has; None: all
    rounding: dict[str, float] | None = None  # by output, the relative error that rounding its operands makes
    probes: tuple[Probe, ...] = ()

    def contenders(self) -> list[tuple[str, Contender]]:
        """All of them, with their kind."""
        kinds = {"ours": self.ours, "floor": self.floors, "peer": self.peers}
        return [(kind, contender) for kind, contenders in kinds.items() for contender in contenders]

    def bounds(self, outputs: Outputs, plain_errors: dict[str, float]) -> dict[str, tuple[float, float]]:
        """(least, most) that each output of ours may be off by."""
        if self.rounding is not None:
            return {name: (OF_ROUNDING[0] * error, OF_ROUNDING[1] * error) for name, error in self.rounding.items()}
        return {name: (0.0, 2 * error + ROUNDING[outputs[name].dtype]) for name, error in plain_errors.items()}


def relative_errors(outputs: Outputs, expected: Outputs, rows: Tensor | None) -> dict[str, float]:
    """|output - expected| / |expected| of every expected output."""
    errors = {}
    for name, truth in expected.items():
        output = outputs[name].detach()
        output = output if rows is None or output.dim() == 0 else output[rows]
        errors[name] = ((output.double() - truth).norm() / truth.norm()).item()
    return errors


def find_fault(errors: dict[str, float], bounds: dict[str, tuple[float, float]]) -> str | None:
    """What is wrong, in words. NaN is."""
    faults = [
        f"{name} off by {error:.1e}, allowed {most:.1e}" + (f", at least {least:.1e}" if least else "")
        for name, error in errors.items()
        for least, most in [bounds[name]]
        if not least <= error <= most
    ]
    return "; ".join(faults) or None


def probe_row(name: str, value: float, least: float, most: float) -> dict[str, Any]:
    """A value that was measured, between which two it must lie, and whether it does. NaN does not."""
    return {"probe": name, "value": value, "least": least, "most": most, "passed": least <= value <= most}


def probe_in_words(row: dict[str, Any]) -> str:
    verdict = "ok" if row["passed"] else "FAILED"
    return f"{row['probe']}: {row['value']:.6g}, from {row['least']:.6g} to {row['most']:.6g}: {verdict}"
