"""Which examples a step sees: under stratified and natural sampling a pure function of (seed, step), so that resuming
needs no state; under adaptive sampling of the seed and the weights so far, whose draws a checkpoint keeps.

K sources, B = bilevel.global_batch_size. A stream is an endless sequence of one pool's examples: a fresh permutation
per epoch. Where a step reads its streams is one number for each, so late steps cost no more than early ones.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_scalebio.config import Config, EvaluationSet, evaluation_sets
from megatron_scalebio.data.batch import MicroBatch, Rows, StepBatch
from megatron_scalebio.data.dataset import Dataset, Example
from megatron_scalebio.data.packing import build_micro_batch, plan_microbatches, rows_of
from megatron_scalebio.data.shares import AdaptiveShares, Share, draw_limits, shares_of_sets


class Sampler:
    """The batches of one data-parallel rank, for a configuration that `rules.check_config` accepts."""

    def __init__(self, dataset: Dataset, config: Config, data_parallel_rank: int, data_parallel_size: int) -> None:
        self._dataset = dataset
        self._data = config.data
        self._batch_size = config.bilevel.global_batch_size
        self._rank, self._size = data_parallel_rank, data_parallel_size
        seed, replacement = config.run.seed, config.data.replacement
        if config.data.sampling == "natural":
            pool = [example for source in dataset.train for example in source]
            self._streams = [_Stream(pool, f"{seed}/pooled", replacement)]
        else:
            self._streams = [
                _Stream(examples, f"{seed}/train/{name}", replacement)
                for name, examples in zip(dataset.source_names, dataset.train, strict=True)
            ]
        self._shares = _adaptive_shares(config, dataset) if config.data.sampling == "adaptive" else None
        sets = _sets("data.validation", config.data.validation, dataset.validation)
        several = len(sets) > 1
        self._validation = [
            _Stream(_of_set(dataset.validation, number), f"{seed}/validation" + (f"/{each.name}" if several else ""))
            for number, each in enumerate(sets)
        ]
        self._validation_weights = [each.weight for each in sets]
        size = config.bilevel.validation_batch_size
        self._validation_sizes = shares_of_sets(self._validation_weights, size) if sets else []
        self.test_weights = [each.weight for each in _sets("data.test", config.data.test, dataset.test)]

    def step(self, step: int, weights: Sequence[float] = ()) -> StepBatch:
        """The batch of `step`, counted from 1. num_tokens counts input positions: n - 1 for an example of n tokens.

        Args:
            weights: [K] of the sources before the step, for adaptive sampling, whose steps are drawn one after another.
        """
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        share = self._share(step, weights)
        train = self._train_examples(share)
        sets = zip(self._validation, self._validation_sizes, strict=True)
        validation = [each for stream, size in sets for each in stream.take((step - 1) * size, step * size)]
        num_examples, num_loss_tokens = _counts(train, len(self._dataset.train))
        of_sets = _counts(validation, len(self._validation))
        return StepBatch(
            train=self._microbatches(train),
            validation=self._microbatches(validation),
            num_examples=num_examples,
            num_loss_tokens=num_loss_tokens,
            scale=share.scale,
            kept=share.kept,
            validation_weights=self._validation_weights,
            num_validation_examples=of_sets[0],
            num_validation_loss_tokens=of_sets[1],
            num_tokens=sum(example.num_positions for example in [*train, *validation]),
            train_rows=self._rows(train),
            validation_rows=self._rows(validation),
        )

    def test_batch(self) -> tuple[list[MicroBatch], tuple[list[int], list[int]]]:
        """This rank's micro-batches of all test examples; of each set, its examples and tokens that carry loss."""
        test = self._dataset.test
        return self._microbatches(test), _counts(test, len(self.test_weights))

    def state_dict(self) -> dict[str, Any] | None:
        """What later steps depend on beside the settings; None if nothing does."""
        return None if self._shares is None else self._shares.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if self._shares is not None and state is not None:
            self._shares.load_state_dict(state)

    def _share(self, step: int, weights: Sequence[float]) -> Share:
        if self._shares is None:
            return self._equal_share(step)
        if step != self._shares.num_batches + 1:
            raise ValueError(f"step {step} follows {self._shares.num_batches} batches: adaptive draws go in order")
        return self._shares.next(list(weights))

    def _train_examples(self, share: Share) -> list[Example]:
        spans = zip(self._streams, share.start, share.num_examples, strict=True)
        return [example for stream, start, count in spans for example in stream.take(start, start + count)]

    def _equal_share(self, step: int) -> Share:
        """Of the streams each gives as many examples; the remainder goes round, one after the other."""
        num_streams, num_sources = len(self._streams), len(self._dataset.train)
        share, remainder = divmod(self._batch_size, num_streams)

        def drawn(index: int, steps: int) -> int:
            # Extras go to streams 0, 1, .., 0, .. in turn: by step t stream i of n has ceil((t * remainder - i) / n).
            return steps * share + -((index - steps * remainder) // num_streams)

        starts, stops = ([drawn(index, steps) for index in range(num_streams)] for steps in (step - 1, step))
        counts = [stop - start for start, stop in zip(starts, stops, strict=True)]
        return Share(starts, counts, [1.0] * num_sources, [1.0] * num_sources)

    def _microbatches(self, examples: list[Example]) -> list[MicroBatch]:
        data = self._data
        lengths = [example.num_positions for example in examples]
        plan = plan_microbatches(lengths, data.max_length, data.packing, data.micro_batch_size, self._rank, self._size)
        pad_id = self._dataset.tokenizer.pad_id
        return [
            build_micro_batch(
                [[examples[i] for i in row] for row in rows], data.max_length, data.micro_batch_size, pad_id
            )
            for rows in plan
        ]

    def _rows(self, examples: list[Example]) -> Rows:
        data, lengths = self._data, [example.num_positions for example in examples]
        return rows_of(lengths, data.max_length, data.packing, data.micro_batch_size, self._size)


def _counts(examples: list[Example], num_sources: int) -> tuple[list[int], list[int]]:
    """Of each source, or set: examples, and tokens that carry loss."""
    ids = np.array([example.source_id for example in examples], dtype=np.int64)
    loss_tokens = np.bincount(ids, [example.num_loss_tokens for example in examples], num_sources)
    return np.bincount(ids, minlength=num_sources).tolist(), loss_tokens.astype(int).tolist()


def _sets(key: str, value: Any, examples: list[Example]) -> list[EvaluationSet]:
    """The sets that the examples are of. A dataset made in memory may have some that no setting names: one set."""
    return (evaluation_sets(key, value) or evaluation_sets(key, "")) if examples else []


def _of_set(examples: list[Example], number: int) -> list[Example]:
    return [example for example in examples if example.source_id == number]


def _adaptive_shares(config: Config, dataset: Dataset) -> AdaptiveShares:
    """While the weights are learned every source must be measured; where they are given, they alone decide."""
    learns, bilevel = config.bilevel.mode == "bilevel", config.bilevel
    return AdaptiveShares(
        len(dataset.train),
        bilevel.global_batch_size,
        config.data.exploration if learns else 0.0,
        at_least_one=learns,
        limits=draw_limits(config, [len(examples) for examples in dataset.train]),
        num_batches=bilevel.steps,
    )


class _Stream:
    """Examples of one pool, in an order that depends on nothing but `key` and the pool's size."""

    def __init__(self, examples: list[Example], key: str, replacement: bool = False) -> None:
        self._examples, self._key, self._replacement = examples, key, replacement
        self._order = lru_cache(maxsize=2)(self._draw_order)  # a batch may lie across two epochs

    def take(self, start: int, stop: int) -> list[Example]:
        """Examples `start` up to, not including, `stop` of the endless sequence."""
        size = len(self._examples)
        return [self._examples[self._order(index // size)[index % size]] for index in range(start, stop)]

    def _draw_order(self, epoch: int) -> np.ndarray:
        """A permutation, or as many independent draws. Raw 64-bit draws are sorted, or taken by their remainder: numpy
        keeps a bit generator's raw stream the same for ever, its shuffles not."""
        seed, size = hashlib.sha256(f"{self._key}/{epoch}".encode()).digest(), len(self._examples)
        raw = np.random.PCG64(int.from_bytes(seed, "little")).random_raw(size)
        return raw % np.uint64(size) if self._replacement else np.argsort(raw, kind="stable")
