"""Small data sets and tokenizers for the tests of this package."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from ee_llm.data.indexed import IndexedTokens, IndexedWriter
from ee_llm.data.tokenization.train_tokenizer import train_sentencepiece

CODE = '''\
def area(width, height):
    """Return the area of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError(f"negative side: {width} x {height}")
    return width * height


class Shape:
    name = "shape"

    def __init__(self, sides):
        self.sides = [float(side) for side in sides]
'''

WriteData = Callable[[str, Sequence[Sequence[int]]], str]


def read_documents(prefix: Path | str) -> list[list[int]]:
    """Return the token ids of each document of a data set."""
    data = IndexedTokens(prefix)
    return [
        data.tokens[start:end].tolist()
        for start, end in zip(data.bounds, data.bounds[1:], strict=False)
    ]


@pytest.fixture
def write_data(tmp_path: Path) -> WriteData:
    """Return a function that writes documents (lists of token ids) and returns their prefix."""

    def write(name: str, documents: Sequence[Sequence[int]]) -> str:
        prefix = str(tmp_path / name)
        with IndexedWriter(prefix, np.uint16) as writer:
            for document in documents:
                writer.add(document)
            writer.commit()
        return prefix

    return write


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece") / "code.model"
    train_sentencepiece([CODE], 330, path)
    return path


@pytest.fixture(scope="session")
def huggingface_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a byte-level BPE tokenizer.json that truncates and pads texts and adds a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<|endoftext|>", "<|stop|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CODE], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 1)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    path = tmp_path_factory.mktemp("huggingface") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
