"""Hold generations with calibrated thresholds against the teacher-forced prediction."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ee_llm
from ee_llm.checkpoint.read import TensorReader
from ee_llm.data.windows import TargetWindow
from ee_llm.evaluation.averages import ratio_of_sums
from ee_llm.evaluation.calibration.options import CalibrateOptions
from ee_llm.evaluation.sweep.agreement import FullModel
from tools.bench.exit_records import collect_exits


class Mean(NamedTuple):
    """A mean per token and its standard error over windows or generations."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {1.96 * self.error:.3f}"


def mean_per_token(sums: Sequence[float], counts: Sequence[int]) -> Mean:
    """Return sum(sums) / sum(counts); the groups, not their tokens, count as independent."""
    value, variance = ratio_of_sums(sums, counts)
    return Mean(value, math.sqrt(variance))


class Prompts(NamedTuple):
    """Prompts, and how many tokens to generate after each at most."""

    token_ids: list[list[int]]
    max_tokens: int


@dataclass(frozen=True)
class Behaviour:
    """What thresholds do.

    Attributes:
        depth: Mean number of layers of a token.
        disagreement: Share of tokens that the full model would not choose after the same text.
    """

    depth: Mean
    disagreement: Mean

    def cells(self, name: str) -> dict[str, str]:
        """Return a row of a table."""
        return {
            "95 % intervals": name,
            "depth": str(self.depth),
            "disagree": str(self.disagreement),
        }

    def row(self, name: str) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {"behaviour": name} | {
            key: {"value": one.value, "error": one.error}
            for key, one in (("depth", self.depth), ("disagreement", self.disagreement))
        }


def is_within(generated: Behaviour, predicted: Behaviour) -> bool:
    """Return whether both differences are within their 95 % interval."""
    pairs = (
        (generated.depth, predicted.depth),
        (generated.disagreement, predicted.disagreement),
    )
    return all(abs(a.value - b.value) <= 1.96 * math.hypot(a.error, b.error) for a, b in pairs)


class _Texts:
    """Generations as windows in which only the generated tokens count; see `CountedWindows`."""

    def __init__(self, outputs: Sequence[ee_llm.RequestOutput]) -> None:
        self._outputs = outputs
        self.num_tokens = sum(len(one.token_ids) for one in outputs)

    def __iter__(self) -> Iterator[TargetWindow]:
        for one in self._outputs:
            tokens = torch.tensor([*one.prompt_token_ids, *one.token_ids])
            yield TargetWindow(tokens, torch.arange(1, len(tokens)) >= len(one.prompt_token_ids))


def predict(options: CalibrateOptions, policy: ee_llm.ExitPolicy, prompts: Prompts) -> Behaviour:
    """Return what a teacher-forced pass over the full model's own continuations says.

    Args:
        options: The checkpoint, and how to compute.
        policy: The thresholds to predict.
        prompts: The prompts that the full model continues.
    """
    texts = _Texts(_continue(options.checkpoint, prompts, "off"))
    collector = collect_exits(
        replace(options, data=(), num_tokens=None, measure=policy.measure),
        make_windows=lambda *_: texts,
    )
    records = collector.records()
    outcome = records.outcome(policy.thresholds)
    ends = torch.tensor([*records.boundaries, collector.costs.num_layers], dtype=torch.float64)
    counts = torch.bincount(records.windows).tolist()

    def mean(values: Tensor) -> Mean:
        sums = torch.zeros(records.num_windows, dtype=torch.float64)
        return mean_per_token(sums.index_add_(0, records.windows, values).tolist(), counts)

    return Behaviour(mean(ends[outcome.exits]), mean(outcome.losses))


def generate(checkpoint: Path, policy: ee_llm.ExitPolicy, prompts: Prompts) -> Behaviour:
    """Return what greedy generations with a policy do."""
    outputs = _continue(checkpoint, prompts, policy)
    longest = max(len(one.prompt_token_ids) + len(one.token_ids) for one in outputs)
    full = FullModel(TensorReader(checkpoint), torch.float32, longest)
    scores = [full.score(one.prompt_token_ids, one.token_ids) for one in outputs]
    counts = [score.num_tokens for score in scores]
    return Behaviour(
        mean_per_token([float(sum(one.exits)) for one in outputs], counts),
        mean_per_token([float(one.num_tokens - one.num_agreeing) for one in scores], counts),
    )


def _continue(checkpoint: Path, prompts: Prompts, exits: Any) -> Sequence[ee_llm.RequestOutput]:
    params = ee_llm.SamplingParams(max_tokens=prompts.max_tokens)
    with ee_llm.LLM(checkpoint, dtype="float32", max_num_seqs=16) as llm:
        return llm.generate(list(prompts.token_ids), params, exits=exits)
