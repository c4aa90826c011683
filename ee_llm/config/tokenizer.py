"""What `data.tokenizer` may say beside a path, and the mark that equal tokenizers share."""

import hashlib

BYTES = "bytes"
"""The specification of the byte tokenizer, which needs no file; it is its mark as well."""

DIRECTORY = "tokenizer"
"""The directory of a checkpoint with its tokenizer's file."""

ORIGIN = "huggingface"
"""The directory of a checkpoint with the files that came along with a model, but for tensors."""


def file_mark(content: bytes) -> str:
    """Return the mark of a tokenizer's file: "sha256:" and the digest of its content."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
