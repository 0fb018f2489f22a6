"""The modules that the decoder layers are made of, where Megatron-Core's own do not serve; attention has its own file.

Packed examples: a micro-batch is one sequence of T = B * S tokens. Attention is kept inside an example; rotary
positions run on over the whole sequence, which changes nothing but rounding: rotary attention depends on differences.

Shapes: T tokens of a micro-batch (T / TP under sequence parallelism, where it is scattered), B rows of S tokens,
H hidden, F feed-forward of this rank, d head size.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megatron_scalebio.kernels.gated_activation import gated_activation
from megatron_scalebio.mcore.attention import CoreAttention
from megatron_scalebio.mcore.linear import ColumnLinear, RowLinear
from megatron_scalebio.mcore.parameters import Weights
from megatron_scalebio.mcore.recompute import LAYERS, LastLinear


@dataclass
class DecoderConfig(TransformerConfig):
    """Megatron-Core's settings, and those of our own modules that it has no name for."""

    core_attention: type[CoreAttention] | None = None  # None: Transformer Engine's
    row_length: int = 0
    activation: str = "silu"  # of the gate: a key of gated_activation.ACTIVATIONS
    sliding_window: int | None = None  # of the layers that `window_attn_skip_freq` leaves it to
    attention_softcap: float | None = None
    final_softcap: float | None = None
    post_norms: bool = False
    vocab_size: int = 0  # entries that count; the embedding and the head have padding, too
    rounds_frozen_inputs: bool = True  # of products with FP8 weights
    recompute: str = "none"  # a key of recompute.LAYERS
    active_fp8_recipe: str | None = None  # of the linears that train; None: no FP8


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked for sequence parallelism; Megatron-Core's local norm refuses to run under it.

    A zero-centred one multiplies by 1 + weight, before it rounds to the compute dtype, as transformers' Gemma2RMSNorm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.zero_centered = config.layernorm_zero_centered_gamma
        weight = cast(Weights, self.weight)
        weight.sequence_parallel = config.sequence_parallel
        weight.neutral = 0.0 if self.zero_centered else 1.0  # where initial weights begin

    def forward(self, x: Tensor) -> Tensor:
        if not self.zero_centered:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.normalized_shape, 1.0 + self.weight.to(wide), self.eps).to(x.dtype)


class PostNormLinear(RowLinear):
    """A projection into the residual stream whose output, summed over the ranks, is normed before it is added."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **keywords: Any):
        super().__init__(input_size, output_size, config=config, **keywords)
        self.post_norm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        return self.post_norm(output), bias


class GatedMLP(MLP):
    """Two matrices without biases, and between them one operation that keeps fc1's output. Megatron-Core's MLP keeps
    the activated gate and a copy of up as well: 110,592 of 279,720 bytes per token of a frozen layer of Qwen-2.5-32B.
    """

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """[T, 1, H] -> [T, 1, H], and no bias."""
        x, _ = self.linear_fc1(hidden_states)
        x = gated_activation(x, self.config.activation)  # fc1's output is let go of, where no gradient needs it
        return self.linear_fc2(x)


def rotary_frequencies(head_size: int, base: float, scaling: dict[str, float] | None) -> Tensor:
    """Radians per position, [d / 2] fp64.

    With Llama-3.1's scaling a frequency that turns fewer than `low_freq_factor` times over the original context is
    divided by `factor`, one of more than `high_freq_factor` turns is kept, and between them the divisor is blended
    (transformers' modeling_rope_utils.py, `_compute_llama3_parameters`).
    """
    frequencies = 1.0 / base ** (torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    if scaling is None:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


class ExactRotaryEmbedding(RotaryEmbedding):
    """Rotary angles in fp64: at fp32 an angle at position 8,000 is off by 5e-4, and packing would change the result."""

    def __init__(self, frequencies: Tensor):
        torch.nn.Module.__init__(self)
        self.inv_freq = frequencies

    def forward(self, max_seq_len: int, **_: Any) -> Tensor:
        """Angles [max_seq_len, 1, 1, d], each twice, for the non-interleaved rotation."""
        positions = torch.arange(max_seq_len, dtype=torch.float64, device=self.inv_freq.device)
        angles = torch.outer(positions, self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def native_block_spec(config: DecoderConfig) -> TransformerBlockSubmodules:
    """This stage's decoder layers from tensor-parallel linears and the modules above."""
    layer: ModuleSpec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.module = LAYERS[config.recompute]
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    assert config.core_attention is not None
    attention.core_attention = partial(
        config.core_attention, row_length=config.row_length, softcap=config.attention_softcap
    )
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm  # of each head
    row, last = (PostNormLinear, PostNormLinear) if config.post_norms else (RowLinear, LastLinear)
    attention.linear_qkv, attention.linear_proj = ColumnLinear, row
    mlp = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=last)
    layer.submodules.mlp = partial(GatedMLP.as_mlp_submodule, submodules=mlp)
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
