"""Gather what a report shows: the metrics of every exit, a sweep, a calibration, and samples."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from ee_llm.errors import RequestError
from ee_llm.evaluation.metrics import Metrics
from ee_llm.evaluation.options import EvaluateOptions
from ee_llm.evaluation.reliability import Reliability, ReliabilityBin
from ee_llm.evaluation.report.options import ReportOptions, check_report
from ee_llm.evaluation.result import EvaluationResult, ExitMetrics
from ee_llm.evaluation.sweep.options import SweepOptions
from ee_llm.evaluation.sweep.prompts import find_prompts
from ee_llm.evaluation.sweep.result import SweepResult
from ee_llm.evaluation.text_pass import run_pass
from ee_llm.inference.exits.policy import ExitPolicy, resolve_policy
from ee_llm.inference.llm import LLM
from ee_llm.inference.load import policy_fingerprint
from ee_llm.inference.loaded_model import DEFAULT_THRESHOLD
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.text.json_lines import parse

_PROMPT_LENGTH = 32  # tokens; for a short context, at most a quarter of it


@dataclass(frozen=True)
class Calibrated:
    """A policy file.

    Attributes:
        path: The file.
        policy: Its policy.
        known: What 'ee-llm calibrate' found out about it; empty for other policy files.
    """

    path: Path
    policy: ExitPolicy
    known: Mapping[str, Any]


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
        policy: The policy of the samples.
        policy_source: Where it comes from.
        samples: Generations.
    """

    options: ReportOptions
    fingerprint: str
    config: Config
    evaluation: EvaluationResult
    reliability: Mapping[int, tuple[ReliabilityBin, ...]]
    sweep: SweepResult | None
    calibration: Calibrated | None
    policy: ExitPolicy
    policy_source: str
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
    reader = TensorReader(options.checkpoint)
    config, fingerprint = reader.config(), reader.fingerprint()
    boundaries = config.exits.boundaries
    if not boundaries:
        raise RequestError(
            f"checkpoint = {options.checkpoint} has no early exits to report on. Add some with"
            " 'ee-llm checkpoint add-exits', and tune them."
        )
    sweep = None if options.sweep is None else _read_sweep(options.sweep, fingerprint)
    calibration = None
    if options.calibration is not None:
        calibration = _read_calibration(options.calibration, reader)
    policy, source = _policy_of_samples(boundaries, sweep, calibration)
    collector = _MetricsAndReliability()
    evaluate = EvaluateOptions(
        options.checkpoint,
        options.data,
        options.text,
        options.num_tokens,
        options.seq_length,
        options.dtype,
        progress=options.progress,
    )
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
    samples = _generate(options, reader, config, policy)
    return ReportContent(
        options,
        fingerprint,
        config,
        evaluation,
        reliability,
        sweep,
        calibration,
        policy,
        source,
        samples,
    )


def _read_sweep(path: Path, fingerprint: str) -> SweepResult:
    values = _read_json(path, "sweep")
    try:
        result = SweepResult.from_dict(values)
    except (KeyError, TypeError) as error:
        raise RequestError(
            f"sweep = {path} is not a result of a sweep: {error!r}. Give a file that 'ee-llm sweep"
            " --json' wrote."
        ) from None
    if result.fingerprint != fingerprint:
        raise RequestError(
            f"sweep = {path} is for the model with fingerprint {result.fingerprint}"
            f" ({result.checkpoint}), but this model has {fingerprint}. Run 'ee-llm sweep' on it."
        )
    return result


def _read_calibration(path: Path, reader: TensorReader) -> Calibrated:
    boundaries = reader.config().exits.boundaries
    policy = resolve_policy(path, boundaries, partial(policy_fingerprint, reader))
    known = _read_json(path, "calibration").get("calibration") or {}
    return Calibrated(path, policy, known)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{name} = {path} cannot be read: {error.strerror or error}.") from error
    found = parse(data, f"{name} = {path}")
    if not isinstance(found, dict):
        raise RequestError(f"{name} = {path} is not a JSON object.")
    return found


def _policy_of_samples(
    boundaries: tuple[int, ...], sweep: SweepResult | None, calibration: Calibrated | None
) -> tuple[ExitPolicy, str]:
    """Return the policy to show, and its source: the calibration, the sweep or the default."""
    if calibration is not None:
        return calibration.policy, f"the policy file {calibration.path.name}"
    if sweep is not None and any(sweep.recommended.thresholds):
        best = sweep.recommended
        policy = ExitPolicy(boundaries, best.thresholds, best.measure)
        return policy, f"the recommended point of the sweep, {best.name}"
    policy = resolve_policy(DEFAULT_THRESHOLD, boundaries)
    return policy, f"the default threshold of {DEFAULT_THRESHOLD:g} for every exit"


def _generate(
    options: ReportOptions, reader: TensorReader, config: Config, policy: ExitPolicy
) -> tuple[RequestOutput, ...]:
    if options.num_samples == 0:
        return ()
    longest = config.model.max_seq_length
    prompt_length = max(1, min(_PROMPT_LENGTH, longest // 4))
    prompting = SweepOptions(
        options.checkpoint,
        data=options.data,
        text=options.text,
        num_prompts=options.num_samples,
        prompt_length=prompt_length,
        max_tokens=min(options.max_tokens, longest - prompt_length - 1),
    )
    prompts = find_prompts(prompting, reader, config)
    params = SamplingParams(max_tokens=prompting.max_tokens)
    with LLM(options.checkpoint, dtype=options.dtype, max_num_seqs=len(prompts)) as llm:
        token_ids = [list(prompt.token_ids) for prompt in prompts]
        return tuple(llm.generate(token_ids, params, exits=policy, progress=options.progress))
