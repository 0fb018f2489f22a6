#!/usr/bin/env bash
# Qwen-2.5-32B on one GPU of 141 GB. Arguments are settings, or --dry-run, which needs neither GPU nor weights.
# MODEL: its Hugging Face folder. DATA_DIR: a folder with val.jsonl, test.jsonl and the sources of qwen25_32b_1xh200.yaml.
source "$(dirname "${BASH_SOURCE[0]}")/node.sh" qwen25_32b_1xh200 1 --gpu-memory 139.8 "$@"
