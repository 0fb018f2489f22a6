"""Bytes of a step by arithmetic equal what the real step holds on fake tensors, at the full shape of Qwen-2.5-32B, and
with fewer of its layers, of which each takes as much."""

from dataclasses import replace

import pytest

from megatron_scalebio.config import Config
from megatron_scalebio.mcore.rehearsal import rehearse
from megatron_scalebio.plan.memory import saved_layer_bytes
from megatron_scalebio.plan.planner import draws_of, stage_memory
from megatron_scalebio.plan.sizes import on_device
from tests.configs import resolved
from tests.plan.test_planner import qwen_32b

NOT_TENSORS = ("communication buffers", "allocator reserve")
FP8, FP8_MOMENTS = "precision.frozen_weights=fp8", "optimizer.moments=fp8"


@pytest.mark.parametrize(
    "layers, ranks, overrides",
    [
        (64, (0, 6), ("parallel.tensor=2", "parallel.pipeline=4", "data.micro_batch_size=4")),
        (16, (0, 4), ("parallel.tensor=4", "parallel.pipeline=2", "parallel.sequence=true", FP8)),
        ([1, 2, 2, 3, 3, 2, 2, 1], (0, 3, 7), ("parallel.pipeline=8", FP8)),
        (16, (2,), ("parallel.pipeline=4", FP8, "parallel.recompute=selective", "lisa.always_active=[final_norm]")),
        (16, (0,), ("parallel.pipeline=8", FP8, "parallel.recompute=full", "data.micro_batch_size=4", FP8_MOMENTS)),
    ],
    ids=str,
)
def test_tensors_of_a_step_are_predicted_within_5_percent(layers, ranks, overrides):
    """Over one period, since a rehearsal takes the one whose weights are most, and a plan the one of most in all."""
    config = with_layers(qwen_32b(*overrides, "bilevel.steps=20"), layers)
    data_parallel = 8 // (config.parallel.tensor * config.parallel.pipeline)
    for rank in ranks:
        rehearsed = rehearse(config, 8, rank, on_cuda=True)
        parts = stage_memory(config, data_parallel, rehearsed.stage, draws_of(config)).parts
        tensors = on_device(parts) - sum(parts[part] for part in NOT_TENSORS)
        assert tensors == pytest.approx(rehearsed.peak_bytes, rel=0.05)
        for part in ("frozen weights", "active weights", "gradients", "masters", "moments"):
            assert parts[part] == pytest.approx(rehearsed.parts.get(part, 0), rel=1e-3, abs=1 << 20)
        comes_and_goes = parts["activations"] + parts["loss buffers"]
        others = rehearsed.peak_bytes - sum(rehearsed.parts.get(part, 0) for part in list(parts)[:5])
        assert comes_and_goes == pytest.approx(others, rel=0.1)


def with_layers(config: Config, layers: int | list[int]) -> Config:
    """So many layers in all, equally many on each stage, or as many as are listed for each."""
    stages = config.parallel.pipeline
    counts = layers if isinstance(layers, list) else [layers // stages] * stages
    shape = replace(config.model.shape, num_layers=sum(counts))
    parallel = replace(config.parallel, layers_per_stage=counts)
    return replace(config, model=replace(config.model, shape=shape), parallel=parallel)


@pytest.mark.parametrize("overrides", [(), ("parallel.tensor=2",), ("parallel.recompute=selective",)], ids=str)
def test_norms_of_heads_keep_what_is_planned(overrides):
    """What Qwen-3 keeps more of than Mistral, whose layers are the same without them."""
    shape = {"num_layers": 4, "hidden_size": 2048, "ffn_hidden_size": 6144, "num_attention_heads": 16}
    shape |= {"num_query_groups": 8, "head_size": 128, "vocab_size": 2048}
    settings = [f"model.shape.{key}={value}" for key, value in shape.items()]
    rehearsed, planned = {}, {}
    for family in ("qwen3", "mistral"):
        config = resolved(f"model.family={family}", *settings, "data.max_length=4096", "bilevel.steps=20", *overrides)
        rehearsed[family] = rehearse(config, config.parallel.tensor, 0, on_cuda=True).parts["activations"]
        planned[family] = stage_memory(config, 1, 0, draws_of(config)).parts["activations"]
    more = rehearsed["qwen3"] - rehearsed["mistral"]
    assert planned["qwen3"] - planned["mistral"] == pytest.approx(more, rel=0.01) and more > 2**24


def test_recomputation_and_freezing_keep_less():
    config = qwen_32b()
    kinds = "none", "selective", "full"
    kept = {(kind, trains): saved_layer_bytes(config, trains, kind) for kind in kinds for trains in (False, True)}
    assert kept["full", False] == kept["full", True] == 1024 * 5120 * 2  # a layer's input
    for active in (False, True):
        assert kept["full", active] < kept["selective", active] < kept["none", active]
    assert kept["none", True] - kept["none", False] == 1024 * (2 * 5120 + 27_648) * 2  # inputs of qkv, fc1 and fc2
