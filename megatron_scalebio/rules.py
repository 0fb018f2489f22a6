"""The rules between settings, those that need neither a GPU nor the data; see `check_config`.

What a setting allows by itself is declared beside it, in `config.settings`.
"""

import importlib.util
import math
from dataclasses import fields, replace
from typing import Any

from megatron_scalebio.anatomy import FAMILIES, head_size
from megatron_scalebio.anatomy.fields import ROPE_SCALING
from megatron_scalebio.config import SETTINGS, Config, Setting, ShapeConfig, UserError, evaluation_sets, flatten
from megatron_scalebio.config.evaluation_sets import problems_of_sets
from megatron_scalebio.source_weights import LOGITS_OPTIMIZERS

# What is declared elsewhere, so that a new family or logits optimizer touches no setting.
FOUND: dict[str, dict[str, Any]] = {
    "model.family": {
        "choices": tuple(FAMILIES),
        "doc": "; ".join(f"{family.name}: {family.members}" for family in FAMILIES.values()),
    },
    "bilevel.logits_optimizer": {"choices": tuple(LOGITS_OPTIMIZERS)},
}

# Settings of model.shape that not every family has a formula for.
FAMILY_OPTIONS = [
    field.name for field in fields(ShapeConfig) if any(field.name in family.options for family in FAMILIES.values())
]


def declared_settings() -> dict[str, Setting]:
    """{"section.key": declaration} of every setting, with what is declared elsewhere."""
    return SETTINGS | {key: replace(SETTINGS[key], **found) for key, found in FOUND.items()}


def check_config(config: Config, world_size: int, vocab_size: int | None) -> None:
    """Checks `config` for `world_size` ranks and, where given, a tokenizer of `vocab_size` ids.

    Raises:
        UserError: every rule that is broken, each on its line with the values and the keys to change.
    """
    values = flatten(config)
    problems = [found for key, setting in declared_settings().items() if (found := setting.problem(values[key]))]
    if not problems:  # the rules below divide by these values
        model = [*_shape(config, vocab_size), *_family(config), *_always_active(config)]
        problems = [
            *(*model, *_last_alpha(config), *_precision(config), *_layout(config, world_size)),
            *(*_sources(config), *_sets(config), *_profile(config), *_needs_learning(config), *_installed(config)),
        ]
    if problems:
        raise UserError("\n".join(problems))


def _last_alpha(config: Config) -> list[str]:
    """The penalty multiplies losses in fp32: far below its range, or the run dies in its middle."""
    bilevel, largest = config.bilevel, 1e12
    alpha, growth = bilevel.penalty_alpha, bilevel.penalty_growth
    exponent = math.log10(alpha) + (bilevel.steps - 1) * math.log10(growth)
    if max(abs(math.log10(alpha)), abs(exponent)) <= math.log10(largest):
        return []
    return [
        f"bilevel.penalty_alpha={alpha} times bilevel.penalty_growth={growth} a step comes to 1e{exponent:+.0f} in"
        f" {bilevel.steps} steps: it must stay between {1 / largest:.0e} and {largest:.0e}"
    ]


