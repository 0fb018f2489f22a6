"""The Megatron models against the independent implementation in tests/reference.py, five steps long.

In fp64 a step's gradients differ by the order of additions only: about 1e-14 of their norm. AdamW divides by
sqrt(v) + eps, which turns that into at most 1e-14 / eps * lr = 1e-9 for a gradient far below eps and into 1e-14 * lr
elsewhere; weights and logits are of order 0.1 to 1. Hence 1e-9, absolute.
"""

import math

import pytest
import torch

from megatron_scalebio.active_layers import Role
from tests.mcore.runs import Case, Step, initial_weights, run_case
from tests.reference import ReferenceRun, StepRecord, Weights

START = "bilevel.weights={s0: 0.5, s1: 0.3, s2: 0.2}"
START_LOGITS = [math.log(0.5), math.log(0.3), math.log(0.2)]  # up to a constant, which the softmax does not see
PRIOR = [0.2, 0.3, 0.5]
ABSENT = ((0, 0, 1, 2), (2, 0, 0), (1, 1, 0), (2, 2, 2), (0, 1, 2))

CASES = {
    "default": Case(),
    "paper": Case(("bilevel.preset=paper",)),
    "moments kept, cosines that end high": Case(("lisa.keep_moments=true", "optimizer.lr_end=0.5"), steps=7),
    "without LISA": Case(("lisa.enabled=false",)),
    "mode fixed": Case(("bilevel.mode=fixed", START)),
    "start weights": Case((START,)),
    "exponentiated gradient": Case(("bilevel.logits_optimizer=exponentiated_gradient",)),
    "exponentiated gradient with floor and prior": Case(
        (
            "bilevel.logits_optimizer=exponentiated_gradient",
            "bilevel.floor=0.1",
            "bilevel.prior={s0: 0.2, s1: 0.3, s2: 0.5}",
        )
    ),
    "sgd with floor": Case(("bilevel.logits_optimizer=sgd", "bilevel.floor=0.05")),
    "adamw with prior": Case(("bilevel.prior={s0: 0.2, s1: 0.3, s2: 0.5}",)),
    "penalty growth": Case(("bilevel.penalty_growth=1.5",)),
    "lr_lower, constant schedule": Case(("optimizer.lr_lower=3e-3", "optimizer.schedule=constant")),
    "cosine logits with a long warm-up": Case(("bilevel.logits_schedule=cosine", "optimizer.warmup=0.15")),
    "active clip": Case(("optimizer.clip_grad=0.05",)),
    "inactive clip": Case(("optimizer.clip_grad=1e6",)),
    "no clip": Case(("optimizer.clip_grad=null",)),
    "units token and example": Case(("bilevel.train_loss_unit=token", "bilevel.validation_loss_unit=example")),
    "an absent source": Case(sources_of_step=ABSENT),
    "an absent source, unit token": Case(("bilevel.train_loss_unit=token",), sources_of_step=ABSENT),
    "one source": Case(num_sources=1, sources_of_step=((0, 0, 0, 0, 0),)),
    "tied": Case(("model.shape.tied_embeddings=true",)),
    "tied, paper, TP2xPP2": Case(
        ("model.shape.tied_embeddings=true", "bilevel.preset=paper", "parallel.tensor=2", "parallel.pipeline=2"), 4
    ),
    "default, TP2xPP2": Case(("parallel.tensor=2", "parallel.pipeline=2"), 4),
}


def take_reference_steps(case: Case, steps: list[Step], dtype: torch.dtype) -> tuple[ReferenceRun, list[StepRecord]]:
    """The same case on the reference, which draws no layers: it is told which the steps had active."""
    config = case.config
    prior = PRIOR if config.bilevel.prior else None
    logits = START_LOGITS if config.bilevel.weights else [0.0] * case.num_sources
    bilevel, optimizer = config.bilevel, config.optimizer
    run = ReferenceRun(
        *(initial_weights(case), config.model.shape, bilevel, optimizer, logits, prior, dtype),
        always_active=config.lisa.always_active,
        keep_moments=config.lisa.keep_moments,
    )
    records = []
    for number, step in enumerate(steps, start=1):
        active = [step.active_layers[role] for role in Role]
        records.append(run.step(number, case.train_examples(number), case.validation_examples(number), *active))
    return run, records


def centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean()


