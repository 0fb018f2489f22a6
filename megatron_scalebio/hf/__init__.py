"""Hugging Face checkpoints in and out."""

from megatron_scalebio.config import ModelConfig
from megatron_scalebio.hf.checkpoint import Checkpoint, read_config
from megatron_scalebio.hf.export import Shard, ShardWriter, begin_export, finish_export
from megatron_scalebio.hf.mapping import check_names, read_shard, to_theirs
from megatron_scalebio.hf.model_card import model_card
from megatron_scalebio.hf.model_config import adopt_checkpoint, export_config, read_shape

__all__ = [
    "Checkpoint",
    "Shard",
    "ShardWriter",
    "adopt_checkpoint",
    "begin_export",
    "check_checkpoint",
    "export_config",
    "finish_export",
    "model_card",
    "read_config",
    "read_shape",
    "read_shard",
    "to_theirs",
]


def check_checkpoint(model: ModelConfig) -> None:
    """The files at `model.hf_path` hold the tensors of the model that `adopt_checkpoint` read from there.

    Raises: UserError for files that are absent, damaged or not to be read, and tensors missing, surplus or misshapen.
    """
    assert model.hf_path is not None
    check_names(Checkpoint(model.hf_path), model)
