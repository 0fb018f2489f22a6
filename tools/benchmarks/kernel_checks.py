"""What a benchmark of one operation at one shape consists of, and the check that comes before its times.

The truth is fp64. An output of ours, or a gradient, may be off by twice what plain PyTorch code in the same dtypes is
off by, plus the rounding of the output's dtype. A peer's rounding is its own choice, shown beside its time: it must
only compute the same function, which one that takes one token's coefficient for all, say, does not.
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
class Target:
    """Our time may be `at_most` so many times the time of `against`: a contender's name, RECOMPUTE, or BANDWIDTH."""

    against: str
    at_most: float


RECOMPUTE = "the fastest that recomputes the logits"
BANDWIDTH = "its bytes at the bandwidth of a copy"


@dataclass(frozen=True)
class Case:
    """One operation at one shape. Targets are those of the first of `ours`."""

    operation: str
    shape: dict[str, int | float | str]
    make_inputs: Callable[[], Any]  # the same every time; outputs are poisoned with NaN
    expected: Callable[[Any], Outputs]  # in fp64
    plain: Callable[[Any], Outputs]  # plain PyTorch code in the operation's own dtypes
    ours: tuple[Contender, ...]
    floors: tuple[Contender, ...]  # part of the operation, or another one that it replaces: timed, not checked
    peers: tuple[Contender, ...]
    flops: int
    targets: tuple[Target, ...] = ()
    rows: Tensor | None = None  # those of every output that `expected` and `plain` have; None: all

    def contenders(self) -> list[tuple[str, Contender]]:
        """All of them, with their kind."""
        kinds = {"ours": self.ours, "floor": self.floors, "peer": self.peers}
        return [(kind, contender) for kind, contenders in kinds.items() for contender in contenders]


def relative_errors(outputs: Outputs, expected: Outputs, rows: Tensor | None) -> dict[str, float]:
    """|output - expected| / |expected| of every expected output."""
    errors = {}
    for name, truth in expected.items():
        output = outputs[name].detach()
        output = output if rows is None or output.dim() == 0 else output[rows]
        errors[name] = ((output.double() - truth).norm() / truth.norm()).item()
    return errors


def bounds_of_ours(plain_errors: dict[str, float], outputs: Outputs) -> dict[str, float]:
    return {name: 2 * error + ROUNDING[outputs[name].dtype] for name, error in plain_errors.items()}


def find_fault(errors: dict[str, float], bounds: dict[str, float]) -> str | None:
    """What is wrong, in words. NaN is."""
    faults = [
        f"{name} off by {error:.1e}, allowed {bounds[name]:.1e}"
        for name, error in errors.items()
        if not error <= bounds[name]
    ]
    return "; ".join(faults) or None
