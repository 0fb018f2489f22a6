"""Reading a Hugging Face checkpoint folder: every header first, then slices of tensors out of memory maps.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes without gaps:
{"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {...}}
"""

import json
import math
import mmap
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from megatron_scalebio.config import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

# PyTorch's own files are pickles.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """A checkpoint folder whose headers have all been read and found consistent; no tensor has been touched.

    Raises: UserError naming everything that is wrong with the folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        read_config(self.folder)
        problems: list[str] = []
        self._places: dict[str, _Place] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        shards, index = _shards(self.folder, problems)
        for shard in shards:
            for name, place in _read_header(self.folder, shard, problems).items():
                other = self._places.setdefault(name, place)
                if other is not place:
                    problems.append(f"{name} is in two shards, {_relative(other.file, self.folder)} and {shard}")
        missing: dict[str, list[str]] = {}
        for name, shard in index.items():
            place = self._places.get(name)
            if shard in shards and (place is None or place.file != self.folder / shard):
                missing.setdefault(shard, []).append(name)
        if not problems:  # a shard that could not be read lacks everything
            problems += [f"{INDEX} names what {shard} lacks: {listed(names)}" for shard, names in missing.items()]
        if problems:
            raise UserError("\n".join(f"{self.folder}: {problem}" for problem in problems))

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """{name: (shape, dtype)}."""
        return {name: (place.shape, place.dtype) for name, place in self._places.items()}

    def view(self, name: str) -> Tensor:
        """The tensor as it lies in its file's memory map: pages are read when they are looked at, and belong to the
        system's cache. It must not be written to."""
        place = self._places[name]
        if place.file not in self._maps:
            with place.file.open("rb") as file:
                self._maps[place.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # nobody writes
            flat = torch.frombuffer(
                self._maps[place.file], dtype=place.dtype, count=math.prod(place.shape), offset=place.offset
            )
        return flat.view(place.shape)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises: UserError if there is no such folder or file, or it is not a JSON object.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; expected a Hugging Face checkpoint (nothing is fetched: no names of the Hub)"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no config.json; expected a Hugging Face checkpoint")
    try:
        return _json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def listed(names: list[str]) -> str:
    """The first few of them."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _shards(folder: Path, problems: list[str]) -> tuple[list[str], dict[str, str]]:
    """(the shards to read, the index's {tensor: shard}, empty where there is no index)."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        problems.append(f"has both {SINGLE} and {INDEX}: remove the one that is not the model")
        return [], {}
    if single.is_file():
        return ([SINGLE] if _is_inside(folder, SINGLE, "", problems) else []), {}
    if not index.is_file():
        problems.append(_what_is_there(folder))
        return [], {}
    try:
        weight_map = _json_object(index.read_bytes()).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("it has no weight_map of tensors to files")
        if not weight_map:
            raise ValueError("its weight_map is empty")
    except (OSError, ValueError) as error:
        problems.append(f"{INDEX} cannot be read: {error}")
        return [], {}
    shards = [
        shard for shard in sorted(set(weight_map.values())) if _is_inside(folder, shard, f"{INDEX} names ", problems)
    ]
    return shards, weight_map


def _what_is_there(folder: Path) -> str:
    missing = f"has neither {SINGLE} nor {INDEX}"
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{missing}; {listed(pickles)}: pickles execute code when they are loaded and are not read; convert them"
            " with transformers' save_pretrained where you trust them"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    return f"{missing}" + (f"; {listed(others)} cannot be told apart without an index" if others else "")


def _is_inside(folder: Path, shard: str, who: str, problems: list[str]) -> bool:
    """Whether a shard is a file below the folder; a link may also lead to the blobs of a Hugging Face hub cache,
    whose snapshots/REVISION/ holds nothing but links to them."""
    pure = PurePosixPath(shard)
    if pure.is_absolute() or ".." in pure.parts or "\\" in shard or "\0" in shard:
        problems.append(f"{who}{shard!r}, which is outside the folder")
        return False
    home = folder.resolve()
    allowed = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    real = (folder / shard).resolve()
    if not any(real.is_relative_to(place) for place in allowed):
        problems.append(f"{who}{shard}, which is a link to {real}, outside the folder")
        return False
    if not real.is_file():
        problems.append(f"{who}{shard}, which is not there")
        return False
    return True


def _read_header(folder: Path, shard: str, problems: list[str]) -> dict[str, _Place]:
    path = folder / shard
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if size < start:
                raise ValueError(
                    f"truncated or not safetensors: {size} bytes, and its header alone would end at {start}"
                )
            entries = _json_object(file.read(start - 8))
        entries.pop("__metadata__", None)
        places, end = _places(path, entries, start)
    except (OSError, ValueError) as error:
        problems.append(f"{shard}: {error}")
        return {}
    if size != end:
        word = "truncated" if size < end else "damaged"
        problems.append(f"{shard} is {word}: {size} bytes, and its header describes {end}")
    return places


def _places(path: Path, entries: dict[str, Any], start: int) -> tuple[dict[str, _Place], int]:
    """(where each tensor of a header lies, where the last one ends).

    Raises: ValueError for anything else than tensors of a known dtype, one after the other.
    """
    spans: list[tuple[int, int, str]] = []
    places: dict[str, _Place] = {}
    unknown: list[str] = []
    for name, entry in entries.items():
        try:
            shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            code = entry["dtype"]
            if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"its header's entry of {name} is no tensor: {str(entry)[:80]}") from None
        spans.append((begin, end, name))
        dtype = DTYPES.get(code) if isinstance(code, str) else None
        if dtype is None:
            unknown.append(f"{name} ({code})")
            continue
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"its header gives {name} {end - begin} bytes for {code} {list(shape)}")
        places[name] = _Place(path, start + begin, shape, dtype)
    if unknown:
        raise ValueError(f"only {', '.join(DTYPES)} tensors can be read, not {listed(unknown)}")
    spans.sort()
    last = 0
    for begin, end, name in spans:
        if begin != last:
            raise ValueError(f"its header leaves a gap or an overlap before {name}")
        last = end
    return places, start + last


def _json_object(text: bytes) -> dict[str, Any]:
    """Raises: ValueError unless it is a JSON object without duplicate keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)} twice")
        return result

    content = json.loads(text, object_pairs_hook=unique)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
