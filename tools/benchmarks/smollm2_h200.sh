#!/usr/bin/env bash
# One Hopper GPU, under 9 minutes: SmolLM2-135M learns the weights of five kinds of GSM8K records, and of five doses of
# shuffled ones. MODEL: the folder that tools/get_smollm2.py makes. TASKS: a folder with kinds/ and dose_shuffle/, each
# with train/*.jsonl, val.jsonl, test.jsonl. OUT names the folder for the results. Each file is written after every run,
# so that what is measured stays if the time is up; started again on the same day, what is finished is not run again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../examples/folders.sh"
require_folders MODEL TASKS
out="$(realpath -m "${OUT:-$(dirname "${BASH_SOURCE[0]}")/results}")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
name="$(date +%F)-$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' ' '_')"
settings=(bilevel.steps=300 bilevel.global_batch_size=60 bilevel.logits_lr=2e-2 data.max_length=512
    data.micro_batch_size=16 lisa.num_active_layers=4 optimizer.lr=2e-5 precision.compute=bf16)
for task in "kinds clean" "dose_shuffle shuf000"; do
    read -r folder oracle <<<"$task"
    timeout 265 python3 tools/study.py smollm2 --model "$MODEL" --task "$TASKS/$folder" --oracle "$oracle" \
        --seeds 3 --out "$out/$name-smollm2-$folder.json" "${settings[@]}" || echo "$folder: ended with status $?"
done
