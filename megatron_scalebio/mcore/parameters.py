"""Parameters by global name: their full shapes, this rank's shards, and initial weights equal under every layout.

A global name is Megatron-Core's with the layer's number counted from the whole model's first layer. A block is what
LISA freezes and thaws as one: `layers.7`, or one of the three that are no decoder layer, `embedding`, `final_norm`,
`head`.
"""

import math
import zlib
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import Parameter

from megatron_scalebio.config import ShapeConfig
from megatron_scalebio.hf.mapping import LAYER_PREFIX
from megatron_scalebio.mcore.process_groups import ProcessGroups

# The dimension that tensor parallelism cuts; what is not listed is replicated.
SHARD_DIMS = {
    "word_embeddings.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
    "output_layer.weight": 0,
}

# Transformer Engine fuses the norms into the linear layers that follow them.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class NamedParameter:
    """One parameter of this rank: `tensor` is its shard of the full tensor, which has `shape`."""

    name: str
    tensor: Parameter
    shape: tuple[int, ...]
    shard_dim: int | None  # None: replicated over tensor parallelism
    duplicate: bool  # another rank's copy counts in global norms, not this one

    @property
    def block(self) -> str:
        if self.name.startswith(LAYER_PREFIX):
            return layer_block(int(self.name.split(".")[2]))
        return {"embedding": "embedding", "decoder": "final_norm", "output_layer": "head"}[self.name.split(".")[0]]


def layer_block(layer: int) -> str:
    """The block of a decoder layer, counted from 0 over the whole model."""
    return f"layers.{layer}"


def named_parameters(model: GPTModel, groups: ProcessGroups) -> list[NamedParameter]:
    """This rank's parameters of a model. The head of a tied model on a later stage is the embedding's duplicate."""
    first_layer = model.decoder.layers[0].layer_number - 1
    result = []
    for local_name, parameter in model.named_parameters():
        name = local_name
        if name.startswith(LAYER_PREFIX):
            local_layer, rest = name.removeprefix(LAYER_PREFIX).split(".", 1)
            name = f"{LAYER_PREFIX}{first_layer + int(local_layer)}.{FUSED_NORMS.get(rest, rest)}"
        shard_dim = SHARD_DIMS.get(".".join(name.split(".")[-2:]))
        shape = list(parameter.shape)
        if shard_dim is not None:
            shape[shard_dim] *= groups.tensor.size()
        tied_copy = model.share_embeddings_and_output_weights and name.startswith("output_layer.")
        result.append(
            NamedParameter(
                name=name,
                tensor=parameter,
                shape=tuple(shape),
                shard_dim=shard_dim,
                duplicate=tied_copy or (shard_dim is None and groups.tensor_rank > 0),
            )
        )
    return result


def shard(parameter: NamedParameter, full: Tensor, tensor_rank: int, tensor_size: int) -> Tensor:
    """The slice of a full tensor that a tensor-parallel rank holds.

    A SwiGLU's first matrix is [gate; up], and each rank holds a slice of both.
    """
    if parameter.shard_dim is None:
        return full
    parts = full.chunk(2) if parameter.name.endswith("linear_fc1.weight") else (full,)
    return torch.cat([part.chunk(tensor_size, parameter.shard_dim)[tensor_rank] for part in parts])


def random_shard(
    shape: ShapeConfig, seed: int, tensor_rank: int, tensor_size: int, parameter: NamedParameter
) -> Tensor:
    """A tensor-parallel rank's shard of a parameter's initial weights, as Megatron's: normal with deviation 0.02,
    projections into the residual stream scaled by 1 / sqrt(2 * num_layers), norms neutral, biases 0.

    The full tensor is a function of (seed, name) alone, in the parameter's dtype; fp64 runs begin at fp32's values. It
    is made on the CPU: a layer in FP8 that never trained is made anew wherever a checkpoint is loaded, and another
    device's generator would make another one.
    """
    name, dtype = parameter.name, parameter.tensor.dtype
    if name.endswith("norm.weight"):
        full = torch.full(parameter.shape, getattr(parameter.tensor, "neutral", 1.0), dtype=dtype)
    elif name.endswith(".bias"):
        full = torch.zeros(parameter.shape, dtype=dtype)
    else:
        if shape.tied_embeddings and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        deviation = 0.02 / math.sqrt(2 * shape.num_layers) if residual else 0.02
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        full = torch.randn(parameter.shape, generator=generator).mul_(deviation).to(dtype)
    return shard(parameter, full, tensor_rank, tensor_size)
