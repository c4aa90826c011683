"""`ee-llm convert`: converts models from Hugging Face and Megatron-LM, and to Hugging Face."""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import DownloadColumn
from torch import Tensor

from ee_llm import distributed
from ee_llm.checkpoint.format.quantized import (
    FACT,
    SCALE,
    is_quantizable,
    quantize,
    refuse_quantized,
)
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tokenizer import companions
from ee_llm.checkpoint.write import TensorSpec, write_checkpoint
from ee_llm.config import Config
from ee_llm.config.tokenizer import BYTES
from ee_llm.convert.huggingface.check import TEXT, TOLERANCE, Difference, compare
from ee_llm.convert.huggingface.export import (
    Submodel,
    dense_model,
    export_folder,
    full_model,
    truncated_model,
)
from ee_llm.convert.locate import (
    GGUF,
    HUB,
    HUGGING_FACE,
    MEGATRON,
    OURS,
    find_kind,
    local_folder,
)
from ee_llm.convert.open_source import NewExits, open_source
from ee_llm.convert.options import ConvertOptions
from ee_llm.convert.source import Source
from ee_llm.errors import CheckpointError, ConversionError

OnTensor = Callable[[str, int], None]

_MAX_SHARD_GB = 1_000_000  # a petabyte, whose number of bytes fits in 64 bits
_OF_CHECKPOINTS = ("dense", "truncate_at", "max_shard_gb")
_UNUSED = {
    HUGGING_FACE: (*_OF_CHECKPOINTS, "dtype", "revision"),
    HUB: (*_OF_CHECKPOINTS, "dtype"),
    GGUF: (*_OF_CHECKPOINTS, "revision"),
    MEGATRON: (*_OF_CHECKPOINTS, "strict", "dtype", "revision"),
    OURS: ("exits", "head", "exit_output", "tokenizer", "strict", "dtype", "revision"),
}
_WITH_TRANSFORMERS = (HUGGING_FACE, HUB, GGUF)


def convert(options: ConvertOptions) -> None:
    """Convert a model and print the path of the result.

    Raises ConversionError if the source has no model, or for options that contradict each other.
    """
    kind = find_kind(options.source)
    _check(options, kind)
    # Some libraries log to standard output, such as DeepSpeed when transformers imports it.
    with redirect_stdout(sys.stderr):
        result = _run(options, kind)
    if options.json:
        print(json.dumps(result))
        return
    console = Console(soft_wrap=True, highlight=False)
    for note in result["notes"]:
        console.print(f"note: {escape(note)}")
    console.print(f"{result['output']}: {escape(_summary(result))}")
    for found in result.get("differences", ()):
        console.print(
            "boundary {boundary}: logits differ by at most {absolute:.1e} "
            "({relative:.1e} of the largest)".format(**found)
        )


def _run(options: ConvertOptions, kind: str) -> dict[str, Any]:
    if kind == OURS:
        return _export(options) if options.to == "hf" else _rewrite(options)
    with local_folder(options, kind) as (folder, notes):
        return _import(options, folder, notes)


