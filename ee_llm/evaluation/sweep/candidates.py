"""What a sweep measures: exit policies and drafts, each with the options that select it."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from ee_llm.config import Config
from ee_llm.errors import RequestError
from ee_llm.evaluation.options import check_exits_exist
from ee_llm.evaluation.sweep.options import SweepOptions
from ee_llm.inference.choices import Measure
from ee_llm.inference.exits.policy import ExitPolicy, check_gates, resolve_policy
from ee_llm.inference.strategies import SelfSpeculation, Strategy

_GENERATE_BATCH = 16  # sequences that `ee-llm generate` runs at a time by default

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
    options: SweepOptions,
    config: Config,
    fingerprint: Callable[[Measure], str],
    gated: Collection[int] = (),
) -> list[Candidate]:
    """Return everything to measure; the first one is the full model.

    Args:
        options: The options.
        config: The model's configuration.
        fingerprint: Returns the model's fingerprint, which calibrated policies must name.
        gated: Boundaries of the exits that have a gate.

    Raises:
        RequestError: The model has no early exits, or none of those that the options name, or not
            the gates that a policy needs, or there is nothing to measure.
    """
    check_exits_exist(config, options.checkpoint, "measure")
    boundaries = config.exits.boundaries
    off = ExitPolicy(boundaries, (None,) * len(boundaries))
    found = [Candidate("full", "full", off, "full", ("--strategy", "full"))]
    if "thresholds" in options.families:
        found += _of_thresholds(options, boundaries)
    found += _of_policies(options, boundaries, fingerprint)
    if "self-speculative" in options.families:
        found += _of_drafts(options, boundaries, off)
    for one in found:
        try:
            check_gates(one.policy, gated)
        except RequestError as error:
            raise RequestError(f"{one.name}: {error}") from None
    if len(found) == 1:
        raise RequestError(
            "there is nothing to measure: families, exits, draft_lengths and policy leave only"
            " the full model. Give at least one of them."
        )
    return found


def execution_arguments(options: SweepOptions) -> tuple[str, ...]:
    """Return the options of `ee-llm generate` for the execution of a sweep, if not the defaults."""
    found: list[str] = []
    for name in ("chat_template", "dtype", "attention", "tensor", "pipeline", "timeout_s"):
        value = getattr(options, name)
        if value != getattr(SweepOptions, name):
            found += [f"--{name.replace('_', '-')}", str(value)]
    for name in ("cuda_graphs", "compile"):
        if getattr(options, name):
            found.append(f"--{name.replace('_', '-')}")
    if options.batch_size > _GENERATE_BATCH:
        found += ["--max-num-seqs", str(options.batch_size)]
    return tuple(found)


def _of_thresholds(options: SweepOptions, boundaries: tuple[int, ...]) -> Iterator[Candidate]:
    for used in _exit_sets(options, boundaries):
        for threshold in dict.fromkeys(map(float, options.thresholds_used)):
            values = tuple(threshold if b in used else None for b in boundaries)
            shown = tuple("off" if value is None else repr(value) for value in values)
            if None not in values:
                shown = shown[:1]
            arguments = ("--thresholds", *shown)
            if options.measure != "max_probability":
                arguments += ("--measure", options.measure)
            yield Candidate(
                "thresholds",
                f"exit{'s' if len(used) > 1 else ''} {'+'.join(map(str, used))} at {threshold!r}",
                ExitPolicy(boundaries, values, options.measure),
                options.strategy,
                arguments + _strategy_arguments(options),
            )


def _of_policies(
    options: SweepOptions, boundaries: tuple[int, ...], fingerprint: Callable[[Measure], str]
) -> Iterator[Candidate]:
    paths = list(dict.fromkeys(options.policy))
    names = [path.name for path in paths]
    for path in paths:
        yield Candidate(
            "policy",
            f"policy {path.name if names.count(path.name) == 1 else path}",
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


def _exit_sets(options: SweepOptions, boundaries: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the sets of exits in the order given, without repetitions."""
    needs_pairs = options.measure == "agreement"  # It compares exits: no token takes the first.
    if not options.exits:
        singles = [] if needs_pairs else [(boundary,) for boundary in boundaries]
        sets = dict.fromkeys([*singles, boundaries])
        return [used for used in sets if len(used) > 1 or not needs_pairs]
    found = []
    for text in options.exits:
        if text == "all":
            found.append(boundaries)
            continue
        parts = text.split("+")
        if not all(part.strip().isdecimal() for part in parts):
            raise RequestError(
                f"exits: {text!r} is not a set of exits. Write 8 for one exit, 8+16 for two"
                f" together, or all. The model has exits at {list(boundaries)}."
            )
        used = tuple(sorted({int(part) for part in parts}))
        for boundary in used:
            _check_exit("exits", boundary, boundaries)
        found.append(used)
    for used in found:
        if needs_pairs and len(used) == 1:
            raise RequestError(
                f"exits: no token exits at {used[0]} alone with measure = 'agreement', which"
                " compares an exit with the one before it. Name two exits or more, as 8+16."
            )
    return list(dict.fromkeys(found))


def _check_exit(name: str, boundary: int, boundaries: tuple[int, ...]) -> None:
    if boundary not in boundaries:
        raise RequestError(
            f"{name}: {boundary!r} is not an exit. The model has exits at {list(boundaries)}."
        )
