"""Frozen layers in FP8: one copy of one byte a number, exact masters, and equal numbers in equal models."""

from collections.abc import Iterable
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_scalebio.active_layers import Role
from megatron_scalebio.kernels.fp8 import SCALE_BLOCK, dequantize, quantize
from megatron_scalebio.mcore.linear import ColumnLinear, RowLinear
from megatron_scalebio.mcore.weight_store import Block, data_parallel_shard
from tests.distributed import run_distributed
from tests.mcore.runs import Case, RankRun, run_case

FP8 = ("precision.frozen_weights=fp8", "precision.compute=bf16")
ONE_LAYER = ("lisa.num_active_layers=1", "lisa.period=1")
# No update of this size reaches a weight of order 0.1 in bf16, whose neighbours are 5e-4 apart.
VANISHING = ("optimizer.lr=1e-6", "optimizer.schedule=constant", "optimizer.warmup=0", "optimizer.weight_decay=0")
ROUNDED_INPUTS = ("precision.frozen_inputs=fp8",)
LAYOUTS = {
    "one rank": (1, ()),
    "inputs in fp8": (1, ROUNDED_INPUTS),
    "DP2": (2, ()),
    "TP2 sequence": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "TP2xPP2": (4, ("parallel.tensor=2", "parallel.pipeline=2")),
    "TP2xPP2, inputs in fp8": (4, ("parallel.tensor=2", "parallel.pipeline=2", *ROUNDED_INPUTS)),
    "fp32": (1, ("precision.compute=fp32",)),
}


