"""What a checkpoint's manifest says: its files and their sizes, and facts of the run."""

import reprlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ee_llm.checkpoint.directory import FORMAT, MANIFEST, VERSION, read_json
from ee_llm.checkpoint.safe import CheckpointError, is_plain_name

Count = Annotated[int, Field(ge=0)]


class _Layout(BaseModel):
    """The sizes of the parallel layout that saved, of which older versions state fewer."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Count]

    world: Count


class _Mean(BaseModel):
    step: Count


class _Facts(BaseModel):
    """What others rely on; a manifest may say more."""

    files: dict[str, Count]
    tokenizer: str
    optimizer_steps: Count
    layout: _Layout
    mean_of: list[_Mean] = []


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after comparing every file's size with it.

    Raises CheckpointError naming the file that is missing, truncated or foreign.
    """
    path = checkpoint / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"{manifest.get('format')!r} version {manifest.get('version')!r}"
        raise CheckpointError(f"{path}: expected {FORMAT!r} version {VERSION}, found {found}")
    try:
        _Facts.model_validate(manifest, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        found = "" if first["type"] == "missing" else f", found {reprlib.repr(first['input'])}"
        raise CheckpointError(f"{path}: {name}: {first['msg']}{found}") from None
    for name, size in manifest["files"].items():
        if not all(is_plain_name(part) for part in name.split("/")):
            raise CheckpointError(f"{path} names {name!r}, outside of the checkpoint's directory")
        file = checkpoint / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: expected {size} bytes")
        if (found_size := file.stat().st_size) != size:
            raise CheckpointError(f"{file} is truncated: expected {size} bytes, found {found_size}")
    return manifest
