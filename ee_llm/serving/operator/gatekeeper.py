"""Keep requests within the operator's limits, which may change while the server runs."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ee_llm.errors import RequestError
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.strategies import SelfSpeculation, Strategy
from ee_llm.serving.operator.audit import AuditLog
from ee_llm.serving.operator.enforce import (
    REFUSED_CODE,
    Effective,
    apply_limits,
    check_fits,
    limit_policy,
    refusal,
    with_default_measure,
)
from ee_llm.serving.operator.limits_file import Limits, LimitsFile
from ee_llm.serving.protocol.ee import EEClamp, EEOptions
from ee_llm.serving.protocol.errors import ApiError

logger = logging.getLogger(__name__)

REFRESH_S = 2.0
"""Seconds between two looks at the file of limits."""


class Gatekeeper:
    """Applies the operator's limits to requests and to the server's own exit policy.

    Attributes:
        limits: The limits in force; None if there are none.
        num_clamps: Number of clamped values, by the field of `ee`.
        num_refusals: Number of refused requests.
        audit: The audit log, if there is one.
    """

    def __init__(
        self,
        policy: ExitPolicy,
        limits: Path | None = None,
        key_file: Path | None = None,
        audit_log: Path | None = None,
    ) -> None:
        """Read the limits.

        Args:
            policy: Exit policy of requests without one.
            limits: File with the limits; None for no limits.
            key_file: File with the key of their signature; None if they are not signed.
            audit_log: File that records clamps and refusals.

        Raises:
            RequestError: The limits are not valid, not signed with the key, or do not fit the
                model, or they refuse the server's own policy.
        """
        self.limits: Limits | None = None
        self.num_clamps: Counter[str] = Counter()
        self.num_refusals = 0
        self.audit: AuditLog | None = None
        self._own = self._default = policy
        self._file = None if limits is None else LimitsFile(limits, key_file)
        self._state: Any = None
        self._refreshed = time.monotonic()
        if self._file is not None:
            self._state = self._file.state()  # Before it is read, so that no change is missed.
            clamps = self._take(self._file.read())
            if clamps and self.limits is not None and self.limits.on_violation == "refuse":
                raise RequestError(
                    f"--limits {limits} refuses the server's own policy: {_described(clamps)}."
                    " Choose another --policy or other --thresholds, or use 'on_violation':"
                    " 'clamp'."
                )
            self._warn_of(clamps)
        if audit_log is not None:
            self.audit = AuditLog(audit_log)

    @property
    def policy(self) -> ExitPolicy:
        """Exit policy of requests without one, within the limits."""
        return self._default

    def refresh(self) -> None:
        """Read the limits again if their file has changed; call this now and then.

        If they are not valid or not signed, the limits in force stay.
        """
        if self._file is None or time.monotonic() - self._refreshed < REFRESH_S:
            return
        self._refreshed = time.monotonic()
        state = self._file.state()
        if state == self._state:
            return
        self._state = state
        try:
            clamps = self._take(self._file.read())
        except RequestError as error:
            logger.warning("The limits in force stay, because the new ones are refused: %s", error)
            return
        logger.info("New limits of --limits %s are in force.", self._file.path)
        self._warn_of(clamps)

    def apply(self, options: EEOptions, request_id: str, key_id: str | None) -> Effective:
        """Return how a request is decoded.

        Args:
            options: What the request asks for.
            request_id: Its id, for the audit log.
            key_id: Digest of its API key, for the audit log.

        Raises:
            ApiError: An option is not valid, or the limits refuse it.
        """
        self.refresh()
        if self.limits is None:
            policy = options.policy(self._own.boundaries)
            return Effective(policy, options.decoding_strategy())
        asked = {
            "request_id": request_id,
            "key_id": key_id,
            "asked": options.model_dump(exclude_unset=True),
        }
        try:
            effective = apply_limits(self.limits, options, self._default)
            if effective.clamps and self.limits.on_violation == "refuse":
                raise refusal(effective.clamps[0], self.limits)
        except ApiError as error:
            if error.code == REFUSED_CODE:
                self.num_refusals += 1
                self._record("refuse", asked, effective=None, reason=error.message)
            raise
        if effective.clamps:
            self.num_clamps.update(clamp.param.removeprefix("ee.") for clamp in effective.clamps)
            clamped = [clamp.model_dump() for clamp in effective.clamps]
            self._record("clamp", asked, effective=_facts(effective), clamped=clamped)
        return effective

    def close(self) -> None:
        """Close the audit log."""
        if self.audit is not None:
            self.audit.close()

    def _record(self, event: str, asked: Mapping[str, Any], **facts: Any) -> None:
        if self.audit is not None:
            self.audit.write({"event": event, **asked, **facts})

    def _take(self, limits: Limits) -> list[EEClamp]:
        """Put limits in force, and return what they change in the server's own policy."""
        check_fits(limits, self._own.boundaries)
        limits = with_default_measure(limits, self._own)
        self._default, clamps = limit_policy(limits, self._own)
        self.limits = limits
        return clamps

    def _warn_of(self, clamps: list[EEClamp]) -> None:
        if clamps:
            logger.warning(
                "The limits change the server's own policy: %s. Its digest is now %s.",
                _described(clamps),
                self._default.digest,
            )


def _facts(effective: Effective) -> dict[str, Any]:
    """Return how a request is decoded, for the audit log."""
    policy, strategy = effective.policy, effective.strategy
    assert policy is not None, "limits always give a policy"
    drafts = {}
    name: Strategy = "self-speculative"
    if isinstance(strategy, SelfSpeculation):
        drafts = {key: getattr(strategy, key) for key in ("draft_exit", "draft_threshold")}
    else:
        name = strategy
    policy = policy.under(name)
    thresholds = dict(zip(map(str, policy.boundaries), policy.thresholds, strict=True))
    return {
        "strategy": name,
        "measure": policy.measure,
        "thresholds": thresholds,
        **drafts,
        "digest": policy.digest,
    }


def _described(clamps: list[EEClamp]) -> str:
    """Return changes of the server's policy as text."""
    lines = []
    for clamp in clamps:
        place = "measure" if clamp.exit is None else f"threshold of exit {clamp.exit}"
        effective = "off" if clamp.effective is None else clamp.effective
        lines.append(f"{place} {clamp.asked} -> {effective}")
    return ", ".join(lines)
