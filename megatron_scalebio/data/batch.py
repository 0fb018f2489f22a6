"""What one step hands to the models: rows of packed examples as flat micro-batches.

Shapes: B rows of S positions flattened batch-major to T = B * S; N positions that carry loss; K sources.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """B rows of S positions. An example of n tokens fills n - 1 positions: inputs tokens[:-1], targets tokens[1:].

    The loss needs only the N positions whose target carries loss, so those are listed instead of masked.
    All tensors are on the CPU as built, int64 unless said otherwise.
    """

    tokens: Tensor  # [T] input ids; padding where no example lies
    cu_seqlens: Tensor  # [segments + 1] int32: 0, then the ends of examples and padding tails in the flat T
    row_length: int  # S
    loss_positions: Tensor  # [N] ascending, into T
    targets: Tensor  # [N] the token after each loss position
    source_ids: Tensor  # [N] source of the example; of validation and test, its set
    example_loss_tokens: Tensor  # [N] t_e: tokens that carry loss in the position's whole example


@dataclass(frozen=True)
class Rows:
    """What the rows of all data-parallel ranks hold, in positions."""

    examples: list[int]  # n - 1 of each example of n tokens
    padding: list[int]  # what each row ends with; of an empty row all of it

    @property
    def num_positions(self) -> int:
        return sum(self.examples) + sum(self.padding)


@dataclass(frozen=True)
class StepBatch:
    """One data-parallel rank's share of one step, and the global counts every rank knows without communication."""

    train: list[MicroBatch]  # this rank's; as many on every rank
    validation: list[MicroBatch]  # this rank's; as many on every rank; empty when bilevel.mode is fixed
    num_examples: list[int]  # [K] n_i: training examples of each source in the global batch (usable: t_e > 0)
    num_loss_tokens: list[int]  # [K] training tokens that carry loss, per source, in the global batch
    scale: list[float]  # [K] what a source's mean loss counts for: 1, unless sources take turns (see shares.py)
    kept: list[float]  # [K] share of its weight that data.max_epochs leaves a source; the others take what it loses
    validation_weights: list[float]  # of each validation set; they add up to one
    num_validation_examples: list[int]  # of each validation set, global
    num_validation_loss_tokens: list[int]  # of each validation set, global
    num_tokens: int  # global, train and validation each counted once, padding excluded
    train_rows: Rows  # global
    validation_rows: Rows  # global
