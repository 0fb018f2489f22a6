"""A run is opened from a file, from settings or from a configuration: whole, checked, and refused in words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_scalebio
from megatron_scalebio import Config, Plan, UserError, load_config, open_config, open_run
from megatron_scalebio.config import SourceConfig, write_config
from megatron_scalebio.resolution import resolve
from tests.configs import BYTES, resolved


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Settings that name two sources and a validation file."""
    for name in ("a", "b", "val"):
        records = [{"prompt": f"{name}{number}", "response": "r"} for number in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = ", ".join(f"{{name: {name}, path: '{tmp_path}/{name}.jsonl'}}" for name in "ab")
    files = [f"data.sources=[{sources}]", f"data.validation={tmp_path}/val.jsonl", f"run.output_dir={tmp_path}/run"]
    return [*files, "run.device=cpu", "bilevel.global_batch_size=4"]


def test_a_run_has_resolved_settings_and_its_examples(given):
    run = open_run(None, given)
    assert run.config == resolve(load_config(None, given), BYTES)
    assert [len(source) for source in run.dataset.train] == [3, 3] and len(run.dataset.validation) == 3


def test_a_configuration_of_ones_own_is_completed_and_not_changed(given, tmp_path):
    config = Config()
    config.data.sources = [SourceConfig("a", f"{tmp_path}/a.jsonl")]
    config.data.validation, config.run.output_dir = f"{tmp_path}/val.jsonl", f"{tmp_path}/run"
    run = open_run(config)
    assert run.config.bilevel.penalty_alpha == 1.0 and run.config.data.tokenizer == "bytes"
    assert config.bilevel.penalty_alpha is None and config.data.tokenizer is None


def test_overrides_that_are_one_text_are_told_apart_from_a_list(given):
    with pytest.raises(TypeError, match="a list of section.key=value, not one text"):
        open_run(None, "bilevel.steps=3")
    with pytest.raises(UserError, match="bilevel.steps=3: overrides go with a file"):
        open_run(load_config(None, given), ["bilevel.steps=3"])


def test_what_was_derived_follows_where_a_runs_configuration_is_changed(tmp_path):
    write_config(resolved(), tmp_path / "config.yaml")
    changes = ["optimizer.lr=1e-3", "bilevel.global_batch_size=8", "model.shape.hidden_size=256", "parallel.pipeline=2"]
    again = open_config(tmp_path / "config.yaml", changes)
    assert (again.optimizer.lr_lower, again.bilevel.validation_batch_size) == (1e-3, 8)
    assert (again.model.shape.head_size, again.parallel.layers_per_stage) == (64, [2, 2])
    kept = open_config(tmp_path / "config.yaml", ["optimizer.lr=1e-3", "optimizer.lr_lower=2e-6"])
    assert kept.optimizer.lr_lower == 2e-6


def test_what_was_given_stays_where_a_runs_configuration_is_changed(tmp_path):
    write_config(resolved("optimizer.lr_lower=3e-6"), tmp_path / "config.yaml")
    assert open_config(tmp_path / "config.yaml", ["optimizer.lr=1e-3"]).optimizer.lr_lower == 3e-6


def test_what_a_file_of_ones_own_gives_stays_though_it_is_what_would_be_derived(tmp_path):
    (tmp_path / "mine.yaml").write_text("optimizer: {lr: 2.0e-6, lr_lower: 2.0e-6}\n")
    assert open_config(tmp_path / "mine.yaml", ["optimizer.lr=1e-3"]).optimizer.lr_lower == 2e-6


def test_a_folder_that_holds_another_run_is_refused_before_the_tokenizer_is_looked_for(given, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights.json").write_text("{}")
    with pytest.raises(UserError, match="holds another run"):
        open_run(None, [*given, "data.tokenizer=/nowhere"])
    with pytest.raises(UserError, match="no such file or folder"):
        open_run(None, [*given, "data.tokenizer=/nowhere"], writes=False)


SCRIPT = """
import sys
from megatron_scalebio import Trainer, open_run

trainer = Trainer(open_run(None, sys.argv[1:]))
status = trainer.train()
print("status", status, "weights", sorted(trainer.weights))
"""


@pytest.mark.parametrize("from_file", [True, False], ids=["a file", "standard input"])
def test_a_script_that_does_not_ask_for_its_name_trains_and_saves(given, tmp_path, from_file):
    """Megatron-Core's writer spawns a process: it must not run the script a second time."""
    (tmp_path / "script.py").write_text(SCRIPT)
    shape = ("model.shape.num_layers=2", "model.shape.hidden_size=32", "data.max_length=32", "bilevel.steps=2")
    command = [sys.executable, str(tmp_path / "script.py") if from_file else "-", *given, *shape]
    done = subprocess.run(command, input=SCRIPT, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "status 0 weights ['a', 'b']" in done.stdout and (tmp_path / "run" / "checkpoints" / "step_2").is_dir()


def test_a_plan_wants_resolved_settings_and_ranks_that_fit_them():
    with pytest.raises(ValueError, match="resolved configuration"):
        Plan.of(load_config(None, []), 1)
    with pytest.raises(ValueError, match="1 GPUs are no multiple of 1 x 2"):
        Plan.of(resolved("parallel.pipeline=2"), 1)
    assert Plan.of(resolved("parallel.pipeline=2"), 4).data_parallel == 2


def test_every_public_name_is_there():
    assert all(getattr(megatron_scalebio, name) is not None for name in megatron_scalebio.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        megatron_scalebio.nothing  # noqa: B018
