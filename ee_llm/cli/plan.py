"""`ee-llm plan`: show the pipeline schedule of a training run without starting it."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from ee_llm.cli.arguments.parsing import parse
from ee_llm.cli.plan_options import COMMAND, DEFAULT_LAYERS, WRITTEN, PlanOptions, check
from ee_llm.config import Config, load_config
from ee_llm.errors import ConfigError, UserError
from ee_llm.pipeline.planner import describe
from ee_llm.pipeline.planner.advise import Advice, advise, config_lines, within_limit
from ee_llm.pipeline.planner.costs import NOMINAL, Pieces, read_pieces, write_pieces
from ee_llm.pipeline.planner.report import DEFAULT_WIDTH, PlanReport, plan, refuse_tuning
from ee_llm.pipeline.selection import FILLS

# A schedule does not depend on the sizes of the model, except the number of layers.
_ANY_MODEL = {"model.hidden_size": 8, "model.num_heads": 1, "model.vocab_size": 8}
_OPTION_NAMES = {
    "model.num_layers": "--layers",
    "num_layers": "--layers",
    "parallel.pipeline": "--stages",
    "parallel.virtual": "--virtual",
    "parallel.schedule": "--schedule",
    "parallel.layer_split": "--layer-split",
    "parallel.fill_warmup": "--fill-warmup",
    "parallel.fill_cooldown": "--fill-cooldown",
    "exits.boundaries": "--exits",
    "exits.placement": "--placement",
}


def run_plan(arguments: list[str]) -> None:
    """Run `ee-llm plan`."""
    show_plan(parse(PlanOptions, COMMAND, arguments), _measure)


def _measure(config: Config) -> Pieces:
    from ee_llm.training.profile import profile

    return profile(config)


def show_plan(options: PlanOptions, measure: Callable[[Config], Pieces]) -> None:
    """Print the schedule and write the requested files.

    Args:
        options: The options of the command.
        measure: Called for --profile.

    Raises:
        UserError: The options are invalid. Most errors are raised before any measurement.
    """
    check(options)
    given = _given(options)
    config = _configure(options, given, searched=options.advise)
    num_microbatches = _num_microbatches(options, config)
    pieces = _pieces(options, config, measure)
    if pieces is not NOMINAL and (options.config is None or options.advise):
        given["parallel.forward_over_backward"] = _ratio(pieces)
    candidates: list[Advice] = []
    fitting: list[Advice] = []
    with _errors_name_options(options):
        if options.advise:
            candidates = advise(
                config,
                lambda more: _configure(options, {**given, **more}),
                given,
                num_microbatches,
                pieces,
                options.logits_size,
                math.inf if options.memory_limit is None else options.memory_limit,
            )
            fitting = within_limit(candidates, options.memory_limit)
            report = PlanReport(fitting[0].prediction, options.logits_size)
        else:
            report = plan(
                _configure(options, given),
                num_microbatches=num_microbatches,
                pieces=pieces,
                logits_size=options.logits_size,
            )
    _write_files(options, report, fitting)
    if str(options.json) != "-":
        _print(options, report, candidates, fitting)


def _ratio(pieces: Pieces) -> float:
    return max(0.001, round(pieces.layer.forward / pieces.layer.backward, 3))


def _given(options: PlanOptions) -> dict[str, object]:
    """Return the configuration values that the options set, by dotted name."""
    if options.config is None and options.stages is None:
        raise UserError("--stages is missing. Give a number, or the --config FILE of a run.")
    layers = DEFAULT_LAYERS if options.config is None else None
    given: dict[str, object] = {
        "parallel.pipeline": options.stages,
        "model.num_layers": options.layers or layers,
        "parallel.virtual": options.virtual,
        "parallel.schedule": options.schedule,
        "exits.placement": options.placement,
        "parallel.layer_split": options.layer_split,
        "exits.boundaries": options.exits,
    }
    for name, fill in zip(FILLS, (options.fill_warmup, options.fill_cooldown), strict=True):
        given[name] = options.fill if fill is None else fill
    if options.exits is not None:  # The values in the file are for the exits in the file.
        given |= {f"exits.{name}": () for name in ("weights", "initial_weights", "temperatures")}
    return {name: value for name, value in given.items() if value is not None}


def _configure(
    options: PlanOptions, given: Mapping[str, object], *, searched: bool = False
) -> Config:
    """Return the configuration with the given values; errors name the command's options.

    With `searched`, options that --advise will search start from any valid value.
    """
    with _errors_name_options(options):
        values = {**(_valid_start(options) if searched else {}), **given}
        if options.config is None:
            values = {**_ANY_MODEL, **values}
        elif any(size is not None for size in (options.stages, options.virtual, options.layers)):
            values.setdefault(
                "parallel.layer_split", ()
            )  # The split in the file does not fit these sizes.
        config = load_config(options.config, values)
        refuse_tuning(config)
        return config


def _valid_start(options: PlanOptions) -> dict[str, object]:
    """Return values for the options that --advise searches that are valid with the given ones."""
    stages, layers = options.stages, options.layers or DEFAULT_LAYERS
    if options.config is not None:
        config = load_config(options.config)
        stages = stages or config.parallel.pipeline
        layers = options.layers or config.model.num_layers
    assert stages is not None, "--stages or --config is given"
    split = options.layer_split or ()
    virtual = options.virtual or max(1, len(split) // stages)
    each, over = divmod(layers, stages * virtual)
    return {
        "parallel.virtual": virtual,
        "parallel.schedule": "1f1b",
        "parallel.layer_split": tuple(each + (s < over) for s in range(stages * virtual)),
        **dict.fromkeys(FILLS, 0),
    }


@contextmanager
def _errors_name_options(options: PlanOptions) -> Iterator[None]:
    """Replace names of the configuration in errors by options of the command, without --config."""
    try:
        yield
    except ConfigError as error:
        if options.config is not None:
            raise
        message = str(error)
        for name, option in _OPTION_NAMES.items():
            message = message.replace(name, option)
        raise ConfigError(message) from None


def _num_microbatches(options: PlanOptions, config: Config) -> int:
    """Return the number of microbatches per step; raises UserError if it is invalid."""
    parallel, count = config.parallel, options.microbatches
    if count is None:
        if options.config is None:
            raise UserError(
                "--microbatches is missing. Give a number, or the --config FILE of a run."
            )
        return config.num_microbatches(options.nproc or parallel.pipeline * parallel.tensor)
    if parallel.virtual > 1 and count % parallel.pipeline:
        raise UserError(
            f"--microbatches {count} with {parallel.virtual} stages per rank (--virtual, "
            f"--layer-split) is not a multiple of --stages {parallel.pipeline}, as the interleaved "
            "schedule requires. Use a multiple, such as "
            f"{-(-count // parallel.pipeline) * parallel.pipeline}."
        )
    return count


def _pieces(options: PlanOptions, config: Config, measure: Callable[[Config], Pieces]) -> Pieces:
    if options.costs is not None:
        return read_pieces(options.costs)
    if not options.profile:
        return NOMINAL
    pieces = measure(config)
    if options.costs_output is not None:
        write_pieces(options.costs_output, pieces)
    return pieces


def _write_files(options: PlanOptions, report: PlanReport, fitting: Sequence[Advice]) -> None:
    if options.picture is not None:
        report.save_picture(options.picture)
    if options.trace is not None:
        report.save_trace(options.trace)
    if options.json is not None:
        figures = report.as_json()
        if fitting:
            figures["candidates"] = [
                describe.as_json(
                    advice.prediction, report.clock, options.logits_size, timeline=False
                )
                for advice in fitting
            ]
        text = json.dumps(figures, indent=2)
        if str(options.json) == "-":
            print(text)
        else:
            options.json.write_text(f"{text}\n", encoding="utf-8")


def _print(
    options: PlanOptions,
    report: PlanReport,
    candidates: Sequence[Advice],
    fitting: Sequence[Advice],
) -> None:
    if candidates:
        print(describe.candidates_table(candidates, fitting, report.clock), end="\n\n")
    print(report.text(options.width or shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns))
    prediction = report.prediction
    if options.profile:
        print(f"\nmeasured: {describe.format_pieces(prediction.pieces)}")
    used = prediction.config.parallel.forward_over_backward
    if prediction.pieces is not NOMINAL and (ratio := _ratio(prediction.pieces)) != used:
        print(
            f"\nforward / backward of a layer is {ratio:g}; bubbles are filled by the run's "
            f"parallel.forward_over_backward = {used:g}"
        )
    if candidates:
        print(f"\nin the configuration of ee-llm train:\n\n{config_lines(prediction)}", end="")
    files = [getattr(options, name) for name in WRITTEN]
    if written := [str(path) for path in files if path is not None]:
        print(f"\nwrote {', '.join(written)}")
