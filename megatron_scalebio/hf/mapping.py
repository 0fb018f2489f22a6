"""A checkpoint's tensors and ours: which there must be, and one parameter at a time, in or out."""

import torch
from torch import Tensor

from megatron_scalebio.anatomy import FAMILIES
from megatron_scalebio.anatomy.decoder import EMBEDDING, HEAD
from megatron_scalebio.anatomy.parameters import sizes_of
from megatron_scalebio.anatomy.tensors import parts_of, shard_of_parts
from megatron_scalebio.config import ModelConfig, UserError
from megatron_scalebio.hf.checkpoint import Checkpoint, listed

# Buffers that old checkpoints carry: computed from config.json, never trained.
_IGNORED = ("rotary_emb.inv_freq",)


def expected_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{their name: shape} of a whole checkpoint."""
    family, sizes = FAMILIES[model.family], sizes_of(model.shape)
    return {
        theirs: part.shape(sizes)
        for name, (_, parameter) in family.parameters(model.shape).items()
        for theirs, part in zip(family.their_names(model.shape, name), parameter.parts, strict=True)
    }


def check_names(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """The checkpoint has this model's tensors in their shapes, and no others.

    Raises: UserError listing what is missing, surplus or misshapen.
    """
    expected = expected_tensors(model)
    allowed, tied = dict(expected), model.shape.tied_embeddings
    embedding, head = (parameter.parts[0].name for parameter in (EMBEDDING, HEAD))
    if tied:  # some programs write the tied head, too
        allowed[head] = allowed[embedding]
    present = {name: size for name, (size, _) in checkpoint.tensors.items() if not name.endswith(_IGNORED)}
    missing = [name for name in expected if name not in present]
    surplus = [name for name in present if name not in allowed]
    misshapen = [
        f"{name} is {list(present[name])} instead of {list(allowed[name])}"
        for name in present
        if name in allowed and present[name] != allowed[name]
    ]
    found = [
        f"{kind}: {listed(names)}"
        for kind, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen))
        if names
    ]
    if found:
        problem = f"its tensors are not those of a {model.family} model of its config.json"
        raise UserError(f"{checkpoint.folder}: {problem}; {'; '.join(found)}")
    if tied and head in present and not torch.equal(checkpoint.view(head), checkpoint.view(embedding)):
        raise UserError(
            f"{checkpoint.folder}: {head} differs from {embedding}, although config.json says"
            " tie_word_embeddings=true: set it to false, or remove the tensor"
        )


def read_shard(checkpoint: Checkpoint, model: ModelConfig, name: str, tensor_rank: int, tensor_size: int) -> Tensor:
    """A tensor-parallel rank's shard of the parameter of a global name, in the checkpoint's dtype.

    Only the slices that the shard consists of are read; the result is all the memory that it takes. The checkpoint
    must have passed `check_names`, and `tensor_size` divide what it cuts.
    """
    family = FAMILIES[model.family]
    _, parameter = family.find(name)
    parts = [checkpoint.view(theirs) for theirs in family.their_names(model.shape, name)]
    return shard_of_parts(parameter, parts, model.shape, tensor_rank, tensor_size)


def to_theirs(model: ModelConfig, name: str, full: Tensor) -> dict[str, Tensor]:
    """{their name: tensor} of our full parameter `name`, without padding; nothing for a tied head. Views at times."""
    if name == HEAD.name and model.shape.tied_embeddings:
        return {}
    family = FAMILIES[model.family]
    _, parameter = family.find(name)
    return dict(zip(family.their_names(model.shape, name), parts_of(parameter, full, model.shape), strict=True))
