"""Names and layouts, against transformers' own tensors and projections.

Shapes: D head size, E examples, G query groups, H hidden, R query heads per group.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_scalebio.anatomy import FAMILIES, padded_vocab_size
from megatron_scalebio.anatomy.tensors import join_shards
from megatron_scalebio.config import ModelConfig, ShapeConfig, UserError
from megatron_scalebio.hf import Checkpoint
from megatron_scalebio.hf.mapping import (
    check_names,
    expected_tensors,
    read_shard,
    to_theirs,
)
from tests.hf.tiny_models import CONFIGS, model_of, random_model

BY_TENSOR_SIZE = [(kind, size) for kind in CONFIGS for size in (1, 2, 4) if kind != "llama3-one-group" or size == 1]


def ours(folder: Path, tensor_size: int = 1) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """The whole model under our names, joined from the shards of all tensor-parallel ranks."""
    model = model_of(folder)
    checkpoint = Checkpoint(folder)
    check_names(checkpoint, model)
    joined = {}
    for name in FAMILIES[model.family].parameters(model.shape):
        shards = [read_shard(checkpoint, model, name, rank, tensor_size) for rank in range(tensor_size)]
        joined[name] = join_shards(FAMILIES[model.family].find(name)[1], shards)
    return model, joined


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, tensor_size", BY_TENSOR_SIZE)
def test_round_trip_is_bit_identical(saved, kind, tensor_size, dtype):
    folder, expected = saved(kind, dtype)
    model, joined = ours(folder, tensor_size)
    theirs = {}
    for name, full in joined.items():
        theirs |= to_theirs(model, name, full)
    if model.shape.tied_embeddings:
        assert to_theirs(model, "output_layer.weight", joined["embedding.word_embeddings.weight"]) == {}
        expected = {name: tensor for name, tensor in expected.items() if name != "lm_head.weight"}
    assert theirs.keys() == expected.keys()
    for name, tensor in expected.items():
        assert theirs[name].dtype == dtype and torch.equal(theirs[name], tensor), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_are_those_of_the_family(saved, kind):
    folder, _ = saved(kind)
    model, joined = ours(folder)
    plan = FAMILIES[model.family]
    layer = {name.removeprefix("decoder.layers.2.") for name in joined if name.startswith("decoder.layers.2.")}
    assert ("self_attention.linear_qkv.bias" in layer) == plan.qkv_bias
    assert ("self_attention.linear_proj.post_norm.weight" in layer) == plan.post_norms
    assert ("mlp.linear_fc2.post_norm.weight" in layer) == plan.post_norms
    assert {"input_layernorm.weight", "pre_mlp_layernorm.weight", "self_attention.linear_qkv.weight"} <= layer
    outer = {name for name in joined if not name.startswith("decoder.layers.")}
    head = set() if model.shape.tied_embeddings else {"output_layer.weight"}
    assert outer == {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", *head}


@pytest.mark.parametrize("kind", CONFIGS)
def test_expected_tensors_are_those_that_transformers_makes(kind):
    model = random_model(CONFIGS[kind](), torch.float32)
    folder_shape = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    config = model.config
    shape = ShapeConfig(
        num_layers=3, hidden_size=48, ffn_hidden_size=80, num_attention_heads=8, vocab_size=config.vocab_size,
        num_query_groups=config.num_key_value_heads, head_size=getattr(config, "head_dim", 6),
        tied_embeddings=config.tie_word_embeddings,
    )  # fmt: skip
    assert expected_tensors(ModelConfig(family=kind.split("-")[0], shape=shape)) == folder_shape


@pytest.mark.parametrize("kind, tensor_size", BY_TENSOR_SIZE)
def test_qkv_rows_are_queries_key_and_value_of_each_group(saved, kind, tensor_size):
    """x times a rank's rows, read group by group as Megatron reads them, equals transformers' projections of x."""
    folder, _ = saved(kind)
    model = model_of(folder)
    attention = random_model(CONFIGS[kind](), torch.float32).model.layers[1].self_attn
    x = torch.randn(7, model.shape.hidden_size)  # [E, H]
    shape = model.shape
    size, groups = attention.head_dim, shape.num_query_groups
    heads_per_group = shape.num_attention_heads // groups
    query = attention.q_proj(x).view(7, shape.num_attention_heads, size)
    key, value = (project(x).view(7, groups, size) for project in (attention.k_proj, attention.v_proj))
    checkpoint = Checkpoint(folder)
    for rank in range(tensor_size):
        prefix = "decoder.layers.1.self_attention.linear_qkv"
        rows = read_shard(checkpoint, model, f"{prefix}.weight", rank, tensor_size)
        mixed = x @ rows.T
        if FAMILIES[model.family].qkv_bias:
            mixed = mixed + read_shard(checkpoint, model, f"{prefix}.bias", rank, tensor_size)
        width = (heads_per_group + 2) * size
        assert mixed.shape[1] == width * groups // tensor_size
        for local in range(groups // tensor_size):
            group = rank * groups // tensor_size + local
            own = mixed[:, local * width : (local + 1) * width]
            for head in range(heads_per_group):
                expected = query[:, group * heads_per_group + head]
                torch.testing.assert_close(own[:, head * size : (head + 1) * size], expected)
            torch.testing.assert_close(own[:, -2 * size : -size], key[:, group])
            torch.testing.assert_close(own[:, -size:], value[:, group])


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_shards_of_the_mlp_add_up_to_transformers_mlp(saved, tensor_size):
    """Each rank's gate, up and down, computed alone and summed over the ranks, are the whole MLP."""
    folder, _ = saved("llama3")
    model = model_of(folder)
    mlp = random_model(CONFIGS["llama3"](), torch.float32).model.layers[2].mlp
    x, total = torch.randn(7, model.shape.hidden_size), 0
    for rank in range(tensor_size):
        fc1, fc2 = (
            read_shard(Checkpoint(folder), model, f"decoder.layers.2.mlp.{name}.weight", rank, tensor_size)
            for name in ("linear_fc1", "linear_fc2")
        )
        gate, up = (x @ fc1.T).chunk(2, dim=-1)
        total = total + (torch.nn.functional.silu(gate) * up) @ fc2.T
    torch.testing.assert_close(total, mlp(x))


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_shards_of_the_output_projection_add_up(saved, tensor_size):
    folder, _ = saved("gemma2")
    model = model_of(folder)
    project = random_model(CONFIGS["gemma2"](), torch.float32).model.layers[0].self_attn.o_proj
    x = torch.randn(7, model.shape.num_attention_heads * model.shape.head_size)
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    shards = [read_shard(Checkpoint(folder), model, name, rank, tensor_size) for rank in range(tensor_size)]
    parts = x.chunk(tensor_size, dim=1)
    total = sum(part @ shard.T for part, shard in zip(parts, shards, strict=True))
    torch.testing.assert_close(total, project(x))


