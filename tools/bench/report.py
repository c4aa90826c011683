"""Report the results of a benchmark: machine, ratios of medians, tables, JSON."""

import json
import os
import platform as host
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import tyro
from rich.console import Console
from rich.table import Table

from ee_llm import distributed

Options = TypeVar("Options")


def read_options(
    kind: type[Options], quick: Mapping[str, Any], args: Sequence[str] | None = None
) -> Options:
    """Parse the command line. --quick changes defaults; explicit options take precedence."""
    args = sys.argv[1:] if args is None else args
    defaults = {"quick": True, **quick} if "--quick" in args else {}
    return tyro.cli(kind, args=args, default=kind(**defaults))


class Ratio(NamedTuple):
    """A ratio of two medians, with the quartiles of the ratios of single rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f} .. {self.high:.3f}]"


def ratio_of_medians(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Return median(over) / median(under). Element i of both is from round i."""
    rounds = [a / b for a, b in zip(over, under, strict=True)]
    value = statistics.median(over) / statistics.median(under)
    return Ratio(value, *quartiles(rounds))


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """Return the first and third quartile."""
    if len(samples) == 1:
        return samples[0], samples[0]
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, third


def machine() -> dict[str, Any]:
    """Return the processor or GPU, its cores and the version of torch, but not the host name."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    if distributed.has_cuda():
        return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return host.processor() or host.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, host.machine())


def print_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print a table; the keys of the first row are the column titles."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row.values())
    # Outside a terminal, rich assumes 80 columns, which would truncate the cells in a log.
    console = Console()
    Console(width=console.width if console.is_terminal else 160).print(table)


def write_json(
    path: Path | None, rows: Sequence[Mapping[str, Any]], figures: Mapping[str, float]
) -> None:
    """Print the figures; if `path` is given, write machine, rows and figures to it."""
    for name, value in figures.items():
        print(f"{name} = {value:.4f}")
    if path is not None:
        report = {"machine": machine(), "rows": list(rows), "figures": dict(figures)}
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
