"""Gemma-2: names, and config.json both ways. A norm's weight w means 1 + w on both sides."""

from dataclasses import replace
from typing import Any

import torch

from megatron_scalebio.config import ShapeConfig
from megatron_scalebio.hf import llama3
from megatron_scalebio.hf.fields import Fields, common_config, rope_config

LAYER_NAMES = {
    **llama3.LAYER_NAMES,
    "self_attention.linear_proj.post_norm.weight": ("post_attention_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("pre_feedforward_layernorm.weight",),
    "mlp.linear_fc2.post_norm.weight": ("post_feedforward_layernorm.weight",),
}

HARMLESS = ("cache_implementation",)

ACTIVATION = "gelu_pytorch_tanh"


def shape_from(config: dict[str, Any]) -> ShapeConfig:
    """The shape that a config.json describes. Fields that it leaves out have the values of transformers' Gemma2Config.

    Raises: UserError, naming every field that is missing, unknown, or set to what is not computed here.
    """
    fields = Fields(config, HARMLESS)
    fields.must_be("hidden_act", ACTIVATION)  # transformers reads hidden_activation alone; both say the same
    fields.must_be("hidden_activation", ACTIVATION)
    fields.must_be("attention_bias", False)
    fields.must_be("tie_word_embeddings", True)
    shape = fields.shape(tied_by_default=True, head_size=256)
    shape = replace(
        shape,
        query_pre_attn_scalar=fields.number("query_pre_attn_scalar", default=256),
        attention_softcap=fields.number("attn_logit_softcapping", default=50.0, nullable=True),
        final_softcap=fields.number("final_logit_softcapping", default=30.0, nullable=True),
        sliding_window=fields.count("sliding_window", default=4096),
    )
    fields.must_be("sliding_window_size", shape.sliding_window)  # the same once more, in the first files
    if fields.peek("layer_types") == ["full_attention"] * shape.num_layers:
        shape = replace(shape, sliding_window=None)
    fields.must_be("layer_types", _layer_types(shape))
    fields.refuse_the_rest()
    return shape


def config_from(shape: ShapeConfig, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """A config.json that transformers loads. `vocab_size` counts no padding."""
    head_size = shape.head_size or shape.hidden_size // shape.num_attention_heads
    scalar = head_size if shape.query_pre_attn_scalar is None else shape.query_pre_attn_scalar
    return {
        **common_config("Gemma2ForCausalLM", "gemma2", shape, vocab_size, dtype),
        **rope_config(shape),
        "max_position_embeddings": 8192,
        "head_dim": head_size,
        "hidden_act": ACTIVATION,
        "hidden_activation": ACTIVATION,
        "attention_bias": False,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,  # transformers wants an integer
        "attn_logit_softcapping": shape.attention_softcap,
        "final_logit_softcapping": shape.final_softcap,
        "sliding_window": shape.sliding_window or 4096,  # transformers wants one even where no layer uses it
        "layer_types": _layer_types(shape),
    }


def _layer_types(shape: ShapeConfig) -> list[str]:
    """Every other layer sees a window, from the first one on; no layer where there is no window."""
    first = "full_attention" if shape.sliding_window is None else "sliding_attention"
    return [first if layer % 2 == 0 else "full_attention" for layer in range(shape.num_layers)]
