"""Tiny models of every family, made by transformers itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from megatron_scalebio.config import ModelConfig
from megatron_scalebio.hf import read_shape

transformers.utils.logging.disable_progress_bar()

# Shapes that betray a wrong layout: a vocabulary that 128 does not divide, heads that do not fill the hidden size.
TINY = {"vocab_size": 301, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 8}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2Config(**TINY, num_key_value_heads=4, rope_theta=1e6),
    "qwen2-tied": lambda: Qwen2Config(**TINY, num_key_value_heads=8, tie_word_embeddings=True),
    "qwen2-wide": lambda: Qwen2Config(**TINY, num_key_value_heads=4, head_dim=10),
    "llama3": lambda: LlamaConfig(
        **TINY, num_key_value_heads=4, head_dim=10, rope_parameters=LLAMA3_ROPE, max_position_embeddings=1024
    ),
    "llama3-tied": lambda: LlamaConfig(**TINY, num_key_value_heads=8, tie_word_embeddings=True),
    "llama3-one-group": lambda: LlamaConfig(**{**TINY, "vocab_size": 128}, num_key_value_heads=1, head_dim=16),
    "qwen3": lambda: Qwen3Config(**TINY, num_key_value_heads=4, head_dim=10, rope_theta=1e6),
    "qwen3-tied": lambda: Qwen3Config(**TINY, num_key_value_heads=8, head_dim=6, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**TINY, num_key_value_heads=4, head_dim=10, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**TINY, num_key_value_heads=8, sliding_window=5),
    "gemma2": lambda: Gemma2Config(
        **TINY, num_key_value_heads=4, head_dim=16, query_pre_attn_scalar=20, sliding_window=5, pad_token_id=None
    ),
}


def model_of(folder: Path) -> ModelConfig:
    """The model settings that a checkpoint folder has."""
    family, shape = read_shape(folder)
    return ModelConfig(family=family, shape=shape)


def random_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A model no two parameters of which are alike, norms and biases included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if name.endswith("norm.weight") and config.model_type != "gemma2" else 0.0
            parameter.copy_(around + 0.2 * torch.randn(parameter.shape))
    return model