@pytest.mark.parametrize("tensor_size", [1, 2, 4, 128])
@pytest.mark.parametrize("name", ["embedding.word_embeddings.weight", "output_layer.weight"])
def test_the_vocabulary_is_padded_with_zeros(saved, name, tensor_size):
    """Of 301 rows padded to 384, the last ranks of 128 hold nothing but padding."""
    folder, tensors = saved("qwen2")
    model = model_of(folder)
    shards = [read_shard(Checkpoint(folder), model, name, rank, tensor_size) for rank in range(tensor_size)]
    assert {shard.shape for shard in shards} == {(padded_vocab_size(301) // tensor_size, 48)}
    full = torch.cat(shards)
    theirs = "lm_head.weight" if name == "output_layer.weight" else "model.embed_tokens.weight"
    assert torch.equal(full[:301], tensors[theirs]) and not full[301:].any()


def test_the_head_of_a_tied_model_is_its_embedding(saved):
    """A later pipeline stage has a copy of its own to fill."""
    folder, _ = saved("gemma2")
    model = model_of(folder)
    checkpoint = Checkpoint(folder)
    head = read_shard(checkpoint, model, "output_layer.weight", 1, 2)
    embedding = read_shard(checkpoint, model, "embedding.word_embeddings.weight", 1, 2)
    assert torch.equal(head, embedding) and head.data_ptr() != embedding.data_ptr()


@pytest.mark.parametrize("kind, tensor_size", BY_TENSOR_SIZE)
def test_a_shard_is_all_the_memory_that_reading_it_takes(saved, kind, tensor_size):
    """Of torch's allocations, each of which the profiler sees."""
    folder, _ = saved(kind)
    model = model_of(folder)
    checkpoint = Checkpoint(folder)
    for name in FAMILIES[model.family].parameters(model.shape):
        with torch.profiler.profile(profile_memory=True) as profile:
            shard = read_shard(checkpoint, model, name, tensor_size - 1, tensor_size)
        allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
        assert shard.nbytes <= allocated < shard.nbytes + 64, name  # it rounds up
        assert shard.untyped_storage().nbytes() == shard.nbytes and shard.is_contiguous(), name


# Tensors that do not fit.


def single_file(saved, tmp_path: Path, kind: str, change) -> Path:
    """A copy of a checkpoint in one file, with `change` applied to its tensors."""
    folder, _ = saved(kind)
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


def check(folder: Path) -> None:
    check_names(Checkpoint(folder), model_of(folder))


def test_all_tensors_that_do_not_fit_are_told_at_once(saved, tmp_path):
    def change(tensors):
        del tensors["model.layers.1.self_attn.q_proj.bias"]
        tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(6)
        tensors["model.norm.weight"] = torch.ones(47)
        for layer in range(3):
            for name in ("gate", "up"):
                del tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"]

    with pytest.raises(UserError) as error:
        check(single_file(saved, tmp_path, "qwen2", change))
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: ") and "\n" not in message
    assert "missing: model.layers.0.mlp.gate_proj.weight, " in message and "and 2 more" in message
    assert "surplus: model.layers.1.self_attn.q_norm.weight" in message
    assert "misshapen: model.norm.weight is [47] instead of [48]" in message


def test_a_model_with_more_layers_than_its_config_is_refused(saved, tmp_path):
    folder = single_file(saved, tmp_path, "llama3", lambda tensors: None)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    with pytest.raises(UserError, match=r"surplus: model\.layers\.2\.\S+, .* and 4 more$"):
        check(folder)


def test_an_untied_model_needs_its_head(saved, tmp_path):
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        check(single_file(saved, tmp_path, "llama3", lambda tensors: tensors.pop("lm_head.weight")))


def test_harmless_extras_are_ignored(saved, tmp_path):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    check(single_file(saved, tmp_path, "llama3-tied", change))


@pytest.mark.parametrize(
    "head, message",
    [
        (torch.ones(300, 48), r"misshapen: lm_head\.weight is \[300, 48\] instead of \[301, 48\]"),
        (torch.ones(301, 48), r"lm_head\.weight differs from model\.embed_tokens\.weight, although .*tie_word_embed"),
    ],
)
def test_a_tied_models_own_head_must_be_its_embedding(saved, tmp_path, head, message):
    """transformers would not tie such a model."""
    folder = single_file(saved, tmp_path, "qwen2-tied", lambda tensors: tensors.update({"lm_head.weight": head}))
    with pytest.raises(UserError, match=message):
        check(folder)
