"""Measure the speed and the quality of exit policies and drafts by generating text."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from rich.progress import TextColumn

from ee_llm import distributed
from ee_llm.checkpoint.gates import gated_exits
from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from ee_llm.errors import RequestError
from ee_llm.evaluation.calibration.collector import final_head_cost, head_cost
from ee_llm.evaluation.sweep.agreement import (
    FullModel,
    TokenScores,
    agreement_of,
    correlation_of,
    mean_loss,
)
from ee_llm.evaluation.sweep.candidates import (
    Candidate,
    execution_arguments,
    find_candidates,
)
from ee_llm.evaluation.sweep.confirm import MAX_TRIES, MIN_PAIRS
from ee_llm.evaluation.sweep.options import SweepOptions, check_sweep
from ee_llm.evaluation.sweep.point import SweepPoint
from ee_llm.evaluation.sweep.prompts import find_prompts
from ee_llm.evaluation.sweep.result import SweepResult, measure_of_fingerprint
from ee_llm.evaluation.sweep.timing import Rounds, Timing
from ee_llm.evaluation.sweep.work import work_of
from ee_llm.inference.llm import LLM
from ee_llm.inference.load import policy_fingerprint
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.strategies import resolve_strategy
from ee_llm.inference.text.prompt_encoder import EncodedPrompt


def sweep(options: SweepOptions, prompts: Sequence[object] = ()) -> SweepResult:
    """Return the speed and the quality of every candidate.

    All candidates generate greedily from the same prompts, in turns with the full model. Then the
    full model, loaded in this process, runs once over each distinct generation. Finally, the best
    candidates are tested against the full model in more runs, until one is reliably faster.

    Args:
        options: The options.
        prompts: Texts, lists of token ids and conversations, instead of those of the options.

    Raises:
        UserError: The options, the prompts or the checkpoint is not valid.
        RunError: A request failed, or a rank was lost.
    """
    check_sweep(options)
    if distributed.launched_world_size() not in (None, 1):
        raise RequestError(
            "a sweep cannot run under a launcher such as torchrun. Start one process, with tensor"
            " and pipeline (--tensor, --pipeline), which starts the other ranks itself."
        )
    reader = TensorReader(options.checkpoint)
    config = reader.config()
    candidates = find_candidates(
        options, config, partial(policy_fingerprint, reader), gated_exits(reader)
    )
    encoded = find_prompts(options, reader, config, prompts)
    if len(encoded) < options.batch_size:
        raise RequestError(
            f"batch_size = {options.batch_size} is more than the {len(encoded)} prompts. Give more"
            " prompts, or a smaller batch_size."
        )
    timings, dtype = _generate(options, candidates, encoded)
    points = _score(reader, options, candidates, timings, dtype)
    sources = (
        [str(options.prompts)] if options.prompts else [*options.data, *map(str, options.text)]
    )
    result = SweepResult(
        checkpoint=str(options.checkpoint),
        fingerprint=policy_fingerprint(reader, measure_of_fingerprint(points)),
        inputs=tuple(sources or ["prompts"]),
        num_layers=config.model.num_layers,
        boundaries=config.exits.boundaries,
        head_cost=head_cost(config),
        num_prompts=len(encoded),
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        rounds=options.rounds,
        dtype=str(dtype).removeprefix("torch."),
        execution=execution_arguments(options),
        min_agreement=float(options.min_agreement),
        points=tuple(points),
    )
    return _confirm(options, candidates, encoded, result) if result.contenders else result


def _load(options: SweepOptions) -> LLM:
    return LLM(
        options.checkpoint,
        dtype=options.dtype,
        tensor=options.tensor,
        pipeline=options.pipeline,
        max_num_seqs=options.batch_size,
        attention=options.attention,
        cuda_graphs=options.cuda_graphs,
        compile=options.compile,
        timeout_s=options.timeout_s,
    )


def _generate(
    options: SweepOptions, candidates: Sequence[Candidate], prompts: Sequence[EncodedPrompt]
) -> tuple[list[Timing], torch.dtype]:
    """Return the runs of all candidates, and the dtype of the computation."""
    with _load(options) as llm:
        rounds = _rounds(llm, options, candidates, prompts)
        with _bar(options, "generating", rounds.num_runs, "runs") as advance:
            return rounds.run(advance), llm.dtype


def _confirm(
    options: SweepOptions,
    candidates: Sequence[Candidate],
    prompts: Sequence[EncodedPrompt],
    result: SweepResult,
) -> SweepResult:
    """Return the result after tests of its best points.

    The model is loaded again, because memory may not hold it beside the one that compares texts.
    """
    num_pairs = max(MIN_PAIRS, options.rounds)
    num_runs = 2 * num_pairs * min(MAX_TRIES, len(result.contenders))
    with _load(options) as llm, _bar(options, "testing", num_runs, "runs at most") as advance:
        rounds = _rounds(llm, options, candidates, prompts)
        return result.confirmed(lambda index: rounds.pairs(index, num_pairs, advance))


def _rounds(
    llm: LLM,
    options: SweepOptions,
    candidates: Sequence[Candidate],
    prompts: Sequence[EncodedPrompt],
) -> Rounds:
    params = SamplingParams(max_tokens=options.max_tokens, ignore_eos=options.ignore_eos)
    return Rounds(llm, candidates, prompts, params, options.batch_size, options.rounds)


@contextmanager
def _bar(options: SweepOptions, title: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    """Show a progress bar, and yield a function that advances it."""
    count = TextColumn("{task.completed}/{task.total} " + unit)
    is_quiet = not options.progress
    with distributed.progress_bar(title, total, count, is_quiet=is_quiet) as bar:
        (task,) = bar.task_ids
        yield lambda: bar.update(task, advance=1)


def _score(
    reader: TensorReader,
    options: SweepOptions,
    candidates: Sequence[Candidate],
    timings: Sequence[Timing],
    dtype: torch.dtype,
) -> list[SweepPoint]:
    lengths = [
        len(output.prompt_token_ids) + len(output.token_ids)
        for timing in timings
        for output in timing.outputs.values()
    ]
    model = FullModel(reader, dtype, max(lengths))
    scores: list[list[TokenScores]] = []
    with _bar(options, "comparing", len(candidates), "points") as advance:
        for timing in timings:
            outputs = timing.outputs.values()
            scores.append(
                [model.score(output.prompt_token_ids, output.token_ids) for output in outputs]
            )
            advance()
    correlation, config = correlation_of(scores), reader.config()
    return [
        _point(config, candidate, timing, found, correlation)
        for candidate, timing, found in zip(candidates, timings, scores, strict=True)
    ]


def _point(
    config: Config,
    candidate: Candidate,
    timing: Timing,
    scores: Sequence[TokenScores],
    correlation: float,
) -> SweepPoint:
    outputs = list(timing.outputs.values())
    agreement = agreement_of(scores, correlation)
    work = work_of(outputs, candidate.strategy, config.exits.boundaries)
    num_drafted = sum(output.num_drafted for output in outputs)
    num_accepted = sum(output.num_accepted for output in outputs)
    speedup = timing.speedup()
    return SweepPoint(
        family=candidate.family,
        name=candidate.name,
        arguments=candidate.arguments,
        thresholds=candidate.policy.thresholds,
        measure=candidate.policy.measure,
        strategy=resolve_strategy(candidate.strategy, config)[0],
        num_tokens=sum(one.num_tokens for one in scores),
        agreement=agreement.value,
        agreement_low=agreement.low,
        agreement_high=agreement.high,
        loss=mean_loss(scores),
        layers=work.layers,
        heads=work.heads,
        shares=work.shares,
        acceptance=num_accepted / num_drafted if num_drafted else None,
        ideal_speedup=work.ideal_speedup(
            config.model.num_layers, head_cost(config), final_head_cost(config)
        ),
        speedup=None if speedup is None else speedup.value,
        speedup_low=None if speedup is None else speedup.low,
        speedup_high=None if speedup is None else speedup.high,
        tokens_per_second=timing.tokens_per_second,
    )
