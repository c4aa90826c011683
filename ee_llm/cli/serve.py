"""`ee-llm serve`: an HTTP server with OpenAI's API."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import parse
from ee_llm.cli.generation.options import ExecutionOptions
from ee_llm.errors import UserError
from ee_llm.inference.choices import DeferralMode, Measure

if TYPE_CHECKING:
    from ee_llm.inference.exits.policy import ExitPolicy, Exits
    from ee_llm.inference.llm import LLM

COMMAND = CommandHelp(
    "serve",
    """Serve a model over HTTP with OpenAI's API: /v1/completions, /v1/chat/completions and
    /v1/models. Requests may choose exits and a strategy with the field "ee".

    Ctrl-C or SIGTERM finishes the running requests and stops; a second one aborts them. Needs
    pip install 'ee-llm[serve]'.""",
    (
        Group("Address", "host port api_key_file", "served_model_name"),
        Group("Exits", "policy thresholds", "measure"),
        Group("Limits of exits", "limits", "limits_key_file audit_log"),
        Group(
            "Execution",
            "dtype max_num_seqs cache_tokens tensor pipeline",
            "chat_template quantize attention cuda_graphs compile deferral timeout_s",
        ),
        Group(
            "Limits",
            "max_queued_requests request_timeout_s",
            "max_queued_tokens max_body_mib max_unread_tokens drain_timeout_s stall_timeout_s",
        ),
        Group("Output", "page", "log_requests"),
    ),
    (
        "ee-llm serve runs/tuned --policy policy.json",
        "ee-llm serve runs/tuned --port 8080 --max-num-seqs 32 --thresholds 0.9",
        "ee-llm serve runs/tuned --thresholds 0.9 --no-page",
        "ee-llm serve runs/tuned --host 0.0.0.0 --api-key-file keys.txt",
        "ee-llm serve runs/tuned --limits limits.json --audit-log audit.jsonl",
        "curl localhost:8000/v1/completions -H 'Content-Type: application/json'"
        ' -d \'{"prompt": "Once", "max_tokens": 16}\'',
    ),
)


@dataclass(frozen=True)
class ServeOptions(ExecutionOptions):
    """The options of `ee-llm serve`."""

    host: str = "127.0.0.1"
    """Listen on this address. The default serves programs of this machine only; 0.0.0.0 serves all
    networks."""

    port: int = 8000
    """Listen on this port; 0 is any free one."""

    api_key_file: Path | None = None
    """Require one of the API keys in this file, which has one key per line."""

    served_model_name: str | None = None
    """Name of the model in requests and responses. (default: the name of the run directory)"""

    policy: Path | None = None
    """Exit policy of requests without one: a JSON file of 'ee-llm calibrate', instead of
    --thresholds and --measure."""

    thresholds: tuple[float | Literal["off"], ...] = (0.8,)
    """Exit if the confidence reaches this value in (0, 1], or off; one per exit, or one for all.
    Applies to requests without thresholds of their own."""

    measure: Measure = "max_probability"
    """Measure of confidence that --thresholds are for, as in 'ee-llm generate'."""

    limits: Path | None = None
    """Keep the exits and the strategies of requests within the limits in this JSON file, such as
    {"min_thresholds": 0.8, "allowed_strategies": ["exact", "full"], "on_violation": "refuse"}. The
    server reads the file again when it changes."""

    limits_key_file: Path | None = None
    """Accept limits only if 'ee-llm sign-limits' has signed them with the key in this file."""

    audit_log: Path | None = None
    """Append a JSON line to this file for each request that the limits change or refuse."""

    deferral: DeferralMode = "auto"
    """Defer rows that did not exit until more of them can run together, if measurements at the
    start predict a speed-up (auto), or never (off)."""

    max_queued_requests: int = 256
    """Let this many sequences wait beyond --max-num-seqs; further requests get status 429."""

    max_queued_tokens: int = 262_144
    """Let prompts with this many tokens altogether wait; further requests get status 429."""

    max_body_mib: float = 4.0
    """Refuse requests whose body is larger, in MiB."""

    max_unread_tokens: int = 8192
    """Abort a stream whose client is this many tokens behind."""

    request_timeout_s: float = 600.0
    """Abort requests that take longer, in seconds."""

    drain_timeout_s: float = 30.0
    """After a signal, finish running requests for at most this many seconds."""

    stall_timeout_s: float = 120.0
    """Report in /health and /ready that the engine hangs if a step takes this many seconds."""

    page: bool = True
    """Serve a page for browsers at /: it shows where tokens exit as they come, beside the full
    model."""

    log_requests: bool = True
    """Log a line for each request: its numbers of tokens, depth and time, never its text."""


def run_serve(arguments: list[str]) -> None:
    """Run `ee-llm serve` until a signal stops it."""
    options = parse(ServeOptions, COMMAND, arguments, ("checkpoint",))
    _check(options)
    try:
        from ee_llm.serving.api_keys import read_api_keys
        from ee_llm.serving.operator.limits_file import LimitsFile
        from ee_llm.serving.server import bind, serve, url_of
        from ee_llm.serving.settings import ServerSettings
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn", "prometheus_client"):
            raise
        raise UserError(
            f"ee-llm serve needs {error.name}. Install it with pip install 'ee-llm[serve]'."
        ) from None
    from ee_llm import distributed
    from ee_llm.cli.generation.execution import check_execution, load_model

    config = check_execution(options)
    settings = ServerSettings(
        model_name=options.served_model_name or _model_name(options.checkpoint),
        api_keys=() if options.api_key_file is None else read_api_keys(options.api_key_file),
        max_queued_requests=options.max_queued_requests,
        max_queued_tokens=options.max_queued_tokens,
        max_body_mib=options.max_body_mib,
        request_timeout_s=options.request_timeout_s,
        stall_timeout_s=options.stall_timeout_s,
        limits=options.limits,
        limits_key_file=options.limits_key_file,
        audit_log=options.audit_log,
        log_requests=options.log_requests,
        page=options.page,
    )
    if options.limits is not None:  # Report mistakes before the model is loaded, which is slow.
        LimitsFile(options.limits, options.limits_key_file).read()
    exits = _exits(options, config.exits.boundaries)
    if not distributed.is_rank_zero():  # of a launcher such as torchrun
        # The leader gets the signal too, finishes its requests and ends this rank.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        with load_model(options, exits=exits, deferral=options.deferral) as llm:
            llm.worker_loop()
        return
    with (
        bind(options.host, options.port) as bound,  # before the model is loaded, which is slow
        load_model(options, exits=exits, deferral=options.deferral) as llm,
    ):
        name, url = settings.model_name, url_of(bound)
        serve(
            llm,
            settings,
            bound,
            host=options.host,
            drain_timeout_s=options.drain_timeout_s,
            max_unread_tokens=options.max_unread_tokens,
            on_ready=lambda policy: print(_described(llm, policy, name, url), flush=True),
        )


def _check(options: ServeOptions) -> None:
    """Raise UserError for options that are out of range or contradict each other."""
    limits: dict[str, tuple[float, float]] = {
        "port": (0, 2**16 - 1),
        "max_queued_requests": (1, 2**20),
        "max_queued_tokens": (1, 2**40),
        "max_body_mib": (0.001, 1024),
        "max_unread_tokens": (1, 2**30),
        "request_timeout_s": (0.001, 10**6),
        "drain_timeout_s": (0, 10**6),
        "stall_timeout_s": (0.001, 10**6),
    }
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        if not least <= value <= most:  # refuses NaN, too
            option = name.replace("_", "-")
            raise UserError(f"--{option} {value} is out of range. Use {least:g} to {most:,}.")
    for name in ("limits_key_file", "audit_log"):
        if options.limits is None and getattr(options, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} has no effect without --limits. Give a file of limits."
            )
    if options.policy is not None:
        for name in ("thresholds", "measure"):
            if getattr(options, name) != getattr(ServeOptions, name):
                raise UserError(
                    f"--policy {options.policy} and --{name} are both given. Use one of them."
                )


def _exits(options: ServeOptions, boundaries: Any) -> "Exits":
    from ee_llm.inference.exits.policy import make_exit_policy

    if options.policy is not None:
        return options.policy
    thresholds = [None if value == "off" else value for value in options.thresholds]
    return make_exit_policy(boundaries, thresholds, options.measure)


def _model_name(checkpoint: Path) -> str:
    """Return the name of a run directory, also of a checkpoint in one."""
    path = checkpoint.resolve()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name


def _described(llm: "LLM", policy: "ExitPolicy", name: str, url: str) -> str:
    """Return a line about what is served, and where."""
    thresholds = zip(policy.boundaries, policy.thresholds, strict=True)
    exits = ", ".join(f"{b}: {'off' if one is None else f'{one:g}'}" for b, one in thresholds)
    shown = f"exits {{{exits}}} by {policy.measure}" if exits else "no exits"
    dtype = str(llm.dtype).removeprefix("torch.")
    return (
        f"Serving {name} at {url}/v1 ({llm.config.model.num_layers} layers, {dtype}, {shown},"
        f" policy {policy.digest}). Ctrl-C stops it."
    )
