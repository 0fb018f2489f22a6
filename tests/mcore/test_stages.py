"""Pipeline stages of unequal size, and what trains on them: a frozen embedding or head, stages on which nothing trains,
active layers that differ between the models. The results are those of one rank and of the reference, and no gradient is
computed below what trains.
"""

from collections import Counter
from collections.abc import Iterable
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_scalebio.active_layers import Role
from megatron_scalebio.anatomy import padded_vocab_size
from megatron_scalebio.bilevel import StepResult
from megatron_scalebio.plan.sizes import stage_layers as planned_layers
from tests.distributed import run_distributed
from tests.mcore.runs import (
    MAX_LENGTH,
    VOCAB_SIZE,
    Case,
    Place,
    RankRun,
    Step,
    initial_weights,
    join_steps,
    run_case,
    take_steps,
)
from tests.mcore.test_layouts import TIED, check_steps, on_one_rank
from tests.mcore.test_parity import check_gradients, check_losses, check_weights, take_reference_steps

TP2, SP = "parallel.tensor=2", "parallel.sequence=true"
PP2, PP3, PP4 = (f"parallel.pipeline={size}" for size in (2, 3, 4))


def sizes(*layers: int) -> str:
    return f"parallel.layers_per_stage=[{','.join(map(str, layers))}]"


UNEQUAL = {
    "one stage": Case((sizes(4),)),
    "1 + 3": Case((PP2, sizes(1, 3)), 2),
    "3 + 1": Case((PP2, sizes(3, 1)), 2),
    "1 + 2 + 1": Case((PP3, sizes(1, 2, 1)), 3),
    "1 + 3, TP2 with sequence parallelism": Case((TP2, SP, PP2, sizes(1, 3)), 4),
    "tied, 3 + 1": Case((TIED, PP2, sizes(3, 1)), 2),
}
# Active layers of lower and upper by step: on the last stage alone, on the first alone, on both, apart from each other.
DRAWS = (((3,), (3,)), ((0,), (0,)), ((0, 2), (1, 3)), ((3,), (0,)), ((1,), (2,)), ((2,), (2,)))
LAYOUTS = {
    "one rank": ((), 1),
    "PP2": ((PP2,), 2),
    "1 + 2 + 1": ((PP3, sizes(1, 2, 1)), 3),
    "PP4": ((PP4,), 4),
    "TP2xPP2 with sequence parallelism": ((TP2, SP, PP2), 4),
}
ALWAYS_ACTIVE = ["[]", "[final_norm]", "[embedding]", "[head]", "[embedding,final_norm,head]"]


@pytest.mark.parametrize("name", UNEQUAL)
def test_stages_of_unequal_size_change_nothing(name):
    case = UNEQUAL[name]
    check_steps(run_case(case), on_one_rank(*([TIED] if TIED in case.overrides else [])), relative=1e-9)


def layers_of_rank(case: Case) -> tuple[list[int], list[int]]:
    run = RankRun(case)
    return stage_layers(run), list(planned_layers(case.config, run.groups.stage))


@pytest.mark.parametrize("name", UNEQUAL)
def test_each_stage_holds_the_layers_that_are_planned_for_it(name):
    case = UNEQUAL[name]
    ranks = run_distributed(case.world_size, layers_of_rank, case)
    assert all(found == planned for found, planned in ranks)
    held = [found for found, _ in ranks]
    assert [len(held[rank]) for rank in range(0, case.world_size, case.config.parallel.tensor)] == (
        case.config.parallel.layers_per_stage
    )


