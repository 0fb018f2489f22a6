"""After resolution nothing is null that a later part would have to derive, and what was given is kept."""

import pytest

from megatron_scalebio.anatomy import FAMILIES
from megatron_scalebio.config import flatten, load_config, write_config
from megatron_scalebio.resolution import DERIVED, changed_from_preset, resolve
from tests.configs import BYTES, resolved


@pytest.mark.parametrize("family", FAMILIES)
def test_every_derived_setting_has_a_value(family):
    flat = flatten(resolved(f"model.family={family}", "precision.compute=fp8"))
    has_scalar = "query_pre_attn_scalar" in FAMILIES[family].options
    assert {key: flat[key] for key in DERIVED} == {
        "model.shape.vocab_size": BYTES,
        "model.shape.head_size": 32,
        "model.shape.query_pre_attn_scalar": 32.0 if has_scalar else None,
        "bilevel.validation_batch_size": 128,
        "optimizer.lr_lower": 2e-6,
        "parallel.layers_per_stage": [4],
        "run.export_dtype": "bf16",
    }


def test_what_is_given_is_kept():
    given = {
        "model.shape.vocab_size": 300,
        "model.shape.head_size": 48,
        "model.shape.query_pre_attn_scalar": 20.0,
        "bilevel.validation_batch_size": 3,
        "optimizer.lr_lower": 0.0,
        "parallel.layers_per_stage": [3, 1],
        "run.export_dtype": "fp32",
    }
    config = resolved("model.family=gemma2", "parallel.pipeline=2", *(f"{key}={value}" for key, value in given.items()))
    assert given.keys() == set(DERIVED)
    assert {key: flatten(config)[key] for key in DERIVED} == given


@pytest.mark.parametrize("compute, dtype", [("fp64", "fp32"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp8", "bf16")])
def test_an_export_has_the_dtype_that_the_run_computes_in(compute, dtype):
    assert resolved(f"precision.compute={compute}").run.export_dtype == dtype


def test_resolution_changes_nothing_else_and_nothing_a_second_time(tmp_path):
    config = load_config(None, ["parallel.pipeline=2"])
    once = resolve(config, BYTES)
    before, after = flatten(config), flatten(once)
    assert {key for key in before if before[key] != after[key]} <= set(DERIVED)
    assert resolve(once, 999) == once
    write_config(once, tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml"), []) == once


def test_changes_from_the_preset_are_exactly_what_was_changed():
    assert changed_from_preset(resolved()) == {}
    changes = changed_from_preset(resolved("bilevel.preset=paper", "bilevel.penalty_alpha=10", "optimizer.lr=1e-3"))
    assert changes == {"bilevel.penalty_alpha": (100.0, 10.0), "optimizer.lr": (2e-6, 1e-3)}


def test_a_derived_setting_counts_as_changed_where_it_is_not_what_would_be_derived():
    same = (
        "bilevel.global_batch_size=8",
        "bilevel.validation_batch_size=8",
        "optimizer.lr=1e-3",
        "optimizer.lr_lower=1e-3",
    )
    assert set(changed_from_preset(resolved(*same))) == {"bilevel.global_batch_size", "optimizer.lr"}
    changes = changed_from_preset(resolved("bilevel.validation_batch_size=8", "parallel.pipeline=2"))
    assert changes == {"bilevel.validation_batch_size": (128, 8), "parallel.pipeline": (1, 2)}
    uneven = changed_from_preset(resolved("parallel.pipeline=2", "parallel.layers_per_stage=[3,1]"))
    assert uneven["parallel.layers_per_stage"] == ([2, 2], [3, 1])
