"""Settings: precedence, paths, one message for every mistake, and the rules that need neither GPU nor data."""

import hashlib
import json

import pytest

from megatron_scalebio.config import (
    PRESETS,
    SETTINGS,
    Config,
    UserError,
    config_sha256,
    flatten,
    load_config,
)
from megatron_scalebio.config.declare import NOT_NEGATIVE, POSITIVE
from megatron_scalebio.rules import check_config, declared_settings

VALID = """
data:
  sources: [{name: clean, path: train/clean.jsonl}, {name: noisy, path: /elsewhere/noisy.jsonl}]
  validation: val.jsonl
"""

ROPE_SCALING = (
    "model.shape.rope_scaling={factor:8,low_freq_factor:1,high_freq_factor:4,original_max_position_embeddings:8192}"
)
GEMMA = "model.family=gemma2 model.shape.tied_embeddings=true"

DECLARED = declared_settings().values()
CHOICES = {setting.key: setting.choices for setting in DECLARED if setting.choices and setting.kind != list[str]}
AT_LEAST = {
    setting.key: int(setting.range.words.split()[-1])
    for setting in DECLARED
    if setting.range and setting.range.words.startswith("at least")
}
ABOVE_ZERO = [setting.key for setting in DECLARED if setting.range is POSITIVE]
FROM_ZERO = [setting.key for setting in DECLARED if setting.range is NOT_NEGATIVE]


@pytest.fixture
def load(tmp_path):
    """load(*overrides, yaml=...): the configuration of a file in its own folder."""

    def load(*overrides: str, yaml: str = VALID) -> Config:
        (tmp_path / "run.yaml").write_text(yaml)
        return load_config(str(tmp_path / "run.yaml"), list(overrides))

    return load


def refusal(call, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **keywords)
    return str(error.value)


def check(config: Config, world_size: int = 1, vocab_size: int | None = 258) -> None:
    check_config(config, world_size, vocab_size)


def test_command_line_beats_file_beats_preset_beats_defaults(load):
    yaml = VALID + "bilevel: {preset: paper, logits_lr: 0.5, penalty_alpha: 7, steps: 9}\n"
    bilevel = load("bilevel.penalty_alpha=3", yaml=yaml).bilevel
    assert bilevel.penalty_alpha == 3.0  # command line
    assert bilevel.logits_lr == 0.5  # file
    assert bilevel.logits_schedule == "cosine"  # preset
    assert bilevel.global_batch_size == 128  # default


def test_preset_of_the_command_line_does_not_override_the_file(load):
    config = load("bilevel.preset=paper", yaml=VALID + "lisa: {pairing: shared}\n")
    assert (config.lisa.pairing, config.bilevel.penalty_alpha) == ("shared", 100.0)


def test_every_default_and_preset_is_what_its_setting_allows():
    problems = [setting.problem(setting.default) for setting in DECLARED if setting.key not in PRESETS["default"]]
    problems += [SETTINGS[key].problem(value) for preset in PRESETS.values() for key, value in preset.items()]
    assert not any(problems) and all(setting.doc for setting in DECLARED)


def test_defaults_are_not_shared_between_configurations():
    Config().lisa.always_active.clear()
    assert Config().lisa.always_active == ["embedding", "final_norm", "head"]


@pytest.mark.parametrize("override", ["data.tokenizer=bytes", "data.template=plain", "data.template=auto"])
def test_a_word_where_a_path_may_stand_is_no_path(load, override):
    key, _, word = override.partition("=")
    assert flatten(load(override))[key] == word


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_fills_every_field_left_to_it(load, preset):
    flat = flatten(load(f"bilevel.preset={preset}"))
    assert {key: flat[key] for key in PRESETS[preset]} == PRESETS[preset]
    assert PRESETS[preset].keys() == PRESETS["default"].keys()


def test_null_leaves_a_field_to_the_preset(load):
    assert load("bilevel.penalty_alpha=null").bilevel.penalty_alpha == PRESETS["default"]["bilevel.penalty_alpha"]


