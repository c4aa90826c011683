"""A folder with small models of the same backbone, and data for the fit and the test."""

import json
import re
from pathlib import Path

from torch import Tensor

from ee_llm.architecture.tensors import tensor_shapes
from tests.unit.evaluation.models import make_config, make_tensors, write_data
from tests.unit.inference.models import save_model

LENGTH = 16
EOS = 256
TEXTS = [
    f"{number} The quick brown fox {'jumps' if number % 3 else 'walks'} over it.\n" * 3
    for number in range(40)
]
FIT, TEST = TEXTS[:20], TEXTS[20:]


def documents(texts: list[str]) -> list[list[int]]:
    return [[*text.encode(), EOS] for text in texts]


def with_identities(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors whose layers 3 and 4 add nothing to the residual stream."""
    writes = re.compile(r"layers\.[34]\.(self_attention\.linear_proj|mlp\.linear_fc2)\.")
    return {name: t * 0 if writes.match(name) else t for name, t in tensors.items()}


def make_place(path: Path) -> Path:
    """Write the models dense, exits, identities and single, and data and texts.

    The first three have equal layers, except that the last ones of identities add nothing.
    """
    config = make_config(boundaries=(1, 3), head=("block", "norm"), output="own")
    tensors = make_tensors(config)
    save_model(path / "exits", config, tensors)
    dense = make_config(boundaries=())
    tensors = {name: tensors[name] for name in tensor_shapes(dense)}
    save_model(path / "dense", dense, tensors)
    save_model(path / "identities", dense, with_identities(tensors))
    single = make_config(boundaries=(), num_layers=1)
    save_model(path / "single", single, make_tensors(single))
    write_data(path / "fit", documents(FIT))
    write_data(path / "test", documents(TEST))
    write_data(path / "both", documents(TEXTS))
    write_data(path / "short", documents(TEST[:4]))
    lines = (json.dumps({"text": text}) for text in TEXTS)
    (path / "texts.jsonl").write_text("\n".join(lines))
    return path
