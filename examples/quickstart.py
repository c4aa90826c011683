"""Train a small early-exit model on Python's own source code and generate text with it.

    python examples/quickstart.py

Every machine with Python has this text. The script trains a tokenizer on it, trains a model on two
pipeline stages for a few minutes on two CPU cores, and generates text. It prints every ee-llm
command that it runs.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ee_llm.cli.arguments.parsing import parse_values
from ee_llm.cli.main import main as ee_llm
from ee_llm.cli.run_options import config_options
from ee_llm.cli.train import COMMAND
from ee_llm.config import Config, load_config
from ee_llm.data.statistics import StatisticsOptions, statistics
from ee_llm.training.reporting.curves import plot_losses, read_losses

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "examples/quickstart.toml"
# Tests and third-party packages do not read like the library's own code.
EXCLUDED = "__pycache__ _distutils_hack dist-packages ensurepip idlelib idle_test lib2to3 pip "
EXCLUDED += "site-packages test tests turtledemo"
PROMPT = "def read_lines(self, filename, encoding=None):\n"
console = Console(highlight=False)


def run(*arguments: str) -> None:
    """Print and run an ee-llm command; exit with its status if it fails."""
    console.print(f"\n[bold]$ ee-llm {escape(shlex.join(arguments))}[/]", soft_wrap=True)
    if arguments[0] == "train":  # exits with the status of its ranks
        status = subprocess.run([sys.executable, "-m", "ee_llm", *arguments]).returncode
    else:
        status = ee_llm(arguments)
    if status:
        sys.exit(status)


def prepare_data(config: Config) -> float:
    """Create missing vocabulary and token files; return the unigram entropy in nats."""
    tokenizer, prefix = config.data.tokenizer, config.data.prefixes[0]
    if not Path(f"{prefix}.idx").exists():
        text = ["--inputs", sysconfig.get_path("stdlib"), "--suffixes", ".py"]
        text += ["--exclude", *EXCLUDED.split()]
        size = ["--vocab-size", str(config.model.vocab_size)]
        run("data", "train-tokenizer", *text, *size, "--output", tokenizer)
        run("data", "prepare", *text, "--tokenizer", tokenizer, "--output", prefix)
    return statistics(StatisticsOptions(Path(prefix))).unigram_entropy


def report(config: Config, entropy: float, train: list[str]) -> None:
    """Print the validation loss of each exit and commands to try next."""
    picture = Path(config.output) / "losses.png"
    plot_losses(config.output, picture, entropy)
    table = Table("prediction", "layers", "validation loss (nats)", box=None, pad_edge=False)
    table.add_row("token frequencies", "0", f"{entropy:.3f}  (unigram entropy)")
    for name, points in read_losses(config.output).items():
        if name.endswith("validation"):
            layers = str(config.model.num_layers)
            if name.startswith("exit"):
                layers = name.split()[1]
            label = "final exit" if name.startswith("lm") else f"exit {layers}"
            table.add_row(label, layers, f"{points[-1][1]:.3f}")
    console.print("\n", table)
    latest = (Path(config.output) / "checkpoints" / "latest").read_text().strip()
    output, steps = shlex.quote(config.output), str(2 * config.training.steps)
    lines = [
        "",
        f"loss curves  {picture}",
        f"checkpoint   {config.output}/checkpoints/{latest}",
        "",
        "Next: lower the threshold, look at confidences, compare with all layers, train longer:",
        "  source .venv/bin/activate",
        f"  ee-llm generate --checkpoint {output} --prompt 'import ' --thresholds 0.2",
        f"  ee-llm generate --checkpoint {output} --prompt 'class ' --show-confidence",
        f"  ee-llm generate --checkpoint {output} --prompt 'class ' --strategy full",
        f"  ee-llm {shlex.join([*train, '--training.steps', steps])}",
    ]
    console.print(escape("\n".join(lines)), soft_wrap=True)


def main(arguments: list[str]) -> None:
    """Train, generate and report; options of `ee-llm train` override the configuration."""
    start = time.monotonic()
    overrides = parse_values(config_options(), COMMAND, arguments)
    os.chdir(ROOT)
    if output := overrides.get("output"):  # another run directory gets its own data
        arguments = [*arguments, "--data.tokenizer", f"{output}/data/tokenizer.model"]
        arguments += ["--data.prefixes", f"{output}/data/corpus"]
        overrides = parse_values(config_options(), COMMAND, arguments)
    config = load_config(CONFIG, overrides)
    entropy = prepare_data(config)
    num_ranks = config.parallel.pipeline * config.parallel.tensor
    train = ["train", "--config", CONFIG, "--nproc", str(num_ranks), *arguments]
    run(*train)
    generate = ["--checkpoint", config.output, "--prompt", PROMPT, "--thresholds", "0.5"]
    run("generate", *generate, "--max-tokens", "96", "--temperature", "0.7")
    report(config, entropy, train)
    console.print(f"\nAll of this took {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main(sys.argv[1:])
