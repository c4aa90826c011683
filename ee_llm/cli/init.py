"""`ee-llm init`: write an example configuration."""

from dataclasses import dataclass
from pathlib import Path

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import parse
from ee_llm.cli.example_config import example_config
from ee_llm.errors import UserError

COMMAND = CommandHelp(
    "init",
    """Write an example configuration, a TOML file with a comment for each option.

    The file must not exist yet.""",
    (Group("Options", "file shape exits"),),
    ("ee-llm init", "ee-llm init runs/1b.toml --shape llama-1.3B --exits 6 12"),
)


@dataclass(frozen=True)
class InitOptions:
    """The options of `ee-llm init`."""

    file: Path = Path("train.toml")
    """File to write."""

    shape: str = "llama-tiny"
    """Size of the model: llama-tiny, llama-1.3B, llama-7B, llama-13B or llama-30B."""

    exits: tuple[int, ...] | None = None
    """Layers after which to place the early exits. (default: a quarter and half of the layers)"""


def run_init(arguments: list[str]) -> None:
    """Run `ee-llm init`; raises UserError if the file exists."""
    options = parse(InitOptions, COMMAND, arguments, positional=("file",))
    path = options.file
    text = example_config(str(path), options.shape, options.exits)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} already exists. Give another file, or remove this one.") from None
    except FileNotFoundError:
        raise UserError(
            f"{path}: the folder {path.parent} does not exist. Create it, or give another file."
        ) from None
    print(f"wrote {path}: edit it, then run 'ee-llm train --config {path} --nproc 2'")
