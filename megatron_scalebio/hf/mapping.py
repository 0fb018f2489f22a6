"""Parameters under two names: ours (Megatron-Core's global names) and theirs (transformers').

The one place that knows how the two layouts differ: grouped query-key-value rows, gate above up, padded vocabulary.
Rows of linear_qkv are, for each of G query groups, its R query heads, its key head and its value head, D rows each.

Shapes: D head size, F feed-forward, G query groups, H hidden, R query heads per group, V vocabulary.
"""

import torch
from torch import Tensor

from megatron_scalebio.config import ShapeConfig, UserError, padded_vocab_size
from megatron_scalebio.hf import gemma2, llama3, qwen2
from megatron_scalebio.hf.checkpoint import Checkpoint, listed

LAYER_NAMES = {"qwen2": qwen2.LAYER_NAMES, "llama3": llama3.LAYER_NAMES, "gemma2": gemma2.LAYER_NAMES}

LAYER_PREFIX = "decoder.layers."
EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
HEAD = "output_layer.weight"

_OUTER_NAMES = {EMBEDDING: "model.embed_tokens.weight", FINAL_NORM: "model.norm.weight", HEAD: "lm_head.weight"}

_QKV = ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias")
_GATE_UP = "mlp.linear_fc1.weight"
_CUT_COLUMNS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")

# Buffers that old checkpoints carry: computed from config.json, never trained.
_IGNORED = ("rotary_emb.inv_freq",)


def our_names(family: str, shape: ShapeConfig) -> list[str]:
    """Every parameter of a model in its order; a tied model's head is its embedding, and has no name of its own."""
    layers = [f"{LAYER_PREFIX}{layer}.{name}" for layer in range(shape.num_layers) for name in LAYER_NAMES[family]]
    return [EMBEDDING, *layers, FINAL_NORM, *([] if shape.tied_embeddings else [HEAD])]


def expected_tensors(family: str, shape: ShapeConfig) -> dict[str, tuple[int, ...]]:
    """{their name: shape} of a whole checkpoint; `shape.vocab_size` must be known."""
    return {
        theirs: size
        for name in our_names(family, shape)
        for theirs, size in zip(their_names(family, shape, name), _their_shapes(shape, name), strict=True)
    }


def check_names(checkpoint: Checkpoint, family: str, shape: ShapeConfig) -> None:
    """The checkpoint has this model's tensors in their shapes, and no others.

    Raises: UserError listing what is missing, surplus or misshapen.
    """
    expected = expected_tensors(family, shape)
    allowed = dict(expected)
    if shape.tied_embeddings:  # some programs write the tied head, too
        allowed[_OUTER_NAMES[HEAD]] = allowed[_OUTER_NAMES[EMBEDDING]]
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
        problem = f"its tensors are not those of a {family} model of its config.json"
        raise UserError(f"{checkpoint.folder}: {problem}; {'; '.join(found)}")
    if shape.tied_embeddings and _OUTER_NAMES[HEAD] in present:
        head, embedding = (checkpoint.view(_OUTER_NAMES[name]) for name in (HEAD, EMBEDDING))
        if not torch.equal(head, embedding):
            raise UserError(
                f"{checkpoint.folder}: lm_head.weight differs from model.embed_tokens.weight, although config.json says"
                " tie_word_embeddings=true: set it to false, or remove the tensor"
            )


def their_names(family: str, shape: ShapeConfig, name: str) -> tuple[str, ...]:
    """Where transformers keeps our parameter `name`, in the order of its parts."""
    if name.startswith(LAYER_PREFIX):
        layer, _, rest = name.removeprefix(LAYER_PREFIX).partition(".")
        return tuple(f"model.layers.{layer}.{theirs}" for theirs in LAYER_NAMES[family][rest])
    return (_OUTER_NAMES[EMBEDDING if name == HEAD and shape.tied_embeddings else name],)


def read_shard(
    checkpoint: Checkpoint, family: str, shape: ShapeConfig, name: str, tensor_rank: int, tensor_size: int
) -> Tensor:
    """A tensor-parallel rank's shard of our parameter `name`, in the checkpoint's dtype.

    Only the slices that the shard consists of are read; the result is all the memory that it takes. The checkpoint
    must have passed `check_names`, and `tensor_size` divide what it cuts.
    """

    def cut(part: Tensor, dim: int = 0) -> Tensor:
        return part.unflatten(dim, (tensor_size, -1)).select(dim, tensor_rank)

    parts = [checkpoint.view(theirs) for theirs in their_names(family, shape, name)]
    if name.endswith(_QKV):
        groups = [cut(part.unflatten(0, (shape.num_query_groups, -1))) for part in parts]  # [G_local, rows, H]
        return torch.cat(groups, dim=1).flatten(0, 1)
    if name.endswith(_GATE_UP):
        return torch.cat([cut(part) for part in parts])
    (part,) = parts
    if name in (EMBEDDING, HEAD):
        rows = padded_vocab_size(part.shape[0]) // tensor_size
        shard = part.new_zeros(rows, part.shape[1])
        real = part[tensor_rank * rows : (tensor_rank + 1) * rows]
        shard[: len(real)] = real
        return shard
    return cut(part, dim=1).clone() if name.endswith(_CUT_COLUMNS) else part.clone()


def join_shards(name: str, shards: list[Tensor]) -> Tensor:
    """Our full parameter from the shards of all tensor-parallel ranks: what `read_shard` cut."""
    if name.endswith(_GATE_UP):
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])
    if name.endswith(_CUT_COLUMNS):
        return torch.cat(shards, dim=1)
    return torch.cat(shards) if name.endswith(_QKV) or name in (EMBEDDING, HEAD) else shards[0]


def to_theirs(family: str, shape: ShapeConfig, name: str, full: Tensor) -> dict[str, Tensor]:
    """{their name: tensor} of our full parameter `name`, without padding; nothing for a tied head. Views at times."""
    if name == HEAD and shape.tied_embeddings:
        return {}
    if name.endswith(_QKV):
        groups, sizes = shape.num_query_groups, _their_shapes(shape, name)
        by_group = full.unflatten(0, (groups, -1)).split([size[0] // groups for size in sizes], dim=1)
        parts = tuple(part.flatten(0, 1) for part in by_group)
    elif name.endswith(_GATE_UP):
        parts = full.chunk(2)
    else:
        parts = (full[: shape.vocab_size] if name in (EMBEDDING, HEAD) else full,)
    return dict(zip(their_names(family, shape, name), parts, strict=True))


def _their_shapes(shape: ShapeConfig, name: str) -> tuple[tuple[int, ...], ...]:
    """The shapes of the tensors that our parameter `name` consists of."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    head_size = shape.head_size or hidden // shape.num_attention_heads
    queries, keys = shape.num_attention_heads * head_size, shape.num_query_groups * head_size
    if name in (EMBEDDING, HEAD):
        return ((shape.vocab_size, hidden),)
    rest = name.removeprefix(LAYER_PREFIX).partition(".")[2]
    return {
        "self_attention.linear_qkv.weight": ((queries, hidden), (keys, hidden), (keys, hidden)),
        "self_attention.linear_qkv.bias": ((queries,), (keys,), (keys,)),
        "self_attention.linear_proj.weight": ((hidden, queries),),
        "mlp.linear_fc1.weight": ((ffn, hidden), (ffn, hidden)),
        "mlp.linear_fc2.weight": ((hidden, ffn),),
    }.get(rest, ((hidden,),))  # what is left is a norm
