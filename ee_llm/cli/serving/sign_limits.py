"""`ee-llm sign-limits`: sign the limits that `ee-llm serve` puts on requests."""

from dataclasses import dataclass, field
from pathlib import Path

from ee_llm.cli.arguments.help import CommandHelp
from ee_llm.cli.arguments.parsing import parse

COMMAND = CommandHelp(
    "sign-limits",
    """Check a file of limits for 'ee-llm serve --limits', and write its signature to FILE.sig.

    The signature is HMAC-SHA256 with the key, so everybody who can read the key can sign. A server
    with the option --limits-key-file accepts no limits without it.""",
    (),
    (
        "openssl rand -hex 32 > limits.key",
        "ee-llm sign-limits limits.json --limits-key-file limits.key",
        "ee-llm serve runs/tuned --limits limits.json --limits-key-file limits.key",
    ),
)


@dataclass(frozen=True)
class SignLimitsOptions:
    """The options of `ee-llm sign-limits`."""

    file: Path
    """File of limits."""

    limits_key_file: Path = field(kw_only=True)
    """File with the key: at least 16 bytes."""


def run_sign_limits(arguments: list[str]) -> None:
    """Run `ee-llm sign-limits`."""
    options = parse(SignLimitsOptions, COMMAND, arguments, ("file",))
    from ee_llm.atomic_file import open_output
    from ee_llm.serving.operator.limits_file import sign_limits, signature_path

    signature = sign_limits(options.file, options.limits_key_file)
    path = signature_path(options.file)
    with open_output(path) as file:
        file.write(f"{signature}\n".encode())
        file.commit()
    print(f"Signed {options.file}: {path}")
