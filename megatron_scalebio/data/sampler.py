"""Which examples a step sees: a pure function of (seed, step), so that resuming needs no state.

K sources, B = bilevel.global_batch_size. A stream is an endless sequence of one pool's examples: a fresh permutation
per epoch. Where step t reads its streams has a closed form, so late steps cost no more than early ones.
"""

import hashlib
from functools import lru_cache

import numpy as np

from megatron_scalebio.config import Config
from megatron_scalebio.data.batch import MicroBatch, Rows, StepBatch
from megatron_scalebio.data.dataset import Dataset, Example
from megatron_scalebio.data.packing import build_micro_batch, plan_microbatches, rows_of


class Sampler:
    """The batches of one data-parallel rank, for a configuration that `rules.check_config` accepts."""

    def __init__(self, dataset: Dataset, config: Config, data_parallel_rank: int, data_parallel_size: int) -> None:
        self._dataset = dataset
        self._data = config.data
        self._batch_size = config.bilevel.global_batch_size
        self._validation_batch_size = config.bilevel.validation_batch_size
        self._rank, self._size = data_parallel_rank, data_parallel_size
        seed = config.run.seed
        if config.data.sampling == "stratified":
            self._streams = [
                _Stream(examples, f"{seed}/train/{name}")
                for name, examples in zip(dataset.source_names, dataset.train, strict=True)
            ]
        else:
            self._streams = [_Stream([example for source in dataset.train for example in source], f"{seed}/pooled")]
        self._validation = _Stream(dataset.validation, f"{seed}/validation")

    def step(self, step: int) -> StepBatch:
        """The batch of `step`, counted from 1. num_tokens counts input positions: n - 1 for an example of n tokens."""
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        train = self._train_examples(step)
        validation = []
        if self._dataset.validation:
            size = self._validation_batch_size
            validation = self._validation.take((step - 1) * size, step * size)
        source_ids = [example.source_id for example in train]
        loss_tokens = [example.num_loss_tokens for example in train]
        num_sources = len(self._dataset.train)
        return StepBatch(
            train=self._microbatches(train),
            validation=self._microbatches(validation),
            num_examples=np.bincount(source_ids, minlength=num_sources).tolist(),
            num_loss_tokens=np.bincount(source_ids, loss_tokens, num_sources).astype(int).tolist(),
            num_validation_examples=len(validation),
            num_validation_loss_tokens=sum(example.num_loss_tokens for example in validation),
            num_tokens=sum(example.num_positions for example in [*train, *validation]),
            train_rows=self._rows(train),
            validation_rows=self._rows(validation),
        )

    def test_batch(self) -> tuple[list[MicroBatch], int]:
        """This rank's micro-batches of all test examples, and the global number of tokens that carry loss."""
        test = self._dataset.test
        return self._microbatches(test), sum(example.num_loss_tokens for example in test)

    def _train_examples(self, step: int) -> list[Example]:
        """Of K streams each gives B // K examples; the remainder goes round, one source after the other."""
        num_streams = len(self._streams)
        share, remainder = divmod(self._batch_size, num_streams)
        examples = []
        for index, stream in enumerate(self._streams):
            # Extras go to sources 0, 1, .., K - 1, 0, .. in turn: by step t source i got ceil((t * remainder - i) / K).
            start, stop = (t * share + -((index - t * remainder) // num_streams) for t in (step - 1, step))
            examples += stream.take(start, stop)
        return examples

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


class _Stream:
    """Examples of one pool, in an order that depends on nothing but `key` and the pool's size."""

    def __init__(self, examples: list[Example], key: str) -> None:
        self._examples, self._key = examples, key
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)  # a batch may lie across two epochs

    def take(self, start: int, stop: int) -> list[Example]:
        """Examples `start` up to, not including, `stop` of the endless sequence."""
        size = len(self._examples)
        return [self._examples[self._permutation(index // size)[index % size]] for index in range(start, stop)]

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        """Sorts raw 64-bit draws: numpy keeps a bit generator's raw stream the same for ever, its shuffles not."""
        seed = int.from_bytes(hashlib.sha256(f"{self._key}/{epoch}".encode()).digest(), "little")
        return np.argsort(np.random.PCG64(seed).random_raw(len(self._examples)), kind="stable")
