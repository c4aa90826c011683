"""Writes docs/reference/configuration.md from the configuration's models.

python tools/docs/configuration.py          writes the page
python tools/docs/configuration.py --check  exits 1 if the page is not up to date
"""

import sys
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

from ee_llm.config import SHAPES, Config, default_text, load_config, section_types
from ee_llm.config.base import Section

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by tools/docs/configuration.py from ee_llm/config; edit there. -->

A run is described by a TOML file, and every option can be given on the command line as well, where
it takes precedence:

```toml
# train.toml
output = "runs/first"

[model]
shape = "llama-tiny"

[exits]
boundaries = [2, 4]

[parallel]
pipeline = 2

[data]
tokenizer = "data/tokenizer.model"
prefixes = ["data/corpus"]
```

```
ee-llm train --nproc 2 --config train.toml --optimizer.lr 1e-3 --exits.boundaries 2 4 6
```

`ee-llm train --help` lists the same options as this page. In Python,
`ee_llm.config.load_config(path, {"optimizer.lr": 1e-3})` gives the same, as an immutable `Config`.

- Nothing is guessed: a name that does not exist is an error that names the nearest one, and a value
  of another type is an error too. All problems are reported together.
- Defaults that follow from other options are filled in. The whole, effective configuration is saved
  beside the run and is a configuration file itself.
- `--model.shape` on the command line replaces the architecture in the file (family, layers, widths,
  heads); what belongs to the data (vocabulary, length) stays.
- The data-parallel size is what is left of the processes: their number / (tensor x pipeline).
"""

SHAPES_INTRODUCTION = """\
## Ready-made shapes

Values of `model.shape`. The larger ones are those of the EE-LLM paper (arXiv 2312.04916). Set
`model.vocab_size` to your tokenizer's.
"""


def type_text(annotation: Any) -> str:
    """Return how a field's type reads in the page, in TOML's words."""
    words = {int: "integer", float: "number", bool: "true or false", str: "string"}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in arguments)
    if origin is tuple:
        count = "" if arguments[-1] is ... else f"{len(arguments)} "
        return f"list of {count}{type_text(arguments[0])}" + "s" * (arguments[0] in words)
    if arguments:  # a union; None is what a missing option is
        return " or ".join(type_text(part) for part in arguments if part is not type(None))
    return words[annotation]


def range_text(field: FieldInfo) -> str:
    """Return the bounds of a number, such as ", at least 0, below 1"; "" for none."""
    limits = {
        name: getattr(limit, name)
        for limit in field.metadata
        for name in _LIMITS
        if hasattr(limit, name)
    }
    return "".join(f", {_LIMITS[name]} {_shown(value)}" for name, value in limits.items())


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


_LIMITS = {"gt": "above", "ge": "at least", "le": "at most", "lt": "below"}


def option_row(name: str, field: FieldInfo) -> str:
    """Return an option's row in its section's table."""
    kind = type_text(field.annotation).replace("|", "\\|") + range_text(field)
    return f"| `{name}` | {field.description} | {kind} | {default_text(field)} |"


def option_table(model: type[Section]) -> str:
    """Return the table of the options of `model`, its sections left out."""
    sections = section_types() if model is Config else {}
    fields = model.model_fields.items()
    rows = [option_row(name, field) for name, field in fields if name not in sections]
    return "\n".join(["| option | meaning | type | default |", "| --- | --- | --- | --- |", *rows])


def shape_table() -> str:
    """Return the table of the ready-made shapes."""
    names = ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "vocab_size")
    names = (*names, "max_seq_length")
    lines = [f"| shape | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for shape in SHAPES:
        model = load_config(overrides={"model.shape": shape}).model
        lines.append(f"| `{shape}` | {' | '.join(str(getattr(model, name)) for name in names)} |")
    return "\n".join(lines)


def page() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION, "## Top level\n", option_table(Config) + "\n"]
    for name, model in section_types().items():
        parts += [f"## [{name}]\n", f"{model.__doc__}\n", option_table(model) + "\n"]
    return "\n".join([*parts, SHAPES_INTRODUCTION, shape_table() + "\n"])


def main() -> None:
    """Write the page, or check it."""
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE} is out of date. Run: python tools/docs/configuration.py")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
