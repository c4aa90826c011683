"""The command line: `ee-llm COMMAND`, a dictionary of functions.

Whatever is slow to import is imported inside the command that needs it, so that help is quick.
"""

import difflib
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypedDict

import ee_llm
from ee_llm.launch import complain, is_launched, launch, report

if TYPE_CHECKING:
    from ee_llm.config import Config


class Command(NamedTuple):
    """What a command does, in one line, and the function that does it with its arguments."""

    summary: str
    run: Callable[[list[str]], None]


def train_options() -> Any:
    """Return the type of `ee-llm train`'s options: every configuration field, none required.

    A TypedDict whose keys are all optional, so that tyro returns what was given and nothing else;
    what was not given comes from the file.
    """
    import tyro

    from ee_llm.config import Config, default_text, section_types

    def options(model: Any) -> dict[str, Any]:
        fields = {}
        for name, field in model.model_fields.items():
            if name in section_types() and model is Config:
                continue
            argument = tyro.conf.arg(
                help=field.description, help_behavior_hint=f"(default: {default_text(field)})"
            )
            fields[name] = Annotated[field.annotation, argument]
        return fields

    typed_dict: Any = TypedDict  # type checkers know the literal form only
    sections = {}
    for name, model in section_types().items():
        section = typed_dict(name, options(model), total=False)
        section.__doc__ = model.__doc__
        sections[name] = section
    return typed_dict("TrainOptions", {**options(Config), **sections}, total=False)


def _parse_run(
    command: str, summary: str, arguments: list[str]
) -> tuple[Path | None, int | None, dict[str, Any]]:
    """Return the file, the number of processes and the options of a command that trains."""
    import tyro

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
        overrides: Annotated[Any, tyro.conf.arg(name="", constructor=train_options())],
        config: Annotated[Path | None, file_argument] = None,
        nproc: Annotated[int | None, nproc_argument] = None,
    ) -> tuple[Path | None, int | None, dict[str, Any]]:
        return config, nproc, overrides

    description = (
        f"{summary}; any option here overrides the file's.\n\n"
        "Several processes: --nproc on one machine, scripts/torchrun.sh on more. The options are "
        "in docs/configuration.md too, and examples/ has files to start from."
    )
    return tyro.cli(
        parse,
        prog=f"ee-llm {command}",
        description=description,
        args=arguments,
        use_underscores=True,
    )


def _train(arguments: list[str]) -> None:
    from ee_llm.config import ConfigError, load_config

    summary = "Train the model that a TOML file describes"
    path, nproc, overrides = _parse_run("train", summary, arguments)
    config = load_config(path, overrides)
    if config.is_tuning:
        raise ConfigError(
            f"tuning.checkpoint = {config.tuning.checkpoint} is for 'ee-llm tune', which trains "
            "exits alone; to train the whole model from a checkpoint give checkpoint.initial"
        )
    _run(config, "train", nproc, arguments)


def _tune(arguments: list[str]) -> None:
    from ee_llm.config import ConfigError, load_config, read_options

    summary = "Tune exits of an existing model as a TOML file describes, all else frozen"
    path, nproc, overrides = _parse_run("tune", summary, arguments)
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


def _run(config: "Config", command: str, nproc: int | None, arguments: list[str]) -> None:
    """Train as one rank, or start the processes that do."""
    _check_start(config, nproc)
    if nproc is None:
        from ee_llm.training.trainer import train

        train(config)
    else:
        launch(nproc, [command, *_without_option(arguments, "--nproc")])


def _check_start(config: "Config", nproc: int | None) -> None:
    """Refuse what can be seen to fail before any process is started; raises `ConfigError`."""
    from ee_llm.config import ConfigError
    from ee_llm.pipeline.chosen import chosen_fills

    world_size = os.environ.get("WORLD_SIZE")
    if world_size is not None and not (world_size.isdecimal() and int(world_size) > 0):
        raise ConfigError(
            f"WORLD_SIZE = {world_size!r} in the environment is no number of processes; unset it, "
            "or let torchrun set it"
        )
    if nproc is not None and world_size is not None:
        raise ConfigError(
            f"--nproc = {nproc} within a launcher that already started {world_size} processes; "
            "leave --nproc out"
        )
    if nproc is not None and nproc < 1:
        raise ConfigError(f"--nproc = {nproc}: give 1 or more")
    if not config.data.prefixes:
        raise ConfigError(
            "data.prefixes = [] names nothing to train on; make data with 'ee-llm data prepare' "
            "and give the --output of that"
        )
    config.num_microbatches(nproc or int(world_size or 1))
    chosen_fills(config)


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


