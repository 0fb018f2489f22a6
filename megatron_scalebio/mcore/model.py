"""Megatron-Core's GPTModel in the shape of `model.shape`, this rank's stage and tensor-parallel shard of it."""

import logging

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import TransformerConfig

from megatron_scalebio.config import Config, padded_vocab_size
from megatron_scalebio.mcore.layers import ExactRotaryEmbedding, native_block_spec
from megatron_scalebio.mcore.process_groups import ProcessGroups

COMPUTE_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron-Core's settings of a Qwen-2.5 decoder: RMSNorm, SwiGLU, grouped queries, QKV bias, no dropout."""
    shape, parallel = config.model.shape, config.parallel
    dtype = COMPUTE_DTYPES[config.precision.compute]
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # initial weights come by global name, equal under every layout
        calculate_per_token_loss=True,  # the schedule then leaves the loss as it is, instead of averaging micro-batches
        deallocate_pipeline_outputs=True,
        batch_p2p_sync=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def build_model(config: Config, groups: ProcessGroups, device: torch.device, vocab_size: int) -> GPTModel:
    """This rank's part of one model. Its weights are uninitialised memory until they are loaded by global name.

    Args:
        vocab_size: entries that count; the embedding and the head are padded to `padded_vocab_size` of it.
    """
    shape, core = config.model.shape, transformer_config(config)
    use_te = config.model.implementation == "te"
    row_length = config.data.max_length
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # "GPTModel is deprecated", twice
    model = GPTModel(
        config=core,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec()
        if use_te
        else native_block_spec(core, device, row_length),
        vocab_size=padded_vocab_size(vocab_size),
        max_sequence_length=row_length,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_base,
        parallel_output=True,
        pg_collection=groups.collection,
    )
    if not use_te:  # Transformer Engine's packed format restarts positions at every example and wants fp32 angles
        model.rotary_pos_emb = ExactRotaryEmbedding(core.kv_channels, shape.rope_base)
    return model.to(device)
