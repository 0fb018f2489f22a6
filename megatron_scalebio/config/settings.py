"""Every setting, declared once: its type, default, choices or range, and what it means. docs/settings.md is made of it.

Precedence: defaults < preset < file < command line. A field whose default is None is filled by the preset
(`PRESETS`) or derived from another setting, as its text says. `rules.check_config` holds the rules between settings.
"""

from dataclasses import dataclass
from typing import Any

from megatron_scalebio.config.declare import NOT_NEGATIVE, POSITIVE, Filled, Range, at_least, declared, section, setting

PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "bilevel.penalty_alpha": 1.0,
        "bilevel.logits_optimizer": "adamw",
        "bilevel.logits_lr": 1.0e-2,
        "bilevel.logits_schedule": "constant",
        "bilevel.logits_weight_decay": 0.01,
        "bilevel.logits_gate": 3.0,
        "data.sampling": "adaptive",
        "data.replacement": False,
        "lisa.pairing": "shared",
        "lisa.keep_moments": False,
        "optimizer.decayed": "matrices",
        "optimizer.warmup_from_zero": False,
    },
    # The original's: arXiv 2406.19976 and its authors' scripts at github.com/research4pan/scalebio (b9ccce8). On their
    # batches and draws it is their run (tests/test_original.py); docs/design.md lists what they have beside it.
    "paper": {
        "bilevel.penalty_alpha": 100.0,
        "bilevel.logits_optimizer": "adamw",
        "bilevel.logits_lr": 1.0e-2,
        "bilevel.logits_schedule": "cosine",
        "bilevel.logits_weight_decay": 0.01,
        "bilevel.logits_gate": 0.0,
        "data.sampling": "natural",
        "data.replacement": True,
        "lisa.pairing": "independent",
        "lisa.keep_moments": True,
        "optimizer.decayed": "all",
        "optimizer.warmup_from_zero": True,
    },
}

BETAS = Range(
    "two numbers from 0 up to, not including, 1",
    lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
)
GATE = Range("from 0 to 10, of at most 14 standard errors that there can be", lambda value: 0 <= value <= 10)
UNIT = Range("a share, from 0 to 1", lambda value: 0 <= value <= 1)
SHARE = Range("a share of bilevel.steps, from 0 up to, not including, 1", lambda value: 0 <= value < 1)


@dataclass
class ShapeConfig:
    """The model's sizes. With `model.hf_path` they are the checkpoint's; without, of a model from random weights."""

    num_layers: int = setting(4, "decoder layers", at_least(1))
    hidden_size: int = setting(128, "numbers per token between layers", at_least(1))
    ffn_hidden_size: int = setting(384, "numbers per token inside an MLP", at_least(1))
    num_attention_heads: int = setting(4, "heads of the queries", at_least(1))
    num_query_groups: int = setting(2, "heads of the keys and of the values", at_least(1))
    vocab_size: Filled[int] = setting(None, "null: the tokenizer's", at_least(1))
    rope_base: float = setting(1_000_000.0, "of the rotary embeddings' wavelengths", POSITIVE)
    norm_epsilon: float = setting(1e-6, "is added to the mean square that an RMSNorm divides by", POSITIVE)
    tied_embeddings: bool = setting(False, "the embedding is the head, too")
    head_size: Filled[int] = setting(None, "null: hidden_size / num_attention_heads", at_least(1))
    rope_scaling: Any = setting(
        None, "Llama-3.1's: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings; null: none"
    )
    query_pre_attn_scalar: float | None = setting(
        None, "attention scores are divided by its square root; null: head_size", POSITIVE
    )
    attention_softcap: float | None = setting(None, "c in c * tanh(scores / c); null: none", POSITIVE)
    final_softcap: float | None = setting(None, "c in c * tanh(logits / c); null: none", POSITIVE)
    sliding_window: int | None = setting(
        None, "tokens that a layer with a window sees: gemma2's even layers, mistral's all; null: all", at_least(1)
    )


@dataclass
class ModelConfig:
    """Which model."""

    # Its choices are the families that there are; `rules.declared_settings` adds them.
    family: str = setting("qwen2", "a file of anatomy/families")
    hf_path: str | None = setting(
        None, "a Hugging Face checkpoint folder, whose shape then counts; null: random weights", path=True
    )
    shape: ShapeConfig = section(ShapeConfig)
    implementation: str = setting(
        "auto", "of the layers; auto: native; te: Transformer Engine's", choices=("auto", "native", "te")
    )


SETS = "a list of {name, path, weight}"


@dataclass
class SourceConfig:
    name: str = setting("???", "a name of your own")
    path: str = setting("???", "a JSON or JSON Lines file", path=True)


