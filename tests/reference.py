"""The whole bilevel step once more, in plain PyTorch and autograd: the truth that ours is held against.

Written from the equations (docs/design.md; arXiv 2406.19976), on one process, one full tensor per parameter, padded
batches, no packing, no micro-batches. Of the package it knows only the names of the settings.

    lower   minimises          alpha * sum_i p_i L_i(lower)
    upper   minimises  L_val + alpha * sum_i p_i L_i(upper)
    logits  descend            alpha * J^T g,   g_i = L_i(upper) - L_i(lower),   J = dp/dlogits

Shapes: E examples, S positions, H hidden, F feed-forward, G query groups, R query heads per group, D head size,
V vocabulary, K sources.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, silu

from megatron_scalebio.config import BilevelConfig, OptimizerConfig, ShapeConfig

Weights = dict[str, Tensor]  # Megatron-Core's global names -> full tensors


class Example(Protocol):
    """A training or validation example: token j with loss_mask[j] is a target, predicted from tokens[:j]."""

    tokens: Tensor  # [n] integer
    loss_mask: Tensor  # [n] bool, loss_mask[0] False
    source_id: int


def random_weights(shape: ShapeConfig, seed: int, vocab_rows: int | None = None) -> Weights:
    """Weights of a decoder in fp64, every one of them random: norms near 1, biases not 0.

    `vocab_rows` is the padded vocabulary; None: no padding.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    head_size = hidden // shape.num_attention_heads
    qkv = (shape.num_attention_heads + 2 * shape.num_query_groups) * head_size
    rows = vocab_rows or shape.vocab_size

    def normal(*size: int, mean: float = 0.0) -> Tensor:
        scale = size[-1] ** -0.5 if len(size) == 2 else 0.1
        return mean + scale * torch.randn(*size, generator=generator, dtype=torch.float64)

    weights = {"embedding.word_embeddings.weight": normal(rows, hidden)}
    for layer in range(shape.num_layers):
        weights |= {
            f"decoder.layers.{layer}.{name}": value
            for name, value in {
                "input_layernorm.weight": normal(hidden, mean=1.0),
                "self_attention.linear_qkv.weight": normal(qkv, hidden),
                "self_attention.linear_qkv.bias": normal(qkv),
                "self_attention.linear_proj.weight": normal(hidden, hidden),
                "pre_mlp_layernorm.weight": normal(hidden, mean=1.0),
                "mlp.linear_fc1.weight": normal(2 * ffn, hidden),
                "mlp.linear_fc2.weight": normal(hidden, ffn),
            }.items()
        }
    weights["decoder.final_layernorm.weight"] = normal(hidden, mean=1.0)
    if not shape.tied_embeddings:
        weights["output_layer.weight"] = normal(rows, hidden)
    return weights


