"""Turn texts into Megatron token files; the same as `ee-llm data prepare`."""

import sys
from pathlib import Path

import tyro

if __name__ == "__main__":  # worker processes import this file and must not start over
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from ee_llm.data.prepare import PrepareOptions, prepare

    try:
        print(prepare(tyro.cli(PrepareOptions, prog="preprocess_data")))
    except ValueError as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        sys.exit(2)
