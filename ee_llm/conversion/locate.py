"""Finds the kind of the model to convert, and makes it available as a local folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ee_llm.checkpoint import directory
from ee_llm.conversion.huggingface.folder import INDEX, PICKLES, SETTINGS, SINGLE
from ee_llm.conversion.huggingface.gguf import dequantized, is_gguf
from ee_llm.conversion.huggingface.hub import download, is_hub_id
from ee_llm.conversion.megatron.checkpoint import TRACKER, find_checkpoints, is_megatron
from ee_llm.conversion.options import ConvertOptions
from ee_llm.errors import CheckpointError

HUGGING_FACE = "a Hugging Face model"
GGUF = "a GGUF file"
HUB = "a model of the Hugging Face Hub"
MEGATRON = "a Megatron-LM model"
OURS = "an ee-llm checkpoint"


def find_kind(source: Path) -> str:
    """Return the kind of a source; raises CheckpointError naming the expected files."""
    if not source.exists():
        if is_hub_id(str(source)):
            return HUB
        raise CheckpointError(
            f"{source} does not exist: expected a folder with {SETTINGS}, a GGUF file, the id of a "
            "model on the Hugging Face Hub, a run of Megatron-LM or EE-LLM, or a checkpoint of "
            "ee-llm"
        )
    if source.is_file():
        if is_gguf(source):
            return GGUF
        raise CheckpointError(
            f"{source} is not a GGUF file. Pass a GGUF file, or the folder of a model such as "
            f"{source.parent}."
        )
    if _is_ours(source):
        return OURS
    if is_megatron(source):
        return MEGATRON
    if any((source / name).is_file() for name in (SETTINGS, SINGLE, INDEX)):
        return HUGGING_FACE
    raise CheckpointError(f"{source} has no model: {_missing(source)}")


class Local(NamedTuple):
    """A directory with the model, and notes on its origin."""

    folder: Path
    notes: list[str]


@contextmanager
def local_folder(options: ConvertOptions, kind: str) -> Iterator[Local]:
    """Yield the folder to read: the source, the Hub's cache, or a dequantized GGUF file."""
    if kind == HUB:
        folder = download(str(options.source), options.revision)
        yield Local(folder, [f"{options.source} is at revision {folder.name} of the Hub"])
    elif kind == GGUF:
        directory.refuse_used(options.output)
        with dequantized(options.source, options.output.parent, options.dtype) as folder:
            yield Local(folder, [])
    else:
        yield Local(options.source, [])


def _is_ours(source: Path) -> bool:
    names = (directory.MANIFEST, directory.CHECKPOINTS, directory.LATEST)
    return any((source / name).exists() for name in names) or bool(directory.complete_steps(source))


def _missing(source: Path) -> str:
    """Return the expected files, or advice about the files that were found instead."""
    if checkpoints := find_checkpoints(source):
        return (
            f"{TRACKER}, which names the newest checkpoint of a Megatron-LM run, is missing. Pass "
            f"one of its checkpoints, such as {checkpoints[-1]}."
        )
    if files := sorted(source.glob("*.gguf")):
        return f"it has GGUF files. Pass one of them, such as {files[0]}."
    if pickles := sorted(file for kind in PICKLES for file in source.glob(kind)):
        return (
            f"{pickles[0].name} is a pickle, and there is no {SETTINGS}. Save the model with "
            "transformers' save_pretrained."
        )
    found = "The folder is empty." if not any(source.iterdir()) else "Found none of them."
    return (
        f"expected {SETTINGS} and {SINGLE} or {INDEX} (Hugging Face), {TRACKER} or mp_rank_00 "
        f"(Megatron-LM), or {directory.MANIFEST} or {directory.CHECKPOINTS}/ (ee-llm). {found}"
    )
