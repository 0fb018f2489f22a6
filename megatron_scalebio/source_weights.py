"""Source weights p as a function of the logits, the hypergradient, and the ways to follow it.

    p = floor + (1 - K * floor) * q,   q = softmax(logits + log prior)
    hypergradient = alpha * J^T g,     g_i = L_i(upper) - L_i(lower),   J = dp/dlogits
    (J^T g)_i = (1 - K * floor) * q_i * (g_i - q . g)

Source: arXiv 2406.19976, Algorithm 1 (floor 0, uniform prior, AdamW). K numbers in fp64 on the host: every rank holds
the same bits. What `_logits_optimizer` marks is a way to move the logits: `bilevel.logits_optimizer` has its name.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SourceWeights:
    """The logits of K sources and their optimizer.

    Args:
        num_sources: K.
        optimizer: the name of one of `LOGITS_OPTIMIZERS`.
        weight_decay: decoupled, AdamW only; it pulls the weights towards the prior.
        floor: smallest weight of a source, in [0, 1/K).
        prior: [K] positive, the weights at logits 0; None is uniform.
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
    ):
        self.optimizer, self.weight_decay, self.betas, self.eps = optimizer, weight_decay, betas, eps
        self.floor, self.span = floor, 1.0 - num_sources * floor
        uniform = [1.0 / num_sources] * num_sources
        self.log_prior = torch.tensor(prior or uniform, dtype=torch.float64).log()
        self.logits = torch.zeros(num_sources, dtype=torch.float64)
        if start is not None:
            weights = torch.tensor(start, dtype=torch.float64)
            logits = ((weights / weights.sum() - floor) / self.span).log() - self.log_prior
            self.logits = logits - logits[logits.isfinite()].mean()  # weight 0 is logit -inf: for fixed weights only
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.logits), torch.zeros_like(self.logits)
        self.step = 0

    @property
    def weights(self) -> Tensor:
        """p: [K] fp64, sums to one."""
        return self.floor + self.span * self._softmax()

    def hypergradient(self, alpha: float, gap: Tensor) -> Tensor:
        """`alpha * J^T g` for the gaps g [K] between the models' losses."""
        q = self._softmax()
        return alpha * self.span * q * (gap - q @ gap)

    def update(self, alpha: float, gap: Tensor, lr: float) -> Tensor:
        """Descend; returns the hypergradient at the weights before the update, before any decay."""
        hypergradient = self.hypergradient(alpha, gap)
        self.step += 1
        self.logits = LOGITS_OPTIMIZERS[self.optimizer](self, hypergradient, alpha, gap, lr)
        return hypergradient

    def state_dict(self) -> dict[str, list[float] | int]:
        """Plain numbers that JSON keeps exactly."""
        vectors = {name: getattr(self, name).tolist() for name in ("logits", "exp_avg", "exp_avg_sq")}
        return {**vectors, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("logits", "exp_avg", "exp_avg_sq"):
            setattr(self, name, torch.tensor(state[name], dtype=torch.float64))
        self.step = state["step"]

    def _softmax(self) -> Tensor:
        return torch.softmax(self.logits + self.log_prior, dim=0)


# The new logits, from (the weights with their state, hypergradient, alpha, gap g, lr). What it remembers of earlier
# steps is in `exp_avg` and `exp_avg_sq`, which checkpoints keep; `step` counts from 1.
_LogitsOptimizer = Callable[[SourceWeights, Tensor, float, Tensor, float], Tensor]

LOGITS_OPTIMIZERS: dict[str, _LogitsOptimizer] = {}


def _logits_optimizer(function: _LogitsOptimizer) -> _LogitsOptimizer:
    LOGITS_OPTIMIZERS[function.__name__] = function
    return function


@_logits_optimizer
def adamw(own: SourceWeights, hypergradient: Tensor, alpha: float, gap: Tensor, lr: float) -> Tensor:
    beta1, beta2 = own.betas
    own.exp_avg = beta1 * own.exp_avg + (1 - beta1) * hypergradient
    own.exp_avg_sq = beta2 * own.exp_avg_sq + (1 - beta2) * hypergradient**2
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


def scheduled_lr(base: float, schedule: str, step: int, num_steps: int, warmup: float) -> float:
    """Learning rate of a step (from 1): linear warm-up over `round(warmup * num_steps)` steps, then constant or cosine.

    The cosine starts at the full rate in the first step after the warm-up; the last step's rate is still positive.
    """
    num_warmup = round(warmup * num_steps)
    if step <= num_warmup:
        return base * step / num_warmup
    if schedule == "constant":
        return base
    progress = (step - 1 - num_warmup) / (num_steps - num_warmup)
    return base * 0.5 * (1.0 + math.cos(math.pi * progress))
