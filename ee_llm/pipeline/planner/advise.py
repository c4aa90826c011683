"""A small, deterministic search for the fastest plan that fits into memory."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ee_llm.config import Config, toml
from ee_llm.errors import ConfigError, PlanError
from ee_llm.pipeline.planner.costs import Pieces
from ee_llm.pipeline.planner.predict import Prediction, predict, rank_memory
from ee_llm.pipeline.selection import FILLS, largest_fills, select_fills

MOST_CHUNKS = 8  # stages per rank that are tried

Options = dict[str, object]  # configuration values by dotted name


@dataclass(frozen=True)
class Advice:
    """A candidate: the options that make it, what it is predicted to do, its fullest rank."""

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
    """Return all candidates, the best first: least time for an ordinary microbatch.

    Equal times are ordered by memory, then by how plain the plan is. `base` has the model, the
    exits and the ranks, `configure` makes the configuration that has these options; those in
    `fixed` are kept as they are, the others searched: schedule, stages per rank, placement of
    exits, layers per stage, filling. For those that need more memory than `limit`, layers are moved
    to where there is room. Raises ConfigError if nothing goes with what is fixed: that of the
    plainest candidate.
    """
    found: list[Advice] = []
    refusals = []
    tried = list(_candidates(base, configure, fixed, num_microbatches, pieces))
    for options in tried:  # it grows
        try:
            prediction = predict(configure(options), num_microbatches, pieces)
        except ConfigError as error:
            refusals.append(error)
        else:
            found.append(Advice(options, prediction, max(rank_memory(prediction, logits))))
            if "parallel.layer_split" not in fixed:
                splits = _leaner_splits(found[-1], logits, limit)
                leaner = [{**options, "parallel.layer_split": split} for split in splits]
                tried += [other for other in leaner if other not in tried]
    if not found:
        nothing = ConfigError(
            f"no plan for {num_microbatches} microbatches goes with all that is given; leave some "
            "of it to the search"
        )
        raise next(iter(refusals), nothing)
    return sorted(found, key=_order)


def within_limit(found: Sequence[Advice], limit: float | None) -> list[Advice]:
    """Return the candidates whose fullest rank keeps to `limit`; ValueError if none does."""
    fitting = [advice for advice in found if limit is None or advice.memory <= limit + 1e-9]
    if not fitting:
        leanest = min(found, key=lambda advice: advice.memory)
        raise PlanError(
            f"--memory-limit {limit:g} is below what each of the {len(found)} plans tried needs: "
            f"the leanest takes {leanest.memory:g} layer activations; raise it to that, or give "
            "more --stages"
        )
    return fitting


def config_lines(prediction: Prediction) -> str:
    """Return the TOML of the sections that make `ee-llm train` run this plan."""
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
    most: Sequence[int] | None = None,
) -> tuple[int, ...] | None:
    """Return layers per stage such that the slowest stage is as fast as it can be.

    The embedding counts on the first stage, the final exit on the last, and `exits` where
    `placement` puts them. Among equals the split is the one with the most even costs. No stage has
    more layers than `most` says, if it is given; None if that leaves no room for all of them.
    """
    most = [num_layers] * num_stages if most is None else most
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
                if start < end <= start + most[stage]:
                    here = cost(stage, start, end)
                    options.append(
                        (max(slowest, here), squares + here * here, (*split, end - start))
                    )
            if options:
                longer[end] = min(options)
        best = longer
    return best[num_layers][2] if num_layers in best else None


def _balanced_splits(
    config: Config,
    num_stages: int,
    pieces: Pieces,
    placement: str,
    most: Sequence[int] | None = None,
) -> list[tuple[int, ...]]:
    # Exits can hide in bubbles: then they should not count.
    splits = (
        balanced_split(config.model.num_layers, num_stages, pieces, exits, placement, most)
        for exits in (config.exits.boundaries, ())
    )
    return list(dict.fromkeys(split for split in splits if split is not None))


def _leaner_splits(advice: Advice, logits: float, limit: float) -> list[tuple[int, ...]]:
    """Return the splits that balance what is within `limit`, if `advice` is not.

    How many microbatches a rank keeps does not depend on how long they take: with one stage per
    rank that says how many layers it may have. None are sought for more stages per rank.
    """
    found = advice.prediction
    config, peaks = found.config, found.simulation
    if advice.memory <= limit + 1e-9 or config.parallel.virtual > 1:
        return []
    most = [
        math.floor((limit - logits * exits) / microbatches + 1e-9)
        for microbatches, exits in zip(peaks.peak_activations, peaks.peak_exit_logits, strict=True)
    ]
    placement = config.exits.placement
    return _balanced_splits(config, config.parallel.pipeline, found.pieces, placement, most)


def _candidates(
    base: Config,
    configure: Callable[[Mapping[str, object]], Config],
    fixed: Mapping[str, object],
    num_microbatches: int,
    pieces: Pieces,
) -> Iterator[Options]:
    exits, size = base.exits, base.parallel.pipeline

    def tried(name: str, values: Sequence[object]) -> Sequence[object]:
        return [fixed[name]] if name in fixed else values

    whole_groups = size > 1 and num_microbatches % size == 0
    chunks = range(1, min(MOST_CHUNKS, base.model.num_layers // size) + 1 if whole_groups else 2)
    needs_own_layer = "mlp" in exits.head and "block" not in exits.head
    placements = ("post",) if needs_own_layer or not exits.boundaries else ("post", "pre")
    # Where the weights' part is not known apart, layers may not be able to put it off.
    schedules = ("1f1b", "zero-bubble", "zero-bubble-exits") if pieces.layer.weight else ("1f1b",)
    if any(fixed.get(name) for name in FILLS):
        chunks, schedules = range(1, 2), ("1f1b",)  # filling that is asked for is advised
    shapes = itertools.product(
        tried("parallel.schedule", schedules),
        tried("parallel.virtual", chunks),
        tried("exits.placement", placements),
    )
    for schedule, virtual, placement in shapes:
        if virtual != 1 and (schedule != "1f1b" or not whole_groups):
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
    kept = fixed.get("parallel.layer_split")
    if isinstance(kept, tuple):
        return [kept] if len(kept) == num_stages else []
    if num_layers < num_stages:
        raise ConfigError(f"{num_layers} layers cannot be split over {num_stages} stages")
    found = _balanced_splits(base, num_stages, pieces, placement)
    if num_layers % num_stages == 0:
        even = (num_layers // num_stages,) * num_stages
        found = [(), *(split for split in found if split != even)]
    return list(dict.fromkeys(found))


def _fills(config: Config, fixed: Mapping[str, object]) -> list[Options]:
    choices: list[Sequence[object]] = []
    for name, largest in zip(FILLS, largest_fills(config), strict=True):
        asked = fixed.get(name)
        if asked is None:
            choices.append(sorted({0, largest}))
        else:
            choices.append([largest if asked == "auto" else asked])
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
