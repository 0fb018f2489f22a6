"""A real pretrained model on tasks with a known order: which weights, and what they are worth, over seeds.

    python tools/benchmarks/smollm2.py --model FOLDER --task DIR --oracle clean --seeds 3 --out FILE.json

DIR holds train/*.jsonl, one file per source, val.jsonl and test.jsonl; settings for all runs follow the options. Each
seed has four runs of equal steps: bilevel with the default preset and with the paper's, and two that train one model
with fixed weights, uniform and on the oracle's source alone. Reported: final weights, the loss of the upper model on
the test set, the seconds a step takes.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

VARIANTS = {
    "bilevel, preset default": ["bilevel.preset=default"],
    "bilevel, preset paper": ["bilevel.preset=paper"],
    "fixed, uniform": ["bilevel.mode=fixed"],
    "fixed, oracle": ["bilevel.mode=fixed"],
}


def run(variant: str, seed: int, args: argparse.Namespace) -> dict:
    """One run in this process; returns its numbers."""
    from megatron_scalebio.config import load_config
    from megatron_scalebio.data import load_dataset
    from megatron_scalebio.device import read_back
    from megatron_scalebio.hf import adopt_checkpoint, check_checkpoint
    from megatron_scalebio.rules import check_config
    from megatron_scalebio.trainer import Trainer

    files = sorted((args.task / "train").glob("*.jsonl"))
    names = [file.stem for file in files]
    if args.oracle not in names:
        raise SystemExit(f"error: --oracle {args.oracle}: the sources of {args.task} are {', '.join(names)}")
    settings = [
        *(f"model.hf_path={args.model}", f"run.seed={seed}", "data.template=plain"),
        "data.sources=[" + ", ".join(f"{{name: {file.stem}, path: '{file.absolute()}'}}" for file in files) + "]",
        *(f"data.validation={args.task / 'val.jsonl'}", f"data.test={args.task / 'test.jsonl'}"),
        *VARIANTS[variant],
    ]
    if variant == "fixed, oracle":
        weights = ", ".join(f"{name}: {int(name == args.oracle)}" for name in names)
        settings.append(f"bilevel.weights={{{weights}}}")
    config = load_config(None, [*settings, *args.settings])
    adopt_checkpoint(config, {})
    check_checkpoint(config)
    dataset = load_dataset(config)
    check_config(config, 1, dataset.tokenizer.vocab_size)
    trainer = Trainer(config, dataset)
    first, started, seconds = trainer.evaluate(), time.perf_counter(), []
    for _ in range(config.bilevel.steps):
        _, result = trainer.take_step()
        read_back(next(iter(result.grad_norm.values())))  # the step is over on the device
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    weights = dict(zip(names, trainer.source_weights.weights.tolist(), strict=True))
    row = {"variant": variant, "seed": seed, "weights": weights, "test_loss_before": first}
    return row | {"test_loss": trainer.evaluate(), "median_step_seconds": statistics.median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder; tools/get_smollm2.py makes one")
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--oracle", required=True, help="the source that ought to lead")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file, written after every run")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    from megatron_scalebio.device import choose_device
    from tools.benchmarks.timing import environment

    content = environment(choose_device("auto"), "smollm2.py " + " ".join(sys.argv[1:])) | {"runs": []}
    for seed in range(1, args.seeds + 1):
        for variant in VARIANTS:
            row = run(variant, seed, args)
            weights = "  ".join(f"{name} {weight:.3f}" for name, weight in row["weights"].items())
            losses = f"test loss {row['test_loss_before']:.4f} -> {row['test_loss']:.4f}"
            pace = f"{row['median_step_seconds']:.2f} s/step"
            print(f"seed {seed}  {variant:24}  {weights}  {losses}  {pace}", flush=True)
            content["runs"].append(row)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
