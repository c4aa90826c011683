"""Checks of layer dropout and of exit weights by depth against the other sections."""

from collections.abc import Iterator

from ee_llm.config.schema import ConfigFields
from ee_llm.config.sections import ExitsConfig


def layerskip_problems(config: ConfigFields) -> Iterator[str]:
    """Yield a message for each option that conflicts with LayerSkip's training options."""
    yield from _layer_dropout(config)
    yield from _shared_norm(config)
    if config.exits.weighting == "weights":
        yield from _unused(config)
    else:
        yield from _depth_weights(config)
        yield from _curriculum(config)


def _layer_dropout(config: ConfigFields) -> Iterator[str]:
    dropout = config.layer_dropout
    probability = f"layer_dropout.max_probability = {dropout.max_probability}"
    if dropout.max_probability == 0:
        if dropout.schedule != "constant":
            yield (
                f"layer_dropout.schedule = {dropout.schedule} has no effect with {probability}. "
                "Set layer_dropout.max_probability, or omit layer_dropout.schedule."
            )
        return
    if config.model.num_layers == 1:
        yield (
            f"{probability} has no effect with model.num_layers = 1, because the first layer is "
            "never dropped. Set layer_dropout.max_probability to 0."
        )
    if dropout.schedule == "exponential" and config.training.steps == 1:
        yield (
            "layer_dropout.schedule = exponential has no effect with training.steps = 1, because "
            "the probabilities start at 0. Set it to constant, or train longer."
        )
    if config.is_tuning:
        yield (
            f"{probability} is not possible with tuning.checkpoint = {config.tuning.checkpoint}, "
            "which freezes the layers. Set it to 0, or train the entire model from "
            "checkpoint.initial."
        )
    if config.parallel.engine == "deepspeed":
        yield (
            f"{probability} is not possible with parallel.engine = deepspeed, whose ranks must all "
            "run every layer. Set it to 0, or parallel.engine to megatron."
        )


def _shared_norm(config: ConfigFields) -> Iterator[str]:
    exits = config.exits
    if exits.norm == "own":
        return
    if not exits.boundaries:
        yield (
            "exits.norm = shared has no effect with exits.boundaries = []. Add boundaries, or omit "
            "exits.norm."
        )
    if "norm" not in exits.head:
        yield (
            f"exits.norm = shared requires a norm, but exits.head = {list(exits.head)} has none. "
            "Add norm to exits.head, or set exits.norm = own."
        )
    if config.is_tuning:
        yield (
            "exits.norm = shared is not possible with tuning.checkpoint = "
            f"{config.tuning.checkpoint}, which freezes the final norm. Set exits.norm = own."
        )
    if config.parallel.engine == "deepspeed":
        yield (
            "exits.norm = shared is not possible with parallel.engine = deepspeed, which does not "
            "sum the gradients of the norms. Set exits.norm = own, or parallel.engine to megatron."
        )


def _unused(config: ConfigFields) -> Iterator[str]:
    exits = config.exits
    defaults = {"depth_scale": 1.0, "curriculum": "none", "rotation_interval": 1}
    for name, default in defaults.items():
        if (value := getattr(exits, name)) != default:
            yield (
                f"exits.{name} = {value} has no effect with exits.weighting = weights. Set "
                f"exits.weighting = depth, or omit exits.{name}."
            )


def _depth_weights(config: ConfigFields) -> Iterator[str]:
    exits = config.exits
    if not exits.boundaries:
        yield (
            "exits.weighting = depth requires early exits, but exits.boundaries = []. Set "
            "exits.boundaries = all or to a list of boundaries."
        )
    elif exits.boundaries == (1,):
        yield (
            "exits.boundaries = [1] with exits.weighting = depth trains no early exit, because the "
            "weight of the exit after the first layer is 0. Add another boundary, or set "
            "exits.weighting = weights."
        )
    elif 1 in exits.boundaries and (own := _own_parameters(exits)):
        remedy = ["exits.output = shared"] if exits.output == "own" else []
        remedy += ['exits.head = ["norm"]'] if set(exits.head) - {"norm"} else []
        yield (
            "exits.weighting = depth does not train the exit after the first layer, whose weight "
            f"is 0, so exits.boundaries must not have 1 with {' and '.join(own)}: weight decay "
            "would shrink its own parameters. List the boundaries from 2 on, or set "
            f"{' and '.join(remedy)}."
        )
    if any(weight != 1 for weight in exits.weights):
        yield (
            f"exits.weights = {list(exits.weights)} has no effect with exits.weighting = depth. "
            "Omit it, or set exits.weighting = weights."
        )
    if exits.weight_schedule != "constant":
        yield (
            f"exits.weight_schedule = {exits.weight_schedule} has no effect with exits.weighting = "
            "depth. Omit it, or use exits.curriculum."
        )
    if config.is_tuning:
        yield (
            "exits.weighting = depth is not possible with tuning.checkpoint = "
            f"{config.tuning.checkpoint}, because tuning does not train the final exit, against "
            "which these weights are defined. Set exits.weighting = weights."
        )


def _own_parameters(exits: ExitsConfig) -> list[str]:
    """Return the options that give an exit parameters beside its norm."""
    own = ["exits.output = own"] if exits.output == "own" else []
    return own + ([f"exits.head = {list(exits.head)}"] if set(exits.head) - {"norm"} else [])


def _curriculum(config: ConfigFields) -> Iterator[str]:
    exits, steps = config.exits, config.training.steps
    interval, count = exits.rotation_interval, len(exits.boundaries) + 1
    if exits.curriculum == "rotational":
        if not 2 <= interval <= count:
            yield (
                f"exits.rotation_interval = {interval} must be from 2 to {count}, the number of "
                "exits including the final one, with exits.curriculum = rotational. Change it, or "
                "set exits.curriculum = none to train all exits in every step."
            )
        if interval > steps:
            yield (
                f"exits.rotation_interval = {interval} is longer than training.steps = {steps}, so "
                "that some exits are never trained. Lower exits.rotation_interval or train longer."
            )
    elif interval != 1:
        yield (
            f"exits.rotation_interval = {interval} has no effect with exits.curriculum = "
            f"{exits.curriculum}. Set exits.curriculum = rotational, or omit it."
        )
    if exits.curriculum == "gradual" and steps < 2 * count:
        yield (
            f"exits.curriculum = gradual is longer than training.steps = {steps}: it enables one "
            f"of {count} exits (including the final one) per step or slower during the first half "
            f"of training. Set training.steps = {2 * count} or more, or exits.curriculum = none."
        )
