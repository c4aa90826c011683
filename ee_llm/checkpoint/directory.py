"""Where the checkpoints of a run lie, and how a directory becomes one: whole or not at all.

{output}/checkpoints/step-00000100/     one checkpoint, complete when it has this name
{output}/checkpoints/step-00000200.partial/  one being written, or left by a run that died
{output}/checkpoints/latest             the name of the newest complete checkpoint
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
"""Version 1 had no checksums; it is still read."""
_PARTIAL = ".partial"
_REPLACED = ".replaced" + _PARTIAL
_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Return the directory name of the checkpoint of `step`."""
    return f"step-{step:08d}"


def check_output(output: str | Path) -> None:
    """Raise CheckpointError unless the run directory `output` can be created and written to."""
    path = Path(output)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # A name of its own: processes of several machines look here at the same time.
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"x")
    except OSError as error:
        raise CheckpointError(
            f"output: the directory {str(path)!r} can not be written to ({error.strerror}); choose "
            "another with --output, or mend its permissions"
        ) from error


def refuse_used(output: str | Path) -> None:
    """Raise CheckpointError if a run directory has a checkpoint already."""
    if there := complete_steps(Path(output) / CHECKPOINTS):
        raise CheckpointError(f"{there[-1]} is there already; choose another --output")


def complete_steps(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints in a run's checkpoints directory, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if _is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _is_complete(path: Path) -> bool:
    return bool(_STEP.fullmatch(path.name)) and _is_sealed(path)


def _is_sealed(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def _replaced(final: Path) -> Path:
    """Return where a checkpoint waits for the one that takes its place."""
    return final.with_name(final.name + _REPLACED)


def find_latest(output: str | Path) -> Path | None:
    """Return the newest complete checkpoint of the run directory `output`, None if it has none.

    One that was being replaced when a run died is still whole, under the name it waits by.
    Raises CheckpointError if `latest` names a checkpoint that is not there.
    """
    checkpoints = Path(output) / CHECKPOINTS
    pointer = checkpoints / LATEST
    if not pointer.is_file():
        # A run that died between its first rename and the pointer's still has a whole checkpoint.
        steps = complete_steps(checkpoints)
        return steps[-1] if steps else None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not _STEP.fullmatch(name):
        raise CheckpointError(
            f"{pointer}: expected a name such as step-00000100, found {name[:40]!r}; go on from a "
            f"checkpoint of your choice with --checkpoint.resume, complete here: "
            f"{_names(checkpoints)}"
        )
    path = checkpoints / name
    if not path.exists() and _is_sealed(_replaced(path)):
        return _replaced(path)  # a run died while it replaced this one; the next save renames it
    if not _is_complete(path):
        raise CheckpointError(
            f"{pointer} names {name}, which is not a complete checkpoint; go on from another with "
            f"--checkpoint.resume, complete here: {_names(checkpoints)}"
        )
    return path


def _names(checkpoints: Path) -> str:
    return ", ".join(step.name for step in complete_steps(checkpoints)) or "none"


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that `path` means: itself, or the newest of a run or its checkpoints.

    Raises CheckpointError naming what was looked for if there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    if _is_foreign(path):
        name = path.resolve().stem if path.is_file() else path.resolve().name
        raise CheckpointError(
            f"{path} is not an ee-llm checkpoint; convert it first: ee-llm convert {path} --output "
            f"runs/{name}"
        )
    if not path.exists():
        # "organisation/model" is how the Hugging Face hub names models.
        is_hub_id = len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists()
        hint = "; convert a model of the Hugging Face hub first, with ee-llm convert"
        raise CheckpointError(
            f"{path} does not exist: expected a run directory or a checkpoint "
            f"such as {path / CHECKPOINTS / step_name(100)}{hint if is_hub_id else ''}"
        )
    found = find_latest(path.parent if path.name == CHECKPOINTS else path)
    if found is not None:
        return found
    if _STEP.match(path.name) or (path / "metadata.json").is_file():
        raise CheckpointError(
            f"{path / MANIFEST} is missing: {path} is no complete checkpoint of ee_llm"
        )
    raise CheckpointError(
        f"no checkpoint in {path}: expected {path / CHECKPOINTS} with directories such as "
        f"{step_name(100)} in it"
    )


def _is_foreign(path: Path) -> bool:
    """Return whether a path looks like a model that `ee-llm convert` takes."""
    if path.is_file():
        return path.suffix == ".gguf"
    # config.json and safetensors of Hugging Face, and the tracker of Megatron-LM.
    names = ("config.json", "model.safetensors", "latest_checkpointed_iteration.txt")
    return any((path / name).is_file() for name in names)


def partial_path(checkpoints: Path, step: int) -> Path:
    """Return the directory in which the checkpoint of `step` is written aside."""
    return checkpoints / (step_name(step) + _PARTIAL)


def create_partial(checkpoints: Path, step: int) -> Path:
    """Make the directory to write the checkpoint of `step` into; clear what dead runs left.

    A checkpoint that had given way to one that never came gets its name back.
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


def settled(checkpoint: Path) -> Path:
    """Return where a checkpoint lies after `create_partial`, which may give its name back."""
    name = checkpoint.name.removesuffix(_REPLACED)
    return checkpoint if checkpoint.exists() else checkpoint.with_name(name)


def seal(
    partial: Path, facts: Mapping[str, Any], checksums: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Write the manifest: `facts`, and the size and checksums of every file.

    All is on disk when it returns.

    Args:
        partial: The directory of the checkpoint.
        facts: What else the manifest states.
        checksums: The ranges of files by name, where they are known already; other files are read.

    Raises CheckpointError if a file does not have the size that its checksums are for.
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
                    f"{path} has {files[name]:,} bytes, but {covered:,} were written; output must "
                    "be on a file system that shows all machines the same files"
                )
    manifest = {"format": FORMAT, "version": VERSION, **facts, "files": files, "crc32": ranges}
    # Last: a directory without its manifest is not a checkpoint.
    replace_text(partial / MANIFEST, sealed(_as_text(manifest)))
    for path in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync_path(path)


def publish(partial: Path, keep_last: int) -> Path:
    """Give a sealed directory its final name, point `latest` at it, drop all but `keep_last`.

    `keep_last` 0 keeps all. Returns the checkpoint's path.
    """
    checkpoints = partial.parent
    final = checkpoints / partial.name.removesuffix(_PARTIAL)
    if final.exists():  # a run that went back to an older checkpoint arrives at this step again
        replaced = _replaced(final)
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        try:
            partial.rename(final)
        except BaseException:
            replaced.rename(final)
            raise
        sync_path(checkpoints)
        # The manifest first: half of a checkpoint must not be taken for one that is to come back.
        with contextlib.suppress(OSError):
            (replaced / MANIFEST).unlink()
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        partial.rename(final)
        sync_path(checkpoints)
    replace_text(checkpoints / LATEST, final.name + "\n")
    for path in _superseded(checkpoints, final, keep_last):
        # Renamed first: a checkpoint that is half deleted must not keep the name of a whole one.
        # What can not be deleted now, the next save meets again, and says so.
        doomed = path.rename(path.with_name(path.name + _PARTIAL))
        shutil.rmtree(doomed, ignore_errors=True)
    return final


def _superseded(checkpoints: Path, newest: Path, keep_last: int) -> Iterator[Path]:
    """Yield the checkpoints to remove. Copying changes the times of files, so only steps count.

    A run saves ascending steps. If there are higher ones than the newest, the run went back, and
    left the branch that they are of: they go first.
    """
    if keep_last <= 0:
        return
    steps = complete_steps(checkpoints)
    at = steps.index(newest)
    oldest_first = [*steps[at + 1 :], *steps[:at], newest]
    yield from oldest_first[:-keep_last]


def free_space(path: Path) -> str:
    """Return a remark on the space that is left where `path` is, or nothing if that is unknown."""
    try:
        return f" ({shutil.disk_usage(path).free / 2**20:,.1f} MiB are free there)"
    except OSError:
        return ""


def discard(partial: Path) -> None:
    """Remove a directory that will never be whole, and free the disk; never raises."""
    shutil.rmtree(partial, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint; raises CheckpointError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: expected a JSON object in it") from None
    return parse_json(content, path)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object that `content`, read from `path`, is; raises CheckpointError."""
    try:
        parsed = json.loads(content.decode("utf-8"), parse_int=_int64)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a JSON object: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise CheckpointError(f"an integer of {len(digits)} digits is more than 64 bits can hold")
    return int(digits)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file by a new one, or leave it as it is."""
    replace_text(path, _as_text(content))


def _as_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
