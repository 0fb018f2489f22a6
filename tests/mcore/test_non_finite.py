"""A loss that is not finite on one rank stops every rank before anything has moved."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_scalebio.active_layers import Role
from megatron_scalebio.bilevel import NonFinite
from megatron_scalebio.data import Example
from tests.distributed import run_distributed
from tests.mcore.runs import Case, RankRun, state_tensors

# One example per row: in a packed row a masked-out NaN value still reaches its neighbours.
PADDED = ("data.packing=false", "data.micro_batch_size=1")


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(
    "case, poisoned_rank, named_rank",
    [
        (Case(PADDED), 0, 0),
        (Case(PADDED, 2), 1, 1),
        (Case((*PADDED, "parallel.pipeline=2"), 2), 0, 1),  # the last stage is the one that computes the loss
        (Case((*PADDED, "parallel.tensor=2"), 2), 1, 0),  # NaN crosses tensor parallelism: the lowest rank is named
    ],
    ids=["one rank", "DP2", "PP2", "TP2"],
)
def test_a_poisoned_parameter_on_one_rank_stops_every_rank_before_any_update(case, poisoned_rank, named_rank, role):
    run_distributed(case.world_size, meet_a_nan, case, poisoned_rank, named_rank, role)


@pytest.mark.parametrize("layout", [(), ("parallel.tensor=2",)], ids=["DP2", "TP2"])
def test_a_non_finite_loss_of_one_source_names_that_source_alone(layout):
    run_distributed(2, meet_a_nan_in_one_source, RareToken((*PADDED, *layout), 2))


def snapshot(run: RankRun) -> dict[str, torch.Tensor]:
    return {"logits": run.source_weights.logits.clone(), **state_tensors(run.models)}


def check_unchanged(run: RankRun, before: dict[str, torch.Tensor]) -> None:
    after = snapshot(run)
    assert set(after) == set(before)
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=0, equal_nan=True)


def meet_a_nan(case: Case, poisoned_rank: int, named_rank: int, role: Role) -> None:
    run = RankRun(case)
    run.take_step()
    run.redraw(2)
    if dist.get_rank() == poisoned_rank:
        layer = f"layers.{run.active_layers[role][0]}"
        name = layer if layer in run.blocks(role) else "embedding"
        run.blocks(role)[name].weights.fill_(math.nan)
    before = snapshot(run)
    with pytest.raises(NonFinite) as error:
        run.take_step()
    assert error.value.rank == named_rank
    message = error.value.describe({"train": case.source_names})
    assert message.startswith(f"not finite on rank {named_rank}: loss nan of ")
    other = Role.UPPER if role is Role.LOWER else Role.LOWER
    assert f"in the {role} model" in message and f"in the {other} model" not in message
    check_unchanged(run, before)


@pytest.mark.parametrize("layout", [(), ("parallel.tensor=2",), ("parallel.pipeline=2",)], ids=["DP2", "TP2", "PP2"])
def test_a_gradient_that_overflows_stops_every_rank_though_its_losses_are_finite(layout):
    overflowing = "bilevel.penalty_alpha=1e45"  # finite as a coefficient in fp64, not in fp32
    run_distributed(2, meet_an_overflow, Case(("precision.compute=fp32", overflowing, *layout), 2))


def meet_an_overflow(case: Case) -> None:
    run = RankRun(case)
    run.redraw(1)
    before = snapshot(run)
    with pytest.raises(NonFinite) as error:
        run.take_step()
    message = error.value.describe({"train": case.source_names})
    assert "gradient norm" in message and "of the lower model" in message and "loss" not in message
    check_unchanged(run, before)


class RareToken(Case):
    """Only examples of source 2 hold the token 99."""

    def train_examples(self, step: int) -> list[Example]:
        return [with_token(example, 99 if example.source_id == 2 else 0) for example in super().train_examples(step)]

    def validation_examples(self, step: int) -> list[Example]:
        return [with_token(example, 0) for example in super().validation_examples(step)]


def with_token(example: Example, first: int) -> Example:
    tokens = np.where(example.tokens == 99, 0, example.tokens)
    tokens[0] = first
    return Example(tokens, example.loss_mask, example.source_id)


def meet_a_nan_in_one_source(case: Case) -> None:
    """The embedding's row of a token that one source alone uses is broken, in the upper model."""
    run = RankRun(case)
    run.take_step()
    table = run.blocks(Role.UPPER)["embedding"].parameters[0].tensor.detach()
    row = 99 - run.groups.tensor_rank * len(table)
    if 0 <= row < len(table):
        table[row] = math.nan
    before = snapshot(run)
    with pytest.raises(NonFinite) as error:
        run.take_step()
    assert error.value.describe({"train": case.source_names}).endswith(": loss nan of s2 in the upper model")
    check_unchanged(run, before)
