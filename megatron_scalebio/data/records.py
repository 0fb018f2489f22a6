"""Records: JSON Lines, or one JSON array, in five shapes told apart by their keys.

| keys | shape |
|---|---|
| `prompt`, `response` | one turn |
| `messages` | `[{"role", "content"}]`, roles system, user, assistant |
| `instruction`, `output`, optional `input` | Alpaca |
| `conversations` or `items` | ShareGPT, `[{"from", "value"}]`, from system, human or user, gpt or assistant |
| `text` | plain text, no turns |

A record may hold other keys too. Where it fits two shapes the upper one of this table counts.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_scalebio.config import UserError

SHOWN_PROBLEMS = 5
_SPACE = re.compile(r"[ \t\r\n]*")
_CHAT_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {**_CHAT_ROLES, "human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Message:
    """One turn. `input` is an Alpaca record's; templates without a place for it use `text`."""

    role: str  # system | user | assistant
    content: str
    input: str = ""

    @property
    def text(self) -> str:
        return f"{self.content}\n{self.input}" if self.input else self.content


@dataclass(frozen=True)
class Record:
    """Either `messages`, the last from the assistant, or `text`; never both."""

    location: str  # file:line, for error messages
    messages: tuple[Message, ...] = ()
    text: str = ""


def path_problem(path: str) -> str | None:
    """What makes `path` unreadable as a file of records, or None."""
    if not os.path.exists(path):
        return f"{path}: no such file"
    if os.path.isdir(path):
        return f"{path}: is a folder; give one .jsonl or .json file"
    if os.path.getsize(path) == 0:
        return f"{path}: the file is empty"
    return None


def raise_problems(setting: str, problems: list[str]) -> None:
    """Raises one UserError that shows the first few of `problems`, each of which names its file and line.

    Raises:
        UserError: if there is any problem.
    """
    if not problems:
        return
    surplus = len(problems) - SHOWN_PROBLEMS
    lines = problems[:SHOWN_PROBLEMS] + ([f"... and {surplus} more"] if surplus > 0 else [])
    raise UserError(f"{setting}: " + (lines[0] if len(lines) == 1 else "\n  ".join(["", *lines])))


