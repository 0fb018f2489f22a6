"""FLOPs of a step under LISA, as plain arithmetic: what the matrix products and the attention execute.

With T positions of which N carry loss, n numbers in a layer's matrices, V * H in the head, A FLOPs of one layer's
attention forward, and "reached" layers those that a gradient passes through:

    forward         sum over layers (2 T n + A) + 2 N V H
    input gradient  sum over reached layers (2 T n + 2 A) + 2 N V H
    weight gradient sum over active layers 2 T n (+ 2 N V H if the head trains)
    again           sum over reached layers A / 2 (flash attention makes its scores anew), and what recomputation adds

A layer is reached if it trains or something below it does. The first three are the model's FLOPs, all four the executed
ones. Norms, rotations, activations and the optimizer are no matrix products and are not counted.

H hidden, V padded vocabulary. Counts are those of one rank where a function says so, else of all ranks together.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields

from megatron_scalebio.anatomy import FAMILIES, head_size
from megatron_scalebio.anatomy.decoder import FC1, FC2, HEAD, PROJ, QKV
from megatron_scalebio.config import Config
from megatron_scalebio.plan.sizes import linear_shapes, lowest_reached, model_parameters, stage_layers


@dataclass(frozen=True)
class Work:
    """What micro-batches hold. All FLOPs are linear in it, so that those of several add up."""

    positions: int  # T, padding included
    loss_tokens: int  # N
    pairs: int  # (query, key) pairs that a head's attention multiplies
    window_pairs: int  # the same in the layers that have a sliding window

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(Work)))

    def __mul__(self, number: int) -> "Work":
        return Work(*(number * getattr(self, item.name) for item in fields(Work)))


@dataclass(frozen=True)
class Flops:
    forward: float = 0
    input_gradient: float = 0
    weight_gradient: float = 0
    again: float = 0

    @property
    def model(self) -> float:
        """Without what is computed twice."""
        return self.forward + self.input_gradient + self.weight_gradient

    @property
    def executed(self) -> float:
        return self.model + self.again

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(Flops)))

    def __mul__(self, number: float) -> "Flops":
        return Flops(*(number * getattr(self, item.name) for item in fields(Flops)))


def work_of(lengths: Iterable[int], positions: int, loss_tokens: int, window: int | None) -> Work:
    """The work of packed examples, whose attention is causal and stays inside each.

    Args:
        lengths: positions of each example, a row's padding tail counting as one.
        window: tokens that a query sees in the layers with a sliding window.
    """
    lengths = list(lengths)
    pairs = sum(causal_pairs(length, None) for length in lengths)
    return Work(positions, loss_tokens, pairs, sum(causal_pairs(length, window) for length in lengths))


def causal_pairs(length: int, window: int | None) -> int:
    """(query, key) pairs of one example: every query sees itself and what stands before it, inside the window."""
    reach = length if window is None else min(length, window)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def has_window(config: Config, layer: int) -> bool:
    """Whether a layer, counted from 0, has the sliding window."""
    return FAMILIES[config.model.family].has_window(config.model.shape, layer)


def attention_flops(config: Config, layer: int, work: Work) -> int:
    """Of one layer's attention, forward, on one rank: scores and their product with the values."""
    heads = config.model.shape.num_attention_heads // config.parallel.tensor
    pairs = work.window_pairs if has_window(config, layer) else work.pairs
    return 4 * heads * head_size(config.model.shape) * pairs


def recomputed_linears(config: Config, active: bool) -> tuple[str, ...]:
    """A layer's linears that run again in the backward pass. Recomputation ends with the last tensor that was kept:
    beyond the last linear only if that trains, whose weight's gradient needs its input, or a norm follows it."""
    last = (FC2.name,) if active or FAMILIES[config.model.family].post_norms else ()
    return {"none": (), "selective": (FC1.name, *last), "full": (QKV.name, PROJ.name, FC1.name, *last)}[
        config.parallel.recompute
    ]


def layer_flops(config: Config, layer: int, work: Work, reached: bool, active: bool) -> Flops:
    """Of one decoder layer on one rank."""
    linears = {
        linear: 2 * work.positions * rows * columns
        for linear, (rows, columns) in linear_shapes(config.model, config.parallel.tensor).items()
    }
    products, attention = sum(linears.values()), attention_flops(config, layer, work)
    if not reached:
        return Flops(products + attention)
    again = sum(linears[linear] for linear in recomputed_linears(config, active))
    again += attention / 2 + (attention if config.parallel.recompute == "full" else 0)
    return Flops(products + attention, products + 2 * attention, products if active else 0, again)


def head_flops(config: Config, work: Work) -> Flops:
    """Of the head on one rank of the last stage; its gradient is made in the forward pass, from the same logits."""
    product = 2 * work.loss_tokens * HEAD.numel(config.model.shape, config.parallel.tensor)
    return Flops(product, product, product if "head" in config.lisa.always_active else 0)


def stage_flops(config: Config, stage: int, active: Collection[int], work: Work) -> Flops:
    """Of one model on one rank of a stage."""
    lowest, total = lowest_reached(config, active), Flops()
    for layer in stage_layers(config, stage):
        total += layer_flops(config, layer, work, layer >= lowest, layer in active)
    if stage == config.parallel.pipeline - 1:
        total += head_flops(config, work)
    return total


def pass_flops(config: Config, active: Collection[int], work: Work) -> Flops:
    """Of one model, forward and backward, over all ranks that share the work."""
    stages = (stage_flops(config, s, active, work) for s in range(config.parallel.pipeline))
    return sum(stages, Flops()) * config.parallel.tensor


def step_flops(config: Config, active: Sequence[Collection[int]], train: Work, validation: Work) -> Flops:
    """Of one step: lower (train), upper (train) and upper (validation); upper (train) alone under mode fixed.

    Args:
        active: the active layers of each model, upper last.
        train, validation: of all data-parallel ranks together.
    """
    total = sum((pass_flops(config, layers, train) for layers in active), Flops())
    return total + pass_flops(config, active[-1], validation) if len(active) > 1 else total


def six_n_equivalent(config: Config, positions: int) -> int:
    """6 * parameters * positions: what full training of as many positions is usually counted as, LISA or not."""
    return 6 * model_parameters(config.model) * positions
