"""Mistral 7B: 0.1 with a window in every layer, 0.2 and 0.3 without."""

from dataclasses import replace
from typing import Any

from megatron_scalebio.anatomy.decoder import LAYER
from megatron_scalebio.anatomy.family import Family
from megatron_scalebio.anatomy.fields import Fields
from megatron_scalebio.anatomy.parameters import head_size
from megatron_scalebio.config import ShapeConfig


def read(config: dict[str, Any]) -> ShapeConfig:
    """Fields that it leaves out have the values of transformers' MistralConfig: a window of 4096 among them, where
    null means none."""
    fields = Fields(config, FAMILY.harmless)
    fields.must_be("hidden_act", "silu")
    shape = fields.shape(tied_by_default=False)
    shape = replace(shape, sliding_window=fields.nullable_count("sliding_window", default=4096))
    fields.refuse_the_rest()
    return shape


def write(shape: ShapeConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": 32768,
        "head_dim": head_size(shape),
        "hidden_act": "silu",
        "sliding_window": shape.sliding_window,
    }


FAMILY = Family(
    name="mistral",
    members="Mistral 7B 0.1, 0.2, 0.3",
    model_type="mistral",
    architecture="MistralForCausalLM",
    layer=LAYER,
    read=read,
    write=write,
    options=frozenset({"sliding_window"}),
)
