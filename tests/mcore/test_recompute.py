"""Recomputation changes what is kept between the passes, and not one bit of the results.

Shapes: T tokens of a micro-batch, H hidden, F feed-forward.
"""

import gc
from dataclasses import dataclass
from unittest import mock
from weakref import WeakSet

import pytest
import torch
from megatron.core.pipeline_parallel import schedules
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_scalebio.active_layers import Role
from megatron_scalebio.bilevel import Bilevel, StepResult
from megatron_scalebio.device import CPU
from megatron_scalebio.mcore import recompute
from megatron_scalebio.mcore.models import MegatronModels
from megatron_scalebio.mcore.process_groups import start_process_groups
from megatron_scalebio.trainer import make_source_weights
from tests.distributed import run_distributed
from tests.mcore.runs import MAX_LENGTH, Case, step_batch

TP2, SP, PP2 = "parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"
FROZEN_EMBEDDING = "lisa.always_active=[final_norm,head]"
GEMMA2 = (
    *("model.family=gemma2", "model.shape.tied_embeddings=true", "model.shape.head_size=12"),
    *("model.shape.query_pre_attn_scalar=10", "model.shape.attention_softcap=1.5", "model.shape.final_softcap=2.0"),
    "model.shape.sliding_window=5",
)
CASES = {
    "one rank": ((), 1),
    "padded": (("data.packing=false",), 1),
    "frozen embedding": ((FROZEN_EMBEDDING,), 1),
    "TP2": ((TP2,), 2),
    "TP2 with sequence parallelism, frozen embedding": ((TP2, SP, FROZEN_EMBEDDING), 2),
    "PP2, 1 + 3": ((PP2, "parallel.layers_per_stage=[1,3]"), 2),
    "PP2, nothing but layers trains": ((PP2, "lisa.always_active=[]"), 2),
    "TP2xPP2 with sequence parallelism": ((TP2, SP, PP2), 4),
    "Gemma-2": (GEMMA2, 1),
    "Gemma-2, PP2, frozen embedding": ((*GEMMA2, PP2, "lisa.always_active=[final_norm]"), 2),
}
DRAWS = (((1, 3), (1, 3)), ((0,), (2,)), ((3,), (0,)))
HIDDEN, FFN = 32, 48  # of runs.SMALL_RUN
TOKENS = 2 * MAX_LENGTH


class Run:
    """A case on one rank, from the product's own random weights: any family."""

    def __init__(self, case: Case):
        self.case, self.groups = case, start_process_groups(case.config.parallel, CPU)
        self.models = MegatronModels(case.config, self.groups, CPU)
        self.bilevel = Bilevel(case.config, make_source_weights(case.config, case.source_names))

    def take_step(self, step: int) -> StepResult:
        active = dict(zip(Role, map(list, self.case.draws[step - 1]), strict=True))
        self.models.redraw(active)
        batch = step_batch(self.case, step, self.groups.data.rank(), self.groups.data.size())
        return self.bilevel.step(self.models, step, batch, active)

    def gradients(self, role: Role) -> dict[str, Tensor]:
        return {name: active.gradient for name, active in self.models.active_sets[role].blocks.items()}


def take_steps(case: Case) -> list[dict[str, Tensor]]:
    """On one rank, of each step: losses, gradients and weights by name."""
    run, steps = Run(case), []
    for step in range(1, case.steps + 1):
        result = run.take_step(step)
        found = {"hypergradient": result.hypergradient, "validation": torch.tensor(result.validation_loss)}
        for role in Role:
            found[f"{role} losses"] = result.train_loss[role]
            found |= {f"{role} {name} gradient": tensor for name, tensor in run.gradients(role).items()}
            for name, block in run.models.store.blocks[role].items():
                for parameter in block.parameters:
                    found[f"{role} {name} {parameter.name}"] = parameter.tensor.detach()
        steps.append({name: tensor.clone() for name, tensor in found.items()})
    return steps


