#!/usr/bin/env bash
# The whole story for a Llama (or Mistral, Qwen, GPT-2) of Hugging Face's: exits on it by tonight.
#
#   ./examples/llama.sh FOLDER TEXTS OUTPUT EXIT... [--OPTION VALUE...]
#
#   FOLDER    config.json, model.safetensors (or several), tokenizer.json
#   TEXTS     a folder of texts to tune on
#   OUTPUT    gets data/, model/ (the converted model), tuned/ (with exits), hf/ (the same for transformers)
#   EXIT...   layers after which exits are put, as 8 16
#   --OPTION  for ee-llm tune, as --training.steps 2000 or --parallel.pipeline 4 --nproc 4
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

# 1. Tensor by tensor into a checkpoint of ours; nothing needs a GPU or the whole model in memory.
# Run again, it goes on with what is there.
if [[ ! -e $output/model/checkpoints/latest ]]; then
    ee-llm convert "$folder" --output "$output/model"
fi
tokenizer=("$output"/model/checkpoints/step-*/tokenizer/*)

# 2. The texts as tokens of the model's own tokenizer.
if [[ ! -e $output/data/corpus.idx ]]; then
    ee-llm data prepare --inputs "$texts" --output "$output/data/corpus" --tokenizer "${tokenizer[0]}"
fi

# Long contexts would need much memory: 2048 tokens, or the model's context if that is shorter.
length=()
if [[ " $*" != *" --data.seq"[_-]"length"* ]]; then
    context=$(sed -n 's/^max_seq_length = //p' "$output"/model/checkpoints/step-*/config.toml)
    length=(--data.seq_length "$((context < 2048 ? context : 2048))")
fi

# 3. Exits that begin as copies of what the model has, and are trained with all else frozen.
ee-llm tune --tuning.checkpoint "$output/model" --output "$output/tuned" \
    --exits.boundaries "${exits[@]}" --exits.head mlp norm \
    --data.tokenizer "${tokenizer[0]}" --data.prefixes "$output/data/corpus" "${length[@]}" "$@"

# 4. Each token at the depth that it needs.
ee-llm generate --checkpoint "$output/tuned" --prompt "The " --thresholds 0.8 --verify

# 5. Back to Hugging Face, exits included, in the place of what an earlier run of this made.
rm -rf "$output/hf"
ee-llm convert "$output/tuned" --to hf --output "$output/hf"
