"""Verify finished generations against the definition of their strategy."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ee_llm import distributed
from ee_llm.architecture.reference import ReferenceModel
from ee_llm.architecture.tensors import Converted
from ee_llm.checkpoint.gates import TensorsWithGates
from ee_llm.checkpoint.read import TensorReader
from ee_llm.errors import RequestError
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.verification.certificate import Divergence, tolerance, verify_trace


@dataclass(frozen=True)
class Finding:
    """A divergence of one generation.

    Attributes:
        request_id: Id of the request.
        divergence: The divergence.
        is_explained: Whether rounding in the generation's dtype explains it.
    """

    request_id: str
    divergence: Divergence
    is_explained: bool


@dataclass(frozen=True)
class VerificationReport:
    """The result of verifying generations.

    Attributes:
        num_generations: Number of verified generations.
        num_tokens: Total number of their tokens.
        findings: All divergences, including those that rounding explains.
    """

    num_generations: int
    num_tokens: int
    findings: tuple[Finding, ...]

    @property
    def num_unexplained(self) -> int:
        """Number of divergences that rounding does not explain."""
        return sum(not finding.is_explained for finding in self.findings)

    @property
    def passed(self) -> bool:
        """Whether rounding explains every divergence, if there is any."""
        return self.num_unexplained == 0

    def __str__(self) -> str:
        return (
            f"certificate: {self.num_generations} generations, {self.num_tokens} tokens,"
            f" {len(self.findings)} divergences, {self.num_unexplained} of them beyond rounding"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON's own types; an infinite margin is None."""
        return {
            "num_generations": self.num_generations,
            "num_tokens": self.num_tokens,
            "divergences": [
                {
                    "generation": finding.request_id,
                    **asdict(finding.divergence),
                    "margin": _finite(finding.divergence.margin),
                    "is_explained": finding.is_explained,
                }
                for finding in self.findings
            ],
        }


class Verifier:
    """Computes certificates with a checkpoint's weights as they were served, in float64."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self._models: dict[torch.dtype, ReferenceModel] = {}

    def verify(self, outputs: Iterable[tuple[RequestOutput, torch.dtype]]) -> VerificationReport:
        """Return the divergences of outputs that were generated in the given dtypes.

        Args:
            outputs: The outputs, each with the dtype it was computed in.

        Raises:
            RequestError: An output does not fit the model.
        """
        findings: list[Finding] = []
        num_generations = num_tokens = 0
        for output, dtype in outputs:
            if dtype not in self._models:
                tensors = Converted(TensorsWithGates(self._reader), dtype, "cpu")
                self._models[dtype] = ReferenceModel(
                    self._reader.config(), tensors, torch.float64, distributed.device()
                )
            try:
                divergences = verify_trace(self._models[dtype], output)
            except ValueError as error:
                raise RequestError(f"{output.request_id}: {error}") from None
            limits = tolerance(dtype)
            findings += [
                Finding(output.request_id, one, limits.explains(one)) for one in divergences
            ]
            num_generations += 1
            num_tokens += len(output.token_ids)
        return VerificationReport(num_generations, num_tokens, tuple(findings))


def _finite(margin: float) -> float | None:
    return margin if math.isfinite(margin) else None
