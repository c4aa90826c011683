#!/usr/bin/env bash
# Installs ee_llm (see scripts/env.sh for its variables), then trains a small early-exit model over
# two pipeline stages and generates from it: examples/quickstart.py, which takes the arguments.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ee_llm_environment
exec "$PYTHON" examples/quickstart.py "$@"
