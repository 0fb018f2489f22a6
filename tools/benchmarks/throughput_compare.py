"""Two throughput runs side by side: ratios of their results, and in what else they differ."""

from collections.abc import Iterator
from typing import Any

NUMBER = int | float


def compare(here: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """Ratios, here over there, of every result that both have; and what else differs: device, world size, commit,
    versions, configuration, and how it was run."""
    numbers, others = (
        {key: value for key, value in leaves(side["results"]) if isinstance(value, NUMBER)} for side in (here, there)
    )
    ratios = {key: number / others[key] for key, number in numbers.items() if others.get(key)}
    return {"ratios": ratios, "differs": _differences(here, there)}


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested dictionaries and lists; lists of plain values stay whole."""
    if isinstance(tree, list) and any(isinstance(value, dict) for value in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def _differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    kept = ("device", "world_size", "commit", "versions")
    mine, its = (
        dict(leaves({**{key: side["environment"][key] for key in kept}, "": side["config"], "run": side["run"]}))
        for side in (here, there)
    )
    keys = [*mine, *(key for key in its if key not in mine)]
    return [
        f"{key.lstrip('.')}: {mine.get(key)} here, {its.get(key)} there"
        for key in keys
        if mine.get(key) != its.get(key) and key != ".run.output_dir"
    ]


def comparison_lines(comparison: dict[str, Any], file: str) -> Iterator[str]:
    ratios, differs = comparison["ratios"], comparison["differs"]
    yield f"ratios, here over {file}:"
    width = max(map(len, ratios), default=0)
    yield from (f"  {key.ljust(width)}  {ratio:.3f}" for key, ratio in ratios.items())
    if differs:
        yield "WARNING: the two runs differ in what follows, so the ratios may not be the change you look for:"
        yield from (f"  {line}" for line in differs)