# The model: a Qwen-2.5 decoder (arXiv 2412.15115).


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of x [E, S, ..., D] by position: dimension i turns with i + D / 2 (arXiv 2104.09864)."""
    length, size = x.shape[1], x.shape[-1]
    frequencies = base ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
    angles = torch.arange(length, dtype=x.dtype)[:, None] * frequencies  # [S, D / 2]
    angles = angles.view(length, *[1] * (x.ndim - 3), size // 2)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(x: Tensor, layer: Weights, shape: ShapeConfig) -> Tensor:
    """Causal grouped-query attention of x [E, S, H]; the rows of linear_qkv are R queries, key, value per group."""
    groups, size = shape.num_query_groups, shape.hidden_size // shape.num_attention_heads
    qkv = x @ layer["self_attention.linear_qkv.weight"].T + layer["self_attention.linear_qkv.bias"]
    qkv = qkv.unflatten(-1, (groups, -1, size))  # [E, S, G, R + 2, D]
    query, key, value = rotate(qkv[..., :-2, :], shape.rope_base), qkv[..., -2, :], qkv[..., -1, :]
    scores = torch.einsum("eigrd,ejgd->egrij", query, rotate(key, shape.rope_base)) / math.sqrt(size)
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    mixed = torch.einsum("egrij,ejgd->eigrd", scores.masked_fill(future, -math.inf).softmax(-1), value)
    return mixed.flatten(2) @ layer["self_attention.linear_proj.weight"].T


def next_token_logits(weights: Weights, shape: ShapeConfig, tokens: Tensor) -> Tensor:
    """Logits [E, S, V] of tokens [E, S]; rows of a padded vocabulary have none."""
    embedding = weights["embedding.word_embeddings.weight"]
    x = embedding[tokens]
    for index in range(shape.num_layers):
        prefix = f"decoder.layers.{index}."
        layer = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        x = x + attention(rms_norm(x, layer["input_layernorm.weight"], shape.norm_epsilon), layer, shape)
        normed = rms_norm(x, layer["pre_mlp_layernorm.weight"], shape.norm_epsilon)
        gate, up = (normed @ layer["mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
        x = x + (silu(gate) * up) @ layer["mlp.linear_fc2.weight"].T
    x = rms_norm(x, weights["decoder.final_layernorm.weight"], shape.norm_epsilon)
    head = embedding if shape.tied_embeddings else weights["output_layer.weight"]
    return x @ head[: shape.vocab_size].T


# Losses.


def token_losses(weights: Weights, shape: ShapeConfig, examples: list[Example]) -> list[Tensor]:
    """The losses [t_e] of each example's loss tokens. Padding lies to the right, where causal attention cannot look."""
    length = max(len(example.tokens) for example in examples)
    padded = torch.zeros(len(examples), length, dtype=torch.int64)
    for row, example in zip(padded, examples, strict=True):
        row[: len(example.tokens)] = torch.as_tensor(example.tokens)
    losses = -log_softmax(next_token_logits(weights, shape, padded[:, :-1]), dim=-1)
    losses = losses.gather(-1, padded[:, 1:, None]).squeeze(-1)
    masks = [torch.as_tensor(example.loss_mask)[1:] for example in examples]
    return [row[: len(mask)][mask] for row, mask in zip(losses, masks, strict=True)]


def mean_loss(losses: list[Tensor], unit: str) -> Tensor:
    """The mean over tokens, or over examples of their mean over tokens; 0 without a gradient where there is none."""
    if not losses:
        return torch.tensor(0.0)
    match unit:
        case "token":
            return torch.cat(losses).mean()
        case "example":
            return torch.stack([example.mean() for example in losses]).mean()
    raise ValueError(unit)


def source_losses(weights: Weights, shape: ShapeConfig, examples: list[Example], unit: str, num_sources: int) -> Tensor:
    """L_i [K]: the mean loss of each source's examples."""
    losses = token_losses(weights, shape, examples)
    by_source = [
        [loss for loss, example in zip(losses, examples, strict=True) if example.source_id == source]
        for source in range(num_sources)
    ]
    return torch.stack([mean_loss(own, unit).to(losses[0].dtype) for own in by_source])


# Updates.


def source_weights(logits: Tensor, log_prior: Tensor, floor: float) -> Tensor:
    """p [K] = floor + (1 - K * floor) * softmax(logits + log prior)."""
    return floor + (1 - len(logits) * floor) * torch.softmax(logits + log_prior, dim=0)


def hypergradient(logits: Tensor, log_prior: Tensor, floor: float, gap: Tensor, alpha: float) -> Tensor:
    """alpha * J^T g [K], with J taken by autograd."""
    logits = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(alpha * source_weights(logits, log_prior, floor) @ gap.detach(), logits)
    return gradient


def learning_rate(
    base: float, schedule: str, warmup_steps: int, step: int, steps: int, from_zero: bool = False, end: float = 0.0
) -> float:
    """The rate at `step`, counted from 1: linear to the full rate at warmup_steps (a step later if it begins at zero),
    then constant or half a cosine down to the share `end`.

    The first step after the warm-up has the full rate; the step after the last would have the end's.
    """
    if step <= warmup_steps:
        return base * ((step - 1) if from_zero else step) / warmup_steps
    match schedule:
        case "constant":
            return base
        case "cosine":
            fallen = 0.5 * (1 - math.cos(math.pi * (step - 1 - warmup_steps) / (steps - warmup_steps)))
            return base * (1 - (1 - end) * fallen)
    raise ValueError(schedule)


class Moments(NamedTuple):
    step: int
    first: Tensor
    second: Tensor


