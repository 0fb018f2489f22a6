"""What a GPU does at best, and so what utilisation is a share of."""

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


def peak_flops(device_name: str, compute: str) -> float | None:
    """FLOP/s that the MFU of a run is a share of: dense bf16, also under FP8, whose products beside bf16 ones it would
    flatter. None where that is not known, or `precision.compute` does not run on those tensor cores."""
    return PEAKS.get(device_name, {}).get("bf16") if compute in ("bf16", "fp8") else None
