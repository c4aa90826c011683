"""The directory layout of a run's checkpoints, and atomic publication of a checkpoint.

{output}/checkpoints/step-00000100/          a complete checkpoint
{output}/checkpoints/step-00000200.partial/  being written, or left behind by a run that died
{output}/checkpoints/latest                  the name of the newest complete checkpoint
"""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ee_llm.atomic_file import replace_text, sync_path
from ee_llm.checkpoint.format.checksums import checksums_of, parse_range, sealed
from ee_llm.errors import CheckpointError

CHECKPOINTS = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
TENSORS = "tensors"
FORMAT = "ee_llm checkpoint"
VERSION = 2
"""Version 1 had no checksums. It can still be read."""
_PARTIAL = ".partial"
_REPLACED = ".replaced" + _PARTIAL
_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Return the directory name of the checkpoint of `step`."""
    return f"step-{step:08d}"


def check_output(output: str | Path) -> None:
    """Create the run directory `output`; raise CheckpointError if it is not writable."""
    path = Path(output)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # A unique name, because processes on several machines check at the same time.
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"x")
    except OSError as error:
        raise CheckpointError(
            f"output: the directory {str(path)!r} cannot be written to ({error.strerror}). Choose "
            "another one with --output, or correct its permissions."
        ) from error


def refuse_used(output: str | Path) -> None:
    """Raise CheckpointError if a run directory already has a checkpoint."""
    if existing := complete_steps(Path(output) / CHECKPOINTS):
        raise CheckpointError(f"{existing[-1]} already exists. Choose another --output.")


def complete_steps(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints in a run's `checkpoints` directory, lowest step first."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if _is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _is_complete(path: Path) -> bool:
    return bool(_STEP.fullmatch(path.name)) and _is_sealed(path)


def _is_sealed(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def _replaced(final: Path) -> Path:
    """Return the temporary path of a checkpoint while another one replaces it."""
    return final.with_name(final.name + _REPLACED)


def find_latest(output: str | Path) -> Path | None:
    """Return the newest complete checkpoint of the run directory `output`, or None.

    If a run died while it replaced a checkpoint, the old one is still complete under its temporary
    name and is returned. Raises CheckpointError if `latest` names a checkpoint that does not exist.
    """
    checkpoints = Path(output) / CHECKPOINTS
    pointer = checkpoints / LATEST
    if not pointer.is_file():
        # A run that died before it first wrote the pointer may still have a complete checkpoint.
        steps = complete_steps(checkpoints)
        return steps[-1] if steps else None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not _STEP.fullmatch(name):
        raise CheckpointError(
            f"{pointer}: expected a name such as step-00000100, found {name[:40]!r}. Choose a "
            f"checkpoint with --checkpoint.resume; complete ones: {_names(checkpoints)}"
        )
    path = checkpoints / name
    if not path.exists() and _is_sealed(_replaced(path)):
        return _replaced(path)  # a run died while replacing it; the next save renames it
    if not _is_complete(path):
        raise CheckpointError(
            f"{pointer} names {name}, which is not a complete checkpoint. Choose another one with "
            f"--checkpoint.resume; complete ones: {_names(checkpoints)}"
        )
    return path


def _names(checkpoints: Path) -> str:
    return ", ".join(step.name for step in complete_steps(checkpoints)) or "none"


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint at `path`: itself, or the newest one of a run directory.

    `path` may also be the `checkpoints` directory of a run. Raises CheckpointError naming the
    expected files if there is no checkpoint.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    if _is_foreign(path):
        name = path.resolve().stem if path.is_file() else path.resolve().name
        raise CheckpointError(
            f"{path} is not an ee-llm checkpoint. Convert it first: ee-llm convert {path} --output "
            f"runs/{name}"
        )
    if not path.exists():
        # "organisation/model" is the form of a name on the Hugging Face Hub.
        is_hub_id = len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists()
        hint = ". Convert a model of the Hugging Face Hub first, with ee-llm convert."
        raise CheckpointError(
            f"{path} does not exist: expected a run directory or a checkpoint "
            f"such as {path / CHECKPOINTS / step_name(100)}{hint if is_hub_id else ''}"
        )
    found = find_latest(path.parent if path.name == CHECKPOINTS else path)
    if found is not None:
        return found
    if _STEP.match(path.name) or (path / "metadata.json").is_file():
        raise CheckpointError(
            f"{path / MANIFEST} is missing: {path} is not a complete checkpoint of ee_llm"
        )
    raise CheckpointError(
        f"no checkpoint in {path}: expected directories such as "
        f"{path / CHECKPOINTS / step_name(100)}"
    )


def _is_foreign(path: Path) -> bool:
    """Return whether a path looks like a model that `ee-llm convert` reads."""
    if path.is_file():
        return path.suffix == ".gguf"
    # The files of a Hugging Face model, and the tracker file of Megatron-LM.
    names = ("config.json", "model.safetensors", "latest_checkpointed_iteration.txt")
    return any((path / name).is_file() for name in names)


def partial_path(checkpoints: Path, step: int) -> Path:
    """Return the temporary directory in which the checkpoint of `step` is written."""
    return checkpoints / (step_name(step) + _PARTIAL)


def create_partial(checkpoints: Path, step: int) -> Path:
    """Create the temporary directory of the checkpoint of `step`, and clean up after dead runs.

    A checkpoint whose replacement was never completed gets its name back.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    for replaced in checkpoints.glob(f"step-*{_REPLACED}"):
        final = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if _is_sealed(replaced) and not final.exists():
            replaced.rename(final)
    sync_path(checkpoints)
    for leftover in checkpoints.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(leftover)
    path = partial_path(checkpoints, step)
    (path / TENSORS).mkdir(parents=True)
    return path


