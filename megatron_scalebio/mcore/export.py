"""A model as a Hugging Face checkpoint: exact full tensors, one at a time, whatever the layout."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from megatron_scalebio.active_layers import Role
from megatron_scalebio.anatomy.tensors import join_shards
from megatron_scalebio.config import UserError
from megatron_scalebio.hf import Shard, ShardWriter, begin_export, export_config, finish_export, read_config, to_theirs
from megatron_scalebio.mcore.models import MegatronModels

EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FAILURES = (OSError, SafetensorError, UserError)  # of disks and folders: no program's fault


def export_model(models: MegatronModels, folder: Path, end_id: int, role: Role = Role.UPPER, card: str = "") -> None:
    """Write one of the two models to a new folder; every rank takes part. `end_id` is its tokenizer's end-of-text, and
    `card` its README.md, if it is to have one.

    Weights that have trained come from their exact masters, rounded once, to `run.export_dtype`; with bf16 weights and
    a bf16 export those that never trained keep the bits that they were loaded with.

    Raises: UserError, on every rank, if the folder exists or cannot be written; what was written stays beside it.
    """
    config, groups = models.config, models.groups
    dtype = EXPORT_DTYPES[config.run.export_dtype]
    first = groups.rank == 0
    begun = _together(lambda: (_config_json(models, dtype, end_id), begin_export(folder)) if first else None)
    content, partial = begun[0]
    writes = groups.tensor_rank == 0 and groups.data.rank() == 0
    writer = ShardWriter(partial, groups.stage, dtype, int(config.run.export_shard_gb * 1e9)) if writes else None
    failures: list[Exception] = []  # told below: the other ranks wait in the next tensor's gather
    for name, tensor in _full_tensors(models, role, failures):
        if writer is None or failures:
            continue
        try:
            for theirs, part in to_theirs(config.model, name, tensor).items():
                writer.add(theirs, part)
        except FAILURES as error:
            failures.append(error)

    def close() -> list[Shard]:
        if failures:
            raise failures[0]
        return [] if writer is None else writer.close()

    by_rank = zip(_together(lambda: groups.stage), _together(close), strict=True)
    shards = [shard for _, own in sorted(by_rank, key=lambda pair: pair[0]) for shard in own]
    source = None if config.model.hf_path is None else Path(config.model.hf_path)
    tokenizer = None if config.data.tokenizer == "bytes" else Path(config.data.tokenizer)
    template = Path(config.data.template) if config.data.template.endswith(".jinja") else None
    beside = content, source, tokenizer, template, card
    _together(lambda: finish_export(partial, folder, shards, *beside) if first else None)


def _config_json(models: MegatronModels, dtype: torch.dtype, end_id: int) -> dict[str, Any]:
    model = models.config.model
    source = None if model.hf_path is None else read_config(Path(model.hf_path))
    content = export_config(model, dtype, source)
    if content.get("eos_token_id") is None:
        content["eos_token_id"] = end_id  # where generation stops
    return content


def _together(action: Callable[[], Any]) -> list[Any]:
    """What `action` returns on each rank, or its failure on any of them raised on all, so that none waits for ever."""
    try:
        outcome = action(), None
    except FAILURES as error:
        outcome = None, str(error)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise UserError(f"the model could not be exported: rank {rank}: {failure}")
    return [result for result, _ in outcomes]


def _full_tensors(models: MegatronModels, role: Role, failures: list[Exception]) -> Iterator[tuple[str, Tensor]]:
    """(global name, full tensor) of this stage's parameters of a model, equal on all its ranks. The tied head
    on a stage of its own comes too, as the embedding's copy that it is. What cannot be read is zero, and its failure
    appended: the gathers go on."""
    groups = models.groups
    for name, block in models.store.blocks[role].items():
        flat = _exact_weights(models, role, name, failures)
        for parameter, local in zip(block.parameters, block.views(flat), strict=True):
            shards = [local]
            if parameter.declared.cut.dim is not None and groups.tensor.size() > 1:
                shards = [torch.empty_like(local) for _ in range(groups.tensor.size())]
                dist.all_gather(shards, local.contiguous(), group=groups.tensor)
            yield parameter.name, join_shards(parameter.declared, shards)


def _exact_weights(models: MegatronModels, role: Role, name: str, failures: list[Exception]) -> Tensor:
    """A block of a model, flat: as exact as it is kept, gathered over data parallelism."""
    block, exact = models.store.blocks[role][name], models.persistence.exact(role, name)
    if exact is None:  # in FP8, and never active
        try:
            return models.store.initial_weights(block)
        except FAILURES as error:
            failures.append(error)
            return torch.zeros(block.numel, dtype=models.dtype, device=models.device)
    if block.weights is not None and exact.dtype == block.weights.dtype:
        return block.weights
    flat = torch.empty(block.numel, dtype=exact.dtype, device=models.device)
    dist.all_gather_into_tensor(flat, exact.to(flat.device), group=models.groups.data)
    return flat
