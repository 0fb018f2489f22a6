"""Compares arms over seeds, such as presets or precisions: final weights, test loss, signal-to-noise, time per step.

    python tools/study.py presets --data runs/compare --seeds 5 --out tools/benchmarks/results/FILE.json
    python tools/study.py moments --data runs/moments --out FILE.json
    python tools/study.py sampling --data runs/sampling --validation-records 50 --out FILE.json
    python tools/study.py gate --data runs/gate --copies --out FILE.json
    python tools/study.py smollm2 --model FOLDER --task DIR --oracle clean --seeds 3 --out FILE.json

Every study is declared in tools/studies: arms, task, what ought to come out. The file is written after every run;
started again on it, a study does what it lacks. Exit status: 2 for a mistake in what was given.
"""

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Megatron-Core warns of every optional package that is not there. Here, so that the runs' own processes do it, too.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")

from megatron_scalebio.config import UserError  # noqa: E402
from tools.studies import gate, moments, presets, sampling, smollm2  # noqa: E402
from tools.studies.runner import run_study, table_lines  # noqa: E402

STUDIES = {"presets": presets, "moments": moments, "sampling": sampling, "gate": gate, "smollm2": smollm2}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    declared = STUDIES[args.study]
    try:
        study = declared.declare(args)
        seeds = range(1, args.seeds + 1)
        content = run_study(study, seeds, args.settings, args.out, args.processes, args.threads)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table_lines(study, content["summary"])))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = parser.add_subparsers(dest="study", required=True)
    for name, declared in STUDIES.items():
        own = studies.add_parser(
            name, description=declared.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        declared.add_options(own)
        own.add_argument("--seeds", type=int, default=declared.SEEDS, help="seeds 1 to this; default: %(default)s")
        own.add_argument(
            "--processes", type=int, default=declared.PROCESSES, help="runs at a time; default: %(default)s"
        )
        own.add_argument("--threads", type=int, default=1, help="of each run; default: 1")
        own.add_argument("--out", type=Path, help="JSON file, written after every run and continued if it is there")
    args, args.settings = parser.parse_known_args(argv)
    return args


if __name__ == "__main__":
    sys.exit(main())
