"""The house's rules, read from the source: import floors, and where certain imports may stand."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_scalebio

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "megatron_scalebio"
PUBLIC = megatron_scalebio._HOMES  # names of the package itself, and the modules that they come from

# Low to high; a unit imports from lower floors and from itself. A unit is a module or a folder of the package.
FLOORS = (
    ("__init__", "config", "launch", "spans"),
    ("anatomy", "kernels", "device", "run_folder", "losses", "source_weights"),
    ("rules", "resolution"),
    ("active_layers", "data", "hf"),
    ("bilevel", "plan", "show"),
    ("mcore", "checkpoint"),
    ("run",),
    ("trainer", "dry_run"),
    ("compare",),
    ("cli",),
    ("tools", "examples"),
    ("__main__",),
)

# The same inside a folder, whose modules are told apart; `__init__` may import them all.
INNER_FLOORS = {
    "anatomy": (("parameters", "storage", "fields"), ("decoder", "tensors"), ("family",), ("families",)),
    "config": (
        ("errors", "evaluation_sets", "likeness", "words"),
        *(("declare",), ("settings",), ("unknown",), ("loading",)),
    ),
    "hf": (("checkpoint",), ("export", "mapping", "model_card", "model_config")),
    "plan": (
        *(("sizes",), ("memory", "flops"), ("seconds",), ("planner", "utilization")),
        *(("search", "machine"), ("report",)),
    ),
    "show": (("charts", "record", "step_trace", "summary"), ("console", "metrics"), ("writers", "report")),
    "data": (("batch", "records", "shares", "tokenizers"), ("templates",), ("dataset",), ("packing",), ("sampler",)),
    "compare": (("arms", "statistics", "verdict", "page"), ("runs",), ("comparison",)),
    "mcore": (
        ("attention", "host_masters", "memory_tracker", "process_groups", "schedule_spans", "te_linear"),
        ("linear", "parameters"),
        ("recompute", "weight_store"),
        ("active_set", "layers"),
        ("build", "dual_model", "persistence"),
        ("models",),
        ("export", "rehearsal"),
    ),
}

# Where an import, or a use under that name, may stand; everything below a folder counts.
PLACES = {
    "megatron.core": ("megatron_scalebio/mcore", "megatron_scalebio/device.py", "megatron_scalebio/data")
    + ("megatron_scalebio/checkpoint.py",),
    "megatron.training": (),
    "triton": ("kernels",),
    "torch.cuda": ("megatron_scalebio/device.py", "kernels", "megatron_scalebio/mcore", "tools/benchmarks"),
}

FORBIDDEN_NAMES = ("utils.py", "utils", "common.py", "common")


def violations(root: Path) -> list[str]:
    """Every breach of the rules in the product's code below `root`, as FILE:LINE: what."""
    found = []
    for path in sorted(
        path for top in (PACKAGE, "kernels", "tools", "examples") for path in (root / top).rglob("*.py")
    ):
        place = path.relative_to(root)
        found += [f"{place}: the name {part}" for part in place.parts if part in FORBIDDEN_NAMES]
        tree = ast.parse(path.read_text())
        unit = unit_of(place)
        if floor_of(unit) is None:
            found.append(f"{place}: {unit} has no floor")
            continue
        found += [f"{place}:{line}: {breach}" for line, breach in floor_breaches(tree, place, unit)]
        for line, name in [*imported(tree, place), *attributes(tree)]:
            for restricted, places in PLACES.items():
                is_it = name == restricted or name.startswith(restricted + ".")
                if is_it and not any(place.is_relative_to(allowed) for allowed in places):
                    found.append(f"{place}:{line}: {restricted} has no place here")
    return sorted(set(found))


def floor_breaches(tree: ast.AST, place: Path, unit: str) -> Iterator[tuple[int, str]]:
    """(line, what) of every import that does not lead to a lower floor, of the package or of the folder."""
    inner, module = INNER_FLOORS.get(unit), place.parts[-1 if len(place.parts) < 3 else 2].removesuffix(".py")
    if inner and module != "__init__" and floor_of(module, inner) is None:
        yield 1, f"{module} has no floor in {unit}"
    for line, name in imported(tree, place):
        other = unit_of_import(name)
        if other is None:
            continue
        if other != unit:
            if floor_of(other) is None or floor_of(other) >= floor_of(unit):
                yield line, f"{unit} imports {other}, which is not on a lower floor"
        elif inner and module != "__init__" and name.startswith(f"{PACKAGE}.{unit}."):
            beside = name.split(".")[2]
            floor = floor_of(beside, inner)
            if beside != module and (floor is None or floor >= (floor_of(module, inner) or 0)):
                yield line, f"{module} imports {beside}, which is not on a lower floor of {unit}"


