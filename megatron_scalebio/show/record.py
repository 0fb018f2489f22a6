"""What is known of one step: a line of metrics.jsonl."""

import math
from dataclasses import dataclass
from typing import Any

BySource = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The keys of metrics.jsonl, in their order. Losses are those before the step's update, in nats per token or per
    example as the settings say; the weights and logits are those after it. Under mode fixed, what belongs to the lower
    model or to the weights' update is null or empty."""

    step: int  # from 1
    weights: BySource  # p, which add up to 1
    logits: BySource
    train_loss_lower: dict[str, float | None]  # null: the batch has no example of the source
    train_loss_upper: dict[str, float | None]
    val_loss: float | None
    penalty_gap: float | None  # p . g, upper minus lower
    penalty_alpha: float
    hypergradient: BySource  # before clip and decay
    grad_norm_lower: float | None  # L2, before the clip
    grad_norm_upper: float
    lr: float  # of the upper model
    logits_lr: float | None
    active_layers: dict[str, list[int]]  # {"lower", "upper"}: of the whole model, from 0
    num_tokens: int  # train and validation batch of all ranks, each counted once; padding excluded
    num_loss_tokens: int  # of them, those that carry loss
    step_seconds: float  # the main rank's, from drawing the batch until the device is done; evaluation excluded
    tokens_per_second: float  # num_tokens / step_seconds, of all ranks together
    tflops_per_gpu: float  # executed 10^12 FLOP/s of one rank, the mean over ranks: padding and recomputation included
    mfu: float | None  # model FLOP/s of one rank over its dense bf16 peak, from 0 to 1; null: the peak is not known
    num_examples: dict[str, int]  # of each source, in this step's training batch
    flops: float  # executed in this step by all ranks together
    peak_memory_bytes: int  # of the fullest rank: on a GPU torch's tensors in this step; on the CPU the process so far
    signal_to_noise: BySource  # `SourceWeights.signal_to_noise`
    kept: BySource  # share of its weight that data.max_epochs leaves a source; empty: there is no limit
    val_losses: BySource  # of each validation set; empty: there is but one
    test_loss: float | None = None  # of the upper model; only in records of steps after which it was evaluated
    test_losses: BySource | None = None  # the same of each test set, where there are several
    test_loss_lower: float | None = None  # the same, where `run.export_model` names the lower model

    def to_dict(self) -> dict[str, Any]:
        """The line's object, as JSON takes it: what is not finite is null, the test losses may not be there."""
        numbers = {key: _finite(value) for key, value in vars(self).items()}
        for name in ("test_loss", "test_losses", "test_loss_lower"):
            if getattr(self, name) is None:
                del numbers[name]
        return numbers


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
