"""Checks of `tuning.*` against the other sections."""

from collections.abc import Iterator

from ee_llm.config.schema import ConfigFields


def tuning_problems(config: ConfigFields) -> Iterator[str]:
    """Yield a message for each option that conflicts with the tuning options."""
    tuning = config.tuning
    if not config.is_tuning:
        for name, default in (("exits", ()), ("objective", "labels"), ("temperature", 1.0)):
            if (value := getattr(tuning, name)) != default:
                shown = list(value) if isinstance(value, tuple) else value
                yield (
                    f"tuning.{name} = {shown} has no effect without tuning.checkpoint. Set both "
                    "for ee-llm tune, or neither."
                )
        return
    if tuning.temperature != 1 and tuning.objective == "labels":
        yield (
            f"tuning.temperature = {tuning.temperature} has no effect with tuning.objective = "
            "labels. Set tuning.objective to distill or both, or omit tuning.temperature."
        )
    if tuning.objective != "labels" and not config.exits.deferred:
        yield (
            f"exits.deferred = false has no effect with tuning.objective = {tuning.objective}, "
            "which computes the exits in the backward pass. Omit it."
        )
    yield from _exits(config)
    yield from _nothing_to_train(config)
    parallel = config.parallel
    for name, default in (("virtual", 1), ("schedule", "1f1b"), ("fill_warmup", 0)):
        yield from _must_be_default(config, f"parallel.{name}", getattr(parallel, name), default)
    yield from _must_be_default(config, "parallel.fill_cooldown", parallel.fill_cooldown, 0)
    if config.checkpoint.initial is not None:
        yield (
            f"checkpoint.initial = {config.checkpoint.initial} conflicts with tuning.checkpoint = "
            f"{tuning.checkpoint}: both set the initial parameters. Omit checkpoint.initial."
        )


def _exits(config: ConfigFields) -> Iterator[str]:
    boundaries, tuned = config.exits.boundaries, config.tuning.exits
    if not boundaries:
        yield (
            "exits.boundaries = [] has no exit to tune with tuning.checkpoint = "
            f"{config.tuning.checkpoint}. Set one or more boundaries."
        )
    elif not set(tuned) <= set(boundaries) or list(tuned) != sorted(set(tuned)):
        example = sorted(set(tuned) & set(boundaries)) or list(boundaries)
        yield (
            f"tuning.exits = {list(tuned)} must be increasing boundaries from exits.boundaries = "
            f"{list(boundaries)}, for example {example}."
        )


def _nothing_to_train(config: ConfigFields) -> Iterator[str]:
    exits = config.exits
    if not exits.head and exits.output != "own":
        yield (
            f"exits.head = [] with exits.output = {exits.output} leaves no parameters to train: "
            "that output weight belongs to the frozen model. Set exits.output = own, or add "
            "norm, translator, mlp or block to exits.head."
        )
    weights = dict(zip(exits.boundaries, exits.weights, strict=False))
    tuned = [weights[boundary] for boundary in config.tuning.exits if boundary in weights]
    if tuned and not any(tuned) and exits.weight_schedule == "constant":
        yield (
            f"exits.weights = {list(exits.weights)} are 0 for all of tuning.exits = "
            f"{list(config.tuning.exits)}, so that nothing is trained. Give one of them a weight."
        )


def _must_be_default(
    config: ConfigFields, name: str, value: object, default: object
) -> Iterator[str]:
    if value != default:
        yield (
            f"{name} = {value} requires the backward pass of an entire model, which tuning "
            f"(tuning.checkpoint = {config.tuning.checkpoint}) does not run. Set it to {default}."
        )
