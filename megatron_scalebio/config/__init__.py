"""Settings: declared in `settings`, read and merged in `loading`."""

from megatron_scalebio.config.declare import Setting
from megatron_scalebio.config.errors import UserError
from megatron_scalebio.config.evaluation_sets import EvaluationSet, evaluation_sets
from megatron_scalebio.config.likeness import nearest
from megatron_scalebio.config.loading import (
    changed,
    completed,
    config_sha256,
    flatten,
    given_settings,
    load_config,
    to_dict,
    write_config,
)
from megatron_scalebio.config.settings import (
    PRESETS,
    SETTINGS,
    BilevelConfig,
    Config,
    DataConfig,
    LisaConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    ShapeConfig,
    SourceConfig,
)

__all__ = [
    "PRESETS",
    "SETTINGS",
    "BilevelConfig",
    "Config",
    "DataConfig",
    "EvaluationSet",
    "LisaConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RunConfig",
    "Setting",
    "ShapeConfig",
    "SourceConfig",
    "UserError",
    "changed",
    "completed",
    "config_sha256",
    "evaluation_sets",
    "flatten",
    "given_settings",
    "load_config",
    "nearest",
    "to_dict",
    "write_config",
]
