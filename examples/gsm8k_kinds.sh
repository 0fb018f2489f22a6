#!/usr/bin/env bash
# Five kinds of GSM8K records, one of them clean, on two pipeline stages. Arguments are settings, or --dry-run.
# DATA_DIR: a folder with train/{clean,duplicated,shuffled,truncated,wrong_final}.jsonl, val.jsonl and test.jsonl.
# TOKENIZER: a folder with a Qwen2 tokenizer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/folders.sh"
require_folders DATA_DIR TOKENIZER
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
exec "$PYTHON" -m megatron_scalebio launch --nproc 2 train --config "$ROOT/examples/gsm8k_kinds.yaml" \
    run.output_dir="$ROOT/runs/gsm8k_kinds-$(date +%Y%m%d-%H%M%S)" "$@"
