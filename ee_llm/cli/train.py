"""`ee-llm train`: train the model that a configuration describes."""

from ee_llm.cli.arguments.help import CommandHelp
from ee_llm.cli.run_options import config_options, parse_run, run, run_groups
from ee_llm.config import load_config
from ee_llm.errors import ConfigError

_SECTIONS = (
    *("model", "exits", "layer_dropout", "data", "training", "optimizer", "parallel"),
    *("checkpoint", "logging"),
    "deepspeed",
)
# Only 'ee-llm tune' uses this section.
_HIDDEN = ("tuning",)
_REQUIRED = ("data.prefixes",)
_DEFAULTS = {"model.shape": "none; the sizes of the model are then required"}

COMMAND = CommandHelp(
    "train",
    """Train the model that a TOML file describes. Options here take precedence over the file.

    Use --nproc for several processes on one machine, and scripts/torchrun.sh for several machines.
    'ee-llm init' writes a file to start from.""",
    groups=run_groups(_SECTIONS),
    examples=(
        "ee-llm train --config train.toml --nproc 2",
        "ee-llm train --config train.toml --training.steps 1000 --exits.boundaries 2,4",
        "ee-llm train --model.shape llama-tiny --data.prefixes data/corpus --output runs/first",
    ),
    required_title="Required, here or in the file",
    usage="[--config FILE] [OPTIONS]",
)


def run_train(arguments: list[str]) -> None:
    """Run `ee-llm train`; raises ConfigError for a run that cannot succeed."""
    shown = config_options(_DEFAULTS, _REQUIRED, _HIDDEN)
    options = parse_run(COMMAND, arguments, config_options(), shown)
    config = load_config(options.config, options.overrides)
    if config.is_tuning:
        raise ConfigError(
            f"tuning.checkpoint = {config.tuning.checkpoint} is for 'ee-llm tune', which trains "
            "exits only. To train the whole model from a checkpoint, set checkpoint.initial."
        )
    run(config, "train", options.nproc, arguments)
