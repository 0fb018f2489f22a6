"""Megatron-Core's GPTModel in the family and shape of `model`, this rank's stage and tensor-parallel shard of it."""

import importlib.util
import logging
import math
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from torch.overrides import TorchFunctionMode

from megatron_scalebio.anatomy import FAMILIES
from megatron_scalebio.anatomy.decoder import EMBEDDING
from megatron_scalebio.config import Config, ShapeConfig
from megatron_scalebio.kernels.gated_activation import ACTIVATIONS
from megatron_scalebio.mcore.attention import choose_attention
from megatron_scalebio.mcore.layers import DecoderConfig, ExactRotaryEmbedding, native_block_spec, rotary_frequencies
from megatron_scalebio.mcore.process_groups import ProcessGroups

COMPUTE_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def decoder_config(config: Config, device: torch.device) -> DecoderConfig:
    """The decoder layers' settings: RMSNorm, gated MLP, grouped queries, no dropout, and what the family adds."""
    shape, precision, family = config.model.shape, config.precision, FAMILIES[config.model.family]
    return DecoderConfig(
        **_settings_of_megatron(config, device),
        core_attention=choose_attention(config.model, device, COMPUTE_DTYPES[precision.compute]).backend,
        row_length=config.data.max_length,
        activation=family.activation,
        sliding_window=shape.sliding_window,
        attention_softcap=shape.attention_softcap,
        final_softcap=shape.final_softcap,
        post_norms=family.post_norms,
        vocab_size=shape.vocab_size,
        recompute=config.parallel.recompute,
        rounds_frozen_inputs=precision.frozen_inputs == "fp8",
        active_fp8_recipe=precision.fp8_recipe if precision.compute == "fp8" else None,
    )


def _settings_of_megatron(config: Config, device: torch.device) -> dict[str, Any]:
    """Those of `DecoderConfig` that are Megatron-Core's own."""
    shape, parallel, family = config.model.shape, config.parallel, FAMILIES[config.model.family]
    scalar, window, dtype = shape.query_pre_attn_scalar, shape.sliding_window, COMPUTE_DTYPES[config.precision.compute]
    return dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_size,
        softmax_scale=None if scalar is None else scalar**-0.5,
        window_size=None if window is None else (window - 1, 0),  # Megatron-Core does not count the query itself
        # 2: layers 1, 3, 5, .. counted from 1 have the window; None: all
        window_attn_skip_freq=2 if family.windowed_layers == "even" else None,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        layernorm_zero_centered_gamma=family.zero_centered_norms,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[family.activation],
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.head_norms,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        pipeline_model_parallel_layout=_pipeline_layout(config),
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # initial weights come by global name, equal under every layout
        init_model_with_meta_device=True,  # tied embeddings on two stages are not compared when they are built
        calculate_per_token_loss=True,  # the schedule then leaves the loss as it is, instead of averaging micro-batches
        deallocate_pipeline_outputs=True,
        batch_p2p_sync=False,
        gradient_accumulation_fusion=_adds_weight_gradients_in_place(device),
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def _adds_weight_gradients_in_place(device: torch.device) -> bool:
    """Whether Apex's kernel is there, which adds a product to the fp32 `main_grad` and makes no bf16 gradient."""
    return device.type == "cuda" and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _pipeline_layout(config: Config) -> list[list[str]] | None:
    """What each stage holds, in Megatron-Core's words; None: one stage holds all."""
    if config.parallel.pipeline == 1:
        return None
    stages = [["decoder"] * num_layers for num_layers in config.parallel.layers_per_stage]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def build_model(config: Config, groups: ProcessGroups, device: torch.device) -> GPTModel:
    """This rank's part of one model. Its parameters are one number each until the weight store gives them memory."""
    shape, core = config.model.shape, decoder_config(config, device)
    use_te = config.model.implementation == "te"
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # "GPTModel is deprecated", twice
    # Transformer Engine's modules fill in what they allocate.
    with nullcontext() if use_te else _WithoutMemory():
        model = _gpt_model(core, groups, shape, use_te)
    frequencies = rotary_frequencies(core.kv_channels, shape.rope_base, shape.rope_scaling).to(device)
    if use_te:  # its packed format restarts positions at every example and wants fp32 angles
        model.rotary_pos_emb.inv_freq = frequencies.float()
    else:
        model.rotary_pos_emb = ExactRotaryEmbedding(frequencies)
    if FAMILIES[config.model.family].scaled_embedding and groups.is_first_stage:
        _scale_embedding(model, math.sqrt(shape.hidden_size))
    return model.to(device) if use_te else model  # the native modules are on the current device


def _gpt_model(core: DecoderConfig, groups: ProcessGroups, shape: ShapeConfig, te: bool) -> GPTModel:
    return GPTModel(
        config=core,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec() if te else native_block_spec(core),
        vocab_size=EMBEDDING.shape(shape)[0],
        max_sequence_length=core.row_length,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_base,
        parallel_output=True,
        pg_collection=groups.collection,
    )


class _WithoutMemory(TorchFunctionMode):
    """What `torch.empty` makes has its shape, and the memory of one number."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not torch.empty:
            return func(*args, **(kwargs or {}))
        size = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
        return torch.empty((), **(kwargs or {})).expand(size)


def _scale_embedding(model: GPTModel, factor: float) -> None:
    """Multiply what the embedding puts out, by the factor as the compute dtype rounds it: so transformers' Gemma2."""
    rounded = torch.tensor(factor, dtype=model.config.params_dtype).item()
    model.embedding.register_forward_hook(lambda module, inputs, output: output * rounded)
