"""config.json: the published ones are understood, what is not computed here is refused by name, settings must agree.

The published files are written from memory, as far as their fields go.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from megatron_scalebio.config import Config, ModelConfig, ShapeConfig, UserError
from megatron_scalebio.hf import adopt_checkpoint, check_checkpoint, export_config, read_shape

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA31_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
SMALL_QWEN3 = {
    "hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28, "num_attention_heads": 16,
    "num_hidden_layers": 28, "tie_word_embeddings": True,
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip

QWEN3_8B = ShapeConfig(36, 4096, 12288, 32, 8, 151936, 1e6, 1e-6, False, 128)
MISTRAL_7B = ShapeConfig(32, 4096, 14336, 32, 8, 32000, 1e4, 1e-5, False, 128, sliding_window=4096)
QWEN2_7B = ShapeConfig(28, 3584, 18944, 28, 4, 152064, 1e6, 1e-6, False, 128)
LLAMA3_8B = ShapeConfig(32, 4096, 14336, 32, 8, 128256, 5e5, 1e-5, False, 128)
LLAMA31_SCALING = {key: value for key, value in LLAMA31_ROPE.items() if key != "rope_type"}
GEMMA2_2B = ShapeConfig(26, 2304, 9216, 8, 4, 256000, 1e4, 1e-6, True, 256, None, 256.0, 50.0, 30.0, 4096)

SMALL_LLAMA = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "mlp_bias": False,
    "tie_word_embeddings": True, "max_position_embeddings": 131072, "rope_scaling": {**LLAMA31_ROPE, "factor": 32.0},
}  # fmt: skip
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip


def qwen25(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int, tied: bool) -> tuple:
    sizes = {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": groups, "vocab_size": vocab, "tie_word_embeddings": tied, "use_mrope": False,
    }  # fmt: skip
    shape = ShapeConfig(layers, hidden, ffn, heads, groups, vocab, 1e6, 1e-6, tied, hidden // heads)
    return "qwen2", QWEN2 | sizes, shape


PUBLISHED = {
    "Qwen2-7B-Instruct": ("qwen2", QWEN2, QWEN2_7B),
    "Qwen2.5-0.5B": qwen25(24, 896, 4864, 14, 2, 151936, True),
    "Qwen2.5-1.5B": qwen25(28, 1536, 8960, 12, 2, 151936, True),
    "Qwen2.5-32B": qwen25(64, 5120, 27648, 40, 8, 152064, False),
    "Llama-3-8B": ("llama3", LLAMA3, LLAMA3_8B),
    "Llama-3.1-8B": (
        "llama3",
        LLAMA3 | {"rope_scaling": LLAMA31_ROPE, "mlp_bias": False, "eos_token_id": [128001, 128008, 128009]},
        replace(LLAMA3_8B, rope_scaling=LLAMA31_SCALING),
    ),
    "Llama-3.2-1B": (
        "llama3",
        LLAMA3 | SMALL_LLAMA,
        ShapeConfig(16, 2048, 8192, 32, 8, 128256, 5e5, 1e-5, True, 64, LLAMA31_SCALING | {"factor": 32.0}),
    ),
    "SmolLM2-135M-Instruct": (
        "llama3",
        SMOLLM2,
        ShapeConfig(30, 576, 1536, 9, 3, 49152, 1e5, 1e-5, True, 64),
    ),
    "Qwen3-8B": ("qwen3", QWEN3, QWEN3_8B),
    "Qwen3-0.6B": (
        "qwen3",
        QWEN3 | SMALL_QWEN3,
        ShapeConfig(28, 1024, 3072, 16, 8, 151936, 1e6, 1e-6, True, 128),
    ),
    "Mistral-7B-v0.1": ("mistral", MISTRAL, MISTRAL_7B),
    "Mistral-7B-v0.3": (
        "mistral",
        MISTRAL | {"vocab_size": 32768, "rope_theta": 1000000.0, "sliding_window": None, "attention_dropout": 0.0},
        replace(MISTRAL_7B, vocab_size=32768, rope_base=1e6, sliding_window=None),
    ),
    "Gemma-2-2B": ("gemma2", GEMMA2, GEMMA2_2B),
    "Gemma-2-9B": (
        "gemma2",
        GEMMA2
        | {"hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"num_hidden_layers": 42, "sliding_window_size": 4096},
        ShapeConfig(42, 3584, 14336, 16, 8, 256000, 1e4, 1e-6, True, 256, None, 256.0, 50.0, 30.0, 4096),
    ),
}
BASES = {"qwen2": QWEN2, "llama3": LLAMA3, "gemma2": GEMMA2, "qwen3": QWEN3, "mistral": MISTRAL}


def write(folder: Path, content: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_understood(tmp_path, name):
    family, content, shape = PUBLISHED[name]
    assert read_shape(write(tmp_path, content)) == (family, shape)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_mean_the_same_to_transformers(tmp_path, name):
    """Its reading of the file, rewritten in its own spelling, and our export of the shape, are read alike."""
    family, content, shape = PUBLISHED[name]
    config = AutoConfig.from_pretrained(write(tmp_path, content))
    config.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    assert read_shape(tmp_path) == (family, shape)
    write(tmp_path, export_config(ModelConfig(family=family, shape=shape), torch.bfloat16, source=content))
    ours = AutoConfig.from_pretrained(tmp_path)
    unsaid = {"_name_or_path", "transformers_version", "dtype", "use_mrope", "rope_interleaved", "sliding_window_size"}
    theirs, own = ({k: v for k, v in c.to_dict().items() if k not in unsaid} for c in (config, ours))
    assert own == theirs


def without(content: dict, *names: str) -> dict:
    return {name: value for name, value in content.items() if name not in names}


@pytest.mark.parametrize(
    "content, expected",
    [
        (without(LLAMA3, "num_key_value_heads"), replace(LLAMA3_8B, num_query_groups=32)),
        (LLAMA3 | {"num_key_value_heads": None}, replace(LLAMA3_8B, num_query_groups=32)),
        (LLAMA3 | {"head_dim": None, "pretraining_tp": None, "quantization_config": None}, LLAMA3_8B),
        (LLAMA3 | {"head_dim": 96}, replace(LLAMA3_8B, head_size=96)),
        (without(LLAMA3, "rope_theta", "rms_norm_eps"), replace(LLAMA3_8B, rope_base=1e4, norm_epsilon=1e-6)),
        (without(LLAMA3, "architectures", "attention_bias", "hidden_act", "tie_word_embeddings"), LLAMA3_8B),
        (without(LLAMA3, "rope_theta") | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, LLAMA3_8B),
        (LLAMA3 | {"rope_scaling": {"type": "default"}}, LLAMA3_8B),
        (LLAMA3 | {"unknown_to_everyone": None}, LLAMA3_8B),
        (QWEN2 | {"layer_types": ["full_attention"] * 28}, QWEN2_7B),
        (without(GEMMA2, "attn_logit_softcapping", "final_logit_softcapping", "sliding_window"), GEMMA2_2B),
        (without(GEMMA2, "query_pre_attn_scalar", "head_dim", "hidden_act", "hidden_activation"), GEMMA2_2B),
        (
            GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 144},
            replace(GEMMA2_2B, attention_softcap=None, final_softcap=None, query_pre_attn_scalar=144.0),
        ),
        (GEMMA2 | {"layer_types": ["sliding_attention", "full_attention"] * 13}, GEMMA2_2B),
        (GEMMA2 | {"layer_types": ["full_attention"] * 26}, replace(GEMMA2_2B, sliding_window=None)),
    ],
)
def test_null_absent_and_either_spelling(tmp_path, content, expected):
    assert read_shape(write(tmp_path, content))[1] == expected


REFUSED = [
    ("llama3", {"attention_bias": True}, "attention_bias=true: not supported, only false"),
    ("llama3", {"mlp_bias": True}, "mlp_bias=true: not supported, only false"),
    ("llama3", {"hidden_act": "gelu"}, 'hidden_act="gelu": not supported, only "silu"'),
    ("llama3", {"pretraining_tp": 2}, "pretraining_tp=2: not supported, only 1"),
    ("llama3", {"pretraining_tp": True}, "pretraining_tp=true: not supported"),
    ("llama3", {"rope_interleaved": True}, "rope_interleaved=true: not supported"),
    ("llama3", {"attention_dropout": 0.1}, "attention_dropout=0.1: not supported, only 0"),
    ("llama3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: not supported, only 1"),
    ("llama3", {"quantization_config": {"quant_method": "fp8"}}, 'quantization_config={"quant_method": "fp8"}: not'),
    ("llama3", {"per_layer_config": {"0": {}}}, 'per_layer_config={"0": {}}: not supported'),
    ("llama3", {"sliding_window": 4096}, "sliding_window=4096: unknown field"),
    ("llama3", {"logits_scaling": 8}, "logits_scaling=8: unknown field, which may change what the model computes"),
    ("llama3", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map="),
    ("llama3", {"num_hidden_layers": None}, "num_hidden_layers is missing; it must be a positive integer"),
    ("llama3", {"hidden_size": "4096"}, 'hidden_size="4096": must be a positive integer'),
    ("llama3", {"num_attention_heads": True}, "num_attention_heads=true: must be a positive integer"),
    ("llama3", {"hidden_size": 4097}, "hidden_size=4097: must be a multiple of num_attention_heads=32"),
    ("llama3", {"rms_norm_eps": 0}, "rms_norm_eps=0: must be a positive number"),
    ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings=false: not supported, only true"),
    ("qwen2", {"rope_scaling": LLAMA31_ROPE}, "rope_scaling of Llama-3.1: not supported for qwen2"),
    ("llama3", {"tie_word_embeddings": 1}, "tie_word_embeddings=1: must be true or false"),
    ("llama3", {"rope_theta": "1e6"}, 'rope_theta="1e6": must be a positive number'),
    ("llama3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling={"type": "linear"'),
    ("llama3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "only rope_type default, and llama3"),
    ("llama3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "only rope_type default"),
    ("llama3", {"rope_scaling": without(LLAMA31_ROPE, "low_freq_factor")}, "llama3 with factor, low_freq_factor"),
    ("llama3", {"rope_scaling": {**LLAMA31_ROPE, "attention_factor": 2.0}}, "llama3 with factor, low_freq_factor"),
    ("llama3", {"rope_scaling": {**LLAMA31_ROPE, "factor": "8"}}, 'factor="8": must be a positive number'),
    ("llama3", {"rope_scaling": [1]}, "rope_scaling=[1]: must be a mapping"),
    ("llama3", {"rope_scaling": LLAMA31_ROPE, "rope_parameters": LLAMA31_ROPE}, "are both there: remove one"),
    ("llama3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=1"),
    ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, 'rope_scaling={"type": "mrope"'),
    ("qwen2", {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
    ("qwen2", {"use_mrope": True}, "use_mrope=true: not supported"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true: not supported, only false"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 28}, 'layer_types=["sliding_attention"'),
    ("qwen2", {"hidden_act": "gelu"}, 'hidden_act="gelu": not supported, only "silu"'),
    ("qwen2", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
    ("qwen3", {"attention_bias": True}, "attention_bias=true: not supported, only false"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window=true: not supported, only false"),
    ("qwen3", {"rope_scaling": LLAMA31_ROPE}, "rope_scaling of Llama-3.1: not supported for qwen3"),
    ("qwen3", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0: must be a positive integer"),
    ("mistral", {"layer_types": ["full_attention"] * 32}, "layer_types=["),
    ("mistral", {"hidden_act": "gelu"}, 'hidden_act="gelu": not supported, only "silu"'),
    ("mistral", {"rope_scaling": LLAMA31_ROPE}, "rope_scaling of Llama-3.1: not supported for mistral"),
    ("gemma2", {"attention_bias": True}, "attention_bias=true: not supported"),
    ("gemma2", {"hidden_activation": "gelu"}, 'hidden_activation="gelu": not supported, only "gelu_pytorch_tanh"'),
    ("gemma2", {"hidden_act": "silu"}, 'hidden_act="silu": not supported, only "gelu_pytorch_tanh"'),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true: not supported"),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"] * 13}, 'layer_types=["full_attention"'),
    ("gemma2", {"layer_types": ["sliding_attention"] * 5}, "layer_types="),
    ("gemma2", {"sliding_window_size": 1024}, "sliding_window_size=1024: not supported, only 4096"),
    ("gemma2", {"sliding_window": 0}, "sliding_window=0: must be a positive integer"),
    ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping=-1.0: must be a positive number"),
]  # fmt: skip


@pytest.mark.parametrize("family, change, message", REFUSED)
def test_what_is_not_computed_here_is_refused_by_name_and_value(tmp_path, family, change, message):
    with pytest.raises(UserError) as error:
        read_shape(write(tmp_path, BASES[family] | change))
    assert f"config.json: {next(iter(change))}" in str(error.value) or "config.json: factor" in str(error.value)
    assert message in str(error.value) and str(tmp_path) in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_all_fields_are_refused_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        read_shape(write(tmp_path, LLAMA3 | {"mlp_bias": True, "vocab_size": 0, "novel": [1]}))
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
        {"architectures": ["Qwen2ForSequenceClassification"]},
        {"architectures": ["Qwen2MoeForCausalLM"]},
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "llama"},
        {"architectures": []},
        {"model_type": None},
        {"model_type": ["qwen2"]},
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, change):
    content = QWEN2 | change
    with pytest.raises(UserError) as error:
        read_shape(write(tmp_path, content))
    assert f"architectures={content['architectures']}, model_type={content['model_type']}" in str(error.value)
    assert "LlamaForCausalLM (llama)" in str(error.value)


# Adoption.


def adopted(folder: Path, **given) -> Config:
    config = Config()
    config.model.hf_path = str(folder)
    adopt_checkpoint(config, {f"model.{key}": value for key, value in given.items()} | {"run.seed": 3})
    return config


def test_family_and_shape_come_from_config_json_alone(tmp_path):
    config = adopted(write(tmp_path, GEMMA2))
    assert (config.model.family, config.model.shape) == ("gemma2", GEMMA2_2B)


def test_settings_that_say_the_same_are_allowed(tmp_path):
    given = {
        "family": "llama3", "shape.num_layers": 16, "shape.rope_base": 500000, "shape.head_size": None,
        "shape.vocab_size": None, "shape.rope_scaling": {**LLAMA31_SCALING, "factor": 32},
        "shape.tied_embeddings": True, "shape.sliding_window": None,
    }  # fmt: skip
    assert adopted(write(tmp_path, LLAMA3 | SMALL_LLAMA), **given).model.shape.head_size == 64


@pytest.mark.parametrize(
    "key, value, own",
    [
        ("family", "qwen2", "gemma2"),
        ("shape.num_layers", 25, 26),
        ("shape.vocab_size", 256128, 256000),
        ("shape.tied_embeddings", False, True),
        ("shape.head_size", 288, 256),
        ("shape.sliding_window", None, 4096),
        ("shape.attention_softcap", None, 50.0),
        ("shape.rope_scaling", LLAMA31_SCALING, None),
    ],
)
def test_settings_that_say_otherwise_are_refused(tmp_path, key, value, own):
    with pytest.raises(UserError) as error:
        adopted(write(tmp_path, GEMMA2), **{key: value})
    message = f"model.{key}={value} contradicts {tmp_path / 'config.json'}, which says {own}: remove the setting"
    assert str(error.value).startswith(message)


def test_all_contradictions_are_told_and_nothing_is_adopted(tmp_path):
    config = Config()
    config.model.hf_path = str(write(tmp_path, GEMMA2))
    with pytest.raises(UserError) as error:
        adopt_checkpoint(config, {"model.family": "qwen2", "model.shape.hidden_size": 128})
    assert len(str(error.value).splitlines()) == 2
    assert config.model.family == "qwen2" and config.model.shape == ShapeConfig()


def test_a_checkpoint_is_checked_against_what_was_adopted(saved, tmp_path):
    folder = Path(shutil.copytree(saved("gemma2")[0], tmp_path / "checkpoint"))
    config = adopted(folder)
    check_checkpoint(config.model)
    config.model.shape.num_layers = 4
    with pytest.raises(UserError, match=r"missing: model\.layers\.3\."):
        check_checkpoint(config.model)
