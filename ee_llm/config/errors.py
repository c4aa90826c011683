"""Error messages for mistakes in a configuration."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ee_llm.config import toml


def unknown_key(path: str, known: Iterable[str]) -> str:
    """Return the message for an unknown option, with the closest valid names."""
    names = sorted(known)
    section, _, leaf = path.rpartition(".")
    if section:
        names = [name for name in names if "." in name]
    # Usually the section is right and the leaf is misspelt, so search in this order: similar leaves
    # of the same section, the same leaf in other sections, similar full names.
    split = [(name.rpartition("."), name) for name in names]
    inside = {leaf: name for (parent, _, leaf), name in split if parent == section}
    # A name without a dot can also be the leaf of an option, so sections must match more closely.
    cutoff = 0.6 if section else 0.75
    near = [inside[match] for match in difflib.get_close_matches(leaf, inside, n=1, cutoff=cutoff)]
    near += [name for (_, _, other), name in split if other == leaf]
    near += difflib.get_close_matches(path, names, n=1, cutoff=0.8)
    suggestions = " or ".join(list(dict.fromkeys(near))[:2])
    if suggestions:
        return f"{path}: no such option. Did you mean {suggestions}?"
    if section and inside:
        return f"{path}: no such option. The options of {section} are {', '.join(sorted(inside))}."
    return f"{path}: no such option. 'ee-llm train --help' lists all options."


def render(problems: Sequence[Mapping[str, Any]], known: Iterable[str], source: str = "") -> str:
    """Return a readable message with one line per entry of pydantic's `ValidationError.errors()`.

    Args:
        problems: The entries.
        known: The dotted names of all options.
        source: The file that was read, or "".
    """
    names = list(known)
    lines: list[str] = []
    for problem in problems:
        lines += _render_one(problem, names)
    lines = list(dict.fromkeys(lines))
    where = f"{source}: " if source else ""
    if len(lines) == 1:
        return where + lines[0]
    return f"{where}{len(lines)} problems\n" + "\n".join(f"  {line}" for line in lines)


def _render_one(problem: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    path = ".".join(str(part) for part in problem["loc"] if not isinstance(part, int))
    kind = problem["type"]
    given = problem.get("input")
    if kind == "extra_forbidden":
        return [unknown_key(path, known)]
    if kind == "value_error":
        # Our own checks raise these: the message already has options, values and a remedy.
        return str(problem["ctx"]["error"]).splitlines()
    if kind == "missing" and isinstance(problem["loc"][-1], int):
        return [f"{path}: too few values, got {_shown(given)}"]
    index = next((part for part in problem["loc"] if isinstance(part, int)), None)
    item = "" if index is None else f" (item {index + 1})"
    return [f"{path}: {_expectation(kind, problem)}, got {_shown(given)}{item}"]


def _shown(given: object) -> str:
    try:
        return toml.notation(given)
    except TypeError:
        return repr(given)


def _expectation(kind: str, problem: Mapping[str, Any]) -> str:
    context = problem.get("ctx", {})
    if kind == "literal_error":
        return f"must be one of {context['expected']}"
    if kind.startswith(("int_", "float_", "bool_", "string_", "tuple_", "model_", "dict_")):
        types = {
            "int": "an integer such as 8",
            "float": "a number such as 0.1",
            "bool": "true or false",
            "string": "a string",
            "tuple": "a list such as [2, 4]",
            "model": "a table of options",
            "dict": "a table of options",
        }
        return f"must be {types[kind.partition('_')[0]]}"
    bounds = {
        "greater_than": ("gt", "greater than"),
        "greater_than_equal": ("ge", "at least"),
        "less_than": ("lt", "less than"),
        "less_than_equal": ("le", "at most"),
    }
    if kind in bounds:
        key, words = bounds[kind]
        bound = context[key]
        return (
            f"must be {words} {bound:,}" if isinstance(bound, int) else f"must be {words} {bound:g}"
        )
    if kind == "finite_number":
        return "must be a finite number"
    return str(problem["msg"][0].lower() + problem["msg"][1:])
