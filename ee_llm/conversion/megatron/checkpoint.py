"""Opens a checkpoint of Megatron-LM or EE-LLM for conversion."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ee_llm.architecture.tensor_parallel import TensorSplit
from ee_llm.checkpoint.format import safe
from ee_llm.config import Config, ModelConfig
from ee_llm.conversion.huggingface.tables import Fusion, Row, copied_exits
from ee_llm.conversion.megatron.arguments import exit_layers, read_exits, read_model
from ee_llm.conversion.megatron.distributed import DistributedCheckpoint
from ee_llm.conversion.megatron.ranks import MergedTensors, RankFiles, find_rank_directories
from ee_llm.conversion.megatron.tables import TABLE, WORDS, build_layout
from ee_llm.conversion.source import (
    Origin,
    Source,
    Tensors,
    check_tensors,
    check_tokenizer,
    training_options,
)
from ee_llm.conversion.values import SettingsError, check_layers, flag
from ee_llm.errors import CheckpointError, ConfigError

TRACKER = "latest_checkpointed_iteration.txt"
"""The file that names the newest checkpoint of a run."""

_ROUNDED_ANGLES = (
    "The model was trained with --bf16, for which EE-LLM computes rotary angles in bfloat16. "
    "ee-llm computes them in float32. Logits differ from those of EE-LLM by about 2 % of the "
    "largest over 128 tokens, and by half of the largest over 1,000. Train or tune the model "
    "further before you use it on long texts."
)

_TIE = ("untie_embeddings_and_output_weights", "False", "True")


def is_megatron(path: Path) -> bool:
    """Return whether a directory is a run or a checkpoint of Megatron-LM."""
    return (path / TRACKER).is_file() or _is_distributed(path) or bool(find_rank_directories(path))


def open_megatron(
    path: Path, new_exits: Mapping[str, Any] | None = None, tokenizer: str | None = None
) -> Source:
    """Open the model in the directory of a run or a checkpoint, and check its tensors.

    Args:
        path: The directory.
        new_exits: Options of `exits` to add as copies of the model's own parts.
        tokenizer: A value of `data.tokenizer`.

    Raises:
        CheckpointError: Names the file, the key and what was expected.
    """
    directory = _newest(path)
    opened = (
        DistributedCheckpoint(directory) if _is_distributed(directory) else RankFiles(directory)
    )
    where = f"the arguments in {opened.arguments_file}"
    try:
        model, notes = read_model(opened.arguments)
        exits = _exits(opened.arguments, model["num_layers"], new_exits)
        given: dict[str, Any] = {"model": model, "exits": exits}
        config = Config(**given)
        layers = exit_layers(opened.arguments)
        if isinstance(opened, RankFiles):
            opened.open(layers)
        found = opened.pieces if isinstance(opened, RankFiles) else opened.specs
        check_layers("num_layers", model["num_layers"], len(found))
        rows, splits = build_layout(config, layers, opened.is_core)
        tensors = _tensors(opened, splits, config.model)
        given["training"] = training_options(tensors, TABLE)
        config = Config(**given)
    except (SettingsError, ConfigError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    rows = _without_padding(rows, config, opened.arguments["padded_vocab_size"])
    if new_exits is not None:
        rows = copied_exits(rows, config)
    origin = Origin(config.model.family, where, "the vocabulary", _TIE)
    name = _tokenizer(opened.arguments, origin, config, tokenizer, notes)
    notes.append(
        f"Only the weights of iteration {opened.iteration} were converted, not the states of the "
        "optimizer and of random generators."
    )
    is_rounded = flag(opened.arguments, "bf16") and config.model.position == "rope"
    if is_rounded and isinstance(opened, RankFiles) and not opened.is_core:
        notes.append(_ROUNDED_ANGLES)
    if any(temperature != 1 for temperature in config.exits.temperatures):
        notes.append(
            "exits.temperatures are those of training. EE-LLM does not use them at inference."
        )
    return check_tensors(Source(tensors, origin, config, rows, {}, name, notes), TABLE)


def find_checkpoints(path: Path) -> list[Path]:
    """Return all checkpoints in the directory of a run, without using its tracker."""
    children = sorted([*path.glob("iter_*"), *path.glob("release")])
    return [path for path in children if _is_distributed(path) or find_rank_directories(path)]


def _is_distributed(path: Path) -> bool:
    return (path / safe.METADATA).is_file() and (path / safe.COMMON).is_file()


def _newest(path: Path) -> Path:
    """Return the newest checkpoint of a run, or `path` if it is a checkpoint."""
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    text = tracker.read_bytes()[:100].decode(errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdigit()):
        raise CheckpointError(f"{tracker}: expected a number or 'release', found {text!r}")
    directory = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not _is_distributed(directory) and not find_rank_directories(directory):
        raise CheckpointError(
            f"{directory}, which {tracker} names, has no checkpoint: expected directories "
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
            f"the model already has exits at {found['boundaries']}. Remove --exits."
        )
    return dict(new)


def _tensors(
    opened: DistributedCheckpoint | RankFiles,
    splits: Mapping[str, TensorSplit | None],
    model: ModelConfig,
) -> Tensors:
    if isinstance(opened, DistributedCheckpoint):
        return opened
    if opened.copies and not model.tie_embeddings:
        piece = opened.copies[0][0]
        raise CheckpointError(
            f"{piece.archive.path}: {piece.key} is a copy of the word embedding for a tied output, "
            f"but {_TIE[0]} is {_TIE[2]} in {opened.arguments_file}"
        )
    merged = MergedTensors(opened, splits, model)
    merged.check_copies(WORDS)
    return merged


def _without_padding(rows: dict[str, Row], config: Config, padded: int) -> dict[str, Row]:
    """Return the rows, without the padding of embeddings and output weights."""

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
        stated = ", ".join(f"{n} = {arguments[n]!r}" for n in names if arguments.get(n))
        raise CheckpointError(
            f"the checkpoint does not contain the tokenizer that {origin.settings} name"
            f"{f' ({stated})' if stated else ''}. Pass its path, or 'bytes', with --tokenizer."
        )
    return check_tokenizer(given, config, origin, notes)
