#!/usr/bin/env bash
# A real pretrained model on one device, the CPU included. Arguments are settings, or --dry-run.
# MODEL: the folder that `python tools/get_smollm2.py MODEL` makes; DATA_DIR: a folder with val.jsonl and train/*.jsonl,
# one file per source, called after it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/folders.sh"
require_folders MODEL DATA_DIR
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
sources=""
for file in "$DATA_DIR"/train/*.jsonl; do
    if [ ! -f "$file" ]; then
        echo "error: DATA_DIR=$DATA_DIR has no train/*.jsonl: one file per source" >&2
        exit 2
    fi
    sources+="{name: $(basename "$file" .jsonl), path: '$file'}, "
done
exec "$PYTHON" -m megatron_scalebio launch --nproc 1 train --config "$ROOT/examples/smollm2_135m.yaml" \
    "data.sources=[$sources]" run.output_dir="$ROOT/runs/smollm2-$(date +%Y%m%d-%H%M%S)" "$@"
