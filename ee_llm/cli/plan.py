"""`ee-llm plan`: what a pipeline schedule would do, before anything is started."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ee_llm.cli.plan_options import DEFAULT_LAYERS, DEFAULT_WIDTH, PlanOptions
from ee_llm.config import Config, load_config
from ee_llm.config.limits import MAX_BATCH_SIZE, MAX_FACTOR, MAX_LAYERS, MAX_RANKS
from ee_llm.errors import ConfigError, UserError
from ee_llm.pipeline.planner import describe
from ee_llm.pipeline.planner.advise import Advice, advise, config_lines, within_limit
from ee_llm.pipeline.planner.costs import NOMINAL, Pieces, read_pieces, write_pieces
from ee_llm.pipeline.planner.describe import Clock
from ee_llm.pipeline.planner.picture import check_suffix, save_picture
from ee_llm.pipeline.planner.predict import Prediction, predict
from ee_llm.pipeline.planner.trace import chrome_trace
from ee_llm.pipeline.selection import FILLS, select_fills


def show_plan(options: PlanOptions, measure: Callable[[Config], Pieces]) -> None:
    """Print the plan and write the files asked for; `measure` is what --profile calls.

    Raises UserError for bad input, before anything is measured or written where it can.
    """
    _check(options)
    given = _given(options)
    config = _configure(options, given, searched=options.advise)
    num_microbatches = _num_microbatches(options, config)
    pieces = _pieces(options, config, measure)
    if pieces is not NOMINAL and (options.config is None or options.advise):
        given["parallel.forward_over_backward"] = _ratio(pieces)
    found: list[Advice] = []
    fitting: list[Advice] = []
    with _told_as_options(options):
        if options.advise:
            found = advise(
                config,
                lambda more: _configure(options, {**given, **more}),
                given,
                num_microbatches,
                pieces,
                options.logits_size,
                math.inf if options.memory_limit is None else options.memory_limit,
            )
            fitting = within_limit(found, options.memory_limit)
            prediction = fitting[0].prediction
        else:
            fills = dict(zip(FILLS, select_fills(_configure(options, given)), strict=True))
            prediction = predict(_configure(options, {**given, **fills}), num_microbatches, pieces)
    clock = describe.clock_of(prediction, in_seconds=pieces is not NOMINAL)
    _write_files(options, prediction, clock, fitting)
    if str(options.json) != "-":
        _print(options, prediction, clock, found, fitting)


def _ratio(pieces: Pieces) -> float:
    return max(0.001, round(pieces.layer.forward / pieces.layer.backward, 3))


_MOST = {
    "stages": MAX_RANKS,
    "microbatches": MAX_BATCH_SIZE,
    "nproc": MAX_RANKS,
    "layers": MAX_LAYERS,
    "virtual": MAX_RANKS,
    "width": 100_000,  # characters, more than any terminal or file has in a line
}


def _check(options: PlanOptions) -> None:
    """Raise UserError for options that do not go together."""
    for name, most in _MOST.items():
        value = getattr(options, name)
        if value is not None and not 1 <= value <= most:
            raise UserError(f"--{name} {value}: give a number from 1 to {most:,}")
    if options.profile and options.config is None:
        raise UserError("--profile measures a model: name its configuration with --config FILE")
    if options.profile and options.costs is not None:
        raise UserError(f"--profile measures what --costs {options.costs} gives; leave one out")
    if options.costs_output is not None and not options.profile:
        raise UserError(f"--costs-output {options.costs_output} writes what --profile measures")
    if options.memory_limit is not None and not options.advise:
        raise UserError(f"--memory-limit {options.memory_limit:g} bounds what --advise looks for")
    if options.memory_limit is not None and not options.memory_limit > 0:
        raise UserError(f"--memory-limit {options.memory_limit:g}: give a number above 0")
    if not 0 <= options.logits_size <= MAX_FACTOR:
        raise UserError(
            f"--logits-size {options.logits_size}: give a number from 0 to {MAX_FACTOR:,.0f}"
        )
    if options.nproc is not None and options.config is None:
        raise UserError(
            f"--nproc {options.nproc} is of the run in a --config FILE: name that, or leave it out"
        )
    if options.nproc is not None and options.microbatches is not None:
        raise UserError(
            f"--microbatches {options.microbatches} is what --nproc {options.nproc} would work "
            "out; leave one out"
        )
    if options.picture is not None:
        check_suffix(options.picture)
    for name in _WRITTEN:
        _check_writable(f"--{name.replace('_', '-')}", getattr(options, name))


_WRITTEN = ("picture", "trace", "costs_output", "json")


def _check_writable(name: str, path: Path | None) -> None:
    """Raise UserError for a file in no folder, before there is anything to lose."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{name} {path}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(
            f"{name} {path}: there is no folder {path.parent}; make it, or name another"
        )