def restored_path(checkpoint: Path) -> Path:
    """Return the path of a checkpoint after `create_partial`, which may have renamed it."""
    name = checkpoint.name.removesuffix(_REPLACED)
    return checkpoint if checkpoint.exists() else checkpoint.with_name(name)


def seal(
    partial: Path, facts: Mapping[str, Any], checksums: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Write the manifest with `facts` and with the size and the checksums of every file.

    All files are on disk when it returns.

    Args:
        partial: The directory of the checkpoint.
        facts: Further entries of the manifest.
        checksums: The ranges of files by name, where they are already known; other files are read.

    Raises CheckpointError if the size of a file differs from the bytes that its checksums cover.
    """
    files, ranges = {}, {}
    for path in sorted(partial.rglob("*")):
        if path.is_file() and path != partial / MANIFEST:
            name = path.relative_to(partial).as_posix()
            sync_path(path)
            files[name] = path.stat().st_size
            ranges[name] = list((checksums or {}).get(name) or checksums_of(path))
            covered = sum(parse_range(text).num_bytes for text in ranges[name])
            if covered != files[name]:
                raise CheckpointError(
                    f"{path} has {files[name]:,} bytes, but {covered:,} were written. Set output "
                    "to a file system that all machines share."
                )
    manifest = {"format": FORMAT, "version": VERSION, **facts, "files": files, "crc32": ranges}
    # The manifest is last: a directory without one is not a checkpoint.
    replace_text(partial / MANIFEST, sealed(_as_text(manifest)))
    for path in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync_path(path)


def publish(partial: Path, keep_last: int) -> Path:
    """Rename a sealed directory to its final name and return it.

    `latest` then names it, and all but the newest `keep_last` checkpoints are removed; 0 keeps all.
    """
    checkpoints = partial.parent
    final = checkpoints / partial.name.removesuffix(_PARTIAL)
    if final.exists():  # a run resumed from an older checkpoint reaches this step again
        replaced = _replaced(final)
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        try:
            partial.rename(final)
        except BaseException:
            replaced.rename(final)
            raise
        sync_path(checkpoints)
        # The manifest goes first: `create_partial` must not restore a half-deleted checkpoint.
        with contextlib.suppress(OSError):
            (replaced / MANIFEST).unlink()
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        partial.rename(final)
        sync_path(checkpoints)
    replace_text(checkpoints / LATEST, final.name + "\n")
    for path in _superseded(checkpoints, final, keep_last):
        # Rename it first: a half-deleted checkpoint must not keep the name of a complete one. If it
        # cannot be deleted now, the next save tries again and reports the error.
        removed = path.rename(path.with_name(path.name + _PARTIAL))
        shutil.rmtree(removed, ignore_errors=True)
    return final


def _superseded(checkpoints: Path, newest: Path, keep_last: int) -> Iterator[Path]:
    """Yield the checkpoints to remove, by step, because copying changes the times of files.

    A run saves ascending steps. Steps above the newest one are from before the run was resumed from
    an older checkpoint, and are removed first.
    """
    if keep_last <= 0:
        return
    steps = complete_steps(checkpoints)
    index = steps.index(newest)
    oldest_first = [*steps[index + 1 :], *steps[:index], newest]
    yield from oldest_first[:-keep_last]


def free_space(path: Path) -> str:
    """Return a note on the free space on the disk of `path`, or "" if it is unknown."""
    try:
        return f" ({shutil.disk_usage(path).free / 2**20:,.1f} MiB are free there)"
    except OSError:
        return ""


def discard(partial: Path) -> None:
    """Remove an incomplete checkpoint; never raises."""
    shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file atomically."""
    replace_text(path, _as_text(content))


def _as_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
