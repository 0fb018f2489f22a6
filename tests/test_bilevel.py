"""The step itself, on models that are no networks: quadratics behind the `Models` protocol.

    L_i(x) = (x - c_i)' A_i (x - c_i) / 2,   L_val(x) = |x - t|^2 / 2

At fixed p the lower problem's solution x*(p) is linear algebra, so the exact hypergradient of L_val(x*(p)) is known.

Shapes: K sources, D dimensions of x.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_scalebio.active_layers import Role
from megatron_scalebio.bilevel import Bilevel, NonFinite, Pass, _kept
from megatron_scalebio.config import Config
from megatron_scalebio.data import MicroBatch, StepBatch
from megatron_scalebio.data.batch import Rows
from megatron_scalebio.kernels.loss_sums import sums_by_id
from megatron_scalebio.source_weights import SourceWeights
from tests.configs import resolved

NUM_SOURCES, SIZE = 3, 4
_generator = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


CENTRES = _normal(NUM_SOURCES, SIZE)
CURVATURES = [root @ root.T / SIZE + 0.5 * torch.eye(SIZE).double() for root in _normal(NUM_SOURCES, SIZE, SIZE)]
TARGET = CENTRES[0] + 0.1 * _normal(SIZE)
NO_LAYERS = {role: [] for role in Role}


def train_losses(x: Tensor) -> Tensor:
    return torch.stack([(x - c) @ a @ (x - c) / 2 for c, a in zip(CENTRES, CURVATURES, strict=True)])


def validation_loss(x: Tensor) -> Tensor:
    return (x - TARGET) @ (x - TARGET) / 2


class Quadratics:
    """Both models as points x; a loss token is a source's whole loss. A step goes to the minimum (Newton)."""

    def __init__(self):
        self.x = {role: torch.zeros(SIZE, dtype=torch.float64) for role in Role}
        self.moves: list[tuple[Role, float, float | None]] = []

    def forward_backward(self, passes: list[Pass], fingerprint: int) -> list[Tensor]:
        self.minimised = {
            role: [(part, losses_of(part.split)) for part in passes if part.role is role] for role in Role
        }
        return [self._sums(part) for part in passes]

    def step(self, role: Role, lr: float, max_norm: float | None) -> Tensor:
        def objective(x: Tensor) -> Tensor:
            return sum((part.coefs[0].loss_coef * losses(x)).sum() for part, losses in self.minimised[role])

        gradient = torch.func.grad(objective)(self.x[role])
        self.x[role] = self.x[role] - torch.linalg.solve(torch.func.hessian(objective)(self.x[role]), gradient)
        self.moves.append((role, lr, max_norm))
        return gradient.norm()

    def _sums(self, part: Pass) -> Tensor:
        losses = losses_of(part.split)(self.x[part.role])
        losses = losses.expand(len(part.coefs[0].mean_coef))
        return sums_by_id(losses, part.coefs[0].mean_coef, part.micro_batches[0].source_ids, part.num_sources)


def losses_of(split: str):
    return train_losses if split == "train" else lambda x: validation_loss(x).unsqueeze(0)


def micro_batch(source_ids: list[int]) -> MicroBatch:
    """One loss token per source, all of it loss."""
    ids, ones = torch.tensor(source_ids), torch.ones(len(source_ids), dtype=torch.int64)
    return MicroBatch(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids), ids, ids, ids, ones)


def batch(kept: list[float] | None = None) -> StepBatch:
    ones, rows = [1] * NUM_SOURCES, (Rows([1] * NUM_SOURCES, []), Rows([1], []))
    scale, kept = [1.0] * NUM_SOURCES, kept or [1.0] * NUM_SOURCES
    train, validation = [micro_batch([0, 1, 2])], [micro_batch([0])]
    return StepBatch(train, validation, ones, ones, scale, kept, [1.0], [1], [1], NUM_SOURCES + 1, *rows)


def config(*overrides: str) -> Config:
    return resolved("bilevel.steps=10", *overrides)


def exact_hypergradient(logits: Tensor) -> Tensor:
    """d L_val(x*(softmax(logits))) / d logits, by autograd through the lower problem's linear system."""
    logits = logits.clone().requires_grad_()
    p = torch.softmax(logits, dim=0)
    curvature = sum(p[i] * CURVATURES[i] for i in range(NUM_SOURCES))
    x = torch.linalg.solve(curvature, sum(p[i] * CURVATURES[i] @ CENTRES[i] for i in range(NUM_SOURCES)))
    (gradient,) = torch.autograd.grad(validation_loss(x), logits)
    return gradient