def _data_prepare(arguments: list[str]) -> None:
    import tyro

    from ee_llm.data.prepare import PrepareOptions, prepare

    print(prepare(tyro.cli(PrepareOptions, prog="ee-llm data prepare", args=arguments)))


def _data_train_tokenizer(arguments: list[str]) -> None:
    import tyro

    from ee_llm.data.train_tokenizer import TrainTokenizerOptions, train_tokenizer

    prog = "ee-llm data train-tokenizer"
    print(train_tokenizer(tyro.cli(TrainTokenizerOptions, prog=prog, args=arguments)))


def _data_stats(arguments: list[str]) -> None:
    import tyro

    from ee_llm.data.statistics import StatisticsOptions, statistics

    print(statistics(tyro.cli(StatisticsOptions, prog="ee-llm data stats", args=arguments)))


def _convert(arguments: list[str]) -> None:
    import tyro

    from ee_llm.convert.options import ConvertOptions

    options = tyro.cli(ConvertOptions, prog="ee-llm convert", args=arguments)
    from ee_llm.convert.command import convert

    convert(options)


def _checkpoint(name: str) -> Callable[[list[str]], None]:
    """Return what runs `ee-llm checkpoint NAME`."""

    def run(arguments: list[str]) -> None:
        import tyro

        from ee_llm.edit import options as kinds

        kind = {
            "info": kinds.InfoOptions,
            "reshard": kinds.ReshardOptions,
            "add-exits": kinds.AddExitsOptions,
            "move-exits": kinds.MoveExitsOptions,
            "remove-exits": kinds.RemoveExitsOptions,
            "average": kinds.AverageOptions,
        }[name]
        options: Any = tyro.cli(kind, prog=f"ee-llm checkpoint {name}", args=arguments)
        from ee_llm.edit import command

        num_ranks = options.tensor if isinstance(options, kinds.AddExitsOptions) else 1
        if num_ranks > 1 and "WORLD_SIZE" not in os.environ:
            command.check_add_exits(options)
            launch(num_ranks, ["checkpoint", name, *arguments])
        else:
            command.COMMANDS[name](options)

    return run


def _generate(arguments: list[str]) -> None:
    import tyro

    from ee_llm.inference.options import GenerateOptions

    options = tyro.cli(GenerateOptions, prog="ee-llm generate", args=arguments)
    from ee_llm.inference.command import check, generate

    num_ranks = options.tensor * options.pipeline
    if num_ranks > 1 and "WORLD_SIZE" not in os.environ:
        check(options)
        launch(num_ranks, ["generate", *arguments])
    else:
        generate(options)


def _verify(arguments: list[str]) -> None:
    import tyro

    from ee_llm.inference.options import VerifyOptions
    from ee_llm.inference.verify import verify

    verify(tyro.cli(VerifyOptions, prog="ee-llm verify", args=arguments))


def _plan(arguments: list[str]) -> None:
    import tyro

    from ee_llm.pipeline.command import show_plan
    from ee_llm.pipeline.plan_options import PlanOptions

    def measure(config: "Config") -> Any:
        from ee_llm.training.profile import profile

        return profile(config)

    show_plan(tyro.cli(PlanOptions, prog="ee-llm plan", args=arguments), measure)


COMMANDS: dict[str, Command] = {
    "train": Command("train the model that a TOML file describes", _train),
    "tune": Command("tune exits of an existing model, all else frozen", _tune),
    "plan": Command("show a pipeline schedule: its time, its memory, a picture of it", _plan),
    "data train-tokenizer": Command("make a SentencePiece vocabulary", _data_train_tokenizer),
    "data prepare": Command("turn texts into the token files that training reads", _data_prepare),
    "data stats": Command("print what prepared data consist of", _data_stats),
    "convert": Command(
        "turn a model of Hugging Face's or Megatron-LM's into ours, or back", _convert
    ),
    "checkpoint info": Command("show what is in a checkpoint", _checkpoint("info")),
    "checkpoint reshard": Command("cut its blocks for another layout", _checkpoint("reshard")),
    "checkpoint add-exits": Command("add exits to its model", _checkpoint("add-exits")),
    "checkpoint move-exits": Command("place its exits post or pre", _checkpoint("move-exits")),
    "checkpoint remove-exits": Command("take exits out", _checkpoint("remove-exits")),
    "checkpoint average": Command("average the weights of several", _checkpoint("average")),
    "generate": Command("continue prompts, showing where each token exited", _generate),
    "verify": Command("check generations against what defines them", _verify),
}

