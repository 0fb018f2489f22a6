"""The reference is only a truth if it is true: it against transformers, torch.optim, finite differences, known answers.

Tolerances are fp64 rounding (2e-16 per operation) times the few hundred operations on a path.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_scalebio.config import BilevelConfig, OptimizerConfig, ShapeConfig
from tests.reference import (
    ReferenceRun,
    Weights,
    hypergradient,
    learning_rate,
    next_token_logits,
    random_weights,
    source_weights,
    token_losses,
)

SHAPE = ShapeConfig(
    num_layers=3, hidden_size=24, ffn_hidden_size=40, num_attention_heads=6, num_query_groups=2, vocab_size=29
)
BILEVEL = BilevelConfig(
    steps=40,
    penalty_alpha=10.0,
    logits_optimizer="adamw",
    logits_lr=1e-2,
    logits_schedule="constant",
    logits_weight_decay=0.01,
)
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, warmup=0.1, clip_grad=0.05)
LOGITS = [0.3, -0.2, 0.5]


class SmallExample(NamedTuple):
    tokens: Tensor
    loss_mask: Tensor
    source_id: int


def random_examples(seed: int, sources: list[int]) -> list[SmallExample]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for source in sources:
        length = int(torch.randint(4, 12, (), generator=generator))
        tokens = torch.randint(SHAPE.vocab_size, (length,), generator=generator)
        mask = torch.rand(length, generator=generator) < 0.5
        mask[0], mask[-1] = False, True
        examples.append(SmallExample(tokens, mask, source))
    return examples


def new_run(bilevel: BilevelConfig = BILEVEL, optimizer: OptimizerConfig = OPTIMIZER, **kwargs) -> ReferenceRun:
    return ReferenceRun(random_weights(SHAPE, seed=0, vocab_rows=32), SHAPE, bilevel, optimizer, LOGITS, **kwargs)


def take_steps(run: ReferenceRun, steps: int, active: list[int] | None = None):
    """Step on fresh random batches; sources 0 and 1 have unequal counts, source 2 comes in the odd steps alone."""
    records = []
    for step in range(1, steps + 1):
        train = random_examples(step, [0, 0, 0, 1, 1] + [2] * (step % 2))
        records.append(run.step(step, train, random_examples(-step, [0, 0, 0]), active, active))
    return records


# The model.


class EverythingDouble(TorchFunctionMode):
    """Turn the single-precision islands that transformers hard-codes (norms, rotary angles) into double precision."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def double(value):
            return torch.float64 if value is torch.float32 else value

        if function is Tensor.float:
            function = Tensor.double
        return function(*map(double, args), **{key: double(value) for key, value in (kwargs or {}).items()})


def qwen2_state(weights: Weights, shape: ShapeConfig) -> Weights:
    """The weights under transformers' names, padded vocabulary rows cut off."""
    size = shape.hidden_size // shape.num_attention_heads
    per_group = shape.num_attention_heads // shape.num_query_groups + 2
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][: shape.vocab_size],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])[
            : shape.vocab_size
        ],
    }
    for layer in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            rows = weights[f"{ours}self_attention.linear_qkv.{kind}"]
            blocks = [rows[i * size : (i + 1) * size] for i in range(shape.num_query_groups * per_group)]
            place = {"q": [], "k": [], "v": []}
            for index, block in enumerate(blocks):
                place[{per_group - 2: "k", per_group - 1: "v"}.get(index % per_group, "q")].append(block)
            for letter, chosen in place.items():
                state[f"{theirs}self_attn.{letter}_proj.{kind}"] = torch.cat(chosen)
        gate_and_up = weights[f"{ours}mlp.linear_fc1.weight"]
        state |= {
            f"{theirs}input_layernorm.weight": weights[f"{ours}input_layernorm.weight"],
            f"{theirs}post_attention_layernorm.weight": weights[f"{ours}pre_mlp_layernorm.weight"],
            f"{theirs}self_attn.o_proj.weight": weights[f"{ours}self_attention.linear_proj.weight"],
            f"{theirs}mlp.gate_proj.weight": gate_and_up[: shape.ffn_hidden_size],
            f"{theirs}mlp.up_proj.weight": gate_and_up[shape.ffn_hidden_size :],
            f"{theirs}mlp.down_proj.weight": weights[f"{ours}mlp.linear_fc2.weight"],
        }
    return state


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers_qwen2_in_double_precision(tied):
    shape = replace(SHAPE, tied_embeddings=tied, rope_base=1e4)
    weights = random_weights(shape, seed=3, vocab_rows=32)
    tokens = torch.randint(shape.vocab_size, (2, 17), generator=torch.Generator().manual_seed(4))
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    with EverythingDouble(), torch.no_grad():
        model = Qwen2ForCausalLM(config).double()
        model.load_state_dict(qwen2_state(weights, shape))
        expected = model(tokens).logits
    assert expected.dtype == torch.float64
    torch.testing.assert_close(next_token_logits(weights, shape, tokens), expected, rtol=0, atol=1e-13)


