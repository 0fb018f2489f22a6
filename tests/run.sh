#!/usr/bin/env bash
# Installs into .venv, checks the style, runs the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/install.sh"
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m pyrefly check --python-interpreter-path "$PYTHON" --summary=none
"$PYTHON" -m pytest "$@"
