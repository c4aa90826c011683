"""`ee-llm plan`: what a pipeline schedule would do, before anything is started."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ee_llm.config import Config, ConfigError, load_config
from ee_llm.pipeline import describe
from ee_llm.pipeline.advise import Advice, advise, config_lines, within_limit
from ee_llm.pipeline.chosen import exit_stages, largest_fills
from ee_llm.pipeline.costs import NOMINAL, Pieces, read_pieces, write_pieces
from ee_llm.pipeline.describe import Clock
from ee_llm.pipeline.picture import check_suffix, save_picture
from ee_llm.pipeline.plan_options import DEFAULT_LAYERS, DEFAULT_WIDTH, PlanOptions
from ee_llm.pipeline.predict import Prediction, predict
from ee_llm.pipeline.trace import chrome_trace


def show_plan(options: PlanOptions, measure: Callable[[Config], Pieces]) -> None:
    """Print the plan and write the files asked for; `measure` is what --profile calls.

    Raises ValueError for bad input, before anything is measured or written where it can.
    """
    _check(options)
    sizes = _sizes(options)
    given = _given(options, sizes)
    pieces = _pieces(options, given, measure)
    if pieces is not NOMINAL and options.config is None:
        given["parallel.forward_over_backward"] = _ratio(pieces)
    found: list[Advice] = []
    fitting: list[Advice] = []
    if options.advise:
        found = advise(
            _configure(options, given, searched=True),
            lambda more: _configure(options, {**given, **more}),
            given,
            sizes.microbatches,
            pieces,
            options.logits_size,
        )
        fitting = within_limit(found, options.memory_limit)
        prediction = fitting[0].prediction
    else:
        config = _configure(options, {**given, **_fills(options, _configure(options, given))})
        _check_microbatches(config, sizes.microbatches)
        prediction = predict(config, sizes.microbatches, pieces)
    clock = describe.clock_of(prediction, in_seconds=pieces is not NOMINAL)
    _write_files(options, prediction, clock, fitting)
    if str(options.json) != "-":
        _print(options, prediction, clock, found, fitting)


def _ratio(pieces: Pieces) -> float:
    return max(0.001, round(pieces.layer.forward / pieces.layer.backward, 3))


class _Sizes(NamedTuple):
    stages: int
    layers: int
    microbatches: int


def _check(options: PlanOptions) -> None:
    """Raise ValueError for options that do not go together."""
    for name in ("stages", "microbatches", "layers", "virtual", "width"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: give 1 or more")
    if options.profile and options.config is None:
        raise ValueError("--profile measures a model: name its configuration with --config FILE")
    if options.profile and options.costs is not None:
        raise ValueError(f"--profile measures what --costs {options.costs} gives; leave one out")
    if options.costs_output is not None and not options.profile:
        raise ValueError(f"--costs-output {options.costs_output} writes what --profile measures")
    if options.memory_limit is not None and not options.advise:
        raise ValueError(f"--memory-limit {options.memory_limit:g} bounds what --advise looks for")
    if not 0 <= options.logits_size < math.inf:
        raise ValueError(f"--logits-size {options.logits_size}: give a number from 0")
    if options.picture is not None:
        check_suffix(options.picture)


def _sizes(options: PlanOptions) -> _Sizes:
    """Return ranks, layers and microbatches, from the options or else from the configuration."""
    stages, layers, microbatches = options.stages, options.layers, options.microbatches
    if options.config is not None:
        config = load_config(options.config)
        stages = stages or config.parallel.pipeline
        layers = layers or config.model.num_layers
        one_rank = config.parallel.pipeline * config.parallel.tensor
        microbatches = microbatches or config.num_microbatches(options.nproc or one_rank)
    for name, value in (("stages", stages), ("microbatches", microbatches)):
        if value is None:
            raise ValueError(f"--{name}: not given; give a number, or a run's --config FILE")
    assert stages is not None
    assert microbatches is not None
    return _Sizes(stages, layers or DEFAULT_LAYERS, microbatches)


def _given(options: PlanOptions, sizes: _Sizes) -> dict[str, object]:
    """Return the configuration values that the options say, by dotted name."""
    given: dict[str, object] = {
        "parallel.pipeline": sizes.stages,
        "model.num_layers": sizes.layers,
        "parallel.virtual": options.virtual,
        "parallel.schedule": options.schedule,
        "exits.placement": options.placement,
        "parallel.layer_split": _numbers("--layer-split", options.layer_split),
        "exits.boundaries": _numbers("--exits", options.exits),
    }
    for part in ("fill_warmup", "fill_cooldown"):
        given[f"parallel.{part}"] = getattr(options, part)
    if options.exits is not None:  # the file's are for its own exits
        given |= {f"exits.{name}": () for name in ("weights", "initial_weights", "temperatures")}
    return {name: value for name, value in given.items() if value is not None}


def _numbers(name: str, texts: tuple[str, ...] | None) -> tuple[int, ...] | None:
    if texts is None:
        return None
    parts = [part.strip() for part in ",".join(texts).split(",") if part.strip()]
    for part in parts:
        if not part.isdecimal():
            raise ValueError(f"{name} {' '.join(texts)}: {part!r} is no number; write 6,12")
    return tuple(map(int, parts))


def _configure(
    options: PlanOptions, given: Mapping[str, object], *, searched: bool = False
) -> Config:
    """Return the configuration with these values; its mistakes are told as the options are named.

    `searched`: what is not given is about to be searched, and only has to be sound here.
    """
    values = dict(given)
    if searched:
        values = {**_any_shape(options, _sizes(options)), **values}
    if options.config is not None:
        if any(size is not None for size in (options.stages, options.virtual, options.layers)):
            values.setdefault("parallel.layer_split", ())  # the file's is for other sizes
        return load_config(options.config, values)
    try:
        return load_config(None, {**_ANY_MODEL, **values})
    except ConfigError as error:
        message = str(error)
        for name, option in _OPTION_NAMES.items():
            message = message.replace(name, option)
        raise ConfigError(message) from None


def _any_shape(options: PlanOptions, sizes: _Sizes) -> dict[str, object]:
    """Return values for what --advise searches with which the options that are given are sound."""
    split = _numbers("--layer-split", options.layer_split) or ()
    virtual = options.virtual or max(1, len(split) // sizes.stages)
    each, over = divmod(sizes.layers, sizes.stages * virtual)
    return {
        "parallel.virtual": virtual,
        "parallel.schedule": "1f1b",
        "parallel.layer_split": tuple(each + (s < over) for s in range(sizes.stages * virtual)),
        "parallel.fill_warmup": 0,
        "parallel.fill_cooldown": 0,
    }


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


def _check_microbatches(config: Config, count: int) -> None:
    size, virtual = config.parallel.pipeline, config.parallel.virtual
    if virtual > 1 and count % size:
        raise ValueError(
            f"--microbatches {count} with --virtual {virtual}: interleaved stages pass them in "
            f"groups of --stages {size}; give a multiple, such as {-(-count // size) * size}"
        )


def _pieces(
    options: PlanOptions, given: Mapping[str, object], measure: Callable[[Config], Pieces]
) -> Pieces:
    if options.costs is not None:
        return read_pieces(options.costs)
    if not options.profile:
        return NOMINAL
    pieces = measure(_configure(options, given, searched=options.advise))
    if options.costs_output is not None:
        write_pieces(options.costs_output, pieces)
    return pieces


def _fills(options: PlanOptions, config: Config) -> dict[str, object]:
    """Return the number of microbatches that fill each part; ValueError for more than useful."""
    resolved: dict[str, object] = {}
    largest = largest_fills(config)
    for part, most in zip(("fill_warmup", "fill_cooldown"), largest, strict=True):
        count = getattr(config.parallel, part)
        if count == "auto":
            resolved[f"parallel.{part}"] = most
        elif count > most:
            option = f"--{part.replace('_', '-')}"
            fitting = largest[1]  # the cool-down needs no early exit
            why = f"{fitting} fit into the bubble"
            if part == "fill_warmup" and most < fitting:
                stages = exit_stages(config)
                first = f"the first lies on stage {min(stages)}" if stages else "there is none"
                why += (
                    f", on the first {fitting} stages or fewer, and have to meet an exit: {first}"
                )
            raise ValueError(f"{option} {count}: the largest useful number is {most}; {why}")
    return resolved


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
        print(f"\nmeasured: {describe.shown_pieces(prediction.pieces)}")
    used = prediction.config.parallel.forward_over_backward
    if prediction.pieces is not NOMINAL and (ratio := _ratio(prediction.pieces)) != used:
        print(
            f"\nforward / backward of a layer is {ratio:g}; bubbles are filled by the run's "
            f"parallel.forward_over_backward = {used:g}"
        )
    if found:
        print(f"\nin the configuration of ee-llm train:\n\n{config_lines(prediction)}", end="")
    files = [options.picture, options.trace, options.costs_output, options.json]
    if written := [str(path) for path in files if path is not None]:
        print(f"\nwrote {', '.join(written)}")
