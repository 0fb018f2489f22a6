"""`precision.compute=fp8` with a stand-in for Transformer Engine, whose products are exact: which weights come to it,
where their gradients go, and what is refused. Its own FP8 products need a GPU: tools/benchmarks/te_fp8.sh.

Shapes: T tokens, K input features, N output features.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_scalebio.active_layers import Role
from megatron_scalebio.config import PrecisionConfig, UserError
from megatron_scalebio.mcore.rehearsal import rehearse
from megatron_scalebio.mcore.te_linear import check_transformer_engine
from megatron_scalebio.run import open_run
from tests.distributed import run_distributed
from tests.mcore.runs import Case, RankRun, Shards, small_config

FP8, BF16 = "precision.compute=fp8", "precision.compute=bf16"
TP2_SEQUENCE = ("parallel.tensor=2", "parallel.sequence=true")
CASES = {
    "one rank": (1, ()),
    "tensorwise": (1, ("precision.fp8_recipe=tensorwise",)),
    "TP2": (2, ("parallel.tensor=2",)),
    "TP2 with sequence parallelism, recomputed": (2, (*TP2_SEQUENCE, "parallel.recompute=full")),
    "PP2, selective": (2, ("parallel.pipeline=2", "parallel.recompute=selective")),
    "frozen in FP8": (1, ("precision.frozen_weights=fp8", "parallel.recompute=full")),
    "all layers": (1, ("lisa.enabled=false",)),
}
MODULES = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.common.recipe")
MODULES += ("transformer_engine.common",)


class Float8BlockScaling:
    pass


class Float8CurrentScaling:
    pass


class autocast:  # noqa: N801
    entered: list = []  # recipes, the innermost last

    def __init__(self, *, enabled: bool, recipe: object):
        assert enabled
        self.recipe = recipe

    def __enter__(self) -> None:
        autocast.entered.append(self.recipe)

    def __exit__(self, *_) -> None:
        autocast.entered.pop()


class Linear(torch.nn.Module):
    """Transformer Engine's, as far as `fuse_wgrad_accumulation=True` on weights in bf16 goes."""

    used: list[tuple[Parameter, type]] = []  # weight and recipe of every product

    def __init__(self, in_features, out_features, *, bias, params_dtype, device, fuse_wgrad_accumulation):
        super().__init__()
        assert not bias and fuse_wgrad_accumulation
        self.weight = Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == self.weight.dtype == torch.bfloat16 and x.shape[-1] == self.weight.shape[1]
        Linear.used.append((self.weight, type(autocast.entered[-1])))
        return _Product.apply(x, self.weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        ctx.main_grad = lambda: weight.main_grad  # as Transformer Engine does: a checkpoint's weight has none
        return (x.flatten(0, 1) @ weight.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        ctx.main_grad().addmm_(grad.flatten(0, 1).T.float(), x.flatten(0, 1).float())
        return grad @ weight if ctx.needs_input_grad[0] else None, None


@contextmanager
def standing_in(available: bool = True, reason: str = "") -> Iterator[list[tuple[Parameter, type]]]:
    """The stand-in is what is imported as Transformer Engine. Gives the products that it computes."""
    modules = {name: ModuleType(name) for name in MODULES}
    engine, recipes = modules["transformer_engine.pytorch"], modules["transformer_engine.common.recipe"]
    engine.Linear, engine.autocast = Linear, autocast
    engine.is_fp8_available = engine.is_fp8_block_scaling_available = lambda return_reason: (available, reason)
    modules["transformer_engine"].pytorch, modules["transformer_engine"].common = engine, modules[MODULES[-1]]
    recipes.Float8BlockScaling, recipes.Float8CurrentScaling = Float8BlockScaling, Float8CurrentScaling
    Linear.used.clear()
    sys.modules.update(modules)
    try:
        yield Linear.used
    finally:
        for name in MODULES:
            del sys.modules[name]


def active_matrices(run: RankRun) -> list[Parameter]:
    """The matrices of the decoder layers that train, of both models."""
    blocks = [active.block for role in Role for active in run.models.active_sets[role].blocks.values()]
    parameters = [parameter.tensor for block in blocks if block.is_layer for parameter in block.parameters]
    return [tensor for tensor in parameters if tensor.ndim == 2]


def steps_in_fp8(case: Case) -> tuple[dict[Role, Tensor], dict[Role, Shards]]:
    """On a rank: the first step's losses and gradients. Checks in each step which weights came to the stand-in."""
    recipe = {"blockwise": Float8BlockScaling, "tensorwise": Float8CurrentScaling}[case.config.precision.fp8_recipe]
    with standing_in() as used:
        run = RankRun(case)
        assert not used and not any("_trained_product" in vars(module) for module in run.models.chunk.modules())
        registered = [name for name, _ in run.models.chunk.named_parameters(remove_duplicate=False)]
        first = None
        for _ in range(case.steps):
            used.clear()
            losses = run.take_step().train_loss
            assert {id(weight) for weight, _ in used} == {id(weight) for weight in active_matrices(run)}
            assert {kind for _, kind in used} <= {recipe}
            assert not autocast.entered
            assert all(weight.grad is None for weight in active_matrices(run))
            first = first or (losses, {role: run.gradients(role) for role in Role})
        assert [name for name, _ in run.models.chunk.named_parameters(remove_duplicate=False)] == registered
    return first


def first_step(case: Case) -> tuple[dict[Role, Tensor], dict[Role, Shards]]:
    run = RankRun(case)
    return run.take_step().train_loss, {role: run.gradients(role) for role in Role}


@pytest.mark.parametrize("world_size, overrides", CASES.values(), ids=CASES)
def test_active_matrices_alone_come_to_transformer_engine_and_their_gradients_to_the_fp32_sums(world_size, overrides):
    """In bf16 each micro-batch's gradient of a matrix is rounded before it is added up, here it is not: 2^-9 of it."""
    in_fp8 = run_distributed(world_size, steps_in_fp8, Case((FP8, *overrides), world_size))
    in_bf16 = run_distributed(world_size, first_step, Case((BF16, *overrides), world_size, steps=1))
    num_compared = 0
    for (losses, gradients), (expected_losses, expected_gradients) in zip(in_fp8, in_bf16, strict=True):
        for role in Role:
            assert torch.equal(losses[role], losses[Role.UPPER])
            assert torch.equal(losses[role], expected_losses[role])
            assert gradients[role].keys() == expected_gradients[role].keys()
            for name, expected in expected_gradients[role].items():
                error = (gradients[role][name].tensor - expected.tensor).norm()
                assert error <= 2**-8 * expected.tensor.norm(), name
                num_compared += name.startswith("decoder.layers") and expected.tensor.ndim == 2
    assert num_compared > 0


def test_planning_needs_no_transformer_engine():
    in_fp8, in_bf16 = (
        rehearse(small_config((compute, "bilevel.steps=8")), 1, 0, on_cuda=True) for compute in (FP8, BF16)
    )
    assert in_fp8 == in_bf16


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "A100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))


def refusal(precision: PrecisionConfig) -> str:
    with pytest.raises(UserError) as caught:
        check_transformer_engine(precision)
    return str(caught.value)


def test_what_does_not_compute_in_fp8_needs_nothing():
    check_transformer_engine(PrecisionConfig(compute="bf16", frozen_weights="fp8"))


def test_without_a_gpu_fp8_products_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with standing_in():
        message = refusal(PrecisionConfig(compute="fp8"))
    assert "precision.compute=fp8 with precision.fp8_recipe=blockwise needs a GPU" in message
    assert "use precision.compute=bf16" in message


def test_without_transformer_engine_fp8_products_are_refused(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    message = refusal(PrecisionConfig(compute="fp8"))
    assert "needs Transformer Engine, which cannot be imported (No module named 'transformer_engine" in message
    assert "precision.compute=bf16, with which precision.frozen_weights=fp8 works" in message


@pytest.mark.parametrize("recipe, advice", [("blockwise", True), ("tensorwise", False)])
def test_a_chip_that_is_too_old_is_refused_with_transformer_engines_reason(gpu, recipe, advice):
    with standing_in(available=False, reason="Needs more."):
        message = refusal(PrecisionConfig(compute="fp8", fp8_recipe=recipe))
    assert f"precision.fp8_recipe={recipe}: Needs more. This is A100, compute capability 8.0" in message
    assert ("precision.fp8_recipe=tensorwise, or" in message) == advice
    with standing_in():
        check_transformer_engine(PrecisionConfig(compute="fp8", fp8_recipe=recipe))


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_run_is_refused_before_its_data_are_read_and_a_dry_run_is_not(monkeypatch, tmp_path, dry_run):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    read: list[Callable] = []
    monkeypatch.setattr("megatron_scalebio.run.load_dataset", lambda config, tokenizer: read.append(config))
    settings = [FP8, "data.sources=[{name: a, path: a.jsonl}]", "data.validation=v.jsonl"]
    with nullcontext() if dry_run else pytest.raises(UserError, match="needs a GPU"):
        open_run(None, [*settings, f"run.output_dir={tmp_path}/new"], dry=dry_run)
    assert bool(read) == dry_run
