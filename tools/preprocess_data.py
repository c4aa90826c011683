"""Convert text to Megatron token files, as `ee-llm data prepare` does."""

import sys
from pathlib import Path

if __name__ == "__main__":  # worker processes import this file and must not run it again
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from ee_llm.cli.main import main

    sys.exit(main(["data", "prepare", *sys.argv[1:]]))
