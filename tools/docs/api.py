"""Write docs/reference/api.md from the signatures and docstrings of ee_llm's public names.

    python tools/docs/api.py          writes the page
    python tools/docs/api.py --check  exits 1 if the page is out of date

Signatures come from the source, so that they show type aliases by name; the page defines these at
its end. Docstrings are in Google style; their sections become lists.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any

from pydantic import BaseModel

import ee_llm

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "api.md"
LINE_LENGTH = 88  # Longer signatures have one line per parameter.

INTRODUCTION = """\
# Python API

<!-- Written by tools/docs/api.py from the docstrings of ee_llm; edit there. -->

This page lists the public names of `ee_llm`. The [tutorial](../tutorials/python-api.md) shows
them in use. An exit is named by its *boundary*: the number of layers before it.

```python
import ee_llm

llm = ee_llm.LLM("runs/first")
print(llm.generate("def main(")[0].text)
```

Mistakes that you can correct, such as an unknown option or a missing file, raise a subclass of
`ee_llm.UserError`. Log messages go to the logger `ee_llm`.
"""

SEE_ALSO = """\
## See also

- [Python API tutorial](../tutorials/python-api.md)
- [Generation](generation.md): strategies, exit policies, sampling settings
- [Configuration](configuration.md): the options of `ee_llm.load_config`
"""

# Classes that the functions above return, and users do not construct.
RESULTS = (
    "ee_llm.inference.stream.TokenStream",
    "ee_llm.serving.async_engine.AsyncTokenStream",
    "ee_llm.inference.verification.verify.Finding",
    "ee_llm.inference.verification.certificate.Divergence",
    "ee_llm.conversion.convert.ConversionResult",
    "ee_llm.pipeline.planner.report.PlanReport",
    "ee_llm.evaluation.probe.result.BoundaryMetrics",
    "ee_llm.evaluation.probe.result.ClassMetrics",
    "ee_llm.evaluation.probe.recommend.Recommendation",
)

# The sections of a docstring in Google style. ENTRY_SECTIONS have entries of `name: text`.
ENTRY_SECTIONS = ("Args", "Attributes", "Raises")
TEXT_SECTIONS = ("Returns", "Yields", "Example", "Examples", "Note", "Source")
_SECTION = re.compile(rf"^({'|'.join(ENTRY_SECTIONS + TEXT_SECTIONS)}):\s*$", re.MULTILINE)


class ApiPage:
    """The page, and the type aliases that its signatures mention."""

    def __init__(self) -> None:
        self._aliases: dict[str, Any] = {}

    def text(self) -> str:
        """Return the complete page."""
        names = [name for name in ee_llm.__all__ if not name.startswith("_")]
        functions = [name for name in names if not inspect.isclass(getattr(ee_llm, name))]
        classes = [name for name in names if name not in functions]
        parts = [INTRODUCTION]
        for title, members in (("Functions", functions), ("Classes", classes)):
            parts.append(f"## {title}\n")
            for name in members:
                parts.append(self._item(f"ee_llm.{name}", getattr(ee_llm, name)))
        parts.append("## Results\n\nThe functions and methods above return these objects.\n")
        for name in RESULTS:
            module, _, member = name.rpartition(".")
            parts.append(self._item(name, getattr(importlib.import_module(module), member)))
        parts.append("## Types\n")
        rows = (
            f"- `{name}`: `{_type_text(self._aliases[name])}`" for name in sorted(self._aliases)
        )
        parts.append("\n".join(rows) + "\n")
        return "\n".join([*parts, SEE_ALSO])

    def _item(self, name: str, item: Any) -> str:
        """Return the section of a function or class."""
        short = name.rpartition(".")[2]
        signature = "" if name in RESULTS else self.signature(short, item)
        parts = [f"### `{name}`", signature and f"```python\n{signature}\n```"]
        parts.append(docstring_text(item.__doc__))
        if inspect.isclass(item):
            if signature and not dataclasses.is_dataclass(item):
                parts.append(docstring_text(item.__init__.__doc__))
            parts += self._members(short, item)
        return "\n\n".join(part for part in parts if part) + "\n"

    def _members(self, name: str, item: type) -> Iterator[str]:
        """Yield the public methods and properties of a class."""
        seen = set(re.findall(r"^    (\w+): ", inspect.getdoc(item) or "", re.MULTILINE))
        for base in item.__mro__:
            if not base.__module__.startswith("ee_llm") or base.__name__ == "Section":
                continue
            for member, value in vars(base).items():
                if member.startswith("_") or member in seen:
                    continue
                seen.add(member)
                function = getattr(value, "__func__", value)
                title = f"#### `{name}.{member}`"
                if isinstance(value, property | cached_property):
                    yield f"{title}\n\n{docstring_text(value.__doc__)}"
                elif inspect.isfunction(function) and function.__doc__:
                    signature = self.signature(f"{name}.{member}", function)
                    text = docstring_text(function.__doc__)
                    yield f"{title}\n\n```python\n{signature}\n```\n\n{text}"

    def signature(self, name: str, item: Any) -> str:
        """Return the signature in the source; "" for a class that users do not construct."""
        if not inspect.isclass(item):
            return self._function_signature(name, item)
        if dataclasses.is_dataclass(item):
            return self._dataclass_signature(name, item)
        if issubclass(item, BaseModel | BaseException):
            return ""
        return self._function_signature(name, item.__init__).removesuffix(" -> None")

    def _function_signature(self, name: str, function: Callable[..., Any]) -> str:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        is_async = isinstance(node, ast.AsyncFunctionDef)
        assert isinstance(node, ast.FunctionDef) or is_async, f"{name} is not a function"
        arguments = node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
        parts = [_parameter(a, d) for a, d in zip(positional, defaults, strict=True)]
        if positional and positional[0].arg in ("self", "cls"):
            parts = parts[1:]
        if arguments.vararg:
            parts.append(f"*{_parameter(arguments.vararg, None)}")
        elif arguments.kwonlyargs:
            parts.append("*")
        pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        parts += [_parameter(argument, default) for argument, default in pairs]
        if arguments.kwarg:
            parts.append(f"**{_parameter(arguments.kwarg, None)}")
        returns = f" -> {_annotation(node.returns)}" if node.returns else ""
        self._note_aliases(function, [*parts, returns])
        return _joined(f"await {name}" if is_async else name, parts, returns)

    def _dataclass_signature(self, name: str, item: type) -> str:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(item))).body
        assert isinstance(node, ast.ClassDef), f"{name} is not a class"
        keyword_only = any("kw_only=True" in ast.unparse(d) for d in node.decorator_list)
        parts = ["*"] if keyword_only else []
        for field in node.body:
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            default = "" if field.value is None else f" = {_default(field.value)}"
            parts.append(f"{field.target.id}: {_annotation(field.annotation)}{default}")
        self._note_aliases(item, parts)
        return _joined(name, parts, "")

    def _note_aliases(self, item: Any, parts: list[str]) -> None:
        """Collect the type aliases in a signature."""
        names = vars(sys.modules[item.__module__])
        for word in re.findall(r"\b[A-Z]\w*", " ".join(parts)):
            value = names.get(word)
            if isinstance(value, UnionType) or typing.get_origin(value) is not None:
                self._aliases[word] = value


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {_annotation(argument.annotation)}" if argument.annotation else ""
    if default is None:
        return f"{argument.arg}{annotation}"
    return f"{argument.arg}{annotation} = {_default(default)}"


def _annotation(node: ast.expr) -> str:
    return re.sub(r"'([A-Z]\w*)'", r"\1", ast.unparse(node)).replace("'", '"')  # no quoted classes


def _default(node: ast.expr) -> str:
    text = ast.unparse(node)
    if match := re.search(r"default=([^,)]+\)?)", text):
        text = match[1]
    return text.replace("'", '"')


def _joined(name: str, parts: list[str], returns: str) -> str:
    text = f"{name}({', '.join(parts)}){returns}"
    if len(text) <= LINE_LENGTH:
        return text
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returns}"])


def _type_text(value: Any) -> str:
    """Return the definition of a type alias, without the modules of its types."""
    origin, arguments = typing.get_origin(value), typing.get_args(value)
    if origin is typing.Literal:
        return " | ".join(f'"{argument}"' for argument in arguments)
    if isinstance(value, UnionType) or origin is typing.Union:
        return " | ".join(map(_type_text, arguments))
    if origin is not None and arguments:
        return f"{origin.__name__}[{', '.join(map(_type_text, arguments))}]"
    if value is type(None):
        return "None"
    return getattr(value, "__name__", str(value).rpartition(".")[2])


def docstring_text(text: str | None) -> str:
    """Return a docstring as Markdown."""
    pieces = _SECTION.split(inspect.cleandoc(text or ""))
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


def page() -> str:
    """Return the complete page."""
    return ApiPage().text()


def main() -> None:
    """Write or check the page."""
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE} is out of date. Run: python tools/docs/api.py")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