def test_losses_of_an_example_do_not_depend_on_its_neighbours():
    weights = random_weights(SHAPE, seed=0)
    examples = random_examples(1, [0, 1, 2, 0])
    together = token_losses(weights, SHAPE, examples)
    for example, losses in zip(examples, together, strict=True):
        torch.testing.assert_close(token_losses(weights, SHAPE, [example])[0], losses, rtol=0, atol=1e-14)


# Losses and gradients.


def test_gradients_are_those_of_the_coefficients_of_each_loss_token():
    """Coefficients as docs/design.md states them: alpha p_s / (n_s t_e), and 1 / validation loss tokens."""
    run = new_run()
    train, validation = random_examples(5, [0, 0, 1]), random_examples(6, [0, 0])
    alpha, p, counts = BILEVEL.penalty_alpha, run.weights, {0: 2, 1: 1}
    upper = {name: weight.clone().requires_grad_() for name, weight in run.upper.items()}
    loss = torch.zeros((), dtype=torch.float64)
    for example in train:
        for token in token_losses(upper, SHAPE, [example])[0]:
            loss += alpha * p[example.source_id] / (counts[example.source_id] * int(example.loss_mask.sum())) * token
    expected_lower = torch.autograd.grad(loss, list(upper.values()), retain_graph=True)
    for example in validation:
        loss += token_losses(upper, SHAPE, [example])[0].sum() / sum(int(e.loss_mask.sum()) for e in validation)
    expected_upper = torch.autograd.grad(loss, list(upper.values()))
    record = run.step(1, train, validation)
    for name, lower, both in zip(upper, expected_lower, expected_upper, strict=True):
        torch.testing.assert_close(record.gradients_lower[name], lower, rtol=0, atol=1e-13)
        torch.testing.assert_close(record.gradients_upper[name], both, rtol=0, atol=1e-13)


def test_units_change_what_a_mean_runs_over():
    train, validation = random_examples(5, [0, 0, 1]), random_examples(6, [0, 0])
    weights = new_run().upper
    losses = [token_losses(weights, SHAPE, [example])[0].tolist() for example in train + validation]
    other = new_run(replace(BILEVEL, train_loss_unit="token", validation_loss_unit="example"))
    paper, other = new_run().step(1, train, validation), other.step(1, train, validation)

    def mean(values):
        return sum(values) / len(values)

    assert paper.train_loss_upper.tolist() == pytest.approx([mean([*map(mean, losses[:2])]), mean(losses[2]), 0.0])
    assert other.train_loss_upper.tolist() == pytest.approx([mean(losses[0] + losses[1]), mean(losses[2]), 0.0])
    assert paper.val_loss.item() == pytest.approx(mean(losses[3] + losses[4]))
    assert other.val_loss.item() == pytest.approx(mean([mean(losses[3]), mean(losses[4])]))


def test_padded_vocabulary_rows_get_no_gradient():
    (record,) = take_steps(new_run(), 1)
    for name in ("output_layer.weight", "embedding.word_embeddings.weight"):
        gradient = record.gradients_upper[name]
        assert gradient.shape[0] == 32 and not gradient[SHAPE.vocab_size :].any() and gradient.any()


# The logits.


def test_hypergradient_equals_finite_differences_of_the_penalty():
    prior, floor = torch.tensor([0.2, 0.5, 0.3]).double().log(), 0.1
    run = new_run(replace(BILEVEL, floor=floor), prior=[0.2, 0.5, 0.3])
    take_steps(run, 3)
    logits, alpha = run.logits.clone(), run.penalty_alpha
    record = run.step(4, random_examples(9, [0, 1, 2]), random_examples(8, [0]))
    gap = record.train_loss_upper - record.train_loss_lower

    def penalty(shift):
        return alpha * source_weights(logits + shift, prior, floor) @ gap

    width = 1e-5  # error: width^2 and 2e-16 / width, both near 1e-10 of the penalty
    differences = [(penalty(width * unit) - penalty(-width * unit)) / (2 * width) for unit in torch.eye(3).double()]
    torch.testing.assert_close(record.hypergradient, torch.stack(differences), rtol=1e-7, atol=1e-10 * alpha)
    assert record.hypergradient.abs().max() > 1e-6


