"""Hugging Face checkpoints in and out: one file per model family, `mapping` for the tensors."""

from dataclasses import fields as dataclass_fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megatron_scalebio.config import Config, ShapeConfig, UserError
from megatron_scalebio.families import FAMILIES
from megatron_scalebio.hf import gemma2, llama3, qwen2
from megatron_scalebio.hf.checkpoint import Checkpoint, read_config
from megatron_scalebio.hf.export import Shard, ShardWriter, begin_export, finish_export
from megatron_scalebio.hf.fields import harmless_names
from megatron_scalebio.hf.mapping import check_names

__all__ = [
    "Checkpoint",
    "Shard",
    "ShardWriter",
    "adopt_checkpoint",
    "begin_export",
    "check_checkpoint",
    "export_config",
    "finish_export",
    "read_config",
    "read_shape",
]

_MODULES: dict[str, ModuleType] = {"qwen2": qwen2, "llama3": llama3, "gemma2": gemma2}
_MODEL_TYPES = {"qwen2": "qwen2", "llama": "llama3", "gemma2": "gemma2"}

# Settings that are filled from the checkpoint where they are null, so that an explicit null contradicts nothing.
_FILLED = ("model.shape.vocab_size", "model.shape.head_size", "model.shape.query_pre_attn_scalar")


def adopt_checkpoint(config: Config, given: dict[str, Any]) -> None:
    """Fill `config.model.family` and `config.model.shape` from the config.json at `config.model.hf_path`, the one file
    that is read.

    Args:
        given: the settings that the user gave, {"model.shape.num_layers": 24, ...}; only the model's are looked at.

    Raises: UserError for a config.json that is absent or not supported, or that given settings contradict.
    """
    folder = Path(config.model.hf_path)
    family, shape = read_shape(folder)
    adopted = {"model.family": family}
    adopted |= {f"model.shape.{field.name}": getattr(shape, field.name) for field in dataclass_fields(shape)}
    problems = [
        f"{key}={given[key]} contradicts {folder / 'config.json'}, which says {value}: remove the setting, or"
        " model.hf_path"
        for key, value in adopted.items()
        if key in given and given[key] != value and not (given[key] is None and key in _FILLED)
    ]
    if problems:
        raise UserError("\n".join(problems))
    config.model.family, config.model.shape = family, shape


def check_checkpoint(config: Config) -> None:
    """The files at `config.model.hf_path` hold the tensors of the model that `adopt_checkpoint` read from there.

    Raises: UserError for files that are absent, damaged or not to be read, and tensors missing, surplus or misshapen.
    """
    check_names(Checkpoint(config.model.hf_path), config.model.family, config.model.shape)


def read_shape(folder: Path) -> tuple[str, ShapeConfig]:
    """(family, shape) of the model in a checkpoint folder, from its config.json alone.

    Raises: UserError for a config.json that is absent, of another architecture, or not supported.
    """
    content = read_config(folder)
    family = _MODEL_TYPES.get(str(content.get("model_type")))
    architectures = content.get("architectures")
    if family is None or (architectures is not None and architectures != [FAMILIES[family].architecture]):
        supported = ", ".join(f"{FAMILIES[name].architecture} ({kind})" for kind, name in _MODEL_TYPES.items())
        raise UserError(
            f"{folder / 'config.json'}: architectures={architectures}, model_type={content.get('model_type')}: not"
            f" supported; supported are {supported}"
        )
    try:
        return family, _MODULES[family].shape_from(content)
    except UserError as error:
        raise UserError(f"{folder}: not a {family} model that can be computed here:\n{error}") from None


def export_config(
    family: str, shape: ShapeConfig, vocab_size: int, dtype: torch.dtype, source: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The config.json of an exported model. Of `source`, the config.json that the model came from, it keeps what does
    not change the mathematics: the tokens' numbers, the number of positions."""
    module = _MODULES[family]
    config = module.config_from(shape, vocab_size, dtype)
    if source is None:
        return config
    kept = harmless_names(module.HARMLESS)  # a field that the source leaves out stays out, and keeps its default
    own = {name: value for name, value in config.items() if name not in kept}
    return own | {name: value for name, value in source.items() if name in kept}
