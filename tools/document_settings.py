"""docs/settings.md, made of the settings' declarations: python tools/document_settings.py > docs/settings.md"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from megatron_scalebio.config import PRESETS, Config, Setting
from megatron_scalebio.config.declare import is_section
from megatron_scalebio.rules import declared_settings

OPENING = """# Settings

*Made of the declarations in `megatron_scalebio/config/settings.py`; after a change there:*
`python tools/document_settings.py > docs/settings.md`

A setting is given in a YAML file, or on the command line as `section.key=value`. The preset overrides defaults, the
file the preset, the command line the file. `bilevel.preset=paper` is the original, arXiv 2406.19976 and its authors'
scripts; where it fills a setting otherwise than the preset default, the table says so. Relative paths in a file are
relative to it, on the command line to the working directory. Rules between settings: `megatron_scalebio/rules.py`.
"""


def document() -> str:
    """The whole page."""
    return "\n".join([OPENING, *_sections(Config, "", declared_settings())])


def _sections(schema: type, prefix: str, settings: dict[str, Setting]) -> Iterator[str]:
    """A section with its table, then the sections within it."""
    keys = [f"{prefix}{item.name}" for item in dataclasses.fields(schema)]
    own = [settings[key] for key in keys if key in settings]
    if own:
        rows = [_row(setting) for setting in own]
        head = [
            f"## {prefix.rstrip('.')}\n",
            f"{schema.__doc__}\n",
            "| key | default | allowed | meaning |",
            "|---|---|---|---|",
        ]
        yield "\n".join([*head, *rows, ""])
    for item in dataclasses.fields(schema):
        if is_section(item.type):
            yield from _sections(item.type, f"{prefix}{item.name}.", settings)


def _row(setting: Setting) -> str:
    cells = f"`{setting.key}`", _default(setting), _allowed(setting), setting.doc
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(setting: Setting) -> str:
    """The default, or what the presets fill it with."""
    filled = {name: values[setting.key] for name, values in PRESETS.items() if setting.key in values}
    usual = filled.get("default", setting.default)
    others = [f"; {name}: `{_yaml(value)}`" for name, value in filled.items() if value != usual]
    return f"`{_yaml(usual)}`" + "".join(others)


def _allowed(setting: Setting) -> str:
    if setting.choices:
        choices = ", ".join(f"`{_yaml(choice)}`" for choice in setting.choices)
        return f"some of {choices}" if isinstance(setting.default, list) else choices
    if setting.range is None:
        return setting.expected.replace("a text", "a path") if setting.path else setting.expected
    filled = setting.key in PRESETS["default"]
    return setting.range.words + (", or null" if setting.expected.endswith("null") and not filled else "")


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    print(document(), end="")