def test_weights_respect_prior_and_floor():
    prior = torch.tensor([0.2, 0.5, 0.3]).double()
    torch.testing.assert_close(source_weights(torch.full((3,), 7.0).double(), prior.log(), 0.0), prior)
    weights = source_weights(torch.tensor([0.0, 0.0, 900.0]).double(), prior.log(), 0.1)
    assert weights.tolist() == pytest.approx([0.1, 0.1, 0.8])


def test_equal_models_give_a_hypergradient_of_exactly_zero():
    (record,) = take_steps(new_run(), 1)
    assert record.penalty_gap == 0 and not record.hypergradient.any()


def test_penalty_hypergradient_approaches_the_implicit_one_on_a_quadratic():
    """L_i = |x - c_i|^2_{A_i} / 2: both levels have closed solutions; the penalty's error is of order 1 / alpha."""
    generator = torch.Generator().manual_seed(2)
    factors = torch.randn(4, 5, 5, generator=generator, dtype=torch.float64)
    matrices = factors @ factors.mT + torch.eye(5)
    centres = torch.randn(4, 5, generator=generator, dtype=torch.float64)  # of three sources and of validation

    def losses(x):
        return 0.5 * torch.einsum("ka,kab,kb->k", x - centres, matrices, x - centres)

    def minimum(coefficients):
        system = torch.einsum("k,kab->ab", coefficients, matrices)
        return torch.linalg.solve(system, torch.einsum("k,kab,kb->a", coefficients, matrices, centres))

    def padded(weights, last):
        return torch.cat([weights, torch.tensor([last], dtype=torch.float64)])

    logits, no_prior = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True), torch.zeros(3).double()
    weights = source_weights(logits, no_prior, 0.0)
    (exact,) = torch.autograd.grad(losses(minimum(padded(weights, 0.0)))[3], logits)
    weights, errors = weights.detach(), []
    for alpha in (1e3, 1e4):
        upper, lower = minimum(padded(alpha * weights, 1.0)), minimum(padded(weights, 0.0))
        gap = (losses(upper) - losses(lower))[:3]
        errors.append((hypergradient(logits, no_prior, 0.0, gap, alpha) - exact).norm() / exact.norm())
    assert errors[0] < 1e-2 and 9 < errors[0] / errors[1] < 11


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("optimizer", ["adamw", "exponentiated_gradient", "sgd"])
def test_logits_optimizers_follow_their_equations(optimizer, schedule):
    run = new_run(replace(BILEVEL, logits_optimizer=optimizer, logits_schedule=schedule, penalty_growth=1.5))
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    adamw = torch.optim.AdamW([logits], lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for step, record in enumerate(take_steps(run, 4), start=1):
        lr = 1e-2 * (step / 4 if schedule == "cosine" else 1)  # warm-up over .1 of 40 steps, where there is a schedule
        alpha, p = 10.0 * 1.5 ** (step - 1), torch.softmax(logits, 0)
        gap = record.train_loss_upper - record.train_loss_lower
        if optimizer == "adamw":
            adamw.param_groups[0]["lr"], logits.grad = lr, alpha * p * (gap - p @ gap)
            adamw.step()
        elif optimizer == "sgd":
            logits = logits - lr * alpha * p * (gap - p @ gap)
        else:
            logits = logits - lr * alpha * (gap - p @ gap)
        torch.testing.assert_close(record.logits, logits, rtol=0, atol=1e-13)
        torch.testing.assert_close(record.weights, torch.softmax(logits, 0), rtol=0, atol=1e-13)
    assert (record.logits - torch.tensor(LOGITS)).abs().min() > 1e-5


# The models.


def test_models_move_as_under_torch_adamw_clip_and_schedule():
    """Six steps over the end of the warm-up, each fed with the recorded gradients; norms and biases do not decay."""
    run = new_run(optimizer=replace(OPTIMIZER, lr_lower=3e-3))
    models = {"lower": (run.lower.copy(), 3e-3), "upper": (run.upper.copy(), 1e-3)}
    records = take_steps(run, 6)
    for role, (start, base) in models.items():
        parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in start.items()}
        groups = [
            {"params": [p for p in parameters.values() if p.ndim == 2], "weight_decay": OPTIMIZER.weight_decay},
            {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=base, betas=(0.9, 0.999), eps=1e-8)
        for step, record in enumerate(records, start=1):
            for name, gradient in getattr(record, f"gradients_{role}").items():
                parameters[name].grad = gradient.clone()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), OPTIMIZER.clip_grad * BILEVEL.penalty_alpha)
            assert norm > OPTIMIZER.clip_grad * BILEVEL.penalty_alpha  # the clip is at work
            torch.testing.assert_close(getattr(record, f"grad_norm_{role}"), norm, rtol=1e-14, atol=0)
            for group in adamw.param_groups:
                group["lr"] = base * [0.25, 0.5, 0.75, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 36))][step - 1]
            adamw.step()
        for name, weight in getattr(run, role).items():
            torch.testing.assert_close(weight, parameters[name].detach(), rtol=0, atol=1e-14)
            assert not torch.equal(weight, start[name])


