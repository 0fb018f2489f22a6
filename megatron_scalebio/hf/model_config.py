"""config.json: which family and shape a checkpoint folder has, and the one that an export gets."""

from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import torch

from megatron_scalebio.anatomy import FAMILIES
from megatron_scalebio.anatomy.fields import common_config, harmless_names
from megatron_scalebio.config import Config, ModelConfig, ShapeConfig, UserError
from megatron_scalebio.hf.checkpoint import read_config

# Settings that are filled from the checkpoint where they are null, so that an explicit null contradicts nothing.
_FILLED = ("model.shape.vocab_size", "model.shape.head_size", "model.shape.query_pre_attn_scalar")


def adopt_checkpoint(config: Config, given: dict[str, Any]) -> None:
    """Fill `config.model.family` and `config.model.shape` from the config.json at `config.model.hf_path`, the one file
    that is read.

    Args:
        given: the settings that the user gave, {"model.shape.num_layers": 24, ...}; only the model's are looked at.

    Raises: UserError for a config.json that is absent or not supported, or that given settings contradict.
    """
    assert config.model.hf_path is not None
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


def read_shape(folder: Path) -> tuple[str, ShapeConfig]:
    """(family, shape) of the model in a checkpoint folder, from its config.json alone.

    Raises: UserError for a config.json that is absent, of another architecture, or not supported.
    """
    content = read_config(folder)
    model_type, architectures = content.get("model_type"), content.get("architectures")
    family = next((family for family in FAMILIES.values() if family.model_type == model_type), None)
    if family is None or (architectures is not None and architectures != [family.architecture]):
        supported = ", ".join(f"{family.architecture} ({family.model_type})" for family in FAMILIES.values())
        raise UserError(
            f"{folder / 'config.json'}: architectures={architectures}, model_type={model_type}: not supported;"
            f" supported are {supported}"
        )
    try:
        return family.name, family.read(content)
    except UserError as error:
        raise UserError(f"{folder}: not a {family.name} model that can be computed here:\n{error}") from None


def export_config(model: ModelConfig, dtype: torch.dtype, source: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of an exported model. Of `source`, the config.json that the model came from, it keeps what does
    not change the mathematics: the tokens' numbers, the number of positions."""
    family = FAMILIES[model.family]
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": str(dtype).removeprefix("torch."),  # the spelling that old and new programs read
        **common_config(model.shape),
        **family.write(model.shape),
    }
    if source is None:
        return config
    kept = harmless_names(family.harmless)  # a field that the source leaves out stays out, and keeps its default
    own = {name: value for name, value in config.items() if name not in kept}
    return own | {name: value for name, value in source.items() if name in kept}
