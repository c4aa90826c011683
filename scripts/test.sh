#!/usr/bin/env bash
# Install ee_llm with the packages of its tests (see scripts/env.sh), then check lint, format and
# types, and run the tests.
#
#   ./scripts/test.sh [--fast | --slow | --gpu] [PYTEST ARGUMENT...]
#       --fast: only the fast unit tests, within three minutes on two cores
#       --slow: the slow tests too
#       --gpu: only the tests that need a GPU
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

arguments=()
for argument in "$@"; do
    # An empty marker expression replaces "not slow" in pyproject.toml.
    case "$argument" in
    --fast) arguments+=(-m "not slow and not gpu and not thorough" tests/unit) ;;
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
# Two processes if there are two cores; a later -n among the arguments takes precedence.
exec "$PYTHON" -m pytest -n auto --maxprocesses 2 ${arguments[@]+"${arguments[@]}"}
