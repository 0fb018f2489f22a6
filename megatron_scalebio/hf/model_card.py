"""The README.md of an exported model: what it has trained on, which decides what it may be measured with."""

from pathlib import Path

from megatron_scalebio.config import Config, config_sha256, evaluation_sets

_SEEN = {
    "upper": "This is the **upper** model: it has trained on the sources by their weights **and on the validation"
    " records**. A loss on those records says nothing about it; measure it with records that it has not seen.",
    "lower": "This is the **lower** model: it has trained on the sources by their weights alone. The validation records"
    " have chosen the weights, and no gradient of theirs has reached this model.",
    "fixed": "It has trained on the sources by weights that were given. No validation records were read.",
}


def model_card(config: Config, role: str, step: int, weights: dict[str, float], num_examples: dict[str, int]) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        role: of the exported model, "upper" or "lower".
        step: after which it is as it is.
        weights: of the sources, which add up to one.
        num_examples: usable records of each source.
    """
    fixed = config.bilevel.mode == "fixed"
    started = "random weights" if config.model.hf_path is None else Path(config.model.hf_path).resolve().name
    sets = "" if fixed else ", ".join(each.name for each in evaluation_sets("data.validation", config.data.validation))
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [megatron_scalebio]", "---", ""),
        f"Trained from {_cell(started)} for {step} steps of {config.bilevel.global_batch_size} examples with",
        f"megatron_scalebio (bilevel.mode={config.bilevel.mode}, settings {config_sha256(config)[:12]}).",
        *("", _SEEN["fixed" if fixed else role], ""),
        *([f"Validation: {_cell(sets)}.", ""] if sets else []),
        *("| source | weight (share of the loss) | usable records |", "|---|---:|---:|"),
        *(f"| {_cell(name)} | {weight:.4f} | {num_examples[name]} |" for name, weight in weights.items()),
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A name as it is, whatever marks are in it."""
    return "".join(f"\\{mark}" if mark in r"\`*_[]<>|#" else mark for mark in text.replace("\n", " "))
