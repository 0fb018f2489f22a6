"""One rank's step, rehearsed on fake tensors: the real modules, schedule and optimizer, and the memory they hold.

Fake tensors have shapes and no numbers, so a rank of any layout of any model runs here in seconds, without its weights
and its data. They live on the CPU, yet take the paths of the run's device (`kernels.dispatch.planning_for_cuda`).
What is not a tensor is not seen: the CUDA context, NCCL's and cuBLAS's buffers, the allocator's fragmentation, and
what a library's operation holds while it runs.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_scalebio.active_layers import Role, draw_active_layers
from megatron_scalebio.bilevel import Pass
from megatron_scalebio.config import Config, ModelConfig
from megatron_scalebio.data.batch import MicroBatch
from megatron_scalebio.device import CPU, rehearsal
from megatron_scalebio.kernels import head_loss
from megatron_scalebio.kernels.dispatch import planning_for_cuda
from megatron_scalebio.losses import TokenCoefs
from megatron_scalebio.mcore import build
from megatron_scalebio.mcore.attention import (
    AttentionChoice,
    FlashAttention,
    FlexAttention,
    VarlenAttention,
    choose_attention,
)
from megatron_scalebio.mcore.memory_tracker import MemoryTracker
from megatron_scalebio.mcore.models import MegatronModels
from megatron_scalebio.mcore.parameters import NamedParameter
from megatron_scalebio.mcore.process_groups import start_process_groups
from megatron_scalebio.mcore.weight_store import Block
from megatron_scalebio.plan.planner import draws_of, stage_memory

ACTIVATIONS, LOSS_BUFFERS, MICRO_BATCHES = "activations", "loss buffers", "micro-batches"


@dataclass(frozen=True)
class Rehearsal:
    """What one rank holds at the peak of a step."""

    rank: int
    stage: int
    period: int  # of active layers: the fullest of the stage
    parts: dict[str, int]  # bytes on the device by part at the peak; activations are all that no other part names
    host_masters: int  # bytes

    @property
    def peak_bytes(self) -> int:
        """On the device."""
        return sum(self.parts.values())


def rehearse(config: Config, world_size: int, rank: int, on_cuda: bool) -> Rehearsal:
    """Build a rank of a run and take one step in its fullest period, on fake tensors.

    Args:
        rank: of `world_size`; tensor-parallel ranks are innermost, pipeline stages outermost.
        on_cuda: which device the run is planned for. fp64, which is for the CPU, takes the CPU's paths either way.

    Raises: RuntimeError where torch.distributed is in use in this process.
    """
    if dist.is_initialized():
        raise RuntimeError("rehearse: torch.distributed is in use in this process")
    config = _without_transformer_engine(config)
    on_cuda = on_cuda and config.precision.compute != "fp64"
    with rehearsal(), fake_world(world_size, rank), paths_of_cuda() if on_cuda else nullcontext():
        groups = start_process_groups(config.parallel, CPU)
        period = stage_memory(config, groups.data.size(), groups.stage, draws_of(config)).period
        with FakeTensorMode(), MemoryTracker(ACTIVATIONS) as tracker:
            models = MegatronModels(config, groups, CPU, _no_numbers)
            parts = measure_step(models, period, groups.num_stages - groups.stage, tracker)
    return Rehearsal(rank, groups.stage, period, parts, models.store.masters.nbytes)


def _no_numbers(parameter: NamedParameter) -> Tensor:
    """In the place of a parameter's initial weights."""
    return torch.zeros_like(parameter.tensor)


def _without_transformer_engine(config: Config) -> Config:
    """Its modules know no fake tensors: the native ones, whose memory is like theirs, stand in, and for its FP8
    products those in bf16."""
    compute = "bf16" if config.precision.compute == "fp8" else config.precision.compute
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, implementation="native"),
        precision=dataclasses.replace(config.precision, compute=compute),
    )


@contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """Process groups of one rank whose peers do not exist: what is sent goes nowhere, what is received is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def paths_of_cuda() -> Iterator[None]:
    """Fake tensors of the CPU take the paths of a CUDA device, where they are not the same.

    Models get the attention that CUDA would get. All flash attentions keep query, key, value, output and one number per
    query and head; of them torch's varlen_attn runs on fake tensors, so it stands in. `_fused_rms_norm` is the one
    operation of torch that is a kernel on CUDA and a composition of others, which keep more, on the CPU.
    """

    def choose(model_config: ModelConfig, device: torch.device, dtype: torch.dtype) -> AttentionChoice:
        choice = choose_attention(model_config, torch.device("cuda"), dtype)
        return choice._replace(backend=VarlenAttention) if choice.backend in (FlashAttention, FlexAttention) else choice

    norm, attention = _replaced(F, "rms_norm", _RMSNormOfCuda.apply), _replaced(build, "choose_attention", choose)
    with planning_for_cuda(), norm, attention:
        yield


class _RMSNormOfCuda(torch.autograd.Function):
    """The memory of `_fused_rms_norm`: input, weight and one number per row are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[: -len(normalized_shape)], 1, dtype=wide))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        for_x, _, for_weight, _ = ctx.needs_input_grad
        return torch.empty_like(x) if for_x else None, None, torch.empty_like(weight) if for_weight else None, None


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _draw(config: Config, period: int) -> dict[Role, list[int]]:
    return draw_active_layers(config.lisa, config.model.shape.num_layers, config.run.seed, period)


