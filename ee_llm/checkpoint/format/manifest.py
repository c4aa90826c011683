"""The manifest of a checkpoint: its files, their sizes and checksums, and facts about the run."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from ee_llm.checkpoint.directory import FORMAT, MANIFEST, VERSION
from ee_llm.checkpoint.format.checksums import RANGE_PATTERN, is_sealed, parse_range
from ee_llm.checkpoint.format.json_content import StrictModel, parse_json, validate
from ee_llm.checkpoint.format.safe import is_plain_name
from ee_llm.errors import CheckpointError

Count = Annotated[int, Field(ge=0)]
RangeText = Annotated[str, Field(pattern=RANGE_PATTERN)]


class _Layout(StrictModel):
    """The sizes of the parallel layout that saved the checkpoint. Older versions state fewer."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Count]

    world: Count


class _Mean(StrictModel):
    step: Count


class _Facts(StrictModel):
    """The entries that other modules rely on. A manifest may have more."""

    files: dict[str, Count]
    crc32: dict[str, list[RangeText]] | None = None
    tokenizer: str
    optimizer_steps: Count
    layout: _Layout
    mean_of: list[_Mean] = Field(default_factory=list)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking the size of every file.

    Raises CheckpointError naming the file that is missing, truncated, damaged or foreign.
    """
    manifest = parse_manifest(checkpoint)
    for name, size in manifest["files"].items():
        if problem := size_problem(checkpoint / name, size):
            raise CheckpointError(problem)
    return manifest


def parse_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint without checking the files that it names.

    Raises CheckpointError if it is missing, damaged or foreign.
    """
    path = checkpoint / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: expected a JSON object in it") from None
    manifest = parse_json(content, path)
    version = manifest.get("version")
    # A single damaged byte must not make a manifest with checksums pass for one of version 1.
    if (version == VERSION or {"crc32", "checksum"} & manifest.keys()) and not is_sealed(content):
        raise CheckpointError(
            f"{path} is damaged or was edited: its content does not match its checksum. Restore it "
            "from a copy, or use another checkpoint."
        )
    if manifest.get("format") != FORMAT or version not in (1, VERSION):
        found = f"{manifest.get('format')!r} version {version!r}"
        raise CheckpointError(f"{path}: expected {FORMAT!r} version 1 or {VERSION}, found {found}")
    facts = validate(_Facts, manifest, path)
    for name in facts.files:
        if not all(is_plain_name(part) for part in name.split("/")):
            raise CheckpointError(f"{path} names {name!r}, outside the checkpoint's directory")
    if version == VERSION and facts.files != _covered(facts):
        raise CheckpointError(f"{path}: its checksums (crc32) do not cover its files")
    return manifest


def size_problem(file: Path, size: int) -> str | None:
    """Return what is wrong with a file that should have `size` bytes, or None."""
    if not file.is_file():
        return f"{file} is missing: expected {size} bytes"
    if (found := file.stat().st_size) < size:
        return f"{file} is truncated: expected {size} bytes, found {found}"
    return f"{file} is too long: expected {size} bytes, found {found}" if found > size else None


def _covered(facts: _Facts) -> dict[str, int]:
    """Return the number of bytes of each file that its checksums cover."""
    return {
        name: sum(parse_range(text).num_bytes for text in texts)
        for name, texts in (facts.crc32 or {}).items()
    }