_EXAMPLES = """\
A first run, from text to text:
  ee-llm data train-tokenizer --inputs texts/ --output data/tokenizer.model --vocab-size 4096
  ee-llm data prepare --inputs texts/ --output data/corpus --tokenizer data/tokenizer.model
  ee-llm train --nproc 2 --model.shape llama-tiny --exits.boundaries 2 4 --parallel.pipeline 2 \\
      --data.tokenizer data/tokenizer.model --data.prefixes data/corpus --output runs/first
  ee-llm generate --checkpoint runs/first --prompt "Once upon"
"""


def help_text(prefix: str = "") -> str:
    """Return the help of `ee-llm`, or of one group of commands such as `data`."""
    names = [name for name in COMMANDS if name.startswith(prefix)]
    width = max(map(len, names))
    lines = [
        "usage: ee-llm COMMAND [OPTIONS]",
        "",
        ee_llm.__doc__.splitlines()[0] if ee_llm.__doc__ else "",
        "",
        "commands:",
        *(f"  {name:<{width}}  {COMMANDS[name].summary}" for name in names),
        "",
        "'ee-llm COMMAND --help' shows a command's options, 'ee-llm --version' the version.",
    ]
    return "\n".join([*lines, "", _EXAMPLES] if not prefix else lines)


def _dispatch(arguments: list[str]) -> None:
    if arguments[:1] == ["--version"]:
        print(f"ee-llm {ee_llm.__version__}")
        return
    for length in (1, 2):
        command = COMMANDS.get(" ".join(arguments[:length]))
        if command is not None:
            command.run(arguments[length:])
            return
    groups = {name.partition(" ")[0] + " " for name in COMMANDS if " " in name}
    group = next((group for group in groups if arguments[:1] == [group.strip()]), "")
    rest = arguments[1:] if group else arguments
    if not rest or rest[0] in ("-h", "--help", "help"):
        print(help_text(group))
        return
    given = " ".join(arguments[:2] if group else arguments[:1])
    near = difflib.get_close_matches(given, COMMANDS, n=1, cutoff=0.5)
    mend = f"did you mean {near[0]!r}?" if near else "'ee-llm --help' lists the commands"
    raise ValueError(f"no such command: {given!r}; {mend}")


def _is_users_mistake(error: Exception) -> bool:
    """Whether `error` speaks to the user: this package raised it, in a `raise` statement.

    One from inside a library, or from an expression, is more likely a bug and keeps its traceback;
    so does what ended a pipeline's plan, whose picture it shows.
    """
    if isinstance(error, OSError):
        return True
    if isinstance(error, RuntimeError):
        from ee_llm.pipeline.runtime import PipelineError

        if isinstance(error, PipelineError):
            return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = Path(frame.filename).is_relative_to(Path(__file__).parent)
    return is_ours and (frame.line or "").startswith("raise ")


def _is_output_closed() -> bool:
    """Whether whoever read our standard output has stopped reading, as head does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:  # what is left goes nowhere, or Python would complain about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status of `ee-llm ARGUMENTS`: 0, 2 after a mistake of the user's, else 1.

    What went wrong is one line on standard error; EE_LLM_DEBUG=1 shows where it was found.
    """
    try:
        _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # here, where a closed pipe is dealt with
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            return 128 + signal.SIGPIPE
        if os.environ.get("EE_LLM_DEBUG") == "1" or not _is_users_mistake(error):
            raise
        report(str(error))
        status = 1 if isinstance(error, RuntimeError) else 2
        if is_launched():
            os._exit(status)  # threads that wait for other ranks would turn it into an abort
        return status
    except KeyboardInterrupt:
        if not is_launched():
            complain("interrupted")
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
