"""The rehearsal on fake tensors against the same step on real ones, and the tracker that measures both.

Most real steps run over process groups whose peers do not exist, too. Gloo's threads keep a collective's tensors a
moment longer than the rank that called it: under tensor parallelism what is alive at the peak would depend on timing.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
from megatron.core import parallel_state
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_scalebio import device
from megatron_scalebio.active_layers import Role, draw_active_layers
from megatron_scalebio.config import Config
from megatron_scalebio.device import CPU
from megatron_scalebio.kernels import head_loss
from megatron_scalebio.kernels.adamw import adamw_update
from megatron_scalebio.kernels.dispatch import on_triton, planning_for_cuda
from megatron_scalebio.mcore import build
from megatron_scalebio.mcore.attention import SdpaAttention, VarlenAttention
from megatron_scalebio.mcore.memory_tracker import MemoryTracker
from megatron_scalebio.mcore.models import MegatronModels
from megatron_scalebio.mcore.process_groups import start_process_groups
from megatron_scalebio.mcore.rehearsal import ACTIVATIONS, Rehearsal, fake_world, measure_step, paths_of_cuda, rehearse
from megatron_scalebio.plan.sizes import rank_bytes
from tests.configs import resolved
from tests.distributed import run_distributed
from tests.mcore.runs import small_config

LAYOUTS = {
    "PP2, uneven": (2, ("parallel.pipeline=2", "parallel.layers_per_stage=[3,1]")),
    "PP4": (4, ("parallel.pipeline=4",)),
    "TP2": (2, ("parallel.tensor=2",)),
    "TP2xPP2, sequence parallel": (4, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true")),
    "DP2": (2, ()),
    "fixed weights": (1, ("bilevel.mode=fixed",)),
    "fp64": (1, ("precision.compute=fp64",)),
    "three flushes": (2, ("parallel.pipeline=2", "parallel.fused_pipeline=false")),
    "FP8 and recomputation": (2, ("precision.frozen_weights=fp8", "parallel.recompute=full", "optimizer.moments=fp8")),
}

QWEN25_32B = (
    *("model.shape.num_layers=64", "model.shape.hidden_size=5120", "model.shape.ffn_hidden_size=27648"),
    *("model.shape.num_attention_heads=40", "model.shape.num_query_groups=8", "model.shape.vocab_size=152064"),
    *("data.max_length=1024", "data.micro_batch_size=4", "bilevel.steps=234", "lisa.num_active_layers=2"),
    *("parallel.tensor=2", "parallel.pipeline=4"),
)


def config_of(overrides: tuple[str, ...]) -> Config:
    return small_config(("precision.compute=bf16", "bilevel.steps=8", *overrides))


def measured(config: Config, period: int) -> tuple[int, dict[str, int], int]:
    """On a rank: its number, real bytes by part at the peak, bytes of masters on the host."""
    groups = start_process_groups(config.parallel, CPU)
    with MemoryTracker(ACTIVATIONS) as tracker:
        models = MegatronModels(config, groups, CPU)
        parts = measure_step(models, period, groups.num_stages, tracker)
    return groups.rank, parts, models.store.masters.nbytes


def as_measured(rehearsal: Rehearsal) -> tuple[int, dict[str, int], int]:
    return rehearsal.rank, rehearsal.parts, rehearsal.host_masters


@pytest.mark.parametrize("world_size, overrides", LAYOUTS.values(), ids=LAYOUTS)
def test_real_tensors_take_at_the_peak_what_fake_ones_do(world_size, overrides):
    config = config_of(overrides)
    for rank in range(world_size):
        rehearsal = rehearse(config, world_size, rank, on_cuda=False)
        with device.rehearsal(), fake_world(world_size, rank):
            assert measured(config, rehearsal.period) == as_measured(rehearsal)


def test_ranks_that_talk_to_each_other_take_what_the_rehearsal_does():
    config = config_of(("parallel.pipeline=2",))
    rehearsals = [rehearse(config, 2, rank, on_cuda=False) for rank in range(2)]
    (period,) = {rehearsal.period for rehearsal in rehearsals}
    assert run_distributed(2, measured, config, period) == [as_measured(rehearsal) for rehearsal in rehearsals]


def test_a_stage_of_32b_holds_the_bytes_of_the_arithmetic_and_the_loss_buffers_of_a_large_chunk():
    config = resolved(*QWEN25_32B)
    stage, vocab_rows, hidden, tokens = 3, 152064 // 2, 5120, 4096
    rehearsal = rehearse(config, 8, 2 * stage, on_cuda=True)
    draws = [draw_active_layers(config.lisa, 64, config.run.seed, period) for period in range(rehearsal.period + 1)]
    active = [draws[-1][role] for role in Role]
    thawed = [{layer for draw in draws for layer in draw[role]} for role in Role]
    expected = rank_bytes(config, 1, stage, active, thawed)
    assert {part: size for part, size in rehearsal.parts.items() if part in expected} | {
        "host masters": rehearsal.host_masters
    } == expected
    logits, grad_weight = tokens * vocab_rows * (4 + 2), vocab_rows * hidden * 4  # with the logits' gradient
    grad_hidden = 2 * tokens * hidden * 2  # a chunk's, and the whole
    small = 2**20  # losses and statistics: a few numbers per token
    assert 0 <= rehearsal.parts["loss buffers"] - (logits + grad_hidden + grad_weight) < small


def test_the_process_is_as_it_was():
    def state() -> list:
        patched = [torch.cuda.current_device, torch.Tensor.cuda, F.rms_norm, build.choose_attention]
        started = [dist.is_initialized(), parallel_state.model_parallel_is_initialized()]
        return [*patched, triton.JITFunction.run, dict(vars(head_loss._HeadLoss)), *started]

    before = state()
    rehearse(config_of(()), 1, 0, on_cuda=True)
    assert state() == before
    with pytest.raises(RuntimeError, match="not divisible"):  # from within
        rehearse(config_of(("parallel.pipeline=3",)), 2, 0, on_cuda=True)
    assert state() == before
    assert device.read_back(torch.ones(1)) == [1.0] and not on_triton(torch.ones(1))


def test_a_process_that_trains_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="in use"):
            rehearse(config_of(()), 1, 0, on_cuda=False)
    finally:
        dist.destroy_process_group()


def test_where_cuda_is_planned_for_kernels_are_taken_and_not_launched():
    weights, gradient = torch.ones(256), torch.ones(256)
    moments = torch.zeros(2, 256)
    arguments = dict(num_decayed=0, step=1, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    with planning_for_cuda():
        assert on_triton(weights) and not on_triton(weights.double())
        adamw_update(weights, weights, gradient, *moments, **arguments, gradient_scale=torch.ones(()))
    assert torch.equal(weights, torch.ones(256))


def test_the_norm_keeps_what_it_does_on_cuda():
    with paths_of_cuda(), FakeTensorMode(), MemoryTracker("a") as tracker:
        x, weight = torch.ones(256, 1, 64, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
        tracker.assign(None, [x, weight])
        y = F.rms_norm(x.requires_grad_(), (64,), weight.requires_grad_(), 1e-6)
        assert tracker.live["a"] == y.nbytes + 256 * 4  # the output, and a number per row
        y.sum().backward()
        assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)


@pytest.mark.parametrize("dtype, expected", [(torch.bfloat16, VarlenAttention), (torch.float32, SdpaAttention)])
def test_the_attention_is_that_of_cuda(dtype, expected):
    with paths_of_cuda():
        assert build.choose_attention(config_of(()).model, CPU, dtype).backend is expected


def test_the_norm_is_the_one_operation_that_only_the_cpu_takes_apart():
    """A kernel on CUDA and a composition on the CPU keep different tensors, and the rehearsal needs a stand-in."""

    def has(name: str, key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)

    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    differ = [n for n in names if has(n, "CompositeImplicitAutograd") and has(n, "CUDA") and not has(n, "CPU")]
    assert set(differ) <= {"aten::_fused_rms_norm"}


FAKE_OR_REAL = pytest.mark.parametrize("mode", [FakeTensorMode, contextlib.nullcontext], ids=["fake", "real"])


@FAKE_OR_REAL
def test_a_storage_counts_once_while_anything_refers_to_it(mode):
    with mode(), MemoryTracker("a") as tracker:
        x = torch.ones(1000)  # 4,000 bytes, rounded up to 4,096
        view = x.view(10, 100)[2:]
        x.add_(1)
        torch.mul(x, 2, out=x)
        assert tracker.live["a"] == 4096
        del x
        assert tracker.live["a"] == 4096
        del view
        assert (tracker.live["a"], tracker.peak["a"]) == (0, 4096)


@FAKE_OR_REAL
def test_what_autograd_keeps_counts_until_the_backward_pass(mode):
    with mode(), MemoryTracker("a") as tracker:
        weight = torch.ones(1024, requires_grad=True)
        tracker.assign("w", [weight])
        hidden = weight.exp()  # kept by exp
        loss = hidden.sin().sum()  # hidden is kept by sin, too; its sine by nobody
        del hidden
        assert tracker.live == {"w": 4096, "a": 4096 + 512}
        tracker.reset_peak()
        loss.backward()
        # The gradient of the sum is expanded, so of the sine and of exp two are made, and one is left.
        assert tracker.live == {"w": 4096, "a": 4096 + 512}
        assert tracker.peak["a"] > 2 * 4096


@FAKE_OR_REAL
def test_bytes_are_counted_by_part_and_the_peak_is_their_sum_at_one_time(mode):
    with mode(), MemoryTracker("a") as tracker:
        first = torch.ones(1024)
        with tracker.counting_as("b"):
            second = torch.ones(2048)
            del first
            third = torch.ones(128)
        assert tracker.live == {"a": 0, "b": 8192 + 512}
        assert tracker.peak == {"a": 4096, "b": 8192}
        tracker.assign("c", [second, second[:10]])
        tracker.assign(None, [third])
        assert tracker.live == {"a": 0, "b": 0, "c": 8192}
        tracker.reset_peak()
        del second, third
        assert +tracker.live == {} and +tracker.peak == {"c": 8192}