def measure_step(models: MegatronModels, period: int, in_flight: int, tracker: MemoryTracker) -> dict[str, int]:
    """Bring freshly built models into a period and take one step. Tensors may be real or fake.

    Args:
        in_flight: micro-batches that this stage holds at a time: `num_stages - stage`, or more.
        tracker: entered before the models were built.

    Returns: bytes on the device by part at the step's peak. All micro-batches of the run's step are there, however few
    were taken.
    """
    draws = [_draw(models.config, earlier) for earlier in range(period + 1)]
    models.redraw({role: sorted({layer for draw in draws for layer in draw[role]}) for role in Role})
    models.redraw(draws[-1])
    _count_static_parts(models, tracker)
    passes = synthetic_passes(models.config, in_flight)
    tracker.assign(MICRO_BATCHES, [tensor for part in passes for tensor in _tensors(part)])
    gc.collect()
    tracker.reset_peak()
    with _counting_loss_buffers(tracker):
        models.forward_backward(passes, fingerprint=0)
        for role in models.active_sets:
            models.step(role, lr=0.0, max_norm=models.config.optimizer.clip_grad)
    parts = {part: size for part, size in tracker.peak.items() if size}
    taken = sum(len(part.micro_batches) for part in passes)
    parts[MICRO_BATCHES] = parts[MICRO_BATCHES] // taken * _most_micro_batches(models.config, models.groups.data.size())
    return parts


def _count_static_parts(models: MegatronModels, tracker: MemoryTracker) -> None:
    """Count weights, gradients and optimizer state as what they are; masters on the host do not count."""
    actives = [active for active_set in models.active_sets.values() for active in active_set.blocks.values()]
    blocks = [block for blocks in models.store.blocks.values() for block in blocks.values()]
    states = [state for active_set in models.active_sets.values() for state in active_set.adam_states().values()]
    tracker.assign(None, models.store.masters.values())
    tracker.assign("frozen weights", [tensor for block in blocks for tensor in _weights(block)])
    tracker.assign("active weights", [active.block.flat for active in actives])
    tracker.assign("gradients", [active.gradient for active in actives])
    tracker.assign("masters", [active.master for active in actives if active.has_own_master])
    tracker.assign("moments", [tensor for state in states for tensor in state.tensors().values()])


def _weights(block: Block) -> list[Tensor]:
    if block.quantized is None:
        return [block.flat]
    matrices = [part for matrix in block.quantized.matrices for part in (matrix, matrix.difference) if part is not None]
    return [block.quantized.vectors, *(tensor for matrix in matrices for tensor in (matrix.data, matrix.scale))]


@contextmanager
def _counting_loss_buffers(tracker: MemoryTracker) -> Iterator[None]:
    """What the head and its loss make counts as loss buffers."""

    def counted(function: Callable[..., Any]) -> Any:
        def call(*args: Any) -> Any:
            with tracker.counting_as(LOSS_BUFFERS):
                return function(*args)

        return staticmethod(call)

    operation = head_loss._HeadLoss
    forward, backward = counted(operation.forward), counted(operation.backward)
    with _replaced(operation, "forward", forward), _replaced(operation, "backward", backward):
        yield


def synthetic_passes(config: Config, in_flight: int) -> list[Pass]:
    """A step's passes. Each model runs `in_flight + 1` training micro-batches in succession, so that a stage that holds
    `in_flight` at a time reaches its steady state; what follows mixes the models."""
    num_sources = max(len(config.data.sources), 1)
    fixed = config.bilevel.mode == "fixed"
    passes = [
        Pass(role, "train", *_micro_batches(config, in_flight + 1), num_sources)
        for role in ([Role.UPPER] if fixed else list(Role))
    ]
    return passes if fixed else [*passes, Pass(Role.UPPER, "validation", *_micro_batches(config, 1), 1)]


def _most_micro_batches(config: Config, data_parallel: int) -> int:
    """Of all passes of a run's step on one rank, should no two examples fit one row."""
    bilevel = config.bilevel
    rows = config.data.micro_batch_size * data_parallel
    train = -(-bilevel.global_batch_size // rows)
    if bilevel.mode == "fixed":
        return train
    return 2 * train + -(-bilevel.validation_batch_size // rows)


def _tensors(part: Pass) -> Iterator[Tensor]:
    for holder in (*part.micro_batches, *part.coefs):
        yield from (value for value in vars(holder).values() if isinstance(value, Tensor))


def _micro_batches(config: Config, number: int) -> tuple[list[MicroBatch], list[TokenCoefs]]:
    """Full micro-batches: no padding, two examples in a row, every token carries loss. In the dtypes that they have on
    the device, which is the CPU here, so that they are counted once."""
    length = config.data.max_length
    num_tokens = config.data.micro_batch_size * length
    ends = [start + offset for start in range(0, num_tokens, length) for offset in sorted({0, length // 2})]
    loss_dtype = torch.float64 if config.precision.compute == "fp64" else torch.float32

    def micro_batch() -> MicroBatch:
        tokens, targets, source_ids = torch.zeros(3, num_tokens, dtype=torch.int64).unbind()
        return MicroBatch(
            tokens=tokens,
            cu_seqlens=torch.tensor([*ends, num_tokens], dtype=torch.int32),
            row_length=length,
            loss_positions=torch.arange(num_tokens),
            targets=targets,
            source_ids=source_ids,
            example_loss_tokens=torch.ones(num_tokens, dtype=torch.int64),
        )

    def coefs() -> TokenCoefs:
        return TokenCoefs(torch.ones(num_tokens, dtype=torch.float64), torch.ones(num_tokens, dtype=loss_dtype))

    return [micro_batch() for _ in range(number)], [coefs() for _ in range(number)]