def read_records(path: str, setting: str) -> list[Record]:
    """Reads every record of `path`; `setting` is the configuration key (and source) that names the file.

    Raises:
        UserError: the file cannot be read or holds no record, or some of its records break a rule: one message,
            with the file and line of the first five.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{setting}: {path}: cannot be read: {error.strerror}") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    values = _array_values if data.lstrip().startswith(b"[") else _line_values
    records, problems = [], []
    for line, value in values(data):
        location = f"{path}:{line}"
        try:
            if isinstance(value, ValueError):
                raise value
            records.append(_record(value, location))
        except ValueError as error:
            problems.append(f"{location}: {error}")
    raise_problems(setting, problems)
    if not records:
        raise UserError(f"{setting}: {path}: the file holds no record")
    return records


def _line_values(data: bytes) -> Iterator[tuple[int, Any]]:
    """(line number, JSON value or the ValueError that says why there is none) of every line that is not blank."""
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            yield number, _malformed(error)


def _array_values(data: bytes) -> Iterator[tuple[int, Any]]:
    """As `_line_values`, for one JSON array; what follows malformed JSON in it cannot be read."""
    line, index = 1, 0
    decoder = json.JSONDecoder()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield 1 + data.count(b"\n", 0, error.start), _malformed(error)
        return

    def skip_space(start: int) -> int:
        space = _SPACE.match(text, start)
        assert space is not None  # it may be empty
        return space.end()

    index = skip_space(skip_space(0) + 1)  # behind the opening bracket
    if text[index : index + 1] == "]" and skip_space(index + 1) == len(text):
        return
    counted = 0
    while True:
        line += text.count("\n", counted, index)
        counted = index
        try:
            value, index = decoder.raw_decode(text, index)
        except (ValueError, RecursionError) as error:
            yield getattr(error, "lineno", line), _malformed(error)
            return
        yield line, value
        index = skip_space(index)
        separator = text[index : index + 1]
        if separator == "]" and skip_space(index + 1) == len(text):
            return
        if separator != ",":
            found = f"found {text[index : index + 20]!r}" if separator else "the file ends"
            yield 1 + text.count("\n", 0, index), ValueError(f"malformed JSON array: {found} after an element")
            return
        index = skip_space(index + 1)


def _malformed(error: Exception) -> ValueError:
    if isinstance(error, UnicodeDecodeError):
        return ValueError(f"not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason})")
    if isinstance(error, json.JSONDecodeError):
        return ValueError(f"malformed JSON: {error.msg} at column {error.colno}")
    return ValueError(f"malformed JSON: {error}")


def _record(value: Any, location: str) -> Record:
    """Raises ValueError, saying which rule the record breaks."""
    if not isinstance(value, dict):
        raise ValueError(f"a record is a JSON object, not {_shown(value)}")
    for keys, parse in _SHAPES:
        if all(key in value for key in keys):
            return parse(value, location)
    for keys, _ in _SHAPES:
        if keys[0] in value:
            missing = next(key for key in keys if key not in value)
            raise ValueError(f'the record has "{keys[0]}" but no "{missing}"')
    known = "; ".join(" and ".join(keys) for keys, _ in _SHAPES)
    raise ValueError(f"no known keys in the record: it has {', '.join(value) or 'none'}; known are {known}")


def _from_prompt(value: dict[str, Any], location: str) -> Record:
    prompt, response = _string(value, "prompt"), _string(value, "response", empty=False)
    return Record(location, (Message("user", prompt), Message("assistant", response)))


def _from_alpaca(value: dict[str, Any], location: str) -> Record:
    extra = _string(value, "input") if value.get("input") is not None else ""
    user = Message("user", _string(value, "instruction"), extra)
    return Record(location, (user, Message("assistant", _string(value, "output", empty=False))))


def _from_text(value: dict[str, Any], location: str) -> Record:
    return Record(location, text=_string(value, "text", empty=False))


def _from_turns(key: str, role_key: str, content_key: str, roles: dict[str, str]) -> Callable[..., Record]:
    def parse(value: dict[str, Any], location: str) -> Record:
        turns = value[key]
        if not isinstance(turns, list) or not turns:
            raise ValueError(f'"{key}" must be a list of turns, not {_shown(turns)}')
        messages = []
        for index, turn in enumerate(turns):
            where = f"{key}[{index}]"
            if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
                raise ValueError(f'{where} must be an object with "{role_key}" and "{content_key}": {_shown(turn)}')
            role = roles.get(turn[role_key]) if isinstance(turn[role_key], str) else None
            if role is None:
                raise ValueError(f'{where}: "{role_key}" is {_shown(turn[role_key])}; known are {", ".join(roles)}')
            content = _string(turn, content_key, empty=role != "assistant", where=f"{where}: ")
            messages.append(Message(role, content))
        if messages[-1].role != "assistant":
            raise ValueError(f'the last of "{key}" is from {messages[-1].role}, not from the assistant: no response')
        return Record(location, tuple(messages))

    return parse


_SHAPES: tuple[tuple[tuple[str, ...], Callable[..., Record]], ...] = (
    (("prompt", "response"), _from_prompt),
    (("messages",), _from_turns("messages", "role", "content", _CHAT_ROLES)),
    (("instruction", "output"), _from_alpaca),
    (("conversations",), _from_turns("conversations", "from", "value", _SHAREGPT_ROLES)),
    (("items",), _from_turns("items", "from", "value", _SHAREGPT_ROLES)),
    (("text",), _from_text),
)


def _string(holder: dict[str, Any], key: str, empty: bool = True, where: str = "") -> str:
    value = holder[key]
    if not isinstance(value, str):
        raise ValueError(f'{where}"{key}" must be a string, not {_shown(value)}')
    if not empty and not value.strip():
        raise ValueError(f'{where}"{key}" is empty')
    try:
        value.encode("utf-8")  # JSON can write half a surrogate pair, which is no text
    except UnicodeEncodeError as error:
        raise ValueError(f'{where}"{key}" holds half a surrogate pair at character {error.start}') from None
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
