"""The native core attentions: causal, inside each packed example and inside the layer's sliding window.

A window of W tokens lets a query see itself and the W - 1 tokens before it, as transformers counts
(masking_utils.py, `sliding_window_overlay`). Which layers have it is Megatron-Core's to say
(`is_layer_window_attention`), from the layer's number in the whole model.

Shapes: T tokens of a micro-batch, B rows of S tokens, h query heads and g key and value heads of this rank, d their
size.
"""

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_scalebio.anatomy import FAMILIES
from megatron_scalebio.config import ModelConfig, UserError
from megatron_scalebio.data.batch import MicroBatch


class Needs(NamedTuple):
    """What a core attention is asked for."""

    device: str
    dtype: torch.dtype
    head_size: int
    softcap: bool

    @property
    def tensor_cores(self) -> bool:
        return self.device == "cuda" and self.dtype == torch.bfloat16


class CoreAttention(torch.nn.Module):
    """Megatron-Core's interface; `attention_mask` carries what `prepare` made of the micro-batch, once for all layers.

    Args:
        layer_number: of the whole model, from 1.
        softmax_scale: what scores are multiplied by; None: d ** -0.5.
        softcap: c in c * tanh(scores / c), after the scale.
    """

    name: str

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None,
        row_length: int,
        softcap: float | None,
        **_: Any,
    ):
        super().__init__()
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.row_length, self.softcap = row_length, softcap
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None  # tokens that a query sees; None: all before it

    @staticmethod
    def prevented(needs: Needs) -> str | None:
        """Why this attention cannot do what is needed; None: it can."""
        raise NotImplementedError

    @staticmethod
    def prepare(micro_batch: MicroBatch, window: int | None) -> Any:
        """What `attend` takes as `prepared`; `window` is that of the layers that have one."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor, prepared: Any, /) -> Tensor:
        """query [T, h, d], key and value [T, g, d] -> [T, h, d]."""
        raise NotImplementedError

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any) -> Tensor:
        """query [T, 1, h, d], key and value [T, 1, g, d] -> [T, 1, h * d]."""
        context = self.attend(query.squeeze(1), key.squeeze(1), value.squeeze(1), attention_mask)
        return context.reshape(len(query), 1, -1)


class _PackedAttention(CoreAttention):
    """Flash attention over the packed examples, which are told apart by where they end."""

    @staticmethod
    def prepare(micro_batch: MicroBatch, window: int | None) -> Tensor:
        """Ends of the examples, int32 [segments + 1]."""
        return micro_batch.cu_seqlens

    @property
    def window_size(self) -> tuple[int, int]:
        """(tokens seen before a query, after it), as both libraries count; -1: all."""
        return (-1 if self.window is None else self.window - 1), 0


class FlashAttention(_PackedAttention):
    """flash-attn's variable-length function, where it is installed."""

    name = "flash-attn"

    @staticmethod
    def prevented(needs: Needs) -> str | None:
        if not needs.tensor_cores:
            return "flash-attn needs CUDA and bf16"
        if (function := _flash_attn_function()) is None:
            return "flash-attn is not installed"
        if needs.softcap and "softcap" not in inspect.signature(function).parameters:
            return "flash-attn is older than 2.6 and has no softcap"
        return "flash-attn needs heads of at most 256" if needs.head_size > 256 else None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ends: Tensor) -> Tensor:
        longest = self.row_length  # an upper bound known on the host: no synchronisation
        capped = {} if self.softcap is None else {"softcap": self.softcap}
        function = _flash_attn_function()
        assert function is not None
        return function(
            *(query, key, value, ends, ends, longest, longest),
            dropout_p=0.0,
            softmax_scale=self.scale,
            causal=True,
            window_size=self.window_size,
            **capped,
        )


class VarlenAttention(_PackedAttention):
    """torch's variable-length flash attention."""

    name = "torch varlen_attn"

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        from torch.nn.attention.varlen import varlen_attn

        # From torch 2.12 on fewer key than query heads must be allowed explicitly; before, they simply may be fewer.
        grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        self.attention: Callable[..., Any] = partial(
            varlen_attn, scale=self.scale, window_size=self.window_size, **grouped
        )

    @staticmethod
    def prevented(needs: Needs) -> str | None:
        if not needs.tensor_cores:
            return "torch's varlen_attn needs CUDA and bf16"
        if needs.softcap:
            return "torch's varlen_attn has no softcap"
        too_odd = needs.head_size % 8 or needs.head_size > 256
        return "torch's varlen_attn needs heads of at most 256, in multiples of 8" if too_odd else None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ends: Tensor) -> Tensor:
        longest = self.row_length  # an upper bound known on the host: no synchronisation
        return self.attention(query, key, value, ends, ends, longest, longest)