def test_paths_of_a_file_are_relative_to_it(load, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load(yaml=VALID + "  tokenizer: tok\n  template: alpaca\nrun: {output_dir: out}\n")
    assert [source.path for source in config.data.sources] == [
        str(tmp_path / "train" / "clean.jsonl"),
        "/elsewhere/noisy.jsonl",
    ]
    assert config.data.validation == str(tmp_path / "val.jsonl")
    assert config.data.tokenizer == str(tmp_path / "tok")
    assert config.data.template == "alpaca"  # a word, no path
    assert config.run.output_dir == str(tmp_path / "elsewhere" / "out")


def test_paths_of_the_command_line_are_relative_to_the_working_directory(load, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load("data.validation=v.jsonl", "data.sources=[{name: a, path: a.jsonl}]", "data.template=t.jinja")
    assert config.data.validation == str(tmp_path / "elsewhere" / "v.jsonl")
    several = load("data.validation=[{name: a, path: v.jsonl}, {name: b, path: /w.jsonl, weight: 2}]").data.validation
    assert [each["path"] for each in several] == [str(tmp_path / "elsewhere" / "v.jsonl"), "/w.jsonl"]
    assert [source.path for source in config.data.sources] == [str(tmp_path / "elsewhere" / "a.jsonl")]
    assert config.data.template == str(tmp_path / "elsewhere" / "t.jinja")


def test_environment_variables_may_stand_in_a_file(load, monkeypatch):
    yaml = "data: {validation: '${oc.env:SOME_FOLDER}/val.jsonl'}\n"
    monkeypatch.setenv("SOME_FOLDER", "/there")
    assert load(yaml=yaml).data.validation == "/there/val.jsonl"
    monkeypatch.delenv("SOME_FOLDER")
    assert "SOME_FOLDER" in refusal(load, yaml=yaml)


@pytest.mark.parametrize(
    "override, known",
    [
        ("steps=3", "bilevel.steps"),
        ("bilevel.alpha=3", "bilevel.penalty_alpha"),
        ("optimiser=3", "optimizer"),
        ("lisa.num_active_layer=3", "lisa.num_active_layers"),
        ("run.ouput_dir=x", "run.output_dir"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_and_its_place(load, override, known):
    key, _, value = override.partition("=")
    assert refusal(load, override) == f"command line: unknown setting {key} (nearest: {known})"
    section, _, name = key.rpartition(".")
    in_file = f"{section}: {{{name}: {value}}}\n" if section else f"{name}: {value}\n"
    message = refusal(load, yaml=in_file)
    assert "run.yaml: unknown setting" in message


def test_unknown_key_of_a_source_is_refused(load):
    message = refusal(load, "data.sources=[{name: a, pth: b}]")
    assert "unknown setting data.sources[0].pth (nearest: path)" in message


@pytest.mark.parametrize(
    "override, expected",
    [
        ("bilevel.steps=many", 'bilevel.steps must be an integer, got "many"'),
        ("bilevel.steps=1.5", "bilevel.steps must be an integer, got 1.5"),
        ("bilevel.steps=null", "bilevel.steps must be an integer, got null"),
        ("bilevel.penalty_alpha=high", 'bilevel.penalty_alpha must be a number or null, got "high"'),
        ("data.packing=3.5", "data.packing must be true or false, got 3.5"),
        ("optimizer.betas=[a]", 'optimizer.betas must be a list of numbers, got ["a"]'),
        ("lisa.always_active=head", 'lisa.always_active must be a list of texts, got "head"'),
        ("parallel.layers_per_stage=4", "parallel.layers_per_stage must be a list of integers or null, got 4"),
        ("data.sources=clean.jsonl", 'data.sources must be a list of {name, path}, got "clean.jsonl"'),
        ("data.sources=[{path: a}]", 'data.sources[0] has no name: {"path": '),
        ("model=qwen2", 'model is a section with family, hf_path, shape, implementation; got "qwen2"'),
        ("--fast", "expected section.key=value, got '--fast'"),
    ],
)
def test_wrong_type_is_refused_with_key_value_and_expectation(load, override, expected):
    message = refusal(load, override)
    assert message.startswith("command line: " + expected)
    assert "\n" not in message


def test_several_mistakes_are_told_at_once(load):
    assert len(refusal(load, "bilevel.stepz=1", "bilevel.steps=x", "bilevel.floor=y").splitlines()) == 3


@pytest.mark.parametrize(
    "yaml, expected", [("a: [1", "run.yaml:"), ("a: 1\na: 2\n", "run.yaml:2"), ("- a\n", "run.yaml: expected sections")]
)
def test_malformed_file_is_refused_with_its_place(load, yaml, expected):
    assert expected in refusal(load, yaml=yaml)


def test_missing_file_is_refused_by_name(tmp_path):
    assert refusal(load_config, str(tmp_path / "no.yaml"), []).startswith(f"configuration file {tmp_path}/no.yaml:")


def test_weights_json_becomes_a_mapping(load, tmp_path):
    (tmp_path / "weights.json").write_text(json.dumps({"step": 3, "weights": {"clean": 0.75, "noisy": 0.25}}))
    config = load(yaml=VALID + "bilevel: {mode: fixed, weights: weights.json}\n")
    assert config.bilevel.weights == {"clean": 0.75, "noisy": 0.25}
    check(config)
    (tmp_path / "weights.json").write_text("[1]")
    assert "weights.json: expected" in refusal(load, yaml=VALID + "bilevel: {weights: weights.json}\n")
    assert "no.json: No such file" in refusal(load, yaml=VALID + "bilevel: {weights: no.json}\n")


def test_mapping_of_the_command_line_replaces_the_file_s(load):
    config = load("bilevel.weights={clean: 2}", yaml=VALID + "bilevel: {weights: {clean: 1, noisy: 3}}\n")
    assert config.bilevel.weights == {"clean": 2}


def test_hash_ignores_run_but_for_its_seed(load):
    same = [load(), load("run.output_dir=/other", "run.resume=auto", "run.save_every=3", "run.device=cpu")]
    other = [load("run.seed=2"), load("optimizer.lr=1e-3"), load("data.validation=/other.jsonl")]
    assert len({config_sha256(config) for config in same}) == 1
    assert len({config_sha256(config) for config in [*same, *other]}) == 4
    assert len(config_sha256(same[0])) == len(hashlib.sha256().hexdigest())


def test_a_good_configuration_passes(load):
    check(load())
    check(load("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"), world_size=8)


@pytest.mark.parametrize(
    "overrides",
    [
        "model.family=llama3",
        f"model.family=llama3 {ROPE_SCALING} model.shape.head_size=24",
        "model.shape.hidden_size=130 model.shape.head_size=32",
        GEMMA,
        f"{GEMMA} model.shape.hidden_size=130 model.shape.head_size=256 model.shape.query_pre_attn_scalar=144"
        " model.shape.attention_softcap=50 model.shape.final_softcap=30 model.shape.sliding_window=4096",
    ],
)
def test_what_a_family_has_passes(load, overrides):
    check(load(*(override.replace(":", ": ") for override in overrides.split())))


@pytest.mark.parametrize(
    "overrides, rule",
    [
        ("model.shape.hidden_size=130", "hidden_size=130 must be a multiple of num_attention_heads=4"),
        ("model.shape.hidden_size=12", "gives heads of 3; rotary embeddings need an even size"),
        ("model.shape.num_query_groups=3", "num_attention_heads=4 must be a multiple of num_query_groups=3"),
        ("lisa.num_active_layers=5", "lisa.num_active_layers=5 must be at most model.shape.num_layers=4"),
        ("model.shape.vocab_size=200", "vocab_size=200 is smaller than the 258 ids of data.tokenizer=bytes"),
        ("parallel.tensor=4", "parallel.tensor=4 must divide model.shape.num_query_groups=2"),
        ("parallel.tensor=4", "parallel.tensor=4 times parallel.pipeline=1 must divide the number of ranks, 2"),
        ("parallel.tensor=3", "parallel.tensor=3 must divide 128"),
        ("parallel.pipeline=3", "parallel.pipeline=3 must divide model.shape.num_layers=4"),
        ("model.shape.ffn_hidden_size=385 parallel.tensor=2", "must divide model.shape.ffn_hidden_size=385"),
        ("parallel.virtual_pipeline=2", "virtual stages are not supported"),
        ("parallel.sequence=true", "parallel.sequence=true needs parallel.tensor above 1"),
        ("parallel.sequence=true parallel.tensor=2 data.max_length=33", "= 33 must be a multiple of parallel.tensor=2"),
        ("bilevel.floor=0.5", "bilevel.floor=0.5 times 2 sources must be below 1"),
        ("bilevel.penalty_growth=1.5", "bilevel.penalty_growth=1.5 a step comes to 1e+35 in 200 steps"),
        ("bilevel.penalty_alpha=1e300", "bilevel.penalty_alpha=1e+300 times bilevel.penalty_growth=1.0 a step"),
        ("bilevel.weights={clean:1,noisy:0}", "bilevel.weights: noisy=0 must be a positive, finite number"),
        ("bilevel.mode=fixed bilevel.weights={clean:0,noisy:0}", "bilevel.weights: all are zero"),
        (
            "bilevel.floor=0.2 bilevel.weights={clean:9,noisy:1}",
            "bilevel.weights: shares must lie above bilevel.floor=0.2, but noisy=0.1",
        ),
        ("bilevel.weights={clean:1}", "bilevel.weights: no value for source noisy"),
        ("bilevel.prior={clean:1,noisy:1,x:1}", "bilevel.prior: x is no source"),
        ("bilevel.prior={clean:1,noisy:0}", "bilevel.prior: noisy=0 must be a positive, finite number"),
        ("bilevel.prior={clean:1,noisy:.inf}", "bilevel.prior: noisy=inf must be a positive, finite number"),
        ("bilevel.prior={clean:1,noisy:[1]}", "bilevel.prior: noisy=[1] must be a positive, finite number"),
        ("bilevel.prior=[1]", "bilevel.prior=[1]: must be a mapping"),
        ("data.sources=[]", "data.sources is empty"),
        ("data.sources=[{name:a,path:b},{name:a,path:c}]", "2 sources are called 'a'; names must differ"),
        ("data.sources=[{name:'',path:b}]", "data.sources[0]: the name is empty"),
        ("data.validation=null", "data.validation is not set"),
        ("data.validation=[]", "data.validation=[]: must be a path, a list of {name, path, weight}, or null"),
        ("data.validation=[a.jsonl]", "data.validation[0]=a.jsonl: must be {name, path, weight}"),
        ("data.validation=[{name:a,path:b},{name:a,path:c}]", "data.validation: 2 sets are called 'a'; names must"),
        ("data.validation=[{path:b}]", "data.validation[0]: name=None must be a text that is not empty"),
        ("data.test=[{name:a,path:b,weight:0}]", "data.test[0]: weight=0 must be a positive, finite number"),
        ("data.test=[{name:a,path:b,share:1}]", "data.test[0]: unknown key share; there are name, path, weight"),
        (
            "data.validation=[{name:a,path:b},{name:b,path:c}] bilevel.validation_batch_size=1",
            "each of its 2 sets has an example in every step; raise bilevel.validation_batch_size=1",
        ),
        ("data.max_epochs=4 data.sampling=natural", "data.max_epochs=4 with data.sampling=natural, whose shares are"),
        ("bilevel.global_batch_size=1 data.sampling=stratified", "raise bilevel.global_batch_size=1"),
        ("model.shape.head_size=15", "model.shape.head_size=15: rotary embeddings need an even size"),
        ("model.family=gemma2", "model.family=gemma2 uses its embedding as its head: set model.shape.tied_embeddings"),
        (
            "model.family=llama3 model.shape.sliding_window=8",
            "sliding_window=8: model.family=llama3 has none; set it to",
        ),
        ("model.shape.attention_softcap=50", "model.shape.attention_softcap=50.0: model.family=qwen2 has none"),
        ("model.shape.final_softcap=30", "model.shape.final_softcap=30.0: model.family=qwen2 has none"),
        ("model.shape.query_pre_attn_scalar=9", "query_pre_attn_scalar=9.0: model.family=qwen2 has none"),
        (
            ROPE_SCALING,
            "model.shape.rope_scaling: model.family=qwen2 has none; set it to null, or model.family to llama3",
        ),
        ("model.family=llama3 model.shape.rope_scaling={factor:8}", "must be a mapping of factor, low_freq_factor,"),
        ("model.family=llama3 model.shape.rope_scaling=8", "model.shape.rope_scaling=8: must be a mapping of factor"),
        (
            f"model.family=llama3 {ROPE_SCALING.replace('8192', '0')}",
            "original_max_position_embeddings=0 must be a pos",
        ),
        (
            f"model.family=llama3 {ROPE_SCALING.replace('8192', 'x')}",
            "original_max_position_embeddings=x must be a pos",
        ),
        (f"model.family=llama3 {ROPE_SCALING.replace('4', '1')}", "low_freq_factor=1 must be below high_freq_factor=1"),
        (f"{GEMMA} model.implementation=te", "model.implementation=te has neither the post norms nor the softcaps"),
        ("precision.compute=fp8 model.implementation=te", "precision.compute=fp8 needs model.implementation=native"),
        ("precision.compute=fp8 lisa.pairing=independent", "precision.compute=fp8 needs lisa.pairing=shared"),
        ("precision.compute=fp8 run.device=cpu", "precision.compute=fp8 needs a GPU: set run.device=auto or cuda"),
        ("precision.compute=fp8 data.max_length=1000", "data.micro_batch_size * data.max_length is 1000: change it"),
        ("precision.compute=fp8 model.shape.ffn_hidden_size=40", "model.shape.ffn_hidden_size / tensor is 40: change"),
        ("precision.compute=fp8 model.shape.head_size=6", "num_attention_heads * head size / tensor is 24: change"),
        (
            "precision.compute=fp8 model.shape.head_size=4 model.shape.num_query_groups=1",
            "(num_attention_heads + 2 * num_query_groups) * head size / tensor is 24: change",
        ),
        (
            "precision.frozen_weights=bf16 precision.compute=fp32",
            "precision.frozen_weights=bf16 with precision.compute=fp32",
        ),
        ("precision.frozen_weights=fp8 precision.compute=fp64", "frozen_weights=fp8 with precision.compute=fp64"),
        ("precision.frozen_weights=fp8 model.implementation=te", "fp8 needs model.implementation=native or auto"),
        ("precision.frozen_weights=fp8 lisa.pairing=independent", "fp8 needs lisa.pairing=shared"),
        ("precision.frozen_inputs=fp8", "precision.frozen_inputs=fp8 with precision.frozen_weights=null: it needs FP8"),
        ("precision.fp8_recipe=tensorwise", "precision.fp8_recipe=tensorwise with precision.compute="),
        ("optimizer.moments=bf16 precision.compute=fp64", "optimizer.moments=bf16: precision.compute=fp64 keeps them"),
        ("parallel.pipeline=2 parallel.layers_per_stage=[4]", "layers_per_stage=[4]: must have parallel.pipeline=2"),
        ("parallel.pipeline=2 parallel.layers_per_stage=[1,2]", "layers_per_stage=[1, 2]: must be positive numbers"),
        ("parallel.pipeline=2 parallel.layers_per_stage=[0,4]", "layers_per_stage=[0, 4]: must be positive numbers"),
        ("lisa.always_active=[embeddings]", "must be some of embedding, final_norm, head; not embeddings (nearest: em"),
        ("lisa.always_active=[head,head]", "lisa.always_active=['head', 'head']: names a block twice"),
        ("lisa.always_active=[head] model.shape.tied_embeddings=true", "the embedding is the head: name both"),
        ("precision.compute=fp64 run.device=cuda", "precision.compute=fp64 is for parity on the CPU"),
        ("run.stop=settled bilevel.mode=fixed", "run.stop=settled with bilevel.mode=fixed, where no weight moves"),
        ("run.stop=settled bilevel.logits_lr=0", "run.stop=settled with bilevel.logits_lr=0, where no weight moves"),
        ("bilevel.logits_gate=11", "bilevel.logits_gate=11.0: must be from 0 to 10"),
        ("run.export_model=both bilevel.mode=fixed", "run.export_model=both with bilevel.mode=fixed, which trains no"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: must be two numbers"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas=[0.9, 1.0]: must be two numbers"),
        ("optimizer.warmup=1", "optimizer.warmup=1.0: must be a share of bilevel.steps"),
        ("data.max_length=1", "data.max_length=1: must be at least 2"),
    ],
)
def test_a_broken_rule_is_named_with_its_values(load, overrides, rule):
    config = load(*(override.replace(":", ": ") for override in overrides.split()))
    assert rule in refusal(check, config, world_size=2)


@pytest.mark.parametrize("key", CHOICES)
def test_a_word_that_is_no_choice_is_refused_with_the_nearest(load, key):
    allowed = ["null" if choice is None else str(choice) for choice in CHOICES[key]]
    near = allowed[-1]
    message = refusal(lambda: check(load(f"{key}={near}x")))  # the preset's name is refused while loading
    assert message == f"{key}={near}x: must be one of {', '.join(allowed)} (nearest: {near})"


@pytest.mark.parametrize("key, value", [(key, least - 1) for key, least in AT_LEAST.items()])
def test_a_number_below_its_least_is_refused(load, key, value):
    assert f"{key}={value}: must be at least {value + 1}" in refusal(check, load(f"{key}={value}"))


@pytest.mark.parametrize("key", [*ABOVE_ZERO, *FROM_ZERO, "optimizer.warmup"])
@pytest.mark.parametrize("value", ["-1.0", ".nan", ".inf"])
def test_a_rate_that_is_negative_or_not_finite_is_refused(load, key, value):
    assert f"{key}=" in refusal(check, load(f"{key}={value}"))


@pytest.mark.parametrize("key", ABOVE_ZERO)
def test_zero_is_refused_where_it_means_nothing(load, key):
    assert f"{key}=0.0: must be positive" in refusal(check, load(f"{key}=0"))


def test_transformer_engine_must_be_there_when_asked_for(load, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs Transformer Engine" in refusal(check, load("model.implementation=te"))


def test_fixed_mode_needs_no_validation(load):
    check(load("bilevel.mode=fixed", "data.validation=null"))


def test_natural_sampling_may_have_fewer_examples_per_step_than_sources(load):
    check(load("data.sampling=natural", "bilevel.global_batch_size=1"))
