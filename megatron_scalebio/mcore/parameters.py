"""A rank's parameters by global name, each with its declaration, and initial weights equal under every layout."""

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_scalebio.anatomy import Family, Initial, Parameter
from megatron_scalebio.anatomy.decoder import EMBEDDING, HEAD, LAYER_PREFIX
from megatron_scalebio.anatomy.storage import Counting, Item
from megatron_scalebio.anatomy.tensors import shard
from megatron_scalebio.config import ShapeConfig
from megatron_scalebio.mcore.process_groups import ProcessGroups

if TYPE_CHECKING:
    from megatron_scalebio.kernels.fp8 import BlockScaled

    class Weights(torch.nn.Parameter):
        """torch's, and what is put on it: by Megatron-Core's layers, by ours, and while it trains or is quantized."""

        sequence_parallel: bool
        neutral: float  # where an initial weight of a norm begins
        main_grad: Tensor
        quantized: BlockScaled | None
else:
    from torch.nn import Parameter as Weights


@dataclass(frozen=True)
class NamedParameter:
    """One parameter of this rank: `tensor` is its shard of the full tensor, which has `shape`."""

    name: str
    block: str
    declared: Parameter
    tensor: Weights
    shape: tuple[int, ...]
    duplicate: bool  # another rank's copy counts in global norms, not this one

    @property
    def item(self) -> Item:
        """What its place in a flat block depends on."""
        replicated = self.declared.cut.dim is None
        counting = Counting(replicated, self.declared.sums_over_heads, self.duplicate)
        return Item(self.tensor.numel(), self.declared.is_matrix, counting)


def named_parameters(model: GPTModel, family: Family, groups: ProcessGroups) -> list[NamedParameter]:
    """This rank's parameters of a model. The head of a tied model on a later stage is the embedding's duplicate."""
    first_layer = model.decoder.layers[0].layer_number - 1
    result = []
    for local_name, tensor in model.named_parameters():
        name = local_name
        if name.startswith(LAYER_PREFIX):
            local_layer, rest = name.removeprefix(LAYER_PREFIX).split(".", 1)
            name = f"{LAYER_PREFIX}{first_layer + int(local_layer)}.{family.in_layer(rest).name}"
        block, declared = family.find(name)
        shape = list(tensor.shape)
        if declared.cut.dim is not None:
            shape[declared.cut.dim] *= groups.tensor.size()
        tied_copy = model.share_embeddings_and_output_weights and declared is HEAD
        duplicate = tied_copy or (declared.cut.dim is None and groups.tensor_rank > 0)
        result.append(NamedParameter(name, block, declared, tensor, tuple(shape), duplicate))
    return result


def random_shard(
    shape: ShapeConfig, seed: int, tensor_rank: int, tensor_size: int, parameter: NamedParameter
) -> Tensor:
    """A tensor-parallel rank's shard of a parameter's initial weights, as Megatron's: see `anatomy.Initial`.

    The full tensor is a function of (seed, name) alone, in the parameter's dtype; fp64 runs begin at fp32's values. It
    is made on the CPU: a layer in FP8 that never trained is made anew wherever a checkpoint is loaded, and another
    device's generator would make another one.
    """
    name, dtype, initial = parameter.name, parameter.tensor.dtype, parameter.declared.initial
    if initial is Initial.NEUTRAL:
        full = torch.full(parameter.shape, getattr(parameter.tensor, "neutral", 1.0), dtype=dtype)
    elif initial is Initial.ZERO:
        full = torch.zeros(parameter.shape, dtype=dtype)
    else:
        if shape.tied_embeddings and parameter.declared is HEAD:
            name = EMBEDDING.name
        deviation = 0.02 / math.sqrt(2 * shape.num_layers) if initial is Initial.RESIDUAL else 0.02
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        full = torch.randn(parameter.shape, generator=generator).mul_(deviation).to(dtype)
    return shard(parameter.declared, full, tensor_rank, tensor_size)
