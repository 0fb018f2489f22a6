#!/usr/bin/env bash
# Llama-3-8B on one node of 8 GPUs. Arguments are settings, or --dry-run, which needs neither GPU nor weights.
# MODEL: its Hugging Face folder. DATA_DIR: a folder with val.jsonl, test.jsonl and the sources of llama3_8b_8xh100.yaml.
source "$(dirname "${BASH_SOURCE[0]}")/node.sh" llama3_8b_8xh100 8 "$@"
