"""The parameters of the decoder that all families are variants of: embedding, layers, final norm, head.

A block is what freezes and thaws as one: `layers.7`, or one of the three that are no decoder layer. A family's layer is
`LAYER`, with parameters added (`with_added`) or kept under other names by transformers (`kept_as`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_scalebio.anatomy.parameters import Cut, Initial, Parameter, Part

LAYER_PREFIX, THEIR_LAYER_PREFIX = "decoder.layers.", "model.layers."


def norm(name: str, theirs: str, dim: str = "hidden", **keywords: Any) -> Parameter:
    """A norm's weight, whole on every rank."""
    return Parameter(name, (Part(theirs, (dim,)),), initial=Initial.NEUTRAL, **keywords)


EMBEDDING = Parameter(
    "embedding.word_embeddings.weight", (Part("model.embed_tokens.weight", ("vocabulary", "hidden")),), Cut.VOCABULARY
)
FINAL_NORM = norm("decoder.final_layernorm.weight", "model.norm.weight")
HEAD = Parameter("output_layer.weight", (Part("lm_head.weight", ("vocabulary", "hidden")),), Cut.VOCABULARY)

OUTER_BLOCKS = {"embedding": EMBEDDING, "final_norm": FINAL_NORM, "head": HEAD}

QKV_ROWS = {"self_attn.q_proj": "queries", "self_attn.k_proj": "keys", "self_attn.v_proj": "keys"}

INPUT_NORM = norm(
    "input_layernorm.weight", "input_layernorm.weight", fused_name="self_attention.linear_qkv.layer_norm_weight"
)
QKV = Parameter(
    "self_attention.linear_qkv.weight",
    tuple(Part(f"{theirs}.weight", (rows, "hidden")) for theirs, rows in QKV_ROWS.items()),
    Cut.GROUPS,
)
QKV_BIAS = Parameter(
    "self_attention.linear_qkv.bias",
    tuple(Part(f"{theirs}.bias", (rows,)) for theirs, rows in QKV_ROWS.items()),
    Cut.GROUPS,
    Initial.ZERO,
)
# Norms of each query and key head: a rank's heads alone have a part in their gradient.
QUERY_NORM = norm("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "head", sums_over_heads=True)
KEY_NORM = norm("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "head", sums_over_heads=True)
PROJ = Parameter(
    "self_attention.linear_proj.weight",
    (Part("self_attn.o_proj.weight", ("hidden", "queries")),),
    Cut.COLUMNS,
    Initial.RESIDUAL,
)
MLP_NORM = norm(
    "pre_mlp_layernorm.weight", "post_attention_layernorm.weight", fused_name="mlp.linear_fc1.layer_norm_weight"
)
FC1 = Parameter(
    "mlp.linear_fc1.weight",
    (Part("mlp.gate_proj.weight", ("ffn", "hidden")), Part("mlp.up_proj.weight", ("ffn", "hidden"))),
    Cut.HALVES,
)
FC2 = Parameter(
    "mlp.linear_fc2.weight", (Part("mlp.down_proj.weight", ("hidden", "ffn")),), Cut.COLUMNS, Initial.RESIDUAL
)
# Norms of what attention and MLP put out, before it is added to the residual stream.
POST_ATTENTION_NORM = norm("self_attention.linear_proj.post_norm.weight", "post_attention_layernorm.weight")
POST_MLP_NORM = norm("mlp.linear_fc2.post_norm.weight", "post_feedforward_layernorm.weight")

LAYER = (INPUT_NORM, QKV, PROJ, MLP_NORM, FC1, FC2)


def kept_as(parameter: Parameter, *theirs: str) -> Parameter:
    """The parameter where transformers keeps its parts under other names."""
    return replace(
        parameter, parts=tuple(replace(part, name=name) for part, name in zip(parameter.parts, theirs, strict=True))
    )


def replaced(layer: Sequence[Parameter], parameter: Parameter) -> tuple[Parameter, ...]:
    """The layer with another declaration of the parameter of that name."""
    return tuple(parameter if own.name == parameter.name else own for own in layer)


def layer_block(layer: int) -> str:
    """The block of a decoder layer, counted from 0 over the whole model."""
    return f"layers.{layer}"
