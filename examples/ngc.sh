#!/usr/bin/env bash
# ngc.sh [--print] COMMAND ...: runs a command, from this repository's folder, in the image that
# `docker build -t megatron_scalebio .` makes there, or in $IMAGE, on all GPUs. --print only shows the docker command.
# Needs Docker and the NVIDIA Container Toolkit. MODEL, DATA_DIR, TOKENIZER: folders, seen under their own paths, as are
# those of MOUNTS, separated by colons; nothing else outside the repository is seen. Outputs go to runs/. For example:
#   MODEL=... DATA_DIR=... bash examples/ngc.sh bash examples/qwen25_32b_8xh100.sh bilevel.steps=100
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
image="${IMAGE:-megatron_scalebio}"

fail() {
    echo "error: $1" >&2
    exit 2
}

declare -A mounted
mount() {
    if [ -z "${mounted[$1]:-}" ]; then
        mounted[$1]=1
        options+=(--volume "$1:$1")
    fi
}

# A folder, and where links in it lead out of it to: in Hugging Face's cache, a model's files are links.
mount_with_links() {
    local target
    mount "$1"
    while IFS= read -r -d '' target; do
        [ -d "$target" ] || target="$(dirname "$target")"
        if [ -d "$target" ] && [[ "$target/" != "$1"/* ]]; then mount "$target"; fi
    done < <(find "$1" -maxdepth 3 -type l -exec readlink -fz {} +)
}

print=0
if [ "${1:-}" = --print ]; then
    print=1
    shift
fi
[ $# -gt 0 ] || fail "expected: ngc.sh [--print] COMMAND ..."

# Ranks share memory (--ipc) and pin it (memlock); a stopped run has the time to save a checkpoint.
options=(--rm --init --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 --stop-timeout 600)
if [ -t 0 ] && [ -t 1 ]; then options+=(--interactive --tty); fi
# Files belong to the caller, whom the image does not know: so a name and a home for the caches of torch and Triton.
options+=(--user "$(id -u):$(id -g)" --env USER=user --env HOME=/tmp --env NO_INSTALL=1)
for group in $(id -G); do options+=(--group-add "$group"); done
# The repository stands in for the copy of it that the image has installed.
mkdir -p "$root/runs"
mount "$root"
mount "$(cd "$root/runs" && pwd -P)"
options+=(--volume "$root:/opt/megatron_scalebio" --workdir "$root")
for name in MODEL DATA_DIR TOKENIZER; do
    if [ -n "${!name:-}" ]; then
        [ -d "${!name}" ] || fail "$name=${!name} is not a folder"
        folder="$(cd "${!name}" && pwd -P)"
        mount_with_links "$folder"
        options+=(--env "$name=$folder")
    fi
done
IFS=: read -r -a others <<<"${MOUNTS:-}"
for folder in "${others[@]}"; do
    [ -d "$folder" ] || fail "$folder in MOUNTS=$MOUNTS is not a folder"
    mount_with_links "$(cd "$folder" && pwd -P)"
done

command=(docker run "${options[@]}" "$image" "$@")
if [ "$print" = 1 ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
command -v docker >/dev/null || fail "there is no docker here; examples/ngc.sh --print shows the command for a machine with it"
if [ -z "${IMAGE:-}" ]; then
    why="$(docker image inspect "$image" 2>&1 >/dev/null)" ||
        fail "docker has no image $image ($why): make it with docker build -t $image $root, or name another one: IMAGE=..."
fi
exec "${command[@]}"
