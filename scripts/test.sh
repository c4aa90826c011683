#!/usr/bin/env bash
# Installs ee_llm with what its tests need (see scripts/env.sh), then checks everything: lint, format,
# types, tests.
#
#   ./scripts/test.sh [--slow | --gpu] [PYTEST ARGUMENT...]
#       --slow: the slow tests as well
#       --gpu: those that need a GPU, and no others
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

arguments=()
for argument in "$@"; do
    # An empty marker expression takes the place of "not slow" in pyproject.toml.
    case "$argument" in
    --slow) arguments+=(-m "") ;;
    --gpu)
        arguments+=(-m gpu -n 0 tests/gpu)
        export EE_LLM_TEST_GPU=1
        ;;
    *) arguments+=("$argument") ;;
    esac
done

ee_llm_environment dev
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
# Two tests at a time where there are two cores; a later -n among the arguments wins.
exec "$PYTHON" -m pytest -n auto --maxprocesses 2 ${arguments[@]+"${arguments[@]}"}
