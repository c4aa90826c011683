"""Convert a model to or from an ee_llm checkpoint, as `ee-llm convert` does."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from ee_llm.cli.main import main

    sys.exit(main(["convert", *sys.argv[1:]]))
