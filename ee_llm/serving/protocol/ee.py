"""The field `ee` of requests and responses: early exits."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ee_llm.errors import RequestError
from ee_llm.inference.choices import Measure
from ee_llm.inference.exits.policy import ExitPolicy, resolve_policy
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.strategies import SelfSpeculation, Strategy
from ee_llm.serving.protocol.errors import bad_request

_Boundary = Annotated[str, Field(pattern=r"^[0-9]{1,6}$")]
_Threshold = float | Literal["off"]
LIMITED_FIELDS = ("strategy", "measure", "thresholds", "draft_exit", "draft_threshold")
"""Fields of `ee` that an operator may limit."""

_DRAFT = ("draft_exit", "draft_length", "draft_threshold")


class EEOptions(BaseModel):
    """Exit policy and strategy of a request; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    strategy: Strategy | None = None
    """Decoding strategy; "exact" by default."""

    measure: Measure | None = None
    """Measure of confidence that the thresholds are for; "max_probability" by default."""

    thresholds: _Threshold | dict[_Boundary, _Threshold | None] | None = None
    """One threshold in (0, 1] for all exits, "off", or thresholds by exit, {"8": 0.9}; other exits
    are off. By default, the exit policy of the server."""

    draft_exit: int | None = None
    """Exit that drafts, for the strategy "self-speculative"."""

    draft_length: int | None = None
    """Maximum number of tokens drafted at a time."""

    draft_threshold: float | None = None
    """Draft only while the exit has at least this confidence."""

    return_exits: bool = False
    """Return the exit and the confidence of every token, and the policy."""

    def policy(self, boundaries: Sequence[int]) -> ExitPolicy | None:
        """Return the exit policy for a model with exits at `boundaries`; None for the server's.

        Raises ApiError if it is not valid.
        """
        if self.thresholds is None:
            if self.measure is not None:
                raise bad_request(
                    "ee.measure needs ee.thresholds, which are confidences by this measure. Give"
                    " both.",
                    "ee.thresholds",
                )
            return None
        thresholds: Any = self.thresholds
        if isinstance(thresholds, Mapping):
            thresholds = {int(boundary): one for boundary, one in thresholds.items()}
        try:
            policy = resolve_policy(thresholds, boundaries)
            if self.measure is None:
                return policy
            return ExitPolicy(policy.boundaries, policy.thresholds, self.measure)
        except RequestError as error:
            raise bad_request(f"ee.thresholds: {error}", "ee.thresholds") from None

    def decoding_strategy(self) -> Strategy | SelfSpeculation:
        """Return the strategy with its settings; raises ApiError if they are not valid."""
        strategy = self.strategy or "exact"
        given = {name: getattr(self, name) for name in _DRAFT if getattr(self, name) is not None}
        if strategy != "self-speculative":
            if given:
                name = next(iter(given))
                raise bad_request(
                    f"ee.{name} has no effect with the strategy {strategy!r}. Use the strategy"
                    " 'self-speculative', or remove it.",
                    f"ee.{name}",
                )
            return strategy
        try:
            return SelfSpeculation(**given)
        except RequestError as error:
            name = next((name for name in given if name in str(error)), "strategy")
            raise bad_request(f"ee.{error}", f"ee.{name}") from None


class EEChunk(BaseModel):
    """Exits of the tokens of a chunk of a stream."""

    exits: list[int]
    """Boundary at which each token exited: the number of layers it used."""

    confidences: list[float]
    """Confidence of that exit by the policy's measure."""


class EEPolicy(BaseModel):
    """An exit policy."""

    measure: Measure
    thresholds: dict[str, float | None]
    """Threshold of each exit; null if it is off."""


class EEClamp(BaseModel):
    """A value of a request that the operator's limits have changed."""

    param: str
    """Field of the request, such as "ee.thresholds"."""

    exit: int | None
    """Exit that the value is for; null if it is not for one exit."""

    asked: float | str | None
    """Value in the request."""

    effective: float | str | None
    """Value that was used; null if the exit was turned off."""


class EEClamped(BaseModel):
    """What the operator's limits have changed in a request."""

    clamped: list[EEClamp]


class EEOutput(EEChunk):
    """Exits of a whole choice, with everything that determines its tokens besides the prompt."""

    strategy: Strategy
    policy: EEPolicy
    digest: str
    """Digest of the policy; equal policies have equal digests."""

    mean_depth: float
    """Mean number of layers per generated token."""

    num_layers: int
    seed: int

    clamped: list[EEClamp] | None = None
    """What the operator's limits have changed; only if there is something."""


def ee_policy(policy: ExitPolicy) -> EEPolicy:
    """Return an exit policy as responses have it."""
    thresholds = zip(map(str, policy.boundaries), policy.thresholds, strict=True)
    return EEPolicy(measure=policy.measure, thresholds=dict(thresholds))


def ee_output(output: RequestOutput) -> EEOutput:
    """Return the exits of a finished output."""
    return EEOutput(
        exits=list(output.exits),
        confidences=list(output.confidences),
        strategy=output.strategy,
        policy=ee_policy(output.policy),
        digest=output.policy.digest,
        mean_depth=output.mean_depth,
        num_layers=output.num_layers,
        seed=output.sampling_params.seed,
    )
