"""Writing a Hugging Face checkpoint folder: shards by several ranks, everything else by one, then a rename.

    partial = begin_export(final)                        one rank, which tells the others
    writer = ShardWriter(partial, stage, dtype, most_bytes)   one rank of each pipeline stage
    writer.add(name, tensor) ...; shards = writer.close()
    finish_export(partial, final, shards of all stages, config)      one rank, once all have closed

A folder of the final name is complete. Nothing that exists is overwritten or deleted: what an interrupted export left
behind stays beside it as NAME.partial-N.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_scalebio.config import UserError
from megatron_scalebio.hf.checkpoint import INDEX, SINGLE

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "chat_template.json", "*.model"),
)


@dataclass(frozen=True)
class Shard:
    """A file that a stage has written: its name for the time being, and {tensor: bytes}."""

    file: str
    tensors: dict[str, int]


def begin_export(final: Path) -> Path:
    """Create the folder that the export is written to until it is complete.

    Raises: UserError if `final` exists.
    """
    _refuse_existing(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        partial = final.with_name(f"{final.name}.partial-{number}")
        try:
            partial.mkdir()
            return partial
        except FileExistsError:
            number += 1


class ShardWriter:
    """Writes a stage's tensors under transformers' names, a shard as soon as it is full, and so holds one at most.

    Args:
        partial: from `begin_export`.
        dtype: of the checkpoint; tensors are converted to it.
        max_shard_bytes: of tensors in a shard; a larger tensor has a shard of its own.
    """

    def __init__(self, partial: Path, stage: int, dtype: torch.dtype, max_shard_bytes: int):
        self._partial, self._stage, self._dtype, self._limit = partial, stage, dtype, max_shard_bytes
        self._held: dict[str, Tensor] = {}
        self._shards: list[Shard] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a copy of the tensor."""
        size = tensor.numel() * self._dtype.itemsize
        if self._held and sum(held.nbytes for held in self._held.values()) + size > self._limit:
            self._flush()
        self._held[name] = torch.empty(tensor.shape, dtype=self._dtype).copy_(tensor.detach())

    def close(self) -> list[Shard]:
        """Write what is left, and return all shards for `finish_export`."""
        if self._held:
            self._flush()
        return self._shards

    def _flush(self) -> None:
        file = f"stage-{self._stage:05d}-{len(self._shards) + 1:05d}.safetensors"
        save_file(self._held, self._partial / file, metadata={"format": "pt"})
        self._shards.append(Shard(file, {name: tensor.nbytes for name, tensor in self._held.items()}))
        self._held = {}


def finish_export(
    partial: Path,
    final: Path,
    shards: list[Shard],
    config: dict[str, Any],
    source: Path | None = None,
    tokenizer: Path | None = None,
    template: Path | None = None,
    card: str = "",
) -> None:
    """Give the shards their names, write the other files, and rename the folder to `final`.

    Args:
        shards: of all stages, in their order.
        config: the content of config.json; see `hf.export_config`.
        source: the checkpoint folder that the model came from, whose generation_config.json goes with it.
        tokenizer: a folder whose tokenizer files and chat template go with it, or a SentencePiece model.
        template: the .jinja file of another chat template, which the model was trained with.
        card: the content of README.md; see `hf.model_card`. Empty: none is written.

    Raises: UserError if `final` exists by now; ValueError if two shards hold the same tensor.
    """
    _write_json(partial / "config.json", config)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if twice := weight_map.keys() & shard.tensors.keys():
            raise ValueError(f"{partial}: written by two stages: {', '.join(sorted(twice))}")
        weight_map |= dict.fromkeys(shard.tensors, name)
        os.rename(partial / shard.file, partial / name)
        shutil.copymode(partial / "config.json", partial / name)  # safetensors keeps its files from everyone else
    if len(shards) > 1:
        total = sum(sum(shard.tensors.values()) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(partial / INDEX, index)
    if source is not None and (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", partial / "generation_config.json")
    if tokenizer is not None:
        _copy_tokenizer(tokenizer, partial)
    if template is not None:
        shutil.copyfile(template, partial / "chat_template.jinja")
    if card:
        (partial / "README.md").write_text(card, encoding="utf-8")
    _refuse_existing(final)  # a rename would replace an empty folder
    os.rename(partial, final)


def _copy_tokenizer(source: Path, target: Path) -> None:
    if source.is_file():
        shutil.copyfile(source, target / "tokenizer.model")
        return
    for pattern in _TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)


def _refuse_existing(final: Path) -> None:
    if os.path.lexists(final):
        raise UserError(f"{final} exists, and is not overwritten: move it away, or name another folder")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