def unit_of(place: Path) -> str:
    parts = place.parts[1:] if place.parts[0] == PACKAGE else place.parts
    return parts[0].removesuffix(".py")


def unit_of_import(name: str) -> str | None:
    first, *rest = name.split(".")
    if first in ("tools", "examples"):
        return first
    if first != PACKAGE:
        return None
    return PUBLIC.get(rest[0], rest[0]).split(".")[0] if rest else "__init__"


def floor_of(unit: str, floors: tuple[tuple[str, ...], ...] = FLOORS) -> int | None:
    return next((number for number, floor in enumerate(floors) if unit in floor), None)


def imported(tree: ast.AST, place: Path) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything imported, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = [PACKAGE, *place.parts] if place.parts[0] == "kernels" else list(place.parts)
            base = package[: len(package) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def attributes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every attribute taken of a plain name, such as torch.cuda."""
    for node in ast.walk(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name):
            yield node.lineno, ".".join([inner.id, *reversed(parts)])


def test_imports_go_down_the_floors_and_stand_in_their_places():
    assert violations(REPOSITORY) == []


@pytest.mark.parametrize(
    "file, line, expected",
    [
        ("megatron_scalebio/losses.py", "from megatron_scalebio.bilevel import Bilevel", "losses imports bilevel"),
        ("megatron_scalebio/losses.py", "from megatron_scalebio import bilevel", "losses imports bilevel"),
        ("megatron_scalebio/losses.py", "from .source_weights import x", "losses imports source_weights"),
        ("megatron_scalebio/mcore/models.py", "import megatron_scalebio.trainer", "mcore imports trainer"),
        ("megatron_scalebio/mcore/models.py", "def f():\n    from ..trainer import x", "mcore imports trainer"),
        ("megatron_scalebio/mcore/layers.py", "from megatron_scalebio.mcore.build import x", "layers imports build"),
        ("megatron_scalebio/mcore/layers.py", "from megatron_scalebio.mcore import build", "layers imports build"),
        ("megatron_scalebio/mcore/layers.py", "from .models import x", "layers imports models"),
        ("megatron_scalebio/mcore/novel.py", "import os", "novel has no floor in mcore"),
        ("megatron_scalebio/data/rows.py", "from tools import plan_memory", "data imports tools"),
        ("kernels/loss.py", "from megatron_scalebio.losses import x", "kernels imports losses"),
        ("kernels/loss.py", "from ..losses import x", "kernels imports losses"),
        ("megatron_scalebio/trainer.py", "from megatron_scalebio.unknown import x", "trainer imports unknown"),
        ("megatron_scalebio/novel.py", "import os", "novel has no floor"),
        ("megatron_scalebio/bilevel.py", "import megatron.core", "megatron.core has no place"),
        ("megatron_scalebio/bilevel.py", "from megatron import core", "megatron.core has no place"),
        ("megatron_scalebio/bilevel.py", "from megatron.core.models.gpt import GPTModel", "megatron.core has no place"),
        ("tools/plan.py", "import megatron.training", "megatron.training has no place"),
        ("megatron_scalebio/mcore/models.py", "from megatron.training import x", "megatron.training has no place"),
        ("megatron_scalebio/mcore/models.py", "import triton.language as tl", "triton has no place"),
        ("megatron_scalebio/trainer.py", "import torch\ntorch.cuda.synchronize()", "torch.cuda has no place"),
        ("megatron_scalebio/trainer.py", "from torch import cuda", "torch.cuda has no place"),
        ("tools/plan.py", "import torch.cuda", "torch.cuda has no place"),
        ("megatron_scalebio/data/utils.py", "import os", "the name utils.py"),
        ("megatron_scalebio/common/x.py", "import os", "the name common"),
    ],
)
def test_a_breach_is_found(tmp_path, file, line, expected):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line + "\n")
    assert any(expected in violation for violation in violations(tmp_path))


@pytest.mark.parametrize(
    "file, line",
    [
        ("megatron_scalebio/mcore/models.py", "from megatron.core import x\nfrom megatron_scalebio.bilevel import y"),
        ("megatron_scalebio/mcore/models.py", "from megatron_scalebio.mcore.layers import y\nfrom .build import z"),
        ("megatron_scalebio/device.py", "import torch\nimport megatron.core\ntorch.cuda.is_available()"),
        ("kernels/loss.py", "import triton\nfrom megatron_scalebio.kernels.adamw import x"),
        ("tools/benchmarks/flush.py", "import torch\ntorch.cuda.synchronize()\nfrom megatron_scalebio import trainer"),
        ("megatron_scalebio/losses.py", "import megatron_scalebio\nimport tritonclient\nfrom torch import nn"),
    ],
)
def test_what_is_allowed_is_no_breach(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line + "\n")
    assert violations(tmp_path) == []
