"""Convert models from Hugging Face and Megatron-LM, and back to Hugging Face."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import DownloadColumn
from torch import Tensor

from ee_llm import distributed
from ee_llm.checkpoint.format.quantized import FACT, refuse_quantized
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tokenizer import companions
from ee_llm.checkpoint.write import TensorSpec, write_checkpoint
from ee_llm.config import Config
from ee_llm.config.tokenizer import BYTES
from ee_llm.conversion.eight_bits import in_8_bits
from ee_llm.conversion.huggingface.check import TEXT, TOLERANCE, Difference, compare
from ee_llm.conversion.huggingface.export import (
    Submodel,
    dense_model,
    export_folder,
    full_model,
    truncated_model,
)
from ee_llm.conversion.locate import (
    GGUF,
    HUB,
    HUGGING_FACE,
    MEGATRON,
    OURS,
    find_kind,
    local_folder,
)
from ee_llm.conversion.open_source import NewExits, open_source
from ee_llm.conversion.options import ConvertOptions
from ee_llm.conversion.source import Source
from ee_llm.errors import CheckpointError, ConversionError

OnTensor = Callable[[str, int], None]

_MAX_SHARD_GB = 1_000_000  # a petabyte, whose number of bytes is far below 64 bits
_FOR_CHECKPOINTS = ("dense", "truncate_at", "max_shard_gb")
_UNUSED = {
    HUGGING_FACE: (*_FOR_CHECKPOINTS, "dtype", "revision"),
    HUB: (*_FOR_CHECKPOINTS, "dtype"),
    GGUF: (*_FOR_CHECKPOINTS, "revision"),
    MEGATRON: (*_FOR_CHECKPOINTS, "strict", "dtype", "revision"),
    OURS: ("exits", "head", "exit_output", "tokenizer", "strict", "dtype", "revision"),
}
_WITH_TRANSFORMERS = (HUGGING_FACE, HUB, GGUF)


@dataclass(frozen=True)
class ConversionResult:
    """The result of a conversion; `str` returns a summary in one line.

    Attributes:
        output: The checkpoint, or the folder for transformers.
        num_tensors: Number of tensors written.
        num_bytes: Total size of the tensors in bytes.
        dtypes: Names of their dtypes.
        notes: Remarks for the user.
        differences: The largest difference of the logits at each exit, if `check` is set.
    """

    output: Path
    num_tensors: int
    num_bytes: int
    dtypes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()

    def __str__(self) -> str:
        size = f"{self.num_bytes / 2**20:,.1f} MiB"
        return f"{self.output}: {self.num_tensors} tensors, {size} of {', '.join(self.dtypes)}"


def convert(options: ConvertOptions, *, progress: bool = True) -> ConversionResult:
    """Convert a model on the CPU, tensor by tensor; the result exists whole or not at all.

    Args:
        options: The source, the output and the format.
        progress: Show a progress bar, at a terminal.

    Raises:
        ConversionError: The source has no model, or the options contradict each other.
        CheckpointError: A checkpoint cannot be read or written, or --check found a difference.
    """
    kind = find_kind(options.source)
    _check(options, kind)
    if kind == OURS:
        run = _export if options.to == "hf" else _rewrite
        return run(options, progress)
    with local_folder(options, kind) as (folder, notes):
        return _import(options, folder, notes, progress)


def _check(options: ConvertOptions, kind: str) -> None:
    """Raise ConversionError for options that have no effect or contradict each other."""
    default = ConvertOptions(options.source, options.output)
    for name in _UNUSED[kind]:
        if getattr(options, name) != getattr(default, name):
            raise ConversionError(
                f"--{name.replace('_', '-')} has no effect on {options.source}, which is {kind}. "
                "Leave it out."
            )
    if kind != OURS and options.to != "ee-llm":
        already = "already " if options.to == "hf" and kind in _WITH_TRANSFORMERS else ""
        raise ConversionError(
            f"--to {options.to}: {options.source} is {already}{kind}. Convert it to an ee-llm "
            "checkpoint first."
        )
    if options.dense and options.truncate_at is not None:
        raise ConversionError(
            f"--dense and --truncate-at {options.truncate_at} are two models. Use one of the two."
        )
    if not 0 < options.max_shard_gb <= _MAX_SHARD_GB:
        raise ConversionError(
            f"--max-shard-gb {options.max_shard_gb} is out of range. Use a size above 0, up to "
            f"{_MAX_SHARD_GB:,}."
        )
    if options.max_shard_gb != default.max_shard_gb and options.to != "hf":
        raise ConversionError(
            f"--max-shard-gb {options.max_shard_gb} has no effect with --to {options.to}. Leave it "
            "out."
        )
    if options.text is not None and not options.check:
        raise ConversionError("--text has no effect without --check. Give both, or neither.")
    if options.check and kind not in _WITH_TRANSFORMERS and options.to != "hf":
        raise ConversionError(
            f"--check compares with transformers, which cannot load {options.source} ({kind}). "
            "Leave it out."
        )
    for name in ("head", "exit_output"):
        if not options.exits and getattr(options, name) != getattr(default, name):
            raise ConversionError(f"--{name.replace('_', '-')} needs --exits. Add --exits.")


def _import(
    options: ConvertOptions, folder: Path, notes: list[str], progress: bool
) -> ConversionResult:
    new = NewExits(options.exits, options.head, options.exit_output) if options.exits else None
    source = open_source(folder, new, options.tokenizer, options.strict)
    path = _write_source(options, source, progress)
    result = _result(path, source.specs, [*notes, *source.notes, *source.non_finite_notes()])
    if not options.check:
        return result
    exits = source.config.exits
    # transformers can compute a new exit only if it is a copy of the final norm and output.
    is_unknown = "norm" not in exits.head or "block" in exits.head or exits.output == "tied"
    early = () if new is not None and is_unknown else exits.boundaries
    return _compare(options, folder, TensorReader(path), source.config, early, result)


def _write_source(options: ConvertOptions, source: Source, progress: bool) -> Path:
    with _progress(_num_bytes(source.specs), progress) as on_tensor:
        return write_checkpoint(
            options.output,
            source.config,
            source.specs,
            source.tensor,
            tokenizer_file=source.tokenizer_file,
            files=source.files,
            on_tensor=on_tensor,
        )


def _export(options: ConvertOptions, progress: bool) -> ConversionResult:
    """Write a folder for transformers from an ee-llm checkpoint."""
    reader = TensorReader(options.source)
    submodel = _submodel(options, reader)
    specs = _specs(reader, submodel)
    with _progress(_num_bytes(specs), progress) as on_tensor:
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
    result = _result(path, specs, notes)
    if not options.check:
        return result
    return _compare(
        options, path, reader, submodel.config, submodel.config.exits.boundaries, result
    )


def _rewrite(options: ConvertOptions, progress: bool) -> ConversionResult:
    """Write an ee-llm checkpoint that is a part of another, or has its weights in 8 bits."""
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

    specs, get = in_8_bits(specs, read) if is_int8 else (specs, read)
    with _progress(_num_bytes(specs), progress) as on_tensor:
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
    return _result(path, specs, ())


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


def _result(path: Path, specs: Mapping[str, TensorSpec], notes: Sequence[str]) -> ConversionResult:
    return ConversionResult(
        path,
        len(specs),
        _num_bytes(specs),
        tuple(sorted({str(spec.dtype).removeprefix("torch.") for spec in specs.values()})),
        tuple(notes),
    )


def _num_bytes(specs: Mapping[str, TensorSpec]) -> int:
    return sum(spec.num_bytes for spec in specs.values())


def _compare(
    options: ConvertOptions,
    folder: Path,
    reader: TensorReader,
    config: Config,
    early: Sequence[int],
    result: ConversionResult,
) -> ConversionResult:
    """Return the result with the differences of the logits at the exits `early` and the final one.

    Raises CheckpointError for a difference that is too large.
    """
    text = TEXT if options.text is None else options.text
    differences = compare(folder, reader, (*early, config.model.num_layers), text)
    for difference in differences:
        if not difference.relative <= TOLERANCE:
            raise CheckpointError(
                f"boundary {difference.boundary}: the logits of {options.source} and "
                f"{result.output} differ by {difference.absolute:.2e}, which is "
                f"{difference.relative:.1e} of the largest logit. Expected at most "
                f"{TOLERANCE:.0e}. Do not use {result.output}: remove it."
            )
    skipped = sorted(
        {*config.exits.boundaries} - {difference.boundary for difference in differences}
    )
    notes = result.notes
    if skipped:
        notes += (
            f"The exits after layers {', '.join(map(str, skipped))} were not compared, because "
            "transformers cannot compute exits of this kind.",
        )
    return replace(result, notes=notes, differences=tuple(differences))


@contextmanager
def _progress(num_bytes: int, is_shown: bool) -> Iterator[OnTensor]:
    size = DownloadColumn(binary_units=True)
    with distributed.progress_bar("converting", num_bytes, size, is_quiet=not is_shown) as bar:
        yield lambda _, amount: bar.advance(bar.task_ids[0], amount)
