"""Run the command line as `python -m ee_llm COMMAND`, which is how torchrun starts ranks."""

import sys
from pathlib import Path


def _remove_working_directory() -> None:
    """Remove the working directory, which `python -m` adds, from the import path.

    Folders in it must not replace libraries of the same name. A checkout stays, because ee_llm may
    run from there without being installed.
    """
    checkout = Path(__file__).resolve().parents[1]
    if not sys.flags.safe_path and sys.path and Path(sys.path[0]).resolve() != checkout:
        del sys.path[0]


if __name__ == "__main__":
    _remove_working_directory()
    from ee_llm.launch.rank import die_with_launcher

    die_with_launcher()
    from ee_llm.cli.main import main

    sys.exit(main())
