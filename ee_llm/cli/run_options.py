"""The options that `ee-llm train` and `ee-llm tune` share, and the start of their ranks."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.options import Option
from ee_llm.cli.arguments.parsing import parse_values
from ee_llm.cli.example_config import COMMON
from ee_llm.config import Config, default_text, section_types
from ee_llm.launch.local import launch
from ee_llm.launch.streams import ignore_output_trouble

_RUN = (
    Option("config", Path | None, "TOML file with the configuration."),
    Option(
        "nproc",
        int | None,
        "Number of processes to start on this machine, a multiple of parallel.tensor x "
        "parallel.pipeline.",
        "this process",
    ),
)


class RunOptions(NamedTuple):
    """The options of a command that trains."""

    config: Path | None
    nproc: int | None
    overrides: dict[str, Any]
    """The options of the configuration that the command line sets, by dotted name."""


def parse_run(
    command: CommandHelp,
    arguments: Sequence[str],
    options: Sequence[Option],
    help_options: Sequence[Option] | None = None,
) -> RunOptions:
    """Return the options of a command that trains; raises as `parse_values` does.

    --config and --nproc are added to the options of the configuration.
    """
    shown = None if help_options is None else [*_RUN, *help_options]
    values = parse_values([*_RUN, *options], command, arguments, shown)
    return RunOptions(values.pop("config", None), values.pop("nproc", None), values)


def config_options(
    defaults: Mapping[str, str] | None = None,
    required: Collection[str] = (),
    hidden: Collection[str] = (),
) -> list[Option]:
    """Return an option for every field of the configuration.

    The options have no default values, so that values in the file apply unless an option is given.

    Args:
        defaults: The defaults that help shows instead of the configuration's, by dotted name.
        required: The options that help shows as required; the file may have them.
        hidden: The options and sections to omit.
    """
    options = []
    shown = dict(defaults or {})
    sections: dict[str, type[BaseModel]] = {"": Config, **section_types()}
    for section, kind in sections.items():
        for field, info in kind.model_fields.items():
            name = f"{section}.{field}" if section else field
            if name in section_types() or not {name, section}.isdisjoint(hidden):
                continue
            default = None if name in required else shown.get(name, default_text(info))
            default = None if default == "[]" else default  # an empty list is not informative
            text = info.description or ""
            options.append(Option(name, info.annotation, text, default, name in required))
    return options


def run_groups(sections: Sequence[str]) -> list[Group]:
    """Return the groups of options in help: those of the run, then the given sections."""
    groups = [Group("Run", "config nproc output")]
    for section in sections:
        kind = section_types()[section]
        title = " ".join((kind.__doc__ or "").split())
        common = COMMON.get(section, ())
        advanced = [name for name in kind.model_fields if name not in common]
        groups.append(
            Group(
                f"[{section}] {title}",
                " ".join(f"{section}.{name}" for name in common),
                " ".join(f"{section}.{name}" for name in advanced),
            )
        )
    return groups


def run(config: Config, command: str, nproc: int | None, arguments: Sequence[str]) -> None:
    """Train on this rank, or start the ranks that train."""
    from ee_llm.training.start import prepare

    config = prepare(config, nproc)
    if nproc is None:
        from ee_llm.training.trainer import train

        ignore_output_trouble()
        train(config)
    else:
        launch(nproc, [command, *without_option(arguments, "--nproc")])


def without_option(arguments: Sequence[str], name: str) -> list[str]:
    """Return `arguments` without `name VALUE` and `name=VALUE`."""
    kept: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == name:
            next(remaining, None)
        elif not argument.startswith(f"{name}="):
            kept.append(argument)
    return kept
