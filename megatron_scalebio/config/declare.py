"""How a setting is declared: `setting` beside its field, `declared` to read the declarations off a dataclass."""

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

from megatron_scalebio.config.likeness import nearest

if TYPE_CHECKING:
    # The type of a setting that may be null as it is given, and is not once the preset or `resolution.resolve` has
    # filled it. Checked as what it is then: only what runs before must look for None by itself.
    type Filled[T] = T
else:
    Filled = typing.Optional


@dataclasses.dataclass(frozen=True)
class Range:
    """Which values a setting may have, in words that follow "must be", and as a test. Null is not asked about."""

    words: str
    holds: Callable[[Any], bool]


def at_least(smallest: int) -> Range:
    return Range(f"at least {smallest}", lambda value: value >= smallest)


POSITIVE = Range("positive and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("zero or more, and finite", lambda value: 0 <= value < math.inf)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is declared of one setting."""

    key: str  # "section.name"
    kind: Any  # the field's type
    default: Any
    doc: str
    range: Range | None
    choices: tuple[Any, ...]  # of a list: of each of its items; empty: what the range and the type allow
    path: bool  # names a file or folder
    words: tuple[str, ...]  # values of a path that name no file
    several: str  # what may stand in place of one path, in words; "" if nothing may

    def problem(self, value: Any) -> str | None:
        """The rule that `value` breaks by itself, with the key and the value, or None."""
        if self.choices:
            is_list = isinstance(value, list)
            wrong = [item for item in (value if is_list else [value]) if item not in self.choices]
            if wrong:
                choices = [shown(choice) for choice in self.choices]
                rule = f"some of {', '.join(choices)}; not {wrong[0]}" if is_list else f"one of {', '.join(choices)}"
                return f"{self.key}={value}: must be {rule} (nearest: {nearest(str(wrong[0]), choices)})"
        if self.range is not None and value is not None and not self.range.holds(value):
            return f"{self.key}={value}: must be {self.range.words}"
        return None

    @property
    def expected(self) -> str:
        """The type in words."""
        if self.several:
            return f"a text, {self.several}, or null"
        return " or ".join(_type_words(kind) for kind in _alternatives(self.kind))


def setting(
    default: Any,
    doc: str,
    range: Range | None = None,
    *,
    choices: tuple[Any, ...] = (),
    path: bool = False,
    words: tuple[str, ...] = (),
    several: str = "",
) -> Any:
    """A dataclass field that declares a setting. `doc` says what it means, and what null means where it is allowed."""
    metadata = {"doc": doc, "range": range, "choices": choices, "path": path, "words": words, "several": several}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(schema: type) -> Any:
    """A dataclass field that holds settings of its own."""
    return dataclasses.field(default_factory=schema)


def is_section(kind: Any) -> TypeGuard[type]:
    """Whether a field of this type holds settings of its own."""
    return dataclasses.is_dataclass(kind)


def declared(schema: type, prefix: str = "") -> dict[str, Setting]:
    """{"section.name": declaration} of every setting of a dataclass, sections within sections included."""
    settings: dict[str, Setting] = {}
    for item in dataclasses.fields(schema):
        key = prefix + item.name
        if is_section(item.type):
            settings |= declared(item.type, f"{key}.")
        else:
            default = item.default_factory() if callable(item.default_factory) else item.default
            settings[key] = Setting(key, item.type, default, **item.metadata)
    return settings


def shown(value: Any) -> str:
    """A choice as it is written in YAML."""
    return "null" if value is None else str(value)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """`int | None` -> (int, None's type); a type that is no union is its own alternative."""
    return (kind,) if typing.get_origin(kind) is list else typing.get_args(kind) or (kind,)


def _type_words(kind: Any) -> str:
    if typing.get_origin(kind) is list:
        item = typing.get_args(kind)[0]
        if dataclasses.is_dataclass(item):
            return f"a list of {{{', '.join(entry.name for entry in dataclasses.fields(item))}}}"
        return f"a list of {'integers' if item is int else 'numbers' if item is float else 'texts'}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return words.get(kind, "a mapping or null")  # Any
