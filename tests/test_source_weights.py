"""The weights are always a distribution; the hypergradient is the derivative; each rule follows it as it says."""

import copy
import json
import math
from statistics import fmean

import pytest
import torch

from megatron_scalebio import open_config
from megatron_scalebio.source_weights import (
    LARGEST_SIGNAL_TO_NOISE,
    LOGITS_OPTIMIZERS,
    SIGNAL_BETA,
    SourceWeights,
    scheduled_lr,
)

PRIOR = [0.5, 0.2, 0.2, 0.1]
GAP = torch.tensor([0.3, -0.2, 0.05, 1.0], dtype=torch.float64)


def new(num_sources: int = 4, **settings) -> SourceWeights:
    return SourceWeights(num_sources, **settings)


def check_distribution(weights: torch.Tensor, floor: float = 0.0) -> None:
    assert weights.dtype == torch.float64
    assert weights.isfinite().all() and (weights >= 0).all() and (weights >= floor * (1 - 1e-12)).all()
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("logits", [[0.0] * 4, [1e3, -1e3, 0, 5], [1e300, 0, 0, 0], [-1e300] * 4, [1e-300, 0, 0, 0]])
def test_weights_are_a_distribution_above_the_floor_for_any_logits(logits, floor):
    weights = new(floor=floor, prior=PRIOR)
    weights.logits = torch.tensor(logits, dtype=torch.float64)
    check_distribution(weights.weights, floor)


@pytest.mark.parametrize("floor", [0.0, 0.05])
@pytest.mark.parametrize("optimizer", LOGITS_OPTIMIZERS)
def test_weights_stay_a_distribution_over_long_runs_of_wild_gaps(optimizer, floor):
    weights = new(optimizer=optimizer, weight_decay=0.01, floor=floor)
    generator = torch.Generator().manual_seed(1)
    for step in range(1000):
        gap = torch.randn(4, generator=generator, dtype=torch.float64) * 10.0 ** (step % 9 - 4)
        weights.update(100.0, gap, lr=0.5)
        check_distribution(weights.weights, floor)
    assert weights.logits.isfinite().all()


@pytest.mark.parametrize("optimizer", LOGITS_OPTIMIZERS)
def test_every_logits_optimizer_is_a_choice_of_the_setting(optimizer):
    assert open_config(None, [f"bilevel.logits_optimizer={optimizer}"]).bilevel.logits_optimizer == optimizer


@pytest.mark.parametrize("optimizer", LOGITS_OPTIMIZERS)
def test_one_source_keeps_weight_one_exactly(optimizer):
    weights = new(1, optimizer=optimizer, weight_decay=0.01)
    for gap in (3.0, -1e6, 1e-9):
        hypergradient = weights.update(10.0, torch.tensor([gap], dtype=torch.float64), lr=0.5)
        assert hypergradient.tolist() == [0.0] and weights.weights.tolist() == [1.0]


def test_a_prior_is_what_the_weights_are_at_logits_zero_and_the_floor_lifts_it():
    assert new(prior=PRIOR).weights.tolist() == pytest.approx(PRIOR, abs=1e-15)
    assert new(prior=[5, 2, 2, 1]).weights.tolist() == pytest.approx(PRIOR, abs=1e-15)
    assert new(prior=PRIOR, floor=0.1).weights.tolist() == pytest.approx([0.1 + 0.6 * p for p in PRIOR], abs=1e-15)
    assert new().weights.tolist() == [0.25] * 4


