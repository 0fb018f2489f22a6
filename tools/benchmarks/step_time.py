"""Where a step's time goes, as ratios measured in turn in one run, on synthetic examples.

    torchrun --nproc_per_node 2 tools/benchmarks/step_time.py flush --out FILE.json   one flush against three, PP = 2
    python tools/benchmarks/step_time.py plain --out FILE.json     a bilevel step against plain training on its tokens
    python tools/benchmarks/step_time.py sources --out FILE.json   step time against the number of sources

Each pair is timed A B A B ...; a ratio is the median over pairs. Times are whole steps, the slowest rank's.
Further arguments are settings, such as model.shape.hidden_size=256.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_scalebio.config import Config, SourceConfig, load_config
from megatron_scalebio.data import Dataset, Example
from megatron_scalebio.data.tokenizers import BytesTokenizer
from megatron_scalebio.rules import check_config
from megatron_scalebio.trainer import Trainer

ROW = 256  # positions of a row; an example fills one
SETTINGS = [
    "model.shape.num_layers=8",
    f"data.max_length={ROW + 1}",
    "data.packing=false",
    "data.validation=synthetic",
    "precision.compute=fp32",
    "optimizer.lr=1e-4",
    "run.resume=never",
]


def make_trainer(num_sources: int, settings: list[str]) -> Trainer:
    """A trainer on random examples of ROW tokens, half of which carry loss; nothing is read or written."""
    config = load_config(None, SETTINGS + settings)
    config.data.sources = [SourceConfig(f"source_{index}", "synthetic") for index in range(num_sources)]
    check_config(config, int(os.environ.get("WORLD_SIZE", 1)), BytesTokenizer().vocab_size)
    return Trainer(config, _synthetic_dataset(config))


def _synthetic_dataset(config: Config) -> Dataset:
    generator = np.random.default_rng(0)
    mask = np.arange(ROW) >= ROW // 2

    def examples(source_id: int) -> list[Example]:
        return [Example(generator.integers(0, 256, ROW, dtype=np.int32), mask, source_id) for _ in range(64)]

    names = [source.name for source in config.data.sources]
    train = [examples(index) for index in range(len(names))]
    return Dataset(BytesTokenizer(), names, train, examples(0))


def seconds(action: Callable[[], object]) -> float:
    """Wall time of an action on the slowest rank, the device's work included."""
    dist.barrier()
    torch.cuda.synchronize()  # does nothing on the CPU, where the seam stands in for it
    started = time.perf_counter()
    action()
    torch.cuda.synchronize()
    elapsed = torch.tensor(time.perf_counter() - started, device=torch.cuda.current_device())
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return elapsed.item()


def compare(first: Callable[[], object], second: Callable[[], object], pairs: int) -> dict[str, float]:
    """Median seconds of both, and median, least and greatest ratio first / second, pair by pair, after a warm-up."""
    first(), second()
    times = [(seconds(first), seconds(second)) for _ in range(pairs)]
    ratios = [a / b for a, b in times]
    return {
        "first_seconds": statistics.median(a for a, _ in times),
        "second_seconds": statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "pairs": pairs,
    }


def one_flush_against_three(settings: list[str], pairs: int) -> list[dict]:
    """Steps with `parallel.fused_pipeline` on and off: a ratio below 1 is what the shared flush saves.

    `ideal`: with m micro-batches per pass and P stages, (3m + P - 1) / (3 (m + P - 1)), on a core of its own per stage.
    """
    rows = []
    for per_pass in (2, 4, 8):
        stages = int(os.environ.get("WORLD_SIZE", 1))
        batch = [f"bilevel.global_batch_size={per_pass}", f"parallel.pipeline={stages}"]
        trainer = make_trainer(2, batch + settings)

        def step(fused: bool, trainer: Trainer = trainer) -> None:
            trainer.config.parallel.fused_pipeline = fused
            trainer.take_step()

        ideal = (3 * per_pass + stages - 1) / (3 * (per_pass + stages - 1))
        row = compare(partial(step, True), partial(step, False), pairs)
        rows.append({"stages": stages, "micro_batches_per_pass": per_pass, **row, "ideal": ideal})
    return rows


def bilevel_against_plain(settings: list[str], pairs: int) -> list[dict]:
    """A step of three passes against one of `bilevel.mode=fixed` on the same training tokens: 3.0 is the floor."""
    rows = []
    for batch in (4, 8):
        both = make_trainer(2, [f"bilevel.global_batch_size={batch}", *settings])
        plain = make_trainer(2, [f"bilevel.global_batch_size={batch}", "bilevel.mode=fixed", *settings])
        rows.append({"global_batch_size": batch, **compare(both.take_step, plain.take_step, pairs)})
    return rows


def against_number_of_sources(settings: list[str], pairs: int) -> list[dict]:
    """A step with K sources against one with 2, the same 64 + 64 examples a step."""
    batch = ["bilevel.global_batch_size=64", "data.micro_batch_size=8", *settings]
    base = make_trainer(2, batch)
    counts = (2, 4, 8, 16, 32, 64)
    return [
        {"num_sources": count, **compare(make_trainer(count, batch).take_step, base.take_step, pairs)}
        for count in counts
    ]


QUESTIONS = {"flush": one_flush_against_three, "plain": bilevel_against_plain, "sources": against_number_of_sources}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", help="JSON file for the numbers")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    rows = QUESTIONS[args.question](args.settings, args.pairs)
    if dist.get_rank() > 0:
        return
    for row in rows:
        print("  ".join(f"{key} {round(value, 3)}" for key, value in row.items()))
    if args.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
        content = {
            "command": f"{dist.get_world_size()} ranks: step_time.py " + " ".join(sys.argv[1:]),
            "commit": commit.stdout.strip(),
            "device": f"{device}, {os.cpu_count()} cores, one thread per rank",
            "torch": torch.__version__,
            "rows": rows,
        }
        Path(args.out).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
