# To be sourced. Sets ROOT, the repository, and PYTHON, a Python of .venv with the pinned packages and this one in it.
# Quick when nothing changed. NO_INSTALL=1 takes $PYTHON (or python3) as it is: for a container with its own packages.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.13 python3.14 ~/.pyenv/versions/3.1[2-9]*/bin/python python3; do
        # A version manager's shim may exist and fail: only a Python that runs counts.
        if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' \
            >/dev/null 2>&1 </dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python >= 3.12 that runs was found; install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
    exit 2
}

# What .venv depends on. Kept beside the packages once they are all installed, and compared as it is.
state() {
    cat "$ROOT/requirements.txt" "$ROOT/setup.py"
    echo "$ROOT"
    "$ROOT/.venv/bin/python" --version 2>&1
}

if [ "${NO_INSTALL:-0}" = 1 ]; then
    PYTHON="${PYTHON:-python3}"
else
    if [ "$(state)" != "$(cat "$ROOT/.venv/installed" 2>/dev/null)" ]; then
        found="$(find_python)" || exit 2
        echo "installing into $ROOT/.venv with $found; the first time this takes a few minutes and 5 GB" >&2
        rm -f "$ROOT/.venv/installed"
        "$ROOT/.venv/bin/python" --version >/dev/null 2>&1 || "$found" -m venv --clear "$ROOT/.venv"
        pip=("$ROOT/.venv/bin/python" -m pip --disable-pip-version-check --no-input install --quiet)
        "${pip[@]}" -r "$ROOT/requirements.txt"
        PYTHONWARNINGS=ignore "${pip[@]}" --no-deps --no-build-isolation --editable "$ROOT"
        state >"$ROOT/.venv/installed"
    fi
    PYTHON="$ROOT/.venv/bin/python"
fi
