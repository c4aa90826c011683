"""Checks of `tuning.*` against the other sections."""

from collections.abc import Iterator

from ee_llm.config.schema import ConfigFields


def tuning_problems(config: ConfigFields) -> Iterator[str]:
    """Yield a line for each option that does not go with the tuning that is asked for."""
    tuning = config.tuning
    if not config.is_tuning:
        if tuning.exits:
            yield (
                f"tuning.exits = {list(tuning.exits)} has no effect without tuning.checkpoint; "
                "give both for ee-llm tune, or neither"
            )
        return
    yield from _exits(config)
    yield from _nothing_to_train(config)
    parallel = config.parallel
    for name, plain in (("virtual", 1), ("schedule", "1f1b"), ("fill_warmup", 0)):
        yield from _needs_no(config, f"parallel.{name}", getattr(parallel, name), plain)
    yield from _needs_no(config, "parallel.fill_cooldown", parallel.fill_cooldown, 0)
    if config.checkpoint.initial is not None:
        yield (
            f"checkpoint.initial = {config.checkpoint.initial} beside tuning.checkpoint = "
            f"{tuning.checkpoint}: both say what to begin with; leave the first out"
        )


def _exits(config: ConfigFields) -> Iterator[str]:
    boundaries, tuned = config.exits.boundaries, config.tuning.exits
    if not boundaries:
        yield (
            f"exits.boundaries = [] and tuning.checkpoint = {config.tuning.checkpoint}: there is "
            "no exit to tune; name one or more"
        )
    elif not set(tuned) <= set(boundaries) or list(tuned) != sorted(set(tuned)):
        mend = sorted(set(tuned) & set(boundaries)) or list(boundaries)
        yield (
            f"tuning.exits = {list(tuned)} must increase and name exits of exits.boundaries = "
            f"{list(boundaries)}, for example {mend}"
        )


def _nothing_to_train(config: ConfigFields) -> Iterator[str]:
    exits = config.exits
    if not exits.head and exits.output != "own":
        yield (
            f"exits.head = [] with exits.output = {exits.output} leaves nothing to train: that "
            "output weight is the frozen model's; set exits.output = own, or give exits.head a "
            "norm, mlp or block"
        )
    weights = dict(zip(exits.boundaries, exits.weights, strict=False))
    tuned = [weights.get(boundary) for boundary in config.tuning.exits]
    if tuned and not any(tuned) and exits.weight_schedule == "constant":
        yield (
            f"exits.weights = {list(exits.weights)} are 0 for all of tuning.exits = "
            f"{list(config.tuning.exits)}, which leaves nothing to train; give one a weight"
        )


def _needs_no(config: ConfigFields, name: str, value: object, plain: object) -> Iterator[str]:
    if value != plain:
        yield (
            f"{name} = {value} is about the backward passes of a whole model, and with "
            f"tuning.checkpoint = {config.tuning.checkpoint} there are none; set it to {plain}"
        )
