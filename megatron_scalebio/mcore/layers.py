"""The modules that the decoder layers are made of, where Megatron-Core's own do not serve.

Packed examples: a micro-batch is one sequence of T = B * S tokens. Attention is kept inside an example; rotary
positions run on over the whole sequence, which changes nothing but rounding: rotary attention depends on differences.

Shapes: T tokens of a micro-batch, B rows of S tokens, h query heads and g query groups of this rank, d head size.
"""

import inspect
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megatron_scalebio.data.batch import MicroBatch


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked for sequence parallelism; Megatron-Core's local norm refuses to run under it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel


class ExactRotaryEmbedding(RotaryEmbedding):
    """Rotary angles in fp64: at fp32 an angle at position 8,000 is off by 5e-4, and packing would change the result."""

    def __init__(self, head_dim: int, base: float):
        torch.nn.Module.__init__(self)
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=torch.cuda.current_device()) / head_dim
        self.inv_freq = 1.0 / base**exponents

    def forward(self, max_seq_len: int, **_) -> Tensor:
        """Angles [max_seq_len, 1, 1, d], each twice, for the non-interleaved rotation."""
        positions = torch.arange(max_seq_len, dtype=torch.float64, device=self.inv_freq.device)
        angles = torch.outer(positions, self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


class _CoreAttention(torch.nn.Module):
    """Causal attention within each packed example; `attention_mask` carries what `prepare` made of the micro-batch."""

    def __init__(self, row_length: int, **_):
        super().__init__()
        self.row_length = row_length

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_) -> Tensor:
        """query [T, 1, h, d], key and value [T, 1, g, d] -> [T, 1, h * d]."""
        context = self.attend(query.squeeze(1), key.squeeze(1), value.squeeze(1), attention_mask)
        return context.reshape(len(query), 1, -1)


class SdpaAttention(_CoreAttention):
    """For the CPU, and for fp32 and fp64: torch's scaled_dot_product_attention with a block-diagonal causal mask."""

    @staticmethod
    def prepare(micro_batch: MicroBatch) -> Tensor:
        """Boolean [B, 1, S, S]: query q sees key k."""
        ends = micro_batch.cu_seqlens[1:].long()
        tokens = torch.arange(len(micro_batch.tokens), device=ends.device)
        segments = torch.searchsorted(ends, tokens, right=True).view(-1, micro_batch.row_length)
        same_example = segments.unsqueeze(2) == segments.unsqueeze(1)
        return same_example.tril().unsqueeze(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        rows, length = mask.shape[0], mask.shape[-1]
        query, key, value = (x.view(rows, length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)


class VarlenAttention(_CoreAttention):
    """For bf16 on CUDA: torch's variable-length flash attention over the packed examples."""

    def __init__(self, row_length: int, **_):
        super().__init__(row_length)
        from torch.nn.attention.varlen import varlen_attn

        # From torch 2.12 on fewer key than query heads must be allowed explicitly; before, they simply may be fewer.
        grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        self.attention = partial(varlen_attn, window_size=(-1, 0), **grouped)

    @staticmethod
    def prepare(micro_batch: MicroBatch) -> Tensor:
        """Ends of the examples, int32 [segments + 1]."""
        return micro_batch.cu_seqlens

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ends: Tensor) -> Tensor:
        longest = self.row_length  # an upper bound known on the host: no synchronisation
        return self.attention(query, key, value, ends, ends, longest, longest)


def attention_class(device: torch.device, dtype: torch.dtype) -> type[SdpaAttention] | type[VarlenAttention]:
    """The native core attention for a device and compute dtype."""
    return VarlenAttention if device.type == "cuda" and dtype == torch.bfloat16 else SdpaAttention


def native_block_spec(config: TransformerConfig, device: torch.device, row_length: int) -> TransformerBlockSubmodules:
    """This stage's decoder layers from Megatron-Core's local tensor-parallel linears and the modules above."""
    layer: ModuleSpec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = partial(
        attention_class(device, config.params_dtype), row_length=row_length
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
