"""Parameters and bytes of a configuration, as plain arithmetic: no model is built, no tensor library is imported.

`draws` lists, per period of active layers, the active layers of each model: lower and upper, or upper alone under
`bilevel.mode=fixed`. What the passes of a step hold besides is in `memory`.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache

from megatron_scalebio.anatomy import FAMILIES
from megatron_scalebio.anatomy.decoder import OUTER_BLOCKS, layer_block
from megatron_scalebio.anatomy.parameters import Sizes, shape_of, sizes_of
from megatron_scalebio.anatomy.storage import Counting, Item, flat_layout, padded_block
from megatron_scalebio.config import Config, ModelConfig

GIB = 2**30
WEIGHT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp8": 2}  # of precision.compute; fp8 keeps active weights in bf16
MASTER_BYTES = {"fp64": 8, "fp32": 4, "bf16": 4, "fp8": 4}
SCALE_BLOCK = 128  # rows and columns of a frozen FP8 weight that share one fp32 scale, and numbers of an FP8 moment


@dataclass(frozen=True)
class _Layer:
    """A decoder layer on one tensor-parallel rank."""

    linears: dict[str, tuple[int, int]]
    parameters: int
    numel: int


def linear_shapes(model: ModelConfig, tensor: int = 1) -> dict[str, tuple[int, int]]:
    """{matrix: (output features, input features)} of a decoder layer on one of `tensor` tensor-parallel ranks."""
    return _layer(model.family, sizes_of(model.shape), tensor).linears


def layer_parameters(model: ModelConfig, tensor: int = 1) -> int:
    """Parameters of one decoder layer on one of `tensor` tensor-parallel ranks."""
    return _layer(model.family, sizes_of(model.shape), tensor).parameters


def layer_numel(model: ModelConfig, tensor: int) -> int:
    """Numbers of a decoder layer's flat block on one tensor-parallel rank."""
    return _layer(model.family, sizes_of(model.shape), tensor).numel


@cache  # a search asks for few of them very often
def _layer(family: str, sizes: Sizes, tensor: int) -> _Layer:
    shapes = {parameter: shape_of(parameter, sizes, tensor) for parameter in FAMILIES[family].layer}
    items = [
        Item(
            math.prod(shape),
            parameter.is_matrix,
            Counting(replicated=parameter.cut.dim is None, sums_over_heads=parameter.sums_over_heads),
        )
        for parameter, shape in shapes.items()
    ]
    return _Layer(
        {parameter.name: (shape[0], shape[1]) for parameter, shape in shapes.items() if parameter.is_matrix},
        sum(item.numel for item in items),
        flat_layout(items).numel,
    )


def model_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model, without the vocabulary's padding."""
    sizes = sizes_of(model.shape)
    return sum(
        math.prod(part.shape(sizes))
        for _, parameter in FAMILIES[model.family].parameters(model.shape).values()
        for part in parameter.parts
    )


def stage_layers(config: Config, stage: int) -> range:
    """The decoder layers of a pipeline stage."""
    sizes = config.parallel.layers_per_stage
    return range(sum(sizes[:stage]), sum(sizes[: stage + 1]))


def lowest_reached(config: Config, active: Collection[int]) -> int:
    """The lowest decoder layer that a gradient passes through: the first if the embedding trains, else the lowest that
    does."""
    return 0 if "embedding" in config.lisa.always_active else min(active)


def stage_blocks(config: Config, stage: int) -> dict[str, int]:
    """{block: numbers} of one model on one rank of a pipeline stage, with the padding of vocabulary and layers."""
    model, tensor, num_stages = config.model, config.parallel.tensor, config.parallel.pipeline
    outer = {block: parameter.numel(model.shape, tensor) for block, parameter in OUTER_BLOCKS.items()}
    layer = layer_numel(model, tensor)
    blocks = {"embedding": outer["embedding"]} if stage == 0 else {}
    blocks |= {layer_block(index): layer for index in stage_layers(config, stage)}
    if stage == num_stages - 1:
        blocks["final_norm"] = outer["final_norm"]
        if not (model.shape.tied_embeddings and num_stages == 1):  # on a later stage a tied head is a copy
            blocks["head"] = outer["head"]
    return blocks


