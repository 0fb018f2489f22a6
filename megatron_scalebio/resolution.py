"""The resolved configuration: no setting is null any more that a later part would have to derive."""

from dataclasses import replace
from typing import Any

from megatron_scalebio.anatomy import FAMILIES, head_size
from megatron_scalebio.config import Config, changed, flatten, load_config

# What a setting is where it is null.
DERIVED = (
    "model.shape.vocab_size",
    "model.shape.head_size",
    "model.shape.query_pre_attn_scalar",
    "bilevel.validation_batch_size",
    "optimizer.lr_lower",
    "parallel.layers_per_stage",
    "run.export_dtype",
)

# No preset has a say in which data a run reads, in what words they are and where it writes.
_OF_THE_RUN = ("data.sources", "data.validation", "data.test", "run.output_dir", "model.shape.vocab_size")


def resolve(config: Config, vocab_size: int) -> Config:
    """`config`, which `rules.check_config` accepts, with what is null and can be derived filled in.

    Args:
        vocab_size: of the tokenizer; counts where `model.shape.vocab_size` is null.
    """
    shape, bilevel, optimizer = config.model.shape, config.bilevel, config.optimizer
    parallel, run = config.parallel, config.run
    size, scalar = head_size(shape), shape.query_pre_attn_scalar
    if scalar is None and "query_pre_attn_scalar" in FAMILIES[config.model.family].options:
        scalar = float(size)
    stages = parallel.layers_per_stage or [shape.num_layers // parallel.pipeline] * parallel.pipeline
    export_dtype = run.export_dtype or ("bf16" if config.precision.compute in ("bf16", "fp8") else "fp32")
    shape = replace(shape, vocab_size=shape.vocab_size or vocab_size, head_size=size, query_pre_attn_scalar=scalar)
    return replace(
        config,
        model=replace(config.model, shape=shape),
        bilevel=replace(bilevel, validation_batch_size=bilevel.validation_batch_size or bilevel.global_batch_size),
        optimizer=replace(optimizer, lr_lower=optimizer.lr if optimizer.lr_lower is None else optimizer.lr_lower),
        parallel=replace(parallel, layers_per_stage=stages),
        run=replace(run, export_dtype=export_dtype),
    )


def changed_from_preset(config: Config) -> dict[str, tuple[Any, Any]]:
    """{key: (value under the preset alone, value)} for every setting of a resolved configuration that differs from the
    run's preset; a derived one, that differs from what would be derived.

    Which data and model a run reads and where it writes is left out.
    """
    plain = flatten(load_config(None, [f"bilevel.preset={config.bilevel.preset}"]))
    plain |= {key: _derived(config, key) for key in DERIVED}
    current = {key: value for key, value in flatten(config).items() if key not in _OF_THE_RUN}
    if config.model.hf_path is not None:
        current = {key: value for key, value in current.items() if not key.startswith("model.")}
        current["model.implementation"] = config.model.implementation
    return {key: (plain[key], value) for key, value in current.items() if plain[key] != value}


def without_derived(config: Config) -> Config:
    """A copy in which a setting that is no other than what would be derived is null again, so that it follows where the
    settings that it derives from are changed. The vocabulary's size stays: its tokenizer is not asked."""
    flat, keys = flatten(config), [key for key in DERIVED if key != "model.shape.vocab_size"]
    return changed(config, {key: None for key in keys if flat[key] == _derived(config, key)})


def _derived(config: Config, key: str) -> Any:
    """What a setting would be, had it been null; null where that is refused."""
    if key == "parallel.layers_per_stage" and config.model.shape.num_layers % config.parallel.pipeline:
        return None
    return flatten(resolve(changed(config, {key: None}), config.model.shape.vocab_size or 0))[key]
