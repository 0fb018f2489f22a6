"""From files of records to tokenised examples with loss masks."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from megatron_scalebio.config import Config, DataConfig, UserError, evaluation_sets
from megatron_scalebio.data.records import path_problem, raise_problems, read_records
from megatron_scalebio.data.shares import draw_limits
from megatron_scalebio.data.templates import Segment, Template, choose_template, record_segments
from megatron_scalebio.data.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True, eq=False)
class Example:
    """n tokens, 2 <= n <= max_length, of which at least one carries loss."""

    tokens: np.ndarray  # [n] int32
    loss_mask: np.ndarray  # [n] bool: the token is a target that carries loss; the first never is
    source_id: int  # of validation and test, the number of its set

    @property
    def num_positions(self) -> int:
        """Positions that the example fills in a row: each token but the last is an input."""
        return len(self.tokens) - 1

    @cached_property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass
class Dataset:
    """Every usable example. The counts are keyed by source name, and for the sets by what stands in messages."""

    tokenizer: Tokenizer
    source_names: list[str]
    train: list[list[Example]] = field(default_factory=list)  # per source, in the configuration's order
    validation: list[Example] = field(default_factory=list)  # empty when bilevel.mode is fixed
    test: list[Example] = field(default_factory=list)
    num_dropped: dict[str, int] = field(default_factory=dict)  # over_length=drop, or every loss token cut away
    num_truncated: dict[str, int] = field(default_factory=dict)

    @property
    def num_validation_sets(self) -> int:
        return 1 + max((example.source_id for example in self.validation), default=0)

    @property
    def num_examples(self) -> dict[str, int]:
        """Usable records of each source."""
        return dict(zip(self.source_names, map(len, self.train), strict=True))

    @cached_property
    def num_duplicates(self) -> dict[str, int]:
        """Of each source, examples that an earlier one of it equals in every token and in what carries loss."""
        return {
            name: len(examples) - len({(e.tokens.tobytes(), e.loss_mask.tobytes()) for e in examples})
            for name, examples in zip(self.source_names, self.train, strict=True)
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides the steps: source names, and tokens and masks of training and validation."""
        sets = [[e for e in self.validation if e.source_id == number] for number in range(self.num_validation_sets)]
        return _fingerprint([*self.source_names, *[""] * len(sets)], [*self.train, *sets])

    @cached_property
    def test_fingerprint(self) -> str:
        """sha256 of the tokens and masks of the test examples."""
        return _fingerprint([""], [self.test])


def _fingerprint(names: list[str], pools: list[list[Example]]) -> str:
    digest = hashlib.sha256()
    for name, examples in zip(names, pools, strict=True):
        digest.update(f"{len(name.encode())}:{name}:{len(examples)}:".encode())
        for example in examples:
            digest.update(len(example.tokens).to_bytes(8, "little"))
            digest.update(example.tokens.astype("<i4").tobytes() + example.loss_mask.tobytes())
    return digest.hexdigest()


def load_dataset(config: Config, tokenizer: Tokenizer | None = None) -> Dataset:
    """Reads, templates and tokenises every file that `config.data` names.

    One file may serve several sources: a source is its name. With bilevel.mode=fixed the validation file is not read.

    Args:
        config: one that `rules.check_config` accepts.
        tokenizer: that of `data.tokenizer`, where it is at hand.

    Raises:
        UserError: a file or record breaks a rule, or the records are too few for the run; the message names it.
    """
    data = config.data
    source_names = [source.name for source in data.sources]
    validation = data.validation if config.bilevel.mode == "bilevel" else None
    files = [(f"data.sources[{i}].path ({source.name})", source.path, i) for i, source in enumerate(data.sources)]
    files += [*_files_of_sets("data.validation", validation), *_files_of_sets("data.test", data.test)]
    missing = [f"{key}: {problem}" for key, path, _ in files if (problem := path_problem(path))]
    raise_problems("data names files that cannot be read", missing)

    tokenizer = tokenizer or load_tokenizer(data.tokenizer)
    template = choose_template(data.template, tokenizer)
    dataset = Dataset(tokenizer, source_names)
    for key, path, number in files:
        reader = _Reader(data, tokenizer, template, key, path, source_id=number)
        examples = reader.examples()
        name = source_names[number] if key.startswith("data.sources") else key
        dataset.num_dropped[name], dataset.num_truncated[name] = reader.num_dropped, reader.num_truncated
        if key.startswith("data.sources"):
            dataset.train.append(examples)
        else:
            (dataset.validation if key.startswith("data.validation") else dataset.test).extend(examples)
    draw_limits(config, list(dataset.num_examples.values()))
    return dataset