def test_learning_rate_is_full_after_the_warm_up_and_positive_at_the_end():
    rates = [learning_rate(2.0, "cosine", 4, step, 40) for step in range(1, 41)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[22] == pytest.approx(1.0)  # half-way through the 36 steps of the cosine
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.01
    assert [learning_rate(2.0, "constant", 4, step, 40) for step in (2, 4, 5, 40)] == [1.0, 2.0, 2.0, 2.0]
    assert learning_rate(2.0, "cosine", 0, 1, 40) == 2.0


def test_frozen_layers_stand_still_and_start_anew():
    optimizer = replace(OPTIMIZER, clip_grad=None, schedule="constant", warmup=0.0)
    run = new_run(optimizer=optimizer)
    train, validation = random_examples(1, [0, 1, 2]), random_examples(2, [0])
    active_by_step = [[0, 1], [0, 2], [0, 1]]
    for step, active in enumerate(active_by_step, start=1):
        before = run.upper.copy()
        record = run.step(step, train, validation, active_lower=[2], active_upper=active)
        assert {int(n.split(".")[2]) for n in record.gradients_upper if n.startswith("decoder.layers.")} == set(active)
        for name, weight in run.upper.items():
            in_layer = name.startswith("decoder.layers.")
            frozen = in_layer and int(name.split(".")[2]) not in active
            assert torch.equal(weight, before[name]) == frozen, name
            assert (name in record.gradients_upper) != frozen
    steps = {name: state.step for name, state in run.adamw["upper"].states.items()}
    assert steps["decoder.layers.0.mlp.linear_fc1.weight"] == 3  # stayed active over both redraws
    assert steps["decoder.layers.1.mlp.linear_fc1.weight"] == 1  # came back
    assert steps["embedding.word_embeddings.weight"] == steps["decoder.final_layernorm.weight"] == 3
    assert not any(name.startswith("decoder.layers.2.") for name in steps)
    name = "decoder.layers.1.input_layernorm.weight"  # a first step of AdamW moves by lr * g / (|g| + eps)
    gradient = record.gradients_upper[name]
    expected = before[name] - optimizer.lr * gradient / (gradient.abs() + optimizer.eps)
    torch.testing.assert_close(run.upper[name], expected, rtol=0, atol=1e-15)


def test_fixed_mode_trains_upper_alone_with_constant_weights():
    run = new_run(replace(BILEVEL, mode="fixed"))
    start, weights = run.upper.copy(), run.weights
    train = random_examples(1, [0, 1, 1])
    record = run.step(1, train, [])
    lower = {name: weight.clone().requires_grad_() for name, weight in start.items()}
    losses = [token_losses(lower, SHAPE, [example])[0].mean() for example in train]
    loss = weights[0] * losses[0] + weights[1] * (losses[1] + losses[2]) / 2
    for name, gradient in zip(lower, torch.autograd.grad(loss, list(lower.values())), strict=True):
        torch.testing.assert_close(record.gradients_upper[name], gradient, rtol=0, atol=1e-14)
        assert torch.equal(run.lower[name], start[name]) and not torch.equal(run.upper[name], start[name])
    assert record.hypergradient is None and record.val_loss is None and torch.equal(record.weights, weights)


def test_single_precision_follows_double_precision():
    single, double = new_run(dtype=torch.float32), new_run()
    for one, two in zip(take_steps(single, 2), take_steps(double, 2), strict=True):
        assert one.train_loss_upper.dtype == torch.float32
        torch.testing.assert_close(one.train_loss_upper.double(), two.train_loss_upper, rtol=1e-5, atol=1e-5)
        for name, gradient in one.gradients_upper.items():
            bound = 1e-5 * two.grad_norm_upper.item()
            torch.testing.assert_close(gradient.double(), two.gradients_upper[name], rtol=0, atol=bound)
