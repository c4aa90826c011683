#!/usr/bin/env bash
# Convert a Llama, Mistral, Qwen or GPT-2 model from Hugging Face, tune exits on it, generate, and convert back.
#
#   ./examples/llama.sh FOLDER TEXTS OUTPUT EXIT... [--OPTION VALUE...]
#
#   FOLDER    a folder with config.json, model.safetensors (one file or several) and tokenizer.json
#   TEXTS     a folder with texts to tune on
#   OUTPUT    a folder for data/, model/ (the converted model), tuned/ (with exits) and hf/ (for transformers)
#   EXIT...   the layers after which to add exits, such as 8 16
#   --OPTION  options of ee-llm tune, such as --training.steps 2000 or --parallel.pipeline 4 --nproc 4
set -euo pipefail
if [[ $# -lt 4 ]]; then
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
fi
folder=$1 texts=$2 output=$3
shift 3
exits=()
while [[ $# -gt 0 && $1 != --* ]]; do
    exits+=("$1")
    shift
done

# 1. Convert the model tensor by tensor. This needs neither a GPU nor memory for the whole model. If you run
# the script again, it skips the steps that are done.
if [[ ! -e $output/model/checkpoints/latest ]]; then
    ee-llm convert "$folder" --output "$output/model"
fi
tokenizer=("$output"/model/checkpoints/step-*/tokenizer/*)

# 2. Tokenize the texts with the model's own tokenizer.
if [[ ! -e $output/data/corpus.idx ]]; then
    ee-llm data prepare --inputs "$texts" --output "$output/data/corpus" --tokenizer "${tokenizer[0]}"
fi

# Limit sequences to 2048 tokens, or to a shorter context of the model: long contexts need much memory.
length=()
if [[ " $*" != *" --data.seq"[_-]"length"* ]]; then
    context=$(sed -n 's/^max_seq_length = //p' "$output"/model/checkpoints/step-*/config.toml)
    length=(--data.seq_length "$((context < 2048 ? context : 2048))")
fi

# 3. Add exits that start as copies of parts of the model, and train them with everything else frozen.
ee-llm tune --tuning.checkpoint "$output/model" --output "$output/tuned" \
    --exits.boundaries "${exits[@]}" --exits.head mlp norm \
    --data.tokenizer "${tokenizer[0]}" --data.prefixes "$output/data/corpus" "${length[@]}" "$@"

# 4. Generate, each token at the depth that it needs, and verify the result.
ee-llm generate --checkpoint "$output/tuned" --prompt "The " --thresholds 0.8 --verify

# 5. Convert back to Hugging Face's format, including the exits. Replace the result of an earlier run.
rm -rf "$output/hf"
ee-llm convert "$output/tuned" --to hf --output "$output/hf"
