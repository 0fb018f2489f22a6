#!/usr/bin/env bash
# Installs into .venv, checks style and types, runs the tests: all, or with --quick what a person runs while working.
# Other arguments go to pytest, too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/install.sh"
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m pyrefly check --python-interpreter-path "$PYTHON" --summary=none
"$PYTHON" -m pytest "$@"