def _given(options: PlanOptions) -> dict[str, object]:
    """Return the configuration values that the options say, by dotted name."""
    if options.config is None and options.stages is None:
        raise UserError("--stages: not given; give a number, or a run's --config FILE")
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
    if options.exits is not None:  # the file's are for its own exits
        given |= {f"exits.{name}": () for name in ("weights", "initial_weights", "temperatures")}
    return {name: value for name, value in given.items() if value is not None}


def _configure(
    options: PlanOptions, given: Mapping[str, object], *, searched: bool = False
) -> Config:
    """Return the configuration with these values; its mistakes are told as the options are named.

    `searched`: what is not given is about to be searched, and only has to be sound here.
    """
    with _told_as_options(options):
        values = {**(_any_shape(options) if searched else {}), **given}
        if options.config is None:
            values = {**_ANY_MODEL, **values}
        elif any(size is not None for size in (options.stages, options.virtual, options.layers)):
            values.setdefault("parallel.layer_split", ())  # the file's is for other sizes
        return _not_tuning(load_config(options.config, values))


def _not_tuning(config: Config) -> Config:
    if config.is_tuning:
        raise ConfigError(
            f"tuning.checkpoint = {config.tuning.checkpoint}: tuning has one plan, in which "
            "nothing goes backward between stages; leave the option out to plan the training of "
            "the model"
        )
    return config


def _any_shape(options: PlanOptions) -> dict[str, object]:
    """Return values for what --advise searches with which the options that are given are sound."""
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
def _told_as_options(options: PlanOptions) -> Iterator[None]:
    """Name configuration values in errors as the options that say them, without a --config."""
    try:
        yield
    except ConfigError as error:
        if options.config is not None:
            raise
        message = str(error)
        for name, option in _OPTION_NAMES.items():
            message = message.replace(name, option)
        raise ConfigError(message) from None


# A plan needs sizes of nothing but the layers.
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


def _num_microbatches(options: PlanOptions, config: Config) -> int:
    """Return the microbatches of a step; ValueError if they are unknown or make no whole groups."""
    parallel, count = config.parallel, options.microbatches
    if count is None:
        if options.config is None:
            raise UserError("--microbatches: not given; give a number, or a run's --config FILE")
        return config.num_microbatches(options.nproc or parallel.pipeline * parallel.tensor)
    if parallel.virtual > 1 and count % parallel.pipeline:
        raise UserError(
            f"--microbatches {count} with {parallel.virtual} stages per rank (--virtual, "
            f"--layer-split): they are passed in groups of --stages {parallel.pipeline}; give a "
            f"multiple, such as {-(-count // parallel.pipeline) * parallel.pipeline}"
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


def _write_files(
    options: PlanOptions, prediction: Prediction, clock: Clock, fitting: Sequence[Advice]
) -> None:
    if options.picture is not None:
        title = describe.title(prediction, clock)
        save_picture(prediction, options.picture, title, clock.unit, clock.scale)
    if options.trace is not None:
        trace = chrome_trace(
            prediction.simulation.timeline.ranks,
            filling=prediction.filling,
            exit_part=prediction.exit_part,
            # Where time has no seconds, a unit is drawn as a millisecond.
            seconds=1.0 if clock.unit in ("s", "ms") else 1e-3 / clock.scale,
            notes={"title": describe.title(prediction, clock)},
        )
        options.trace.write_text(json.dumps(trace) + "\n", encoding="utf-8")
    if options.json is not None:
        figures = describe.as_json(prediction, clock, options.logits_size)
        if fitting:
            figures["candidates"] = [
                describe.as_json(advice.prediction, clock, options.logits_size, timeline=False)
                for advice in fitting
            ]
        text = json.dumps(figures, indent=2)
        if str(options.json) == "-":
            print(text)
        else:
            options.json.write_text(f"{text}\n", encoding="utf-8")


def _print(
    options: PlanOptions,
    prediction: Prediction,
    clock: Clock,
    found: Sequence[Advice],
    fitting: Sequence[Advice],
) -> None:
    if found:
        print(describe.candidates_table(found, fitting, clock), end="\n\n")
    width = options.width or shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns
    print(describe.layout_lines(prediction), end="\n\n")
    print(describe.readable_grid(prediction, width), end="\n\n")
    print(describe.summary(prediction, clock, options.logits_size))
    if options.profile:
        print(f"\nmeasured: {describe.format_pieces(prediction.pieces)}")
    used = prediction.config.parallel.forward_over_backward
    if prediction.pieces is not NOMINAL and (ratio := _ratio(prediction.pieces)) != used:
        print(
            f"\nforward / backward of a layer is {ratio:g}; bubbles are filled by the run's "
            f"parallel.forward_over_backward = {used:g}"
        )
    if found:
        print(f"\nin the configuration of ee-llm train:\n\n{config_lines(prediction)}", end="")
    files = [getattr(options, name) for name in _WRITTEN]
    if written := [str(path) for path in files if path is not None]:
        print(f"\nwrote {', '.join(written)}")
