"""Parameters and bytes by arithmetic equal what is published, and what the running models hold."""

from dataclasses import replace

import pytest
import torch

from megatron_scalebio.active_layers import Role, draw_active_layers
from megatron_scalebio.anatomy.storage import ALIGNMENT
from megatron_scalebio.config import Config, ModelConfig, ShapeConfig
from megatron_scalebio.kernels import fp8, head_loss, moments
from megatron_scalebio.mcore.models import MegatronModels
from megatron_scalebio.mcore.process_groups import start_process_groups
from megatron_scalebio.plan import memory, sizes
from megatron_scalebio.plan.sizes import layer_parameters, model_parameters, rank_bytes
from tests.configs import resolved
from tests.distributed import run_distributed

VOCAB_SIZE = 258
QWEN3_06B = ShapeConfig(28, 1024, 3072, 16, 8, head_size=128)
GEMMA_2B = ShapeConfig(26, 2304, 9216, 8, 4, head_size=256, tied_embeddings=True)
GEMMA_9B = ShapeConfig(42, 3584, 14_336, 16, 8, head_size=256, tied_embeddings=True)


@pytest.mark.parametrize(
    "family, shape, vocab_size, parameters",
    [
        ("qwen2", ShapeConfig(24, 896, 4864, 14, 2, tied_embeddings=True), 151_936, 494_032_768),  # Qwen2.5-0.5B
        ("qwen2", ShapeConfig(28, 3584, 18_944, 28, 4), 152_064, 7_615_616_512),  # Qwen2-7B, Qwen2.5-7B
        ("qwen2", ShapeConfig(64, 5120, 27_648, 40, 8), 152_064, 32_763_876_352),  # Qwen2.5-32B
        ("llama3", ShapeConfig(32, 4096, 14_336, 32, 8), 128_256, 8_030_261_248),  # Llama-3-8B
        ("llama3", ShapeConfig(16, 2048, 8192, 32, 8, tied_embeddings=True), 128_256, 1_235_814_400),  # Llama-3.2-1B
        ("qwen3", replace(QWEN3_06B, tied_embeddings=True), 151_936, 596_049_920),
        ("qwen3", ShapeConfig(36, 4096, 12_288, 32, 8, head_size=128), 151_936, 8_190_735_360),  # Qwen3-8B
        ("mistral", ShapeConfig(32, 4096, 14_336, 32, 8), 32_000, 7_241_732_096),  # Mistral-7B-v0.1
        ("mistral", ShapeConfig(32, 4096, 14_336, 32, 8), 32_768, 7_248_023_552),  # Mistral-7B-v0.3
        ("gemma2", GEMMA_2B, 256_000, 2_614_341_888),
        ("gemma2", GEMMA_9B, 256_000, 9_241_705_984),
    ],
)
def test_parameters_equal_the_published_models(family, shape, vocab_size, parameters):
    model = ModelConfig(family=family, shape=replace(shape, vocab_size=vocab_size))
    assert model_parameters(model) == parameters


@pytest.mark.parametrize("family, num_norms", [("qwen2", 2), ("llama3", 2), ("mistral", 2), ("gemma2", 4)])
def test_tensor_parallel_ranks_hold_a_layer_and_its_norms_again(family, num_norms):
    model = ModelConfig(family=family, shape=ShapeConfig(24, 896, 4864, 14, 2))
    repeated = num_norms * model.shape.hidden_size
    assert 2 * layer_parameters(model, 2) == layer_parameters(model) + repeated


def a_config(*overrides: str) -> Config:
    return resolved("model.shape.num_layers=6", "model.shape.hidden_size=64", *overrides, vocab_size=VOCAB_SIZE)


def draws_of(config: Config, num_periods: int) -> list[dict[Role, list[int]]]:
    shape = config.model.shape
    return [draw_active_layers(config.lisa, shape.num_layers, config.run.seed, period) for period in range(num_periods)]


def held_bytes(config: Config, num_periods: int) -> list[dict[str, int]]:
    """Bytes that the models' stores hold on this rank after each redraw."""
    torch.set_num_threads(1)
    groups = start_process_groups(config.parallel, torch.device("cpu"))
    models = MegatronModels(config, groups, torch.device("cpu"))
    found = []
    for drawn in draws_of(config, num_periods):
        models.redraw(drawn)
        weights = models.store.num_bytes()
        state = sum(block.num_bytes() for part in models.active_sets.values() for block in part.blocks.values())
        state += sum(adam.nbytes for part in models.active_sets.values() for adam in part.waiting.values())
        found.append(
            {
                "weights": weights["shared"] + weights["own"],
                "state": state,
                "host masters": weights["host_masters"],
                "stage": groups.stage,
            }
        )
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tensor=2", "precision.compute=fp32"],
        ["parallel.pipeline=2", "precision.compute=bf16", "lisa.pairing=independent"],
        ["parallel.pipeline=2", "model.shape.tied_embeddings=true", "precision.compute=fp32"],
        ["precision.compute=bf16", "lisa.pairing=independent"],  # two data-parallel ranks
        ["precision.compute=fp64", "lisa.enabled=false"],
        ["precision.compute=bf16", "lisa.keep_moments=true", "parallel.pipeline=2"],
        ["bilevel.mode=fixed", "precision.compute=bf16"],
        ["model.family=llama3", "model.shape.head_size=10", "parallel.pipeline=2", "precision.compute=bf16"],
        ["model.family=gemma2", "model.shape.head_size=24", "model.shape.tied_embeddings=true", "parallel.tensor=2"],
        ["precision.frozen_weights=fp8", "optimizer.moments=bf16"],  # two data-parallel ranks
        ["precision.frozen_weights=fp8", "optimizer.moments=fp8", "parallel.tensor=2", "model.family=llama3"],
        ["precision.frozen_weights=fp8", "precision.compute=fp32", "lisa.always_active=[final_norm]"],
        ["parallel.pipeline=2", "parallel.layers_per_stage=[2,4]", "lisa.always_active=[head]"],
    ],
    ids=" ".join,
)
def test_bytes_equal_what_the_models_hold_after_every_draw(overrides):
    config, num_periods = a_config(*overrides), 4
    data_parallel = 2 // (config.parallel.tensor * config.parallel.pipeline)
    roles = list(Role) if config.bilevel.mode == "bilevel" else [Role.UPPER]
    for records in run_distributed(2, held_bytes, config, num_periods):
        thawed = [set() for _ in roles]
        for drawn, found in zip(draws_of(config, num_periods), records, strict=True):
            active = [drawn[role] for role in roles]
            thawed = [before | set(layers) for before, layers in zip(thawed, active, strict=True)]
            parts = rank_bytes(config, data_parallel, found["stage"], active, thawed)
            assert parts["frozen weights"] + parts["active weights"] == found["weights"]
            assert parts["gradients"] + parts["masters"] + parts["moments"] == found["state"]
            assert parts["host masters"] == found["host masters"]


def test_constants_that_are_written_down_twice_are_equal():
    assert (sizes.SCALE_BLOCK, ALIGNMENT) == (fp8.SCALE_BLOCK, moments.BLOCK)
    assert memory.LOGITS_CHUNK == head_loss.TOKENS_PER_CHUNK["cuda"]
