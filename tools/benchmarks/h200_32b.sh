#!/usr/bin/env bash
# One H200, within 9 minutes: do both Qwen-2.5-32B models fit and train on one GPU, and how fast? Full shape, random
# weights and examples, frozen layers in FP8, two active layers redrawn every two steps, rows of 4,096 and 8,192
# positions, embedding and head trained or frozen; then 7B with frozen layers in bf16 and in FP8. Every run writes a
# JSON file; one that runs out of memory or time leaves the others theirs.
# OUT names the folder for the results. Arguments are settings for every run, such as model.shape.num_layers=4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-python3}"
out="${OUT:-tools/benchmarks/results}"
settings=("$@")
gpu="$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' ' '_' || true)"
name="$out/$(date +%F)-${gpu:-cpu}"
frozen='lisa.always_active=[final_norm]'

# SECONDS_AT_MOST NAME MODEL POSITIONS section.key=value ...
run() {
    local seconds="$1" file="$name-$2.json" model="$3" positions="$4"
    shift 4
    echo "== $file"
    # Three examples of 1/4 row on average: nearly always one row, so three micro-batches a step.
    timeout "$seconds" "$python" tools/benchmark_throughput.py --synthetic --warmup 1 --out "$file" \
        model.hf_path="examples/models/$model" data.max_length="$positions" bilevel.global_batch_size=3 \
        lisa.num_active_layers=2 lisa.period=2 optimizer.moments=bf16 parallel.recompute=full \
        "$@" "${settings[@]}" || echo "$file: ended with status $?"
}

run 90 32b-4k-trained qwen25_32b 4096 precision.frozen_weights=fp8
run 110 32b-8k-trained qwen25_32b 8192 precision.frozen_weights=fp8
run 80 32b-4k-frozen qwen25_32b 4096 precision.frozen_weights=fp8 "$frozen"
run 100 32b-8k-frozen qwen25_32b 8192 precision.frozen_weights=fp8 "$frozen"
run 70 7b-4k-bf16 qwen2_7b 4096
run 70 7b-4k-fp8 qwen2_7b 4096 precision.frozen_weights=fp8