@dataclass
class DataConfig:
    """What the model is trained on, and how it is read."""

    tokenizer: Filled[str] = setting(
        None,
        'a Hugging Face folder, a SentencePiece .model, or "bytes"; null: model.hf_path\'s, else bytes',
        path=True,
        words=("bytes",),
    )
    template: str = setting(
        "auto",
        "auto: the tokenizer's chat template, else plain; plain; alpaca; or FILE.jinja",
        path=True,
        words=("auto", "plain", "alpaca"),
    )
    sources: list[SourceConfig] = setting([], "what is weighed: a name of your own and a JSON or JSON Lines file each")
    validation: Any = setting(
        None,
        "drives the weights: what the model should become good at; needed unless bilevel.mode=fixed. Of several sets"
        " each counts by its weight, 1 where none is given",
        path=True,
        several=SETS,
    )
    test: Any = setting(None, "only ever reported; null: none", path=True, several=SETS)
    max_length: int = setting(1024, "tokens of one example, and positions of one row", at_least(2))
    over_length: str = setting(
        "truncate",
        "what becomes of longer examples; truncate: cut, without an end of turn",
        choices=("truncate", "drop", "error"),
    )
    packing: bool = setting(True, "several examples in one row, none of which sees another")
    micro_batch_size: int = setting(1, "rows of max_length positions", at_least(1))
    sampling: Filled[str] = setting(
        None,
        "stratified: equal shares of the sources in every batch; natural: in proportion to their records; adaptive: by"
        " their weights (see shares.py)",
        choices=("stratified", "natural", "adaptive"),
    )
    exploration: float = setting(
        0.25, "adaptive, while weights are learned: share of the batch that all sources get equally", UNIT
    )
    replacement: Filled[bool] = setting(
        None, "each training example is drawn at random from all; false: all are seen before any comes again"
    )
    max_epochs: float | None = setting(
        None,
        "no source is drawn more often than this many times its records: what its weight asks for beyond goes to the"
        " others; null: no limit",
        POSITIVE,
    )
    response_loss_only: bool = setting(True, "false: prompts carry loss, too")


@dataclass
class BilevelConfig:
    """How the weights of the sources are learned."""

    preset: str = setting("default", "fills what is left null", choices=tuple(PRESETS))
    mode: str = setting(
        "bilevel", "fixed: one model is trained with the weights given, none are learned", choices=("bilevel", "fixed")
    )
    steps: int = setting(200, "training steps", at_least(1))
    global_batch_size: int = setting(128, "training examples per step", at_least(1))
    validation_batch_size: Filled[int] = setting(
        None, "validation examples per step; null: global_batch_size", at_least(1)
    )
    penalty_alpha: Filled[float] = setting(
        None, "how much the training losses count beside the validation loss", POSITIVE
    )
    penalty_growth: float = setting(1.0, "penalty_alpha *= penalty_growth after each step", POSITIVE)
    train_loss_unit: str = setting(
        "example",
        "example: mean over examples of the mean over tokens; token: mean over tokens",
        choices=("example", "token"),
    )
    validation_loss_unit: str = setting("token", "as train_loss_unit", choices=("token", "example"))
    logits_optimizer: Filled[str] = setting(None, "what moves the logits of the weights: see source_weights.py")
    logits_lr: Filled[float] = setting(None, "its learning rate", NOT_NEGATIVE)
    logits_schedule: Filled[str] = setting(None, "of logits_lr", choices=("constant", "cosine"))
    logits_weight_decay: Filled[float] = setting(None, "adamw only", NOT_NEGATIVE)
    logits_gate: Filled[float] = setting(
        None,
        "a source's logit is held back while its gap is within this many standard errors of the mean gap, over some"
        " hundred steps: noise; it catches up once it stands out; 0: it always moves",
        GATE,
    )
    logits_clip: float | None = setting(None, "largest norm of the hypergradient; null: no clip", POSITIVE)
    logits_warmup_steps: int = setting(0, "first steps in which the logits stay, and are only measured", at_least(0))
    weights: Any = setting(
        None, "start: a weights.json or a mapping {name: weight}; null: prior, else uniform", path=True
    )
    floor: float = setting(
        0.0, "smallest weight of a source: p = floor + (1 - K * floor) * softmax(logits)", NOT_NEGATIVE
    )
    prior: Any = setting(None, "mapping {name: weight}: p = softmax(logits + log prior); null: uniform")


@dataclass
class LisaConfig:
    """Which layers train at a time (LISA)."""

    enabled: bool = setting(True, "false: every layer trains in every step")
    num_active_layers: int = setting(2, "decoder layers that train at a time (gamma)", at_least(1))
    period: int = setting(20, "steps between draws", at_least(1))
    pairing: Filled[str] = setting(
        None,
        "shared: one stratified draw for both models; independent: one for each",
        choices=("shared", "independent"),
    )
    keep_moments: Filled[bool] = setting(
        None, "Adam's state of a layer that freezes waits on the device for its next thaw; false: that begins anew"
    )
    always_active: list[str] = setting(
        ["embedding", "final_norm", "head"],
        "what trains beside the layers drawn; a tied embedding and head go together; left out, a block stays frozen",
        choices=("embedding", "final_norm", "head"),
    )