@pytest.mark.parametrize("name", CASES)
def test_five_steps_equal_the_reference_in_fp64(name):
    case = CASES[name]
    config = case.config
    steps = run_case(case)
    reference, records = take_reference_steps(case, steps, torch.float64)
    for step, record in zip(steps, records, strict=True):
        check_losses(step, record, relative=1e-12)
        check_gradients(step, record, relative=1e-12)
        torch.testing.assert_close(step.source_weights, record.weights, rtol=0, atol=1e-9)
        if config.bilevel.weights is None:
            torch.testing.assert_close(step.logits, record.logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(centred(step.logits), centred(record.logits), rtol=0, atol=1e-9)
    check_weights(steps[-1].weights[Role.UPPER], reference.upper)
    if Role.LOWER in steps[-1].weights:
        check_weights(steps[-1].weights[Role.LOWER], reference.lower)
    check_the_case_is_what_its_name_says(name, case, steps)


@pytest.mark.parametrize(
    "name, relative", [("default", 2e-6), ("paper", 2e-6), ("default, TP2xPP2", 2e-6), ("without LISA", 2e-6)]
)
def test_losses_and_gradients_equal_the_fp64_reference_to_rounding_in_fp32(name, relative):
    """About 30 roundings of 2^-24 lie on the path from a weight to its gradient: 2e-6 of the norm. One step, since
    AdamW's first updates have the size lr whatever the gradient's, so an element near 0 may move either way."""
    case = CASES[name]
    case = Case((*case.overrides, "precision.compute=fp32"), case.world_size, steps=1)
    steps = run_case(case)
    _, (record,) = take_reference_steps(case, steps, torch.float64)
    check_losses(steps[0], record, relative)
    check_gradients(steps[0], record, relative)


def check_losses(step: Step, record: StepRecord, relative: float) -> None:
    tolerance = dict(rtol=relative, atol=relative)
    result = step.result
    torch.testing.assert_close(result.train_loss[Role.UPPER], record.train_loss_upper.double(), **tolerance)
    if record.train_loss_lower is None:
        assert (result.validation_loss, result.penalty_gap, result.hypergradient) == (None, None, None)
        assert set(result.train_loss) == {Role.UPPER}
        return
    torch.testing.assert_close(result.train_loss[Role.LOWER], record.train_loss_lower.double(), **tolerance)
    assert result.validation_loss == pytest.approx(record.val_loss.item(), rel=relative)
    gap = dict(rtol=0, atol=10 * relative * result.penalty_alpha)  # the gap is a difference of losses of about 5
    assert abs(result.penalty_gap - record.penalty_gap.item()) < 10 * relative
    torch.testing.assert_close(result.hypergradient, record.hypergradient, **gap)


def check_gradients(step: Step, record: StepRecord, relative: float) -> None:
    """Every active parameter by its name, no other, and the norm over all of them."""
    expected = {Role.LOWER: record.gradients_lower, Role.UPPER: record.gradients_upper}
    norms = {Role.LOWER: record.grad_norm_lower, Role.UPPER: record.grad_norm_upper}
    for role, gradients in step.gradients.items():
        gradients = without_tied_head(gradients, expected[role])
        assert set(gradients) == set(expected[role])
        for name, gradient in gradients.items():
            error = (gradient.double() - expected[role][name]).norm()
            assert error <= relative * expected[role][name].norm(), f"{role} {name}"
        torch.testing.assert_close(step.result.grad_norm[role].double(), norms[role].double(), rtol=relative, atol=0)


def check_weights(weights: Weights, expected: Weights) -> None:
    weights = without_tied_head(weights, expected)
    assert set(weights) == set(expected)
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight, expected[name], rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name} {text}"
        )


def without_tied_head(tensors: Weights, expected: Weights) -> Weights:
    """A tied head on a stage of its own must equal the embedding; the reference has none."""
    if "output_layer.weight" not in tensors or "output_layer.weight" in expected:
        return tensors
    assert torch.equal(tensors["output_layer.weight"], tensors["embedding.word_embeddings.weight"])
    return {name: value for name, value in tensors.items() if name != "output_layer.weight"}


def check_the_case_is_what_its_name_says(name: str, case: Case, steps: list[Step]) -> None:
    """A case that does not reach what it is named after would pass whatever the code did there."""
    optimizer = case.config.optimizer
    clipped = [
        norm > optimizer.clip_grad * step.result.penalty_alpha
        for step in steps
        for norm in (step.result.grad_norm.values() if optimizer.clip_grad else ())
    ]
    if name == "active clip":
        assert all(clipped)
    if name == "inactive clip":
        assert not any(clipped)
    if name in ("paper", "tied, paper, TP2xPP2"):
        assert any(step.active_layers[Role.LOWER] != step.active_layers[Role.UPPER] for step in steps)
    if name == "one source":
        assert all(step.source_weights.tolist() == [1.0] for step in steps)
        assert all(step.result.hypergradient.tolist() == [0.0] for step in steps)
    if case.config.lisa.enabled:
        assert len({str(step.active_layers) for step in steps}) > 1
    if name.startswith("an absent source"):
        assert any(0 in step.result.train_loss[Role.LOWER] for step in steps)