def _shape(config: Config, vocab_size: int | None) -> list[str]:
    shape, lisa, problems = config.model.shape, config.lisa, []
    hidden, heads, groups = shape.hidden_size, shape.num_attention_heads, shape.num_query_groups
    if shape.head_size is not None:
        if shape.head_size % 2:
            problems.append(f"model.shape.head_size={shape.head_size}: rotary embeddings need an even size")
    elif hidden % heads:
        problems.append(
            f"model.shape.hidden_size={hidden} must be a multiple of num_attention_heads={heads}, or set head_size"
        )
    elif (hidden // heads) % 2:
        problems.append(
            f"model.shape.hidden_size={hidden} over num_attention_heads={heads} gives heads of {hidden // heads};"
            " rotary embeddings need an even size"
        )
    if heads % groups:
        problems.append(f"model.shape.num_attention_heads={heads} must be a multiple of num_query_groups={groups}")
    if lisa.enabled and lisa.num_active_layers > shape.num_layers:
        problems.append(
            f"lisa.num_active_layers={lisa.num_active_layers} must be at most model.shape.num_layers={shape.num_layers}"
        )
    if shape.vocab_size is not None and vocab_size is not None and shape.vocab_size < vocab_size:
        problems.append(
            f"model.shape.vocab_size={shape.vocab_size} is smaller than the {vocab_size} ids of"
            f" data.tokenizer={config.data.tokenizer}"
        )
    return problems


def _family(config: Config) -> list[str]:
    """What a family's formulas and checkpoints have no place for."""
    model, shape, problems = config.model, config.model.shape, []
    family, name = FAMILIES[model.family], f"model.family={model.family}"
    for key in FAMILY_OPTIONS:
        value = getattr(shape, key)
        if value is not None and key not in family.options:
            others = " or ".join(other.name for other in FAMILIES.values() if key in other.options)
            shown = "" if isinstance(value, dict) else f"={value}"
            problems.append(f"model.shape.{key}{shown}: {name} has none; set it to null, or model.family to {others}")
    if family.always_tied and not shape.tied_embeddings:
        problems.append(f"{name} uses its embedding as its head: set model.shape.tied_embeddings=true")
    if shape.rope_scaling is not None:
        problems += _rope_scaling(shape.rope_scaling)
    if model.implementation == "te" and family.head_norms:
        problems.append(f"model.implementation=te has no norms of query and key heads, as {name}; use native or auto")
    if model.implementation == "te" and family.post_norms:
        problems.append(
            f"model.implementation=te has neither the post norms nor the softcaps of {name}; use native or auto"
        )
    if model.implementation == "te" and config.parallel.recompute != "none":
        problems.append(
            f"parallel.recompute={config.parallel.recompute} is not available with model.implementation=te: use native"
            " or auto, or parallel.recompute=none"
        )
    return problems


def _rope_scaling(scaling: Any) -> list[str]:
    key = "model.shape.rope_scaling"
    if not isinstance(scaling, dict) or set(scaling) != set(ROPE_SCALING):
        return [f"{key}={scaling}: must be a mapping of {', '.join(ROPE_SCALING)}, all of them and no more"]
    problems = [
        f"{key}: {name}={value} must be a positive, finite number"
        for name, value in scaling.items()
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf
    ]
    if not problems and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        problems.append(
            f"{key}: low_freq_factor={scaling['low_freq_factor']} must be below"
            f" high_freq_factor={scaling['high_freq_factor']}"
        )
    return problems


def _layout(config: Config, world_size: int) -> list[str]:
    shape, parallel, problems = config.model.shape, config.parallel, []
    tensor, pipeline = parallel.tensor, parallel.pipeline
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(shape, name) % tensor:
            problems.append(f"parallel.tensor={tensor} must divide model.shape.{name}={getattr(shape, name)}")
    if 128 % tensor:
        problems.append(f"parallel.tensor={tensor} must divide 128, the multiple that the vocabulary is padded to")
    if parallel.virtual_pipeline is not None:
        problems.append("parallel.virtual_pipeline: virtual stages are not supported; remove it")
    problems += _stages(shape.num_layers, pipeline, parallel.layers_per_stage)
    if world_size % (tensor * pipeline):
        problems.append(
            f"parallel.tensor={tensor} times parallel.pipeline={pipeline} must divide the number of ranks, {world_size}"
        )
    if parallel.sequence:
        positions = config.data.micro_batch_size * config.data.max_length
        if tensor == 1:
            problems.append("parallel.sequence=true needs parallel.tensor above 1")
        if positions % tensor:
            problems.append(
                f"parallel.sequence=true: data.micro_batch_size * data.max_length = {positions} must be a multiple of"
                f" parallel.tensor={tensor}"
            )
    return problems


def _stages(num_layers: int, pipeline: int, layers_per_stage: list[int] | None) -> list[str]:
    if layers_per_stage is None:
        if num_layers % pipeline == 0:
            return []
        return [
            f"parallel.pipeline={pipeline} must divide model.shape.num_layers={num_layers}, or set"
            " parallel.layers_per_stage"
        ]
    named = f"parallel.layers_per_stage={layers_per_stage}"
    if len(layers_per_stage) != pipeline:
        return [f"{named}: must have parallel.pipeline={pipeline} numbers"]
    if min(layers_per_stage) < 1 or sum(layers_per_stage) != num_layers:
        return [f"{named}: must be positive numbers that add up to model.shape.num_layers={num_layers}"]
    return []


def _precision(config: Config) -> list[str]:
    frozen, compute, problems = config.precision.frozen_weights, config.precision.compute, []
    if frozen == "bf16" and compute not in ("bf16", "fp8"):
        problems.append(f"precision.frozen_weights=bf16 with precision.compute={compute}: set it to null, or to fp8")
    if frozen == "fp8" and compute == "fp64":
        problems.append("precision.frozen_weights=fp8 with precision.compute=fp64: FP8's products are fp32 at most")
    if frozen != "fp8" and config.precision.frozen_inputs == "fp8":
        problems.append(
            f"precision.frozen_inputs=fp8 with precision.frozen_weights={frozen or 'null'}: it needs FP8 weights; set"
            " precision.frozen_weights=fp8"
        )
    if compute != "fp8" and config.precision.fp8_recipe != "blockwise":
        recipe = config.precision.fp8_recipe
        problems.append(f"precision.fp8_recipe={recipe} with precision.compute={compute}: it is for compute=fp8 alone")
    moments = config.optimizer.moments
    if moments is not None and compute == "fp64":
        problems.append(f"optimizer.moments={moments}: precision.compute=fp64 keeps them in fp64")
    independent = config.bilevel.mode == "bilevel" and config.lisa.pairing == "independent" and config.lisa.enabled
    for key in [key for key in ("frozen_weights", "compute") if getattr(config.precision, key) == "fp8"]:
        if config.model.implementation == "te":
            problems.append(f"precision.{key}=fp8 needs model.implementation=native or auto, not te")
        if independent:
            problems.append(
                f"precision.{key}=fp8 needs lisa.pairing=shared: under independent draws a layer is rounded in one"
                " model and not in the other, and the rounding would pass for a difference of their losses"
            )
    return [*problems, *_fp8_products(config)] if compute == "fp8" else problems


def _fp8_products(config: Config) -> list[str]:
    """An FP8 product of a layer that trains adds up its inputs, its outputs or the tokens, in steps of 16."""
    shape, tensor, problems = config.model.shape, config.parallel.tensor, []
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    size = head_size(shape) / tensor
    sizes = {
        "model.shape.hidden_size": shape.hidden_size,
        "model.shape.ffn_hidden_size / tensor": shape.ffn_hidden_size / tensor,
        "num_attention_heads * head size / tensor": heads * size,
        "(num_attention_heads + 2 * num_query_groups) * head size / tensor": (heads + 2 * groups) * size,
        "data.micro_batch_size * data.max_length": config.data.micro_batch_size * config.data.max_length,
    }
    problems += [
        f"precision.compute=fp8 needs multiples of 16, but at parallel.tensor={tensor} {name} is {size:g}: change it,"
        " or use precision.compute=bf16"
        for name, size in sizes.items()
        if size % 16
    ]
    if config.run.device == "cpu":
        problems.append("precision.compute=fp8 needs a GPU: set run.device=auto or cuda, or precision.compute=bf16")
    return problems


def _always_active(config: Config) -> list[str]:
    blocks = config.lisa.always_active
    named = f"lisa.always_active={blocks}"
    if len(set(blocks)) != len(blocks):
        return [f"{named}: names a block twice"]
    if config.model.shape.tied_embeddings and ("embedding" in blocks) != ("head" in blocks):
        return [f"{named}: with model.shape.tied_embeddings=true the embedding is the head: name both or neither"]
    return []


def _sources(config: Config) -> list[str]:
    data, bilevel, problems = config.data, config.bilevel, []
    names = [source.name for source in data.sources]
    if not names:
        problems.append("data.sources is empty: name at least one {name, path}")
    problems += [f"data.sources[{index}]: the name is empty" for index, name in enumerate(names) if not name.strip()]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"data.sources: {names.count(name)} sources are called {name!r}; names must differ")
    if bilevel.mode == "bilevel" and data.validation is None:
        problems.append("data.validation is not set: bilevel.mode=bilevel learns the weights from it")
    if bilevel.floor * len(names) >= 1:
        problems.append(f"bilevel.floor={bilevel.floor} times {len(names)} sources must be below 1")
    if data.sampling == "stratified" and len(names) > bilevel.global_batch_size:
        problems.append(
            f"data.sampling=stratified needs an example of each of {len(names)} sources in every batch:"
            f" raise bilevel.global_batch_size={bilevel.global_batch_size}, or set data.sampling=adaptive, under which"
            " they take turns"
        )
    if data.max_epochs is not None and data.sampling != "adaptive":
        problems.append(
            f"data.max_epochs={data.max_epochs:g} with data.sampling={data.sampling}, whose shares are not free to"
            " change: set data.sampling=adaptive, or data.max_epochs to null"
        )
    if bilevel.prior is not None:
        problems += _mapping("bilevel.prior", bilevel.prior, names, zero_allowed=False)
    if bilevel.weights is not None:
        fixed = bilevel.mode == "fixed"  # a logit of minus infinity would never move again
        found = _mapping("bilevel.weights", bilevel.weights, names, zero_allowed=fixed)
        problems += found or _above_floor(bilevel.weights, 0.0 if fixed else bilevel.floor)
    return problems


