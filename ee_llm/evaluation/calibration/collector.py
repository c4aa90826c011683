"""Collect the records of a text, and choose thresholds at its end."""

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ee_llm.architecture.tensors import tensor_shapes
from ee_llm.config import Config
from ee_llm.evaluation.calibration.choose import check_size, choose
from ee_llm.evaluation.calibration.options import CalibrateOptions, Metric
from ee_llm.evaluation.calibration.records import Aggregate, Records
from ee_llm.evaluation.calibration.search import Costs
from ee_llm.evaluation.measure import COLUMNS
from ee_llm.evaluation.options import check_exits_exist
from ee_llm.evaluation.reliability import Reliability, calibration_error

AGGREGATES: dict[Metric, Aggregate] = {
    "agreement": "mean",
    "perplexity": "increase",
    "task": "any",
}
"""The loss of a window by metric."""


class Calibration:
    """Collects the confidence and the loss of every early exit; see `measure.Collector`."""

    def __init__(self, config: Config, options: CalibrateOptions) -> None:
        """Raise RequestError for a model without early exits."""
        check_exits_exist(config, options.checkpoint, "calibrate")
        self._boundaries = config.exits.boundaries
        self._options = options
        self._measure = options.measure_used
        self.costs = Costs(
            self._boundaries,
            config.model.num_layers,
            head_cost(config),
            self._measure,
            final_head_cost(config),
        )
        self._num_wrong = 0
        self._confidence: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._reliability = Reliability()

    def add(self, columns: dict[int, Tensor]) -> None:
        early = torch.stack([columns[boundary] for boundary in self._boundaries])  # [e, c, t]
        final = columns[max(columns)]
        if self._options.metric == "task" and not final[COLUMNS.index("accuracy")].min():
            self._num_wrong += 1  # Early exits cannot lose this answer.
            return
        self._confidence.append(early[:, COLUMNS.index("confidence")].float())
        self._losses.append(self._loss(early, final).float())
        self._reliability.add(columns)

    def _loss(self, early: Tensor, final: Tensor) -> Tensor:
        """Return the loss [e, t] of each exit, from `COLUMNS` of these [e, c, t] and of the final.

        It is what `CalibrateOptions.metric` says about a token.
        """
        if self._options.metric == "agreement":
            return 1 - early[:, COLUMNS.index("agreement")]
        if self._options.metric == "perplexity":
            return early[:, COLUMNS.index("loss")] - final[COLUMNS.index("loss")]
        return 1 - early[:, COLUMNS.index("accuracy")]

    def check(self, num_windows: int) -> None:
        # Only the last stage knows how many questions were answered right.
        found = len(self._confidence) if self._confidence or self._num_wrong else num_windows
        is_task = self._options.metric == "task"
        what = "questions that the final exit answers right" if is_task else "windows"
        num_tokens = sum(part.shape[1] for part in self._confidence)
        options = self._options
        check_size(found, self._limit, options.delta, num_tokens, options.risk, what)

    @property
    def _limit(self) -> float:
        """Limit of the mean loss of a window."""
        risk = self._options.risk
        return math.log1p(risk) if self._options.metric == "perplexity" else risk

    def records(self) -> Records:
        """Return what every exit would have done on the text."""
        lengths = torch.tensor([part.shape[1] for part in self._confidence])
        return Records(
            self._boundaries,
            torch.cat(self._confidence, dim=1),
            torch.cat(self._losses, dim=1),
            torch.arange(len(lengths)).repeat_interleave(lengths),
            AGGREGATES[self._options.metric],
            compares_exits=self._measure in ("agreement", "shortlist"),
        )

    def result(self) -> list[dict[str, Any]]:
        options = self._options
        choice = choose(self.records(), self.costs, self._limit, options.delta, options.seed)
        found = asdict(choice) | {"full_cost": self.costs.full, "head_cost": self.costs.head}
        if options.metric != "agreement":
            found["least_final_share"] = None  # It is about tokens that disagree.
        num_right = len(self._confidence)
        is_task = options.metric == "task"
        found["final_accuracy"] = num_right / (num_right + self._num_wrong) if is_task else None
        bins = self._reliability.bins()
        found["calibration_errors"] = [calibration_error(bins[b]) for b in self._boundaries]
        found["reliability"] = [[asdict(one) for one in bins[b]] for b in self._boundaries]
        return [found]


def head_cost(config: Config) -> float:
    """Return the weights of an early exit's head over those of a layer: its cost when decoding.

    Decoding one token reads every weight that it uses once, and little else takes time.
    """
    return _head_cost(config, config.exits.boundaries[0])


def final_head_cost(config: Config) -> float:
    """Return the same for the final exit, whose head has a norm and an output projection only."""
    return _head_cost(config, config.model.num_layers)


def _head_cost(config: Config, boundary: int) -> float:
    shapes = tensor_shapes(config)
    own = (name for name in shapes if name.startswith(f"exits.{boundary}."))
    parts = sum(math.prod(shapes[name]) for name in own if not name.endswith("output.weight"))
    output = config.model.vocab_size * config.model.hidden_size
    layer = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("layers.1."))
    return (parts + output) / layer
