"""Qwen2 and Qwen2.5: names, and config.json both ways."""

from typing import Any

import torch

from megatron_scalebio.config import ShapeConfig
from megatron_scalebio.hf import llama3
from megatron_scalebio.hf.fields import Fields, common_config, rope_config

LAYER_NAMES = {
    **llama3.LAYER_NAMES,
    "self_attention.linear_qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
}

# Harmless: they describe windows that use_sliding_window=false turns off.
HARMLESS = ("sliding_window", "max_window_layers")


def shape_from(config: dict[str, Any]) -> ShapeConfig:
    """The shape that a config.json describes.

    Raises: UserError, naming every field that is missing, unknown, or set to what is not computed here.
    """
    fields = Fields(config, HARMLESS)
    fields.must_be("hidden_act", "silu")
    fields.must_be("use_sliding_window", False)
    fields.must_be("use_mrope", False)
    shape = fields.shape(tied_by_default=False)
    if shape.rope_scaling is not None:
        fields.problems.append("rope_scaling of Llama-3.1: not supported for qwen2")
    fields.must_be("layer_types", ["full_attention"] * shape.num_layers)
    fields.refuse_the_rest()
    return shape


def config_from(shape: ShapeConfig, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """A config.json that transformers loads. `vocab_size` counts no padding."""
    config = {
        **common_config("Qwen2ForCausalLM", "qwen2", shape, vocab_size, dtype),
        **rope_config(shape),
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }
    if shape.head_size and shape.head_size * shape.num_attention_heads != shape.hidden_size:
        config["head_dim"] = shape.head_size  # the field is not Qwen2's own: only where it says something
    return config
