"""The strategy that the options of `ee-llm generate` describe."""

from dataclasses import fields
from typing import Any

from ee_llm.cli.generation.options import GenerateOptions
from ee_llm.errors import UserError
from ee_llm.inference.decoding.settings import CONTRASTS, SLED, Contrast, DoLa
from ee_llm.inference.strategies import SelfSpeculation, Strategy


def check_no_exits(options: GenerateOptions) -> None:
    """Raise UserError if a strategy without early exits is combined with thresholds for them."""
    has_thresholds = options.thresholds != GenerateOptions.thresholds and any(
        threshold != "off" for threshold in options.thresholds
    )
    if options.strategy in CONTRASTS and (options.policy is not None or has_thresholds):
        given = (
            f"--thresholds {' '.join(map(str, options.thresholds))}"
            if options.policy is None
            else f"--policy {options.policy}"
        )
        raise UserError(
            f"{given} has no effect: --strategy {options.strategy} runs every token through all"
            " layers. Remove one of them."
        )


def check_early_options(options: GenerateOptions) -> None:
    """Raise UserError if an option of `sled` or `dola` is given with another strategy."""
    for field in fields(options):
        owners = (field.name.split("_")[0],) if field.name != "early_head" else tuple(CONTRASTS)
        if owners[0] not in CONTRASTS or options.strategy in owners:
            continue
        value = getattr(options, field.name)
        if value != field.default:
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(
                f"--{field.name.replace('_', '-')} {shown} has no effect with --strategy"
                f" {options.strategy}. Use --strategy {' or '.join(owners)}, or remove it."
            )


def strategy_of_options(options: GenerateOptions) -> Strategy | SelfSpeculation | Contrast:
    """Return the strategy of the options, with its settings."""
    if options.strategy == "self-speculative":
        return SelfSpeculation(options.draft_exit, options.draft_length, options.draft_threshold)
    head = None if options.early_head == "auto" else options.early_head
    if options.strategy == "sled":
        return SLED(
            rate=options.sled_rate,
            scale=options.sled_scale,
            tau=options.sled_tau,
            layers=_layers(options.sled_layers, ("all",)),
            head=head,
            variant=options.sled_variant,
        )
    if options.strategy == "dola":
        layers = _layers(options.dola_layers, ("low",))
        return DoLa(layers=layers, alpha=options.dola_alpha, head=head)
    return options.strategy


def _layers(layers: tuple[Any, ...], default: tuple[Any, ...]) -> Any:
    """Return layers as `SLED` and `DoLa` take them: a name by itself, and None for the default."""
    is_name = len(layers) == 1 and isinstance(layers[0], str)
    return None if layers == default else layers[0] if is_name else layers
