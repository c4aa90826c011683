"""Downloads models of the Hugging Face Hub to its cache, or finds them there."""

import re
from pathlib import Path

from ee_llm.checkpoint.format.safe import is_plain_name
from ee_llm.checkpoint.tokenizer import COMPANIONS
from ee_llm.conversion.huggingface.folder import INDEX, SETTINGS, SINGLE, read_object
from ee_llm.conversion.huggingface.settings import read_settings
from ee_llm.conversion.values import SettingsError
from ee_llm.errors import CheckpointError

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_ID = re.compile(rf"({_PART}/)?{_PART}")


def is_hub_id(name: str) -> bool:
    """Return whether a name could be that of a model on the Hub, such as "org/model" or "gpt2"."""
    return bool(_ID.fullmatch(name)) and not name.endswith((".gguf", ".safetensors"))


def download(name: str, revision: str | None = None) -> Path:
    """Download the missing files of a model and return its folder in the Hub's cache.

    Only settings, tokenizer files and safetensors are downloaded, never pickles or code. The
    settings come first, so that a model that cannot be converted costs no large download. Without
    a connection, or with HF_HUB_OFFLINE=1, only the cache is used.

    Args:
        name: The model's id on the Hub.
        revision: A branch, tag or commit; by default the main branch.

    Raises:
        CheckpointError: The model is not on the Hub or in the cache, is not accessible, has no
            safetensors, or cannot be converted.
    """
    folder = _snapshot(name, revision, [*COMPANIONS, INDEX])
    try:
        read_settings(read_object(folder / SETTINGS))
    except SettingsError as error:
        raise CheckpointError(f"{name}: {error}") from None
    _snapshot(name, revision, _weight_files(folder))
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{name} has neither {SINGLE} nor {INDEX} on the Hub or in the cache {folder}, and "
            "only safetensors are downloaded. Choose a --revision that has them, or save the model "
            "as safetensors with transformers' save_pretrained."
        )
    return folder


def _weight_files(folder: Path) -> list[str]:
    if not (folder / INDEX).is_file():
        return [SINGLE]
    table = read_object(folder / INDEX).get("weight_map")
    files = sorted(set(table.values())) if isinstance(table, dict) else []
    # The Hub's client takes names as patterns. `Folder` rejects unsafe names when it is opened.
    return [SINGLE, *(name for name in files if is_plain_name(name) and not set(name) & set("*?["))]


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise CheckpointError(
            f"{name} does not exist here. To download a model of this name from the Hugging Face "
            "Hub, install its client: pip install 'ee-llm[convert]'"
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{name}: there is no such file or folder here, and no such model{at} in the cache of "
            f"the Hugging Face Hub or on the Hub ({first}). Check the name and the connection. A "
            "private or gated model needs 'hf auth login'."
        ) from None
