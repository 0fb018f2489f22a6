#!/usr/bin/env bash
# One Hopper GPU, under 8 minutes: the step is right on CUDA, then what a bilevel step costs there.
# OUT names the folder for the results; the packages must be importable (pip install -e . in the container).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${OUT:-tools/benchmarks/results}"
name="$(date +%F)-$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' ' '_')"
python3 tools/benchmarks/cuda_check.py fp32
python3 tools/benchmarks/cuda_check.py bf16
shape=(model.shape.num_layers=16 model.shape.hidden_size=2048 model.shape.ffn_hidden_size=5632
    model.shape.num_attention_heads=16 model.shape.num_query_groups=4 precision.compute=bf16 data.micro_batch_size=8)
python3 tools/benchmarks/step_ratios.py plain --out "$out/$name-bilevel-against-plain.json" "${shape[@]}"
python3 tools/benchmarks/step_ratios.py sources --out "$out/$name-number-of-sources.json" "${shape[@]}"
