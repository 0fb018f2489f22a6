"""What Adam's moments in bf16 or 8 bits do to a run: final source weights and test loss, over seeds.

    python tools/benchmarks/moments.py --data runs/moments --seeds 4 --out tools/benchmarks/results/FILE.json

The task, model and settings of examples/quickstart.yaml (examples/arithmetic.py, its seed the run's), computing in
bf16 with masters in fp32, in one process. "To the nearest" is no setting: the draws that round moments up or down are
replaced by a half.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools import compare_presets  # noqa: E402

TO_THE_NEAREST = ", to the nearest"
VARIANTS = {
    "fp32": "null",
    "bf16": "bf16",
    f"bf16{TO_THE_NEAREST}": "bf16",
    "fp8": "fp8",
    f"fp8{TO_THE_NEAREST}": "fp8",
}
PRESET = "shared draws, alpha 1, AdamW"  # the default's


def run(variant: str, seed: int, data: str, overrides: list[str]) -> dict:
    """One run in this process; returns its numbers."""
    import torch
    from megatron_scalebio.kernels import moments

    def halves(numel: int, first_index: int, key: int, device: torch.device) -> torch.Tensor:
        return torch.full((numel,), -0x7FFF8000, dtype=torch.int32, device=device)  # half of 2^16, and of 2^32

    draws = halves if variant.endswith(TO_THE_NEAREST) else moments._random_bits_reference
    settings = ["precision.compute=bf16", f"optimizer.moments={VARIANTS[variant]}", *overrides]
    with mock.patch.object(moments, "_random_bits_reference", draws):
        return compare_presets.run(PRESET, seed, data, settings) | {"variant": variant}


def summarise(runs: list[dict]) -> list[dict]:
    """One row per variant: means over seeds, and the difference of test losses from fp32, seed by seed."""
    losses = {(result["variant"], result["seed"]): result["test_loss"] for result in runs}
    rows = []
    for variant in VARIANTS:
        mine = [result for result in runs if result["variant"] == variant]
        weights = [result["weights"] for result in mine]
        differences = [losses[variant, result["seed"]] - losses["fp32", result["seed"]] for result in mine]
        rows.append(
            {
                "variant": variant,
                "weights_mean": [statistics.fmean(column) for column in zip(*weights, strict=True)],
                "first_three_in_order": sum(row[0] > row[1] > max(row[2:]) for row in weights),
                "test_loss": statistics.fmean(result["test_loss"] for result in mine),
                "test_loss_minus_fp32": [min(differences), statistics.fmean(differences), max(differences)],
                "seeds": len(mine),
            }
        )
    return rows


def print_table(rows: list[dict]) -> None:
    """Markdown."""
    print("| moments | clean | 25% | 50% | 75% | 100% wrong | clean > 25% > rest | test loss | minus fp32's, mean |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        weights = " | ".join(f"{weight:.3f}" for weight in row["weights_mean"])
        order = f"{row['first_three_in_order']}/{row['seeds']}"
        losses = f"{row['test_loss']:.4f} | {row['test_loss_minus_fp32'][1]:+.4f}"
        print(f"| {row['variant']} | {weights} | {order} | {losses} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder for the generated data, one folder per seed")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings for every run")
    args = parser.parse_intermixed_args()

    folders = {seed: args.data / f"seed_{seed}" for seed in range(1, args.seeds + 1)}
    for seed, folder in folders.items():
        generator = [sys.executable, str(ROOT / "examples/arithmetic.py"), str(folder), "--seed", str(seed)]
        subprocess.run(generator, check=True)
    runs = []
    # One process per run: a process hosts one layout and one pair of models at a time.
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = [
            pool.submit(run, variant, seed, str(folder), args.overrides)
            for seed, folder in folders.items()
            for variant in VARIANTS
        ]
        for job in jobs:
            result = job.result()
            runs.append(result)
            weights = " ".join(f"{weight:.3f}" for weight in result["weights"])
            print(f"{result['variant']}, seed {result['seed']}: {weights}, {result['test_loss']:.4f}", flush=True)
    rows = summarise(runs)
    print_table(rows)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
        content = {
            "command": "python tools/benchmarks/moments.py " + " ".join(sys.argv[1:]),
            "commit": commit.stdout.strip(),
            "device": f"CPU {platform.machine()}, one thread per run",
            "versions": {name: version(name) for name in ("torch", "megatron-core")},
            "summary": rows,
            "runs": runs,
        }
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