def test_hypergradient_approaches_the_exact_implicit_one_as_alpha_grows():
    weights = SourceWeights(NUM_SOURCES, start=[0.5, 0.3, 0.2])
    exact = exact_hypergradient(weights.logits)
    assert exact.norm() > 0.1
    errors = []
    for alpha in (1e1, 1e2, 1e3, 1e4):
        models = Quadratics()
        settings = config(f"bilevel.penalty_alpha={alpha}", "bilevel.logits_lr=0", "bilevel.logits_optimizer=sgd")
        bilevel = Bilevel(settings, weights)
        bilevel.step(models, 1, batch(), NO_LAYERS)  # both models now lie in their minima
        result = bilevel.step(models, 2, batch(), NO_LAYERS)
        errors.append(((result.hypergradient - exact).norm() / exact.norm()).item())
    assert all(later < earlier / 7 for earlier, later in zip(errors, errors[1:], strict=False)), errors  # O(1 / alpha)
    assert errors[-1] < 1e-3


def test_descending_the_logits_lowers_the_validation_loss_of_the_lower_problems_solution():
    weights, models = SourceWeights(NUM_SOURCES, "exponentiated_gradient"), Quadratics()
    bilevel = Bilevel(config("bilevel.penalty_alpha=100", "bilevel.logits_lr=0.5"), weights)
    losses = []
    for step in range(1, 40):
        bilevel.step(models, step % 10 + 1, batch(), NO_LAYERS)
        losses.append(validation_loss(models.x[Role.LOWER]).item())
    assert losses[-1] < 0.5 * losses[0]
    assert weights.weights.argmax() == 0  # validation lies near the first source's centre


def test_equal_models_give_a_hypergradient_of_exactly_zero_and_losses_belong_to_the_parameters_before_the_update():
    models, weights = Quadratics(), SourceWeights(NUM_SOURCES)
    start = models.x[Role.UPPER].clone()
    result = Bilevel(config(), weights).step(models, 1, batch(), NO_LAYERS)
    assert result.hypergradient.tolist() == [0.0] * NUM_SOURCES and result.penalty_gap == 0.0
    for role in Role:
        torch.testing.assert_close(result.train_loss[role], train_losses(start))
        assert not torch.equal(models.x[role], start)
    assert result.validation_loss == pytest.approx(validation_loss(start).item())


def test_each_model_steps_once_lower_first_with_its_rate_and_the_clip_at_clip_grad_times_alpha():
    settings = config(
        *("bilevel.penalty_alpha=20", "bilevel.penalty_growth=2", "optimizer.clip_grad=0.5"),
        *("optimizer.lr=1e-3", "optimizer.lr_lower=4e-3", "optimizer.schedule=constant", "optimizer.warmup=0.3"),
    )
    models, bilevel = Quadratics(), Bilevel(settings, SourceWeights(NUM_SOURCES))
    results = [bilevel.step(models, step, batch(), NO_LAYERS) for step in (1, 3)]
    assert [result.penalty_alpha for result in results] == [20.0, 80.0]
    expected = [(Role.LOWER, 4e-3 / 3, 10.0), (Role.UPPER, 1e-3 / 3, 10.0)]
    expected += [(Role.LOWER, 4e-3, 40.0), (Role.UPPER, 1e-3, 40.0)]
    assert [role for role, *_ in models.moves] == [role for role, *_ in expected]
    for (_, lr, max_norm), (_, expected_lr, expected_norm) in zip(models.moves, expected, strict=True):
        assert (lr, max_norm) == (pytest.approx(expected_lr), pytest.approx(expected_norm))


def test_the_logits_wait_for_their_warm_up_and_are_measured_in_it():
    models, weights = Quadratics(), SourceWeights(NUM_SOURCES)
    bilevel = Bilevel(config("bilevel.logits_warmup_steps=2", "bilevel.logits_gate=0"), weights)
    results = [bilevel.step(models, step, batch(), NO_LAYERS) for step in (1, 2)]
    assert weights.logits.tolist() == [0.0] * NUM_SOURCES and [result.logits_lr for result in results] == [0.0, 0.0]
    assert results[1].hypergradient.norm() > 0 and weights.exp_avg.norm() > 0
    assert (results[1].signal_to_noise > 0).all()
    assert bilevel.step(models, 3, batch(), NO_LAYERS).logits_lr > 0 and weights.logits.norm() > 0