class AdamW:
    """AdamW with decoupled weight decay (arXiv 1711.05101), states by parameter name."""

    def __init__(self, betas: list[float], eps: float):
        self.betas, self.eps = betas, eps
        self.states: dict[str, Moments] = {}

    def update(self, name: str, parameter: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> Tensor:
        step, first, second = self.states.get(name, Moments(0, torch.zeros_like(gradient), torch.zeros_like(gradient)))
        beta1, beta2 = self.betas
        step += 1
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient.square()
        self.states[name] = Moments(step, first, second)
        direction = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + self.eps)
        return parameter - lr * (direction + weight_decay * parameter)

    def forget_all_but(self, names: list[str]) -> None:
        self.states = {name: state for name, state in self.states.items() if name in names}


# The step.


@dataclass(frozen=True)
class StepRecord:
    """One step. Losses, gap, hypergradient, gradients and norms belong to the parameters before the update.

    The gradients are those of the minimised loss, before the clip, of the active parameters alone.
    `lower`, `val_loss`, the gap and the hypergradient are None where bilevel.mode is fixed.
    """

    train_loss_lower: Tensor | None  # [K]
    train_loss_upper: Tensor  # [K]
    val_loss: Tensor | None
    penalty_gap: Tensor | None  # p . g
    hypergradient: Tensor | None  # [K]
    gradients_lower: Weights | None
    gradients_upper: Weights
    grad_norm_lower: Tensor | None
    grad_norm_upper: Tensor
    weights: Tensor  # [K] after the update
    logits: Tensor  # [K] after the update


