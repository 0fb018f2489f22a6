# To be sourced: node.sh MODEL_NODE RANKS [ARGUMENT ...] trains examples/MODEL_NODE.yaml on the GPUs of this node.
# With --dry-run, and neither MODEL nor DATA_DIR set, the model is examples/models/MODEL, where only config.json is, the
# tokenizer bytes and the data the quickstart's: what then is planned is the model and its layout.
set -euo pipefail
name="$1" ranks="$2"
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/folders.sh"
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
settings=()
if [ -z "${MODEL:-}${DATA_DIR:-}" ] && [[ " $* " == *" --dry-run "* ]]; then
    export MODEL="$ROOT/examples/models/${name%_*}" DATA_DIR="$ROOT/runs/arithmetic"
    "$PYTHON" "$ROOT/examples/arithmetic.py" "$DATA_DIR" --seed 1
    echo "neither MODEL nor DATA_DIR is set: the data below are the quickstart's, the model is $MODEL/config.json"
    settings+=(data.tokenizer=bytes "data.sources=[{name: clean, path: $DATA_DIR/train/clean.jsonl}]")
fi
require_folders MODEL DATA_DIR
exec "$PYTHON" -m megatron_scalebio launch --nproc "$ranks" train --config "$ROOT/examples/$name.yaml" \
    run.output_dir="$ROOT/runs/$name-$(date +%Y%m%d-%H%M%S)" "${settings[@]}" "$@"
