"""LISA on both models: what is active trains, what is frozen keeps its bits, each byte is where it is meant to be."""

import pytest
import torch
import torch.distributed as dist

from megatron_scalebio.active_layers import Role
from megatron_scalebio.anatomy import padded_vocab_size
from megatron_scalebio.mcore.weight_store import data_parallel_shard
from megatron_scalebio.plan.sizes import rank_bytes
from tests.distributed import run_distributed
from tests.mcore.runs import VOCAB_SIZE, Case, RankRun

LAYOUTS = {
    "one rank": Case(steps=9),
    "independent draws": Case(("lisa.pairing=independent", "lisa.num_active_layers=1"), steps=9),
    "independent draws, bf16": Case(
        ("lisa.pairing=independent", "lisa.num_active_layers=1", "precision.compute=bf16", "optimizer.lr=0.05"), steps=7
    ),
    "independent draws, PP2": Case(
        ("lisa.pairing=independent", "lisa.num_active_layers=1", "parallel.pipeline=2"), 2, steps=7
    ),
    "DP2, bf16": Case(("precision.compute=bf16", "optimizer.lr=0.05"), 2, steps=5),
    "TP2xPP2, tied": Case(("parallel.tensor=2", "parallel.pipeline=2", "model.shape.tied_embeddings=true"), 4, steps=5),
    "PP4, one active layer": Case(("parallel.pipeline=4", "lisa.num_active_layers=1"), 4, steps=5),
    "without LISA": Case(("lisa.enabled=false",), steps=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_after_every_draw_the_active_train_and_the_frozen_keep_their_bits_storage_and_predicted_bytes(name):
    case = LAYOUTS[name]
    draws = run_distributed(case.world_size, follow_draws, case)
    assert all(draw == draws[0] for draw in draws), "the ranks drew different layers"
    if case.config.lisa.enabled:
        assert len(set(draws[0])) > 1


def test_a_pipeline_stage_without_an_active_block_works():
    """The layout above has such stages: of the two in the middle, one active layer leaves one or both without."""
    counts = run_distributed(4, count_active_blocks, LAYOUTS["PP4, one active layer"])
    assert any(0 in of_rank for of_rank in counts[1:3])
    assert all(0 not in of_rank for of_rank in (counts[0], counts[3]))


@pytest.mark.parametrize("case", [Case((), 1), Case((), 2)], ids=["one rank", "DP2"])
def test_the_exact_master_survives_freezing_where_bf16_swallows_the_updates(case):
    """At lr 1e-6 no update reaches a bf16 weight of order 0.1, whose neighbours are 5e-4 apart. Adam's first update of
    a thawed block is lr * sign(gradient); over two activations the signs agree in most elements."""
    overrides = ("precision.compute=bf16", "optimizer.lr=1e-6", "optimizer.schedule=constant", "optimizer.warmup=0")
    overrides += ("optimizer.weight_decay=0", "lisa.num_active_layers=1", "lisa.period=1")
    run_distributed(case.world_size, follow_masters, Case(overrides, case.world_size, steps=9))


def test_ranks_that_disagree_stop_before_any_update():
    for change in ("logits", "active layers", "step"):
        run_distributed(2, disagree, Case(("parallel.tensor=2",), 2), change)


def follow_draws(case: Case) -> list[str]:
    run = RankRun(case)
    always_active = case.config.lisa.always_active
    ever_active = {role: set(always_active) for role in Role}
    initial = {role: {name: block.weights.clone() for name, block in run.blocks(role).items()} for role in Role}
    draws = []
    for step in range(1, case.steps + 1):
        run.redraw(step)
        before = {role: {name: block.weights.clone() for name, block in run.blocks(role).items()} for role in Role}
        run.take_step()
        draws.append(str(run.active_layers))
        active = {role: {*always_active, *(f"layers.{i}" for i in run.active_layers[role])} for role in Role}
        for role in Role:
            ever_active[role] |= active[role]
            check_blocks(run, role, active[role], before[role])
            for name in set(run.blocks(role)) - ever_active[role]:
                assert torch.equal(run.blocks(role)[name].weights, initial[role][name])
        check_storage(run, ever_active)
        check_bytes(run, ever_active)
    return draws


def check_blocks(run: RankRun, role: Role, active: set[str], before: dict[str, torch.Tensor]) -> None:
    assert set(run.models.active_sets[role].blocks) == active & set(run.blocks(role))
    for name, block in run.blocks(role).items():
        for parameter in block.parameters:
            assert parameter.tensor.requires_grad == (name in active)
            assert hasattr(parameter.tensor, "main_grad") == (name in active)
            assert parameter.tensor.grad is None
        if name not in active:
            assert torch.equal(block.weights, before[name]), f"{role} {name} is frozen, but moved"
    gradients = run.gradients(role)
    for name in active & set(run.blocks(role)):
        block = run.blocks(role)[name]
        views = zip(block.parameters, block.views(block.weights), block.views(before[name]), strict=True)
        for parameter, after, earlier in views:
            assert gradients[parameter.name].tensor.count_nonzero() > 0, f"{role} {parameter.name} got no gradient"
            assert not torch.equal(after, earlier), f"{role} {parameter.name} is active, but did not move"
            assert parameter.tensor.data_ptr() == after.data_ptr(), f"{parameter.name} is not a view of its block"


def check_storage(run: RankRun, ever_active: dict[Role, set[str]]) -> None:
    """One storage for both models exactly as long as neither has trained a block."""
    for name, lower in run.blocks(Role.LOWER).items():
        upper = run.blocks(Role.UPPER)[name]
        never = not any(name in ever_active[role] for role in Role)
        for mine, theirs in zip(lower.parameters, upper.parameters, strict=True):
            assert (mine.tensor.data_ptr() == theirs.tensor.data_ptr()) == never, name


def check_bytes(run: RankRun, ever_active: dict[Role, set[str]]) -> None:
    """Gradients, moments and masters, from the shapes of the Qwen-2.5 decoder and by the planner's arithmetic."""
    config, data_size = run.config, run.groups.data.size()
    shape, tensor, stages = config.model.shape, config.parallel.tensor, config.parallel.pipeline
    hidden, ffn, head = shape.hidden_size, shape.ffn_hidden_size, shape.hidden_size // shape.num_attention_heads
    qkv = (shape.num_attention_heads + 2 * shape.num_query_groups) * head
    sharded = (qkv * hidden + qkv + hidden * hidden + 3 * ffn * hidden) // tensor
    layer = -(-sharded // 128) * 128 + 2 * hidden
    table = padded_vocab_size(VOCAB_SIZE) * hidden // tensor
    wide = 8 if config.precision.compute == "fp64" else 4
    masters = 1 if config.precision.compute == "bf16" else 0
    per_stage = shape.num_layers // stages
    expected = 0
    for role in Role:
        numels = [table] if run.groups.is_first_stage else []
        numels += [layer for index in run.active_layers[role] if index // per_stage == run.groups.stage]
        if run.groups.is_last_stage:
            numels.append(hidden)
            if not (shape.tied_embeddings and stages == 1):
                numels.append(table)
        for numel in numels:
            padded = -(-numel // (128 * data_size)) * 128 * data_size
            expected += wide * (padded + (2 + masters) * padded // data_size)
    held = sum(active.num_bytes() for role in Role for active in run.models.active_sets[role].blocks.values())
    assert held == expected

    layers = [{int(n.split(".")[1]) for n in ever_active[role] if n.startswith("layers.")} for role in Role]
    active_layers = [run.active_layers[role] for role in Role]
    plan = rank_bytes(config, data_size, run.groups.stage, active_layers, layers)
    assert held == plan["gradients"] + plan["moments"] + plan["masters"]
    stored = run.models.store.num_bytes()
    assert stored["shared"] + stored["own"] == plan["frozen weights"] + plan["active weights"]
    assert stored["host_masters"] == plan["host masters"]


def count_active_blocks(case: Case) -> list[int]:
    run, counts = RankRun(case), []
    for _ in range(case.steps):
        run.take_step()
        counts.append(len(run.models.active_sets[Role.LOWER].blocks))
    return counts


def follow_masters(case: Case) -> None:
    run = RankRun(case)
    lr = case.config.optimizer.lr
    initial = {role: {name: block.weights.clone() for name, block in run.blocks(role).items()} for role in Role}
    times_active = {role: dict.fromkeys(run.blocks(role), 0) for role in Role}
    masters = {role: {} for role in Role}
    for step in range(1, case.steps + 1):
        run.redraw(step)
        for role in Role:
            for name, active in run.models.active_sets[role].blocks.items():
                if name in masters[role]:
                    assert torch.equal(active.master, masters[role][name]), "thawed from a rounded master"
        run.take_step()
        for role in Role:
            for name, active in run.models.active_sets[role].blocks.items():
                masters[role][name] = active.master.clone()
                times_active[role][name] += 1
                assert torch.equal(active.block.weights[active.shard].float(), active.master.bfloat16().float())
            for kept_role, name in run.models.store.masters:
                assert torch.equal(run.models.store.masters[kept_role, name], masters[kept_role][name])
    for role in Role:
        for name, block in run.blocks(role).items():
            if not name.startswith("layers."):
                continue
            assert times_active[role][name] >= 2
            shard = data_parallel_shard(block.numel, run.groups)
            moved = (masters[role][name] - initial[role][name][shard].float()).abs()
            assert moved.max() > 1.9 * lr
            large = initial[role][name][shard].abs() > 0.01
            assert torch.equal(block.weights[shard][large], initial[role][name][shard][large])


def disagree(case: Case, change: str) -> None:
    run = RankRun(case)
    run.take_step()
    run.redraw(2)
    if dist.get_rank() == 1:
        if change == "logits":
            run.source_weights.logits[0] = torch.nextafter(run.source_weights.logits[0], torch.tensor(9.0).double())
        elif change == "active layers":
            run.active_layers = {**run.active_layers, Role.LOWER: [0]}
        else:
            run.step = 2
    batch, logits = run.batch(2), run.source_weights.logits.clone()
    before = {role: {name: block.weights.clone() for name, block in run.blocks(role).items()} for role in Role}
    with pytest.raises(RuntimeError, match=f"rank {dist.get_rank()}: the ranks disagree"):
        run.bilevel.step(run.models, run.step + 1, batch, run.active_layers)
    assert torch.equal(run.source_weights.logits, logits)
    for role in Role:
        for name, block in run.blocks(role).items():
            assert torch.equal(block.weights, before[role][name])
