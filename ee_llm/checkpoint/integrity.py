"""Verification of a whole checkpoint: finds every damaged, missing or unknown file."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.format import safe
from ee_llm.checkpoint.format.checksums import Checksums
from ee_llm.checkpoint.format.manifest import parse_manifest, size_problem
from ee_llm.checkpoint.gates import GATES, read_gates
from ee_llm.checkpoint.read import TensorReader
from ee_llm.errors import CheckpointError


@dataclass
class Report:
    """The result of `verify`."""

    path: Path
    """The checkpoint."""
    num_files: int
    num_bytes: int
    """Number and total size of the files that the manifest names."""
    has_checksums: bool
    """Whether the manifest has checksums. Without them only those of tensors can be verified."""
    problems: list[str] = field(default_factory=list)
    """One sentence about each file that is wrong, naming the file."""
    extra: list[str] = field(default_factory=list)
    """Names of files that do not belong to the checkpoint. They are never read."""


def size_of(path: str | Path) -> int:
    """Return the number of bytes that `verify` reads; raises CheckpointError."""
    return sum(parse_manifest(directory.resolve_checkpoint(path))["files"].values())


def verify(path: str | Path, on_bytes: Callable[[int], None] = lambda _: None) -> Report:
    """Compare every byte of a checkpoint, or of the newest one of a run, with its checksum.

    `on_bytes` is called with the number of bytes read since the previous call. Raises
    CheckpointError if the manifest is missing, damaged or foreign, because the expected files are
    then unknown.
    """
    checkpoint = directory.resolve_checkpoint(path)
    manifest = parse_manifest(checkpoint)
    files: dict[str, int] = manifest["files"]
    checksums = Checksums(checkpoint, manifest.get("crc32"))
    report = Report(checkpoint, len(files), sum(files.values()), checksums.exist)
    for name, size in files.items():
        try:
            if problem := size_problem(checkpoint / name, size):
                raise CheckpointError(problem)
            if checksums.exist:
                checksums.check_file(name, on_bytes)
        except (CheckpointError, OSError) as error:
            report.problems.append(str(error))
    if not report.problems:
        report.problems.extend(_inconsistencies(checkpoint, checksums.exist, on_bytes))
    report.extra = sorted(
        name
        for file in checkpoint.rglob("*")
        if not file.is_dir()
        and (name := file.relative_to(checkpoint).as_posix()) not in files
        and name not in (directory.MANIFEST, GATES)
    )
    if not report.problems:
        try:
            read_gates(TensorReader(checkpoint))
        except CheckpointError as error:
            report.problems.append(str(error))
    return report


def _inconsistencies(
    checkpoint: Path, has_checksums: bool, on_bytes: Callable[[int], None]
) -> Iterator[str]:
    """Yield what is wrong with files whose sizes and checksums, if any, are correct."""
    try:
        reader = TensorReader(checkpoint)
        safe.check_common(checkpoint / directory.TENSORS)
    except (CheckpointError, OSError) as error:
        yield str(error)
        return
    for part in (reader.config, reader.state, reader.tokenizer):
        try:
            part()
        except (ValueError, OSError) as error:
            yield str(error)
    if has_checksums:
        return
    seen = set()
    for name in (*reader.names(), *reader.names(optimizer=True)):
        try:
            reader.check_tensor(name, on_bytes)
        except (CheckpointError, OSError) as error:
            if str(error) not in seen:
                seen.add(str(error))
                yield str(error)
