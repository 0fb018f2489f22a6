"""`data.validation` and `data.test`: one file, or several sets, each with a name and a weight."""

import math
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class EvaluationSet:
    """A file of records, and what its mean loss counts for: the weights of a setting's sets add up to one."""

    name: str
    path: str
    weight: float = 1.0


KEYS = [field.name for field in fields(EvaluationSet)]


def evaluation_sets(key: str, value: Any) -> list[EvaluationSet]:
    """The sets of a setting that `problems_of_sets` accepts, called `key`; none of null."""
    if value is None:
        return []
    if isinstance(value, str):
        return [EvaluationSet(key.rpartition(".")[2], value)]
    total = sum(item.get("weight", 1.0) for item in value)
    return [EvaluationSet(item["name"], item["path"], item.get("weight", 1.0) / total) for item in value]


def names_of_sets(value: Any) -> list[str]:
    return [each.name for each in evaluation_sets("", value)]


def problems_of_sets(key: str, value: Any) -> list[str]:
    """The rules that a setting's value breaks: a path, null, or a list of {name, path, weight}, names all different and
    weights positive; `weight` may be left out, and is 1 then."""
    if value is None or isinstance(value, str):
        return []
    if not isinstance(value, list) or not value:
        return [f"{key}={value}: must be a path, a list of {{name, path, weight}}, or null"]
    problems = []
    for index, item in enumerate(value):
        where = f"{key}[{index}]"
        if not isinstance(item, dict):
            problems.append(f"{where}={item}: must be {{name, path, weight}}")
            continue
        problems += [f"{where}: unknown key {name}; there are {', '.join(KEYS)}" for name in item if name not in KEYS]
        for name in ("name", "path"):
            if not isinstance(item.get(name), str) or not item[name].strip():
                problems.append(f"{where}: {name}={item.get(name)!r} must be a text that is not empty")
        weight = item.get("weight", 1.0)
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < math.inf:
            problems.append(f"{where}: weight={weight} must be a positive, finite number")
    names = [item["name"] for item in value if isinstance(item, dict) and isinstance(item.get("name"), str)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{key}: {names.count(name)} sets are called {name!r}; names must differ")
    return problems
