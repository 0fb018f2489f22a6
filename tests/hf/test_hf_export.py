"""Writing: what comes out is a checkpoint that transformers loads whole, and nothing that exists is touched."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_scalebio.anatomy import FAMILIES
from megatron_scalebio.config import ModelConfig, ShapeConfig, UserError
from megatron_scalebio.hf import (
    Checkpoint,
    ShardWriter,
    begin_export,
    export_config,
    finish_export,
    read_config,
    read_shape,
)
from megatron_scalebio.hf.mapping import check_names, read_shard, to_theirs
from tests.hf.tiny_models import CONFIGS, model_of

INDEX = "model.safetensors.index.json"
ALL_IN_ONE = 10**9


def export(
    folder: Path, final: Path, dtype: torch.dtype, max_shard_bytes: int, stages: int = 2, **beside: Path
) -> None:
    """Read a checkpoint as ours and write it again, as that many pipeline stages would; `beside`: see finish_export."""
    model = model_of(folder)
    checkpoint, names = Checkpoint(folder), [*FAMILIES[model.family].parameters(model.shape)]
    partial, shards = begin_export(final), []
    for stage in range(stages):
        writer = ShardWriter(partial, stage, dtype, max_shard_bytes)
        for name in names[len(names) * stage // stages : len(names) * (stage + 1) // stages]:
            full = read_shard(checkpoint, model, name, 0, 1)
            for theirs, tensor in to_theirs(model, name, full).items():
                writer.add(theirs, tensor)
        shards += writer.close()
    config = export_config(model, dtype, read_config(folder))
    finish_export(partial, final, shards, config, source=folder, **beside)


def load(folder: Path):
    """transformers' model, which must not miss, ignore or resize a single tensor."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype="auto"
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_loads_the_export_with_identical_logits(saved, tmp_path, kind, dtype):
    folder, _ = saved(kind, dtype)
    export(folder, tmp_path / "hf", dtype, max_shard_bytes=40_000)
    before, after = load(folder), load(tmp_path / "hf")
    assert after.dtype == dtype
    tokens = torch.arange(20)[None] * 5  # longer than Gemma-2's window
    assert torch.equal(before(tokens).logits, after(tokens).logits)
    ours, theirs = after.config.to_dict(), before.config.to_dict()
    assert {name for name in theirs if ours.get(name) != theirs[name]} <= {"_name_or_path", "hidden_act"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_config_json_alone_makes_the_same_model(saved, tmp_path, kind):
    """Without a source: of random weights. The shape that is read back from it is the same."""
    model = model_of(saved(kind)[0])
    tmp_path.joinpath("config.json").write_text(json.dumps(export_config(model, torch.bfloat16)))
    assert model_of(tmp_path) == model
    theirs, own = AutoConfig.from_pretrained(tmp_path), CONFIGS[kind]()
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (None, None, None)
    not_carried = {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"}
    described = {"architectures", "dtype", "_name_or_path", "hidden_act"}
    differs = {name for name, value in own.to_dict().items() if theirs.to_dict().get(name) != value}
    assert differs <= not_carried | described


def test_gemma2_without_a_window_or_softcaps_round_trips(tmp_path):
    shape = ShapeConfig(4, 64, 96, 4, 2, 301, 1e4, 1e-6, tied_embeddings=True, head_size=16, query_pre_attn_scalar=16.0)
    config = export_config(ModelConfig(family="gemma2", shape=shape), torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape(tmp_path) == ("gemma2", shape)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_shards_keep_to_the_limit_and_the_index_is_right(saved, tmp_path):
    folder, tensors = saved("qwen2")
    export(folder, tmp_path / "hf", torch.float32, max_shard_bytes=40_000, stages=3)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    index, seen = json.loads((tmp_path / "hf" / INDEX).read_text()), set()
    for file in files:
        with safe_open(tmp_path / "hf" / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            names = set(shard.keys())
            assert all(index["weight_map"][name] == file for name in names) and not names & seen
            seen |= names
            size = sum(tensors[name].nbytes for name in names)
            assert size <= 40_000 or len(names) == 1
    assert seen == index["weight_map"].keys() == tensors.keys()
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}


def test_a_single_shard_has_no_index(saved, tmp_path):
    folder, tensors = saved("qwen2-tied")
    export(folder, tmp_path / "hf", torch.float32, ALL_IN_ONE, stages=1)
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json",
    }  # fmt: skip
    assert Checkpoint(tmp_path / "hf").tensors.keys() == tensors.keys() - {"lm_head.weight"}
    assert os.stat(tmp_path / "hf/model.safetensors").st_mode == os.stat(tmp_path / "hf/config.json").st_mode


def test_a_writer_holds_one_shard_at_most(tmp_path):
    writer = ShardWriter(begin_export(tmp_path / "hf"), 0, torch.bfloat16, max_shard_bytes=2000)
    for number in range(20):
        writer.add(f"x.{number}", torch.ones(300))
        assert sum(tensor.nbytes for tensor in writer._held.values()) <= 2000
    assert [len(shard.tensors) for shard in writer.close()] == [3] * 6 + [2]


def test_a_writer_takes_a_copy(tmp_path):
    """A parameter may train on, and a view of a large tensor must not keep it."""
    writer = ShardWriter(begin_export(tmp_path / "hf"), 0, torch.float32, ALL_IN_ONE)
    tensor = torch.ones(4, 4)
    writer.add("x", tensor.T[1:])
    tensor.zero_()
    finish_export(tmp_path / "hf.partial-1", tmp_path / "hf", writer.close(), {})
    assert torch.equal(Checkpoint(tmp_path / "hf").view("x"), torch.ones(3, 4))


def test_nothing_that_exists_is_overwritten_or_deleted(saved, tmp_path):
    final = tmp_path / "hf"
    left = begin_export(final)
    (left / "precious").write_text("x")
    export(saved("llama3")[0], final, torch.float32, ALL_IN_ONE)
    assert (left / "precious").read_text() == "x" and sorted(os.listdir(tmp_path)) == ["hf", "hf.partial-1"]
    before = sorted(os.listdir(final))
    with pytest.raises(UserError, match="hf exists, and is not overwritten"):
        export(saved("qwen2")[0], final, torch.float32, ALL_IN_ONE)
    assert sorted(os.listdir(final)) == before


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_what_appears_under_the_final_name_meanwhile_is_left_alone(tmp_path, make):
    final = tmp_path / "hf"
    partial = begin_export(final)
    writer = ShardWriter(partial, 0, torch.float32, ALL_IN_ONE)
    writer.add("x", torch.ones(2))
    make(final)
    with pytest.raises(UserError, match="hf exists"):
        finish_export(partial, final, writer.close(), {})
    assert (partial / "model.safetensors").is_file()
    with pytest.raises(UserError, match="hf exists"):
        begin_export(final)


def test_a_tensor_written_by_two_stages_is_an_error(tmp_path):
    partial, shards = begin_export(tmp_path / "hf"), []
    for stage in range(2):
        writer = ShardWriter(partial, stage, torch.float32, ALL_IN_ONE)
        writer.add("lm_head.weight", torch.ones(2))
        shards += writer.close()
    with pytest.raises(ValueError, match="lm_head.weight"):
        finish_export(partial, tmp_path / "hf", shards, {})


TOKENIZER_FILES = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "tokenizer.model", "spiece.model",
}  # fmt: skip


def test_tokenizer_files_go_along_and_nothing_else(saved, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in (*TOKENIZER_FILES, "README.md", "pytorch_model.bin", "training_args.json"):
        (tokenizer / name).write_text(name)
    export(saved("llama3")[0], tmp_path / "hf", torch.float32, ALL_IN_ONE, stages=1, tokenizer=tokenizer)
    written = {path.name for path in (tmp_path / "hf").iterdir()}
    assert written == TOKENIZER_FILES | {"model.safetensors", "config.json", "generation_config.json"}
    assert all((tmp_path / "hf" / name).read_text() == name for name in TOKENIZER_FILES)


def test_the_chat_template_of_the_run_stands_for_the_tokenizers(saved, tmp_path):
    """Also where the tokenizer keeps its own in tokenizer_config.json, as older ones do."""
    tokenizer, template = tmp_path / "tokenizer", tmp_path / "mine.jinja"
    letters = Tokenizer(models.BPE({"a": 0}, []))
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>").save_pretrained(tokenizer)
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "old"}))
    template.write_text("{% for message in messages %}[{{ message.content }}]{% endfor %}")
    arguments = dict(tokenizer=tokenizer, template=template)
    export(saved("llama3")[0], tmp_path / "hf", torch.float32, ALL_IN_ONE, **arguments)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"


