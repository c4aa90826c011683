"""The tokenizer of a checkpoint: its files and its fingerprint."""

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
"""Names of the files of a Hugging Face model that a checkpoint keeps in `ORIGIN`."""

_SETTINGS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)
"""The names in `COMPANIONS` of a tokenizer's settings, without its vocabulary."""

# Classes of transformers that add the token unless add_bos_token is false.
_ADDING = (
    *("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast"),
    *("GemmaTokenizer", "GemmaTokenizerFast"),
)


_MOST_BYTES = 256 * 2**20  # of a companion file; large tokenizers need some tens of MiB


def fingerprint(tokenizer: str) -> str:
    """Return the fingerprint of a tokenizer: "bytes", or the SHA-256 of its file.

    `tokenizer` is a value of `data.tokenizer`: "bytes" or the path of a file. The content of a file
    that was passed to `keep` is its content at that time. Raises CheckpointError if there is no
    such file.
    """
    if tokenizer == BYTES:
        return BYTES
    return file_fingerprint(_content(tokenizer))


def store(tokenizer: str, checkpoint: Path) -> None:
    """Copy the tokenizer's file into a checkpoint. The byte tokenizer has none."""
    if tokenizer != BYTES:
        (checkpoint / DIRECTORY).mkdir()
        (checkpoint / DIRECTORY / Path(tokenizer).name).write_bytes(_content(tokenizer))


def companions(checkpoint: Path) -> dict[str, bytes]:
    """Return the Hugging Face files that a checkpoint keeps, by their names in it.

    Only files listed in `COMPANIONS` count, no links and no files of more than 256 MiB.
    """
    paths = [checkpoint / ORIGIN / name for name in COMPANIONS]
    return {f"{ORIGIN}/{path.name}": path.read_bytes() for path in paths if _is_own(path)}


def settings_of(tokenizer: str) -> dict[str, bytes]:
    """Return the files next to a tokenizer that state its special tokens and chat template.

    The keys are names in a checkpoint, as in `companions`. `tokenizer` is a value of
    `data.tokenizer`. A checkpoint needs these files because the tokenizer's own file does not state
    the token that ends a text.
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


def file_names(checkpoint: Path) -> list[str]:
    """Return the names of the checkpoint's tokenizer and companion files."""
    own = [path for path in (checkpoint / DIRECTORY).glob("*") if path.is_file()]
    own += [path for name in COMPANIONS if _is_own(path := checkpoint / ORIGIN / name)]
    return [path.relative_to(checkpoint).as_posix() for path in own]


def _is_own(path: Path) -> bool:
    """Return whether a path is a regular file of the checkpoint, not a link and not too large."""
    if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
        return False
    return path.stat().st_size <= _MOST_BYTES


def keep(tokenizer: str) -> None:
    """Keep the content of a tokenizer's file in memory for the checkpoints of this run.

    The checkpoints then store the tokenizer with which the run started, even if the file changes
    or is deleted. Raises CheckpointError if there is no such file.
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
            f"data.tokenizer: cannot read {tokenizer!r} ({error.strerror}). Set it to 'bytes' or "
            "to the path of a SentencePiece .model or a tokenizer.json."
        ) from error


def stored(checkpoint: Path) -> str:
    """Return the checkpoint's own tokenizer as a value of `data.tokenizer`: "bytes" or a path."""
    directory = checkpoint / DIRECTORY
    if not directory.is_dir():
        return BYTES
    files = sorted(path for path in directory.iterdir() if path.is_file())
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise CheckpointError(f"{directory}: expected one tokenizer file, found {names}")
    return str(files[0])


def verified(checkpoint: Path, expected: str) -> str:
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
    """Return whether prompts start with a beginning-of-sequence token, or None if unknown.

    The tokenizer settings of a Hugging Face model state it; SentencePiece files cannot. Raises
    CheckpointError if the settings are damaged.
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
    """Raise CheckpointError if the checkpoint was trained with another tokenizer."""
    found = fingerprint(tokenizer)
    if found != expected:
        raise CheckpointError(
            f"data.tokenizer: {tokenizer!r} ({_short(found)}) is not the tokenizer that "
            f"{checkpoint} was trained with ({_short(expected)}). Use {stored(checkpoint)!r}."
        )


def _short(fingerprint: str) -> str:
    return fingerprint[: len("sha256:") + 12]