def fp8_bytes(rows: int, columns: int) -> int:
    """Bytes of a frozen FP8 weight: one for each number, and a scale for each block."""
    return rows * columns + 4 * -(-rows // SCALE_BLOCK) * -(-columns // SCALE_BLOCK)


def frozen_layer_bytes(config: Config, data_parallel: int) -> int:
    """Bytes of a frozen decoder layer on one rank. In FP8 are its four linears; norms, biases and the padding stay in
    the compute dtype."""
    model, tensor = config.model, config.parallel.tensor
    weight = WEIGHT_BYTES[config.precision.compute]
    padded = padded_block(layer_numel(model, tensor), data_parallel)
    if config.precision.frozen_weights != "fp8":
        return padded * weight
    sizes = linear_shapes(model, tensor).values()
    matrices = sum(rows * columns for rows, columns in sizes)
    return sum(fp8_bytes(*size) for size in sizes) + (padded - matrices) * weight


def moment_bytes(config: Config, numel: int) -> int:
    """Bytes of both of Adam's moments of `numel` parameters."""
    if config.optimizer.moments == "bf16":
        return 4 * numel
    if config.optimizer.moments == "fp8":
        return 2 * (numel + 4 * -(-numel // SCALE_BLOCK))
    return 2 * MASTER_BYTES[config.precision.compute] * numel


def rank_bytes(
    config: Config,
    data_parallel: int,
    stage: int,
    active: Sequence[Collection[int]],
    thawed: Sequence[Collection[int]],
) -> dict[str, int]:
    """Bytes by part on one rank, both models together, activations excluded.

    Blocks are padded (`padded_block`); gradients are whole, masters and moments sharded. Blocks that neither model has
    ever thawed are stored once. Where the compute type is the master's there is no other master.

    Args:
        active: layers that train now, of each model.
        thawed: layers that train now or have before, of each model.
    """
    compute, num_models = config.precision.compute, len(active)
    weight, master = WEIGHT_BYTES[compute], MASTER_BYTES[compute]
    parts = dict.fromkeys(("frozen weights", "active weights", "gradients", "masters", "moments", "host masters"), 0)

    def add(numel: int, frozen: int, num_copies: int, num_active: int, num_trained: int) -> None:
        """Blocks of `numel` parameters, a frozen one of `frozen` bytes: copies in all, and how many of them train, and
        have trained."""
        padded = padded_block(numel, data_parallel)
        shard = padded // data_parallel
        parts["active weights"] += num_active * padded * weight
        parts["frozen weights"] += (num_copies - num_active) * frozen
        parts["gradients"] += num_active * padded * master
        with_moments = num_trained if config.lisa.keep_moments else num_active
        parts["moments"] += with_moments * moment_bytes(config, shard)
        if weight != master:
            parts["masters"] += num_active * shard * master
        if frozen != padded * master:  # what is kept of a frozen block is not exact
            parts["host masters"] += (num_trained - num_active) * shard * master

    layers = set(stage_layers(config, stage))
    num_active, num_trained = (sum(len(layers.intersection(drawn)) for drawn in group) for group in (active, thawed))
    num_copies = len(layers) + (num_models - 1) * len(layers.intersection(set().union(*thawed)))
    numel = layer_numel(config.model, config.parallel.tensor)
    add(numel, frozen_layer_bytes(config, data_parallel), num_copies, num_active, num_trained)
    for block, numel in stage_blocks(config, stage).items():
        if block in OUTER_BLOCKS:
            copies = num_models if block in config.lisa.always_active else 0
            add(numel, padded_block(numel, data_parallel) * weight, max(copies, 1), copies, copies)
    return parts


def on_device(parts: dict[str, int]) -> int:
    """Bytes of all parts but the masters on the host."""
    return sum(size for part, size in parts.items() if part != "host masters")
