"""What a step that was taken has computed, and what the GPU could have."""

from collections.abc import Collection, Sequence

from megatron_scalebio.config import Config
from megatron_scalebio.data.batch import Rows, StepBatch
from megatron_scalebio.plan.flops import Flops, Work, step_flops, work_of
from megatron_scalebio.plan.seconds import H100, H200

# Dense FLOP/s by the operands' type, by torch's name of the device. NVIDIA's data sheets of A100, H100, GH200, H200 and
# HGX B200; those from Hopper on print FLOPs with sparsity, twice these.
PEAKS: dict[str, dict[str, float]] = {
    "NVIDIA A100-SXM4-40GB": {"bf16": 312e12},
    "NVIDIA A100-SXM4-80GB": {"bf16": 312e12},
    "NVIDIA A100 80GB PCIe": {"bf16": 312e12},
    "NVIDIA H100 80GB HBM3": H100.flops,
    "NVIDIA H100 PCIe": {"bf16": 756e12, "fp8": 1513e12},
    "NVIDIA H100 NVL": {"bf16": 835e12, "fp8": 1671e12},
    "NVIDIA GH200 480GB": H100.flops,
    "NVIDIA H200": H200.flops,
    "NVIDIA H200 NVL": {"bf16": 835e12, "fp8": 1671e12},
    "NVIDIA B200": {"bf16": 2250e12, "fp8": 4500e12},
}


def work_of_rows(rows: Rows, loss_tokens: int, window: int | None) -> Work:
    """The work of what all data-parallel ranks hold."""
    return work_of([*rows.examples, *rows.padding], rows.num_positions, loss_tokens, window)


def batch_flops(config: Config, active: Sequence[Collection[int]], batch: StepBatch) -> Flops:
    """Of the step that takes this batch, as it is packed; `active` as in `step_flops`."""
    window = config.model.shape.sliding_window
    train = work_of_rows(batch.train_rows, sum(batch.num_loss_tokens), window)
    validation = work_of_rows(batch.validation_rows, sum(batch.num_validation_loss_tokens), window)
    return step_flops(config, active, train, validation)


def peak_flops(device_name: str, compute: str) -> float | None:
    """FLOP/s of which a run's MFU is the share: the device's dense bf16 peak, also where some products run in FP8. None
    where it is not known, or where `precision.compute` (fp32, fp64) does not run on those tensor cores."""
    return PEAKS.get(device_name, {}).get("bf16") if compute in ("bf16", "fp8") else None
