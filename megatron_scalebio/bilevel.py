"""One step of first-order bilevel optimisation (ScaleBiO, arXiv 2406.19976, Algorithm 1).

K sources with logits lambda and weights p = softmax(lambda); two copies of one model:

    lower:   minimise   alpha * sum_i p_i L_i(lower)
    upper:   minimise   L_val(upper) + alpha * sum_i p_i L_i(upper)
    logits:  descend    alpha * J^T g,   g_i = L_i(upper) - L_i(lower),   J = dp/dlambda

All losses are taken at the parameters before any update, on the same training batch for both models. No second-order
derivative: the models meet the outer problem only through the two K-vectors of losses. A source that a batch lacks
(natural sampling) has the loss 0 in both models, as in the original; where sources take turns (adaptive sampling, more
of them than examples), L_i is the mean over the batch's examples times `StepBatch.scale`, which is unbiased.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_scalebio.active_layers import Role
from megatron_scalebio.config import Config
from megatron_scalebio.data.batch import MicroBatch, StepBatch
from megatron_scalebio.losses import TokenCoefs, token_coefs
from megatron_scalebio.source_weights import SourceWeights, scheduled_lr


@dataclass(frozen=True)
class Pass:
    """Micro-batches that one model runs, and what each of their loss tokens counts."""

    role: Role
    split: str  # "train" | "validation" | "test", for messages
    micro_batches: list[MicroBatch]
    coefs: list[TokenCoefs]  # of each micro-batch
    num_sources: int  # K for train; of validation and test, their sets


class NonFinite(Exception):
    """A loss or a gradient is NaN or infinite; `rank` is the lowest rank that holds such a number."""

    def __init__(self, rank: int, passes: list[Pass], losses: list[Tensor], norms: dict[Role, float] | None = None):
        super().__init__(f"a loss or a gradient is not finite on rank {rank}")
        self.rank, self.passes, self.losses, self.norms = rank, passes, losses, norms or {}

    def describe(self, names: dict[str, list[str]]) -> str:
        """What is not finite, for the user.

        Args:
            names: of a split's sources, or sets; of a split that has none, its own.
        """
        norms = {role: norm for role, norm in self.norms.items() if not math.isfinite(norm)}
        found = [f"gradient norm {norm} of the {role} model" for role, norm in norms.items()]
        for part, losses in zip(self.passes, self.losses, strict=True):
            found += [
                f"loss {loss} of {name} in the {part.role} model"
                for name, loss in zip(names.get(part.split, [part.split]), losses.tolist(), strict=True)
                if not math.isfinite(loss)
            ]
        return f"not finite on rank {self.rank}: {'; '.join(found)}"


class Models(Protocol):
    """What a step needs of the two models. `mcore.models.MegatronModels` is one; a quadratic can be another."""

    def forward_backward(self, passes: list[Pass], fingerprint: int) -> list[Tensor]:
        """Mean losses per source of each pass, [num_sources] fp64 on the host, over the whole global batch; the
        gradients of `sum(loss_coef * token_loss)` are left with the models.

        `fingerprint` must be equal on every rank, or the step is refused. Raises: NonFinite, for losses and gradients.
        """

    def step(self, role: Role, lr: float, max_norm: float | None) -> Tensor:
        """Clip the gradient to `max_norm`, update the model; returns the gradient's norm before the clip (scalar)."""


@dataclass(frozen=True)
class StepResult:
    """Losses and gradients at the parameters before the update."""

    train_loss: dict[Role, Tensor]  # [K]
    validation_loss: float | None  # of several sets by their weights
    validation_losses: Tensor | None  # [sets]
    penalty_gap: float | None  # p . g
    hypergradient: Tensor | None  # [K]
    signal_to_noise: Tensor | None  # [K], of each gap over the mean gap: `SourceWeights.signal_to_noise`
    grad_norm: dict[Role, Tensor]  # scalars, before the clip
    lr: float
    logits_lr: float | None
    penalty_alpha: float