def test_what_a_limit_takes_from_a_source_goes_to_the_others_and_not_into_what_is_learned():
    """Weights .5, .3, .2, of which the first keeps half: the models train with .25, .45, .3."""
    starts = [0.5, 0.3, 0.2], [0.25, 0.45, 0.3]
    held, free = (Bilevel(config("bilevel.penalty_alpha=10"), SourceWeights(3, start=start)) for start in starts)
    models, like = Quadratics(), Quadratics()
    held.step(models, 1, batch([0.5, 1.0, 1.0]), NO_LAYERS)
    free.step(like, 1, batch(), NO_LAYERS)
    for role in Role:
        torch.testing.assert_close(models.x[role], like.x[role])
    gap = train_losses(models.x[Role.UPPER]) - train_losses(models.x[Role.LOWER])
    expected = held.source_weights.hypergradient(10.0, gap)
    found = held.step(models, 2, batch([0.5, 1.0, 1.0]), NO_LAYERS).hypergradient
    torch.testing.assert_close(found, expected)


def test_the_validation_loss_of_several_sets_is_the_upper_models_by_their_weights():
    """Sets of one loss token each, which all are the quadratic: any weights give what one set gives."""
    several = replace(
        batch(),
        validation=[micro_batch([0, 1])],
        validation_weights=[0.75, 0.25],
        num_validation_examples=[1, 1],
        num_validation_loss_tokens=[1, 1],
    )
    one, two = (Bilevel(config(), SourceWeights(NUM_SOURCES)) for _ in range(2))
    models, like = Quadratics(), Quadratics()
    for step in (1, 2):
        alone, found = one.step(like, step, batch(), NO_LAYERS), two.step(models, step, several, NO_LAYERS)
        assert found.validation_losses.tolist() == [alone.validation_loss] * 2
        assert found.validation_loss == pytest.approx(alone.validation_loss, rel=1e-14)
        for role in Role:
            torch.testing.assert_close(models.x[role], like.x[role])


def test_mode_fixed_trains_upper_alone_on_the_given_weights():
    models, weights = Quadratics(), SourceWeights(NUM_SOURCES, start=[0.2, 0.8, 0.0])
    logits = weights.logits.clone()
    result = Bilevel(config("bilevel.mode=fixed"), weights).step(models, 1, batch(), NO_LAYERS)
    assert (result.validation_loss, result.penalty_gap, result.hypergradient, result.logits_lr) == (None,) * 4
    assert torch.equal(weights.logits, logits) and [role for role, *_ in models.moves] == [Role.UPPER]
    gradient = torch.func.grad(lambda x: weights.weights @ train_losses(x))(models.x[Role.UPPER])
    assert gradient.norm() < 1e-12


def test_a_non_finite_loss_leaves_models_and_logits_as_they_were_and_is_described():
    class Poisoned(Quadratics):
        def forward_backward(self, passes: list[Pass], fingerprint: int) -> list[Tensor]:
            losses = super().forward_backward(passes, fingerprint)
            losses[1][2] = math.nan
            losses[2][0] = math.inf
            raise NonFinite(5, passes, losses)

    models, weights = Poisoned(), SourceWeights(NUM_SOURCES)
    with pytest.raises(NonFinite) as error:
        Bilevel(config(), weights).step(models, 4, batch(), NO_LAYERS)
    assert models.moves == [] and weights.step == 0 and weights.logits.tolist() == [0.0] * NUM_SOURCES
    assert error.value.describe({"train": ["clean", "mixed", "wrong"]}) == (
        "not finite on rank 5: loss nan of wrong in the upper model; loss inf of validation in the upper model"
    )


def test_the_fingerprint_tells_steps_logits_and_active_layers_apart():
    seen = []

    class Watched(Quadratics):
        def forward_backward(self, passes: list[Pass], fingerprint: int) -> list[Tensor]:
            seen.append(fingerprint)
            return super().forward_backward(passes, fingerprint)

    for step, start, layers in [(1, None, [0]), (1, None, [0]), (2, None, [0]), (1, [5, 3, 2], [0]), (1, None, [1])]:
        weights = SourceWeights(NUM_SOURCES, start=start)
        Bilevel(config(), weights).step(Watched(), step, batch(), {role: layers for role in Role})
    assert seen[0] == seen[1] and len(set(seen)) == 4
    assert all(0 <= fingerprint < 2**20 for fingerprint in seen)


def test_a_source_that_a_limit_holds_back_regains_nothing():
    weights = torch.tensor([0.98, 0.01, 0.01], dtype=torch.float64)
    found = _kept(weights, [0.1, 1.0, 1.0])
    torch.testing.assert_close(found, torch.tensor([0.098, 0.451, 0.451], dtype=torch.float64))
    assert _kept(weights, [1.0, 1.0, 1.0]) is weights
    every = _kept(weights, [0.5, 0.5, 0.25])  # none is free to take it
    torch.testing.assert_close(every.sum(), torch.tensor(1.0, dtype=torch.float64))
