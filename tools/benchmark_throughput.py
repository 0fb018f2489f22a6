"""Times training steps of a configuration on this machine: how fast, what takes the time, how much memory.

    python tools/benchmark_throughput.py --config FILE.yaml --out FILE.json section.key=value ...
    torchrun --nproc_per_node 8 tools/benchmark_throughput.py --config FILE.yaml --compare OTHER.json
    python tools/benchmark_throughput.py --synthetic model.hf_path=examples/models/qwen2_7b    no data, random weights

The real trainer runs on the configuration's own data, or on random examples (--synthetic); where model.hf_path holds
only a config.json, or is not set, weights are random. After a warm-up come the timed steps, by default two periods of
active layers; then one period more under torch's profiler, for the time by part; with pipeline stages, a few more in
which one flush for all passes is held against one for each. It trains nothing that it keeps and writes nothing but the
JSON file.

Each timed step prints Megatron-LM's log line. Exit status: 0; 2 for a mistake in what was given; 1 otherwise, such as
out of memory, which the JSON file then says.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_scalebio.config import UserError


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    # Megatron-Core warns, once per rank, of every optional package that is not there.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    import torch
    import torch.distributed as dist

    from tools.benchmarks.throughput import benchmark

    try:
        _check(args)
        benchmark(args)
        dist.destroy_process_group()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except torch.OutOfMemoryError:  # told by the rank that it happened to
        return 1
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the settings")
    parser.add_argument("--synthetic", action="store_true", help="random examples in place of data and tokenizer")
    parser.add_argument("--steps", type=int, metavar="N", help="timed steps; default: two periods of lisa.period")
    parser.add_argument("--warmup", type=int, metavar="N", default=2, help="steps before them; default: 2")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="what MFU is of, where the device is not known")
    parser.add_argument("--compare", metavar="OTHER.json", help="print ratios to another run's file")
    parser.add_argument("--out", metavar="FILE.json", help="write all numbers there")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings that override the file's")
    return parser.parse_intermixed_args(argv)


def _check(args: argparse.Namespace) -> None:
    for name, least in (("steps", 1), ("warmup", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.peak_tflops is not None and args.peak_tflops <= 0:
        raise UserError(f"--peak-tflops {args.peak_tflops}: must be positive")
    if args.out is not None and not Path(args.out).absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: no such folder")


if __name__ == "__main__":
    sys.exit(main())
