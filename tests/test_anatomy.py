"""What a family declares is all there is: names, shapes and cuts agree with the models that are built from them."""

import pytest
import torch

from megatron_scalebio.anatomy import FAMILIES, padded_vocab_size
from megatron_scalebio.anatomy.storage import Counting, Item, aligned, flat_layout, padded_block
from megatron_scalebio.anatomy.tensors import join_shards, parts_of, shard, shard_of_parts
from megatron_scalebio.config import ShapeConfig
from megatron_scalebio.device import CPU
from megatron_scalebio.mcore.build import build_model
from megatron_scalebio.mcore.parameters import named_parameters
from megatron_scalebio.mcore.process_groups import start_process_groups
from megatron_scalebio.plan.sizes import layer_numel
from tests.configs import resolved
from tests.distributed import run_distributed

SHAPE = ("model.shape.hidden_size=48", "model.shape.ffn_hidden_size=80", "model.shape.num_attention_heads=8")
SMALL = (*SHAPE, "model.shape.num_query_groups=4", "model.shape.num_layers=2", "precision.compute=fp32")


@pytest.mark.parametrize("vocab_size, padded", [(1, 128), (128, 128), (258, 384), (151_646, 151_680)])
def test_vocabulary_is_padded_to_the_next_multiple_of_128(vocab_size, padded):
    assert padded_vocab_size(vocab_size) == padded


@pytest.mark.parametrize("tensor", [1, 2])
def test_built_models_have_exactly_the_declared_parameters(tensor):
    run_distributed(tensor, check_built, tensor)


def check_built(tensor: int) -> None:
    for name, family in FAMILIES.items():
        tied = "true" if family.always_tied else "false"
        config = resolved(
            *SMALL, f"model.family={name}", f"parallel.tensor={tensor}", f"model.shape.tied_embeddings={tied}"
        )
        groups, shape = start_process_groups(config.parallel, CPU), config.model.shape
        built = {found.name: found for found in named_parameters(build_model(config, groups, CPU), family, groups)}
        declared = family.parameters(shape)
        assert built.keys() == declared.keys(), name
        for key, (block, parameter) in declared.items():
            assert tuple(built[key].tensor.shape) == parameter.shape(shape, tensor), (name, key)
            assert built[key].shape == parameter.shape(shape) and built[key].block == block
            assert (built[key].tensor.ndim == 2) == parameter.is_matrix
        items = [found.item for found in built.values() if found.block == "layers.1"]
        assert flat_layout(items).numel == layer_numel(config.model, tensor), name


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_shards_of_parts_are_shards_of_the_whole_and_come_back(name, tensor):
    """Two ways to a rank's shard: from transformers' tensors, and from our full tensor; and both ways back."""
    shape = ShapeConfig(2, 48, 80, 8, 4, vocab_size=301)
    for key, (_, parameter) in FAMILIES[name].parameters(shape).items():
        full = torch.randn(parameter.shape(shape))
        if parameter.parts[0].dims[0] == "vocabulary":
            full[301:] = 0
        parts = list(parts_of(parameter, full, shape))
        shards = [shard_of_parts(parameter, parts, shape, rank, tensor) for rank in range(tensor)]
        for rank, own in enumerate(shards):
            assert torch.equal(own, shard(parameter, full, rank, tensor)), key
        assert torch.equal(join_shards(parameter, shards), full), key


def test_a_flat_layout_keeps_matrices_first_and_regions_aligned_and_apart():
    replicated, heads = Counting(replicated=True), Counting(replicated=True, sums_over_heads=True)
    items = [
        Item(100, False, replicated),
        Item(300, True, Counting()),
        Item(7, False, heads),
        Item(50, False, Counting()),
    ]
    layout = flat_layout(items)
    assert layout.order == [1, 3, 0, 2] and layout.num_decayed == 300
    assert layout.offsets == [0, 300, 384, 512] and layout.numel == 519
    assert [(region.start, region.stop) for region in layout.regions] == [(0, 350), (384, 484), (512, 519)]
    assert padded_block(519, 2) == 2 * aligned(260) == 768


def test_matrices_of_two_regions_are_decayed_to_the_end_of_the_last():
    layout = flat_layout([Item(100, True, Counting()), Item(50, True, Counting(replicated=True))])
    assert layout.offsets == [0, 128] and layout.num_decayed == layout.numel == 178
