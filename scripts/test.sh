#!/usr/bin/env bash
# Installs ee_llm with what its tests need (see scripts/env.sh), then checks everything: lint, format,
# types, tests.
#
#   ./scripts/test.sh [--slow] [PYTEST ARGUMENT...]    --slow: the slow tests as well
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

arguments=()
for argument in "$@"; do
    # An empty marker expression takes the place of "not slow" in pyproject.toml.
    if [[ "$argument" == --slow ]]; then arguments+=(-m ""); else arguments+=("$argument"); fi
done

ee_llm_environment dev
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
# Two tests at a time where there are two cores; a later -n among the arguments wins.
exec "$PYTHON" -m pytest -n auto --maxprocesses 2 ${arguments[@]+"${arguments[@]}"}
