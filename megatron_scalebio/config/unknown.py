"""What to say of a key that is no setting: another project's word, a misspelt one, or a colon without its space."""

from typing import Any

from megatron_scalebio.config.likeness import likeness, nearest
from megatron_scalebio.config.settings import SETTINGS
from megatron_scalebio.config.words import ABSENT, HERE, bare

SECTIONS = sorted({key.rpartition(".")[0] for key in SETTINGS})
NO_SPACE = "a space is missing after the colon"
LIKE = 1.3  # a guess must be this like the word: bilevel.penalty_alpha is like bilevel.alpha by 1.32


def unknown(key: str, value: Any) -> list[str]:
    """The messages for a key that is no setting; for one of a section, of what stands in it where that says more."""
    return _hinted(key, value) or [f"unknown setting {key} (docs/settings.md lists them all)"]


def unknown_of_source(key: str, names: list[str]) -> str:
    """The message for a key that is none of a source's `names`."""
    name = bare(key)
    hint = ABSENT.get(name) or f"nearest: {nearest(name, names)}"
    return f"unknown setting {key} ({hint})"


def glued(value: Any, key: str = "") -> str | None:
    """Where a space is missing: the first `name:value` within the value of `key` that YAML took for one word."""
    if isinstance(value, list):
        return next((found for index, item in enumerate(value) if (found := glued(item, f"{key}[{index}]"))), None)
    if not isinstance(value, dict):
        return None
    for name, item in value.items():
        if item is None and ":" in str(name):
            return f"{key}: {NO_SPACE} of {name}".removeprefix(": ")
        if found := glued(item, f"{key}.{name}".removeprefix(".")):
            return found
    return None


def _hinted(key: str, value: Any) -> list[str]:
    """The messages that say what a word is here, what to do instead, or which setting is like it; may be none."""
    level = [section for section in SECTIONS if section.count(".") == key.count(".")]
    name, candidate = bare(key), nearest(key, [*level, *SETTINGS])
    if isinstance(value, dict) and name not in ABSENT and likeness(key, nearest(key, SECTIONS)) < LIKE:
        # torchtune's `_component_` stands in every section of its own and says nothing about this one.
        inner = [(f"{key}.{word}", item) for word, item in value.items() if not str(word).startswith("_")]
        if messages := [message for pair in inner for message in _hinted(*pair)]:
            return messages
    like = f"nearest: {candidate}" if likeness(key, candidate) >= LIKE else None
    hint = ABSENT.get(name) or HERE.get(name) or like
    return [f"unknown setting {key} ({hint})"] if hint else []
