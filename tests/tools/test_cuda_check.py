"""The first thing that a GPU runs, on the CPU: that it works, and sees what it is there to see."""

from unittest import mock

from tests.distributed import run_distributed
from tests.mcore.test_te_linear import standing_in
from tools.benchmarks import cuda_check

TINY = (
    *("model.shape.num_layers=4", "model.shape.hidden_size=32", "model.shape.ffn_hidden_size=48"),
    *("model.shape.num_attention_heads=4", "model.shape.num_query_groups=2", "data.max_length=272"),
    "bilevel.global_batch_size=4",
)


def golden_checks(compute: str, tolerance: float) -> list[bool]:
    checks = cuda_check.Checks()
    with mock.patch.dict(cuda_check.TOLERANCE, {compute: tolerance}):
        cuda_check.check_golden_run(checks, compute, "cpu")
    return [row["passed"] for row in checks.rows]


def fp8_checks() -> list[dict]:
    """With the stand-in for Transformer Engine, whose products are bf16's."""
    checks = cuda_check.Checks()
    with (
        standing_in(),
        mock.patch("torch.cuda.is_available", lambda: False),
        mock.patch.multiple(cuda_check, MODEL=TINY, kept_bytes=lambda call: call().numel() * 0),
    ):
        cuda_check.check_fp8_model(checks, "blockwise")
    return checks.rows


def test_fp32_passes_and_what_is_rounded_as_bf16_is_does_not():
    assert run_distributed(1, golden_checks, "fp32", cuda_check.TOLERANCE["fp32"]) == [[True, True, True]]
    assert run_distributed(1, golden_checks, "bf16", cuda_check.TOLERANCE["fp32"]) == [[False, False, True]]


def test_a_model_whose_products_are_not_in_fp8_fails_by_that_alone():
    (rows,) = run_distributed(1, fp8_checks)
    failed = [row["probe"] for row in rows if not row["passed"]]
    assert failed == ["blockwise model: largest difference of a source's loss from bf16, in nats"]
    assert any("in Transformer Engine" in row["probe"] for row in rows) and len(rows) == 5
