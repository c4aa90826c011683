"""The tokenizer that belongs to a checkpoint: its files, and the mark by which it is recognised."""

import json
from pathlib import Path

from ee_llm.config.tokenizer import BYTES, DIRECTORY, ORIGIN, file_fingerprint
from ee_llm.errors import CheckpointError

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""All that may come along: names in a folder of Hugging Face's, and in `ORIGIN`."""

_SETTINGS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)
"""Those of `COMPANIONS` that belong to the tokenizer, but for its vocabulary."""

# Classes of transformers that add the token unless add_bos_token says otherwise.
_ADDING = (
    *("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast"),
    *("GemmaTokenizer", "GemmaTokenizerFast"),
)


_MOST_BYTES = 256 * 2**20  # of a file that came along, a large tokenizer's among them


def fingerprint(tokenizer: str) -> str:
    """Return what two equal tokenizers share: "bytes", or the SHA-256 of the tokenizer's file.

    `tokenizer` is as in the configuration: "bytes" or the path of a file. A file that is kept
    counts as it was then, see `keep`. Raises CheckpointError if there is no such file.
    """
    if tokenizer == BYTES:
        return BYTES
    return file_fingerprint(_content(tokenizer))


def store(tokenizer: str, checkpoint: Path) -> None:
    """Copy the tokenizer's file into a checkpoint; the byte tokenizer has none."""
    if tokenizer != BYTES:
        (checkpoint / DIRECTORY).mkdir()
        (checkpoint / DIRECTORY / Path(tokenizer).name).write_bytes(_content(tokenizer))


def companions(checkpoint: Path) -> dict[str, bytes]:
    """Return the files that came along with a checkpoint from Hugging Face, by their names in it.

    Only those that are on the list, no links, and none of more than 256 MiB.
    """
    paths = [checkpoint / ORIGIN / name for name in COMPANIONS]
    return {f"{ORIGIN}/{path.name}": path.read_bytes() for path in paths if _is_own(path)}


def settings_of(tokenizer: str) -> dict[str, bytes]:
    """Return the files beside a tokenizer that state its special tokens and chat template.

    By their names in a checkpoint, as `companions` gives them. `tokenizer` is as in the
    configuration. A checkpoint needs them, as the tokenizer's own file does not say how texts end.
    """
    if tokenizer == BYTES:
        return {}
    folder = Path(tokenizer).parent
    if folder.name == DIRECTORY and (folder.parent / ORIGIN).is_dir():
        folder = folder.parent / ORIGIN
    paths = [folder / name for name in _SETTINGS]
    return {
        f"{ORIGIN}/{path.name}": path.read_bytes()
        for path in paths
        if path.is_file() and path.stat().st_size <= _MOST_BYTES
    }


def present(checkpoint: Path) -> list[str]:
    """Return the names of the files that are read as the tokenizer's or as companions."""
    own = [path for path in (checkpoint / DIRECTORY).glob("*") if path.is_file()]
    own += [path for name in COMPANIONS if _is_own(path := checkpoint / ORIGIN / name)]
    return [path.relative_to(checkpoint).as_posix() for path in own]


def _is_own(path: Path) -> bool:
    """Return whether a companion is a file of the checkpoint's own, no link and not too large."""
    if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
        return False
    return path.stat().st_size <= _MOST_BYTES


def keep(tokenizer: str) -> None:
    """Keep a tokenizer's file as it is now, for the checkpoints of a run that begins.

    They store the tokenizer that the run began with, even if the file changes or vanishes. Raises
    ValueError if there is no such file.
    """
    if tokenizer != BYTES:
        _kept[tokenizer] = _read(tokenizer)


_kept: dict[str, bytes] = {}  # by path


def _content(tokenizer: str) -> bytes:
    return _kept[tokenizer] if tokenizer in _kept else _read(tokenizer)


def _read(tokenizer: str) -> bytes:
    try:
        return Path(tokenizer).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"data.tokenizer: can not read {tokenizer!r} ({error.strerror}); give 'bytes' or the "
            "path of a SentencePiece .model or a tokenizer.json"
        ) from error


def stored(checkpoint: Path) -> str:
    """Return the checkpoint's own tokenizer as the configuration names one: "bytes" or a path."""
    directory = checkpoint / DIRECTORY
    if not directory.is_dir():
        return BYTES
    files = sorted(path for path in directory.iterdir() if path.is_file())
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise CheckpointError(f"{directory}: expected one tokenizer file, found {names}")
    return str(files[0])


def proven(checkpoint: Path, expected: str) -> str:
    """Return `stored(checkpoint)` if its fingerprint is `expected`; raises CheckpointError."""
    found = stored(checkpoint)
    if found == BYTES and expected != BYTES:
        raise CheckpointError(
            f"{checkpoint / DIRECTORY} is missing: expected the tokenizer {_short(expected)}"
        )
    mark = BYTES if found == BYTES else file_fingerprint(Path(found).read_bytes())
    if mark != expected:
        raise CheckpointError(
            f"{found} ({_short(mark)}) is not the tokenizer that the checkpoint was trained with "
            f"({_short(expected)})"
        )
    return found


def stated_bos(checkpoint: Path) -> bool | None:
    """Return whether prompts begin with a beginning-of-sequence token, None if nothing says so.

    What says so are the settings of the tokenizer of a model from Hugging Face: SentencePiece's
    files have no place for it. Raises CheckpointError if they are damaged.
    """
    path = checkpoint / ORIGIN / "tokenizer_config.json"
    if not _is_own(path):
        return None
    try:
        settings = json.loads(path.read_bytes())
        stated = settings.get("add_bos_token")
        kind = settings.get("tokenizer_class")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected the settings of a tokenizer: {error}") from None
    if isinstance(stated, bool):
        return stated
    return True if kind in _ADDING else None


def check(tokenizer: str, expected: str, checkpoint: Path) -> None:
    """Raise CheckpointError if `tokenizer` is not the one that the checkpoint was trained with."""
    found = fingerprint(tokenizer)
    if found != expected:
        raise CheckpointError(
            f"data.tokenizer: {tokenizer!r} ({_short(found)}) is not the tokenizer that "
            f"{checkpoint} was trained with ({_short(expected)}); use {stored(checkpoint)!r}"
        )


def _short(mark: str) -> str:
    return mark[: len("sha256:") + 12]
