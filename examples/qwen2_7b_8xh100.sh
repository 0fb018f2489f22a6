#!/usr/bin/env bash
# Qwen-2-7B on one node of 8 GPUs. Arguments are settings, or --dry-run, which needs neither GPU nor weights.
# MODEL: its Hugging Face folder. DATA_DIR: a folder with val.jsonl, test.jsonl and the sources of qwen2_7b_8xh100.yaml.
source "$(dirname "${BASH_SOURCE[0]}")/node.sh" qwen2_7b_8xh100 8 "$@"
