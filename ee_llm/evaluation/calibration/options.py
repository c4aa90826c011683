"""The options of a calibration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ee_llm.errors import RequestError
from ee_llm.evaluation.options import TextOptions
from ee_llm.inference.choices import MEASURES, Measure

Metric = Literal["agreement", "perplexity", "task"]

MIN_TOKENS = 1024
"""Least number of tokens that train gates."""


@dataclass(frozen=True)
class CalibrateOptions(TextOptions):
    """Choose thresholds of the exits for a stated risk."""

    risk: float = 0.05
    """Greatest risk, in terms of --metric."""

    metric: Metric = "agreement"
    """What the risk is about. agreement: the share of tokens whose exit disagrees with the final
    exit about the most probable token. perplexity: the relative increase of the perplexity, for
    example 0.01 for 1 %. task: the share of right answers to the questions of --task that are lost
    with greedy decoding."""

    task: tuple[Path, ...] = ()
    """Files with questions for metric = task, instead of data or text: JSON Lines with "prompt" and
    "answer". A question is one sample."""

    delta: float = 0.05
    """Greatest probability that the risk is exceeded, over the choice of the text."""

    measure: Measure = "max_probability"
    """Measure of confidence, as for 'ee-llm generate'."""

    train_gate: bool = False
    """Train a gate for each exit first, on the start of the text, and save the gates in the
    checkpoint, in place of existing ones. Implies measure = gate. The rest of the text calibrates
    them."""

    gate_tokens: int = 50_000
    """Number of tokens that train the gates."""

    seed: int = 0
    """Seed of the random split of the text: one half is searched, the other tested."""

    @property
    def measure_used(self) -> Measure:
        """The measure of confidence, which `train_gate` implies."""
        return "gate" if self.train_gate else self.measure


def check_calibration(options: CalibrateOptions) -> None:
    """Raise RequestError for options that are out of range."""
    for name in ("risk", "delta"):
        value = getattr(options, name)
        if not isinstance(value, int | float) or not 0.0 < value < 1.0:  # NaN fails too
            raise RequestError(f"{name} = {value!r} is not between 0 and 1. Use 0.05, say.")
    if options.metric not in get_args(Metric):
        raise RequestError(
            f"metric = {options.metric!r} is unknown. Use one of {', '.join(get_args(Metric))}."
        )
    if (options.metric == "task") != bool(options.task):
        raise RequestError(
            f"metric = {options.metric!r} with task = {[*map(str, options.task)]}: metric = 'task'"
            " needs files of questions (task), and other metrics do not use them."
        )
    if options.task and (options.data or options.text):
        raise RequestError(
            f"task = {options.task[0]} and other text are both given. Leave out data and text: the"
            " questions are the text."
        )
    if options.train_gate and options.task:
        raise RequestError(
            "train_gate needs a text, and metric = 'task' has none. Train the gates first, with"
            " data or text, then calibrate with measure = 'gate'."
        )
    if options.train_gate and options.measure not in ("max_probability", "gate"):
        raise RequestError(
            f"train_gate with measure = {options.measure!r}: gates are used by measure = 'gate'"
            " only. Leave one of them out."
        )
    if (
        options.train_gate
        and (options.num_tokens or options.gate_tokens + 1) <= options.gate_tokens
    ):
        raise RequestError(
            f"num_tokens = {options.num_tokens} leaves nothing to calibrate after gate_tokens ="
            f" {options.gate_tokens}. Raise num_tokens, or lower gate_tokens."
        )
    if options.train_gate and options.gate_tokens < MIN_TOKENS:
        raise RequestError(
            f"gate_tokens = {options.gate_tokens} is too small to train gates. Use"
            f" {MIN_TOKENS:,} or more."
        )
    if options.measure not in MEASURES:
        raise RequestError(
            f"measure = {options.measure!r} is unknown. Use one of {', '.join(MEASURES)}."
        )
