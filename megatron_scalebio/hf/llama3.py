"""Llama 2, 3, 3.1 and 3.2: names, and config.json both ways."""

from typing import Any

import torch

from megatron_scalebio.config import ShapeConfig
from megatron_scalebio.hf.fields import Fields, common_config, rope_config

# A decoder layer's parameters -> where transformers keeps them. The other families vary this table.
LAYER_NAMES: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}

# Harmless: how the SmolLM2 conversion came about.
HARMLESS = ("is_llama_config",)


def shape_from(config: dict[str, Any]) -> ShapeConfig:
    """The shape that a config.json describes.

    Raises: UserError, naming every field that is missing, unknown, or set to what is not computed here.
    """
    fields = Fields(config, HARMLESS)
    for name in ("attention_bias", "mlp_bias", "rope_interleaved"):
        fields.must_be(name, False)
    fields.must_be("hidden_act", "silu")
    fields.must_be("pretraining_tp", 1)
    shape = fields.shape(tied_by_default=False, num_query_groups=fields.config.get("num_attention_heads"))
    fields.refuse_the_rest()
    return shape


def config_from(shape: ShapeConfig, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """A config.json that transformers loads. `vocab_size` counts no padding."""
    return {
        **common_config("LlamaForCausalLM", "llama", shape, vocab_size, dtype),
        **rope_config(shape),
        "max_position_embeddings": 131072 if shape.rope_scaling else 8192,
        "head_dim": shape.head_size or shape.hidden_size // shape.num_attention_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    }
