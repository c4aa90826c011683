"""Tokenizer names and fingerprints, and the folders of a checkpoint that hold tokenizer files."""

import hashlib

BYTES = "bytes"
"""Value of `data.tokenizer` for the byte tokenizer, which needs no file; also its fingerprint."""

DIRECTORY = "tokenizer"
"""Subdirectory of a checkpoint with the tokenizer file."""

ORIGIN = "huggingface"
"""Subdirectory of a checkpoint with a converted model's other original files, without tensors."""


def file_fingerprint(content: bytes) -> str:
    """Return the fingerprint of a tokenizer file: "sha256:" and the digest of its content."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