def with_recompute(mode: str, overrides: tuple[str, ...], world_size: int = 1, steps: int = len(DRAWS)) -> Case:
    return Case((*overrides, f"parallel.recompute={mode}"), world_size, steps, draws=DRAWS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_weights_keep_their_bits(name, precision):
    overrides, world_size = CASES[name]
    overrides += (f"precision.compute={precision}",)
    expected = run_distributed(world_size, take_steps, with_recompute("none", overrides, world_size))
    for mode in ("selective", "full"):
        found = run_distributed(world_size, take_steps, with_recompute(mode, overrides, world_size))
        for found_steps, expected_steps in zip(found, expected, strict=True):
            for found_step, expected_step in zip(found_steps, expected_steps, strict=True):
                assert set(found_step) == set(expected_step)
                for key, tensor in expected_step.items():
                    assert torch.equal(found_step[key], tensor), f"{mode}: {key}"


def gradients_with_megatrons_own(case: Case) -> dict[str, Tensor]:
    run = Run(case)
    for model in run.models.chunk.models.values():
        settings = model.config
        settings.recompute_granularity, settings.recompute_method, settings.recompute_num_layers = "full", "uniform", 1
    no_generators = dict(_get_all_rng_states=lambda: (), _set_all_rng_states=lambda *states: None)
    with mock.patch.multiple("megatron.core.tensor_parallel.random", **no_generators):
        run.take_step(1)
    return {f"{role} {name} gradient": tensor for role in Role for name, tensor in run.gradients(role).items()}


def test_megatrons_own_recomputation_loses_gradients_over_a_frozen_embedding():
    """What `recompute.py` says of it, and why it is not used: should this fail, it may be used again."""
    overrides, world_size = CASES["TP2 with sequence parallelism, frozen embedding"]
    case = with_recompute("none", overrides, world_size, steps=1)
    (expected,), _ = run_distributed(world_size, take_steps, case)
    found, _ = run_distributed(world_size, gradients_with_megatrons_own, case)
    lost = {name for name, gradient in found.items() if expected[name].any() and not gradient.any()}
    assert lost == {f"{role} layers.{layer} gradient" for role in Role for layer in DRAWS[0][0]}


@dataclass(eq=False)
class Kept:
    """A tensor, for as long as autograd keeps it."""

    tensor: Tensor


def layers_and_arguments(mode: str, active: tuple[int, ...]):
    """The lower model after a step, and what its layers take: the prepared examples of a micro-batch, and angles."""
    overrides = ("precision.compute=fp32", f"parallel.recompute={mode}", "lisa.always_active=[]")
    run = Run(Case(overrides, draws=((active, active),)))
    run.take_step(1)
    model = run.models.chunk.models[Role.LOWER.value]
    prepared = run.models.chunk.config.core_attention.prepare(step_batch(run.case, 1, 0, 1).train[0], None)
    return model, prepared, model.rotary_pos_emb(TOKENS)


def kept_bytes(mode: str, active: tuple[int, ...]) -> int:
    """What is kept of the lower model's forward pass through its decoder layers, of one micro-batch."""
    model, prepared, angles = layers_and_arguments(mode, active)
    hidden = torch.randn(TOKENS, 1, HIDDEN)
    there_anyway = {address(tensor) for tensor in (*model.parameters(), *tensors_in(prepared), angles)}
    kept: WeakSet[Kept] = WeakSet()

    def keep(tensor: Tensor) -> Kept:
        found = Kept(tensor)
        kept.add(found)
        return found

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda found: found.tensor):
        for layer in model.decoder.layers:
            hidden, _ = layer(hidden_states=hidden, attention_mask=prepared, rotary_pos_emb=angles)
    assert hidden.requires_grad
    sizes = {address(found.tensor): found.tensor.untyped_storage().nbytes() for found in kept}
    return sum(size for place, size in sizes.items() if place not in there_anyway)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_in(prepared) -> list[Tensor]:
    values = prepared.values() if isinstance(prepared, dict) else [prepared]
    return [value for value in values if isinstance(value, Tensor)]


def test_what_is_kept_shrinks_to_the_inputs_of_the_layers():
    none, selective, full = (run_distributed(1, kept_bytes, mode, (0,))[0] for mode in ("none", "selective", "full"))
    layer_input = TOKENS * HIDDEN * 4
    assert full == 4 * layer_input
    assert full < selective < none
    # Of a frozen layer's MLP: its norm's input stays, and gate and up go.
    assert none - selective >= 4 * 2 * TOKENS * FFN * 4


