"""Draws a run's source weights over time as an SVG, for a page such as README.

python tools/plot_weights.py OUTPUT_DIR PICTURE.svg
"""

import argparse
import sys
from pathlib import Path

from megatron_scalebio.show.metrics import read_metrics
from megatron_scalebio.show.report import weights_svg


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path, help="a run's output folder")
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    arguments = parser.parse_args()
    if not (arguments.output_dir / "metrics.jsonl").is_file():
        print(f"error: {arguments.output_dir} is no run's output folder: it has no metrics.jsonl", file=sys.stderr)
        return 2
    arguments.picture.write_text(weights_svg(read_metrics(arguments.output_dir)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
