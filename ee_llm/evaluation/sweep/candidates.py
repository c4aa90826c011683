"""What a sweep measures: exit policies and drafts, each with the options that select it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ee_llm.config import Config
from ee_llm.errors import RequestError
from ee_llm.evaluation.sweep.options import SweepOptions
from ee_llm.inference.choices import Measure
from ee_llm.inference.exits.policy import ExitPolicy, resolve_policy
from ee_llm.inference.strategies import SelfSpeculation, Strategy

Kind = Literal["full", "thresholds", "policy", "self-speculative"]


@dataclass(frozen=True)
class Candidate:
    """One way to decode.

    Attributes:
        family: The family that it belongs to.
        name: Its name in tables and plots.
        policy: Its exit policy.
        strategy: Its strategy.
        arguments: The options of `ee-llm generate` that select it.
    """

    family: Kind
    name: str
    policy: ExitPolicy
    strategy: Strategy | SelfSpeculation
    arguments: tuple[str, ...]


def find_candidates(
    options: SweepOptions, config: Config, fingerprint: Callable[[Measure], str]
) -> list[Candidate]:
    """Return everything to measure; the first one is the full model.

    Args:
        options: The options.
        config: The model's configuration.
        fingerprint: Returns the model's fingerprint, which calibrated policies must name.

    Raises:
        RequestError: The model has no early exits, or none of those that the options name, or there
            is nothing to measure.
    """
    boundaries = config.exits.boundaries
    if not boundaries:
        raise RequestError(
            f"checkpoint = {options.checkpoint} has no early exits to measure. Add some with"
            " 'ee-llm checkpoint add-exits', and tune them."
        )
    off = ExitPolicy(boundaries, (None,) * len(boundaries))
    found = [Candidate("full", "full", off, "full", ("--strategy", "full"))]
    if "thresholds" in options.families:
        found += _of_thresholds(options, boundaries)
    found += _of_policies(options, boundaries, fingerprint)
    if "self-speculative" in options.families:
        found += _of_drafts(options, boundaries, off)
    if len(found) == 1:
        raise RequestError(
            "there is nothing to measure: families, thresholds, draft_lengths and policy leave only"
            " the full model. Give at least one of them."
        )
    return found


def _of_thresholds(options: SweepOptions, boundaries: tuple[int, ...]) -> Iterator[Candidate]:
    for used in _exit_sets(options.exits, boundaries):
        for threshold in dict.fromkeys(options.thresholds):
            values = tuple(threshold if b in used else None for b in boundaries)
            if None in values:
                shown = tuple("off" if value is None else f"{value:g}" for value in values)
            else:
                shown = (f"{threshold:g}",)
            arguments = ("--thresholds", *shown)
            if options.measure != "max_probability":
                arguments += ("--measure", options.measure)
            yield Candidate(
                "thresholds",
                f"exit{'s' if len(used) > 1 else ''} {'+'.join(map(str, used))} at {threshold:g}",
                ExitPolicy(boundaries, values, options.measure),
                options.strategy,
                arguments + _strategy_arguments(options),
            )


def _of_policies(
    options: SweepOptions, boundaries: tuple[int, ...], fingerprint: Callable[[Measure], str]
) -> Iterator[Candidate]:
    for path in options.policy:
        yield Candidate(
            "policy",
            f"policy {path.name}",
            resolve_policy(path, boundaries, fingerprint),
            options.strategy,
            ("--policy", str(path), *_strategy_arguments(options)),
        )


def _of_drafts(
    options: SweepOptions, boundaries: tuple[int, ...], off: ExitPolicy
) -> Iterator[Candidate]:
    for boundary in dict.fromkeys(options.draft_exits or boundaries):
        _check_exit("draft_exits", boundary, boundaries)
        for length in dict.fromkeys(options.draft_lengths):
            draft = ("--draft-exit", str(boundary), "--draft-length", str(length))
            yield Candidate(
                "self-speculative",
                f"draft {length} at exit {boundary}",
                off,
                SelfSpeculation(boundary, length),
                ("--strategy", "self-speculative", *draft),
            )


def _strategy_arguments(options: SweepOptions) -> tuple[str, ...]:
    return () if options.strategy == "exact" else ("--strategy", options.strategy)


def _exit_sets(given: tuple[str, ...], boundaries: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the sets of exits in the order given, without repetitions."""
    if not given:
        return list(dict.fromkeys([*((boundary,) for boundary in boundaries), boundaries]))
    found = []
    for text in given:
        if text == "all":
            found.append(boundaries)
            continue
        parts = text.split("+")
        if not all(part.strip().isdecimal() for part in parts):
            raise RequestError(
                f"exits: {text!r} is not a set of exits. Write 8 for one exit, 8+16 for two"
                f" together, or all. The model has exits at {list(boundaries)}."
            )
        used = sorted({int(part) for part in parts})
        for boundary in used:
            _check_exit("exits", boundary, boundaries)
        found.append(tuple(used))
    return list(dict.fromkeys(found))


def _check_exit(name: str, boundary: int, boundaries: tuple[int, ...]) -> None:
    if boundary not in boundaries:
        raise RequestError(
            f"{name}: {boundary!r} is not an exit. The model has exits at {list(boundaries)}."
        )