def _files_of_sets(key: str, value: Any) -> list[tuple[str, str, int]]:
    """(what to call it in messages, path, number) of each set."""
    several = isinstance(value, list)
    return [
        (f"{key}[{number}].path ({each.name})" if several else key, each.path, number)
        for number, each in enumerate(evaluation_sets(key, value))
    ]


class _Reader:
    """Turns one file into examples and counts what does not fit."""

    def __init__(
        self, data: DataConfig, tokenizer: Tokenizer, template: Template, key: str, path: str, source_id: int
    ) -> None:
        self.data, self.tokenizer, self.template = data, tokenizer, template
        self.key, self.path, self.source_id = key, path, source_id
        self.num_dropped = 0
        self.num_truncated = 0

    def examples(self) -> list[Example]:
        """Raises UserError for records that the template or over_length refuses, and if none is usable."""
        records = read_records(self.path, self.key)
        conversations, problems = [], []
        for record in records:
            try:
                conversations.append(record_segments(record, self.template))
            except ValueError as error:
                problems.append(f"{record.location}: {error}")
        raise_problems(self.key, problems)

        examples = []
        for record, (tokens, mask) in zip(records, self._encode(conversations), strict=True):
            if record.messages:
                if self._fits(len(tokens), record.location, problems):
                    examples.append((tokens, mask))
            else:
                examples += self._chunks(tokens, mask)
        raise_problems(self.key, problems)
        usable = [example for tokens, mask in examples if (example := self._cut(tokens, mask))]
        if not usable:
            name = os.path.basename(self.path)
            raise UserError(
                f"{self.key}: {self.path}: none of the {len(records)} records of {name} leaves a token that carries "
                f"loss within data.max_length={self.data.max_length} (data.over_length={self.data.over_length})"
            )
        return usable

    def _encode(self, conversations: list[list[Segment]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, loss mask) of each conversation, uncut; all texts go through the tokenizer at once."""
        flat = [segment for segments in conversations for segment in segments]
        plain = iter(self.tokenizer.encode([s.text for s in flat if not s.parse_special]))
        parsed = iter(self.tokenizer.encode([s.text for s in flat if s.parse_special], parse_special=True))
        for segments in conversations:
            tokens: list[int] = []
            mask: list[bool] = []
            # A chat template writes the beginning-of-text token itself, or has none.
            if self.tokenizer.begin_id is not None and not segments[0].parse_special:
                tokens.append(self.tokenizer.begin_id)
                mask.append(False)
            for segment in segments:
                ids = next(parsed if segment.parse_special else plain)
                ids = [*ids, self.tokenizer.end_id] if segment.end else ids
                tokens += ids
                mask += [segment.has_loss or not self.data.response_loss_only] * len(ids)
            mask[0] = False  # nothing comes before the first token, so nothing predicts it
            yield np.array(tokens, dtype=np.int32), np.array(mask, dtype=bool)

    def _fits(self, length: int, location: str, problems: list[str]) -> bool:
        """Applies over_length to an example of `length` tokens; True if it is kept, to be cut where it is too long."""
        max_length = self.data.max_length
        if length <= max_length:
            return True
        if self.data.over_length == "error":
            problems.append(f"{location}: {length} tokens, more than data.max_length={max_length}")
            return False
        if self.data.over_length == "drop":
            self.num_dropped += 1
            return False
        return True

    def _chunks(self, tokens: np.ndarray, mask: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Chunks of at most max_length tokens that overlap by one: each token but the first is a target once."""
        stride = self.data.max_length - 1
        for start in range(0, len(tokens) - 1, stride):
            chunk_mask = mask[start : start + stride + 1].copy()
            chunk_mask[0] = False
            yield tokens[start : start + stride + 1], chunk_mask

    def _cut(self, tokens: np.ndarray, mask: np.ndarray) -> Example | None:
        """The example within max_length. A cut one just stops: no end-of-text is put where the turn did not end."""
        example = Example(tokens[: self.data.max_length], mask[: self.data.max_length], self.source_id)
        if example.num_loss_tokens == 0:
            self.num_dropped += 1
            return None
        self.num_truncated += len(tokens) > self.data.max_length
        return example
