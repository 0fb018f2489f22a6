"""Source weights p as a function of the logits, the hypergradient, and the ways to follow it.

    p = floor + (1 - K * floor) * q,   q = softmax(logits + log prior)
    hypergradient = alpha * J^T g,     g_i = L_i(upper) - L_i(lower),   J = dp/dlogits
    (J^T g)_i = (1 - K * floor) * q_i * (g_i - q . g)

Source: arXiv 2406.19976, Algorithm 1 (floor 0, uniform prior, AdamW). K numbers in fp64 on the host: every rank holds
the same bits. What `_logits_optimizer` marks is a way to move the logits: `bilevel.logits_optimizer` has its name.

A gap is a small difference of two losses on a batch, and AdamW turns noise into full steps: five copies of one source,
400 steps at a rate of .02, ended at weights from .08 to .40. So a logit moves by its optimizer's step times
max(0, 1 - (gate / z)^2), the positive-part James-Stein shrinkage, where z is the mean of g_i - q . g over some hundred
steps in standard errors of that mean (`signal_to_noise`): within `gate` of them it stays where it is. What a step is
held back by is added to the next, less a hundredth: a source that stands out after all catches up.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# What is kept per step of the mean that the gate looks at, and of what was held back. AdamW's mean of ten steps would
# not do: the weights learn from signals too small for ten steps to show. A longer one forgets late that one has turned.
# Simulated, five sources at a rate of .02, gate 3: 400 steps of noise move a weight by .08 at most, .01 on average; in
# 200 steps a source that is better by as much as its noise comes from .2 to .89, without a gate to .90.
SIGNAL_BETA = 0.99
# Mean and mean square are over the same steps: a steady signal stands out by this much at most.
LARGEST_SIGNAL_TO_NOISE = math.sqrt((1 + SIGNAL_BETA) / (1 - SIGNAL_BETA))
_STATE = ("logits", "exp_avg", "exp_avg_sq", "signal", "signal_sq", "held")


class SourceWeights:
    """The logits of K sources and their optimizer.

    Args:
        num_sources: K.
        optimizer: the name of one of `LOGITS_OPTIMIZERS`.
        weight_decay: decoupled, AdamW only; it pulls the weights towards the prior.
        floor: smallest weight of a source, in [0, 1/K).
        prior: [K] positive, the weights at logits 0; None is uniform.
        gate: standard errors within which a source's gap is noise, below LARGEST_SIGNAL_TO_NOISE; 0: every step is
            taken whole.
        clip: largest L2 norm of the hypergradient that the logits follow; None: any.
        start: [K], the weights to begin at, each above the floor (or 0, if they stay fixed); None begins at logits 0.
    """

    def __init__(
        self,
        num_sources: int,
        optimizer: str = "adamw",
        weight_decay: float = 0.0,
        floor: float = 0.0,
        prior: list[float] | None = None,
        start: list[float] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        gate: float = 0.0,
        clip: float | None = None,
    ):
        self.optimizer, self.weight_decay, self.betas, self.eps = optimizer, weight_decay, betas, eps
        self.gate, self.clip = gate, clip
        self.floor, self.span = floor, 1.0 - num_sources * floor
        uniform = [1.0 / num_sources] * num_sources
        self.log_prior = torch.tensor(prior or uniform, dtype=torch.float64).log()
        self.logits = torch.zeros(num_sources, dtype=torch.float64)
        if start is not None:
            weights = torch.tensor(start, dtype=torch.float64)
            logits = ((weights / weights.sum() - floor) / self.span).log() - self.log_prior
            self.logits = logits - logits[logits.isfinite()].mean()  # weight 0 is logit -inf: for fixed weights only
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.logits), torch.zeros_like(self.logits)
        self.signal, self.signal_sq = torch.zeros_like(self.logits), torch.zeros_like(self.logits)
        self.held = torch.zeros_like(self.logits)
        self.step = 0

    @property
    def weights(self) -> Tensor:
        """p: [K] fp64, sums to one."""
        return self.floor + self.span * self._softmax()

    def hypergradient(self, alpha: float, gap: Tensor) -> Tensor:
        """`alpha * J^T g` for the gaps g [K] between the models' losses."""
        return alpha * self.span * self._softmax() * self._excess(gap)

    def update(self, alpha: float, gap: Tensor, lr: float) -> Tensor:
        """Descend; returns the hypergradient at the weights before the update, before any decay."""
        hypergradient = self.hypergradient(alpha, gap)
        clip = 1.0 if self.clip is None else min(1.0, self.clip / (hypergradient.norm().item() + 1e-300))
        beta1, beta2 = self.betas
        self.step += 1
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * clip * hypergradient
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * (clip * hypergradient) ** 2
        excess = clip * self._excess(gap)
        self.signal = SIGNAL_BETA * self.signal + (1 - SIGNAL_BETA) * excess
        self.signal_sq = SIGNAL_BETA * self.signal_sq + (1 - SIGNAL_BETA) * excess**2
        moved = LOGITS_OPTIMIZERS[self.optimizer](self, clip * hypergradient, alpha, clip * gap, lr)
        if self.gate == 0:
            self.logits = moved
        else:
            step, trust = moved - self.logits + SIGNAL_BETA * self.held, self._trust()
            self.logits, self.held = self.logits + trust * step, (1 - trust) * step
        return hypergradient

    @property
    def signal_to_noise(self) -> Tensor:
        """|Running mean of g_i - q . g| over its standard error were there but noise, [K]; 1 after one step, at most
        LARGEST_SIGNAL_TO_NOISE, 14.1. Below 2, most likely noise.

        The mean of t independent numbers of variance v by weights beta^k has the variance v * (1 - beta) / (1 + beta) *
        (1 + beta^t) / (1 - beta^t).
        """
        decay = SIGNAL_BETA**self.step
        mean, square = self.signal / (1 - decay), self.signal_sq / (1 - decay)
        variance = square / LARGEST_SIGNAL_TO_NOISE**2 * (1 + decay) / (1 - decay)
        return torch.where(variance > 0, mean.abs() / variance.sqrt(), 0.0)

    def _trust(self) -> Tensor:
        ratio = self.signal_to_noise
        return torch.where(ratio > self.gate, 1.0 - (self.gate / ratio) ** 2, 0.0)

    def state_dict(self) -> dict[str, list[float] | int]:
        """Plain numbers that JSON keeps exactly."""
        vectors = {name: getattr(self, name).tolist() for name in _STATE}
        return {**vectors, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, torch.tensor(state[name], dtype=torch.float64))
        self.step = state["step"]

    def _excess(self, gap: Tensor) -> Tensor:
        return gap - self._softmax() @ gap

    def _softmax(self) -> Tensor:
        return torch.softmax(self.logits + self.log_prior, dim=0)


