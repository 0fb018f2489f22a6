"""The anatomy of models: what parameters a family has, declared once; all else derives from it."""

from megatron_scalebio.anatomy.families import FAMILIES
from megatron_scalebio.anatomy.family import Family
from megatron_scalebio.anatomy.parameters import Cut, Initial, Parameter, Part, head_size, padded_vocab_size

__all__ = ["FAMILIES", "Cut", "Family", "Initial", "Parameter", "Part", "head_size", "padded_vocab_size"]
