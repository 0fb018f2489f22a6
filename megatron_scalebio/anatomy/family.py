"""What a model family is: the parameters of its layer, its formulas, and its config.json both ways."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_scalebio.anatomy.decoder import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    KEY_NORM,
    LAYER_PREFIX,
    OUTER_BLOCKS,
    POST_ATTENTION_NORM,
    QKV_BIAS,
    THEIR_LAYER_PREFIX,
    layer_block,
)
from megatron_scalebio.anatomy.parameters import Parameter
from megatron_scalebio.config import ShapeConfig


@dataclass(frozen=True)
class Family:
    """One file of `families` declares one.

    Attributes:
        name: of `model.family`.
        members: the models that it reads, in words.
        model_type, architecture: as config.json names them.
        layer: the parameters of a decoder layer.
        read: the shape that a config.json describes. Raises: UserError, naming every field that is missing, unknown, or
            set to what is not computed here.
        write: the family's own fields of a config.json that transformers loads.
        options: the settings of `model.shape` that not every family has a formula for, and this one has.
        activation: of the gate.
        zero_centered_norms: a norm multiplies by 1 + weight.
        scaled_embedding: the embedding's output is multiplied by sqrt(hidden_size).
        always_tied: the head is the embedding.
        windowed_layers: which layers see the last `sliding_window` tokens only, where that is set: those with an even
            number, counted from 0, or all.
        harmless: fields of config.json that change nothing, beside those of every family.
    """

    name: str
    members: str
    model_type: str
    architecture: str
    layer: tuple[Parameter, ...]
    read: Callable[[dict[str, Any]], ShapeConfig]
    write: Callable[[ShapeConfig], dict[str, Any]]
    options: frozenset[str] = frozenset()
    activation: Literal["silu", "gelu_tanh"] = "silu"
    zero_centered_norms: bool = False
    scaled_embedding: bool = False
    always_tied: bool = False
    windowed_layers: Literal["even", "all"] = "all"
    harmless: tuple[str, ...] = ()

    @property
    def qkv_bias(self) -> bool:
        return self._has(QKV_BIAS)

    @property
    def head_norms(self) -> bool:
        """Whether each query and key head is normed, before the rotation."""
        return self._has(KEY_NORM)

    @property
    def post_norms(self) -> bool:
        """Whether attention and MLP end in a norm, before they are added to the residual stream."""
        return self._has(POST_ATTENTION_NORM)

    def _has(self, parameter: Parameter) -> bool:
        return any(own.name == parameter.name for own in self.layer)

    def has_window(self, shape: ShapeConfig, layer: int) -> bool:
        """Whether a layer, counted from 0, sees the last `sliding_window` tokens only."""
        return shape.sliding_window is not None and (self.windowed_layers == "all" or layer % 2 == 0)

    def parameters(self, shape: ShapeConfig) -> dict[str, tuple[str, Parameter]]:
        """{global name: (block, declaration)} of a whole model, in its order. A global name is Megatron-Core's with the
        layer's number counted from the model's first layer. A tied model's head is its embedding, and has no name of
        its own."""
        layers = {
            f"{LAYER_PREFIX}{layer}.{parameter.name}": (layer_block(layer), parameter)
            for layer in range(shape.num_layers)
            for parameter in self.layer
        }
        head = {} if shape.tied_embeddings else {HEAD.name: ("head", HEAD)}
        first, last = {EMBEDDING.name: ("embedding", EMBEDDING)}, {FINAL_NORM.name: ("final_norm", FINAL_NORM)}
        return first | layers | last | head

    def find(self, name: str) -> tuple[str, Parameter]:
        """(block, declaration) of a global name, a tied head's among them. Raises: KeyError."""
        if not name.startswith(LAYER_PREFIX):
            return {outer.name: (block, outer) for block, outer in OUTER_BLOCKS.items()}[name]
        layer, _, local = name.removeprefix(LAYER_PREFIX).partition(".")
        return layer_block(int(layer)), self.in_layer(local)

    def in_layer(self, name: str) -> Parameter:
        """A layer's parameter of a name, Megatron-Core's or Transformer Engine's. Raises: KeyError."""
        names = {parameter.name: parameter for parameter in self.layer}
        names |= {parameter.fused_name: parameter for parameter in self.layer if parameter.fused_name}
        return names[name]

    def their_names(self, shape: ShapeConfig, name: str) -> tuple[str, ...]:
        """Where transformers keeps the parameter of a global name, in the order of its parts."""
        if name == HEAD.name and shape.tied_embeddings:
            name = EMBEDDING.name
        _, parameter = self.find(name)
        layer = name.removeprefix(LAYER_PREFIX).partition(".")[0]
        prefix = f"{THEIR_LAYER_PREFIX}{layer}." if name.startswith(LAYER_PREFIX) else ""
        return tuple(prefix + part.name for part in parameter.parts)
