"""Parameters and bytes of a configuration, as plain arithmetic: no model is built, no tensor library is imported.

A block is what freezes and thaws as one: `embedding`, `layers.N`, `final_norm`, `head`. `draws` lists, per period of
active layers, the active layers of each model: lower and upper, or upper alone under `bilevel.mode=fixed`. What the
passes of a step hold besides is in `step_memory`.

V padded vocabulary.
"""

from collections.abc import Collection, Sequence

from megatron_scalebio.config import Config, ShapeConfig, padded_vocab_size
from megatron_scalebio.families import FAMILIES

WEIGHT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp8": 2}  # of precision.compute; fp8 keeps active weights in bf16
MASTER_BYTES = {"fp64": 8, "fp32": 4, "bf16": 4, "fp8": 4}
FP8_BLOCK = 128  # rows and columns of a frozen FP8 weight that share one fp32 scale, and numbers of an FP8 moment
ALIGNMENT = 128
NOT_LAYERS = ("embedding", "final_norm", "head")  # the blocks that are no decoder layer


def head_size(shape: ShapeConfig) -> int:
    """Numbers of one attention head."""
    return shape.head_size or shape.hidden_size // shape.num_attention_heads


def linear_shapes(shape: ShapeConfig, tensor: int = 1) -> dict[str, tuple[int, int]]:
    """{linear: (output features, input features)} of a decoder layer on one of `tensor` tensor-parallel ranks."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size // tensor
    query, key = (number * head_size(shape) // tensor for number in (shape.num_attention_heads, shape.num_query_groups))
    return {
        "qkv": (query + 2 * key, hidden),
        "proj": (hidden, query),
        "fc1": (2 * ffn, hidden),  # gate and up
        "fc2": (hidden, ffn),
    }


def layer_vectors(family: str, shape: ShapeConfig, tensor: int = 1) -> int:
    """Numbers in a decoder layer's norms and biases on one of `tensor` tensor-parallel ranks; its norms are on each."""
    biases = linear_shapes(shape, tensor)["qkv"][0] if FAMILIES[family].qkv_bias else 0
    return (4 if FAMILIES[family].post_norms else 2) * shape.hidden_size + biases


def layer_parameters(family: str, shape: ShapeConfig, tensor: int = 1) -> int:
    """Parameters of one decoder layer on one of `tensor` tensor-parallel ranks."""
    matrices = sum(rows * columns for rows, columns in linear_shapes(shape, tensor).values())
    return matrices + layer_vectors(family, shape, tensor)


def model_parameters(family: str, shape: ShapeConfig, vocab_size: int) -> int:
    """Parameters of the whole model, without the vocabulary's padding."""
    table = vocab_size * shape.hidden_size
    tables = table if shape.tied_embeddings else 2 * table
    return tables + shape.num_layers * layer_parameters(family, shape) + shape.hidden_size


def stage_layers(config: Config, stage: int) -> range:
    """The decoder layers of a pipeline stage."""
    num_layers, num_stages = config.model.shape.num_layers, config.parallel.pipeline
    sizes = config.parallel.layers_per_stage or [num_layers // num_stages] * num_stages
    return range(sum(sizes[:stage]), sum(sizes[: stage + 1]))


def lowest_reached(config: Config, active: Collection[int]) -> int:
    """The lowest decoder layer that a gradient passes through: the first if the embedding trains, else the lowest that
    does."""
    return 0 if "embedding" in config.lisa.always_active else min(active)


def stage_blocks(config: Config, vocab_size: int, stage: int) -> dict[str, int]:
    """{block: numbers} of one model on one rank of a pipeline stage, with the padding of vocabulary and layers."""
    shape, tensor, num_stages = config.model.shape, config.parallel.tensor, config.parallel.pipeline
    table = padded_vocab_size(vocab_size) // tensor * shape.hidden_size
    layer = layer_numel(config.model.family, shape, tensor)
    blocks = {"embedding": table} if stage == 0 else {}
    for index in stage_layers(config, stage):
        blocks[f"layers.{index}"] = layer
    if stage == num_stages - 1:
        blocks["final_norm"] = shape.hidden_size
        if not (shape.tied_embeddings and num_stages == 1):  # on a later stage a tied head is a copy
            blocks["head"] = table
    return blocks


def aligned(numel: int) -> int:
    """The next multiple of 128, where a range of a flat block may begin: there begins a block of an 8-bit moment's
    scales, so that no scale is shared by numbers that are sharded and numbers that ranks hold alike."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def padded_block(numel: int, data_parallel: int) -> int:
    """Numbers that a flat block of `numel` is stored in: every data-parallel rank's shard of it is `aligned`."""
    return aligned(-(-numel // data_parallel)) * data_parallel


def layer_numel(family: str, shape: ShapeConfig, tensor: int) -> int:
    """Numbers of a decoder layer's flat block on one tensor-parallel rank: what is sharded, aligned, then its norms."""
    numel = layer_parameters(family, shape, tensor)
    norms = (4 if FAMILIES[family].post_norms else 2) * shape.hidden_size
    return aligned(numel - norms) + norms


def fp8_bytes(rows: int, columns: int) -> int:
    """Bytes of a frozen FP8 weight: one for each number, and a scale for each block."""
    return rows * columns + 4 * -(-rows // FP8_BLOCK) * -(-columns // FP8_BLOCK)


def frozen_layer_bytes(config: Config, data_parallel: int) -> int:
    """Bytes of a frozen decoder layer on one rank. In FP8 are its four linears; norms, biases and the padding stay in
    the compute dtype."""
    family, shape, tensor = config.model.family, config.model.shape, config.parallel.tensor
    weight = WEIGHT_BYTES[config.precision.compute]
    padded = padded_block(layer_numel(family, shape, tensor), data_parallel)
    if config.precision.frozen_weights != "fp8":
        return padded * weight
    sizes = linear_shapes(shape, tensor).values()
    matrices = sum(rows * columns for rows, columns in sizes)
    return sum(fp8_bytes(*size) for size in sizes) + (padded - matrices) * weight


def moment_bytes(config: Config, numel: int) -> int:
    """Bytes of both of Adam's moments of `numel` parameters."""
    if config.optimizer.moments == "bf16":
        return 4 * numel
    if config.optimizer.moments == "fp8":
        return 2 * (numel + 4 * -(-numel // FP8_BLOCK))
    return 2 * MASTER_BYTES[config.precision.compute] * numel


def rank_bytes(
    config: Config,
    vocab_size: int,
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
        parts["moments"] += num_active * moment_bytes(config, shard)
        if weight != master:
            parts["masters"] += num_active * shard * master
        if frozen != padded * master:  # what is kept of a frozen block is not exact
            parts["host masters"] += (num_trained - num_active) * shard * master

    layers = set(stage_layers(config, stage))
    num_active, num_trained = (sum(len(layers.intersection(drawn)) for drawn in group) for group in (active, thawed))
    num_copies = len(layers) + (num_models - 1) * len(layers.intersection(set().union(*thawed)))
    numel = layer_numel(config.model.family, config.model.shape, config.parallel.tensor)
    add(numel, frozen_layer_bytes(config, data_parallel), num_copies, num_active, num_trained)
    for block, numel in stage_blocks(config, vocab_size, stage).items():
        if block in NOT_LAYERS:
            copies = num_models if block in config.lisa.always_active else 0
            add(numel, padded_block(numel, data_parallel) * weight, max(copies, 1), copies, copies)
    return parts


def on_device(parts: dict[str, int]) -> int:
    """Bytes of all parts but the masters on the host."""
    return sum(size for part, size in parts.items() if part != "host masters")
