#!/usr/bin/env bash
# One Hopper GPU, under 8 minutes: the kernels are right there, then what they cost beside their bounds and their peers.
#   1. Every kernel at the quick shapes against fp64. A wrong one is named, and gets no time below. About a minute, most
#      of it compilation, which the second step finds done.
#   2. The same shapes timed: the FP8 linear layers and gates of Qwen2.5-32B, the update at 2^27 parameters, then, whose peers
#      take long to compile, head and losses at 8,192 tokens for four vocabularies; 0.2 s of runs for each kernel, its
#      bounds and every peer that is installed. The file is written after every case, so that what is measured stays if
#      the time is up. All token counts and longer runs: leave out --quick.
# OUT names the folder for the results; the packages must be importable (pip install -e . in the container). Peers are
# extras; what is absent is listed as such:
#   pip install liger-kernel==0.8.5 cut-cross-entropy==25.1.1 "quack-kernels[cu13]==0.6.5"
# Exit status: 1 if a kernel of ours is wrong, 124 if the time was up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${OUT:-tools/benchmarks/results}"
name="$(date +%F)-$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' ' '_')"
end=$((SECONDS + 470))
status=0
weights=(frozen_linear frozen_linear_dgrad gated_activation fp8 adamw_update sum_of_squares)
losses=(head_loss cross_entropy sums_by_id)
timeout 150 python3 tools/benchmark_kernels.py --device cuda --quick --check --ours \
    --only "${weights[@]}" "${losses[@]}" || status=$?
case $status in
    0) ;;
    124) echo "the checks alone took 150 s: going on to the times, which are checked again" ;;
    *) echo "NOT ALL RIGHT, status $status: see above" ;;
esac
timeout $((end - SECONDS)) python3 tools/benchmark_kernels.py --device cuda --quick \
    --only "${weights[@]}" "${losses[@]}" --out "$out/$name-kernels.json"
