"""The command line: `ee-llm COMMAND`, a dictionary of functions.

Whatever is slow to import is imported inside the command that needs it, so that help is quick.
"""

import contextlib
import difflib
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ee_llm
from ee_llm.errors import RunError, UserError
from ee_llm.launch.local import launch
from ee_llm.launch.logs import configure_logging
from ee_llm.launch.rank import complain, is_launched, report
from ee_llm.launch.streams import protect_streams

if TYPE_CHECKING:
    from ee_llm.config import Config


class Command(NamedTuple):
    """What a command does, in one line, and the function that does it with its arguments."""

    summary: str
    run: Callable[[list[str]], None]


def _train(arguments: list[str]) -> None:
    from ee_llm.cli.train import train

    train(arguments)


def _tune(arguments: list[str]) -> None:
    from ee_llm.cli.train import tune

    tune(arguments)


def _data_prepare(arguments: list[str]) -> None:
    from ee_llm.cli.parsing import parse
    from ee_llm.data.prepare import PrepareOptions, prepare

    options = parse(PrepareOptions, "ee-llm data prepare", arguments)
    if Path(options.tokenizer).is_dir():  # maybe of a checkpoint, which torch has to read
        from ee_llm.checkpoint.describe import tokenizer_spec

        options = replace(options, tokenizer=tokenizer_spec(options.tokenizer))
    print(prepare(options))


def _data_train_tokenizer(arguments: list[str]) -> None:
    from ee_llm.cli.parsing import parse
    from ee_llm.data.tokenization.train_tokenizer import TrainTokenizerOptions, train_tokenizer

    prog = "ee-llm data train-tokenizer"
    print(train_tokenizer(parse(TrainTokenizerOptions, prog, arguments)))


def _data_stats(arguments: list[str]) -> None:
    from ee_llm.cli.parsing import parse
    from ee_llm.data.statistics import StatisticsOptions, statistics

    print(statistics(parse(StatisticsOptions, "ee-llm data stats", arguments)))


def _convert(arguments: list[str]) -> None:
    from ee_llm.cli.parsing import parse
    from ee_llm.convert.options import ConvertOptions

    options = parse(ConvertOptions, "ee-llm convert", arguments)
    from ee_llm.convert.command import convert

    convert(options)


def _checkpoint(name: str) -> Callable[[list[str]], None]:
    """Return what runs `ee-llm checkpoint NAME`."""

    def run(arguments: list[str]) -> None:
        from ee_llm.cli import checkpoint_options as kinds
        from ee_llm.cli.parsing import parse

        kind = {
            "info": kinds.InfoOptions,
            "reshard": kinds.ReshardOptions,
            "add-exits": kinds.AddExitsOptions,
            "move-exits": kinds.MoveExitsOptions,
            "remove-exits": kinds.RemoveExitsOptions,
            "average": kinds.AverageOptions,
        }[name]
        options: Any = parse(kind, f"ee-llm checkpoint {name}", arguments)
        from ee_llm.cli import checkpoint

        num_ranks = options.tensor if isinstance(options, kinds.AddExitsOptions) else 1
        if num_ranks > 1 and "WORLD_SIZE" not in os.environ:
            checkpoint.check_add_exits(options)
            launch(num_ranks, ["checkpoint", name, *arguments])
        else:
            checkpoint.COMMANDS[name](options)

    return run


def _generate(arguments: list[str]) -> None:
    from ee_llm.cli.generation.options import GenerateOptions
    from ee_llm.cli.parsing import parse

    options = parse(GenerateOptions, "ee-llm generate", arguments)
    from ee_llm.cli.generation.command import check, generate

    num_ranks = options.tensor * options.pipeline
    if num_ranks > 1 and "WORLD_SIZE" not in os.environ:
        check(options)
        launch(num_ranks, ["generate", *arguments])
    else:
        generate(options)


def _verify(arguments: list[str]) -> None:
    from ee_llm.cli.generation.options import VerifyOptions
    from ee_llm.cli.generation.verify import verify
    from ee_llm.cli.parsing import parse

    verify(parse(VerifyOptions, "ee-llm verify", arguments))


def _plan(arguments: list[str]) -> None:
    from ee_llm.cli.parsing import parse
    from ee_llm.cli.plan import show_plan
    from ee_llm.cli.plan_options import PlanOptions

    def measure(config: "Config") -> Any:
        from ee_llm.training.profile import profile

        return profile(config)

    show_plan(parse(PlanOptions, "ee-llm plan", arguments), measure)


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
      --data.tokenizer data/tokenizer.model --data.prefixes data/corpus --output runs/first \\
      --training.steps 200
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
        checkpoint = COMMANDS.get(" ".join(arguments[:length]))
        if checkpoint is not None:
            checkpoint.run(arguments[length:])
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
    raise UserError(f"no such command: {given!r}; {mend}")


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
    protect_streams()
    configure_logging()
    try:
        _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # here, where a closed pipe is dealt with
    except (UserError, RunError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            return 128 + signal.SIGPIPE
        if os.environ.get("EE_LLM_DEBUG") == "1":
            raise
        report(str(error))
        return _ended(1 if isinstance(error, RunError) else 2)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich ends the process by itself
            return 128 + signal.SIGPIPE
        raise
    except KeyboardInterrupt:
        if not is_launched():
            complain("interrupted")
        return _ended(128 + signal.SIGINT)
    return 0


def _ended(status: int) -> int:
    """Return the status of a command that failed; end the process with it if it is a rank.

    Python's own end would wait for threads that wait for other ranks, and abort.
    """
    if is_launched():
        with contextlib.suppress(OSError):  # nobody may read any more
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit("ee-llm: run this command line with 'python -m ee_llm'")
