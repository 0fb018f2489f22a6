#!/usr/bin/env bash
# Five sources of sums with 0 to 100% wrong answers: two ranks learn how much each should count.
# Arguments are settings, such as bilevel.steps=100, or --dry-run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
"$PYTHON" "$ROOT/examples/arithmetic.py" "$ROOT/runs/arithmetic" --seed 1
exec "$PYTHON" -m megatron_scalebio launch --nproc 2 train --config "$ROOT/examples/quickstart.yaml" \
    run.output_dir="$ROOT/runs/quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
