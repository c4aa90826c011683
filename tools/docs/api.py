"""Write docs/reference/api.md from the signatures and docstrings of ee_llm's public names.

    python tools/docs/api.py          writes the page
    python tools/docs/api.py --check  exits 1 if the page is out of date

Docstrings are in Google style. Sections such as `Args:` become tables or lists.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ee_llm

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "api.md"
LINE_LENGTH = 88  # of a signature, before it is broken into one line per parameter

INTRODUCTION = """\
# Python API

<!-- Written by tools/docs/api.py from the docstrings of ee_llm; edit there. -->

This page lists the names in `ee_llm`. The [tutorial](../tutorials/python-api.md) shows them in use.

```python
import ee_llm

llm = ee_llm.LLM("runs/first")
print(llm.generate("def main(")[0].text)
```

Mistakes that you can correct, such as an unknown option or a missing file, raise a subclass of
`ee_llm.errors.UserError`. Messages go to the logger `ee_llm`.
"""

SEE_ALSO = """\
## See also

- [Python API tutorial](../tutorials/python-api.md)
- [Generation](generation.md): strategies, exit policies, sampling settings
- [Configuration](configuration.md): the options of `ee_llm.load_config`
"""

# The sections of a docstring in Google style whose entries are `name: text`.
ENTRY_SECTIONS = ("Args", "Attributes", "Raises")
TEXT_SECTIONS = ("Returns", "Yields", "Example", "Examples", "Note", "Source")
_SECTION = re.compile(rf"^({'|'.join(ENTRY_SECTIONS + TEXT_SECTIONS)}):\s*$", re.MULTILINE)


def signature_text(name: str, item: Any) -> str:
    """Return the signature of a function or class, with one line per parameter if it is long."""
    try:
        signature = inspect.signature(item)
    except (TypeError, ValueError):
        return name
    parameters = [p for n, p in signature.parameters.items() if n not in ("self", "cls")]
    signature = signature.replace(parameters=parameters)
    if inspect.isclass(item):
        signature = signature.replace(return_annotation=inspect.Signature.empty)
    text = name + _plain(str(signature))
    if len(text) <= LINE_LENGTH or not parameters:
        return text
    lines = [f"    {_plain(part)}," for part in _parameter_texts(parameters)]
    returns = "" if signature.return_annotation is inspect.Signature.empty else text[_end(text) :]
    return "\n".join([f"{name}(", *lines, f"){returns}"])


def _parameter_texts(parameters: list[inspect.Parameter]) -> Iterator[str]:
    kinds = inspect.Parameter
    has_star = False
    for parameter in parameters:
        if parameter.kind is kinds.VAR_POSITIONAL:
            has_star = True
        elif parameter.kind is kinds.KEYWORD_ONLY and not has_star:
            has_star = True
            yield "*"
        yield str(parameter)


def _end(text: str) -> int:
    """Return the position after the parenthesis that closes the parameters."""
    depth = 0
    for position, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == ")" and depth == 0:
            return position + 1
    return len(text)


def _plain(text: str) -> str:
    """Return a signature without the modules of its types, and without quoted annotations."""
    text = re.sub(r"<factory>", "...", text)
    text = re.sub(r"\b(?:[a-z_][a-z_0-9]*\.)+(?=[A-Za-z_])", "", text)
    return re.sub(r"(?<=[:>] )'([^']*)'", r"\1", text)


def docstring_text(item: Any) -> str:
    """Return a docstring as Markdown."""
    text = inspect.getdoc(item) or ""
    pieces = _SECTION.split(text)
    parts = [pieces[0].strip()]
    for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
        section, rest = _split_section(body)
        if name in ENTRY_SECTIONS:
            parts.append(f"**{name}**\n\n{_entries(section)}")
        elif name in ("Example", "Examples"):
            parts.append(f"```python\n{section}\n```")
        else:
            parts.append(f"**{name}:** {section}")
        if rest:
            parts.append(rest)
    return "\n\n".join(part for part in parts if part)


def _split_section(body: str) -> tuple[str, str]:
    """Return the dedented lines of a section, and the text after it that is not indented."""
    lines = body.strip("\n").split("\n")
    count = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), None)
    section = inspect.cleandoc("\n" + "\n".join(lines[:count]))
    return section, "" if count is None else "\n".join(lines[count:]).strip()


def _entries(section: str) -> str:
    """Return `name: text` entries, whose further lines are indented, as a list."""
    rows = []
    for entry in re.split(r"\n(?=\S)", section):
        name, _, text = entry.partition(":")
        rows.append(f"- `{name.strip()}`: {' '.join(text.split())}")
    return "\n".join(rows)


def member_parts(name: str, item: type) -> Iterator[str]:
    """Yield the public methods and properties that a class defines."""
    fields = {f.name for f in dataclasses.fields(item)} if dataclasses.is_dataclass(item) else ()
    for base in item.__mro__:
        if not base.__module__.startswith("ee_llm"):
            continue
        for member, value in vars(base).items():
            if member.startswith("_") or member in fields or vars(item).get(member, value) != value:
                continue
            raw = getattr(value, "__func__", value)
            if isinstance(value, property):
                yield f"#### `{name}.{member}`\n\n{docstring_text(value)}"
            elif inspect.isfunction(raw):
                text = signature_text(f"{name}.{member}", raw)
                yield f"#### `{name}.{member}`\n\n```python\n{text}\n```\n\n{docstring_text(raw)}"


def item_text(name: str) -> str:
    """Return the section of one public name."""
    item = getattr(ee_llm, name)
    parts = [f"### `ee_llm.{name}`"]
    if callable(item):
        parts.append(f"```python\n{signature_text(name, item)}\n```")
    parts.append(docstring_text(item))
    if inspect.isclass(item):
        parts += member_parts(name, item)
    return "\n\n".join(part for part in parts if part)


def public_names() -> list[str]:
    """Return the documented names of `ee_llm`: those in `__all__`, without dunder names."""
    return [name for name in ee_llm.__all__ if not name.startswith("_")]


def page() -> str:
    """Return the complete page."""
    names = public_names()
    functions = [name for name in names if not inspect.isclass(getattr(ee_llm, name))]
    classes = [name for name in names if name not in functions]
    parts = [INTRODUCTION]
    for title, members in (("Functions", functions), ("Classes", classes)):
        parts.append(f"## {title}\n")
        parts += [item_text(name) + "\n" for name in members]
    return "\n".join([*parts, SEE_ALSO])


def main() -> None:
    """Write or check the page."""
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE} is out of date. Run: python tools/docs/api.py")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
