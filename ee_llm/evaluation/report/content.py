"""Gather what a report shows: the metrics of every exit, a sweep, a calibration, and samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from ee_llm.errors import RequestError
from ee_llm.evaluation.calibration.result import CalibrationResult
from ee_llm.evaluation.metrics import Metrics
from ee_llm.evaluation.options import EvaluateOptions, check_exits_exist, check_options
from ee_llm.evaluation.reliability import Reliability, ReliabilityBin
from ee_llm.evaluation.report.options import ReportOptions, check_report
from ee_llm.evaluation.result import EvaluationResult, ExitMetrics
from ee_llm.evaluation.sweep.options import SweepOptions
from ee_llm.evaluation.sweep.prompts import find_prompts
from ee_llm.evaluation.sweep.result import SweepResult, measure_of_fingerprint
from ee_llm.evaluation.text_pass import run_pass
from ee_llm.inference.exits.policy import ExitPolicy, resolve_policy
from ee_llm.inference.llm import LLM
from ee_llm.inference.load import policy_fingerprint
from ee_llm.inference.loaded_model import DEFAULT_THRESHOLD
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.strategies import Strategy
from ee_llm.inference.text.json_lines import parse_object
from ee_llm.inference.text.prompt_encoder import EncodedPrompt

_PROMPT_LENGTH = 32  # tokens; for a short context, at most a quarter of it


@dataclass(frozen=True)
class Calibrated:
    """A policy file.

    Attributes:
        path: The file.
        policy: Its policy.
        result: The result of the calibration that wrote it; None for other policy files.
    """

    path: Path
    policy: ExitPolicy
    result: CalibrationResult | None


@dataclass(frozen=True)
class SampleDecoding:
    """How the samples are generated.

    Attributes:
        source: Where the policy and the strategy come from.
        policy: The policy.
        strategy: The strategy.
    """

    source: str
    policy: ExitPolicy
    strategy: Strategy


@dataclass(frozen=True)
class ReportContent:
    """Everything that a report shows.

    Attributes:
        options: The options.
        fingerprint: Fingerprint of the model.
        config: The model's configuration.
        evaluation: The metrics of every exit.
        reliability: The bins of each early exit.
        sweep: A sweep, if there is one.
        calibration: A calibration, if there is one.
        decoding: How the samples were generated.
        samples: Generations.
    """

    options: ReportOptions
    fingerprint: str
    config: Config
    evaluation: EvaluationResult
    reliability: Mapping[int, tuple[ReliabilityBin, ...]]
    sweep: SweepResult | None
    calibration: Calibrated | None
    decoding: SampleDecoding
    samples: tuple[RequestOutput, ...]


class _MetricsAndReliability:
    """Collects both in one pass; see `measure.Collector`."""

    def __init__(self) -> None:
        self.metrics, self.reliability = Metrics(), Reliability()

    def add(self, columns: dict[int, Tensor]) -> None:
        self.metrics.add(columns)
        self.reliability.add(columns)

    def check(self, num_windows: int) -> None:
        pass  # One window is enough.

    def result(self) -> list[dict[str, Any]]:
        return self.metrics.result()


def gather(options: ReportOptions) -> ReportContent:
    """Return the content of a report, from one pass over the text and a few generations.

    Raises:
        UserError: The options, the text or the checkpoint is not valid, or a file is not for this
            model.
        RunError: The loss of an exit is not finite.
    """
    check_report(options)
    evaluate = EvaluateOptions(
        options.checkpoint,
        options.data,
        options.text,
        options.num_tokens,
        options.seq_length,
        options.dtype,
        progress=options.progress,
    )
    check_options(evaluate)
    reader = TensorReader(options.checkpoint)
    config = reader.config()
    boundaries = config.exits.boundaries
    check_exits_exist(config, options.checkpoint, "report on")
    sweep = None if options.sweep is None else _read_sweep(options.sweep, reader)
    calibration = None
    if options.calibration is not None:
        calibration = _read_calibration(options.calibration, reader)
    decoding = _decoding_of_samples(boundaries, sweep, calibration)
    prompts = _find_prompts(options, reader, config)
    collector = _MetricsAndReliability()
    done = run_pass(evaluate, "evaluating", lambda _: collector)
    assert done is not None, "there is one rank"
    evaluation = EvaluationResult(
        str(done.reader.path),
        done.inputs,
        done.num_tokens,
        done.seq_length,
        done.dtype,
        tuple(ExitMetrics(**one) for one in done.found),
    )
    reliability = {boundary: tuple(bins) for boundary, bins in collector.reliability.bins().items()}
    samples = _generate(options, prompts, decoding)
    return ReportContent(
        options,
        reader.fingerprint(),
        config,
        evaluation,
        reliability,
        sweep,
        calibration,
        decoding,
        samples,
    )


def _read_sweep(path: Path, reader: TensorReader) -> SweepResult:
    values = _read_json(path, "sweep")
    try:
        result = SweepResult.from_dict(values)
    except RequestError as error:
        raise RequestError(
            f"sweep = {path} is not a result of a sweep: {error}. Give a file that 'ee-llm sweep"
            " --json' wrote."
        ) from None
    fingerprint = policy_fingerprint(reader, measure_of_fingerprint(result.points))
    config = reader.config()
    if result.fingerprint != fingerprint:
        raise RequestError(
            f"sweep = {path} is for the model with fingerprint {result.fingerprint}"
            f" ({result.checkpoint}), but this model has {fingerprint}. Run 'ee-llm sweep' on it."
        )
    if result.boundaries != config.exits.boundaries:
        raise RequestError(
            f"sweep = {path} is for exits at {list(result.boundaries)}, but the model has exits at"
            f" {list(config.exits.boundaries)}. Run 'ee-llm sweep' on it."
        )
    return result


def _read_calibration(path: Path, reader: TensorReader) -> Calibrated:
    boundaries = reader.config().exits.boundaries
    policy = resolve_policy(path, boundaries, partial(policy_fingerprint, reader))
    known = _read_json(path, "calibration").get("calibration") or {}
    if "risk" not in known:
        return Calibrated(path, policy, None)
    of_policy = {
        "boundaries": policy.boundaries,
        "thresholds": policy.thresholds,
        "measure": policy.measure,
    }
    try:
        return Calibrated(
            path, policy, CalibrationResult.from_dict({"reliability": [], **known, **of_policy})
        )
    except RequestError as error:
        raise RequestError(
            f"calibration = {path} is not a result of a calibration: {error}. Give a file that"
            " 'ee-llm calibrate --output' wrote."
        ) from None


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{name} = {path} cannot be read: {error.strerror or error}.") from error
    return parse_object(data, f"{name} = {path}")


def _decoding_of_samples(
    boundaries: tuple[int, ...], sweep: SweepResult | None, calibration: Calibrated | None
) -> SampleDecoding:
    """Return the policy of the calibration, else of the sweep, else the default."""
    if calibration is not None:
        source = f"the policy file {calibration.path.name}"
        return SampleDecoding(source, calibration.policy, "exact")
    if sweep is not None and any(sweep.recommended.thresholds):
        best = sweep.recommended
        policy = ExitPolicy(boundaries, best.thresholds, best.measure)
        source = f"the recommended point of the sweep, {best.name}"
        return SampleDecoding(source, policy, best.strategy)
    policy = resolve_policy(DEFAULT_THRESHOLD, boundaries)
    source = f"the default threshold of {DEFAULT_THRESHOLD:g} for every exit"
    return SampleDecoding(source, policy, "exact")


def _find_prompts(
    options: ReportOptions, reader: TensorReader, config: Config
) -> list[EncodedPrompt]:
    """Return the prompts of the samples; raises UserError if the text is too short for them."""
    if options.num_samples == 0:
        return []
    prompt_length = max(1, min(_PROMPT_LENGTH, config.model.max_seq_length // 4))
    prompting = SweepOptions(
        options.checkpoint,
        data=options.data,
        text=options.text,
        num_prompts=options.num_samples,
        prompt_length=prompt_length,
        max_tokens=min(options.max_tokens, config.model.max_seq_length - prompt_length - 1),
    )
    return find_prompts(prompting, reader, config)


def _generate(
    options: ReportOptions, prompts: Sequence[EncodedPrompt], decoding: SampleDecoding
) -> tuple[RequestOutput, ...]:
    if not prompts:
        return ()
    with LLM(options.checkpoint, dtype=options.dtype, max_num_seqs=len(prompts)) as llm:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        room = llm.config.model.max_seq_length - longest
        outputs = llm.generate(
            [list(prompt.token_ids) for prompt in prompts],
            SamplingParams(max_tokens=min(options.max_tokens, room)),
            exits=decoding.policy,
            strategy=decoding.strategy,
            progress=options.progress,
        )
    return tuple(outputs)
