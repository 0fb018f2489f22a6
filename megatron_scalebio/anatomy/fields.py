"""What the families' config.json have in common: reading it field by field, and writing it.

Every field is either read, or checked to have the one value that is computed here, or known to be harmless; anything
else is refused by name, as it may change the mathematics.
"""

import json
from typing import Any

from megatron_scalebio.config import ShapeConfig, UserError

# What config.json says of Llama-3.1's rope scaling.
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# Fields that change nothing that training computes: tokens' numbers, limits, defaults of other programs.
HARMLESS = (
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "_commit_hash"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id"),
    *("max_position_embeddings", "initializer_range", "use_cache", "torchscript", "use_bfloat16", "tokenizer_class"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "return_dict", "is_decoder"),
    *(
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "return_dict_in_generate",
        "chunk_size_feed_forward",
    ),
    *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task", "prefix"),
    *("transformers.js_config", "unsloth_fixed", "unsloth_version", "tf_legacy_loss", "tie_last_hidden_states"),
    # generation settings that older versions kept here
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id"),
    *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    *("begin_suppress_tokens",),
)

# Harmless, but not taken over: the export has its own, or they are true of the original files alone.
_NOT_CARRIED = (
    *("_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype"),
    *("architectures", "model_type"),
)

# Fields of every family that must have one value, or be absent or null.
_FIXED: dict[str, Any] = {
    "attention_dropout": 0,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "partial_rotary_factor": 1,
    "pruned_heads": {},
    "use_bidirectional_attention": False,
    "per_layer_config": None,
    "quantization_config": None,
}


