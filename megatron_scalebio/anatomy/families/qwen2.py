"""Qwen2 and Qwen2.5: biases of queries, keys and values."""

from typing import Any

from megatron_scalebio.anatomy.decoder import LAYER, QKV_BIAS
from megatron_scalebio.anatomy.family import Family
from megatron_scalebio.anatomy.fields import Fields
from megatron_scalebio.config import ShapeConfig


def read(config: dict[str, Any]) -> ShapeConfig:
    fields = Fields(config, FAMILY.harmless)
    fields.must_be("hidden_act", "silu")
    fields.must_be("use_sliding_window", False)
    fields.must_be("use_mrope", False)
    shape = fields.shape(tied_by_default=False)
    fields.must_be("layer_types", ["full_attention"] * shape.num_layers)
    fields.refuse_the_rest()
    return shape


def write(shape: ShapeConfig) -> dict[str, Any]:
    own = {
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }
    if shape.head_size and shape.head_size * shape.num_attention_heads != shape.hidden_size:
        own["head_dim"] = shape.head_size  # the field is not Qwen2's own: only where it says something
    return own


FAMILY = Family(
    name="qwen2",
    members="Qwen 2, 2.5",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer=(*LAYER, QKV_BIAS),
    read=read,
    write=write,
    harmless=("sliding_window", "max_window_layers"),  # they describe windows that use_sliding_window=false turns off
)
