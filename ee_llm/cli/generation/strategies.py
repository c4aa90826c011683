"""The strategy that the options of `ee-llm generate` describe."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from ee_llm.cli.generation.options import GenerateOptions
from ee_llm.errors import UserError
from ee_llm.inference.decoding.settings import CONTRASTS, SLED, Contrast, DoLa
from ee_llm.inference.strategies import SelfSpeculation, Strategy


def check_strategy_options(options: GenerateOptions, names: Iterable[str] | None = None) -> None:
    """Raise UserError if an option is given with a strategy that does not use it.

    Args:
        options: The options.
        names: The options of a line of a batch file, which are given even with default values. By
            default, the options of a command: those whose values differ from the defaults.
    """
    if names is None:
        values = ((field, getattr(options, field.name)) for field in fields(options))
        names = [field.name for field, value in values if value != field.default]
    for name in names:
        value = getattr(options, name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        given = f"--{name.replace('_', '-')} {shown}"
        is_of_exits = name in ("thresholds", "policy", "measure")
        has_no_exits = options.strategy in ("full", *CONTRASTS)
        if is_of_exits and has_no_exits and value not in (None, ("off",)):
            raise UserError(
                f"{given} has no effect: --strategy {options.strategy} runs every token through all"
                " layers. Remove one of them."
            )
        owners = _owners(name)
        if owners and options.strategy not in owners:
            raise UserError(
                f"{given} has no effect with --strategy {options.strategy}. Use --strategy"
                f" {' or '.join(owners)}, or remove it."
            )


def _owners(name: str) -> tuple[str, ...]:
    """Return the strategies that use an option, () for an option of all strategies."""
    if name == "early_head":
        return tuple(CONTRASTS)
    prefixes = {"draft": "self-speculative"} | {strategy: strategy for strategy in CONTRASTS}
    owner = prefixes.get(name.partition("_")[0])
    return () if owner is None else (owner,)


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
        layers = _layers(options.dola_layers, ("auto",))
        return DoLa(layers=layers, alpha=options.dola_alpha, head=head)
    return options.strategy


def _layers(layers: tuple[Any, ...], default: tuple[Any, ...]) -> Any:
    """Return layers as `SLED` and `DoLa` take them: a name by itself, and None for the default."""
    is_name = len(layers) == 1 and isinstance(layers[0], str)
    return None if layers == default else layers[0] if is_name else layers
