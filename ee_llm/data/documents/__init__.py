"""Read documents from text, JSON and Parquet files, optionally compressed, and from folders."""

from ee_llm.data.documents.reading import RawDocument, decode_document, raw_documents
from ee_llm.data.documents.sources import (
    DEFAULT_EXCLUDE,
    Format,
    Skipped,
    Source,
    Sources,
    describe_skipped,
    find_sources,
)

__all__ = [
    "DEFAULT_EXCLUDE",
    "Format",
    "RawDocument",
    "Skipped",
    "Source",
    "Sources",
    "decode_document",
    "describe_skipped",
    "find_sources",
    "raw_documents",
]