def test_a_sentencepiece_model_goes_along(saved, tmp_path):
    (tmp_path / "mine.model").write_text("x")
    export(saved("llama3")[0], tmp_path / "hf", torch.float32, ALL_IN_ONE, tokenizer=tmp_path / "mine.model")
    assert (tmp_path / "hf" / "tokenizer.model").read_text() == "x"


def test_transformers_loads_the_tokenizer_that_went_along(saved, tmp_path):
    tokenizer = (
        Path(os.environ.get("MEGATRON_SCALEBIO_SHARED", Path(__file__).parents[3] / "shared")) / "tokenizers/qwen2"
    )
    if not tokenizer.is_dir():
        pytest.skip(f"no {tokenizer}")
    export(saved("qwen2")[0], tmp_path / "hf", torch.float32, ALL_IN_ONE, tokenizer=tokenizer)
    text = "Two plus two is 4. 你好"
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "hf"), AutoTokenizer.from_pretrained(tokenizer)
    assert ours(text)["input_ids"] == theirs(text)["input_ids"] and ours.chat_template == theirs.chat_template


def test_a_converted_export_rounds_once(saved, tmp_path):
    """fp32 weights exported as bf16 are those that torch rounds; the folder passes the checks of a checkpoint."""
    folder, tensors = saved("gemma2")
    export(folder, tmp_path / "hf", torch.bfloat16, max_shard_bytes=40_000)
    checkpoint = Checkpoint(tmp_path / "hf")
    check_names(checkpoint, model_of(tmp_path / "hf"))
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.view(name), tensors[name].to(torch.bfloat16)), name