def _check(options: ConvertOptions, kind: str) -> None:
    """Raise ConversionError for options that do not apply to this conversion."""
    default = ConvertOptions(options.source, options.output)
    for name in _UNUSED[kind]:
        if getattr(options, name) != getattr(default, name):
            raise ConversionError(
                f"--{name.replace('_', '-')} has no effect on {options.source}, which is {kind}. "
                "Remove the option."
            )
    if kind != OURS and options.to == "hf":
        already = "already " if kind in _WITH_TRANSFORMERS else ""
        raise ConversionError(
            f"--to hf: {options.source} is {already}{kind}. Convert it to an ee-llm checkpoint "
            "first."
        )
    if kind != OURS and options.to == "int8":
        raise ConversionError(
            f"--to int8: {options.source} is {kind}. Convert it to an ee-llm checkpoint first."
        )
    if options.dense and options.truncate_at is not None:
        raise ConversionError("--dense and --truncate-at exclude each other. Remove one of them.")
    if not 0 < options.max_shard_gb <= _MAX_SHARD_GB:
        raise ConversionError(
            f"--max-shard-gb {options.max_shard_gb}: choose a size above 0 and up to "
            f"{_MAX_SHARD_GB:,}"
        )
    if options.max_shard_gb != default.max_shard_gb and options.to != "hf":
        raise ConversionError(f"--max-shard-gb has no effect with --to {options.to}. Remove it.")
    if options.text is not None and not options.check:
        raise ConversionError("--text has no effect without --check. Add --check or remove --text.")
    if options.check and kind not in _WITH_TRANSFORMERS and options.to != "hf":
        raise ConversionError(
            "--check compares with transformers, which opens neither the source nor the result. "
            "Remove it."
        )
    for name in ("head", "exit_output"):
        if not options.exits and getattr(options, name) != getattr(default, name):
            raise ConversionError(f"--{name.replace('_', '-')} needs --exits. Add --exits.")


def _import(options: ConvertOptions, folder: Path, notes: list[str]) -> dict[str, Any]:
    new = NewExits(options.exits, options.head, options.exit_output) if options.exits else None
    source = open_source(folder, new, options.tokenizer, options.strict)
    path = _write_source(options, source)
    notes = [*notes, *source.notes, *source.non_finite_notes()]
    result = {"output": str(path), "notes": notes, **_facts(source.specs)}
    if options.check:
        exits = source.config.exits
        # transformers can compute a new exit only if it is a copy of the final norm and output.
        is_unknown = "norm" not in exits.head or "block" in exits.head or exits.output == "tied"
        early = () if new is not None and is_unknown else exits.boundaries
        _compare(options, folder, TensorReader(path), source.config, early, result)
    return result


def _write_source(options: ConvertOptions, source: Source) -> Path:
    with _progress(_facts(source.specs)["bytes"], options.json) as on_tensor:
        return write_checkpoint(
            options.output,
            source.config,
            source.specs,
            source.tensor,
            tokenizer_file=source.tokenizer_file,
            files=source.files,
            on_tensor=on_tensor,
        )


def _export(options: ConvertOptions) -> dict[str, Any]:
    reader = TensorReader(options.source)
    submodel = _submodel(options, reader)
    specs = _specs(reader, submodel)
    facts = _facts(specs)
    with _progress(facts["bytes"], options.json) as on_tensor:
        path = export_folder(
            reader,
            submodel,
            options.output,
            max_shard_bytes=int(options.max_shard_gb * 10**9),
            on_tensor=on_tensor,
        )
    notes = []
    if reader.tokenizer() == BYTES:
        notes = ["The folder has no tokenizer, because transformers has no byte tokenizer."]
    result = {"output": str(path), "notes": notes, **facts}
    if options.check:
        _compare(options, path, reader, submodel.config, submodel.config.exits.boundaries, result)
    return result


def _rewrite(options: ConvertOptions) -> dict[str, Any]:
    """Write an ee-llm checkpoint with a part of the model, or with 8-bit weights."""
    reader = TensorReader(options.source)
    is_int8 = options.to == "int8"
    if not options.dense and options.truncate_at is None and not is_int8:
        raise ConversionError(
            f"{options.source} is already an ee-llm checkpoint. Add --to hf, --to int8, --dense or "
            "--truncate-at."
        )
    submodel = _submodel(options, reader)
    specs = _specs(reader, submodel)

    def read(name: str) -> Tensor:
        return reader.tensor(submodel.origins[name])

    specs, get = _in_8_bits(specs, read) if is_int8 else (specs, read)
    with _progress(_facts(specs)["bytes"], options.json) as on_tensor:
        path = write_checkpoint(
            options.output,
            submodel.config,
            specs,
            get,
            tokenizer_file=reader.tokenizer(),
            facts={FACT: "int8"} if is_int8 else None,
            files=companions(reader.path),
            on_tensor=on_tensor,
        )
    return {"output": str(path), "notes": [], **_facts(specs)}