@dataclass
class OptimizerConfig:
    """AdamW of both models."""

    lr: float = setting(2.0e-6, "both models", NOT_NEGATIVE)
    lr_lower: Filled[float] = setting(None, "null: lr", NOT_NEGATIVE)
    weight_decay: float = setting(5.0e-4, "decoupled: times lr", NOT_NEGATIVE)
    decayed: Filled[str] = setting(
        None, "what weight_decay shrinks; matrices: no norms, no biases", choices=("matrices", "all")
    )
    clip_grad: float | None = setting(
        1.0, "global norm of each model at clip_grad * penalty_alpha; null: no clip", POSITIVE
    )
    betas: list[float] = setting([0.9, 0.999], "decay of the first and second moment", BETAS)
    eps: float = setting(1.0e-8, "is added to the root of the second moment", POSITIVE)
    schedule: str = setting("cosine", "of lr and lr_lower, after the warm-up", choices=("cosine", "constant"))
    lr_end: float = setting(0.0, "where cosines end, as a share of the full rate; of logits_lr, too", UNIT)
    warmup: float = setting(0.03, "linear, of lr and lr_lower", SHARE)
    warmup_from_zero: Filled[bool] = setting(None, "the first step's rate is 0; false: one part of the warm-up's")
    moments: str | None = setting(
        None,
        "how Adam's moments are stored; null: as the masters, fp32; fp8: with block scales",
        choices=(None, "bf16", "fp8"),
    )


@dataclass
class PrecisionConfig:
    """What is computed and stored in how many bits."""

    compute: str = setting(
        "bf16", "fp64 is for the CPU, for parity; fp8 for a GPU", choices=("fp64", "fp32", "bf16", "fp8")
    )
    frozen_weights: str | None = setting(
        None, "of linears of frozen layers; null: as compute (bf16 under fp8)", choices=(None, "bf16", "fp8")
    )
    frozen_inputs: str = setting(
        "compute",
        "of products with fp8 weights; compute: as precision.compute; fp8: rounded, too",
        choices=("compute", "fp8"),
    )
    fp8_recipe: str = setting("blockwise", "of compute=fp8", choices=("blockwise", "tensorwise"))


@dataclass
class ParallelConfig:
    """How the ranks share the work; what tensor and pipeline leave over is data parallelism."""

    tensor: int = setting(1, "ranks that share each layer", at_least(1))
    pipeline: int = setting(1, "stages of layers", at_least(1))
    virtual_pipeline: int | None = setting(None, "virtual stages per stage; refused: not supported")
    layers_per_stage: Filled[list[int]] = setting(None, "decoder layers of each pipeline stage; null: equal numbers")
    sequence: bool = setting(False, "norms and residuals are cut along the sequence over the tensor ranks, too")
    recompute: str = setting(
        "none",
        "activations computed again in the backward pass; selective: the MLPs; full: whole layers",
        choices=("none", "selective", "full"),
    )
    fused_pipeline: bool = setting(True, "one flush for all micro-batches of both models; false: three flushes")


@dataclass
class RunConfig:
    """Where a run writes, how often, and on what it runs."""

    output_dir: str = setting("runs/demo", "a folder, relative to the working directory even in a file")
    seed: int = setting(1, "of the draws of data, layers and random weights", at_least(0))
    save_every: int = setting(50, "steps; 0: only at the end", at_least(0))
    stop: str = setting(
        "steps",
        "settled: after the step in which every weight has settled, a quarter of bilevel.steps at the earliest",
        choices=("steps", "settled"),
    )
    save_last: bool = setting(True, "a checkpoint after the last step, too")
    eval_every: int = setting(25, "steps; 0: only at the end", at_least(0))
    resume: str = setting("never", "auto: continue from the newest checkpoint in output_dir", choices=("never", "auto"))
    device: str = setting("auto", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"))
    export: bool = setting(True, "a model as a Hugging Face checkpoint, at the end")
    export_model: str = setting(
        "upper",
        "upper: has trained on the sources by their weights and on the validation records, in output_dir/hf; lower: on"
        " the sources alone, in output_dir/hf_lower; both",
        choices=("upper", "lower", "both"),
    )
    export_dtype: Filled[str] = setting(
        None, "null: as precision.compute (bf16 under fp8, fp32 under fp64)", choices=(None, "bf16", "fp32")
    )
    export_shard_gb: float = setting(5.0, "largest file of the export, in 10^9 bytes", POSITIVE)
    profile: Any = setting(None, "{steps: [first, last]}: a trace of these steps in output_dir/profile; null: none")


@dataclass
class Config:
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    bilevel: BilevelConfig = section(BilevelConfig)
    lisa: LisaConfig = section(LisaConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    precision: PrecisionConfig = section(PrecisionConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    run: RunConfig = section(RunConfig)


SETTINGS = declared(Config)
SOURCE_SETTINGS = declared(SourceConfig)