def _sets(config: Config) -> list[str]:
    data, bilevel = config.data, config.bilevel
    problems = problems_of_sets("data.validation", data.validation) + problems_of_sets("data.test", data.test)
    batch = bilevel.validation_batch_size or bilevel.global_batch_size
    if not problems and bilevel.mode == "bilevel" and len(sets := evaluation_sets("", data.validation)) > batch:
        problems.append(
            f"data.validation: each of its {len(sets)} sets has an example in every step; raise"
            f" bilevel.validation_batch_size={batch}"
        )
    return problems


def _profile(config: Config) -> list[str]:
    profile, last = config.run.profile, config.bilevel.steps
    steps = profile.get("steps") if isinstance(profile, dict) and len(profile) == 1 else None
    whole = isinstance(steps, list) and [type(step) for step in steps] == [int, int]
    if profile is None or (whole and 1 <= steps[0] <= steps[1] <= last):
        return []
    return [
        f"run.profile={profile}: must be {{steps: [first, last]}}, two steps from 1 to bilevel.steps={last}, the first"
        " not after the last"
    ]


def _needs_learning(config: Config) -> list[str]:
    which, stop = config.run.export_model, config.run.stop
    if config.bilevel.mode == "bilevel":
        still = stop == "settled" and config.bilevel.logits_lr == 0
        return ["run.stop=settled with bilevel.logits_lr=0, where no weight moves: set it to steps"] if still else []
    problems = []
    if which != "upper":
        problems = [f"run.export_model={which} with bilevel.mode=fixed, which trains no lower model: set it to upper"]
    if stop == "settled":
        problems.append("run.stop=settled with bilevel.mode=fixed, where no weight moves: set it to steps")
    return problems


