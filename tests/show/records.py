"""Records of steps that no run took."""

from typing import Any

from megatron_scalebio.show.record import StepRecord


def a_record(step: int, **changes: Any) -> StepRecord:
    """Of two sources, whose weights move from step to step, unless `changes` says otherwise."""
    clean = 0.5 + 0.05 * step
    values = {
        "weights": {"clean": clean, "noisy": 1 - clean},
        "logits": {"clean": 0.1 * step, "noisy": -0.1 * step},
        "train_loss_lower": {"clean": 1.0, "noisy": 2.0},
        "train_loss_upper": {"clean": 1.0, "noisy": 2.0},
        "val_loss": 1.5,
        "penalty_gap": 1e-3,
        "penalty_alpha": 1.0,
        "hypergradient": {"clean": -1e-3, "noisy": 1e-3},
        "signal_to_noise": {"clean": 1.5, "noisy": 1.5},
        "grad_norm_lower": 1.0,
        "grad_norm_upper": 1.0,
        "lr": 1e-5,
        "logits_lr": 1e-2,
        "active_layers": {"lower": [0], "upper": [0]},
        "num_tokens": 1000,
        "num_loss_tokens": 500,
        "step_seconds": 0.25,
        "tokens_per_second": 4000.0,
        "tflops_per_gpu": 400.0,
        "mfu": None,
        "num_examples": {"clean": 6, "noisy": 2},
        "kept": {},
        "val_losses": {},
        "flops": 1e14,
        "peak_memory_bytes": 2**30,
    }
    return StepRecord(step=step, **(values | changes))
