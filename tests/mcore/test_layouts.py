"""One global batch gives one result, however it is cut over ranks, stages, micro-batches, rows and flushes.

In fp64 another layout adds the same numbers in another order: about 1e-14 of a gradient's norm, which AdamW may raise
to 1e-9 (see test_parity.py). The runs are five steps with two redraws, so the later steps start from moved weights,
kept and dropped moments, and moved logits.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_scalebio.active_layers import Role
from tests.mcore.runs import Case, Step, run_case
from tests.mcore.test_parity import without_tied_head

TIED = "model.shape.tied_embeddings=true"
THREE_FLUSHES = "parallel.fused_pipeline=false"
TP2, PP2, PP4, SP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.pipeline=4", "parallel.sequence=true"

CASES = {
    "padded": Case(("data.packing=false",)),
    "micro-batches of 1": Case(("data.micro_batch_size=1",)),
    "micro-batches of 3": Case(("data.micro_batch_size=3",)),
    "padded, micro-batches of 3": Case(("data.packing=false", "data.micro_batch_size=3")),
    "TP2": Case((TP2,), 2),
    "TP2 with sequence parallelism": Case((TP2, SP), 2),
    "PP2": Case((PP2,), 2),
    "PP2, padded, micro-batches of 1": Case((PP2, "data.packing=false", "data.micro_batch_size=1"), 2),
    "DP2": Case((), 2),
    "TP2xPP2": Case((TP2, PP2), 4),
    "TP2xPP2 with sequence parallelism": Case((TP2, PP2, SP), 4),
    "DP2xTP2 with sequence parallelism": Case((TP2, SP), 4),
    "DP2xTP2": Case((TP2,), 4),
    "DP2xPP2": Case((PP2,), 4),
    "PP4": Case((PP4,), 4),
    "tied, TP2 with sequence parallelism": Case((TIED, TP2, SP), 2),
    "tied, PP2": Case((TIED, PP2), 2),
    "tied, TP2xPP2": Case((TIED, TP2, PP2), 4),
    "tied, DP2xPP2": Case((TIED, PP2), 4),
}
FLUSHES = {
    "one rank": Case(),
    "PP2": Case((PP2,), 2),
    "tied, TP2xPP2 with sequence parallelism": Case((TIED, TP2, PP2, SP), 4),
    "DP2xPP2, bf16": Case((PP2, "precision.compute=bf16"), 4),
}
# Rounding in the gradient's norm: u = 2^-24 or 2^-8, with some 30 roundings on a path that partly cancel.
LOW_PRECISION = {"fp32": 2e-6, "bf16": 0.1}


@cache
def on_one_rank(*overrides: str, steps: int = 5) -> list[Step]:
    return run_case(Case(overrides, steps=steps))


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_updates_and_logits_do_not_depend_on_the_layout(name):
    case = CASES[name]
    expected = on_one_rank(*([TIED] if TIED in case.overrides else []))
    assert len({str(step.active_layers) for step in expected}) == 3
    check_steps(run_case(case), expected, relative=1e-9)


@pytest.mark.parametrize("name", FLUSHES)
def test_one_flush_equals_three_bit_for_bit(name):
    case = FLUSHES[name]
    three = Case((*case.overrides, THREE_FLUSHES), case.world_size)
    for fused, separate in zip(run_case(case), run_case(three), strict=True):
        assert torch.equal(fused.logits, separate.logits)
        assert torch.equal(fused.result.hypergradient, separate.result.hypergradient)
        assert fused.result.validation_loss == separate.result.validation_loss
        for role in Role:
            assert torch.equal(fused.result.train_loss[role], separate.result.train_loss[role])
            for name in fused.gradients[role]:
                assert torch.equal(fused.gradients[role][name], separate.gradients[role][name]), name
            for name in fused.weights[role]:
                assert torch.equal(fused.weights[role][name], separate.weights[role][name]), name


@pytest.mark.parametrize("precision", LOW_PRECISION)
@pytest.mark.parametrize(
    "layout, world_size", [((), 1), ((TP2, SP), 2), ((PP2,), 2), ((), 2), ((TP2, PP2), 4)], ids=str
)
def test_low_precision_gives_the_fp64_result_to_rounding_under_every_layout(precision, layout, world_size):
    check_first_step(Case((*layout, f"precision.compute={precision}"), world_size, steps=1), LOW_PRECISION[precision])


@pytest.mark.parametrize(
    "precision, layout, world_size",
    [("fp32", (), 1), ("bf16", (), 1), ("fp32", (TP2, SP), 2), ("bf16", (TIED, TP2, PP2, SP), 4)],
    ids=str,
)
def test_a_step_with_the_kernels_gives_the_fp64_result_to_rounding(precision, layout, world_size):
    """In fp32 then a second step, against the references': both start it from weights that moved alike. The suites of
    the kernels have the other pairs of precision and ranks; interpreted, a step takes half a minute."""
    case = Case((*layout, f"precision.compute={precision}"), world_size, steps=2 if precision == "fp32" else 1)
    kernels = check_first_step(replace(case, interpret=True), LOW_PRECISION[precision])
    if precision == "bf16":
        return
    for step, expected in zip(kernels, run_case(case), strict=True):
        torch.testing.assert_close(step.result.train_loss, expected.result.train_loss, rtol=2e-6, atol=0)
        for role in Role:
            for name, weight in expected.weights[role].items():
                # Where a gradient is all rounding, AdamW's step is the learning rate, 1e-3, times its sign.
                off = (step.weights[role][name] - weight).abs()
                assert off.mean() <= 1e-5 and off.max() <= 2e-3, f"{role} {name}: {off.mean()}, {off.max()}"


@pytest.mark.parametrize("tied", [False, True])
def test_the_heads_gradient_is_not_rounded_to_the_compute_dtype(tied):
    """With all of lower's examples in one micro-batch, whatever goes through autograd is a bf16 number."""
    overrides = ("precision.compute=bf16", "data.micro_batch_size=9", *([TIED] if tied else []))
    (step,) = run_case(Case(overrides, steps=1))
    gradients = step.gradients[Role.LOWER]
    head = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    for name in (head, "decoder.final_layernorm.weight"):
        assert torch.equal(gradients[name], gradients[name].bfloat16().float()) == (name != head), name


