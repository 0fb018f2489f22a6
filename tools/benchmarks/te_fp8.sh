#!/usr/bin/env bash
# One Hopper GPU with Transformer Engine, under 5 minutes: are the FP8 products of precision.compute=fp8 right there,
# what do they keep and what do they cost, and does a model train its active layers, and they alone, with them? Nothing
# of it has run yet.
# OUT names the folder for the results; the packages must be importable (pip install -e . in the container).
# Exit status: 1 if a check fails, 2 if Transformer Engine cannot run, 124 if the time was up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${OUT:-tools/benchmarks/results}"
name="$(date +%F)-$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' ' '_')"
status=0
timeout 190 python3 tools/benchmark_kernels.py --device cuda --only te_linear --out "$out/$name-te-linear.json" ||
    status=$?
timeout 100 python3 tools/benchmarks/cuda_check.py fp8 --out "$out/$name-te-model.json" || status=$?
exit "$status"
