"""Run lm_eval's command line with the model `ee_llm`.

    python -m ee_llm.evaluation.harness --model ee_llm --model_args pretrained=runs/tuned --tasks ..

This is the command `lm_eval`, with mistakes in `--model_args` reported in one line. It does not
need the entry point that `register` describes.
"""

import sys

from lm_eval.__main__ import cli_evaluate

from ee_llm.errors import RunError, UserError
from ee_llm.evaluation.harness.register import register


def main() -> int:
    """Run the command line of lm_eval, and return the exit status."""
    register()
    try:
        cli_evaluate()
    except UserError as error:
        print(f"ee-llm: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"ee-llm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
