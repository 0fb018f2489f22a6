"""Does the run find the planted order? Presets, penalties and logits optimizers on the arithmetic task, over seeds.

    python tools/compare_presets.py --data runs/compare --seeds 5 --out tools/benchmarks/results/FILE.json

Five sources of sums with 0, 25, 50, 75 and 100% wrong answers (examples/arithmetic.py, its seed the run's), the model
and the batch of examples/quickstart.yaml, from random weights. Prints one row per variant: final weights, in how many
seeds the clean source leads and the order of the first three is the planted one, test loss, and the hypergradient's
signal-to-noise ratio |mean over steps| / |standard deviation over steps|.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ["lisa.pairing=shared", "bilevel.logits_schedule=constant"]
LOGITS = {
    "AdamW": ["bilevel.logits_optimizer=adamw", "bilevel.logits_lr=2e-2"],
    "exponentiated gradient": ["bilevel.logits_optimizer=exponentiated_gradient", "bilevel.logits_lr=0.5"],
}

VARIANTS: dict[str, list[str]] = {
    "preset paper (alpha 100, independent draws)": ["bilevel.preset=paper", "bilevel.logits_lr=2e-2"],
    **{
        f"shared draws, alpha {alpha}, {name}": [f"bilevel.penalty_alpha={alpha}", *SHARED, *logits]
        for alpha in (1, 10, 100)
        for name, logits in LOGITS.items()
    },
}


def run(variant: str, seed: int, data: str, overrides: list[str]) -> dict:
    """One run in this process; returns its numbers."""
    import torch

    torch.set_num_threads(1)
    from megatron_scalebio.config import load_config
    from megatron_scalebio.data import load_dataset
    from megatron_scalebio.trainer import Trainer

    settings = ["parallel.tensor=1", f"run.seed={seed}", "run.device=cpu", *VARIANTS[variant], *overrides]
    config = load_config(str(ROOT / "examples/quickstart.yaml"), settings)
    for source in config.data.sources:
        source.path = str(Path(data) / "train" / Path(source.path).name)
    config.data.validation, config.data.test = str(Path(data) / "val.jsonl"), str(Path(data) / "test.jsonl")
    trainer = Trainer(config, load_dataset(config))
    started, hypergradients = time.perf_counter(), []
    for _ in range(config.bilevel.steps):
        _, result = trainer.take_step()
        hypergradients.append(result.hypergradient)
    stacked = torch.stack(hypergradients)
    return {
        "variant": variant,
        "seed": seed,
        "weights": trainer.source_weights.weights.tolist(),
        "test_loss": trainer.evaluate(),
        "signal_to_noise": (stacked.mean(dim=0).norm() / stacked.std(dim=0).norm()).item(),
        "seconds": time.perf_counter() - started,
    }


def summarise(runs: list[dict]) -> list[dict]:
    """One row per variant: means over seeds, and counts of seeds."""
    rows = []
    for variant in VARIANTS:
        mine = [result for result in runs if result["variant"] == variant]
        weights = [result["weights"] for result in mine]
        rows.append(
            {
                "variant": variant,
                "weights_mean": [statistics.fmean(column) for column in zip(*weights, strict=True)],
                "clean_min": min(row[0] for row in weights),
                "clean_leads": sum(max(row) == row[0] for row in weights),
                "first_three_in_order": sum(row[0] > row[1] > max(row[2:]) for row in weights),
                "test_loss": statistics.fmean(result["test_loss"] for result in mine),
                "signal_to_noise": statistics.fmean(result["signal_to_noise"] for result in mine),
                "seeds": len(mine),
            }
        )
    return rows


def print_table(rows: list[dict]) -> None:
    """Markdown, as it is published."""
    print("| variant | clean | 25% | 50% | 75% | 100% wrong | clean leads | clean > 25% > rest | test loss | SNR |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        weights = " | ".join(f"{weight:.3f}" for weight in row["weights_mean"])
        leads, order = (f"{row[key]}/{row['seeds']}" for key in ("clean_leads", "first_three_in_order"))
        numbers = f"{row['test_loss']:.3f} | {row['signal_to_noise']:.2f}"
        print(f"| {row['variant']} | {weights} | {leads} | {order} | {numbers} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder for the generated data, one folder per seed in it")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", help="JSON file for all numbers")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings for every run")
    args = parser.parse_args()

    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    folders = {seed: Path(args.data) / f"seed_{seed}" for seed in range(1, args.seeds + 1)}
    for seed, folder in folders.items():
        generator = [sys.executable, str(ROOT / "examples/arithmetic.py"), str(folder), "--seed", str(seed)]
        subprocess.run(generator, check=True)
    runs = []
    # One process per run: a process hosts one layout and one pair of models at a time.
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = [
            pool.submit(run, variant, seed, str(folder), args.overrides)
            for variant in VARIANTS
            for seed, folder in folders.items()
        ]
        for job in jobs:
            result = job.result()
            runs.append(result)
            weights = " ".join(f"{weight:.3f}" for weight in result["weights"])
            print(f"{result['variant']}, seed {result['seed']}: {weights} ({result['seconds']:.0f} s)", flush=True)
    rows = summarise(runs)
    print_table(rows)
    if args.out:
        import torch

        commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
        content = {
            "command": "python tools/compare_presets.py " + " ".join(sys.argv[1:]),
            "commit": commit.stdout.strip(),
            "device": f"CPU {platform.machine()}, one thread per run",
            "versions": {"torch": torch.__version__, "megatron-core": version("megatron-core")},
            "settings": VARIANTS,
            "summary": rows,
            "runs": runs,
        }
        Path(args.out).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
