"""Gemma-2: norms behind attention and MLP, softcaps, a window in every other layer. A norm's weight w means 1 + w."""

from dataclasses import replace
from typing import Any

from megatron_scalebio.anatomy.decoder import LAYER, MLP_NORM, POST_ATTENTION_NORM, POST_MLP_NORM, kept_as, replaced
from megatron_scalebio.anatomy.family import Family
from megatron_scalebio.anatomy.fields import Fields
from megatron_scalebio.anatomy.parameters import head_size
from megatron_scalebio.config import ShapeConfig

ACTIVATION = "gelu_pytorch_tanh"


def read(config: dict[str, Any]) -> ShapeConfig:
    """Fields that it leaves out have the values of transformers' Gemma2Config."""
    fields = Fields(config, FAMILY.harmless)
    fields.must_be("hidden_act", ACTIVATION)  # transformers reads hidden_activation alone; both say the same
    fields.must_be("hidden_activation", ACTIVATION)
    fields.must_be("attention_bias", False)
    fields.must_be("tie_word_embeddings", True)
    shape = fields.shape(tied_by_default=True, head_size=256)
    shape = replace(
        shape,
        query_pre_attn_scalar=fields.number("query_pre_attn_scalar", default=256),
        attention_softcap=fields.nullable_number("attn_logit_softcapping", default=50.0),
        final_softcap=fields.nullable_number("final_logit_softcapping", default=30.0),
        sliding_window=fields.count("sliding_window", default=4096),
    )
    fields.must_be("sliding_window_size", shape.sliding_window)  # the same once more, in the first files
    if fields.peek("layer_types") == ["full_attention"] * shape.num_layers:
        shape = replace(shape, sliding_window=None)
    fields.must_be("layer_types", layer_types(shape))
    fields.refuse_the_rest()
    return shape


def write(shape: ShapeConfig) -> dict[str, Any]:
    scalar = head_size(shape) if shape.query_pre_attn_scalar is None else shape.query_pre_attn_scalar
    return {
        "max_position_embeddings": 8192,
        "head_dim": head_size(shape),
        "hidden_act": ACTIVATION,
        "hidden_activation": ACTIVATION,
        "attention_bias": False,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,  # transformers wants an integer
        "attn_logit_softcapping": shape.attention_softcap,
        "final_logit_softcapping": shape.final_softcap,
        "sliding_window": shape.sliding_window or 4096,  # transformers wants one even where no layer uses it
        "layer_types": layer_types(shape),
    }


def layer_types(shape: ShapeConfig) -> list[str]:
    """Every other layer sees a window, from the first one on; no layer where there is no window."""
    windowed = [FAMILY.has_window(shape, layer) for layer in range(shape.num_layers)]
    return ["sliding_attention" if window else "full_attention" for window in windowed]


FAMILY = Family(
    name="gemma2",
    members="Gemma 2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    layer=(
        *replaced(LAYER, kept_as(MLP_NORM, "pre_feedforward_layernorm.weight")),
        POST_ATTENTION_NORM,
        POST_MLP_NORM,
    ),
    read=read,
    write=write,
    options=frozenset({"query_pre_attn_scalar", "attention_softcap", "final_softcap", "sliding_window"}),
    activation="gelu_tanh",
    zero_centered_norms=True,
    scaled_embedding=True,
    always_tied=True,
    windowed_layers="even",
    harmless=("cache_implementation",),
)