def _above_floor(weights: dict[str, float], floor: float) -> list[str]:
    """Weights to begin at must add up to something, and leave each source more than the floor."""
    total = sum(weights.values())
    if total == 0:
        return ["bilevel.weights: all are zero"]
    low = [f"{name}={weight / total:.4g}" for name, weight in weights.items() if weight / total <= floor > 0]
    return [f"bilevel.weights: shares must lie above bilevel.floor={floor}, but {', '.join(low)}"] if low else []


def _mapping(key: str, mapping: Any, names: list[str], zero_allowed: bool) -> list[str]:
    """`mapping` must give each source, and nothing else, a positive number, or zero where that is allowed."""
    if not isinstance(mapping, dict):
        return [f"{key}={mapping!r}: must be a mapping from every source's name to a number"]
    missing = [name for name in names if name not in mapping]
    surplus = [name for name in mapping if name not in names]
    problems = [f"{key}: no value for source {', '.join(missing)}"] if missing else []
    if surplus:
        problems.append(f"{key}: {', '.join(map(str, surplus))} is no source; they are {', '.join(names)}")
    for name, value in mapping.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not (0 < value < math.inf or (zero_allowed and value == 0)):
            problems.append(f"{key}: {name}={value} must be a positive, finite number{' or 0' if zero_allowed else ''}")
    return problems


def _installed(config: Config) -> list[str]:
    problems = []
    if config.precision.compute == "fp64" and config.run.device == "cuda":
        problems.append("precision.compute=fp64 is for parity on the CPU: set run.device=cpu")
    if config.model.implementation == "te" and importlib.util.find_spec("transformer_engine") is None:
        problems.append("model.implementation=te needs Transformer Engine, which is not installed; use native or auto")
    return problems