class Fields:
    """A config.json that is read field by field; mistakes are collected, and told by `refuse_the_rest`.

    A field that is null counts as absent, except where null has a meaning: see `nullable_count`.
    """

    def __init__(self, config: dict[str, Any], harmless: tuple[str, ...]):
        self.config = config
        self.problems: list[str] = []
        self._read = {*HARMLESS, *harmless}
        for name, value in _FIXED.items():
            self.must_be(name, value)

    def peek(self, name: str) -> Any:
        """The field's value; None where it is absent."""
        return self.config.get(name)

    def must_be(self, name: str, value: Any) -> None:
        """The field is absent, null, or this."""
        self._read.add(name)
        given = self.config.get(name)
        if given is not None and (given != value or isinstance(given, bool) != isinstance(value, bool)):
            self.problems.append(f"{name}={_shown(given)}: not supported, only {_shown(value)}")

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer; one without a default must be there."""
        value = self._value(name, default)
        if type(value) is not int or value < 1:
            self._mistake(name, value, "a positive integer")
            return 1
        return value

    def nullable_count(self, name: str, default: int) -> int | None:
        """As `count`, but an explicit null is None."""
        return None if self._is_null(name) else self.count(name, default)

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not value > 0:
            self._mistake(name, value, "a positive number")
            return 1.0
        return float(value)

    def nullable_number(self, name: str, default: float) -> float | None:
        """As `number`, but an explicit null is None."""
        return None if self._is_null(name) else self.number(name, default)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if type(value) is not bool:
            self._mistake(name, value, "true or false")
        return bool(value)

    def shape(
        self,
        tied_by_default: bool,
        num_query_groups: int | None = None,
        head_size: int | None = None,
        scaled_rope: bool = False,
    ) -> ShapeConfig:
        """What every family has. The defaults are the family's where its config.json leaves a field out; `scaled_rope`:
        it knows Llama-3.1's scaling of the rotary frequencies."""
        mistakes = len(self.problems)
        heads, hidden = self.count("num_attention_heads"), self.count("hidden_size")
        derived = head_size is None and self.peek("head_dim") is None
        if derived and hidden % heads and len(self.problems) == mistakes:
            self.problems.append(f"hidden_size={hidden}: must be a multiple of num_attention_heads={heads}")
        rope_base, rope_scaling = self._rope()
        if rope_scaling is not None and not scaled_rope:
            self.problems.append(f"rope_scaling of Llama-3.1: not supported for {self.peek('model_type')}")
        return ShapeConfig(
            num_layers=self.count("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=self.count("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=self.count("num_key_value_heads", default=num_query_groups),
            vocab_size=self.count("vocab_size"),
            rope_base=rope_base,
            norm_epsilon=self.number("rms_norm_eps", default=1e-6),
            tied_embeddings=self.flag("tie_word_embeddings", default=tied_by_default),
            head_size=self.count("head_dim", default=head_size or max(1, hidden // heads)),
            rope_scaling=rope_scaling,
        )

    def refuse_the_rest(self) -> None:
        """Raises: UserError with every mistake found, and every field that nobody knows."""
        for name, value in self.config.items():
            private = name.startswith("_")  # notes of the program that wrote the file
            if name not in self._read and value is not None and not private:
                self.problems.append(f"{name}={_shown(value)}: unknown field, which may change what the model computes")
        if self.problems:
            raise UserError("\n".join(f"config.json: {problem}" for problem in self.problems))

    def _rope(self) -> tuple[float, dict[str, float] | None]:
        """(base, Llama-3.1's scaling or None), from the old spelling or from transformers 5's rope_parameters."""
        self._read |= {"rope_theta", "rope_scaling", "rope_parameters"}
        spelled = {name: self.config[name] for name in ("rope_scaling", "rope_parameters") if self.config.get(name)}
        if len(spelled) == 2:
            self.problems.append("rope_scaling and rope_parameters are both there: remove one")
        name, rope = next(iter(spelled.items()), ("rope_scaling", {}))
        if not isinstance(rope, dict):
            self.problems.append(f"{name}={_shown(rope)}: must be a mapping")
            return 1.0, None
        rope = {key: value for key, value in rope.items() if value is not None}
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        base = rope.pop("rope_theta", self.peek("rope_theta") or 10_000.0)
        if rope.pop("partial_rotary_factor", 1) != 1:
            self.problems.append(f"{name}={_shown(self.config[name])}: not supported, only partial_rotary_factor=1")
        keys = {"default": (), "llama3": ROPE_SCALING}.get(kind if isinstance(kind, str) else "")
        if keys is None or set(rope) != set(keys):
            supported = f"only rope_type default, and llama3 with {', '.join(ROPE_SCALING)}"
            self.problems.append(f"{name}={_shown(self.config[name])}: not supported, {supported}")
            return 1.0, None
        for key, value in {"rope_theta": base, **rope}.items():
            if type(value) not in (int, float) or not value > 0:
                self._mistake(key, value, "a positive number")
                return 1.0, None
        return float(base), rope or None

    def _is_null(self, name: str) -> bool:
        self._read.add(name)
        return name in self.config and self.config[name] is None

    def _value(self, name: str, default: Any) -> Any:
        self._read.add(name)
        value = self.config.get(name)
        return default if value is None else value

    def _mistake(self, name: str, value: Any, expected: str) -> None:
        if value is None:
            self.problems.append(f"{name} is missing; it must be {expected}")
        else:
            self.problems.append(f"{name}={_shown(value)}: must be {expected}")


def common_config(shape: ShapeConfig) -> dict[str, Any]:
    """What every family writes of a shape. Token numbers are null, or loading would assume the family's own; rope is in
    the old spelling, which transformers 4 and 5 and vLLM read."""
    scaling = {"rope_type": "llama3", **shape.rope_scaling} if shape.rope_scaling else None
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": shape.tied_embeddings,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "rope_theta": shape.rope_base,
        "rope_scaling": scaling,
    }


def harmless_names(own: tuple[str, ...]) -> set[str]:
    """The fields that an export takes over from the config.json that its model came from."""
    return {*HARMLESS, *own} - {*_NOT_CARRIED}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
