"""The first steps on CUDA against the golden run of tests/golden (fp64, CPU): correctness before speed.

    python tools/benchmarks/cuda_check.py fp32      scaled_dot_product_attention, NCCL, the Triton kernels
    python tools/benchmarks/cuda_check.py bf16      torch's variable-length flash attention, tensor-core products

Exits with status 1 if a loss of the first step is off by more than its dtype's rounding allows.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# Mean losses near 5.5, absolute: some ten times what the CPU's own fp32 (2e-8 in sums of another order: 1e-7) and
# bf16 (1.3e-4) are off by at the first step.
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compute", choices=TOLERANCE)
    compute = parser.parse_args().compute

    from tests.golden import make

    make.SETTINGS += [f"precision.compute={compute}", "run.device=cuda"]
    with tempfile.TemporaryDirectory() as folder:
        make.make_data(folder)
        records = make.golden_run(folder)
    golden = json.loads(make.FILE.read_text(encoding="utf-8"))
    for step, (record, expected) in enumerate(zip(records, golden, strict=True), start=1):
        errors = {
            key: max(abs(record[key][name] - value) for name, value in expected[key].items())
            for key in ("train_loss_lower", "train_loss_upper", "hypergradient", "weights")
        }
        print(f"step {step}", "  ".join(f"{key} off by {error:.2e}" for key, error in errors.items()))
        if step == 1:
            worst = max(errors["train_loss_lower"], errors["train_loss_upper"])
            ok = worst <= TOLERANCE[compute] and not any(record["hypergradient"].values())
    print("ok" if ok else f"FAILED: first losses off by {worst:.2e}, allowed {TOLERANCE[compute]:.0e}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
