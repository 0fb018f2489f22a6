"""Llama 2, 3, 3.1 and 3.2."""

from typing import Any

from megatron_scalebio.anatomy.decoder import LAYER
from megatron_scalebio.anatomy.family import Family
from megatron_scalebio.anatomy.fields import Fields
from megatron_scalebio.anatomy.parameters import head_size
from megatron_scalebio.config import ShapeConfig


def read(config: dict[str, Any]) -> ShapeConfig:
    fields = Fields(config, FAMILY.harmless)
    for name in ("attention_bias", "mlp_bias", "rope_interleaved"):
        fields.must_be(name, False)
    fields.must_be("hidden_act", "silu")
    fields.must_be("pretraining_tp", 1)
    groups = fields.peek("num_attention_heads")
    shape = fields.shape(tied_by_default=False, num_query_groups=groups, scaled_rope=True)
    fields.refuse_the_rest()
    return shape


def write(shape: ShapeConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": 131072 if shape.rope_scaling else 8192,
        "head_dim": head_size(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    }


FAMILY = Family(
    name="llama3",
    members="Llama 2, 3, 3.1, 3.2",
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer=LAYER,
    read=read,
    write=write,
    options=frozenset({"rope_scaling"}),
    harmless=("is_llama_config",),  # how the SmolLM2 conversion came about
)
