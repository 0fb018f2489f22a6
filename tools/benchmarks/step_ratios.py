"""What a bilevel step costs beside other steps, as ratios measured in turn in one run, on synthetic examples.

    python tools/benchmarks/step_ratios.py plain --out FILE.json     against plain training on the same training tokens
    python tools/benchmarks/step_ratios.py sources --out FILE.json   with K sources against two

Each pair is timed A B A B ...; a ratio is the median over pairs. Times are whole steps. Further arguments are settings,
such as model.shape.hidden_size=256. (One pipeline flush against three: tools/benchmark_throughput.py.)
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.distributed as dist

from megatron_scalebio.config import Config, SourceConfig, load_config
from megatron_scalebio.data import Dataset, Example
from megatron_scalebio.data.tokenizers import BytesTokenizer
from megatron_scalebio.run import Run, open_config
from megatron_scalebio.trainer import Trainer
from tools.benchmarks.environment import environment, write_results
from tools.benchmarks.timing import measure_in_turn

ROW = 256  # positions of a row; an example fills one, so that equal numbers of examples are equal work
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
    return Trainer(Run(open_config(config), _synthetic_dataset(config)))


def _synthetic_dataset(config: Config) -> Dataset:
    generator = np.random.default_rng(0)
    mask = np.arange(ROW) >= ROW // 2

    def examples(source_id: int) -> list[Example]:
        return [Example(generator.integers(0, 256, ROW, dtype=np.int32), mask, source_id) for _ in range(64)]

    names = [source.name for source in config.data.sources]
    train = [examples(index) for index in range(len(names))]
    return Dataset(BytesTokenizer(), names, train, examples(0))


def bilevel_against_plain(settings: list[str], pairs: int) -> list[dict[str, Any]]:
    """A step of three passes against one of `bilevel.mode=fixed` on the same training tokens: 3.0 is the floor."""
    rows = []
    for batch in (4, 8):
        both = make_trainer(2, [f"bilevel.global_batch_size={batch}", *settings])
        plain = make_trainer(2, [f"bilevel.global_batch_size={batch}", "bilevel.mode=fixed", *settings])
        ratio = measure_in_turn(both.take_step, plain.take_step, both.device, pairs)
        rows.append({"global_batch_size": batch, **ratio})
    return rows


def against_number_of_sources(settings: list[str], pairs: int) -> list[dict[str, Any]]:
    """A step with K sources against one with 2, the same 64 + 64 examples a step."""
    batch = ["bilevel.global_batch_size=64", "data.micro_batch_size=8", *settings]
    base, rows = make_trainer(2, batch), []
    for count in (2, 4, 8, 16, 32, 64):
        ratio = measure_in_turn(make_trainer(count, batch).take_step, base.take_step, base.device, pairs)
        rows.append({"num_sources": count, **ratio})
    return rows


QUESTIONS = {"plain": bilevel_against_plain, "sources": against_number_of_sources}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    rows = QUESTIONS[args.question](args.settings, args.pairs)
    for row in rows:
        print("  ".join(f"{key} {round(value, 3)}" for key, value in row.items()))
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    write_results(args.out, {"environment": environment(device, args.settings), "rows": rows})


if __name__ == "__main__":
    main()