@pytest.mark.parametrize("always_active", ALWAYS_ACTIVE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_frozen_keeps_its_bits_the_rest_trains_and_no_gradient_is_computed_below_it(always_active, layout):
    overrides, world_size = LAYOUTS[layout]
    case = Case((*overrides, f"lisa.always_active={always_active}"), world_size, steps=len(DRAWS), draws=DRAWS)
    ranks = run_distributed(world_size, take_counted_steps, case)
    check_work(work for _, _, work in ranks)
    check_against_reference(case, join_steps([(place, steps) for place, steps, _ in ranks]))


@pytest.mark.parametrize("always_active", ["[]", "[final_norm]"])
def test_a_tied_embedding_and_head_freeze_together(always_active):
    overrides = (TIED, PP2, f"lisa.always_active={always_active}")
    case = Case(overrides, 2, steps=len(DRAWS), draws=DRAWS)
    check_against_reference(case, run_case(case))


def check_against_reference(case: Case, steps: list[Step]) -> None:
    reference, records = take_reference_steps(case, steps, torch.float64)
    before = dict.fromkeys(Role, initial_weights(case))
    for step, record in zip(steps, records, strict=True):
        check_losses(step, record, relative=1e-12)
        check_gradients(step, record, relative=1e-12)
        check_frozen(step, before)
        before = step.weights
    check_weights(steps[-1].weights[Role.UPPER], reference.upper)
    check_weights(steps[-1].weights[Role.LOWER], reference.lower)


def check_frozen(step: Step, before: dict[Role, dict[str, torch.Tensor]]) -> None:
    for role in Role:
        for name, weight in before[role].items():
            frozen = name not in step.gradients[role]
            assert torch.equal(step.weights[role][name], weight) == frozen, f"{role} {name}"


class CountCalls(TorchDispatchMode):
    """How often each operator runs, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.calls[operator.overloadpacket.__name__] += 1
        return operator(*arguments, **(keywords or {}))


Work = tuple[int, int, int]  # FLOPs of matrix products, calls of attention's forward and backward pass


def take_counted_steps(case: Case) -> tuple[Place, list[Step], list[tuple[Work, Work]]]:
    """On every rank: its steps, and the work of each, found and expected."""
    work, take_step = [], RankRun.take_step

    def counted(run: RankRun) -> StepResult:
        with FlopCounterMode(display=False) as flops, CountCalls() as counter:
            result = take_step(run)
        work.append((found_work(flops, counter), expected_work(run)))
        return result

    with mock.patch.object(RankRun, "take_step", counted):
        return *take_steps(case), work


def found_work(flops: FlopCounterMode, counter: CountCalls) -> Work:
    products = counter_total(flops)
    forward = sum(n for name, n in counter.calls.items() if "attention" in name and not name.endswith("backward"))
    backward = sum(n for name, n in counter.calls.items() if "attention" in name and name.endswith("backward"))
    return products, forward, backward


def expected_work(run: RankRun) -> Work:
    products = forward = backward = 0
    for role, num_micro_batches, num_loss_tokens in passes(run):
        num_tokens = num_micro_batches * run.config.data.micro_batch_size * MAX_LENGTH
        products += linear_flops(run, role, num_tokens) + head_flops(run, num_loss_tokens)
        num_layers, num_above = len(stage_layers(run)), len(layers_with_gradient(run, role))
        recomputed = num_above if run.config.parallel.recompute == "full" else 0
        forward += num_micro_batches * (num_layers + recomputed)
        backward += num_micro_batches * num_above
    return products, forward, backward


def counter_total(flops: FlopCounterMode) -> int:
    """Of all but attention, which torch counts on some devices only."""
    return sum(count for name, count in flops.get_flop_counts()["Global"].items() if "attention" not in str(name))


def passes(run: RankRun) -> list[tuple[Role, int, int]]:
    """Role, micro-batches and loss tokens of each pass of the step."""
    batch = run.batch(run.step)
    train, validation = (
        (len(part), sum(len(each.targets) for each in part)) for part in (batch.train, batch.validation)
    )
    return [(Role.LOWER, *train), (Role.UPPER, *train), (Role.UPPER, *validation)]


def stage_layers(run: RankRun) -> list[int]:
    return [layer.layer_number - 1 for layer in run.models.chunk.models["upper"].decoder.layers]


def layers_with_gradient(run: RankRun, role: Role) -> list[int]:
    lowest = 0 if "embedding" in run.config.lisa.always_active else min(run.active_layers[role])
    return [layer for layer in stage_layers(run) if layer >= lowest]


def linear_flops(run: RankRun, role: Role, num_tokens: int) -> int:
    """Products with the layers' matrices: forward, from the lowest active layer on the input's gradient, and in the
    active ones the weight's. Recomputed are those without which a gradient is not to be had: all but a frozen last."""
    shape, above, active = run.config.model.shape, layers_with_gradient(run, role), run.active_layers[role]
    key_value = shape.num_query_groups * shape.hidden_size // shape.num_attention_heads
    attention, last = 2 * shape.hidden_size * (shape.hidden_size + key_value), shape.hidden_size * shape.ffn_hidden_size
    recomputed = {"none": 0, "selective": 2 * last, "full": attention + 2 * last}[run.config.parallel.recompute]
    numbers = 0
    for layer in stage_layers(run):
        numbers += (attention + 3 * last) * (1 + (layer in above) + (layer in active))
        numbers += (layer in above) * recomputed
        if recomputed and layer in active:
            numbers += last
    return 2 * num_tokens * numbers // run.config.parallel.tensor


def head_flops(run: RankRun, num_loss_tokens: int) -> int:
    """Below the head something always trains."""
    if not run.groups.is_last_stage:
        return 0
    rows = padded_vocab_size(VOCAB_SIZE) // run.config.parallel.tensor
    times = 2 + ("head" in run.config.lisa.always_active)
    return 2 * num_loss_tokens * rows * run.config.model.shape.hidden_size * times


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("layout", ["one rank", "TP2xPP2 with sequence parallelism"])
def test_nothing_is_computed_again_below_the_lowest_layer_that_trains(mode, layout):
    overrides, world_size = LAYOUTS[layout]
    overrides += ("lisa.always_active=[]", f"parallel.recompute={mode}")
    case = Case(overrides, world_size, steps=len(DRAWS), draws=DRAWS)
    check_work(work for _, _, work in run_distributed(world_size, take_counted_steps, case))


def check_work(ranks: Iterable[list[tuple[Work, Work]]]) -> None:
    for steps in ranks:
        for found, expected in steps:
            assert found == expected
