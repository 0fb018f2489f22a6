"""Qwen3, its dense models: each query and key head is normed before the rotation; heads have a size of their own."""

from typing import Any

from megatron_scalebio.anatomy.decoder import KEY_NORM, LAYER, QUERY_NORM
from megatron_scalebio.anatomy.family import Family
from megatron_scalebio.anatomy.fields import Fields
from megatron_scalebio.anatomy.parameters import head_size
from megatron_scalebio.config import ShapeConfig


def read(config: dict[str, Any]) -> ShapeConfig:
    """Fields that it leaves out have the values of transformers' Qwen3Config."""
    fields = Fields(config, FAMILY.harmless)
    fields.must_be("hidden_act", "silu")
    fields.must_be("attention_bias", False)
    fields.must_be("use_sliding_window", False)
    shape = fields.shape(tied_by_default=False, head_size=128)
    fields.must_be("layer_types", ["full_attention"] * shape.num_layers)
    fields.refuse_the_rest()
    return shape


def write(shape: ShapeConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": 40960,
        "head_dim": head_size(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
    }


FAMILY = Family(
    name="qwen3",
    members="Qwen 3 (dense)",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer=(*LAYER, QUERY_NORM, KEY_NORM),
    read=read,
    write=write,
    harmless=("sliding_window", "max_window_layers"),  # they describe windows that use_sliding_window=false turns off
)