class ReferenceRun:
    """Two models and K logits, stepped together; `lower`, `upper` and `logits` are the current values.

    Args:
        weights: where both models start.
        bilevel, optimizer: settings without None where a preset fills them. `bilevel.weights` and `bilevel.prior` name
            sources and are not read: the two arguments below stand for them.
        logits: [K], where the logits start.
        prior: [K], positive; None: uniform.
        always_active: what trains beside the active layers; a tied head is the embedding.
    """

    def __init__(
        self,
        weights: Weights,
        shape: ShapeConfig,
        bilevel: BilevelConfig,
        optimizer: OptimizerConfig,
        logits: list[float],
        prior: list[float] | None = None,
        dtype: torch.dtype = torch.float64,
        always_active: Collection[str] = ("embedding", "final_norm", "head"),
        keep_moments: bool = False,
    ):
        self.always_active, self.keep_moments = always_active, keep_moments
        self.shape, self.bilevel, self.optimizer = shape, bilevel, optimizer
        self.lower = {name: weight.detach().to(dtype, copy=True) for name, weight in weights.items()}
        self.upper = {name: weight.detach().to(dtype, copy=True) for name, weight in weights.items()}
        self.logits = torch.tensor(logits, dtype=torch.float64)
        self.log_prior = torch.tensor(prior or [1.0] * len(logits), dtype=torch.float64).log()
        self.penalty_alpha = 1.0 if bilevel.mode == "fixed" else bilevel.penalty_alpha
        self.adamw = {role: AdamW(optimizer.betas, optimizer.eps) for role in ("lower", "upper", "logits")}

    @property
    def weights(self) -> Tensor:
        """p [K]."""
        return source_weights(self.logits, self.log_prior, self.bilevel.floor)

    def step(
        self,
        step: int,
        train: list[Example],
        validation: list[Example],
        active_lower: list[int] | None = None,
        active_upper: list[int] | None = None,
    ) -> StepRecord:
        """Do step number `step` (from 1) with the given active layers (global, from 0; None: all)."""
        weights = self.weights.to(next(iter(self.upper.values())).dtype)
        lower = _Branch(self.lower, active_lower, self.always_active)
        upper = _Branch(self.upper, active_upper, self.always_active)
        loss_upper = self._train_losses(upper, train)
        objective = self.penalty_alpha * weights @ loss_upper
        if self.bilevel.mode == "fixed":
            gradients = upper.gradients(objective)
            norm = self._update_model("upper", gradients, step)
            detached = loss_upper.detach()
            return StepRecord(
                None, detached, None, None, None, None, gradients, None, norm, self.weights, self.logits.clone()
            )
        validation_losses = token_losses(upper.weights, self.shape, validation)
        val_loss = mean_loss(validation_losses, self.bilevel.validation_loss_unit)
        gradients_upper = upper.gradients(val_loss + objective)
        loss_lower = self._train_losses(lower, train)
        gradients_lower = lower.gradients(self.penalty_alpha * weights @ loss_lower)
        gap = (loss_upper.detach() - loss_lower.detach()).double()
        norm_lower = self._update_model("lower", gradients_lower, step)
        norm_upper = self._update_model("upper", gradients_upper, step)
        penalty_gap = self.weights @ gap
        gradient = hypergradient(self.logits, self.log_prior, self.bilevel.floor, gap, self.penalty_alpha)
        self._update_logits(gradient, gap, step)
        self.penalty_alpha *= self.bilevel.penalty_growth
        return StepRecord(
            loss_lower.detach(), loss_upper.detach(), val_loss.detach(), penalty_gap, gradient, gradients_lower,
            gradients_upper, norm_lower, norm_upper, self.weights, self.logits.clone(),
        )  # fmt: skip

    def _train_losses(self, branch: "_Branch", train: list[Example]) -> Tensor:
        return source_losses(branch.weights, self.shape, train, self.bilevel.train_loss_unit, len(self.logits))

    def _update_model(self, role: str, gradients: Weights, step: int) -> Tensor:
        """Clip, step AdamW on the active parameters, forget all other states; return the norm before the clip."""
        norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
        scale = 1.0
        if self.optimizer.clip_grad is not None:
            scale = min(1.0, self.optimizer.clip_grad * self.penalty_alpha / (norm.item() + 1e-6))
        base = self.optimizer.lr
        if role == "lower" and self.optimizer.lr_lower is not None:
            base = self.optimizer.lr_lower
        lr = self._rate(base, self.optimizer.schedule, self._warmup_steps, step)
        model, adamw = getattr(self, role), self.adamw[role]
        if not self.keep_moments:
            adamw.forget_all_but(list(gradients))
        for name, gradient in gradients.items():
            decayed = gradient.ndim >= 2 or self.optimizer.decayed == "all"
            decay = self.optimizer.weight_decay if decayed else 0.0
            model[name] = adamw.update(name, model[name], gradient * scale, lr, decay)
        return norm

    def _update_logits(self, gradient: Tensor, gap: Tensor, step: int) -> None:
        settings = self.bilevel
        warmup = 0 if settings.logits_schedule == "constant" else self._warmup_steps
        lr = self._rate(settings.logits_lr, settings.logits_schedule, warmup, step)
        match settings.logits_optimizer:
            case "adamw":
                decay = settings.logits_weight_decay
                self.logits = self.adamw["logits"].update("logits", self.logits, gradient, lr, decay)
            case "exponentiated_gradient":
                self.logits = self.logits - lr * self.penalty_alpha * (gap - self.weights @ gap)
            case "sgd":
                self.logits = self.logits - lr * gradient
            case unknown:
                raise ValueError(unknown)

    def _rate(self, base: float, schedule: str, warmup_steps: int, step: int) -> float:
        own = self.optimizer
        return learning_rate(base, schedule, warmup_steps, step, self.bilevel.steps, own.warmup_from_zero, own.lr_end)

    @property
    def _warmup_steps(self) -> int:
        return round(self.optimizer.warmup * self.bilevel.steps)


class _Branch:
    """One model's weights for one step: leaves that train, constants that do not."""

    def __init__(self, weights: Weights, active_layers: list[int] | None, always_active: Collection[str]):
        def trains(name: str) -> bool:
            if name.startswith("decoder.layers."):
                return active_layers is None or int(name.split(".")[2]) in active_layers
            block = {"embedding": "embedding", "decoder": "final_norm", "output_layer": "head"}[name.split(".")[0]]
            return block in always_active

        self.weights = {name: weight.clone().requires_grad_(trains(name)) for name, weight in weights.items()}

    def gradients(self, loss: Tensor) -> Weights:
        active = {name: weight for name, weight in self.weights.items() if weight.requires_grad}
        return dict(zip(active, torch.autograd.grad(loss, list(active.values())), strict=True))
