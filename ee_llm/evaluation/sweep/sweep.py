"""Measure the speed and the quality of exit policies and drafts by generating text."""

import statistics
from collections.abc import Sequence
from functools import partial

from rich.progress import TextColumn

from ee_llm import distributed
from ee_llm.checkpoint.read import TensorReader
from ee_llm.errors import RequestError
from ee_llm.evaluation.calibration.collector import head_cost
from ee_llm.evaluation.sweep.agreement import FullModel, pooled
from ee_llm.evaluation.sweep.candidates import Candidate, find_candidates
from ee_llm.evaluation.sweep.options import SweepOptions, check_sweep
from ee_llm.evaluation.sweep.prompts import find_prompts
from ee_llm.evaluation.sweep.result import SweepPoint, SweepResult, measure_of_fingerprint
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
    full model, loaded in this process, runs once over each distinct generation.

    Args:
        options: The options.
        prompts: Texts, lists of token ids and conversations, instead of those of the options.

    Raises:
        UserError: The options, the prompts or the checkpoint is not valid.
        RunError: A request failed, or a rank was lost.
    """
    check_sweep(options)
    if distributed.launched_world_size() is not None:
        raise RequestError(
            "a sweep cannot run under a launcher such as torchrun. Start one process, with tensor"
            " and pipeline (--tensor, --pipeline), which starts the other ranks itself."
        )
    reader = TensorReader(options.checkpoint)
    config = reader.config()
    candidates = find_candidates(options, config, partial(policy_fingerprint, reader))
    encoded = find_prompts(options, reader, config, prompts)
    if len(encoded) < options.batch_size:
        raise RequestError(
            f"batch_size = {options.batch_size} is more than the {len(encoded)} prompts. Give more"
            " prompts, or a smaller batch_size."
        )
    llm = _load(options)
    with llm:
        timings = _generate(llm, options, candidates, encoded)
    points = _score(reader, options, candidates, timings, llm)
    sources = (
        [str(options.prompts)] if options.prompts else [*options.data, *map(str, options.text)]
    )
    return SweepResult(
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
        dtype=str(llm.dtype).removeprefix("torch."),
        min_agreement=float(options.min_agreement),
        points=tuple(points),
    )


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
    llm: LLM,
    options: SweepOptions,
    candidates: Sequence[Candidate],
    prompts: Sequence[EncodedPrompt],
) -> list[Timing]:
    params = SamplingParams(max_tokens=options.max_tokens, ignore_eos=options.ignore_eos)
    rounds = Rounds(llm, candidates, prompts, params, options.batch_size, options.rounds)
    count = TextColumn("{task.completed}/{task.total} runs")
    with distributed.progress_bar(
        "generating", rounds.num_runs, count, is_quiet=not options.progress
    ) as bar:
        (task,) = bar.task_ids
        return rounds.run(lambda: bar.update(task, advance=1))


def _score(
    reader: TensorReader,
    options: SweepOptions,
    candidates: Sequence[Candidate],
    timings: Sequence[Timing],
    llm: LLM,
) -> list[SweepPoint]:
    lengths = [
        len(output.prompt_token_ids) + len(output.token_ids)
        for timing in timings
        for output in timing.outputs.values()
    ]
    model = FullModel(reader, llm.dtype, max(lengths))
    config = reader.config()
    cost = head_cost(config)
    points = []
    count = TextColumn("{task.completed}/{task.total} points")
    with distributed.progress_bar(
        "comparing", len(candidates), count, is_quiet=not options.progress
    ) as bar:
        (task,) = bar.task_ids
        for candidate, timing in zip(candidates, timings, strict=True):
            outputs = list(timing.outputs.values())
            agreement, loss = pooled(
                [model.score(output.prompt_token_ids, output.token_ids) for output in outputs]
            )
            work = work_of(outputs, candidate.strategy, config.exits.boundaries)
            num_drafted = sum(output.num_drafted for output in outputs)
            num_accepted = sum(output.num_accepted for output in outputs)
            speedup = timing.speedup()
            points.append(
                SweepPoint(
                    family=candidate.family,
                    name=candidate.name,
                    arguments=candidate.arguments,
                    thresholds=candidate.policy.thresholds,
                    measure=candidate.policy.measure,
                    strategy=resolve_strategy(candidate.strategy, config)[0],
                    num_tokens=sum(len(output.token_ids) for output in outputs),
                    agreement=agreement.value,
                    agreement_low=agreement.low,
                    agreement_high=agreement.high,
                    loss=loss,
                    layers=work.layers,
                    heads=work.heads,
                    shares=work.shares,
                    acceptance=num_accepted / num_drafted if num_drafted else None,
                    ideal_speedup=work.ideal_speedup(config.model.num_layers, cost),
                    speedup=speedup.value,
                    speedup_low=speedup.low,
                    speedup_high=speedup.high,
                    tokens_per_second=statistics.median(timing.speeds),
                )
            )
            bar.update(task, advance=1)
    return points
