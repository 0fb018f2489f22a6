"""The upper model as a Hugging Face checkpoint: exact full tensors, one at a time, whatever the layout."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalebio.active_layers import Role
from megatron_scalebio.hf import ShardWriter, begin_export, export_config, finish_export, read_config
from megatron_scalebio.hf.mapping import join_shards, to_theirs
from megatron_scalebio.mcore.host import MegatronModels

EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export_model(models: MegatronModels, folder: Path) -> None:
    """Write `models`' upper model to a new folder; every rank takes part.

    Weights that have trained come from their exact masters, rounded once, to `run.export_dtype`; with bf16 weights and
    a bf16 export those that never trained keep the bits that they were loaded with.

    Raises: UserError if the folder exists.
    """
    config, groups = models.config, models.groups
    dtype = EXPORT_DTYPES.get(config.run.export_dtype or config.precision.compute, torch.float32)
    partial = [begin_export(folder) if groups.rank == 0 else None]
    dist.broadcast_object_list(partial)
    writes = groups.tensor_rank == 0 and groups.data.rank() == 0
    writer = ShardWriter(partial[0], groups.stage, dtype, int(config.run.export_shard_gb * 1e9)) if writes else None
    for name, tensor in _full_tensors(models):
        if writer is not None:
            for theirs, part in to_theirs(config.model.family, models.shape, name, tensor).items():
                writer.add(theirs, part)
    shards: list = [None] * groups.world_size
    dist.all_gather_object(shards, (groups.stage, writer.close()) if writer is not None else None)
    if groups.rank == 0:
        stages = sorted((written for written in shards if written is not None), key=lambda written: written[0])
        source = None if config.model.hf_path is None else Path(config.model.hf_path)
        content = export_config(
            *(config.model.family, models.shape, models.shape.vocab_size, dtype),
            source=None if source is None else read_config(source),
        )
        tokenizer = None if config.data.tokenizer == "bytes" else Path(config.data.tokenizer)
        finish_export(partial[0], folder, [s for _, own in stages for s in own], content, source, tokenizer)
    dist.barrier()


def _full_tensors(models: MegatronModels) -> Iterator[tuple[str, Tensor]]:
    """(global name, full tensor) of this stage's parameters of the upper model, equal on all its ranks. The tied head
    on a stage of its own comes too, as the embedding's copy that it is."""
    groups = models.groups
    for name, block in models.store.blocks[Role.UPPER].items():
        flat = _exact_weights(models, name)
        for parameter, local in zip(block.parameters, block.views(flat), strict=True):
            shards = [local]
            if parameter.shard_dim is not None and groups.tensor.size() > 1:
                shards = [torch.empty_like(local) for _ in range(groups.tensor.size())]
                dist.all_gather(shards, local.contiguous(), group=groups.tensor)
            yield parameter.name, join_shards(parameter.name, shards)


def _exact_weights(models: MegatronModels, name: str) -> Tensor:
    """A block of the upper model, flat: its masters where it has any, gathered over data parallelism."""
    block = models.store.blocks[Role.UPPER][name]
    active = models.active_sets[Role.UPPER].blocks.get(name)
    master = models.store.masters.get((Role.UPPER, name)) if active is None else active.master
    if master is None or master.dtype == block.weights.dtype:
        return block.weights
    flat = torch.empty(block.numel, dtype=master.dtype, device=block.weights.device)
    dist.all_gather_into_tensor(flat, master.to(flat.device), group=models.groups.data)
    return flat
