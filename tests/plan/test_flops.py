"""FLOPs by arithmetic equal what torch counts on the real step."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from megatron_scalebio.active_layers import Role
from megatron_scalebio.plan.flops import (
    Work,
    causal_pairs,
    pass_flops,
    six_n_equivalent,
    stage_flops,
    step_flops,
    work_of,
)
from tests.configs import resolved
from tests.distributed import run_distributed
from tests.mcore.runs import MAX_LENGTH, Case, RankRun

Draw = dict[Role, list[int]]


def count_steps(case: Case, draws: list[Draw]) -> list[tuple[int, list[Work], int]]:
    """On every rank, per draw: (stage, work of the train and the validation pass, FLOPs that torch counts in a step).

    The CPU's attention has no formula in torch's registry; it gets that of the CUDA kernels, which counts every query
    of a row with every key of it.
    """
    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    run, found = RankRun(case), []
    for draw in draws:
        run.models.redraw(draw)
        batch = run.batch(1)
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            run.bilevel.step(run.models, 1, batch, draw)
        works = []
        for part in (batch.train, batch.validation):
            positions = sum(len(micro_batch.tokens) for micro_batch in part)
            loss_tokens = sum(len(micro_batch.targets) for micro_batch in part)
            works.append(Work(positions, loss_tokens, positions * MAX_LENGTH, positions * MAX_LENGTH))
        found.append((run.groups.stage, works, counter.get_total_flops()))
    return found


def _attention(query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def both(*layers: int) -> Draw:
    return {role: list(layers) for role in Role}


DRAWS = [both(0, 1), both(1, 3), both(2, 3), {Role.LOWER: [0, 3], Role.UPPER: [2, 3]}]
FROZEN = "lisa.always_active=[final_norm]"
NO_LISA = ("lisa.enabled=false",)


@pytest.mark.parametrize(
    "overrides, world_size, draws",
    [
        ((), 1, DRAWS),
        ((FROZEN,), 1, DRAWS),
        (("lisa.always_active=[head]",), 1, DRAWS),
        (NO_LISA, 1, [both(0, 1, 2, 3)]),
        (("parallel.recompute=selective", FROZEN), 1, DRAWS),
        (("parallel.recompute=full", FROZEN), 1, DRAWS),
        (("bilevel.mode=fixed",), 1, DRAWS),
        (("parallel.tensor=2",), 2, DRAWS),
        (("parallel.tensor=2", "parallel.sequence=true", FROZEN), 2, DRAWS),
        (("parallel.pipeline=2", "parallel.layers_per_stage=[1,3]"), 2, DRAWS),
        (("parallel.pipeline=2", FROZEN, "parallel.recompute=full"), 2, DRAWS),
        ((), 2, DRAWS),  # two data-parallel ranks
    ],
    ids=lambda value: "draws" if isinstance(value, list) else str(value),
)
def test_executed_flops_equal_torchs_count_of_the_real_step(overrides, world_size, draws):
    case = Case(overrides, world_size)
    config = case.config
    ranks = run_distributed(world_size, count_steps, case, draws)
    num_replicas = world_size // (config.parallel.tensor * config.parallel.pipeline)
    for index, draw in enumerate(draws):
        roles = list(Role) if config.bilevel.mode == "bilevel" else [Role.UPPER]
        active = [draw[role] for role in roles]
        for stage, (train, validation), counted in (records[index] for records in ranks):
            passes = [(layers, train) for layers in active]
            passes += [(active[-1], validation)] if len(roles) == 2 else []
            on_rank = [stage_flops(config, stage, *part).executed for part in passes]
            assert counted == sum(on_rank)
        # Every shard of the model runs its replica's work, so one rank per replica tells the whole batch's.
        replicas = [ranks[rank * config.parallel.tensor][index][1] for rank in range(num_replicas)]
        train, validation = (sum(works, Work(0, 0, 0, 0)) for works in zip(*replicas, strict=True))
        total = sum(records[index][2] for records in ranks)
        assert step_flops(config, active, train, validation).executed == total


def test_lisa_on_32b_executes_less_than_full_training():
    """0.685 of the 6 N count with two of 64 layers: the ratio of model FLOPs to those of full training, short rows."""
    config = resolved(
        *("model.shape.num_layers=64", "model.shape.hidden_size=5120", "model.shape.ffn_hidden_size=27648"),
        *("model.shape.num_attention_heads=40", "model.shape.num_query_groups=8", "model.shape.vocab_size=152064"),
    )
    work = Work(positions=1024, loss_tokens=1024, pairs=0, window_pairs=0)
    lisa = pass_flops(config, [20, 40], work).model
    everything = pass_flops(config, range(64), work).model
    assert lisa / everything == pytest.approx(0.685, abs=1e-3)
    embedding_and_vectors = 1.5 * 6 * 1024 * 152_064 * 5120  # 6 N counts a look-up as a product
    assert everything == pytest.approx(six_n_equivalent(config, 1024), abs=embedding_and_vectors)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 9])
def test_attended_pairs_are_those_of_a_written_out_mask(window):
    lengths = [1, 5, 8, 2]
    seen = 0
    for length in lengths:
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        seen += int((mask if window is None else mask.triu(1 - window)).sum())
    assert sum(causal_pairs(length, window) for length in lengths) == seen
    assert work_of(lengths, 16, 9, window) == Work(16, 9, work_of(lengths, 16, 9, None).pairs, seen)


def test_every_other_layer_of_gemma2_counts_its_window():
    shape = ["model.family=gemma2", "model.shape.tied_embeddings=true", "model.shape.sliding_window=4"]
    config = resolved(*shape, "model.shape.num_layers=3")
    pairs, window_pairs = 100, 10
    plain, windowed = Work(0, 0, pairs, pairs), Work(0, 0, pairs, window_pairs)
    assert pass_flops(config, [0], plain).forward == pytest.approx(3 * 4 * 128 * pairs)
    assert pass_flops(config, [0], windowed).forward == 4 * 128 * (2 * window_pairs + pairs)  # layers 0 and 2
