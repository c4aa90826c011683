"""Read what a model's own files say about its special tokens and its chat template.

The files are those of a folder from Hugging Face. Nothing here imports torch or a tokenizer
library: tokens are given as their text or their id, as the files state them.
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
    """A token that a tokenizer has beside its model file, and whether it is a special one."""

    id: int
    is_special: bool


@dataclass(frozen=True)
class TokenSettings:
    """The statements of a model's files; empty if it has none.

    eos_ids, bos_id: from generation_config.json, else from config.json. texts: the special tokens
    by role ("bos_token", "eos_token", ...), from tokenizer_config.json, else from
    special_tokens_map.json. has_no_bos: tokenizer_config.json says that there is no such token.
    num_rows: the number of rows of the model's embedding, from config.json. added: tokens by their
    text. chat_template: None, one template, or several by name. template_path: the file that holds
    them.
    """

    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    has_no_bos: bool = False
    is_legacy: bool = True
    num_rows: int | None = None
    added: Mapping[str, AddedToken] = field(default_factory=dict)
    chat_template: str | Mapping[str, str] | None = None
    template_path: Path | None = None


def is_encodable(text: str) -> bool:
    """Return whether a text is UTF-8: JSON can spell half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def settings_folder(tokenizer: Path) -> Path:
    """Return the folder whose files belong to a tokenizer's file.

    In a checkpoint this is not the folder of the file itself but the one beside it.
    """
    folder = tokenizer.parent
    origin = folder.parent / ORIGIN
    return origin if folder.name == DIRECTORY and origin.is_dir() else folder


def read_token_settings(folder: Path) -> TokenSettings:
    """Return what the files in `folder` say; raises DataError for a damaged one."""
    own = _read(folder / TOKENIZER_CONFIG)
    tokens_map = _read(folder / _TOKENS_MAP)
    texts = {}
    for role in (f"{name}_token" for name in _NAMES):
        stated = own[role] if role in own else tokens_map.get(role)
        if (text := _text(stated)) is not None:
            texts[role] = text
    by_id = [_read(folder / name) for name in _ID_FILES]
    num_rows = by_id[-1].get("vocab_size")
    template, path = _chat_template(folder, own)
    return TokenSettings(
        eos_ids=next((ids for one in by_id if (ids := _ids(one.get("eos_token_id")))), ()),
        bos_id=next((i for one in by_id for i in _ids(one.get("bos_token_id"))[:1]), None),
        texts=texts,
        has_no_bos="bos_token" in own and "bos_token" not in texts,
        is_legacy=own.get("legacy") is not False,
        num_rows=num_rows if type(num_rows) is int and num_rows > 0 else None,
        added=_added(own, _read(folder / _ADDED_TOKENS), texts),
        chat_template=template,
        template_path=path,
    )


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one if there is no such file."""
    if not _is_there(path):
        return {}
    if path.stat().st_size > _MAX_BYTES:
        raise DataError(
            f"{path} is larger than {_MAX_BYTES // 2**20} MiB. Move it away if it does not belong"
            " to the tokenizer beside it."
        )
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON file: {error}. Fetch it again.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object. Fetch it again.")
    return found


def _is_there(path: Path) -> bool:
    """Return whether there is such a file; a link counts only outside a checkpoint."""
    is_foreign_link = path.parent.name == ORIGIN and path.is_symlink()
    return path.is_file() and not is_foreign_link


def _text(stated: Any) -> str | None:
    """Return the text of a token, which is a string or an AddedToken's fields."""
    if isinstance(stated, dict):
        stated = stated.get("content")
    return stated if isinstance(stated, str) and stated and is_encodable(stated) else None


def _ids(stated: Any) -> tuple[int, ...]:
    """Return the token ids that an id or a list of ids states."""
    values = stated if isinstance(stated, list) else [stated]
    return tuple(dict.fromkeys(i for i in values if type(i) is int and i >= 0))


def _added(
    own: dict[str, Any], added_tokens: dict[str, Any], texts: Mapping[str, str]
) -> dict[str, AddedToken]:
    special = set(texts.values())
    extra = own.get("additional_special_tokens") or own.get("extra_special_tokens")
    if isinstance(extra, list):
        special |= {text for one in extra if (text := _text(one)) is not None}
    found = {
        text: AddedToken(id, text in special)
        for text, id in added_tokens.items()
        if type(id) is int and id >= 0 and _text(text)
    }
    decoder = own.get("added_tokens_decoder")
    for id, token in decoder.items() if isinstance(decoder, dict) else ():
        text = _text(token)
        if text is not None and _ID.fullmatch(id) and isinstance(token, dict):
            found[text] = AddedToken(int(id), token.get("special") is True or text in special)
    return found


def _chat_template(
    folder: Path, own: dict[str, Any]
) -> tuple[str | Mapping[str, str] | None, Path | None]:
    path = folder / _TEMPLATE
    if _is_there(path):  # it goes before the one in tokenizer_config.json, as in transformers
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path} is larger than {_MAX_BYTES // 2**20} MiB. Shorten it.")
        try:
            return path.read_text(encoding="utf-8-sig"), path
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}. Fetch it again.") from None
    path, stated = folder / TOKENIZER_CONFIG, own.get("chat_template")
    if stated is None or isinstance(stated, str):
        return stated or None, path
    if isinstance(stated, dict):
        stated = [{"name": name, "template": text} for name, text in stated.items()]
    try:
        templates = {one["name"]: one["template"] for one in stated}
    except (TypeError, KeyError):
        templates = {None: None}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise DataError(
            f"{path}: chat_template must be a text or a list of named templates. Fetch it again,"
            " or give --chat-template FILE."
        )
    return templates, path
