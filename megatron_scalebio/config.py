"""Every setting, declared once.

Precedence: defaults < preset < file < command line. A field whose default is None is filled by the preset
(`PRESETS`) or derived from another setting, as its comment says.
"""

from dataclasses import dataclass, field
from typing import Any


class UserError(Exception):
    """A mistake in what the user gave: one message that names the file, line, source or key, the rule and the values.

    The command line prints it without a traceback and exits with status 2.
    """


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


@dataclass
class ModelConfig:
    family: str = "qwen2"  # qwen2 (2 and 2.5)
    hf_path: str | None = None  # a Hugging Face checkpoint folder; None: random weights in the shape below
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    implementation: str = "auto"  # auto | native | te


@dataclass
class SourceConfig:
    name: str = "???"
    path: str = "???"


@dataclass
class DataConfig:
    tokenizer: str = "bytes"  # a Hugging Face folder, a SentencePiece .model, or "bytes"
    template: str = "auto"  # auto: the tokenizer's chat template, else plain | plain | alpaca | FILE.jinja
    sources: list[SourceConfig] = field(default_factory=list)
    validation: str | None = None  # drives the weights
    test: str | None = None  # only ever reported
    max_length: int = 1024  # tokens of one example, and positions of one row
    over_length: str = "truncate"  # truncate | drop | error
    packing: bool = True
    micro_batch_size: int = 1  # rows of max_length positions
    sampling: str = "stratified"  # stratified | natural
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


@dataclass
class PrecisionConfig:
    compute: str = "bf16"  # fp64 (CPU, for parity) | fp32 | bf16 | fp8
    frozen_weights: str | None = None  # None: as compute (bf16 under fp8) | fp8


@dataclass
class ParallelConfig:
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None  # virtual stages per stage; refused: not supported
    sequence: bool = False
    fused_pipeline: bool = True  # one flush for all micro-batches of both models; False: three flushes


@dataclass
class RunConfig:
    output_dir: str = "runs/demo"
    seed: int = 1
    save_every: int = 50  # steps; 0: only at the end
    eval_every: int = 25  # steps; 0: only at the end
    resume: str = "never"  # never | auto
    device: str = "auto"  # auto | cpu | cuda


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
