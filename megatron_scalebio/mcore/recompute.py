"""Decoder layers that keep little of the forward pass, and compute it again when the backward pass asks for it.

    none        a layer keeps what its backward pass needs
    selective   its norm before the MLP, and the MLP, are computed again from what enters them
    full        the layer is computed again from what enters it

Megatron-Core's full recomputation calls autograd inside autograd (a reentrant checkpoint): where nothing that enters a
stage needs a gradient, as over a frozen embedding, it drops the gradients of the layers that train, without an error.
Its selective recomputation of the MLP needs Transformer Engine. torch's other checkpoint has neither limit: it replaces
each tensor that autograd would have kept. So a layer for which no gradient is computed keeps nothing and is never
computed again, and the gradients are those without recomputation, bit for bit.

Shapes: T tokens of a micro-batch (T / TP under sequence parallelism), H hidden, F feed-forward of this rank.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megatron_scalebio.mcore.linear import RowLinear

# Nothing in a layer is random: no state of a generator is kept for the second time.
_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class _RecomputedLayer(TransformerLayer):
    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Tensor:
        """Without Megatron-Core's manager of offloaded activations, which the layer remembers to its end: recomputation
        stops before, and what it computed, some 0.4 GB a layer of Qwen-2.5-32B at 4,096 tokens, would stay."""
        return self.pre_mlp_layernorm(hidden_states)


class FullyRecomputedLayer(_RecomputedLayer):
    """A decoder layer that keeps its input."""

    def forward(self, hidden_states: Tensor, **keywords: Any) -> tuple[Tensor, None]:
        """[T, 1, H] -> [T, 1, H], and no context."""
        if not torch.is_grad_enabled():
            return super().forward(hidden_states, **keywords)
        return _checkpoint(super().forward, hidden_states, **keywords)


class SelectivelyRecomputedLayer(_RecomputedLayer):
    """A decoder layer that keeps what its attention needs, and what enters the MLP's norm."""

    def _forward_mlp(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """[T, 1, H] -> [T, 1, H]: norm, MLP, and the addition to the residual stream."""
        if not torch.is_grad_enabled():
            return super()._forward_mlp(hidden_states, *arguments, **keywords)
        return _checkpoint(super()._forward_mlp, hidden_states, *arguments, **keywords)


class LastLinear(RowLinear):
    """A layer's last matrix. Recomputation ends with the last tensor that was kept. A frozen weight, which is there
    anyway, must not be that tensor: it would come after its product, some 0.3 of the layer's, which no one needs."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, 1, F] -> [T, 1, H]"""
        if self.weight.requires_grad:
            return super().forward(input_)
        with saved_tensors_hooks(_itself, _itself):  # the innermost hooks count: the checkpoint sees nothing
            return super().forward(input_)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


LAYERS = {"none": TransformerLayer, "selective": SelectivelyRecomputedLayer, "full": FullyRecomputedLayer}
