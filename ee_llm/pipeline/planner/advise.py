"""Search for the fastest plan that fits into memory. The search is deterministic."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ee_llm.config import Config, toml
from ee_llm.errors import ConfigError, PlanError
from ee_llm.pipeline.planner.costs import Pieces
from ee_llm.pipeline.planner.predict import Prediction, predict, rank_memory
from ee_llm.pipeline.selection import FILLS, largest_fills, select_fills

MAX_CHUNKS = 8  # largest number of stages per rank in the search

Options = dict[str, object]  # configuration values by dotted name


@dataclass(frozen=True)
class Advice:
    """A candidate: its options, its prediction, and the peak memory of its fullest rank."""

    options: Options
    prediction: Prediction
    memory: float


def advise(
    base: Config,
    configure: Callable[[Mapping[str, object]], Config],
    fixed: Mapping[str, object],
    num_microbatches: int,
    pieces: Pieces,
    logits: float = 1.0,
    limit: float = math.inf,
) -> list[Advice]:
    """Return all candidates, ordered by their time per ordinary microbatch, the fastest first.

    Candidates of equal time are ordered by memory, then by simplicity. The search covers the
    schedule, the stages per rank, the placement of exits, the layers per stage, and filling. For
    candidates that need more memory than `limit` it also tries to move layers to other ranks.

    Args:
        base: The model, the exits and the ranks.
        configure: Returns the configuration with the given options.
        fixed: Options that the search does not change.
        num_microbatches: Number of ordinary microbatches per step.
        pieces: Costs of the pieces of the model.
        logits: Memory of one exit's logits, in activations of one layer for one microbatch.
        limit: Memory limit of a rank in that unit.

    Raises:
        ConfigError: No candidate is possible with the fixed options. The error is that of the
            simplest candidate.
    """
    candidates: list[Advice] = []
    errors = []
    queue = list(_candidates(base, configure, fixed, num_microbatches, pieces))
    for options in queue:  # the loop appends to it
        try:
            prediction = predict(configure(options), num_microbatches, pieces)
        except ConfigError as error:
            errors.append(error)
        else:
            candidates.append(Advice(options, prediction, max(rank_memory(prediction, logits))))
            if "parallel.layer_split" not in fixed:
                splits = _leaner_splits(candidates[-1], logits, limit)
                leaner = [{**options, "parallel.layer_split": split} for split in splits]
                queue += [other for other in leaner if other not in queue]
    if not candidates:
        no_candidate = ConfigError(
            f"no plan for {num_microbatches} microbatches fits the given options. Omit some of "
            "them, so that the search chooses their values."
        )
        raise next(iter(errors), no_candidate)
    return sorted(candidates, key=_order)


def within_limit(candidates: Sequence[Advice], limit: float | None) -> list[Advice]:
    """Return the candidates whose fullest rank does not exceed `limit`.

    Raises:
        PlanError: All candidates exceed it.
    """
    fitting = [advice for advice in candidates if limit is None or advice.memory <= limit + 1e-9]
    if not fitting:
        leanest = min(candidates, key=lambda advice: advice.memory)
        raise PlanError(
            f"--memory-limit {limit:g} is below the memory of all {len(candidates)} plans. Raise "
            f"it to {leanest.memory:g} layer activations, which the leanest plan needs, or give "
            "more --stages."
        )
    return fitting


def config_lines(prediction: Prediction) -> str:
    """Return the TOML sections with which `ee-llm train` runs this plan."""
    config = prediction.config
    names = ["pipeline", "virtual", "schedule", "layer_split"]
    if any(select_fills(config)):
        names += ["fill_warmup", "fill_cooldown", "forward_over_backward"]
    parallel = {name: getattr(config.parallel, name) for name in names}
    if not parallel["layer_split"]:
        del parallel["layer_split"]
    exits = {"boundaries": config.exits.boundaries, "placement": config.exits.placement}
    sections = {"parallel": parallel, "exits": exits}
    return toml.dump(sections if config.exits.boundaries else {"parallel": parallel})


def balanced_split(
    num_layers: int,
    num_stages: int,
    pieces: Pieces,
    exits: Sequence[int],
    placement: str,
    max_layers: Sequence[int] | None = None,
) -> tuple[int, ...] | None:
    """Return the layers per stage that minimize the time of the slowest stage.

    The costs include the embedding on the first stage, the final exit on the last stage, and
    `exits` on the stages of their `placement`. Among equal splits the most even one is returned.

    Args:
        num_layers: Number of layers of the model.
        num_stages: Number of stages.
        pieces: Costs of the pieces of the model.
        exits: Boundaries of the early exits that count.
        placement: "post" or "pre".
        max_layers: Largest number of layers of each stage. By default there is no limit.

    Returns:
        The number of layers of each stage, None if `max_layers` leaves too few layers.
    """
    max_layers = [num_layers] * num_stages if max_layers is None else max_layers
    shift = 0 if placement == "post" else 1
    before = [sum(b + shift <= layer for b in exits) for layer in range(num_layers + 1)]

    def cost(stage: int, first: int, last: int) -> float:
        total = (last - first) * pieces.layer.total
        total += (before[last] - before[first]) * pieces.exit.total
        total += pieces.embedding.total if stage == 0 else 0.0
        return total + (pieces.final.total if stage == num_stages - 1 else 0.0)

    # best[n]: (slowest stage, sum of squares, split) of the first stages with n layers.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(num_stages):
        longer: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for end in range(stage + 1, num_layers - (num_stages - 1 - stage) + 1):
            options = []
            for start, (slowest, squares, split) in best.items():
                if start < end <= start + max_layers[stage]:
                    own = cost(stage, start, end)
                    options.append((max(slowest, own), squares + own * own, (*split, end - start)))
            if options:
                longer[end] = min(options)
        best = longer
    return best[num_layers][2] if num_layers in best else None


def _balanced_splits(
    config: Config,
    num_stages: int,
    pieces: Pieces,
    placement: str,
    max_layers: Sequence[int] | None = None,
) -> list[tuple[int, ...]]:
    # Exits that run in bubbles should not count, so the second split ignores them.
    splits = (
        balanced_split(config.model.num_layers, num_stages, pieces, exits, placement, max_layers)
        for exits in (config.exits.boundaries, ())
    )
    return list(dict.fromkeys(split for split in splits if split is not None))


def _leaner_splits(advice: Advice, logits: float, limit: float) -> list[tuple[int, ...]]:
    """Return balanced splits whose memory is within `limit`, if `advice` exceeds it.

    The number of live microbatches of a rank does not depend on their duration. With one stage per
    rank it determines how many layers the rank may have. With several stages per rank no split is
    returned.
    """
    prediction = advice.prediction
    config, peaks = prediction.config, prediction.simulation
    if advice.memory <= limit + 1e-9 or config.parallel.virtual > 1:
        return []
    max_layers = [
        math.floor((limit - logits * exits) / microbatches + 1e-9)
        for microbatches, exits in zip(peaks.peak_activations, peaks.peak_exit_logits, strict=True)
    ]
    placement = config.exits.placement
    return _balanced_splits(
        config, config.parallel.pipeline, prediction.pieces, placement, max_layers
    )


def _candidates(
    base: Config,
    configure: Callable[[Mapping[str, object]], Config],
    fixed: Mapping[str, object],
    num_microbatches: int,
    pieces: Pieces,
) -> Iterator[Options]:
    exits, size = base.exits, base.parallel.pipeline

    def choices(name: str, values: Sequence[object]) -> Sequence[object]:
        return [fixed[name]] if name in fixed else values

    has_full_groups = size > 1 and num_microbatches % size == 0
    chunks = range(1, min(MAX_CHUNKS, base.model.num_layers // size) + 1 if has_full_groups else 2)
    needs_own_layer = "mlp" in exits.head and "block" not in exits.head
    placements = ("post",) if needs_own_layer or not exits.boundaries else ("post", "pre")
    # Without a separate cost of weight gradients the layers may not be able to defer them.
    schedules = ("1f1b", "zero-bubble", "zero-bubble-exits") if pieces.layer.weight else ("1f1b",)
    if any(fixed.get(name) for name in FILLS):
        chunks, schedules = range(1, 2), ("1f1b",)  # the only schedule with fills
    shapes = itertools.product(
        choices("parallel.schedule", schedules),
        choices("parallel.virtual", chunks),
        choices("exits.placement", placements),
    )
    for schedule, virtual, placement in shapes:
        if virtual != 1 and (schedule != "1f1b" or not has_full_groups):
            continue
        options: Options = {
            "parallel.schedule": schedule,
            "parallel.virtual": virtual,
            "exits.placement": placement,
        }
        num_stages = size * int(str(virtual))
        for split in _splits(base, fixed, num_stages, pieces, str(placement)):
            shaped = {**options, "parallel.layer_split": split, **dict.fromkeys(FILLS, 0)}
            yield from ({**shaped, **fills} for fills in _fills(configure(shaped), fixed))


def _splits(
    base: Config, fixed: Mapping[str, object], num_stages: int, pieces: Pieces, placement: str
) -> list[tuple[int, ...]]:
    num_layers = base.model.num_layers
    given = fixed.get("parallel.layer_split")
    if isinstance(given, tuple):
        return [given] if len(given) == num_stages else []
    if num_layers < num_stages:
        raise ConfigError(
            f"{num_layers} layers cannot be split over {num_stages} stages. Use fewer stages."
        )
    splits = _balanced_splits(base, num_stages, pieces, placement)
    if num_layers % num_stages == 0:
        even = (num_layers // num_stages,) * num_stages
        splits = [(), *(split for split in splits if split != even)]
    return list(dict.fromkeys(splits))


def _fills(config: Config, fixed: Mapping[str, object]) -> list[Options]:
    choices: list[Sequence[object]] = []
    for name, largest in zip(FILLS, largest_fills(config), strict=True):
        given = fixed.get(name)
        if given is None:
            choices.append(sorted({0, largest}))
        else:
            choices.append([largest if given == "auto" else given])
    return [dict(zip(FILLS, fills, strict=True)) for fills in itertools.product(*choices)]


def _order(advice: Advice) -> tuple[object, ...]:
    parallel, exits = advice.prediction.config.parallel, advice.prediction.config.exits
    return (
        float(f"{advice.prediction.time_per_microbatch:.9g}"),
        advice.memory,
        sum(select_fills(advice.prediction.config)),
        parallel.virtual,
        parallel.schedule,
        exits.placement,
        parallel.layer_split,
    )
