"""How a parameter is declared: once, as data, for all who read, cut, store, count or export it.

A parameter has a name of Megatron-Core's and consists of tensors of transformers'. Its dimensions have names, whose
sizes are the model's (`dimensions`). What cutting and joining mean for numbers is in `tensors`.

Shapes: D head size, F feed-forward, G query groups, H hidden, R query heads per group, V vocabulary.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from megatron_scalebio.config import ShapeConfig


class Cut(Enum):
    """How tensor parallelism cuts a parameter, and how its parts lie in it."""

    NONE = "every rank holds the whole"
    COLUMNS = "each rank holds a range of columns"
    GROUPS = "for each query group its R query heads, its key head and its value head; each rank holds some groups"
    HALVES = "parts above each other; each rank holds a range of rows of each"
    VOCABULARY = "rows padded to a multiple of 128, of which each rank holds a range"

    @property
    def dim(self) -> int | None:
        """The dimension that is cut; None: none."""
        return {Cut.NONE: None, Cut.COLUMNS: 1}.get(self, 0)


class Initial(Enum):
    """What random weights begin at."""

    NORMAL = "normal, deviation 0.02"
    RESIDUAL = "normal, deviation 0.02 / sqrt(2 * num_layers): projections into the residual stream"
    NEUTRAL = "a norm that multiplies by one"
    ZERO = "zero"


class Sizes(NamedTuple):
    """The sizes of a model's named dimensions."""

    hidden: int
    ffn: int
    head: int  # of one attention head
    queries: int  # of all query heads together
    keys: int  # of all key heads together, and of all value heads
    vocabulary: int  # without padding


@dataclass(frozen=True)
class Part:
    """One of transformers' tensors: its name, in a decoder layer or in the whole model, and its named dimensions."""

    name: str
    dims: tuple[str, ...]  # fields of `Sizes`

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(getattr(sizes, dim) for dim in self.dims)


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter of a block.

    Attributes:
        name: Megatron-Core's, in its decoder layer or in the whole model.
        parts: what transformers keeps it in, in the order in which they lie in it.
        fused_name: where Transformer Engine's modules keep it, if elsewhere.
        sums_over_heads: whole on every rank, and yet a rank's gradient of it is that of the rank's heads alone.
    """

    name: str
    parts: tuple[Part, ...]
    cut: Cut = Cut.NONE
    initial: Initial = Initial.NORMAL
    fused_name: str | None = None
    sums_over_heads: bool = False

    @property
    def is_matrix(self) -> bool:
        """Matrices are decayed, and are what FP8 holds; norms and biases are neither."""
        return len(self.parts[0].dims) == 2

    def shape(self, shape: ShapeConfig, tensor: int = 1) -> tuple[int, ...]:
        """Of the whole parameter, padding included, or of the shard of one of `tensor` tensor-parallel ranks."""
        return shape_of(self, sizes_of(shape), tensor)

    def numel(self, shape: ShapeConfig, tensor: int = 1) -> int:
        """Numbers of the whole parameter or of one rank's shard, padding included."""
        return math.prod(self.shape(shape, tensor))


def shape_of(parameter: Parameter, sizes: Sizes, tensor: int) -> tuple[int, ...]:
    """See `Parameter.shape`."""
    parts = [part.shape(sizes) for part in parameter.parts]
    rows, *columns = sum(part[0] for part in parts), *parts[0][1:]
    size = [padded_vocab_size(rows) if parameter.cut is Cut.VOCABULARY else rows, *columns]
    if parameter.cut.dim is not None:
        size[parameter.cut.dim] //= tensor
    return tuple(size)


def sizes_of(shape: ShapeConfig) -> Sizes:
    size = head_size(shape)
    return Sizes(
        hidden=shape.hidden_size,
        ffn=shape.ffn_hidden_size,
        head=size,
        queries=shape.num_attention_heads * size,
        keys=shape.num_query_groups * size,
        vocabulary=shape.vocab_size,
    )


def head_size(shape: ShapeConfig) -> int:
    """Numbers of one attention head."""
    return shape.head_size or shape.hidden_size // shape.num_attention_heads


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding and the head: the next multiple of 128, so that any usual tensor parallelism divides it.

    The padding rows are never a target and are masked out of the softmax.
    """
    return -(-vocab_size // 128) * 128
