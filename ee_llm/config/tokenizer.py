"""What `data.tokenizer` may say beside a path, and the mark that equal tokenizers share."""

import hashlib

BYTES = "bytes"
"""The specification of the byte tokenizer, which needs no file; it is its mark as well."""


def file_mark(content: bytes) -> str:
    """Return the mark of a tokenizer's file: "sha256:" and the digest of its content."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
