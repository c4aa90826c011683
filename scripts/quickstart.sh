#!/usr/bin/env bash
# Install ee_llm (see scripts/env.sh for environment variables), train a small early-exit model on
# two pipeline stages, and generate text with it. The arguments go to examples/quickstart.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ee_llm_environment
exec "$PYTHON" examples/quickstart.py "$@"
