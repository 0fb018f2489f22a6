#!/usr/bin/env bash
# One Hopper GPU with Transformer Engine, under 5 minutes: are the FP8 products of precision.compute=fp8 right there,
# what do they keep and what do they cost? Nothing of it has run yet.
# OUT names the folder for the results; the packages must be importable (pip install -e . in the container).
# Exit status: 1 if a check fails, 124 if the time was up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${OUT:-tools/benchmarks/results}"
name="$(date +%F)-$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' ' '_')"
timeout 290 python3 tools/benchmarks/te_fp8.py --out "$out/$name-te-fp8.json"
