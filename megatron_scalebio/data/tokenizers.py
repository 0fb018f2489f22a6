"""Tokenizers behind one small interface: bytes, a Hugging Face folder, or a SentencePiece model."""

import os
import re
from typing import Any, Protocol

from megatron_scalebio.config import UserError


class Tokenizer(Protocol):
    """What the project needs of a tokenizer.

    Attributes:
        vocab_size: ids that the model must hold: every id is below it.
        end_id: end-of-text.
        begin_id: beginning-of-text, where the tokenizer puts it before a text; else None.
        pad_id: stands in positions that no example fills; it is never a target.
        special_tokens: {text: id} of the control tokens.
        template_variables: texts of control tokens by the names that chat templates use, such as `eos_token`.
        chat_template: Jinja source, or None.
    """

    vocab_size: int
    end_id: int
    begin_id: int | None
    pad_id: int
    special_tokens: dict[str, int]
    template_variables: dict[str, str]
    chat_template: str | None

    def encode(self, texts: list[str], parse_special: bool = False) -> list[list[int]]:
        """The ids of each text, with nothing added before or behind.

        A control token's text becomes its id only with `parse_special`, for what a chat template wrote. Otherwise it is
        text like any other, so that no record can end its own turn.
        """


class BytesTokenizer:
    """UTF-8 bytes: ids 0 to 255, end-of-text 256, padding 257."""

    vocab_size = 258
    end_id = 256
    begin_id: int | None = None
    pad_id = 257
    special_tokens = {"<|endoftext|>": 256}
    template_variables = {"eos_token": "<|endoftext|>"}
    chat_template: str | None = None

    def encode(self, texts: list[str], parse_special: bool = False) -> list[list[int]]:
        if not parse_special:
            return [list(text.encode("utf-8")) for text in texts]
        return [_encode_parsed(self, text) for text in texts]


class SentencePieceTokenizer:
    """A SentencePiece .model file; it has no chat template.

    A user-defined piece is no control token: its text becomes its id in any record. Gemma's marks of turns are such
    pieces of its .model; its Hugging Face folder tells them from text.

    Raises:
        UserError: the file cannot be read as a model, or has no end-of-text piece.
    """

    chat_template: str | None = None

    def __init__(self, path: str) -> None:
        from sentencepiece import SentencePieceProcessor  # only where such a tokenizer is asked for

        try:
            self._model = SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise UserError(f"data.tokenizer={path}: not a SentencePiece model: {error}") from error
        self.vocab_size = len(self._model)
        self.end_id = self._model.eos_id()
        if self.end_id < 0:
            raise UserError(f"data.tokenizer={path}: the SentencePiece model has no end-of-text piece (eos_id is -1)")
        self.begin_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.end_id
        piece = self._model.id_to_piece
        self.special_tokens = {piece(i): i for i in range(self.vocab_size) if self._model.is_control(i)}
        named = {"bos_token": self.begin_id, "eos_token": self.end_id, "pad_token": self.pad_id}
        self.template_variables = {name: piece(i) for name, i in named.items() if i is not None}

    def encode(self, texts: list[str], parse_special: bool = False) -> list[list[int]]:
        if not parse_special:
            return self._model.encode(texts)
        return [_encode_parsed(self, text) for text in texts]


class HuggingFaceTokenizer:
    """A folder that `transformers.AutoTokenizer` reads; nothing is fetched and no code of the folder runs.

    Raises:
        UserError: the folder holds no tokenizer that can be read, or one without a vocabulary or an end-of-text token.
    """

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer  # takes seconds to import: only where such a tokenizer is asked for

        try:
            # None of the types that it may return declares all that is asked for below.
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # each tokenizer class raises its own kinds for a damaged folder
            reason = str(error).strip().split("\n")[0]
            model = os.path.join(folder, "tokenizer.model")
            advice = f"; data.tokenizer={model} reads that SentencePiece model" if os.path.isfile(model) else ""
            raise UserError(
                f"data.tokenizer={folder}: transformers cannot read a tokenizer from this folder: "
                f"{type(error).__name__}: {reason}{advice}"
            ) from error
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError(f"data.tokenizer={folder}: no end-of-text token: set eos_token in tokenizer_config.json")
        self.vocab_size = 1 + max(tokenizer.get_vocab().values())  # not len(): ids may have holes
        self.end_id = tokenizer.eos_token_id
        first = tokenizer("a")["input_ids"][:1]
        self.begin_id = first[0] if first == [tokenizer.bos_token_id] else None
        self.pad_id = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.special_tokens = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        added = tokenizer.added_tokens_decoder  # holds control tokens without a role too, such as <|im_start|>
        self.special_tokens.update({token.content: i for i, token in added.items() if token.special})
        if self.special_tokens.keys() >= tokenizer.get_vocab().keys():  # transformers makes some classes out of nothing
            raise UserError(
                f"data.tokenizer={folder}: the folder holds no vocabulary (tokenizer.json): name one that does"
            )
        self.template_variables = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        self.chat_template = tokenizer.get_chat_template() if tokenizer.chat_template else None

    def encode(self, texts: list[str], parse_special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        encoding = self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=not parse_special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # else it warns of texts above its own length, which is not ours
        )
        return encoding["input_ids"]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: "bytes", a Hugging Face folder, or a SentencePiece .model file.

    Raises:
        UserError: there is no such tokenizer, it cannot be read, or it has no end-of-text token.
    """
    if name == "bytes":
        return BytesTokenizer()
    if os.path.isdir(name):
        return HuggingFaceTokenizer(name)
    if not os.path.exists(name):
        raise UserError(f'data.tokenizer={name}: no such file or folder; give a folder, a .model file or "bytes"')
    if name.endswith(".model"):
        return SentencePieceTokenizer(name)
    raise UserError(f'data.tokenizer={name}: must be a Hugging Face folder, a SentencePiece .model file or "bytes"')


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches the text of any control token, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True))))


def _encode_parsed(tokenizer: Tokenizer, text: str) -> list[int]:
    ids, start = [], 0
    for match in special_pattern(tokenizer).finditer(text):
        ids += tokenizer.encode([text[start : match.start()]])[0] + [tokenizer.special_tokens[match.group()]]
        start = match.end()
    return ids + tokenizer.encode([text[start:]])[0]
