"""Checkpoints and data for evaluations, and the metrics computed token by token."""

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.config import Config
from ee_llm.data.indexed import IndexedWriter
from tests.unit.inference.models import random_tensors, save_model, tiny_config

EOS = 256  # of the byte tokenizer
TEXTS = ("The quick brown fox jumps over the lazy dog. " * 3, "Then it runs away.\n", "é\n" * 20)
DOCUMENTS = [[*text.encode(), EOS] for text in TEXTS]
TOKENS = [token for document in DOCUMENTS for token in document]


def make_config(family: str = "llama", mask_after_eos: bool = False, **options: Any) -> Config:
    sizes = {"vocab_size": 264} | ({"num_kv_heads": 4} if family == "gpt" else {})
    config = tiny_config(family, **{**sizes, **options})
    values = config.model_dump()
    values["data"]["mask_after_eos"] = mask_after_eos
    return Config(**values)


def make_tensors(config: Config) -> dict[str, Tensor]:
    """Return random tensors; exits with own output weights sometimes agree with the final exit."""
    tensors = random_tensors(config)
    for boundary in config.exits.boundaries:
        name = f"exits.{boundary}.output.weight"
        if name in tensors:
            tensors[name] = tensors["output.weight"] + 0.3 * tensors[name]
    return tensors


def save(output: Path, config: Config) -> Path:
    """Write a float64 checkpoint of random tensors with the byte tokenizer."""
    return save_model(output, config, make_tensors(config))


def reference(config: Config) -> ReferenceModel:
    return ReferenceModel(config, make_tensors(config), torch.float64)


def write_data(prefix: Path, documents: Sequence[Sequence[int]] = DOCUMENTS) -> str:
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add(document)
        writer.commit()
    return str(prefix)


def write_texts(folder: Path, texts: Sequence[str] = TEXTS) -> Path:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def by_hand(
    model: ReferenceModel, tokens: list[int], seq_length: int, eos: int | None = None
) -> dict[int, dict[str, float]]:
    """Return the metrics of each exit, from one distribution at a time.

    With `eos`, tokens after an end token do not count.
    """
    totals = {
        b: dict.fromkeys(("loss", "agreement", "kl", "confidence"), 0.0) for b in model.boundaries
    }
    count = 0
    for start in range(0, len(tokens) - 1, seq_length):
        window = tokens[start : start + seq_length + 1]
        logits = model.forward(torch.tensor(window[:-1]))
        for position, target in enumerate(window[1:]):
            if window[position] == eos:
                continue
            count += 1
            final = torch.softmax(logits[model.num_layers][position], dim=0)
            for boundary, found in totals.items():
                p = torch.softmax(logits[boundary][position], dim=0)
                found["loss"] -= float(p[target].log())
                found["agreement"] += int(p.argmax()) == int(final.argmax())
                found["kl"] += sum(float(a * (a / b).log()) for a, b in zip(final, p, strict=True))
                found["confidence"] += float(p.max())
    return {b: {name: total / count for name, total in one.items()} for b, one in totals.items()}


def on_ranks(
    num_ranks: int, function: Callable[[int, Callable[[Tensor], Tensor]], object]
) -> list[object]:
    """Call `function(rank, gather)` for each rank, first to learn what each one gathers.

    A function may gather twice, and the second part may depend on the first result.
    """
    parts: dict[tuple[int, int], Tensor] = {}

    def gather_of(rank: int) -> Callable[[Tensor], Tensor]:
        calls = count()

        def gather(part: Tensor) -> Tensor:
            call = next(calls)
            parts[rank, call] = part
            return torch.cat([parts.get((other, call), part) for other in range(num_ranks)], dim=-1)

        return gather

    for rank in (*range(num_ranks), *range(num_ranks)):
        function(rank, gather_of(rank))
    return [function(rank, gather_of(rank)) for rank in range(num_ranks)]
