"""Dispatch `ee-llm COMMAND` to the module of the command, and report its errors.

Commands are imported when they run, and their slow libraries after the options are parsed, so that
help is fast.
"""

import contextlib
import difflib
import importlib
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ee_llm
from ee_llm.cli.arguments.help import HELP_NAMES
from ee_llm.errors import RunError, UserError
from ee_llm.launch.logs import configure_logging
from ee_llm.launch.rank import complain, is_launched, is_rank, report
from ee_llm.launch.streams import protect_streams


class Command(NamedTuple):
    """A command: its summary in one line, and the function that runs it with its arguments."""

    summary: str
    run: Callable[[list[str]], None]


def _lazy(module: str, function: str) -> Callable[[list[str]], None]:
    """Return a function of `ee_llm.cli` that is imported when it is called."""

    def run(arguments: list[str]) -> None:
        getattr(importlib.import_module(f"ee_llm.cli.{module}"), function)(arguments)

    return run


COMMANDS: dict[str, Command] = {
    "init": Command("write an example configuration", _lazy("init", "run_init")),
    "data train-tokenizer": Command(
        "train a SentencePiece tokenizer", _lazy("data", "run_train_tokenizer")
    ),
    "data prepare": Command(
        "tokenize texts into the files that training reads", _lazy("data", "run_prepare")
    ),
    "data generate": Command("sample training data from a model", _lazy("data", "run_generate")),
    "data stats": Command("summarize prepared data", _lazy("data", "run_stats")),
    "plan": Command("show a pipeline schedule, its time and its memory", _lazy("plan", "run_plan")),
    "train": Command("train the model that a TOML file describes", _lazy("train", "run_train")),
    "tune": Command("train exits of an existing model only", _lazy("tune", "run_tune")),
    "convert": Command(
        "convert from and to Hugging Face, and from Megatron-LM", _lazy("convert", "run_convert")
    ),
    "checkpoint info": Command(
        "show the content of a checkpoint", _lazy("checkpoint.commands", "run_info")
    ),
    "checkpoint add-exits": Command(
        "add exits to a checkpoint", _lazy("checkpoint.add_exits", "run_add_exits")
    ),
    "checkpoint fit-temperatures": Command(
        "fit the temperatures of exits to a text",
        _lazy("checkpoint.fit_temperatures", "run_fit_temperatures"),
    ),
    "checkpoint move-exits": Command(
        "move exits to another side of stage boundaries",
        _lazy("checkpoint.commands", "run_move_exits"),
    ),
    "checkpoint remove-exits": Command(
        "remove exits from a checkpoint", _lazy("checkpoint.commands", "run_remove_exits")
    ),
    "checkpoint average": Command(
        "average the weights of several checkpoints", _lazy("checkpoint.commands", "run_average")
    ),
    "checkpoint reshard": Command(
        "rewrite a checkpoint's blocks for another layout",
        _lazy("checkpoint.commands", "run_reshard"),
    ),
    "generate": Command(
        "generate text, and show where each token exited", _lazy("generate", "run_generate")
    ),
    "evaluate": Command(
        "measure the loss of every exit on given text",
        _lazy("evaluation.evaluate", "run_evaluate"),
    ),
    "calibrate": Command(
        "choose the exits' thresholds for a stated risk",
        _lazy("evaluation.calibrate", "run_calibrate"),
    ),
    "probe": Command(
        "find the layers after which exits belong", _lazy("evaluation.probe", "run_probe")
    ),
    "sweep": Command(
        "measure the speed and the quality of exit policies and drafts",
        _lazy("evaluation.sweep", "run_sweep"),
    ),
    "report": Command(
        "write an HTML page about a model's exits", _lazy("evaluation.report", "run_report")
    ),
    "serve": Command("serve a model over HTTP with OpenAI's API", _lazy("serve", "run_serve")),
    "sign-limits": Command(
        "sign the limits of requests for a server",
        _lazy("serving.sign_limits", "run_sign_limits"),
    ),
    "verify": Command("verify generations against the model", _lazy("verify", "run_verify")),
}

_EXAMPLES = """\
Train a first model and generate text with it:
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
        "Commands:",
        *(f"  {name:<{width}}  {COMMANDS[name].summary}" for name in names),
        "",
        "'ee-llm COMMAND --help' shows the common options of a command, --help-all shows all of",
        "them. 'ee-llm --version' shows the version.",
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
    if not rest or rest[0] in (*HELP_NAMES, "help"):
        print(help_text(group))
        return
    given = " ".join(arguments[:2] if group else arguments[:1])
    near = difflib.get_close_matches(given, COMMANDS, n=1, cutoff=0.5)
    advice = f"Did you mean {near[0]!r}?" if near else "'ee-llm --help' lists the commands."
    raise UserError(f"{given!r} is not a command. {advice}")


def _is_output_closed() -> bool:
    """Return whether the reader of standard output has closed it, as head does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:  # Discard the rest of the output: Python would complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ee-llm ARGUMENTS` and return its exit status.

    The status is 0 after success, 2 after an error of the user and 1 after a failed run. Errors
    are one line on standard error; EE_LLM_DEBUG=1 shows their traceback. Other exceptions are
    defects of ee_llm and are raised.
    """
    protect_streams()
    configure_logging()
    try:
        _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # Flush here, because a closed pipe is handled below.
    except (UserError, RunError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            return 128 + signal.SIGPIPE
        if os.environ.get("EE_LLM_DEBUG") == "1":
            raise
        report(str(error))
        return _ended(1 if isinstance(error, RunError) else 2)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich exits when its output is closed
            return 128 + signal.SIGPIPE
        raise
    except KeyboardInterrupt:
        if not is_launched():
            complain("interrupted")
        return _ended(128 + signal.SIGINT)
    return 0


def _ended(status: int) -> int:
    """Return the exit status of a command that failed; on a rank, exit with it at once.

    Python's own shutdown would wait for threads that wait for other ranks, and abort.
    """
    if is_rank():
        with contextlib.suppress(OSError):  # The reader may have closed the pipe.
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit("ee-llm: run this command line with 'python -m ee_llm'")
