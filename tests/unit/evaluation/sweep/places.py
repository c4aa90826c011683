"""A model whose early exits often agree with the final one, and prompts for it."""

import json
from pathlib import Path

from torch import Tensor

from ee_llm.config import Config
from tests.unit.evaluation.models import make_config, make_tensors, write_data, write_texts
from tests.unit.inference.models import save_model

BOUNDARIES = (2, 4)
NUM_LAYERS = 8
PROMPTS = ("The quick", "brown fox jumps", "over <b>the</b> lazy", "dog & cat", "é then", "it runs")


def agreeing_config() -> Config:
    return make_config(boundaries=BOUNDARIES, num_layers=NUM_LAYERS, max_seq_length=64)


def agreeing_tensors(config: Config) -> dict[str, Tensor]:
    """Return tensors whose layers after the first exit change little, with equal norms."""
    tensors = make_tensors(config)
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[0] == "layers" and int(parts[1]) > BOUNDARIES[0] and tensor.dim() == 2:
            tensors[name] = tensor * 0.35
        if parts[0] == "exits" and parts[2] == "norm":
            tensors[name] = tensors[f"exits.{NUM_LAYERS}.{'.'.join(parts[2:])}"].clone()
    return tensors


def make_place(folder: Path) -> Path:
    """Write a model, one without exits, prompts, data and texts into a folder."""
    config = agreeing_config()
    save_model(folder / "run", config, agreeing_tensors(config))
    dense = make_config(boundaries=())
    save_model(folder / "dense", dense, make_tensors(dense))
    lines = (json.dumps({"prompt": prompt}) for prompt in PROMPTS)
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_data(folder / "data")
    write_texts(folder / "texts")
    return folder
