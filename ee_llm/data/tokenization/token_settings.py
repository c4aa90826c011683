"""Read special tokens and the chat template from the files of a Hugging Face model.

The module imports neither torch nor a tokenizer library. Tokens are represented by their text or
their id, as in the files.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ee_llm.config.tokenizer import DIRECTORY, ORIGIN
from ee_llm.errors import DataError

TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENS_MAP = "special_tokens_map.json"
_ADDED_TOKENS = "added_tokens.json"
_TEMPLATE = "chat_template.jinja"
_ID_FILES = ("generation_config.json", "config.json")
_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

_ID = re.compile(r"[0-9]{1,18}")
_MAX_BYTES = 32 * 2**20  # larger than any tokenizer_config.json


@dataclass(frozen=True)
class AddedToken:
    """A token that is added to the vocabulary of the tokenizer file."""

    id: int
    is_special: bool


@dataclass(frozen=True)
class TokenSettings:
    """Token settings in the files of a model; empty if there are no files.

    Attributes:
        eos_ids: End-of-sequence ids from generation_config.json, else from config.json.
        bos_id: Beginning-of-sequence id from the same files.
        texts: Special tokens by role ("bos_token", "eos_token", ...), from tokenizer_config.json,
            else from special_tokens_map.json.
        has_no_bos: tokenizer_config.json states that there is no beginning-of-sequence token.
        is_legacy: tokenizer_config.json does not set "legacy" to false.
        embedding_size: Number of rows of the model's embedding, from config.json.
        added: Added tokens by their text.
        chat_template: None, one template, or several by name.
        template_path: The file with the templates.
    """

    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    has_no_bos: bool = False
    is_legacy: bool = True
    embedding_size: int | None = None
    added: Mapping[str, AddedToken] = field(default_factory=dict)
    chat_template: str | Mapping[str, str] | None = None
    template_path: Path | None = None


def is_encodable(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8; JSON can escape half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def settings_folder(tokenizer: Path) -> Path:
    """Return the folder with the settings files of a tokenizer file.

    In a checkpoint, this is not the folder of the tokenizer file but another one next to it.
    """
    folder = tokenizer.parent
    origin = folder.parent / ORIGIN
    return origin if folder.name == DIRECTORY and origin.is_dir() else folder


def read_token_settings(folder: Path) -> TokenSettings:
    """Return the token settings in `folder`; raises DataError for a damaged file."""
    own = _read(folder / TOKENIZER_CONFIG)
    tokens_map = _read(folder / _TOKENS_MAP)
    texts = {}
    for role in (f"{name}_token" for name in _NAMES):
        value = own[role] if role in own else tokens_map.get(role)
        if (text := _text(value)) is not None:
            texts[role] = text
    id_files = [_read(folder / name) for name in _ID_FILES]
    vocab_size = id_files[-1].get("vocab_size")
    template, path = _chat_template(folder, own)
    return TokenSettings(
        eos_ids=next((ids for file in id_files if (ids := _ids(file.get("eos_token_id")))), ()),
        bos_id=next((i for file in id_files for i in _ids(file.get("bos_token_id"))[:1]), None),
        texts=texts,
        has_no_bos="bos_token" in own and "bos_token" not in texts,
        is_legacy=own.get("legacy") is not False,
        embedding_size=vocab_size if type(vocab_size) is int and vocab_size > 0 else None,
        added=_added(own, _read(folder / _ADDED_TOKENS), texts),
        chat_template=template,
        template_path=path,
    )


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one if there is no such file."""
    if not _exists(path):
        return {}
    if path.stat().st_size > _MAX_BYTES:
        raise DataError(
            f"{path} is larger than {_MAX_BYTES // 2**20} MiB. Move it elsewhere if it does not "
            "belong to the tokenizer next to it."
        )
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON file: {error}. Download it again.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object. Download it again.")
    return content


def _exists(path: Path) -> bool:
    """Return whether the file exists. Links in a checkpoint are ignored."""
    is_foreign_link = path.parent.name == ORIGIN and path.is_symlink()
    return path.is_file() and not is_foreign_link


def _text(token: Any) -> str | None:
    """Return the text of a token given as a string or as the fields of an AddedToken."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token and is_encodable(token) else None


def _ids(value: Any) -> tuple[int, ...]:
    """Return the valid token ids in an id or a list of ids."""
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(i for i in values if type(i) is int and i >= 0))


def _added(
    own: dict[str, Any], added_tokens: dict[str, Any], texts: Mapping[str, str]
) -> dict[str, AddedToken]:
    special = set(texts.values())
    extra = own.get("additional_special_tokens") or own.get("extra_special_tokens")
    if isinstance(extra, list):
        special |= {text for token in extra if (text := _text(token)) is not None}
    added = {
        text: AddedToken(id, text in special)
        for text, id in added_tokens.items()
        if type(id) is int and id >= 0 and _text(text)
    }
    decoder = own.get("added_tokens_decoder")
    for id, token in decoder.items() if isinstance(decoder, dict) else ():
        text = _text(token)
        if text is not None and _ID.fullmatch(id) and isinstance(token, dict):
            added[text] = AddedToken(int(id), token.get("special") is True or text in special)
    return added


def _chat_template(
    folder: Path, own: dict[str, Any]
) -> tuple[str | Mapping[str, str] | None, Path | None]:
    path = folder / _TEMPLATE
    if _exists(path):  # As in transformers, it overrides the one in tokenizer_config.json.
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path} is larger than {_MAX_BYTES // 2**20} MiB. Shorten it.")
        try:
            return path.read_text(encoding="utf-8-sig"), path
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}. Download it again.") from None
    path, value = folder / TOKENIZER_CONFIG, own.get("chat_template")
    if value is None or isinstance(value, str):
        return value or None, path
    if isinstance(value, dict):
        value = [{"name": name, "template": text} for name, text in value.items()]
    try:
        templates = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        templates = {None: None}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise DataError(
            f"{path}: chat_template must be a string or a list of named templates. Download the "
            "file again, or give a chat_template."
        )
    return templates, path
