"""Writes tests/golden/arithmetic.json, the numbers of the golden run, anew.

python tests/golden/make.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.benchmarks.golden_run import golden_run

FILE = Path(__file__).with_name("arithmetic.json")

if __name__ == "__main__":
    FILE.write_text(json.dumps(golden_run(), indent=1) + "\n", encoding="utf-8")
