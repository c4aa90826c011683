"""`ee-llm verify`: define its help and run it."""

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import parse
from ee_llm.cli.generation.options import VerifyOptions

COMMAND = CommandHelp(
    "verify",
    "Verify finished generations: run the model once over each in float64 and compare every token "
    "and exit.",
    (Group("Output", "json"),),
    (
        "ee-llm verify out.jsonl --checkpoint runs/first",
        "ee-llm verify out.jsonl --checkpoint runs/first --json",
    ),
)


def run_verify(arguments: list[str]) -> None:
    """Run `ee-llm verify`."""
    options = parse(VerifyOptions, COMMAND, arguments, positional=("file",))
    from ee_llm.cli.generation.verify import verify

    verify(options)
