"""Write docs/reference/configuration.md from the configuration's models.

python tools/docs/configuration.py          writes the page
python tools/docs/configuration.py --check  exits 1 if the page is out of date
"""

import sys
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

from ee_llm.config import (
    SHAPES,
    Config,
    default_text,
    given_type,
    load_config,
    section_types,
    toml,
)
from ee_llm.config.base import Section

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by tools/docs/configuration.py from ee_llm/config; edit there. -->

This page lists every option of `ee-llm train` and `ee-llm tune`. A TOML file describes a run:

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

Options on the command line take precedence over the file:

```
ee-llm train --nproc 2 --config train.toml --optimizer.lr 1e-3 --exits.boundaries 2 4 6
```

`ee-llm train --help-all` shows the same options, and `ee-llm init` writes a file to start from. In
Python, `ee_llm.load_config(path, {"optimizer.lr": 1e-3})` returns an immutable `Config`.

- Unknown names and values of the wrong type are errors. The error for an unknown name suggests the
  nearest one. All errors are reported together.
- Defaults that depend on other options are computed from them. Each run saves the complete
  configuration as `config.toml` in its directory. You can use this file as a configuration file.
- `--model.shape` on the command line replaces the architecture in the file (family, layers, widths,
  heads). Options that depend on the data (vocabulary, length) stay.
- The data-parallel size is the number of processes / (`parallel.tensor` x `parallel.pipeline`).
- Lists for exits, such as `exits.weights`, have one value per early exit, without the final exit.
"""

SHAPES_INTRODUCTION = """\
## Ready-made shapes

These are the values of `model.shape`. The larger shapes are from the EE-LLM paper (arXiv
2312.04916). Set `model.vocab_size` to the size of your tokenizer's vocabulary.
"""

SEE_ALSO = """\
## See also

- [Train a model](../how-to/train.md), [Tune exits](../how-to/tune.md)
- [Prepare training data](../how-to/prepare-data.md): the `[data]` section
- [Plan a pipeline](../how-to/plan.md): the `[parallel]` section
"""


def type_text(annotation: Any) -> str:
    """Return the name of a field's type, in the terms of TOML."""
    words = {int: "integer", float: "number", bool: "true or false", str: "string"}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin is Literal:
        return " or ".join(toml.notation(value) for value in arguments)
    if origin is tuple:
        count = "" if arguments[-1] is ... else f"{len(arguments)} "
        return f"list of {count}{type_text(arguments[0])}" + "s" * (arguments[0] in words)
    if arguments:  # A union, in which None stands for a missing option.
        return " or ".join(type_text(part) for part in arguments if part is not type(None))
    return words[annotation]


def range_text(field: FieldInfo) -> str:
    """Return the bounds of a number, such as ", at least 0, below 1", or "" if there are none."""
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
    """Return the table row of an option."""
    kind = type_text(given_type(field)).replace("|", "\\|") + range_text(field)
    return f"| `{name}` | {field.description} | {kind} | {default_text(field)} |"


def option_table(model: type[Section]) -> str:
    """Return the table of the options of `model`, without its sections."""
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
    return "\n".join([*parts, SHAPES_INTRODUCTION, shape_table() + "\n", SEE_ALSO])


def main() -> None:
    """Write or check the page."""
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE} is out of date. Run: python tools/docs/configuration.py")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
