"""Steps of the real trainer, timed as a run takes them: on a configuration's own data, or on synthetic examples.

T positions of a micro-batch.
"""

import json
import os
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalebio.anatomy import Initial
from megatron_scalebio.config import Config, SourceConfig, UserError, given_settings, load_config
from megatron_scalebio.data import Dataset, Example, load_dataset
from megatron_scalebio.data.batch import Rows
from megatron_scalebio.data.tokenizers import BytesTokenizer
from megatron_scalebio.device import peak_memory
from megatron_scalebio.hf import adopt_checkpoint, check_checkpoint, read_shape
from megatron_scalebio.mcore.parameters import NamedParameter
from megatron_scalebio.plan.flops import Flops, Work
from megatron_scalebio.plan.planner import Draws
from megatron_scalebio.plan.seconds import Device, predict_step, stage_loads
from megatron_scalebio.plan.utilization import batch_flops, work_of_rows
from megatron_scalebio.rules import check_config
from megatron_scalebio.run import open_config
from megatron_scalebio.show.record import StepRecord
from megatron_scalebio.spans import Span, profiler, span
from megatron_scalebio.trainer import Trainer
from tools.benchmarks.throughput_split import seconds_by_part

SYNTHETIC_EXAMPLES = 256  # of each source
SYNTHETIC_LENGTHS = (1 / 8, 3 / 8)  # least and greatest, of data.max_length
FLUSH_PAIRS = 5


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def read_config(path: str | None, overrides: list[str], synthetic: bool) -> Config:
    """The resolved configuration to measure. Where model.hf_path holds only a config.json, that is the shape of random
    weights, which settings of model.shape may change. Raises: UserError."""
    config, given = load_config(path, overrides), given_settings(path, overrides)
    config.run.resume = "never"
    if config.model.hf_path is not None:
        folder = Path(config.model.hf_path)
        if any(folder.glob("*.safetensors")):
            adopt_checkpoint(config, given)
            check_checkpoint(config.model)
        else:
            config.model.family, config.model.shape = read_shape(folder)
            for key, value in given.items():
                if key.startswith("model.shape."):
                    setattr(config.model.shape, key.removeprefix("model.shape."), value)
            config.model.hf_path = None
    if synthetic:
        names = [source.name for source in config.data.sources] or ["first", "second"]
        config.data.sources = [SourceConfig(name, "synthetic") for name in names]
        config.data.validation, config.data.test, config.data.tokenizer = "synthetic", None, "bytes"
    check_config(config, world_size(), None)
    return open_config(config, world_size=world_size())


def make_dataset(config: Config, synthetic: bool) -> Dataset:
    """What `config.data` names, or random examples in its place. Raises: UserError."""
    try:
        dataset = synthetic_dataset(config) if synthetic else load_dataset(config)
    except UserError as error:
        raise UserError(f"{error}\n(--synthetic measures without data files and tokenizer)") from None
    check_config(config, world_size(), dataset.tokenizer.vocab_size)
    return dataset


def synthetic_dataset(config: Config) -> Dataset:
    """Random tokens in examples of 1/8 to 3/8 of data.max_length; the second half of each carries loss."""
    generator, tokenizer = np.random.default_rng(0), BytesTokenizer()
    vocab_size = config.model.shape.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise UserError(f"model.shape.vocab_size={vocab_size}: synthetic data need {tokenizer.vocab_size} or more")
    least, greatest = (max(2, round(share * config.data.max_length)) for share in SYNTHETIC_LENGTHS)

    def example(source_id: int) -> Example:
        length = int(generator.integers(least, greatest + 1))
        first = length // 2 if config.data.response_loss_only else 1
        tokens = generator.integers(0, vocab_size, length, dtype=np.int32)
        return Example(tokens, np.arange(length) >= first, source_id)

    def examples(source_id: int) -> list[Example]:
        return [example(source_id) for _ in range(SYNTHETIC_EXAMPLES)]

    names = [source.name for source in config.data.sources]
    train = [examples(index) for index in range(len(names))]
    return Dataset(tokenizer, names, train, examples(0) if config.bilevel.mode == "bilevel" else [])


def initial_weights(config: Config, device: torch.device) -> Callable[[NamedParameter], Tensor] | None:
    """Where to begin; None: where a run begins. On a GPU random weights are made there: a run's own come from the CPU,
    which takes long over a large model's, and a step's time does not depend on them."""
    on_gpu = device.type == "cuda" and config.model.hf_path is None
    return partial(random_weights, device) if on_gpu else None


def random_weights(device: torch.device, parameter: NamedParameter) -> Tensor:
    """A rank's shard of a parameter, a function of its name: normal with deviation 0.02, norms neutral, biases 0."""
    shape, dtype, initial = parameter.tensor.shape, parameter.tensor.dtype, parameter.declared.initial
    if initial is Initial.NEUTRAL:
        return torch.full(shape, getattr(parameter.tensor, "neutral", 1.0), dtype=dtype, device=device)
    if initial is Initial.ZERO:
        return torch.zeros(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(parameter.name.encode()))
    return torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(0.02)


@dataclass(frozen=True)
class Content:
    """What the micro-batches of one pass hold."""

    work: Work  # its positions are padded ones, what a GPU computes
    real: int  # positions that hold an example
    num_microbatches: int