def _in_8_bits(
    specs: dict[str, TensorSpec], get: Callable[[str], Tensor]
) -> tuple[dict[str, TensorSpec], Callable[[str], Tensor]]:
    """Return specs and a getter with the weights quantized to 8 bits, and their scales."""
    quantized_specs: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        if is_quantizable(name):
            quantized_specs[name] = TensorSpec(spec.shape, torch.int8)
            quantized_specs[name + SCALE] = TensorSpec(spec.shape[:1], torch.float32)
        else:
            quantized_specs[name] = spec

    # The writer reads a weight right before its scale.
    @functools.lru_cache(maxsize=1)
    def pair(name: str) -> tuple[Tensor, Tensor]:
        values, scale = quantize(get(name))
        if not bool(torch.isfinite(scale).all()):
            raise ConversionError(
                f"{name} has weights that are not finite, so it cannot be quantized"
            )
        return values, scale

    def quantized(name: str) -> Tensor:
        if name in specs:
            return pair(name)[0] if is_quantizable(name) else get(name)
        return pair(name.removesuffix(SCALE))[1]

    return quantized_specs, quantized


def _submodel(options: ConvertOptions, reader: TensorReader) -> Submodel:
    refuse_quantized(reader)
    config = reader.config()
    if options.truncate_at is not None:
        return truncated_model(config, options.truncate_at)
    return dense_model(config) if options.dense else full_model(config)


def _specs(reader: TensorReader, submodel: Submodel) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(tuple(reader.shape(origin)), reader.dtype(origin))
        for name, origin in submodel.origins.items()
    }


def _facts(specs: dict[str, TensorSpec]) -> dict[str, Any]:
    return {
        "tensors": len(specs),
        "bytes": sum(spec.num_bytes for spec in specs.values()),
        "dtypes": sorted({str(spec.dtype).removeprefix("torch.") for spec in specs.values()}),
    }


def _summary(result: dict[str, Any]) -> str:
    size = result["bytes"] / 2**20
    return f"{result['tensors']} tensors, {size:,.1f} MiB of {', '.join(result['dtypes'])}"


def _compare(
    options: ConvertOptions,
    folder: Path,
    reader: TensorReader,
    config: Config,
    early: Sequence[int],
    result: dict[str, Any],
) -> None:
    """Add to `result` the differences of the logits at the exits `early` and the final one.

    Raises CheckpointError if a difference is too large.
    """
    text = TEXT if options.text is None else options.text
    differences: list[Difference] = compare(folder, reader, (*early, config.model.num_layers), text)
    for difference in differences:
        if not difference.relative <= TOLERANCE:
            raise CheckpointError(
                f"boundary {difference.boundary}: the logits of {options.source} and "
                f"{result['output']} differ by {difference.absolute:.2e}, which is "
                f"{difference.relative:.1e} of the largest logit. Expected at most "
                f"{TOLERANCE:.0e}. Do not use {result['output']}: remove it."
            )
    compared = {difference.boundary for difference in differences}
    if skipped := sorted({*config.exits.boundaries} - compared):
        result["notes"].append(
            f"The exits after layers {', '.join(map(str, skipped))} were not compared, because "
            "transformers cannot compute exits of this kind."
        )
    result["differences"] = [difference._asdict() for difference in differences]


@contextmanager
def _progress(num_bytes: int, is_quiet: bool) -> Iterator[OnTensor]:
    size = DownloadColumn(binary_units=True)
    with distributed.progress_bar("converting", num_bytes, size, is_quiet=is_quiet) as bar:
        yield lambda _, amount: bar.advance(bar.task_ids[0], amount)
