"""Reading: slices are right and take no more memory than themselves; damaged folders are refused with the names."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_scalebio.config import UserError
from megatron_scalebio.hf import Checkpoint

REPOSITORY = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A checkpoint of several shards, to be damaged."""
    return Path(shutil.copytree(saved("llama3")[0], tmp_path / "checkpoint"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_header(path: Path, change) -> None:
    """Rewrite a file's header; the tensors' bytes stay."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    text = change(header)
    text = (text if isinstance(text, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        Checkpoint(folder)
    assert str(folder) in str(error.value)
    return str(error.value)


# What is there.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices_are_those_of_the_whole_tensor(tmp_path, dtype):
    matrix, vector = torch.randn(12, 10).to(dtype), torch.randn(9).to(dtype)
    save_file({"matrix": matrix, "vector": vector}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.tensors == {"matrix": ((12, 10), dtype), "vector": ((9,), dtype)}
    assert torch.equal(checkpoint.view("matrix"), matrix)
    assert torch.equal(checkpoint.view("matrix")[3:7], matrix[3:7])
    assert torch.equal(checkpoint.view("matrix")[:, 4:6], matrix[:, 4:6])
    assert torch.equal(checkpoint.view("matrix")[:2, 8:], matrix[:2, 8:])
    assert torch.equal(checkpoint.view("vector")[2:5], vector[2:5])


def test_every_tensor_of_every_shard_is_found(saved, folder):
    expected = {name: (tuple(tensor.shape), torch.float32) for name, tensor in saved("llama3")[1].items()}
    assert Checkpoint(folder).tensors == expected


def test_a_header_that_leaves_tensors_unaligned_can_be_read(saved, folder):

    def odd(header):
        text = json.dumps(header)
        return text + " " * (1 - len(text) % 2)

    for path in shards(folder):
        edit_header(path, odd)
    checkpoint = Checkpoint(folder)
    assert all(torch.equal(checkpoint.view(name), tensor) for name, tensor in saved("llama3")[1].items())


def test_reading_takes_the_memory_of_the_slice_alone(tmp_path):
    """Slices of 4 MiB out of 64 MiB each are read where Linux grants the process 40 MiB more than it has."""
    weight_map = {}
    for number in range(3):
        shard = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({f"weight.{number}": torch.full((4096, 4096), number + 1.0)}, tmp_path / shard)
        weight_map[f"weight.{number}"] = shard
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    program = """
import resource, sys
import torch
from megatron_scalebio.hf import Checkpoint

torch.set_num_threads(1)
checkpoint = Checkpoint(sys.argv[1])
assert (torch.zeros(2**20) == 0).all()  # what the first use of torch takes
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (taken + 40 * 2**20,) * 2)
for number in range(3):
    whole = checkpoint.view(f"weight.{number}")
    for dimension in (0, 1):
        part = whole.narrow(dimension, 1024, 256).clone()
        assert part.nbytes == 4 * 2**20 and (part == number + 1).all()
try:
    checkpoint.view("weight.0").clone()
except RuntimeError as error:
    assert "allocate" in str(error)
    print("the limit holds")
"""
    run = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "the limit holds\n", result.stderr


# Folders that are refused.


def test_a_folder_that_is_absent_or_without_config_json_is_refused(folder):
    assert "no such folder" in refusal(folder / "absent")
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


@pytest.mark.parametrize(
    "text, message",
    [("{", "config.json: cannot be read"), ("[]", "not a JSON object"), ('{"a": 1, "a": 2}', "it has a twice")],
)
def test_a_config_json_that_is_no_object_is_refused(folder, text, message):
    (folder / "config.json").write_text(text)
    assert message in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_by_name(folder, name):
    for path in [*shards(folder), folder / INDEX]:
        path.unlink()
    (folder / name).write_bytes(b"\x80\x02")
    message = refusal(folder)
    assert name in message and "pickles execute code" in message


def test_shards_without_an_index_are_named(folder):
    (folder / INDEX).unlink()
    message = refusal(folder)
    assert INDEX in message and shards(folder)[0].name in message and "without an index" in message


def test_a_single_file_beside_an_index_is_refused(folder):
    shutil.copy(shards(folder)[0], folder / "model.safetensors")
    assert f"has both model.safetensors and {INDEX}" in refusal(folder)


def test_all_damaged_shards_are_told_at_once(folder):
    first, second, third, *_ = shards(folder)
    first.unlink()
    os.truncate(second, second.stat().st_size - 1)
    os.truncate(third, 5)
    lines = refusal(folder).splitlines()
    assert len(lines) == 3
    assert f"{INDEX} names {first.name}, which is not there" in lines[0]
    assert f"{second.name} is truncated: {second.stat().st_size} bytes" in lines[1]
    assert f"{third.name}: truncated or not safetensors: 5 bytes" in lines[2]


def test_a_shard_with_bytes_at_its_end_is_refused(folder):
    with shards(folder)[0].open("ab") as file:
        file.write(b"more")
    assert "is damaged" in refusal(folder)


def test_a_shard_that_is_no_safetensors_is_refused(folder):
    shards(folder)[0].write_text("version https://git-lfs.github.com/spec/v1\n" * 4)
    assert "truncated or not safetensors" in refusal(folder)


@pytest.mark.parametrize("where", ["../{0}", "/tmp/{0}", "sub/../../{0}", "..\\{0}", "{0}\0"])
def test_an_index_that_points_outside_the_folder_is_refused(folder, where):
    name = shards(folder)[0].name
    shutil.copy(folder / name, folder.parent / name)
    outside = where.format(name)
    edit_index(folder, lambda weights: weights.update({"model.norm.weight": outside}))
    message = refusal(folder)
    assert f"{INDEX} names {outside!r}, which is outside the folder" in message


def test_a_link_that_leads_outside_the_folder_is_refused(folder):
    path = shards(folder)[1]
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")
    message = refusal(folder)
    assert path.name in message and "elsewhere.safetensors, outside the folder" in message


def test_links_within_the_folder_and_a_link_to_the_folder_are_followed(folder):
    path = shards(folder)[1]
    path.rename(folder / "renamed.bytes")
    path.symlink_to("renamed.bytes")
    (folder.parent / "link").symlink_to(folder)
    assert Checkpoint(folder.parent / "link").view("model.norm.weight").all()


def test_the_links_of_a_hub_cache_are_followed(saved, tmp_path):
    """models--NAME/snapshots/REVISION/ holds links to ../../blobs/HASH."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in saved("llama3")[0].iterdir():
        shutil.copy(path, blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"hash-{path.name}")
    assert Checkpoint(snapshot).tensors.keys() == saved("llama3")[1].keys()


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(folder):
    edit_index(folder, lambda weights: weights.update({"model.layers.9.x.weight": weights["model.norm.weight"]}))
    message = refusal(folder)
    assert re.search(rf"{re.escape(INDEX)} names what \S+\.safetensors lacks: model\.layers\.9\.x\.weight", message)


def test_an_index_that_puts_a_tensor_in_the_wrong_shard_is_refused(folder):
    edit_index(folder, lambda weights: weights.update({"model.norm.weight": shards(folder)[0].name}))
    assert f"{shards(folder)[0].name} lacks: model.norm.weight" in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    first, second, *_ = shards(folder)
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: torch.ones(2)}, second)
    assert f"{name} is in two shards, {first.name} and {second.name}" in refusal(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "weight_map is empty"),
        ('{"weight_map": {"a": 1}}', "no weight_map of tensors to files"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "it has a twice"),
    ],
)
def test_an_index_that_is_none_is_refused(folder, text, message):
    (folder / INDEX).write_text(text)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda entry: entry.update(dtype="F8_E4M3"), "only BF16, F16, F32 tensors can be read, not NAME (F8_E4M3)"),
        (lambda entry: entry.update(dtype="I64"), "not NAME (I64)"),
        (lambda entry: entry.update(dtype=None), "not NAME (None)"),
        (lambda entry: entry.update(dtype="BF16"), "its header gives NAME 192 bytes for BF16 [48]"),
        (lambda entry: entry.update(shape=[48, -1]), "entry of NAME is no tensor"),
        (lambda entry: entry.update(data_offsets=[0]), "entry of NAME is no tensor"),
        (lambda entry: entry.pop("shape"), "entry of NAME is no tensor"),
        (lambda entry: entry.update(data_offsets=[o + 4 for o in entry["data_offsets"]]), "a gap or an overlap"),
    ],
)
def test_headers_that_describe_no_tensors_are_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(48, 2), "NAME": torch.ones(48)}, path)
    edit_header(path, lambda header: change(header["NAME"]))
    text = refusal(tmp_path)
    assert message in text and "model.safetensors" in text


def test_a_header_with_a_tensor_twice_is_refused(folder):
    path = shards(folder)[0]
    entry = '"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    edit_header(path, lambda header: f"{{{entry}, {entry}, {json.dumps(header)[1:]}")
    assert f"{path.name}: it has x twice" in refusal(folder)
