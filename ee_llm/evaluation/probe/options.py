"""The options of a probe, and their checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ee_llm.errors import RequestError
from ee_llm.evaluation.options import InputOptions, check_inputs

DEFAULT_NUM_TOKENS = 10_000
"""Number of tokens to test if no option sets it."""

DEFAULT_NUM_EXITS = 3
"""Greatest number of exits to recommend if no option sets it."""

CostSource = Literal["measured", "weights"]


@dataclass(frozen=True)
class ProbeOptions(InputOptions):
    """Find the boundaries where exits belong."""

    num_tokens: int | None = None
    """Number of tokens to test, after those of the fit. (default: 10,000)"""

    fit_data: tuple[str, ...] = ()
    """Prefixes of prepared data for the least-squares fit. (default: the first part of the
    text, beginning with the first prefix or file)"""

    num_fit_tokens: int | None = None
    """Number of tokens for the least-squares fit, rounded up to whole windows. (default: 20 per
    unit of hidden_size, but at most half of a short text)"""

    boundaries: tuple[int, ...] = ()
    """Numbers of layers after which to probe; fewer of them take less time and memory. (default:
    all layers but the last)"""

    num_exits: int | None = None
    """Greatest number of exits to recommend. (default: 3)"""

    risk: float = 0.05
    """Share of tokens whose exit may disagree with the final exit about the most probable token."""

    costs: CostSource = "measured"
    """Cost of an exit's head against that of a layer: measured on this machine, or the ratio of
    their weights."""

    progress: bool = True
    """Show progress bars on standard error if it is a terminal."""


def check_probe(options: ProbeOptions) -> None:
    """Raise RequestError for options that are out of range, whatever the model."""
    check_inputs(options)
    tested = {Path(prefix).resolve() for prefix in options.data}
    if both := [prefix for prefix in options.fit_data if Path(prefix).resolve() in tested]:
        raise RequestError(
            f"fit_data and data are both {both[0]}: the exits would be tested on the text that"
            " they are fitted to. Leave fit_data out, to fit them to the first part of the text."
        )
    if options.num_fit_tokens is not None and options.num_fit_tokens < 1:
        raise RequestError(
            f"num_fit_tokens = {options.num_fit_tokens} is out of range. Use 1 or more."
        )
    if not isinstance(options.risk, int | float) or not 0.0 < options.risk < 1.0:  # NaN fails too
        raise RequestError(f"risk = {options.risk!r} is not between 0 and 1. Use 0.05, say.")
    if options.costs not in get_args(CostSource):
        raise RequestError(
            f"costs = {options.costs!r} is unknown. Use one of {', '.join(get_args(CostSource))}."
        )


def probed_boundaries(options: ProbeOptions, num_layers: int) -> tuple[int, ...]:
    """Return the boundaries to probe, in order; raises RequestError if one is out of range."""
    if num_layers < 2:
        raise RequestError(
            f"checkpoint = {options.checkpoint} has num_layers = {num_layers}: there is no boundary"
            " before the final exit. Use a model with 2 layers or more."
        )
    boundaries = tuple(sorted(set(options.boundaries))) or tuple(range(1, num_layers))
    for boundary in boundaries:
        if not 1 <= boundary < num_layers:
            raise RequestError(
                f"boundaries: {boundary} is out of range. Use 1 to {num_layers - 1}, since the"
                f" model has {num_layers} layers."
            )
    return boundaries


def budget(options: ProbeOptions, num_boundaries: int) -> int:
    """Return the greatest number of exits; raises RequestError if it is out of range."""
    if options.num_exits is None:
        return min(DEFAULT_NUM_EXITS, num_boundaries)
    if not 1 <= options.num_exits <= num_boundaries:
        raise RequestError(
            f"num_exits = {options.num_exits} is out of range. Use 1 to {num_boundaries}, the"
            " number of probed boundaries."
        )
    return options.num_exits


def enough_tokens(hidden_size: int) -> int:
    """Return the number of tokens from which a fit is good, as `add-exits` advises."""
    return 10 * (hidden_size + 1)
