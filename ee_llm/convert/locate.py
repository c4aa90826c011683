"""Where the model to convert is, and what kind of model it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ee_llm.checkpoint import directory
from ee_llm.convert.huggingface.folder import INDEX, PICKLES, SETTINGS, SINGLE
from ee_llm.convert.huggingface.gguf import dequantized, is_gguf
from ee_llm.convert.huggingface.hub import download, is_hub_id
from ee_llm.convert.megatron.checkpoint import TRACKER, find_checkpoints, is_megatron
from ee_llm.convert.options import ConvertOptions
from ee_llm.errors import CheckpointError

HUGGING_FACE = "a Hugging Face model"
GGUF = "a GGUF file"
HUB = "a model of the Hugging Face hub"
MEGATRON = "a Megatron-LM model"
OURS = "an ee-llm checkpoint"


def find_kind(source: Path) -> str:
    """Return what a source is, by what lies there; raises CheckpointError naming what was tried."""
    if not source.exists():
        if is_hub_id(str(source)):
            return HUB
        raise CheckpointError(
            f"{source} does not exist: expected a folder with {SETTINGS}, a GGUF file, the id of a "
            "model on the Hugging Face hub, a run of Megatron-LM or EE-LLM, or a checkpoint of "
            "ee-llm"
        )
    if source.is_file():
        if is_gguf(source):
            return GGUF
        raise CheckpointError(
            f"{source} is a file, and no GGUF file; give the folder that it is in: {source.parent}"
        )
    if _is_ours(source):
        return OURS
    if is_megatron(source):
        return MEGATRON
    if any((source / name).is_file() for name in (SETTINGS, SINGLE, INDEX)):
        return HUGGING_FACE
    raise CheckpointError(f"{source} holds no model: {_missing(source)}")


class Local(NamedTuple):
    """A directory with the model, and remarks on where it comes from."""

    folder: Path
    notes: list[str]


@contextmanager
def local_folder(options: ConvertOptions, kind: str) -> Iterator[Local]:
    """Yield the directory to read: the source, the hub's cache, or one made of a GGUF file."""
    if kind == HUB:
        folder = download(str(options.source), options.revision)
        yield Local(folder, [f"{options.source} is at revision {folder.name} of the hub"])
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
    """Return what was looked for, and what to do about what lies there instead."""
    if there := find_checkpoints(source):
        return (
            f"{TRACKER} is missing, which names the newest checkpoint of a run of Megatron-LM; "
            f"give one of its checkpoints, such as {there[-1]}"
        )
    if files := sorted(source.glob("*.gguf")):
        return f"give the path of a GGUF file in it, such as {files[0]}"
    if pickles := sorted(file for kind in PICKLES for file in source.glob(kind)):
        return (
            f"{pickles[0].name} is a pickle, and there is no {SETTINGS}; save the model with "
            "transformers' save_pretrained"
        )
    found = "it is empty" if not any(source.iterdir()) else "found none of them"
    return (
        f"looked for {SETTINGS} and {SINGLE} or {INDEX} (Hugging Face), {TRACKER} or mp_rank_00 "
        f"(Megatron-LM), {directory.MANIFEST} or {directory.CHECKPOINTS}/ (ee-llm); {found}"
    )
