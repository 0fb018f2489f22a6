"""Every setting, declared once.

Precedence: defaults < preset < file < command line. A field whose default is None is filled by the preset
(`PRESETS`) or derived from another setting, as its comment says. `rules.check_config` holds the rules.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ShapeConfig:
    num_layers: int = 4
    hidden_size: int = 128
    ffn_hidden_size: int = 384
    num_attention_heads: int = 4
    num_query_groups: int = 2
    vocab_size: int | None = None  # None: the tokenizer's
    rope_base: float = 1_000_000.0
    norm_epsilon: float = 1e-6
    tied_embeddings: bool = False
    head_size: int | None = None  # None: hidden_size / num_attention_heads
    rope_scaling: Any = None  # Llama-3.1's: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    query_pre_attn_scalar: float | None = None  # attention scores are divided by its square root; None: head_size
    attention_softcap: float | None = None  # c in c * tanh(scores / c)
    final_softcap: float | None = None  # c in c * tanh(logits / c)
    sliding_window: int | None = None  # tokens that every other layer sees, from the first layer on; None: all


@dataclass
class ModelConfig:
    family: str = "qwen2"  # qwen2 (2 and 2.5) | llama3 (and 2, 3.1, 3.2) | gemma2
    hf_path: str | None = None  # a Hugging Face checkpoint folder, whose shape then counts; None: random weights
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    implementation: str = "auto"  # auto (native) | native | te


@dataclass
class SourceConfig:
    name: str = "???"
    path: str = "???"


@dataclass
class DataConfig:
    tokenizer: str | None = None  # a Hugging Face folder, a SentencePiece .model, or "bytes"; None: model.hf_path's
    template: str = "auto"  # auto: the tokenizer's chat template, else plain | plain | alpaca | FILE.jinja
    sources: list[SourceConfig] = field(default_factory=list)
    validation: str | None = None  # drives the weights
    test: str | None = None  # only ever reported
    max_length: int = 1024  # tokens of one example, and positions of one row
    over_length: str = "truncate"  # truncate | drop | error
    packing: bool = True
    micro_batch_size: int = 1  # rows of max_length positions
    sampling: str | None = None  # preset: stratified | natural
    response_loss_only: bool = True


@dataclass
class BilevelConfig:
    preset: str = "default"  # default | paper
    mode: str = "bilevel"  # bilevel | fixed
    steps: int = 200
    global_batch_size: int = 128  # training examples per step
    validation_batch_size: int | None = None  # None: global_batch_size
    penalty_alpha: float | None = None  # preset
    penalty_growth: float = 1.0  # penalty_alpha *= penalty_growth after each step
    train_loss_unit: str = "example"  # example: mean over examples of the mean over tokens | token: mean over tokens
    validation_loss_unit: str = "token"  # token | example
    logits_optimizer: str | None = None  # preset: adamw | exponentiated_gradient | sgd
    logits_lr: float | None = None  # preset
    logits_schedule: str | None = None  # preset: constant | cosine
    logits_weight_decay: float | None = None  # preset; adamw only
    weights: Any = None  # start: a weights.json or a mapping {name: weight}; None: prior, else uniform
    floor: float = 0.0  # smallest weight of a source: p = floor + (1 - K * floor) * softmax(logits)
    prior: Any = None  # mapping {name: weight}: p = softmax(logits + log prior); None: uniform


@dataclass
class LisaConfig:
    enabled: bool = True
    num_active_layers: int = 2  # gamma
    period: int = 20  # steps between draws
    pairing: str | None = None  # preset: shared (one stratified draw for both models) | independent
    # What trains beside the layers drawn; a tied embedding and head go together. Left out, a block stays frozen.
    always_active: list[str] = field(default_factory=lambda: ["embedding", "final_norm", "head"])


@dataclass
class OptimizerConfig:
    lr: float = 2.0e-6  # both models
    lr_lower: float | None = None  # None: lr
    weight_decay: float = 5.0e-4  # matrices only: norms and biases are never decayed
    clip_grad: float | None = 1.0  # global norm of each model at clip_grad * penalty_alpha; None: no clip
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1.0e-8
    schedule: str = "cosine"  # cosine | constant
    warmup: float = 0.03  # share of bilevel.steps
    moments: str | None = None  # how Adam's moments are stored: None (as the masters, fp32) | bf16 | fp8 (block scales)


@dataclass
class PrecisionConfig:
    compute: str = "bf16"  # fp64 (CPU, for parity) | fp32 | bf16 | fp8
    frozen_weights: str | None = None  # None: as compute (bf16 under fp8) | bf16 | fp8: linears of frozen layers
    frozen_inputs: str = "compute"  # of products with fp8 weights: compute (as precision.compute) | fp8 (rounded, too)
    fp8_recipe: str = "blockwise"  # of compute=fp8: blockwise | tensorwise


@dataclass
class ParallelConfig:
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None  # virtual stages per stage; refused: not supported
    layers_per_stage: list[int] | None = None  # decoder layers of each pipeline stage; None: equal numbers
    sequence: bool = False
    recompute: str = "none"  # activations computed again in the backward pass: none | selective (the MLPs) | full
    fused_pipeline: bool = True  # one flush for all micro-batches of both models; False: three flushes


@dataclass
class RunConfig:
    output_dir: str = "runs/demo"
    seed: int = 1
    save_every: int = 50  # steps; 0: only at the end
    eval_every: int = 25  # steps; 0: only at the end
    resume: str = "never"  # never | auto
    device: str = "auto"  # auto | cpu | cuda
    export: bool = True  # the upper model as a Hugging Face checkpoint in output_dir/hf, at the end
    export_dtype: str | None = None  # bf16 | fp32; None: as precision.compute
    export_shard_gb: float = 5.0  # largest file of the export, in 10^9 bytes
    profile: Any = None  # {steps: [first, last]}: a trace of these steps in output_dir/profile; None: none


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    bilevel: BilevelConfig = field(default_factory=BilevelConfig)
    lisa: LisaConfig = field(default_factory=LisaConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)


PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "bilevel.penalty_alpha": 1.0,
        "bilevel.logits_optimizer": "adamw",
        "bilevel.logits_lr": 1.0e-2,
        "bilevel.logits_schedule": "constant",
        "bilevel.logits_weight_decay": 0.01,
        "data.sampling": "stratified",
        "lisa.pairing": "shared",
    },
    # The original's settings, arXiv 2406.19976 and its authors' scripts. Two of its habits do not come back: draws that
    # differ from rank to rank, and optimizer states of frozen layers kept for ever.
    "paper": {
        "bilevel.penalty_alpha": 100.0,
        "bilevel.logits_optimizer": "adamw",
        "bilevel.logits_lr": 1.0e-2,
        "bilevel.logits_schedule": "cosine",
        "bilevel.logits_weight_decay": 0.01,
        "data.sampling": "natural",
        "lisa.pairing": "independent",
    },
}