@pytest.mark.parametrize("floor, prior", [(0.0, None), (0.1, None), (0.0, PRIOR), (0.1, PRIOR)])
def test_hypergradient_is_the_derivative_of_the_weighted_gap(floor, prior):
    weights = new(floor=floor, prior=prior)
    weights.logits = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    found = weights.hypergradient(7.0, GAP)
    weights.logits.requires_grad_(True)
    (expected,) = torch.autograd.grad(7.0 * weights.weights @ GAP, weights.logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert new(floor=floor, prior=prior).hypergradient(7.0, torch.zeros(4).double()).tolist() == [0.0] * 4


def test_adamw_is_torchs_adamw_on_the_hypergradient():
    weights = new(optimizer="adamw", weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6)
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    adamw = torch.optim.AdamW([logits], lr=1.0, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    generator = torch.Generator().manual_seed(2)
    for step in range(30):
        gap = torch.randn(4, generator=generator, dtype=torch.float64)
        adamw.param_groups[0]["lr"] = lr = 0.1 / (step + 1)
        logits.grad = weights.update(3.0, gap, lr)
        adamw.step()
        torch.testing.assert_close(weights.logits, logits.detach(), rtol=0, atol=1e-13)


def test_exponentiated_gradient_multiplies_the_weights():
    weights = new(optimizer="exponentiated_gradient", start=PRIOR)
    weights.update(2.0, GAP, lr=0.3)
    expected = torch.tensor(PRIOR, dtype=torch.float64) * torch.exp(-0.3 * 2.0 * GAP)
    torch.testing.assert_close(weights.weights, expected / expected.sum(), rtol=0, atol=1e-15)


def test_sgd_steps_against_the_hypergradient():
    weights = new(optimizer="sgd")
    hypergradient = weights.update(2.0, GAP, lr=0.3)
    assert torch.equal(weights.logits, -0.3 * hypergradient)
    assert (weights.weights[3] < 0.25) and (weights.weights[1] > 0.25), "the source with the larger gap must lose"


def test_signal_to_noise_is_the_mean_over_its_standard_error():
    weights = new(betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(3)
    ratios = []
    for step in range(1, 20001):
        weights.update(1.0, torch.randn(4, generator=generator, dtype=torch.float64), lr=0.0)
        ratios.append(weights.signal_to_noise)
        if step == 1:
            assert ratios[0].tolist() == pytest.approx([1.0] * 4)
    ratios = torch.stack(ratios)
    assert (ratios**2).mean().item() == pytest.approx(1.0, abs=0.15)  # of noise alone, as chi-squared
    assert (ratios > 2).double().mean().item() == pytest.approx(0.05, abs=0.02)
    for _ in range(1000):
        weights.update(1.0, 100 * GAP, lr=0.0)
    assert weights.signal_to_noise.min() > 0.99 * LARGEST_SIGNAL_TO_NOISE
    assert LARGEST_SIGNAL_TO_NOISE == pytest.approx(199**0.5)


def test_a_steady_signal_smaller_than_its_noise_passes_the_gate():
    weights, generator = new(5, gate=3.0), torch.Generator().manual_seed(0)
    for _ in range(400):
        gap = torch.randn(5, generator=generator, dtype=torch.float64)
        gap[0] -= 0.5
        weights.update(1.0, gap, lr=0.02)
    assert weights.weights[0] > 0.6


@pytest.mark.parametrize("optimizer", LOGITS_OPTIMIZERS)
def test_a_small_signal_passes_the_gate_after_large_ones_and_a_turned_one_is_followed(optimizer):
    weights = new(4, gate=3.0, optimizer=optimizer)
    for scale in (1.0, 0.1, -0.1):
        for _ in range(300):
            before = weights.logits
            weights.update(1.0, scale * GAP, lr=0.001)
        assert ((weights.logits - before) * (GAP - GAP.mean()) * scale < 0).all(), scale


def test_weights_do_not_walk_on_noise_and_do_without_a_gate():
    furthest = {0.0: [], 3.0: []}
    for gate in furthest:
        for seed in range(20):
            weights, generator = new(5, gate=gate), torch.Generator().manual_seed(seed)
            for _ in range(400):
                weights.update(1.0, torch.randn(5, generator=generator, dtype=torch.float64), lr=0.02)
            furthest[gate].append((weights.weights - 0.2).abs().max().item())
    assert max(furthest[3.0]) < 0.1 and fmean(furthest[3.0]) < 0.02
    assert fmean(furthest[0.0]) > 5 * fmean(furthest[3.0]), "this is what the gate is for"


@pytest.mark.parametrize("optimizer", LOGITS_OPTIMIZERS)
def test_a_signal_passes_the_gate_of_every_optimizer_and_catches_up(optimizer):
    """Held still at first, then shrunk by how far it stands out; in the end where it would be without a gate."""
    gated, free = new(optimizer=optimizer, gate=3.0), new(optimizer=optimizer)
    gaps = [GAP * (1 + 0.5 * math.sin(step)) for step in range(300)]
    for step, gap in enumerate(gaps):
        before, held = gated.logits, gated.held
        alone = copy.deepcopy(gated)
        alone.gate = 0.0
        for weights in (gated, free, alone):
            weights.update(1.0, gap, lr=0.01)
        trust = (1 - (3 / gated.signal_to_noise) ** 2).clamp(min=0)
        whole = alone.logits - before + SIGNAL_BETA * held
        torch.testing.assert_close(gated.logits - before, trust * whole, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(gated.held, (1 - trust) * whole, rtol=1e-9, atol=1e-15)
        assert step > 8 or torch.equal(gated.weights, new().weights), "nine steps or fewer cannot say that much"
    away = (free.weights - 0.25).abs()
    assert ((gated.weights - free.weights).abs() < 0.1 * away).all()


def test_the_clip_is_of_the_hypergradients_norm():
    clipped, scaled = new(optimizer="sgd", clip=0.01), new(optimizer="sgd")
    hypergradient = clipped.update(2.0, GAP, lr=1.0)
    assert torch.equal(hypergradient, scaled.update(2.0, GAP, lr=1.0)) and hypergradient.norm() > 0.01
    assert clipped.logits.norm().item() == pytest.approx(0.01)
    torch.testing.assert_close(clipped.logits / 0.01, scaled.logits / scaled.logits.norm())


@pytest.mark.parametrize("optimizer", LOGITS_OPTIMIZERS)
def test_state_survives_json_exactly(optimizer):
    first = new(optimizer=optimizer, weight_decay=0.01, gate=2.0)
    for step in range(9):
        first.update(10.0, GAP * (2 + math.sin(step + 1)), lr=0.1)
    assert 0 < first.held.abs().min() and first.logits.abs().min() > 0
    second = new(optimizer=optimizer, weight_decay=0.01, gate=2.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.update(10.0, GAP, 0.1), second.update(10.0, GAP, 0.1))
    assert torch.equal(first.logits, second.logits)
    assert first.state_dict() == second.state_dict()


@pytest.mark.parametrize("floor, prior", [(0.0, None), (0.05, None), (0.0, PRIOR), (0.05, PRIOR)])
def test_start_weights_are_the_weights(floor, prior):
    start = [0.4, 0.3, 0.2, 0.1]
    assert new(floor=floor, prior=prior, start=start).weights.tolist() == pytest.approx(start, abs=1e-15)
    assert new(floor=floor, prior=prior, start=[4, 3, 2, 1]).weights.tolist() == pytest.approx(start, abs=1e-15)


def test_a_fixed_weight_may_be_zero():
    assert new(3, start=[0.75, 0.0, 0.25]).weights.tolist() == pytest.approx([0.75, 0.0, 0.25], abs=1e-15)


def test_schedule_warms_up_to_the_full_rate_and_ends_above_zero():
    rates = [scheduled_lr(2.0, "cosine", step, 20, 0.1) for step in range(1, 21)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert all(later < earlier for earlier, later in zip(rates[2:], rates[3:], strict=False)) and rates[-1] > 0
    assert rates[11] == pytest.approx(1.0)  # half-way down
    assert [scheduled_lr(2.0, "constant", step, 20, 0.1) for step in (1, 2, 3, 20)] == [1.0, 2.0, 2.0, 2.0]
    assert scheduled_lr(2.0, "cosine", 1, 1, 0.0) == 2.0
