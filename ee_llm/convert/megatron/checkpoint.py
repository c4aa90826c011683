"""A model of Megatron-LM's or EE-LLM's as one of ours."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ee_llm.architecture.tensor_parallel import TensorSplit
from ee_llm.checkpoint.format import safe
from ee_llm.config import Config, ModelConfig
from ee_llm.convert.huggingface.tables import Fusion, Row, copied_exits
from ee_llm.convert.megatron.arguments import exit_layers, read_exits, read_model
from ee_llm.convert.megatron.distributed import Distributed
from ee_llm.convert.megatron.ranks import Merged, Ranks, find_rank_directories
from ee_llm.convert.megatron.tables import TABLE, WORDS, layout_of
from ee_llm.convert.source import (
    Origin,
    Source,
    Tensors,
    fitting_tokenizer,
    prove,
    training_options,
)
from ee_llm.convert.values import SettingsError, check_layers, flag
from ee_llm.errors import CheckpointError, ConfigError

TRACKER = "latest_checkpointed_iteration.txt"
"""The file that says which of a run's checkpoints is the newest."""

_ROUNDED_ANGLES = (
    "the model was trained with --bf16, where EE-LLM computes rotary angles in bfloat16, and here "
    "they are computed in float32. Logits differ from EE-LLM's own by about 2 % of the largest "
    "over 128 tokens, and by half of the largest over 1,000. Train or tune the model further "
    "before it is used on long texts"
)

_TIE = ("untie_embeddings_and_output_weights", "False", "True")


def is_megatron(path: Path) -> bool:
    """Return whether a directory is a run or a checkpoint of Megatron-LM's."""
    return (path / TRACKER).is_file() or _is_distributed(path) or bool(find_rank_directories(path))


def open_megatron(
    path: Path, new_exits: Mapping[str, Any] | None = None, tokenizer: str | None = None
) -> Source:
    """Return the model in a run's or a checkpoint's directory, after proving that it is one.

    `new_exits`: options of `exits` to make of the model's own parts. `tokenizer` is as in
    `data.tokenizer`. Raises CheckpointError naming the file, the key and what was expected.
    """
    directory = _newest(path)
    opened = Distributed(directory) if _is_distributed(directory) else Ranks(directory)
    where = f"the arguments in {opened.arguments_file}"
    try:
        model, notes = read_model(opened.arguments)
        exits = _exits(opened.arguments, model["num_layers"], new_exits)
        given: dict[str, Any] = {"model": model, "exits": exits}
        config = Config(**given)
        layers = exit_layers(opened.arguments)
        if isinstance(opened, Ranks):
            opened.open(layers)
        found = opened.pieces if isinstance(opened, Ranks) else opened.specs
        check_layers("num_layers", model["num_layers"], len(found))
        rows, splits = layout_of(config, layers, opened.is_core)
        tensors = _tensors(opened, splits, config.model)
        given["training"] = training_options(tensors, TABLE)
        config = Config(**given)
    except (SettingsError, ConfigError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    rows = _cut(rows, config, opened.arguments["padded_vocab_size"])
    if new_exits is not None:
        rows = copied_exits(rows, config)
    origin = Origin(config.model.family, where, "the vocabulary", _TIE)
    name = _tokenizer(opened.arguments, origin, config, tokenizer, notes)
    notes.append(
        f"iteration {opened.iteration}: the weights alone were converted, not the states of the "
        "optimizer and of random generators"
    )
    is_rounded = flag(opened.arguments, "bf16") and config.model.position == "rope"
    if is_rounded and isinstance(opened, Ranks) and not opened.is_core:
        notes.append(_ROUNDED_ANGLES)
    if any(temperature != 1 for temperature in config.exits.temperatures):
        notes.append("exits.temperatures are those of training; EE-LLM's inference has none")
    return prove(Source(tensors, origin, config, rows, {}, name, notes), TABLE)


def find_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints in a run's directory, whatever its tracker says."""
    children = sorted([*path.glob("iter_*"), *path.glob("release")])
    return [path for path in children if _is_distributed(path) or find_rank_directories(path)]


def _is_distributed(path: Path) -> bool:
    return (path / safe.METADATA).is_file() and (path / safe.COMMON).is_file()


def _newest(path: Path) -> Path:
    """Return the checkpoint that a run's directory says is the newest, or the one that it is."""
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    said = tracker.read_bytes()[:100].decode(errors="replace").strip()
    if said != "release" and not (said.isascii() and said.isdigit()):
        raise CheckpointError(f"{tracker}: {said!r} is no iteration; expected a number or release")
    directory = path / (said if said == "release" else f"iter_{int(said):07d}")
    if not _is_distributed(directory) and not find_rank_directories(directory):
        raise CheckpointError(
            f"{directory} holds no checkpoint, and {tracker} says so: expected directories "
            f"mp_rank_00.., or the files {safe.METADATA} and {safe.COMMON}"
        )
    return directory


def _exits(
    arguments: Mapping[str, Any], num_layers: int, new: Mapping[str, Any] | None
) -> dict[str, Any]:
    found = read_exits(arguments, num_layers)
    if new is None:
        return found
    if found:
        raise SettingsError(
            f"the model has exits at {found['boundaries']} already; leave out --exits"
        )
    return dict(new)


def _tensors(
    opened: Distributed | Ranks, splits: Mapping[str, TensorSplit | None], model: ModelConfig
) -> Tensors:
    if isinstance(opened, Distributed):
        return opened
    if opened.copies and not model.tie_embeddings:
        piece = opened.copies[0][0]
        raise CheckpointError(
            f"{piece.archive.path}: {piece.key} is a copy of the word embedding for an output "
            f"that is tied to it, but {_TIE[0]} is {_TIE[2]} in {opened.arguments_file}"
        )
    merged = Merged(opened, splits, model)
    merged.check_copies(WORDS)
    return merged


def _cut(rows: dict[str, Row], config: Config, padded: int) -> dict[str, Row]:
    """Return the rows without what embeddings and output weights are padded with."""

    def join(model: ModelConfig, parts: Sequence[Tensor]) -> Tensor:
        return parts[0][: model.vocab_size]

    def split(_: ModelConfig, ours: Tensor) -> list[Tensor]:
        return [ours.new_empty(padded, ours.shape[1])]

    return {
        name: row._replace(fusion=Fusion(join, split))
        if name.endswith(("embedding.word.weight", "output.weight"))
        else row
        for name, row in rows.items()
    }


def _tokenizer(
    arguments: Mapping[str, Any],
    origin: Origin,
    config: Config,
    given: str | None,
    notes: list[str],
) -> str:
    if given is None:
        names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
        said = ", ".join(f"{name} = {arguments[name]!r}" for name in names if arguments.get(name))
        raise CheckpointError(
            f"{origin.settings} name a tokenizer, which is no part of the checkpoint"
            f"{f' ({said})' if said else ''}; give its path with --tokenizer, or 'bytes'"
        )
    return fitting_tokenizer(given, config, origin, notes)
