"""Whether a layout fits, by rank and part, and which layouts do: `python -m megatron_scalebio plan` under its own name.

python tools/plan_memory.py --config FILE [--gpus N] [--gpu-memory GIB] [--json FILE] [section.key=value ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_scalebio.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
