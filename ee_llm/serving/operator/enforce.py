"""Apply the operator's limits to the exits of a request."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ee_llm.errors import RequestError
from ee_llm.inference.decoding.settings import CONTRASTS
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.strategies import SelfSpeculation, Strategy
from ee_llm.serving.operator.limits_file import Limits
from ee_llm.serving.protocol.ee import EEClamp, EEOptions
from ee_llm.serving.protocol.errors import ApiError

REFUSED_CODE = "operator_limit"
"""Code of errors of requests that the limits refuse."""


@dataclass(frozen=True)
class Effective:
    """How a request is decoded.

    Attributes:
        policy: Its exit policy; None for that of the model.
        strategy: Its strategy, with the settings of `self-speculative`.
        clamps: What differs from the request because of the limits.
    """

    policy: ExitPolicy | None
    strategy: Strategy | SelfSpeculation
    clamps: tuple[EEClamp, ...] = ()


def check_fits(limits: Limits, boundaries: Sequence[int]) -> None:
    """Raise RequestError unless limits name the exits of a model, and have a floor for each.

    A limit for an exit that does not exist would protect nothing.
    """
    floors = limits.min_thresholds
    named = [int(boundary) for boundary in floors] if isinstance(floors, dict) else []
    for field, exits in {"min_thresholds": named, "allowed_exits": limits.allowed_exits}.items():
        for boundary in exits or ():
            if boundary not in boundaries:
                raise RequestError(
                    f"{field}: {boundary} is not an exit. The model has exits at"
                    f" {list(boundaries)}."
                )
    for boundary in boundaries:
        if floors is not None and limits.allows_exit(boundary) and limits.floor(boundary) is None:
            raise RequestError(
                f"min_thresholds has no value for the exit at {boundary}. Add it, or leave the exit"
                " out of allowed_exits."
            )


def with_default_measure(limits: Limits, default: ExitPolicy) -> Limits:
    """Return limits whose floors apply to one measure at least: that of the server's policy."""
    if limits.min_thresholds is None or limits.allowed_measures is not None:
        return limits
    return limits.model_copy(update={"allowed_measures": [default.measure]})


def limit_policy(limits: Limits, policy: ExitPolicy) -> tuple[ExitPolicy, list[EEClamp]]:
    """Return the policy that the limits make of another, and what differs.

    Too low thresholds are raised, and exits that are not allowed are off. If the measure is not
    allowed, all exits are off, since its thresholds mean nothing by another measure.
    """
    clamps, measure, measures = [], policy.measure, limits.allowed_measures
    if measures is not None and measure not in measures:
        clamps.append(_clamp("measure", policy.measure, measures[0]))
        measure = measures[0]
    thresholds: list[float | None] = []
    for boundary, asked in zip(policy.boundaries, policy.thresholds, strict=True):
        effective = asked
        if asked is not None:
            floor = limits.floor(boundary)
            if measure != policy.measure or not limits.allows_exit(boundary):
                effective = None
            elif floor is not None and asked < floor:
                effective = floor
        if effective != asked:
            clamps.append(_clamp("thresholds", asked, effective, boundary))
        thresholds.append(effective)
    return ExitPolicy(policy.boundaries, tuple(thresholds), measure), clamps


def apply_limits(limits: Limits, options: EEOptions, default: ExitPolicy) -> Effective:
    """Return how a request is decoded within the limits.

    Args:
        limits: The limits, which name their measures (see `with_default_measure`).
        options: What the request asks for.
        default: Exit policy of requests without one, within the limits.

    Raises:
        ApiError: An option is not valid, or no value of it is allowed.
    """
    clamps: list[EEClamp] = []
    policy, strategy = options.policy(default.boundaries), options.decoding_strategy()
    if options.strategy is None:
        strategy = limits.default_strategy
    elif options.strategy not in limits.allowed_strategies:
        strategy = limits.default_strategy
        clamps.append(_clamp("strategy", options.strategy, strategy))
    if policy is None:
        # Strategies that contrast logits refuse thresholds, which they would ignore.
        policy = default.without_exits() if strategy in CONTRASTS else default
    else:
        policy, of_policy = limit_policy(limits, policy)
        clamps += of_policy
    if isinstance(strategy, SelfSpeculation) and policy.boundaries:
        strategy, of_drafts = _limit_drafts(limits, strategy, policy)
        clamps += of_drafts
    return Effective(policy, strategy, tuple(clamps))


def refusal(clamp: EEClamp, limits: Limits) -> ApiError:
    """Return the error of a request that the limits would clamp."""
    field = clamp.param.removeprefix("ee.")
    where = "" if clamp.exit is None else f" of the exit at {clamp.exit}"
    if field in ("thresholds", "draft_threshold") and clamp.effective is not None:
        reason = f"is below {clamp.effective}, the least that"
    else:
        allowed = {
            "measure": limits.allowed_measures,
            "strategy": limits.allowed_strategies,
        }.get(field, limits.allowed_exits)
        what = {"measure": "measures", "strategy": "strategies"}.get(field, "exits")
        reason = f"is not possible, because {allowed} are the only {what} that"
    return _refused(
        f"{clamp.param} = {clamp.asked!r}{where} {reason} the operator of this server allows."
        " Change it, or leave it out.",
        clamp.param,
    )


def _limit_drafts(
    limits: Limits, strategy: SelfSpeculation, policy: ExitPolicy
) -> tuple[SelfSpeculation, list[EEClamp]]:
    """Return how a request drafts within the limits, and what differs.

    Values that the request leaves out become the least that are allowed, which is no clamp.
    """
    clamps = []
    exits = [boundary for boundary in policy.boundaries if limits.allows_exit(boundary)]
    exit, threshold = strategy.draft_exit, strategy.draft_threshold
    if exit is not None and exit not in policy.boundaries:
        return strategy, []  # The engine refuses it, and says which exits there are.
    if not exits:
        raise _refused(
            "ee.strategy = 'self-speculative' drafts at an exit, but the operator of this server"
            " allows none. Use the strategy 'full', whose output is the same.",
            "ee.strategy",
        )
    if exit not in exits:
        if exit is not None:
            clamps.append(_clamp("draft_exit", exit, exits[0]))
        exit = exits[0]
    floor = limits.floor(exit)
    if floor is not None:
        if policy.measure == "agreement":
            raise _refused(
                "ee.measure = 'agreement' compares two exits, but the strategy 'self-speculative'"
                " drafts at one, and this server needs a threshold for drafts. Use another measure,"
                " or the strategy 'full', whose output is the same.",
                "ee.measure",
            )
        if threshold is not None and threshold < floor:
            clamps.append(_clamp("draft_threshold", threshold, floor))
        threshold = max(threshold or 0.0, floor)
    return replace(strategy, draft_exit=exit, draft_threshold=threshold), clamps


def _clamp(field: str, asked: Any, effective: Any, exit: int | None = None) -> EEClamp:
    return EEClamp(param=f"ee.{field}", exit=exit, asked=asked, effective=effective)


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code=REFUSED_CODE)
