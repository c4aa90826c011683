"""What a checkpoint's manifest states: its files, their sizes and checksums, facts of the run."""

import reprlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ee_llm.checkpoint.directory import FORMAT, MANIFEST, VERSION, parse_json
from ee_llm.checkpoint.format.checksums import RANGE_PATTERN, is_sealed, parse_range
from ee_llm.checkpoint.format.safe import is_plain_name
from ee_llm.errors import CheckpointError

Count = Annotated[int, Field(ge=0)]
RangeText = Annotated[str, Field(pattern=RANGE_PATTERN)]


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
    crc32: dict[str, list[RangeText]] | None = None
    tokenizer: str
    optimizer_steps: Count
    layout: _Layout
    mean_of: list[_Mean] = []


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after comparing the size of every file with it.

    Raises CheckpointError naming the file that is missing, truncated, damaged or foreign.
    """
    manifest = parse_manifest(checkpoint)
    for name, size in manifest["files"].items():
        if problem := size_problem(checkpoint / name, size):
            raise CheckpointError(problem)
    return manifest


def parse_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint without looking at the files that it names.

    Raises CheckpointError if it is missing, damaged or foreign.
    """
    path = checkpoint / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: expected a JSON object in it") from None
    manifest = parse_json(content, path)
    version = manifest.get("version")
    # No single damaged byte makes one that has checksums look like one from before there were any.
    if (version == VERSION or {"crc32", "checksum"} & manifest.keys()) and not is_sealed(content):
        raise CheckpointError(
            f"{path} is damaged, or was edited: it does not have the checksum that it states; "
            "restore it from a copy, or use another checkpoint"
        )
    if manifest.get("format") != FORMAT or version not in (1, VERSION):
        found = f"{manifest.get('format')!r} version {version!r}"
        raise CheckpointError(f"{path}: expected {FORMAT!r} version 1 or {VERSION}, found {found}")
    try:
        facts = _Facts.model_validate(manifest, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        found = "" if first["type"] == "missing" else f", found {reprlib.repr(first['input'])}"
        raise CheckpointError(f"{path}: {name}: {first['msg']}{found}") from None
    for name in facts.files:
        if not all(is_plain_name(part) for part in name.split("/")):
            raise CheckpointError(f"{path} names {name!r}, outside of the checkpoint's directory")
    if version == VERSION and facts.files != _covered(facts):
        raise CheckpointError(f"{path}: its checksums (crc32) do not cover its files")
    return manifest


def size_problem(file: Path, size: int) -> str | None:
    """Return what is wrong with a file that should have `size` bytes, None if nothing is."""
    if not file.is_file():
        return f"{file} is missing: expected {size} bytes"
    if (found := file.stat().st_size) < size:
        return f"{file} is truncated: expected {size} bytes, found {found}"
    return f"{file} is too long: expected {size} bytes, found {found}" if found > size else None


def _covered(facts: _Facts) -> dict[str, int]:
    """Return how many bytes of each file have a checksum."""
    return {
        name: sum(parse_range(text).num_bytes for text in texts)
        for name, texts in (facts.crc32 or {}).items()
    }
