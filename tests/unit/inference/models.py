"""Create small random models whose exits differ from each other."""

from pathlib import Path

import torch
from torch import Tensor

from ee_llm.architecture.gates import gate_shapes
from ee_llm.architecture.reference import ReferenceModel
from ee_llm.architecture.tensors import tensor_shapes
from ee_llm.atomic_file import replace_text
from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import CONFIG
from ee_llm.config import Config
from tests.unit.checkpoint.checkpoints import reseal, write_checkpoint

VOCABULARY = 40

# Over 40 positions, the four pairs of eight dimensions rotate 6.4, 2, 0.64 and 0.2 times.
LLAMA3_ROPE = {
    "rope_theta": 100.0,
    "rope_scaling": "llama3",
    "rope_factor": 8.0,
    "rope_low_freq_factor": 0.5,
    "rope_high_freq_factor": 3.0,
    "rope_original_length": 40,
}
QWEN3 = LLAMA3_ROPE | {"qk_norm": True, "qkv_bias": True, "head_dim": 8}


def tiny_config(
    family: str = "llama",
    boundaries: tuple[int, ...] = (1, 2),
    head: tuple[str, ...] = ("norm",),
    output: str = "shared",
    temperatures: tuple[float, ...] = (),
    **model: object,
) -> Config:
    sizes = {
        "family": family,
        "num_layers": 4,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_hidden_size": 48,
        "vocab_size": VOCABULARY,
        "max_seq_length": 32,
    }
    exits = {
        "boundaries": boundaries,
        "head": head,
        "output": output,
        "temperatures": temperatures,
    }
    return Config.model_validate(
        {"model": sizes | model, "exits": exits, "data": {"seq_length": 32}}
    )


def random_tensors(
    config: Config, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Return tensors large enough that distributions are neither flat nor certain."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        is_norm = "norm" in name and name.endswith("weight")
        scale = 0.2 if is_norm or name.endswith("bias") else 0.35
        tensors[name] = (noise * scale + is_norm).to(dtype)
    return tensors


def random_gates(
    config: Config, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Return gates of all early exits whose confidences are spread over (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.5
        for boundary in config.exits.boundaries
        for name, shape in gate_shapes(boundary, config.model.hidden_size, 6).items()
    }


def tiny_model(
    config: Config | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
) -> ReferenceModel:
    config = config or tiny_config()
    return ReferenceModel(config, random_tensors(config, seed), dtype)


def split_qkv(config: Config, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused weight or bias into its q, k and v rows, independently of the model."""
    model = config.model
    per_group = model.num_heads // model.num_kv_heads + 2
    rows = list(qkv.split(model.head_dim))
    groups = [rows[i : i + per_group] for i in range(0, len(rows), per_group)]
    q = torch.cat([head for group in groups for head in group[:-2]])
    return q, torch.cat([group[-2] for group in groups]), torch.cat([group[-1] for group in groups])


def random_tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


class Residuals(ReferenceModel):
    """A reference that returns the residual stream at each boundary instead of logits."""

    def _head(self, boundary, x, attended):
        return x


def save_model(output: Path, config: Config, tensors: dict[str, Tensor]) -> Path:
    """Save a model to the run directory `output` and return its checkpoint."""
    partial = write_checkpoint(output, tensors=tensors, publish=False)
    replace_text(partial / CONFIG, config.to_toml())
    reseal(partial)
    return directory.publish(partial, keep_last=0)