def check_first_step(case: Case, relative: float) -> list[Step]:
    """One step: after it, AdamW turns the sign of a rounded gradient near 0 into a move of the size lr."""
    steps = run_case(case)
    check_equal_models_give_no_hypergradient(steps[0])
    expected = on_one_rank(*([TIED] if TIED in case.overrides else []), steps=1)[0]
    for role in Role:
        torch.testing.assert_close(
            steps[0].result.train_loss[role], expected.result.train_loss[role], rtol=relative / 4, atol=0
        )
        gradients = without_tied_head(steps[0].gradients[role], expected.gradients[role])
        for name, gradient in expected.gradients[role].items():
            error = (gradients[name].double() - gradient).norm() / gradient.norm()
            assert error <= relative, f"{role} {name}: {error}"
    return steps


def check_steps(steps: list[Step], expected_steps: list[Step], relative: float) -> None:
    check_equal_models_give_no_hypergradient(steps[0])
    for step, expected in zip(steps, expected_steps, strict=True):
        result, expected_result = step.result, expected.result
        assert step.active_layers == expected.active_layers
        tolerance = dict(rtol=relative, atol=relative)
        torch.testing.assert_close(step.logits, expected.logits, **tolerance)
        torch.testing.assert_close(result.hypergradient, expected_result.hypergradient, **tolerance)
        assert result.validation_loss == pytest.approx(expected_result.validation_loss, rel=relative)
        for role in Role:
            torch.testing.assert_close(result.train_loss[role], expected_result.train_loss[role], **tolerance)
            torch.testing.assert_close(result.grad_norm[role], expected_result.grad_norm[role], **tolerance)
            gradients = without_tied_head(step.gradients[role], expected.gradients[role])
            assert set(gradients) == set(expected.gradients[role])
            for name, gradient in gradients.items():
                error = (gradient - expected.gradients[role][name]).norm()
                assert error <= relative * expected.gradients[role][name].norm(), f"{role} {name}"
            weights = without_tied_head(step.weights[role], expected.weights[role])
            assert set(weights) == set(expected.weights[role])
            for name, weight in weights.items():
                assert (weight - expected.weights[role][name]).abs().max() <= relative, f"{role} {name}"


def check_equal_models_give_no_hypergradient(first: Step) -> None:
    """Exactly zero in the first step: both models run the same examples with the same weights in the same order."""
    assert torch.equal(first.result.hypergradient, torch.zeros_like(first.result.hypergradient))
    assert first.result.penalty_gap == 0.0