EMPTY = Content(Work(0, 0, 0, 0), 0, 0)


@dataclass(frozen=True)
class Step:
    """One step that all ranks took together."""

    seconds: float  # the slowest rank's
    train: Content  # of all data-parallel ranks; read once, though both models run it
    validation: Content
    flops: Flops  # of all ranks
    redrew: bool
    record: StepRecord  # this rank's

    @property
    def positions(self) -> int:
        """Of all passes, padding included."""
        models = 1 if self.validation == EMPTY else 2
        return models * self.train.work.positions + self.validation.work.positions


def timed_step(trainer: Trainer) -> Step:
    """Take a step and its record, as the trainer's loop does."""
    before = trainer.active_layers
    with span(Span.STEP):
        batch, result = trainer.take_step()
        record = trainer.record(batch, result)
    config, groups = trainer.config, trainer.groups
    everyone: list[Any] = [None] * groups.world_size
    dist.all_gather_object(everyone, record.step_seconds)
    window, replicas = config.model.shape.sliding_window, groups.data.size()

    def content(rows: Rows, num_loss_tokens: int, num_microbatches: int) -> Content:
        return Content(work_of_rows(rows, num_loss_tokens, window), sum(rows.examples), num_microbatches * replicas)

    train = content(batch.train_rows, sum(batch.num_loss_tokens), len(batch.train))
    validation = content(batch.validation_rows, sum(batch.num_validation_loss_tokens), len(batch.validation))
    active = [trainer.active_layers[role] for role in result.grad_norm]
    flops = batch_flops(config, active, batch)
    return Step(max(everyone), train, validation, flops, trainer.active_layers != before, record)


def traced_step(trainer: Trainer) -> tuple[Step, Counter[str]]:
    """Take a step under the profiler. Returns it and this rank's seconds by part."""
    recorder = profiler(trainer.device)
    with recorder:
        dist.barrier()  # who has read the last trace sooner would wait in this step for the others
        step = timed_step(trainer)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(file))
        return step, seconds_by_part(json.loads(file.read_text(encoding="utf-8"))["traceEvents"])


def resident_bytes() -> int:
    """Of this process now."""
    return psutil.Process().memory_info().rss


def measured_memory(device: torch.device, resident_before: int) -> dict[str, int]:
    """On CUDA the allocator's bytes at their most since the reset; on the CPU the process's, who never gives back."""
    if device.type == "cuda":
        return {"allocated_bytes": peak_memory(device), "reserved_bytes": torch.cuda.max_memory_reserved(device)}
    return {"resident_bytes": peak_memory(device), "resident_before_bytes": resident_before}


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None on the CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def one_flush_against_three(trainer: Trainer, step: Step, device: Device, draws: Draws) -> dict[str, Any]:
    """Seconds of forward and backward of all passes in one flush over those in one for each, measured in turn on the
    slowest rank; beside it the planner's ratio for the micro-batches of `step`, and that of stages of equal speed."""
    flushes: list[float] = []
    ratios = []
    with _timing_flushes(trainer, flushes):
        for _ in range(FLUSH_PAIRS + 1):
            for fused in (True, False):
                trainer.config.parallel.fused_pipeline = fused
                trainer.take_step()
            ratios.append(flushes[-2] / flushes[-1])
    stages, replicas = trainer.groups.num_stages, trainer.groups.data.size()
    counts = [content.num_microbatches // replicas for content in (step.train, step.train, step.validation)]
    total = step.train.work + step.validation.work
    work = Work(*(round(number / (counts[0] + counts[-1]) / replicas) for number in vars(total).values()))
    config = trainer.config
    planned = predict_step(config, replicas, device, stage_loads(config, draws), work, counts)
    even = (sum(counts) + stages - 1) / sum(number + stages - 1 for number in counts)
    return {
        "measured_ratio": float(np.median(ratios[1:])),
        "measured_ratio_least": min(ratios[1:]),
        "measured_ratio_greatest": max(ratios[1:]),
        "planned_ratio": (1 - planned.bubble_separate) / (1 - planned.bubble_fused),
        "even_stages_ratio": even,
        "planned_bubble_of_one_flush": planned.bubble_fused,
        "planned_bubble_of_three": planned.bubble_separate,
        "num_microbatches": counts,
        "pairs": FLUSH_PAIRS,
    }


@contextmanager
def _timing_flushes(trainer: Trainer, seconds: list[float]) -> Iterator[None]:
    """Note what the forward and backward passes of each step take on the slowest rank."""
    models, run = trainer.models, trainer.models._run
    fused = trainer.config.parallel.fused_pipeline

    def timed(*args: Any, **keywords: Any) -> Any:
        dist.barrier()
        torch.cuda.synchronize()  # does nothing on the CPU, where the seam stands in for it
        started = time.perf_counter()
        result = run(*args, **keywords)
        torch.cuda.synchronize()
        elapsed = torch.tensor(time.perf_counter() - started, device=trainer.device)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        seconds.append(elapsed.item())
        return result

    models._run = timed
    try:
        yield
    finally:
        del models._run
        trainer.config.parallel.fused_pipeline = fused
