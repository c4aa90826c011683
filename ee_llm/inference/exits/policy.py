"""Exit policies: measures of confidence, and the thresholds that decide where a token exits."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from ee_llm.atomic_file import AtomicFile
from ee_llm.errors import RequestError
from ee_llm.inference.choices import MEASURES, Measure, logit_measure
from ee_llm.inference.exits.confidence import OF_LOGITS
from ee_llm.inference.sampling.plain_numbers import plain_float, plain_int
from ee_llm.inference.strategies import FULL_DEPTH, SelfSpeculation, Strategy


@dataclass(frozen=True)
class ExitPolicy:
    """Which exits a token may take, and how confident they must be.

    Attributes:
        boundaries: The early exits of the model in increasing order, without the final one; a
            tuple or a list.
        thresholds: For each of these exits, a confidence in (0, 1], or None if the exit is off. A
            token exits at the first exit whose confidence reaches its threshold.
        measure: Measure of confidence, computed before sampling parameters apply. From the exit's
            own distribution: "max_probability" is the highest probability, "entropy" is
            1 - normalized entropy, "margin" is the highest probability minus the second highest.
            From several exits: "agreement" is the probability of the previous exit's most probable
            token, and "shortlist" the highest probability among the 16 best tokens of the first
            exit. From hidden states, before the output projection: "saturation" is the cosine
            similarity before and after the last layer, and "gate" is learned (see 'ee-llm calibrate
            --train-gate').

    Raises:
        RequestError: A field is not valid.
    """

    boundaries: tuple[int, ...]
    thresholds: tuple[float | None, ...]
    measure: Measure = "max_probability"

    def __post_init__(self) -> None:
        if not isinstance(self.measure, str) or self.measure not in MEASURES:
            raise RequestError(
                f"measure {self.measure!r} is unknown. Use one of {', '.join(MEASURES)}."
            )
        object.__setattr__(self, "boundaries", _boundaries(self.boundaries))
        object.__setattr__(self, "thresholds", _thresholds(self.thresholds))
        if len(self.thresholds) != len(self.boundaries):
            raise RequestError(
                f"thresholds: {len(self.thresholds)} given for {len(self.boundaries)} exits at"
                f" boundaries {list(self.boundaries)}. Give one per exit, or a single one for all."
            )

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that are equal for equal policies."""
        rows = [
            [boundary, None if threshold is None else float(threshold).hex()]
            for boundary, threshold in zip(self.boundaries, self.thresholds, strict=True)
        ]
        text = json.dumps([self.measure, rows], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def threshold(self, boundary: int) -> float | None:
        """Return the threshold of the exit at `boundary`; None if it is off or does not exist."""
        return dict(zip(self.boundaries, self.thresholds, strict=True)).get(boundary)

    def confidence(self, logits: Tensor) -> Tensor:
        """Return the confidence [...] in [0, 1] of logits [..., v], in float32 or float64.

        For a measure that needs more than logits, this is the highest probability, as at the final
        exit.
        """
        return OF_LOGITS[logit_measure(self.measure)](logits)

    def exits(self, boundary: int, confidence: float) -> bool:
        """Return whether a token with this confidence exits at the early exit at `boundary`."""
        threshold = self.threshold(boundary)
        return threshold is not None and confidence >= threshold

    def without_exits(self) -> "ExitPolicy":
        """Return the policy with every exit off and the same measure."""
        return ExitPolicy(self.boundaries, (None,) * len(self.boundaries), self.measure)

    def under(self, strategy: Strategy) -> "ExitPolicy":
        """Return the policy that a strategy uses: those of full depth turn all exits off."""
        return self.without_exits() if strategy in FULL_DEPTH else self

    def check_fits(self, boundaries: Sequence[int]) -> None:
        """Raise RequestError unless `boundaries` are the early exits that the policy is for."""
        if self.boundaries != tuple(boundaries):
            raise RequestError(
                f"The policy is for exits at boundaries {list(self.boundaries)}, but the model has"
                f" exits at {list(boundaries)}."
            )

    def save(self, path: str | Path, calibration: Mapping[str, Any] | None = None) -> None:
        """Write the policy to a JSON file, which `exits` and `--policy` accept.

        Args:
            path: The file.
            calibration: What is known about the policy, with the "fingerprint" of the only model
                that accepts the file.
        """
        thresholds = dict(zip(map(str, self.boundaries), self.thresholds, strict=True))
        content: dict[str, Any] = {"measure": self.measure, "thresholds": thresholds}
        if calibration is not None:
            content["calibration"] = dict(calibration)
        text = json.dumps(content, indent=2)
        with AtomicFile(Path(path)) as file:
            file.write(f"{text}\n".encode())
            file.commit()


def _boundaries(given: Any) -> tuple[int, ...]:
    """Return the boundaries of a policy as a tuple; raises RequestError if they are not valid."""
    found = [plain_int(one) for one in given] if isinstance(given, Iterable) else [None]
    boundaries = tuple(one for one in found if one is not None)
    if len(boundaries) < len(found) or any(a >= b for a, b in pairwise(boundaries)):
        raise RequestError(
            f"boundaries = {given!r} must be integers in increasing order. Give each early exit of"
            " the model once."
        )
    return boundaries


def _thresholds(given: Any) -> tuple[float | None, ...]:
    """Return the thresholds of a policy as a tuple; raises RequestError if they are not valid."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise RequestError(f"thresholds = {given!r} must be a list with a threshold for each exit.")
    thresholds: list[float | None] = []
    for one in given:
        value = plain_float(one)
        if one is not None and (value is None or not 0.0 < value <= 1.0):  # NaN fails too
            raise RequestError(
                f"thresholds: {one!r} is not in (0, 1]. 1 means 'only if certain'; use 'off' for an"
                " exit that no token may take."
            )
        thresholds.append(value)
    return tuple(thresholds)


Threshold = float | Literal["off"] | None
Exits = float | Literal["off"] | Mapping[int, Threshold] | ExitPolicy | str | Path
"""What users give as exits: one threshold, thresholds by exit, a policy, or a policy file."""


class _PolicyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    measure: Measure = "max_probability"
    thresholds: dict[int, float | Literal["off"] | None]
    calibration: dict[str, Any] | None = None


def resolve_policy(
    exits: Exits, boundaries: Sequence[int], fingerprint: Callable[[Measure], str] | None = None
) -> ExitPolicy:
    """Return the exit policy that `exits` describes for a model with early exits at `boundaries`.

    Args:
        exits: A threshold for all exits, "off", thresholds by exit (the others are off), an
            `ExitPolicy`, or a JSON file {"measure": .., "thresholds": {"8": 0.9, "16": "off"}}.
        boundaries: Boundaries of the model's early exits.
        fingerprint: Returns the model's fingerprint for a measure, which a calibrated policy must
            name. None accepts the calibration of any model.

    Raises:
        RequestError: A threshold is not valid, the model has no such exit, or the policy file was
            calibrated for another model.
    """
    if isinstance(exits, ExitPolicy):
        exits.check_fits(boundaries)
        return exits
    if exits == "off":
        return make_exit_policy(boundaries, [None])
    if isinstance(exits, str | Path):
        found = _read_policy(Path(exits))
        if found.calibration is not None and fingerprint is not None:
            _check_calibrated(exits, found, fingerprint(found.measure))
        try:
            return _by_exit(found.thresholds, boundaries, found.measure)
        except RequestError as error:
            raise RequestError(f"Policy file {exits}: {error}") from None
    if isinstance(exits, Mapping):
        return _by_exit(exits, boundaries, "max_probability")
    threshold = plain_float(exits)
    if threshold is None:
        raise RequestError(
            f"exits = {exits!r}. Give a threshold such as 0.8, thresholds by exit such as"
            " {8: 0.9}, an ExitPolicy, or a policy file."
        )
    return make_exit_policy(boundaries, [threshold])


def make_exit_policy(
    boundaries: Sequence[int],
    thresholds: Sequence[float | None],
    measure: Measure = "max_probability",
) -> ExitPolicy:
    """Return the policy for exits at `boundaries`; a single threshold applies to all of them.

    Raises RequestError for a threshold outside (0, 1], a wrong number of them, an unknown measure.
    """
    if len(thresholds) == 1 and len(boundaries) != 1:
        ExitPolicy((0,), (thresholds[0],), measure)  # Validate it for a model without exits too.
        thresholds = tuple(thresholds) * len(boundaries)
    return ExitPolicy(tuple(boundaries), tuple(thresholds), measure)


def check_gates(policy: ExitPolicy, gated: Collection[int]) -> None:
    """Raise RequestError if the policy uses a gate that the model does not have.

    gated: boundaries of the exits that have a gate.
    """
    used = zip(policy.boundaries, policy.thresholds, strict=True)
    missing = [boundary for boundary, one in used if one is not None and boundary not in gated]
    if policy.measure == "gate" and missing:
        raise RequestError(
            f"measure = 'gate' needs a gate for the exit after layer {missing[0]}, which the"
            " checkpoint does not have. Train gates with 'ee-llm calibrate --train-gate', or use"
            " another measure."
        )


def check_exits(
    policy: ExitPolicy,
    strategy: Strategy,
    speculation: SelfSpeculation | None,
    boundaries: Sequence[int],
    gated: Collection[int],
) -> None:
    """Raise RequestError if the exits of a request do not fit the model.

    Args:
        policy: Exit policy of the request.
        strategy: Its strategy.
        speculation: How it drafts, for `self-speculative`.
        boundaries: Boundaries of the model's early exits.
        gated: Boundaries of the exits that have a gate.
    """
    policy.check_fits(boundaries)
    if speculation is None or speculation.draft_exit is None:
        check_gates(policy.under(strategy), gated)
        return
    if speculation.draft_exit not in boundaries:
        raise RequestError(
            f"draft_exit = {speculation.draft_exit} is not an exit. The model has exits at"
            f" {list(boundaries)}."
        )
    if speculation.draft_threshold is not None:
        check_gates(ExitPolicy((speculation.draft_exit,), (1.0,), policy.measure), gated)
        if policy.measure == "agreement":
            raise RequestError(
                "measure = 'agreement' compares two exits, but self-speculation drafts at one, so"
                " no draft would reach draft_threshold. Use another measure, or leave"
                " draft_threshold out."
            )


def _by_exit(
    thresholds: Mapping[int, Threshold], boundaries: Sequence[int], measure: Measure
) -> ExitPolicy:
    unknown = [exit for exit in thresholds if exit not in boundaries]
    if unknown:
        raise RequestError(
            f"exits = {dict(thresholds)}: {unknown[0]!r} is not an exit. The model has exits at"
            f" {list(boundaries)}."
        )
    values = [thresholds.get(boundary) for boundary in boundaries]
    return ExitPolicy(
        tuple(boundaries), tuple(None if one == "off" else one for one in values), measure
    )


def _check_calibrated(path: str | Path, policy: _PolicyFile, expected: str) -> None:
    known = policy.calibration or {}
    if known.get("fingerprint") == expected:
        return
    source = f"the model with fingerprint {known.get('fingerprint')} ({known.get('checkpoint')})"
    if policy.measure == "gate":
        raise RequestError(
            f"Policy file {path} was calibrated for {source} and its gates. This checkpoint is"
            f" another model, or has other gates or none ({expected}). Train gates and calibrate"
            " them with 'ee-llm calibrate --train-gate', or use the checkpoint of the policy."
        )
    raise RequestError(
        f"Policy file {path} was calibrated for {source}, but this model has {expected}. Run"
        " 'ee-llm calibrate' on this model, or remove \"calibration\" from the file to use its"
        " thresholds without a guarantee."
    )


def _read_policy(path: Path) -> _PolicyFile:
    try:
        return _PolicyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RequestError(
            f"Policy file {path} cannot be read: {error.strerror or error}."
        ) from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise RequestError(f"Policy file {path}: {where}: {problem['msg']}.") from None