class Bilevel:
    """The step of `bilevel.mode` bilevel or fixed."""

    def __init__(self, config: Config, source_weights: SourceWeights):
        self.config, self.source_weights = config, source_weights

    def penalty_alpha(self, step: int) -> float:
        """alpha of a step, from 1. Mode fixed has no penalty: alpha is 1."""
        bilevel = self.config.bilevel
        return bilevel.penalty_alpha * bilevel.penalty_growth ** (step - 1) if bilevel.mode == "bilevel" else 1.0

    def step(self, models: Models, step: int, batch: StepBatch, active_layers: dict[Role, list[int]]) -> StepResult:
        """Take step `step` on both models and the logits. Raises: NonFinite, before any update."""
        settings, optimizer = self.config.bilevel, self.config.optimizer
        alpha, p = self.penalty_alpha(step), self.source_weights.weights
        fixed = settings.mode == "fixed"

        scale = torch.tensor(batch.scale, dtype=torch.float64)
        train = [self._train_coefs(part, batch, alpha * _kept(p, batch.kept) * scale) for part in batch.train]
        lower_train = Pass(Role.LOWER, "train", batch.train, train, len(p))
        upper_train = Pass(Role.UPPER, "train", batch.train, train, len(p))
        validation_counts = batch.num_validation_examples, batch.num_validation_loss_tokens
        set_weights = torch.tensor(batch.validation_weights, dtype=torch.float64)
        upper_validation = evaluation_pass(
            *("validation", batch.validation, validation_counts, set_weights, settings.validation_loss_unit)
        )
        passes = [upper_train] if fixed else [lower_train, upper_train, upper_validation]
        losses = models.forward_backward(passes, self._fingerprint(step, active_layers))

        def rate(base: float, schedule: str, warmup: float) -> float:
            return scheduled_lr(
                base, schedule, step, settings.steps, warmup, optimizer.warmup_from_zero, optimizer.lr_end
            )

        lr = rate(optimizer.lr, optimizer.schedule, optimizer.warmup)
        lr_lower = rate(optimizer.lr_lower, optimizer.schedule, optimizer.warmup)
        max_norm = None if optimizer.clip_grad is None else optimizer.clip_grad * alpha
        if fixed:
            norm = models.step(Role.UPPER, lr, max_norm)
            nothing = None, None, None, None, None
            return StepResult({Role.UPPER: losses[0]}, *nothing, {Role.UPPER: norm}, lr, None, alpha)

        loss_lower, loss_upper, validation_losses = losses
        rates = {Role.LOWER: lr_lower, Role.UPPER: lr}
        norms = {role: models.step(role, rates[role], max_norm) for role in rates}
        gap = scale * (loss_upper - loss_lower)
        logits_lr = rate(
            settings.logits_lr,
            settings.logits_schedule,
            optimizer.warmup if settings.logits_schedule == "cosine" else 0.0,
        )
        if step <= settings.logits_warmup_steps:
            logits_lr = 0.0
        hypergradient = self.source_weights.update(alpha, gap, logits_lr)
        return StepResult(
            train_loss={Role.LOWER: loss_lower, Role.UPPER: loss_upper},
            validation_loss=float(set_weights @ validation_losses),
            validation_losses=validation_losses,
            penalty_gap=float(p @ gap),
            hypergradient=hypergradient,
            signal_to_noise=self.source_weights.signal_to_noise,
            grad_norm=norms,
            lr=lr,
            logits_lr=logits_lr,
            penalty_alpha=alpha,
        )

    def _train_coefs(self, part: MicroBatch, batch: StepBatch, weights: Tensor) -> TokenCoefs:
        unit = self.config.bilevel.train_loss_unit
        counts = batch.num_examples, batch.num_loss_tokens
        return token_coefs(part.source_ids, part.example_loss_tokens, *counts, weights, unit)

    def _fingerprint(self, step: int, active_layers: dict[Role, list[int]]) -> int:
        """20 bits of what every rank must agree on before a step: its number, the logits, the active layers."""
        state = f"{step} {self.source_weights.logits.tolist()} {sorted(active_layers.items())}"
        return zlib.crc32(state.encode()) & 0xFFFFF


def _kept(weights: Tensor, kept: list[float]) -> Tensor:
    """What the models train with, where `data.max_epochs` holds sources back: [K], adds up to one as the weights do.

    What they lose goes to the others in proportion; given back to all, a source that is held back would regain it, and
    each of its few records count for many.
    """
    if min(kept) == 1.0:
        return weights
    share = torch.tensor(kept, dtype=torch.float64)
    cut, others = weights * share, weights * (share > 1 - 1e-9)
    if others.sum() == 0:
        return cut / cut.sum()
    return cut + others * (1 - cut.sum()) / others.sum()


def evaluation_pass(
    split: str,
    micro_batches: list[MicroBatch],
    counts: tuple[list[int], list[int]],
    weights: Tensor,
    unit: str,
    role: Role = Role.UPPER,
) -> Pass:
    """A model over validation or test examples.

    Args:
        counts: of each set, its examples and their tokens that carry loss, of all ranks together.
        weights: of the sets.
    """
    coefs = [token_coefs(part.source_ids, part.example_loss_tokens, *counts, weights, unit) for part in micro_batches]
    return Pass(role, split, micro_batches, coefs, len(weights))