class _RowAttention(CoreAttention):
    """Attention over the B rows, by one mask for the layers that see all and one for those with a window."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, masks: dict[int | None, Any]) -> Tensor:
        query, key, value = (x.unflatten(0, (-1, self.row_length)).transpose(1, 2) for x in (query, key, value))
        return self.attend_rows(query, key, value, masks[self.window]).transpose(1, 2).flatten(0, 1)

    def attend_rows(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        """query [B, h, S, d], key and value [B, g, S, d] -> [B, h, S, d]."""
        raise NotImplementedError


class FlexAttention(_RowAttention):
    """torch's flex_attention, compiled: blocks that no example and no window reaches cost nothing."""

    name = "torch flex_attention"

    @staticmethod
    def prevented(needs: Needs) -> str | None:
        if not needs.tensor_cores:
            return "torch's flex_attention is used for CUDA and bf16 only"
        if importlib.util.find_spec("triton") is None:
            return "torch's flex_attention needs Triton, which is not installed"
        return "torch's flex_attention needs heads of 16 or more" if needs.head_size < 16 else None

    @staticmethod
    def prepare(micro_batch: MicroBatch, window: int | None) -> dict[int | None, Any]:
        """{window: BlockMask [B, 1, S, S]}."""
        from torch.nn.attention.flex_attention import create_block_mask

        examples, length = example_numbers(micro_batch), micro_batch.row_length
        return {
            reach: create_block_mask(flex_mask(examples, reach), len(examples), None, length, length, examples.device)
            for reach in {None, window}
        }

    def attend_rows(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        capped = None if self.softcap is None else flex_softcap(self.softcap)
        attention = _flex_attention(compiled=query.is_cuda)
        return attention(query, key, value, capped, mask, scale=self.scale, enable_gqa=True)


class SdpaAttention(_RowAttention):
    """torch's scaled_dot_product_attention with a boolean mask."""

    name = "torch SDPA"

    @staticmethod
    def prevented(needs: Needs) -> str | None:
        return "torch's SDPA has no softcap" if needs.softcap else None

    @staticmethod
    def prepare(micro_batch: MicroBatch, window: int | None) -> dict[int | None, Tensor]:
        """{window: boolean [B, 1, S, S]: query q sees key k}."""
        examples = example_numbers(micro_batch)
        same_example = examples.unsqueeze(2) == examples.unsqueeze(1)
        causal = same_example.tril().unsqueeze(1)
        return {reach: causal if reach is None else causal.triu(1 - reach) for reach in {None, window}}

    def attend_rows(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale, enable_gqa=True)


class SoftcapAttention(SdpaAttention):
    """The scores written out, a row at a time, since SDPA caps none.

    Memory: some h * S * S numbers, of fp32 or wider, per row and layer are kept for the backward pass.
    """

    name = "written-out attention"

    @staticmethod
    def prevented(needs: Needs) -> str | None:
        return "attention with its scores written out is for fp32, fp64 and the CPU" if needs.tensor_cores else None

    def attend_rows(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        assert self.softcap is not None
        group = query.shape[1] // key.shape[1]  # query heads r * group .. share the key and value head r
        rows = zip(query.to(wide), key.to(wide), value.to(wide), mask, strict=True)
        context = []
        for q, k, v, seen in rows:
            k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
            scores = self.scale * (q @ k.transpose(1, 2))  # [h, S, S]
            scores = self.softcap * torch.tanh(scores / self.softcap)
            context.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
        return torch.stack(context).to(query.dtype)


def example_numbers(micro_batch: MicroBatch) -> Tensor:
    """[B, S]: which example, or padding tail, a position belongs to."""
    ends = micro_batch.cu_seqlens[1:].long()
    positions = torch.arange(len(micro_batch.tokens), device=ends.device)
    return torch.searchsorted(ends, positions, right=True).view(-1, micro_batch.row_length)


def flex_mask(examples: Tensor, window: int | None) -> Callable[..., Tensor]:
    """flex_attention's mask function: whether query q sees key k."""

    def seen(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        causal = (examples[row, q] == examples[row, k]) & (k <= q)
        return causal if window is None else causal & (q - k < window)

    return seen


@cache  # one function for all layers, so that one compilation serves them
def flex_softcap(softcap: float) -> Callable[..., Tensor]:
    """flex_attention's score function."""

    def capped(score: Tensor, row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


@cache
def _flash_attn_function() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


class AttentionChoice(NamedTuple):
    backend: type[CoreAttention] | None  # None: Transformer Engine's own
    line: str  # in words, for the log


PREFERENCE = (FlashAttention, VarlenAttention, FlexAttention, SdpaAttention, SoftcapAttention)


def choose_attention(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> AttentionChoice:
    """The core attention for a model, device and compute dtype: the first of `PREFERENCE` that can do it.

    Raises:
        UserError: none can.
    """
    shape = model.shape
    precision = str(dtype).removeprefix("torch.")
    asked = [f"heads of {shape.head_size}", f"{precision} on {device.type}"]
    if shape.attention_softcap is not None:
        asked.append(f"softcap {shape.attention_softcap:g}")
    if shape.sliding_window is not None:
        every = "every other" if FAMILIES[model.family].windowed_layers == "even" else "every"
        asked.append(f"a window of {shape.sliding_window} in {every} layer")
    if model.implementation == "te":
        return AttentionChoice(None, f"Transformer Engine ({', '.join(asked)})")
    needs = Needs(device.type, dtype, shape.head_size, shape.attention_softcap is not None)
    hindrances = []
    for backend in PREFERENCE:
        hindrance = backend.prevented(needs)
        if hindrance is None:
            return AttentionChoice(backend, f"{backend.name} ({', '.join(asked)})")
        hindrances.append(hindrance)
    raise UserError(
        f"model.family={model.family}: no attention is there for {', '.join(asked)}: {'; '.join(hindrances)};"
        " install flash-attn 2.6 or newer, or set precision.compute=fp32"
    )