def case_of(layout: str, *overrides: str, steps: int = 7) -> Case:
    """Layers 3, 1, 0, 2, 2, 3, 1, ...: from the sixth step on one thaws again."""
    world_size, settings = LAYOUTS[layout]
    return Case((*FP8, *ONE_LAYER, *settings, *overrides), world_size, steps=steps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_layers_hold_fp8_alone_and_active_ones_the_exact_weights(layout):
    run_distributed(LAYOUTS[layout][0], follow_storage, case_of(layout, "optimizer.lr=0.01"))


def follow_storage(case: Case) -> None:
    run = RankRun(case)
    initial = {name: run.models.store.initial_weights(block) for name, block in run.blocks(Role.UPPER).items()}
    ever_active: set[str] = set()
    for step in range(1, case.steps + 1):
        run.redraw(step)
        for role in Role:
            for active in run.models.active_sets[role].blocks.values():
                whole = torch.empty(active.block.numel, dtype=active.master.dtype)
                dist.all_gather_into_tensor(whole, active.master.contiguous(), group=run.groups.data)
                assert torch.equal(active.block.weights, whole.to(active.block.weights.dtype)), "thawed to others"
        run.take_step()
        for role in Role:
            active = run.models.active_sets[role].blocks
            ever_active |= {name for name in active if name.startswith("layers.")}
            for name, block in run.blocks(role).items():
                if name in active:
                    rounded = active[name].master.to(block.weights.dtype)
                    assert torch.equal(block.weights[active[name].shard], rounded)
                check_block(run, role, block, frozen_in_fp8=block.is_layer and name not in active)
        for name, lower in run.blocks(Role.LOWER).items():
            if not lower.is_layer:
                continue
            upper = run.blocks(Role.UPPER)[name]
            assert (lower.stored is upper.stored) == (name not in ever_active)
            if name in ever_active and lower.quantized is not None:
                check_pair(run, lower, upper)
            if name not in ever_active:
                matrices = [quantize(view, SCALE_BLOCK) for view in lower.views(initial[name]) if view.ndim == 2]
                for kept, exact in zip(lower.quantized.matrices, matrices, strict=True):
                    assert torch.equal(kept.data.view(torch.uint8), exact.data.view(torch.uint8))


def check_block(run: RankRun, role: Role, block, frozen_in_fp8: bool) -> None:
    """Bytes of a frozen layer: one per number of a matrix, four per 128 x 128 of them, vectors as they are."""
    assert (block.weights is None) == frozen_in_fp8 == (block.quantized is not None)
    if not frozen_in_fp8:
        return
    element = block.parameters[0].tensor.element_size()
    expected = (block.numel - block.num_decayed) * element
    for parameter in block.parameters:
        if parameter.tensor.ndim == 2:
            rows, columns = parameter.tensor.shape
            expected += rows * columns + 4 * -(-rows // SCALE_BLOCK) * -(-columns // SCALE_BLOCK)
            assert parameter.tensor.untyped_storage().nbytes() == element, "a shadow of the weight is kept"
            assert parameter.tensor.isnan().all()
    assert block.stored.nbytes == expected
    if (role, block.name) in run.models.store.masters:
        master = run.models.store.masters[role, block.name]
        assert master.dtype == torch.float32 and master.numel() == block.numel // run.groups.data.size()


def check_pair(run: RankRun, lower: Block, upper: Block) -> None:
    """Lower's is its weights rounded; upper's differs from it as the exact ones do, within 1/16 of that."""
    flat = []
    for role, block in ((Role.LOWER, lower), (Role.UPPER, upper)):
        master = run.models.store.masters[role, block.name]
        whole = torch.empty(block.numel, dtype=master.dtype)
        dist.all_gather_into_tensor(whole, master.contiguous(), group=run.groups.data)
        flat.append(whole.to(block.parameters[0].tensor.dtype))
    for number, (low, up) in enumerate(zip(lower.views(flat[0]), upper.views(flat[1]), strict=True)):
        if low.ndim != 2:
            continue
        alone, beside = lower.quantized.matrices[number], upper.quantized.matrices[number]
        assert alone.difference is None
        assert torch.equal(dequantize(alone, low.dtype), dequantize(quantize(low, SCALE_BLOCK), low.dtype))
        if run.models.config.precision.frozen_inputs == "fp8":
            assert beside.difference is None
            assert torch.equal(dequantize(beside, low.dtype), dequantize(quantize(up, SCALE_BLOCK), low.dtype))
            continue
        assert beside.data is alone.data, "a second copy is kept"
        found = dequantize(beside, torch.float32) - dequantize(alone, torch.float32)
        exact = up.float() - low.float()
        assert exact.abs().max() > 0 and (found - exact).norm() <= exact.norm() / 16, "as a number of e4m3 is off"


def test_a_layer_that_never_trained_is_read_once_for_both_models():
    run_distributed(2, follow_reads, case_of("DP2", "optimizer.lr=0.01"))


def follow_reads(case: Case) -> None:
    run = RankRun(case)
    store, thawed = run.models.store, set()
    with mock.patch.object(store, "initial_weights", wraps=store.initial_weights) as read:
        for step in range(1, case.steps + 1):
            run.redraw(step)
            active = [f"layers.{layer}" for layer in run.active_layers[Role.UPPER]]
            for name in set(active) - thawed:
                lower, upper = (run.blocks(role)[name].weights for role in Role)
                assert torch.equal(lower, upper) and lower.data_ptr() != upper.data_ptr()
            thawed.update(active)
            assert sorted(call.args[0].name for call in read.call_args_list) == sorted(thawed)
            run.take_step()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_linear_of_a_frozen_layer_computes_from_fp8(layout):
    """Four linears a layer. What FP8 replaces is NaN: a linear that computed from it would show."""
    counts = run_distributed(LAYOUTS[layout][0], count_linears, case_of(layout))
    assert all(count == (4, 4 * (frozen)) for count, frozen in counts)


def count_linears(case: Case) -> tuple[tuple[int, int], int]:
    run = RankRun(case)
    run.redraw(1)
    model = run.models.chunk.models[Role.UPPER.value]
    linears = [module for module in model.modules() if isinstance(module, ColumnLinear | RowLinear)]
    quantized = sum(module.weight.quantized is not None for module in linears)
    result = run.bilevel.step(run.models, 1, run.batch(1), run.active_layers)
    assert all(torch.isfinite(losses).all() for losses in result.train_loss.values())
    frozen = sum(block.is_layer for block in run.blocks(Role.UPPER).values()) - sum(
        name.startswith("layers.") for name in run.models.active_sets[Role.UPPER].blocks
    )
    return (4 if len(linears) % 4 == 0 else 0, quantized), frozen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_models_have_bit_equal_losses_before_and_after_thawing_and_freezing(layout):
    """The hypergradient starts at exactly zero, and stays there as long as the models are equal: with a learning rate
    of zero they are, while layers thaw and freeze again."""
    for step in run_case(case_of(layout, "optimizer.lr=0")):
        lower, upper = (step.result.train_loss[role] for role in Role)
        assert torch.equal(lower, upper)
        assert step.result.penalty_gap == 0.0
        assert torch.equal(step.result.hypergradient, torch.zeros_like(step.result.hypergradient))


@pytest.mark.parametrize("layout", ["one rank", "DP2", "TP2xPP2"])
def test_a_layer_thaws_with_its_exact_master_where_fp8_and_bf16_swallow_the_updates(layout):
    run_distributed(LAYOUTS[layout][0], follow_masters, case_of(layout, *VANISHING, steps=9))


def follow_masters(case: Case) -> None:
    run = RankRun(case)
    initial = {name: run.models.store.initial_weights(block) for name, block in run.blocks(Role.UPPER).items()}
    masters: dict[tuple[Role, str], torch.Tensor] = {}
    activations = dict.fromkeys(initial, 0)
    for step in range(1, case.steps + 1):
        run.redraw(step)
        for role in Role:
            for name, active in run.models.active_sets[role].blocks.items():
                shard = data_parallel_shard(active.block.numel, run.groups)
                before = masters.get((role, name), initial[name][shard].float())
                assert torch.equal(active.master, before), f"{name} thawed from something rounded"
        run.take_step()
        for role in Role:
            for name, active in run.models.active_sets[role].blocks.items():
                masters[role, name] = active.master.clone()
                activations[name] += role is Role.UPPER
    for (role, name), master in masters.items():
        assert torch.equal(run.models.persistence.exact(role, name), master)
        if not name.startswith("layers.") or activations[name] < 2:
            continue
        block, shard = run.blocks(role)[name], data_parallel_shard(initial[name].numel(), run.groups)
        assert (master - initial[name][shard].float()).abs().max() > 1.9e-6, "two updates of 1e-6 are not there"
        if block.quantized is not None:
            of_initial = [quantize(view, SCALE_BLOCK) for view in block.views(initial[name]) if view.ndim == 2]
            equal = [
                (kept.data.float() == exact.data.float()).float().mean().item()
                for kept, exact in zip(block.quantized.matrices, of_initial, strict=True)
            ]
            assert min(equal) > 0.99, "the updates do not vanish: the test shows nothing"
    if dist.get_world_size() == 1:
        assert max(activations[f"layers.{layer}"] for layer in range(4)) >= 2


@pytest.mark.parametrize("inputs, of_a_product", [("compute", 0.03), ("fp8", 0.04)])
def test_fp8_changes_losses_a_little_and_gradients_point_the_same_way(inputs, of_a_product):
    """A number in e4m3 is off by up to 1/16, 3% rms; where both factors of a product are, 4%; and so is a sum of
    products with random signs, relative to its size. A loss errs by less than twice that. A gradient goes through the
    four linears of three frozen layers both ways: by less than twice that times sqrt(24)."""
    coarse, fine = (
        run_case(Case((*settings, "precision.compute=fp32", *ONE_LAYER, "optimizer.lr=0"), 1, steps=1))[0]
        for settings in (("precision.frozen_weights=fp8", f"precision.frozen_inputs={inputs}"), ())
    )
    for role in Role:
        loss = fine.result.train_loss[role]
        assert 0 < ((coarse.result.train_loss[role] - loss) / loss).abs().max() < 2 * of_a_product
        for name, gradient in fine.gradients[role].items():
            error = (coarse.gradients[role][name] - gradient).norm() / gradient.norm()
            assert 0 < error < 2 * of_a_product * 24**0.5, name


def test_with_inputs_in_the_compute_dtype_fp8_is_exactly_its_weights_rounded():
    """A model whose frozen weights are FP8's numbers from the start computes as in fp32, bit for bit."""
    assert all(run_distributed(1, check_exact_weights, case_of("fp32", "optimizer.lr=0", steps=1)))


def check_exact_weights(case: Case) -> bool:
    losses = []
    for frozen in ("fp8", "null"):
        run = RankRun(Case((*case.overrides, f"precision.frozen_weights={frozen}"), 1))
        draw = {role: [0] for role in Role}
        round_matrices(run.blocks(Role.UPPER).values())  # which lower still shares
        run.models.redraw(draw)
        round_matrices([run.blocks(role)["layers.0"] for role in Role])  # thawed from FP8 with the exact weights
        result = run.bilevel.step(run.models, 1, run.batch(1), draw)
        losses.append(torch.stack([result.train_loss[role] for role in Role]))
    return torch.equal(*losses)


def round_matrices(blocks: Iterable[Block]) -> None:
    """Of decoder layers that hold their weights in the compute dtype, to what FP8 holds."""
    for block in blocks:
        if block.is_layer and block.weights is not None:
            for view in block.views(block.weights):
                if view.ndim == 2:
                    view.copy_(dequantize(quantize(view, SCALE_BLOCK), view.dtype))
