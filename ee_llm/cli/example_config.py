"""Write an example configuration with a comment for each option."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ee_llm.config import toml
from ee_llm.config.base import Section
from ee_llm.config.config import section_types
from ee_llm.config.loading import load_config

COMMON: dict[str, tuple[str, ...]] = {
    "model": ("shape", "vocab_size", "max_seq_length"),
    "exits": ("boundaries", "head", "output", "weights"),
    "parallel": ("pipeline", "tensor"),
    "data": ("prefixes", "tokenizer", "seq_length"),
    "optimizer": ("lr", "min_lr", "warmup_steps"),
    "training": ("steps", "global_batch_size", "micro_batch_size", "dtype", "eval_interval"),
    "tuning": ("checkpoint", "exits"),
    "checkpoint": ("interval", "keep_last", "resume"),
    "logging": ("interval", "tensorboard"),
}
"""The options of each section that most runs set. The example and the short help show these."""

_WIDTH = 100  # characters in a line
_HEADING = """\
# Configuration of a training run.
#
# Show the pipeline schedule:  ee-llm plan --config {path}
# Train:                       ee-llm train --config {path} --nproc {nproc}
# List all options:            ee-llm train --help-all
#
# Options on the command line take precedence, as in --training.steps 1000. A line such as
# "# tensor = 1" shows a default.
"""


def example_config(path: str, shape: str, exits: Sequence[int] | None = None) -> str:
    """Return the text of an example configuration, which `load_config` reads.

    Args:
        path: The path of the file, which the comments mention.
        shape: The name of a ready-made shape, such as llama-tiny.
        exits: The boundaries of the early exits. None is after a quarter and half of the layers.

    Raises:
        ConfigError: The shape does not exist, or an exit is not at a boundary inside the model.
    """
    num_layers = load_config(None, {"model.shape": shape}).model.num_layers
    if exits is None:
        exits = (num_layers // 4, num_layers // 2)
    values: dict[str, object] = {
        "output": "runs/first",
        "model.shape": shape,
        "exits.boundaries": tuple(exits),
        "parallel.pipeline": 2,
        "data.prefixes": ("data/corpus",),
        "data.tokenizer": "data/tokenizer.model",
        "training.steps": 200,
    }
    config = load_config(None, values)
    values |= {"model.vocab_size": config.model.vocab_size, "exits.weights": config.exits.weights}
    parts = [_HEADING.format(path=path, nproc=config.parallel.pipeline)]
    parts += _options(config, "", ("output",), values)
    for section, names in COMMON.items():
        if section == "tuning":  # used only by 'ee-llm tune'
            continue
        title = " ".join((section_types()[section].__doc__ or "").split())
        first, *others = _options(getattr(config, section), f"{section}.", names, values)
        parts += [f"# {title}\n[{section}]\n{first}", *others]
    return "\n".join(parts)


def _options(
    section: Section, prefix: str, names: Iterable[str], values: Mapping[str, object]
) -> Iterator[str]:
    """Yield the comment and the value, or the default as a comment, of each option."""
    for name in names:
        text = textwrap.fill(
            type(section).model_fields[name].description or "",
            _WIDTH,
            initial_indent="# ",
            subsequent_indent="# ",
            break_on_hyphens=False,
        )
        mark = "" if prefix + name in values else "# "
        yield f"{text}\n{mark}{name} = {toml.notation(getattr(section, name))}\n"