def kept_by_mlps(active: tuple[int, ...]) -> list[int]:
    """Bytes that each layer's MLP keeps, parameters aside, where a gradient passes through."""
    model, _, _ = layers_and_arguments("none", active)
    parameters = {address(parameter) for parameter in model.parameters()}
    sizes = []
    for layer in model.decoder.layers:
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[address(tensor)] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer.mlp(torch.randn(TOKENS, 1, HIDDEN, requires_grad=True))
        found = [tensor for place, tensor in kept.items() if place not in parameters]
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in found))
    return sizes


def test_an_mlp_keeps_gate_and_up_and_if_it_trains_the_inputs_of_its_matrices():
    gate_and_up, inputs = TOKENS * 2 * FFN * 4, TOKENS * (HIDDEN + FFN) * 4
    (found,) = run_distributed(1, kept_by_mlps, (1,))
    assert found == [gate_and_up, gate_and_up + inputs, gate_and_up, gate_and_up]


@pytest.mark.parametrize("mode", recompute.LAYERS)
def test_layers_below_the_lowest_active_one_keep_nothing(mode):
    all_four, last = (run_distributed(1, kept_bytes, mode, (layer,))[0] for layer in (0, 3))
    assert 0 < last < 0.4 * all_four  # the last layer trains: it keeps more than a frozen one


def test_frozen_layers_do_not_keep_the_inputs_of_their_matrices():
    """An active layer over a frozen one, against both active: the inputs of four products, of which the attention's
    output is kept anyway, by the attention."""
    both, one = (run_distributed(1, kept_bytes, "none", active)[0] for active in ((2, 3), (2,)))
    assert both - one >= TOKENS * (2 * HIDDEN + FFN) * 4


class LiveBytes(TorchDispatchMode):
    """Bytes of what operators have made and still is there."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        result = operator(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def count(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


def live_bytes(mode: str) -> tuple[int, list[int]]:
    """After the forward pass through the layers, and as the backward pass comes to each."""
    model, prepared, angles = layers_and_arguments(mode, (0,))
    live, found = LiveBytes(), []
    gc.disable()  # memory that waits for the collector is not free
    with live:
        hidden = torch.randn(TOKENS, 1, HIDDEN)
        for layer in model.decoder.layers:
            hidden, _ = layer(hidden_states=hidden, attention_mask=prepared, rotary_pos_emb=angles)
            hidden.register_hook(lambda gradient: found.append(live.count()))
        after_forward = live.count()
        hidden.sum().backward()
    gc.enable()
    return after_forward, found


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_a_layer_has_computed_again_is_gone_when_the_layer_below_begins(mode):
    ((after_forward, found),) = run_distributed(1, live_bytes, mode)
    assert len(found) == 4
    assert max(found) <= after_forward + 8  # the gradient of the sum: two numbers


def evaluate_without_checkpoints(mode: str) -> None:
    run = Run(with_recompute(mode, ()))
    run.take_step(1)
    batch = step_batch(run.case, 1, 0, 1)
    with mock.patch.object(recompute, "_checkpoint", side_effect=AssertionError("a checkpoint without a gradient")):
        run.models.token_losses(batch.train[0])


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_evaluation_makes_no_checkpoints(mode):
    run_distributed(1, evaluate_without_checkpoints, mode)


def follow_sent_outputs(case: Case) -> list[bool]:
    """Of each output that a stage has sent on and given up: whether its memory was freed."""
    freed, give_up = [], schedules.deallocate_output_tensor

    def watch(output: Tensor | list[Tensor], deallocates: bool) -> None:
        if isinstance(output, list):  # of one, for which it is called again
            give_up(output, deallocates)
            return
        storage = StorageWeakRef(output.untyped_storage())
        give_up(output, deallocates)
        freed.append(storage.expired())

    with mock.patch.object(schedules, "deallocate_output_tensor", watch):
        Run(case).take_step(1)
    return freed


@pytest.mark.parametrize("always_active", ["[]", "[embedding,final_norm,head]"])
@pytest.mark.parametrize("mode", recompute.LAYERS)
def test_what_a_stage_has_sent_on_is_freed(mode, always_active):
    case = with_recompute(mode, (PP2, f"lisa.always_active={always_active}"), 2)
    first, _ = run_distributed(2, follow_sent_outputs, case)
    assert len(first) > 4 and all(first)
