"""Dequantizes GGUF files into a folder of safetensors, with transformers' reader.

transformers ignores parts of a GGUF file that it does not know: tensors, scalings of rotary
positions, experts. This module therefore reads the metadata as well, and rejects a file whose
content would be lost.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ee_llm.architecture.rotary import inverse_frequencies
from ee_llm.config import ModelConfig
from ee_llm.conversion.huggingface.folder import SETTINGS, read_object
from ee_llm.conversion.huggingface.settings import read_settings
from ee_llm.conversion.values import SettingsError
from ee_llm.errors import CheckpointError, ConversionError

_MAGIC = b"GGUF"
_ROPE_FACTORS = "rope_freqs.weight"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file, by its content."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


@contextmanager
def dequantized(path: Path, scratch: Path, dtype: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder with the model of a GGUF file, as safetensors, and its tokenizer.

    Dequantization needs memory for the whole model, and as much space in `scratch`.

    Args:
        path: The file.
        scratch: The directory in which the temporary folder is created. It is removed afterwards.
        dtype: The dtype of the weights. By default that of the file's matrices if all have the same
            floating-point one, else bfloat16.

    Raises:
        CheckpointError: The file is damaged, or its model cannot be converted without loss.
        ConversionError: A package is missing.
    """
    transformers = _transformers()
    reader = _open(path)
    scaling = _rope_scaling(path, reader)
    with _isolated(path) as link:
        config = transformers.AutoConfig.from_pretrained(link, gguf_file=path.name).to_dict()
    try:
        read_settings(_with_scaling(config, scaling))
    except SettingsError as error:
        raise CheckpointError(f"{path}: {error}") from None
    names = {tensor.name for tensor in reader.tensors} - {_ROPE_FACTORS}
    dtype = dtype or _own_dtype(reader)
    del reader
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=scratch) as made:
        folder = Path(made)
        with _isolated(path) as link:
            _save(transformers, path, link, names, dtype, folder)
        settings = _with_scaling(read_object(folder / SETTINGS), scaling)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        yield folder


@contextmanager
def _isolated(path: Path) -> Iterator[Path]:
    """Yield a folder with only a link to a file.

    transformers also reads other files next to a GGUF file, and offers to run code in them.
    """
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / path.name).symlink_to(path.resolve())
        yield Path(made)


def _transformers() -> Any:
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise ConversionError(
            f"a GGUF file needs the package {error.name}: pip install 'ee-llm[gguf]'"
        ) from None
    return transformers


def _open(path: Path) -> Any:
    """Return gguf's reader of a file, after checking that the model is complete without experts."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a complete GGUF file: {error}") from None
    if (parts := _value(reader, "split.count", 1)) > 1:
        raise CheckpointError(
            f"{path} is one of {parts} parts of a model. Merge them first with llama.cpp's "
            "llama-gguf-split --merge."
        )
    kind = _value(reader, "general.architecture", None)
    if _value(reader, f"{kind}.expert_count", 0):
        raise CheckpointError(
            f"{path}: the model has a mixture of experts ({kind}.expert_count), which is not "
            "supported"
        )
    return reader


def _value(reader: Any, name: str, default: Any) -> Any:
    field = reader.fields.get(name)
    return default if field is None else field.contents()


def _own_dtype(reader: Any) -> str:
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return _DTYPES.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


def _rope_scaling(path: Path, reader: Any) -> dict[str, Any] | None:
    """Return the scaling of rotary positions in the form of config.json, or None.

    llama.cpp stores the scaling of Llama 3 as divisors of the frequencies. Raises CheckpointError
    for other divisors and for scalings that are not supported.
    """
    kind = _value(reader, "general.architecture", None)
    scaling = _value(reader, f"{kind}.rope.scaling.type", "none")
    factor = _value(reader, f"{kind}.rope.scaling.factor", None)
    factor = _value(reader, f"{kind}.rope.scale_linear", factor)
    if scaling not in ("none", "linear"):
        raise CheckpointError(
            f"{path}: {kind}.rope.scaling.type = {scaling!r} is not supported. Supported: none, "
            "linear, and the divisors of Llama 3."
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if _ROPE_FACTORS in tensors:
        divisors = torch.tensor(tensors[_ROPE_FACTORS].data, dtype=torch.float32)
        base = float(_value(reader, f"{kind}.rope.freq_base", 10000.0))
        return _llama3_scaling(path, divisors, base)
    if factor is None or float(factor) in (0.0, 1.0):
        return None
    return {"rope_type": "linear", "factor": float(factor)}


def _llama3_scaling(path: Path, divisors: torch.Tensor, base: float) -> dict[str, Any] | None:
    if bool((divisors == 1).all()):
        return None
    factor = round(float(divisors.max()), 3)
    options: dict[str, Any] = {
        **{"num_layers": 1, "hidden_size": 2 * divisors.numel(), "num_heads": 1, "vocab_size": 1},
        "rope_theta": base,
    }
    plain = inverse_frequencies(ModelConfig(**options))
    scaled = inverse_frequencies(
        ModelConfig(**options, rope_scaling="llama3", rope_factor=factor)
    )  # the defaults are Llama 3's other factors
    if not torch.allclose(plain / scaled, divisors, rtol=1e-4):
        raise CheckpointError(
            f"{path}: {_ROPE_FACTORS} scales rotary positions in another way than Llama 3 "
            "(factors 1 and 4, original length 8192), which is not supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _with_scaling(settings: Mapping[str, Any], scaling: dict[str, Any] | None) -> dict[str, Any]:
    if scaling is None:
        return dict(settings)
    rope = settings.get("rope_parameters") or {}
    return {**settings, "rope_parameters": {**rope, **scaling}}


def _save(
    transformers: Any, path: Path, isolated: Path, names: set[str], dtype: str, folder: Path
) -> None:
    """Save the model that transformers reads from a file; raises CheckpointError if it lacks parts.

    `isolated` is the folder with only a link to the file.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    given: dict[str, Any] = {"gguf_file": path.name}
    loading: dict[str, Any] = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # older versions always dequantize
        loading["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(isolated, **given, **loading)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    read = model.state_dict().keys() - tied
    if found["missing_keys"] or found["unexpected_keys"] or len(read) != len(names):
        lost = sorted(map(str, [*found["missing_keys"], *found["unexpected_keys"]]))
        raise CheckpointError(
            f"{path} has {len(names)} tensors, but transformers {transformers.__version__} reads "
            f"{len(read)} of a {model.config.model_type}{': ' if lost else ''}{', '.join(lost)}. "
            "The model would not be the same. Convert the original model instead."
        )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(isolated, **given).save_pretrained(folder)
    _remove_tokens_without_embedding(folder / "tokenizer.json", model.config.vocab_size)


def _remove_tokens_without_embedding(path: Path, vocab_size: int) -> None:
    """Remove tokens that transformers has added and for which the embedding has no row."""
    if not path.is_file():
        return
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    added = tokenizer.get("added_tokens") or []
    tokenizer["added_tokens"] = [token for token in added if token["id"] < vocab_size]
    if len(tokenizer["added_tokens"]) < len(added):
        path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
