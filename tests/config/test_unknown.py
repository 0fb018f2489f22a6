"""Keys that are no settings: words of other projects, misspelt ones, and colons without their space."""

import re

import pytest

from megatron_scalebio.config import SETTINGS, UserError, load_config
from megatron_scalebio.config.words import ABSENT, HERE


def refusal(*overrides: str) -> list[str]:
    """The lines that the command line's mistakes make, without their place."""
    with pytest.raises(UserError) as error:
        load_config(None, list(overrides))
    return [line.removeprefix("command line: ") for line in str(error.value).splitlines()]


@pytest.mark.parametrize(
    "word, hint",
    [
        ("learning_rate", "here: optimizer.lr"),
        ("num_train_epochs", "here: bilevel.steps"),
        ("fp16", "here: precision.compute=bf16"),
        ("cutoff_len", "here: data.max_length"),
        ("model_name_or_path", "here: model.hf_path"),
        ("gradient_checkpointing", "here: parallel.recompute"),
        ("gradient_accumulation_steps", "here: it follows from bilevel.global_batch_size"),
        ("lora_rank", "there are no adapters: the model itself trains, lisa.num_active_layers layers at a time"),
        ("report_to", "metrics.jsonl in run.output_dir has every number of every step; there is no other writer yet"),
        ("deepspeed", "there is no ZeRO or FSDP: parallel.tensor and parallel.pipeline cut the model"),
    ],
)
@pytest.mark.parametrize("form", ["{}", "train.{}", "bilevel.{}", "--{}", "some.where.{}"])
def test_a_word_of_another_project_is_answered_in_every_place(word, hint, form):
    assert refusal(f"{form.format(word)}=1") == [f"unknown setting {form.format(word)} ({hint})"]


@pytest.mark.parametrize("key", ["seed", "weight_decay", "output_dir", "packing", "template", "train.steps", "eps"])
def test_a_word_that_is_ours_is_answered_with_its_section(key):
    (line,) = refusal(f"{key}=1")
    (known,) = re.fullmatch(rf"unknown setting {key} \(nearest: (.*)\)", line).groups()
    assert known in SETTINGS and known.rpartition(".")[2] == key.rpartition(".")[2]


@pytest.mark.parametrize("key", ["foo", "xyz", "data.foo", "bilevel.gamma", "parallel.data", "run.zzz"])
def test_a_far_word_is_answered_with_where_the_list_is(key):
    assert refusal(f"{key}=1") == [f"unknown setting {key} (docs/settings.md lists them all)"]


def test_of_an_unknown_section_each_word_that_helps_is_told():
    assert refusal("trainer={learning_rate: 1, foo: 2, max_steps: 3}") == [
        "unknown setting trainer.learning_rate (here: optimizer.lr)",
        "unknown setting trainer.max_steps (here: bilevel.steps)",
    ]
    assert refusal("lora={r: 8, learning_rate: 3}") == [f"unknown setting lora ({ABSENT['lora']})"]
    assert refusal("optimiser={lr: 1}") == ["unknown setting optimiser (nearest: optimizer)"]
    assert refusal("dataset={_component_: x}") == ["unknown setting dataset (here: data.sources)"]


def test_an_unknown_section_of_which_nothing_is_known_is_one_complaint():
    assert refusal("hello={world: 1, there: {foo: 2}}") == ["unknown setting hello (docs/settings.md lists them all)"]


def test_an_unknown_key_of_a_source_is_the_only_complaint():
    assert refusal("data.sources=[{name: a, path: b, weight: 2}]") == [
        f"unknown setting data.sources[0].weight ({ABSENT['weight']})"
    ]


def test_no_word_is_a_setting_of_its_section_and_every_setting_named_exists():
    named = {key for hint in [*HERE.values(), *ABSENT.values()] for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", hint)}
    assert named - {"metrics.jsonl", "weights.json"} <= SETTINGS.keys()
    assert not HERE.keys() & ABSENT.keys()
    assert HERE.keys() & {key.rpartition(".")[2] for key in SETTINGS} == {"micro_batch_size"}


def test_answers_name_values_that_the_settings_allow():
    for key, value in re.findall(r"([a-z_.]+)=([a-z0-9]+)", " ".join([*HERE.values(), *ABSENT.values()])):
        assert value in SETTINGS[key].choices


@pytest.mark.parametrize(
    "yaml, expected",
    [
        ("bilevel: {weights: {clean:1, noisy:2}}", "bilevel.weights: {} of clean:1"),
        ("bilevel: {weights: {clean: 1, noisy:2}}", "bilevel.weights: {} of noisy:2"),
        ("data: {sources: [{name:clean, path:x}, {name:noisy, path:y}]}", "data.sources[0]: {} of name:clean"),
        ("bilevel: {steps:5, floor:0.1}", "bilevel: {} of steps:5"),
        ("steps:5", "{} of steps:5"),
    ],
)
def test_a_colon_without_its_space_is_told_in_one_line(tmp_path, yaml, expected):
    path, told = tmp_path / "run.yaml", expected.format("a space is missing after the colon")
    path.write_text(yaml)
    with pytest.raises(UserError) as error:
        load_config(str(path), [])
    assert str(error.value) == f"{path}: {told}"
    section, space, flow = yaml.partition(": ")
    if space:
        assert refusal(f"{section}={flow}") == [told]


def test_a_space_is_asked_for_where_yaml_stops_reading_or_takes_a_section_for_text(tmp_path):
    told = "a space is missing after the colon"
    assert refusal("bilevel.weights={clean:1,noisy:[1]}")[0].endswith(f"found unexpected ':'; {told}")
    assert refusal("run=seed:5")[0].endswith(f'got "seed:5"; {told}')
    assert told not in refusal("model=C:/folder")[0]


def test_a_value_with_a_colon_is_no_mistake():
    sources = load_config(None, ["data.sources=[{name: 'a:b', path: /x:y}]"]).data.sources
    assert [(source.name, source.path) for source in sources] == [("a:b", "/x:y")]
