"""`ee-llm tune`: train exits of an existing model, with all other parameters frozen."""

from ee_llm.cli.arguments.help import CommandHelp
from ee_llm.cli.run_options import config_options, parse_run, run, run_groups
from ee_llm.config.tuning import DEFAULT_SEQ_LENGTH

_SECTIONS = (
    *("tuning", "exits", "data", "training", "optimizer", "parallel"),
    *("checkpoint", "logging", "deepspeed"),
)
# Tuning refuses these options, or the checkpoint determines them.
_HIDDEN = (
    *("model", "layer_dropout", "parallel.virtual", "parallel.schedule", "parallel.fill_warmup"),
    *("parallel.fill_cooldown", "parallel.forward_over_backward", "checkpoint.initial"),
    *("exits.norm", "exits.weighting", "exits.depth_scale", "exits.curriculum"),
    "exits.rotation_interval",
)
_REQUIRED = ("tuning.checkpoint", "data.prefixes")
_DEFAULTS = {
    "exits.boundaries": "those of the checkpoint; required if it has none",
    "exits.head": 'those of the checkpoint, else ["norm"]',
    "exits.output": 'that of the checkpoint, else "shared"',
    "data.tokenizer": "the checkpoint's own",
    "data.eos_token": "the checkpoint's own",
    "data.seq_length": f"the model's context, but at most {DEFAULT_SEQ_LENGTH}",
}

COMMAND = CommandHelp(
    "tune",
    """Train exits of an existing model, with all other parameters frozen (EE-Tuning).

    The options come from a TOML file, from the command line, or both; the command line takes
    precedence. The checkpoint determines the model. Use --nproc for several processes on one
    machine, and COMMAND=tune scripts/torchrun.sh for several machines.""",
    groups=run_groups(_SECTIONS),
    examples=(
        "ee-llm tune --tuning.checkpoint runs/llama --data.prefixes data/corpus "
        "--output runs/tuned",
        "ee-llm tune --config tune.toml --exits.boundaries 8 16 --nproc 2",
    ),
    required_title="Required, here or in the file",
    usage="[--config FILE] [OPTIONS]",
)


def run_tune(arguments: list[str]) -> None:
    """Run `ee-llm tune`; raises ConfigError for a run that cannot succeed."""
    shown = config_options(_DEFAULTS, _REQUIRED, _HIDDEN)
    options = parse_run(COMMAND, arguments, config_options(_DEFAULTS), shown)
    from ee_llm.training.start import load_tuning_config

    config = load_tuning_config(options.config, options.overrides)
    run(config, "tune", options.nproc, arguments)
