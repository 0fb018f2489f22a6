"""A refactor changes no loss: a short run against the one in git."""

import json

import pytest

from tests.distributed import run_distributed
from tests.golden.make import FILE
from tools.benchmarks.golden_run import golden_run


def test_losses_equal_the_golden_run() -> None:
    """To 1e-10: fp64 sums in another order (another BLAS, another processor) and nothing else."""
    (records,) = run_distributed(1, golden_run)
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    assert len(records) == len(golden)
    for step, (record, expected) in enumerate(zip(records, golden, strict=True), start=1):
        for key, value in expected.items():
            assert record[key] == pytest.approx(value, rel=1e-10, abs=1e-10), f"step {step}, {key}"
