"""`ee-llm train` and `ee-llm tune`: their options, and what is refused before a process starts."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro

from ee_llm.cli import parsing
from ee_llm.config import Config, Section, default_text, load_config, read_options, section_types
from ee_llm.config.limits import MAX_RANKS
from ee_llm.config.tuning import DEFAULT_SEQ_LENGTH
from ee_llm.errors import ConfigError
from ee_llm.launch.local import launch
from ee_llm.launch.streams import ignore_output_trouble

# What `ee-llm tune` shows in its help, in this order, and the defaults that differ from training's.
_TUNE_SECTIONS = (
    *("tuning", "exits", "data", "training", "optimizer", "parallel"),
    *("checkpoint", "logging", "deepspeed"),
)
_NOT_FOR_TUNING = {
    *("parallel.virtual", "parallel.schedule", "parallel.fill_warmup", "parallel.fill_cooldown"),
    *("parallel.forward_over_backward", "checkpoint.initial"),
}
_TUNE_DEFAULTS = {
    "tuning.checkpoint": "required",
    "exits.boundaries": "those of the checkpoint; required if it has none",
    "exits.head": 'those of the checkpoint, else ["norm"]',
    "exits.output": 'that of the checkpoint, else "shared"',
    "data.prefixes": "required",
    "data.tokenizer": "the checkpoint's own",
    "data.eos_token": "the checkpoint's own",
    "data.seq_length": f"the model's context, but at most {DEFAULT_SEQ_LENGTH}",
}


def train_options() -> Any:
    """Return the type of `ee-llm train`'s options: every configuration field, none required.

    A TypedDict whose keys are all optional, so that tyro returns what was given and nothing else;
    what was not given comes from the file.
    """
    return _options(section_types(), {}, set())


def tune_options(*, is_for_help: bool = False) -> Any:
    """Return the type of `ee-llm tune`'s options: as `train_options`, with help for tuning.

    For help, it lacks options that tuning refuses and the model's, which are the checkpoint's.
    """
    sections = section_types()
    ordered = {name: sections[name] for name in (*_TUNE_SECTIONS, *sections)}
    if not is_for_help:
        return _options(ordered, _TUNE_DEFAULTS, set())
    del ordered["model"]
    return _options(ordered, _TUNE_DEFAULTS, _NOT_FOR_TUNING)


def _options(
    sections: Mapping[str, type[Section]], defaults: Mapping[str, str], left_out: Collection[str]
) -> Any:
    """Return a TypedDict of `sections`; `defaults` and `left_out` are by dotted name."""
    typed_dict: Any = TypedDict  # type checkers know the literal form only

    def options(model: Any, prefix: str) -> dict[str, Any]:
        fields = {}
        for name, field in model.model_fields.items():
            if (name in section_types() and model is Config) or prefix + name in left_out:
                continue
            default = defaults.get(prefix + name, default_text(field))
            hint = "(required)" if default == "required" else f"(default: {default})"
            argument = tyro.conf.arg(help=field.description, help_behavior_hint=hint)
            fields[name] = Annotated[field.annotation, argument]
        return fields

    parts = {}
    for name, model in sections.items():
        part = typed_dict(name, options(model, f"{name}."), total=False)
        part.__doc__ = model.__doc__
        parts[name] = part
    return typed_dict("Options", {**options(Config, ""), **parts}, total=False)


def _parse_run(
    command: str, summary: str, arguments: list[str], options: Any
) -> tuple[Path | None, int | None, dict[str, Any]]:
    """Return the file, the number of processes and the options of a command that trains."""
    file_argument = tyro.conf.arg(
        metavar="FILE", help="TOML file with the configuration.", help_behavior_hint=""
    )
    nproc_argument = tyro.conf.arg(
        metavar="INT",
        help="Number of processes to start on this machine: a multiple of parallel.tensor x "
        "parallel.pipeline.",
        help_behavior_hint="(default: this one)",
    )

    def parse(
        overrides: Annotated[Any, tyro.conf.arg(name="", constructor=options)],
        config: Annotated[Path | None, file_argument] = None,
        nproc: Annotated[int | None, nproc_argument] = None,
    ) -> tuple[Path | None, int | None, dict[str, Any]]:
        return config, nproc, overrides

    description = (
        f"{summary}; any option here overrides the file's.\n\n"
        "Several processes: --nproc on one machine, scripts/torchrun.sh on more. The options are "
        "in docs/reference/configuration.md too, and examples/ has files to start from."
    )
    path, nproc, overrides = parsing.parse(
        parse,
        f"ee-llm {command}",
        arguments,
        options=options,
        description=description,
        use_underscores=True,
    )
    return None if path is None else Path(os.path.expanduser(path)), nproc, overrides


def train(arguments: list[str]) -> None:
    """Run `ee-llm train`; raises ConfigError."""
    summary = "Train the model that a TOML file describes"
    path, nproc, overrides = _parse_run("train", summary, arguments, train_options())
    config = load_config(path, overrides)
    if config.is_tuning:
        raise ConfigError(
            f"tuning.checkpoint = {config.tuning.checkpoint} is for 'ee-llm tune', which trains "
            "exits alone; to train the whole model from a checkpoint give checkpoint.initial"
        )
    _run(config, "train", nproc, arguments)


def tune(arguments: list[str]) -> None:
    """Run `ee-llm tune`; raises ConfigError."""
    summary = "Tune exits of an existing model as a TOML file describes, all else frozen"
    options = tune_options(is_for_help=not {"-h", "--help"}.isdisjoint(arguments))
    path, nproc, overrides = _parse_run("tune", summary, arguments, options)
    given = read_options(path, overrides)
    section = given.get("tuning")
    source = section.get("checkpoint") if isinstance(section, dict) else None
    if not source:
        raise ConfigError(
            "tuning.checkpoint: not given; name the checkpoint, or the run directory, with the "
            "model whose exits are to be tuned"
        )
    below: dict[str, Any] = {}
    if isinstance(source, str):  # else the configuration refuses it
        from ee_llm.checkpoint.describe import described_options

        below = described_options(source, given)
    _run(load_config(path, overrides, below), "tune", nproc, arguments)


def _run(config: Config, command: str, nproc: int | None, arguments: list[str]) -> None:
    """Train as one rank, or start the processes that do."""
    config = _with_tokenizer(config)
    _check_start(config, nproc)
    if nproc is None:
        from ee_llm.training.trainer import train as train_as_rank

        ignore_output_trouble()
        train_as_rank(config)
    else:
        launch(nproc, [command, *_without_option(arguments, "--nproc")])


def _with_tokenizer(config: Config) -> Config:
    """Return `config` with the path of a tokenizer where it names a checkpoint's."""
    if not Path(config.data.tokenizer).is_dir():
        return config
    from ee_llm.checkpoint.describe import tokenizer_spec

    values = config.model_dump()
    values["data"]["tokenizer"] = tokenizer_spec(config.data.tokenizer)
    return load_config(None, values)


def _check_start(config: Config, nproc: int | None) -> None:
    """Refuse what can be seen to fail before any process is started; raises `ConfigError`."""
    from ee_llm import distributed
    from ee_llm.pipeline.selection import select_fills

    if nproc is not None and "WORLD_SIZE" in os.environ:
        raise ConfigError(
            f"--nproc = {nproc} within a launcher that already started "
            f"{os.environ['WORLD_SIZE']} processes; leave --nproc out"
        )
    world_size = distributed.launched_world_size()
    if nproc is not None and not 1 <= nproc <= MAX_RANKS:
        raise ConfigError(f"--nproc = {nproc}: give a number from 1 to {MAX_RANKS:,}")
    if not config.data.prefixes:
        raise ConfigError(
            "data.prefixes = [] names nothing to train on; make data with 'ee-llm data prepare' "
            "and give the --output of that"
        )
    config.num_microbatches(nproc or world_size or 1)
    select_fills(config)


def _without_option(arguments: Sequence[str], name: str) -> list[str]:
    """`arguments` without `name VALUE` and `name=VALUE`."""
    kept: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == name:
            next(remaining, None)
        elif not argument.startswith(f"{name}="):
            kept.append(argument)
    return kept
