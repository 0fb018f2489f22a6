"""Parameters and bytes of a configuration, as plain arithmetic: no model is built, nothing is imported.

H hidden, V padded vocabulary, F feed-forward size. A block is what freezes and thaws as one: `embedding`, `layers.N`,
`final_norm`, `head`. `draws` lists, per period of active layers, the active layers of each model: lower and upper, or
upper alone under `bilevel.mode=fixed`.
"""

from collections.abc import Collection, Sequence

from megatron_scalebio.config import Config, ShapeConfig, padded_vocab_size
from megatron_scalebio.families import FAMILIES

WEIGHT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2}
MASTER_BYTES = {"fp64": 8, "fp32": 4, "bf16": 4}
ALWAYS_ACTIVE = ("embedding", "final_norm", "head")


def layer_parameters(family: str, shape: ShapeConfig, tensor: int = 1) -> int:
    """Parameters of one decoder layer on one of `tensor` tensor-parallel ranks; its norms are on each."""
    hidden, differs = shape.hidden_size, FAMILIES[family]
    head_size = shape.head_size or hidden // shape.num_attention_heads
    query, key_value = shape.num_attention_heads * head_size, shape.num_query_groups * head_size
    qkv = (query + 2 * key_value) * (hidden + differs.qkv_bias)
    feed_forward = 3 * hidden * shape.ffn_hidden_size  # gate, up, down
    num_norms = 4 if differs.post_norms else 2
    return (qkv + query * hidden + feed_forward) // tensor + num_norms * hidden


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


def stage_blocks(config: Config, vocab_size: int, stage: int) -> dict[str, int]:
    """{block: parameters} of one model on one rank of a pipeline stage, padding of the vocabulary included."""
    shape, tensor, num_stages = config.model.shape, config.parallel.tensor, config.parallel.pipeline
    table = padded_vocab_size(vocab_size) // tensor * shape.hidden_size
    blocks = {"embedding": table} if stage == 0 else {}
    for layer in stage_layers(config, stage):
        blocks[f"layers.{layer}"] = layer_parameters(config.model.family, shape, tensor)
    if stage == num_stages - 1:
        blocks["final_norm"] = shape.hidden_size
        if not (shape.tied_embeddings and num_stages == 1):  # on a later stage a tied head is a copy
            blocks["head"] = table
    return blocks


def padded_block(numel: int, data_parallel: int) -> int:
    """Numbers that a flat block of `numel` parameters is stored in: every data-parallel rank's shard of it begins and
    ends at a multiple of 16, so that kernels can read and write 16 bytes at a time."""
    unit = 16 * data_parallel
    return -(-numel // unit) * unit


def rank_bytes(
    config: Config,
    vocab_size: int,
    data_parallel: int,
    stage: int,
    active: Sequence[Collection[int]],
    thawed: Sequence[Collection[int]],
) -> dict[str, int]:
    """Bytes by part on one rank, both models together, activations excluded.

    Blocks are padded (`padded_block`); gradients are whole, masters and moments sharded. Layers
    that neither model has ever thawed are stored once. Where the compute type is the master's there is no other master.

    Args:
        active: layers that train now, of each model.
        thawed: layers that train now or have before, of each model.
    """
    compute = config.precision.compute
    weight, master = WEIGHT_BYTES[compute], MASTER_BYTES[compute]
    parts = dict.fromkeys(("frozen weights", "active weights", "gradients", "masters", "moments", "host masters"), 0)
    for block, numel in stage_blocks(config, vocab_size, stage).items():
        padded = padded_block(numel, data_parallel)
        layer = None if block in ALWAYS_ACTIVE else int(block.partition(".")[2])
        trains = [layer is None or layer in layers for layers in active]
        has_trained = [layer is None or layer in layers for layers in thawed]
        num_copies = len(active) if any(has_trained) else 1
        num_active = sum(trains)
        parts["active weights"] += num_active * padded * weight
        parts["frozen weights"] += (num_copies - num_active) * padded * weight
        parts["gradients"] += num_active * padded * master
        parts["moments"] += num_active * 2 * padded // data_parallel * master
        if weight != master:
            parts["masters"] += num_active * padded // data_parallel * master
            parts["host masters"] += (sum(has_trained) - num_active) * padded // data_parallel * master
    return parts


def peak_rank_bytes(
    config: Config, vocab_size: int, data_parallel: int, draws: Sequence[Sequence[Collection[int]]]
) -> tuple[int, int, dict[str, int]]:
    """(stage, period, bytes by part) where and when a rank's device holds most; host masters do not count."""

    def on_device(peak: tuple[int, int, dict[str, int]]) -> int:
        return sum(size for part, size in peak[2].items() if part != "host masters")

    peaks = []
    thawed: list[set[int]] = [set() for _ in draws[0]]
    for period, active in enumerate(draws):
        thawed = [before | set(layers) for before, layers in zip(thawed, active, strict=True)]
        for stage in range(config.parallel.pipeline):
            peaks.append((stage, period, rank_bytes(config, vocab_size, data_parallel, stage, active, thawed)))
    return max(peaks, key=on_device)
