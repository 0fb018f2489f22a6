"""Templates: from a record to segments of text, each of which carries loss as a whole or not at all.

Segments are tokenised apart, as at inference, where the prompt is tokenised before there is a response. So no token
lies across the border between a prompt and a response, and the loss mask is exact by construction.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateSyntaxError

from megatron_scalebio.config import UserError
from megatron_scalebio.data.records import Message, Record
from megatron_scalebio.data.tokenizers import Tokenizer, special_pattern


@dataclass(frozen=True)
class Segment:
    text: str
    has_loss: bool
    end: bool = False  # end-of-text follows, and carries loss where the segment does
    parse_special: bool = False  # control tokens in the text are control tokens


Template = Callable[[tuple[Message, ...]], list[Segment]]

# The date that templates of Llama-3.1 and 3.2 write where nobody gives one; 3.2's would else write today's, so that a
# run's tokens would change overnight.
_DATE = "26 Jul 2024"
_ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_ALPACA_PREAMBLE_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)


def choose_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template that `data.template` names. A template raises ValueError, with the reason, on a record it refuses.

    Raises:
        UserError: there is no such template, or its file cannot be read.
    """
    if name == "auto":
        if tokenizer.chat_template is None:
            return plain_segments
        return JinjaTemplate("the tokenizer's chat template", tokenizer.chat_template, tokenizer)
    if name == "plain":
        return plain_segments
    if name == "alpaca":
        return alpaca_segments
    if not name.endswith(".jinja"):
        raise UserError(f"data.template={name}: must be auto, plain, alpaca or the path of a .jinja file")
    if not os.path.isfile(name):
        raise UserError(f"data.template={name}: no such file")
    try:
        with open(name, encoding="utf-8") as file:
            return JinjaTemplate(name, file.read(), tokenizer)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template={name}: cannot be read: {error}") from error


def record_segments(record: Record, template: Template) -> list[Segment]:
    """The segments of `record`; plain text goes past the template: loss on all of it and its end."""
    if not record.messages:
        return [Segment(record.text, has_loss=True, end=True)]
    return template(record.messages)


def plain_segments(messages: tuple[Message, ...]) -> list[Segment]:
    """Each message of the system or user and a line feed; each response and end-of-text."""
    return [
        Segment(message.text, has_loss=True, end=True)
        if message.role == "assistant"
        else Segment(message.text + "\n", has_loss=False)
        for message in messages
    ]


def alpaca_segments(messages: tuple[Message, ...]) -> list[Segment]:
    """Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca, train.py), ending in "### Response:".

    A system message takes the preamble's place; later turns repeat the headings without it.
    """
    segments, context = [], ""
    for index, message in enumerate(messages):
        if message.role == "assistant":
            segments.append(Segment(context + "### Response:", has_loss=False))
            segments.append(Segment(message.text, has_loss=True, end=True))
            context = ""
        elif message.role == "system":
            context += message.text + "\n\n"
        else:
            if index == 0:
                context = _ALPACA_PREAMBLE_INPUT if message.input else _ALPACA_PREAMBLE
            context += f"### Instruction:\n{message.content}\n\n"
            context += f"### Input:\n{message.input}\n\n" if message.input else ""
    return segments


class JinjaTemplate:
    """A chat template as `transformers` renders it, with exact assistant spans.

    For each assistant turn i, rendering messages[:i] with the generation prompt gives what the model sees before it
    answers, and rendering messages[: i + 1] gives the answered conversation. Each must be a beginning of the next, up
    to the whole conversation's rendering: this is checked for every record, so the spans between them are the
    assistant's and nobody else's. A span's loss ends with its first control token, the end of the turn; the line feed
    that many templates write behind it is context.
    """

    def __init__(self, name: str, source: str, tokenizer: Tokenizer) -> None:
        self._name, self._source = name, source
        self._variables: dict[str, Any] = {"date_string": _DATE, **tokenizer.template_variables}
        self._control: re.Pattern[str] = special_pattern(tokenizer)
        begin, end = self._variables.get("bos_token"), self._variables.get("eos_token")
        # Where the tokenizer itself never puts it, bos_token may be the mark of a turn, as SmolLM2's <|im_start|>.
        self._begin = begin if tokenizer.begin_id is not None and begin != end else None

    def __call__(self, messages: tuple[Message, ...]) -> list[Segment]:
        """The segments, whose texts joined are the whole rendering.

        Raises:
            ValueError: the template refuses the messages, or its spans cannot be told.
            UserError: the Jinja source is malformed.
        """
        for message in messages:
            if found := self._control.search(message.text):
                raise ValueError(
                    f"the {message.role}'s message holds {found.group()!r}, a control token of {self._name}: "
                    "take it out of the record, or use data.template=plain"
                )
        whole = self._rendered(messages, prompt=False)
        segments, done = [], 0
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._rendered(messages[:index], prompt=True)
            after = whole if index + 1 == len(messages) else self._rendered(messages[: index + 1], prompt=False)
            if not (len(before) >= done and after.startswith(before) and whole.startswith(after)):
                raise ValueError(
                    f"{self._name} renders the beginning of this conversation differently once turn {index} is there, "
                    "so which tokens are the assistant's cannot be told: use data.template=plain or another FILE.jinja"
                )
            end = self._turn_end(message, after, len(before))
            segments.append(Segment(whole[done : len(before)], has_loss=False, parse_special=True))
            segments.append(Segment(whole[len(before) : end], has_loss=True, parse_special=True))
            done = end
        segments.append(Segment(whole[done:], has_loss=False, parse_special=True))
        if self._begin and whole.count(self._begin) > 1:
            raise ValueError(f"{self._name} writes the beginning-of-text token {self._begin!r} more than once")
        return segments

    def _turn_end(self, message: Message, rendered: str, start: int) -> int:
        """Where the turn that starts at `start` ends in `rendered`: behind its first control token."""
        end = self._control.search(rendered, start)
        if end is None:
            raise ValueError(
                f"{self._name} ends an assistant's turn with no control token: write {{{{ eos_token }}}} behind it"
            )
        if message.text.strip() not in rendered[start : end.start()]:
            raise ValueError(
                f"{self._name} does not write the assistant's message right behind its generation prompt "
                "(add_generation_prompt), or changes it"
            )
        return end.end()

    def _rendered(self, messages: tuple[Message, ...], prompt: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template  # slow import, as AutoTokenizer's

        conversation = [{"role": message.role, "content": message.text} for message in messages]
        try:
            rendered, _ = render_jinja_template(
                [conversation], chat_template=self._source, add_generation_prompt=prompt, **self._variables
            )
        except TemplateSyntaxError as error:
            raise UserError(f"data.template: {self._name}, line {error.lineno}: {error.message}") from error
        except Exception as error:  # a template is a program of the user's: it may raise anything
            raise ValueError(
                f"{self._name} fails on these messages: {type(error).__name__}: {error}: change the record, or use "
                "data.template=plain or another FILE.jinja"
            ) from error
        return rendered[0]