# The new logits, from (the weights with their state, hypergradient, alpha, gap g, lr), the two clipped. `exp_avg` and
# `exp_avg_sq`, which checkpoints keep, are Adam's moments with this step's hypergradient; `step` counts from 1.
_LogitsOptimizer = Callable[[SourceWeights, Tensor, float, Tensor, float], Tensor]

LOGITS_OPTIMIZERS: dict[str, _LogitsOptimizer] = {}


def _logits_optimizer(function: _LogitsOptimizer) -> _LogitsOptimizer:
    LOGITS_OPTIMIZERS[function.__name__] = function
    return function


@_logits_optimizer
def adamw(own: SourceWeights, hypergradient: Tensor, alpha: float, gap: Tensor, lr: float) -> Tensor:
    beta1, beta2 = own.betas
    denominator = (own.exp_avg_sq / (1 - beta2**own.step)).sqrt() + own.eps
    decayed = own.logits * (1 - lr * own.weight_decay)
    return decayed - lr / (1 - beta1**own.step) * own.exp_avg / denominator


@_logits_optimizer
def exponentiated_gradient(own: SourceWeights, hypergradient: Tensor, alpha: float, gap: Tensor, lr: float) -> Tensor:
    """At floor 0 the weights are multiplied by exp(-lr * alpha * g), then scaled so that they sum to one."""
    return own.logits - lr * alpha * (gap - own.weights @ gap)


@_logits_optimizer
def sgd(own: SourceWeights, hypergradient: Tensor, alpha: float, gap: Tensor, lr: float) -> Tensor:
    return own.logits - lr * hypergradient


def scheduled_lr(
    base: float, schedule: str, step: int, num_steps: int, warmup: float, from_zero: bool = False, end: float = 0.0
) -> float:
    """Learning rate of a step (from 1): linear warm-up over `round(warmup * num_steps)` steps, then constant or cosine.

    The cosine starts at the full rate in the first step after the warm-up, and the step after the last would have the
    rate `end * base`. `from_zero` has the first step's rate be 0, as transformers' schedules and the original's do.
    """
    num_warmup = round(warmup * num_steps)
    if step <= num_warmup:
        return base * (step - from_zero) / num_warmup
    if schedule == "constant":
        return base
    progress = (step - 1 - num_warmup) / (num_steps - num_warmup)
    return base * (end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * progress)))
