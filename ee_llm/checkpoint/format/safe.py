"""Reads the pickled parts of a torch_dist checkpoint without executing any code in them.

Three kinds of files contain pickles: `.metadata` (the index, which torch reads with a plain
`pickle.load`), `common.pt` (megatron-core's non-tensor state) and the entries of `*.distcp`
(tensors written with `torch.save`, and byte entries, which torch unpickles without restriction).
This module reads the index with an unpickler that replaces an allow-list of classes by inert stubs,
reads tensors and common.pt with torch's weights-only unpickler, and rejects byte entries. It never
allocates or reads more than the size of the files.
"""

import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from ee_llm.checkpoint.format import blocks
from ee_llm.checkpoint.format.blocks import Chunk
from ee_llm.checkpoint.format.stub_unpickler import Stub, StubUnpickler
from ee_llm.errors import CheckpointError

METADATA = ".metadata"
COMMON = "common.pt"


class TensorEntry(NamedTuple):
    """A tensor of the checkpoint: its shape, its dtype and the blocks that cover it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


CheckBlock = Callable[[Chunk, bytes], None]
"""Raises CheckpointError if the bytes of a block are damaged."""


# The classes in the index of a checkpoint. None is imported: a stub replaces each of them.
_METADATA_CLASSES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    # The save plans of all ranks, which megatron-core's writer adds to the index.
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
}


class _MetadataUnpickler(StubUnpickler):
    allowed = _METADATA_CLASSES

    def find_class(self, module: str, name: str) -> Any:
        """Return a stub for an allowed class or dtype."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return Stub(name)
        return super().find_class(module, name)


def read_metadata(
    directory: Path, is_wanted: Callable[[str], bool] = lambda _: True
) -> dict[str, TensorEntry]:
    """Return the index of a torch_dist directory; raises CheckpointError as `parse_metadata`."""
    path = directory / METADATA
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: expected the index of a checkpoint") from None
    return parse_metadata(content, directory, is_wanted)


def parse_metadata(
    content: bytes, directory: Path, is_wanted: Callable[[str], bool] = lambda _: True
) -> dict[str, TensorEntry]:
    """Return the index of a torch_dist directory: tensor name -> shape, dtype and blocks.

    Args:
        content: The content of the file `.metadata`.
        directory: The directory of that file.
        is_wanted: Selects names. Entries of other names are skipped, whatever their type.

    Raises CheckpointError if the content is truncated, is not an index of tensors, names a class
    outside the allow-list, or points outside the directory.
    """
    path = directory / METADATA
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path} is not a readable index of a checkpoint: {error}") from error
    try:
        return _plain_index(metadata, path, is_wanted)
    except CheckpointError:
        raise
    except Exception as error:  # inert objects, but of any structure
        raise CheckpointError(f"{path} is not an index of tensors: {error!r}") from error


def _plain_index(
    metadata: Any, path: Path, is_wanted: Callable[[str], bool]
) -> dict[str, TensorEntry]:
    stored = {
        (index.fqn, _sizes(getattr(index, "offset", None))): info
        for index, info in metadata.storage_data.items()
    }
    entries = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: a tensor's name has type {type(name).__name__}")
        if not is_wanted(name):
            continue
        if not hasattr(entry, "chunks"):
            raise CheckpointError(
                f"{path}: {name!r} is an entry of pickled bytes, which is never read. Expected "
                "only tensors."
            )
        if (dtype := _dtype(entry.properties)) is None:
            raise CheckpointError(f"{path}: {name!r} has no dtype")
        shape, chunks = _sizes(entry.size), []
        for chunk in entry.chunks:
            offsets, sizes = _sizes(chunk.offsets), _sizes(chunk.sizes)
            info = stored[name, offsets]
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError(
                    f"{path}: {name!r} is stored compressed; expected plain tensors"
                )
            file = _inside(info.relative_path, path)
            position, length = _sizes((info.offset, info.length))
            if min(position, length) < 0 or not blocks.lies_in(offsets, sizes, shape):
                raise CheckpointError(
                    f"{path}: a block of {name!r} at {list(offsets)} of size {list(sizes)} does "
                    f"not lie in a tensor of shape {list(shape)}"
                )
            if (size := math.prod(sizes) * dtype.itemsize) > length:
                raise CheckpointError(
                    f"{path}: a block of {name!r} has {size} bytes of {dtype} {list(sizes)}, but "
                    f"only {length} in its file"
                )
            chunks.append(Chunk(offsets, sizes, file, position, length))
        # Check this before anything of that shape is allocated.
        covered, elements = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(shape)
        if covered != elements:
            raise CheckpointError(
                f"{path}: {covered} of {elements} elements of {name!r} are stored, expected all"
            )
        if blocks.any_overlap(chunks):
            raise CheckpointError(f"{path}: two blocks of {name!r} overlap, which leaves a gap")
        entries[name] = TensorEntry(shape, dtype, tuple(chunks))
    return entries


def check_sizes(directory: Path, entries: dict[str, TensorEntry]) -> None:
    """Raise CheckpointError unless every block has its own bytes in a file of `directory`.

    Together with the checks of `parse_metadata` this bounds the size of the tensors by that of the
    files.
    """
    places = sorted(
        (chunk.file, chunk.position, chunk.length, name)
        for name, entry in entries.items()
        for chunk in entry.chunks
    )
    last, end, file_size = "", 0, 0
    for file, position, length, name in places:
        path = directory / file
        if file != last:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing: expected {name!r} in it")
            last, end, file_size = file, 0, path.stat().st_size
        if position + length > file_size:
            raise CheckpointError(
                f"{path} is truncated: expected at least {position + length} bytes for {name!r}, "
                f"found {file_size}"
            )
        if position < end:
            raise CheckpointError(f"{path}: {name!r} shares bytes with another block")
        end = position + length


def _dtype(properties: Any) -> torch.dtype | None:
    # torch pickles the properties as a tuple that starts with the dtype.
    value = properties.state[0]
    dtype = getattr(torch, value.args[0], None) if isinstance(value, Stub) else None
    return dtype if isinstance(dtype, torch.dtype) else None


def _sizes(values: Any) -> tuple[int, ...]:
    if isinstance(values, Stub):  # a torch.Size
        (values,) = values.args or ((),)
    values = tuple(values or ())
    if not all(type(value) is int and abs(value) < 2**63 for value in values):
        raise CheckpointError("a size or an offset is not a 64-bit integer")
    return values


def is_plain_name(name: Any) -> bool:
    """Return whether `name` is a plain file name that cannot lead out of its directory."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\0"}


def _inside(name: Any, path: Path) -> str:
    if not is_plain_name(name):
        shown = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
        raise CheckpointError(f"{path} points at {shown}, outside the checkpoint's directory")
    return name


def read_chunk(
    directory: Path,
    name: str,
    entry: TensorEntry,
    chunk: Chunk,
    check: CheckBlock | None = None,
) -> torch.Tensor:
    """Return one block of the tensor `name` on the CPU.

    `check` verifies the block's bytes; without it, the checksums within the block, a zip archive,
    are verified. Raises CheckpointError if the file is missing, truncated or damaged, or if the
    block is anything but a tensor of the shape and dtype that the index states.
    """
    path = directory / chunk.file
    end = chunk.position + chunk.length
    try:
        # Get the size first: a read allocates the requested length, however short the file is.
        found = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(min(chunk.position, found))
            data = file.read(min(chunk.length, found))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: expected {name!r} in it") from None
    if end > found or len(data) < chunk.length:
        raise CheckpointError(
            f"{path} is truncated: expected at least {end} bytes for {name!r}, found {found}"
        )
    if check is not None:
        check(chunk, data)
    tensor = _load_zip(io.BytesIO(data), f"{path} ({name!r})", is_checked=check is not None)
    if type(tensor) is not torch.Tensor:
        raise CheckpointError(f"{path}: expected a tensor for {name!r}, found {type(tensor)}")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{path}: expected the elements of {name!r}, found a tensor of {tensor.layout} on "
            f"{tensor.device}"
        )
    if tuple(tensor.shape) != chunk.sizes or tensor.dtype != entry.dtype:
        raise CheckpointError(
            f"{path}: expected {entry.dtype} {list(chunk.sizes)} for {name!r}, "
            f"found {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor


def check_common(directory: Path) -> None:
    """Raise CheckpointError unless `common.pt` is an empty dictionary, as in our checkpoints."""
    path = directory / COMMON
    try:
        with open(path, "rb") as file:
            content = _load_zip(file, str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: expected an empty dictionary in it") from None
    if content != {}:
        raise CheckpointError(f"{path}: expected an empty dictionary, found {type(content)}")


def _load_zip(file: BinaryIO, what: str, *, is_checked: bool = False) -> Any:
    """Return the content of a `torch.save` archive, read by torch's weights-only unpickler.

    torch does not verify the CRC-32 of the parts of an archive, so this function does, unless the
    archive `is_checked` already.
    """
    # torch.load would read anything that is not a zip archive as one of its two older formats.
    if file.read(4) != b"PK\x03\x04":
        raise CheckpointError(f"{what} is not an archive written by torch.save")
    size = file.seek(0, io.SEEK_END)
    try:
        # torch never writes deflated parts but reads them. They could be a thousand times larger.
        archive = zipfile.ZipFile(file)
        if sum(part.file_size for part in archive.infolist()) > size:
            raise CheckpointError("its parts are larger than the archive")
        if not is_checked and (damaged := archive.testzip()) is not None:
            raise CheckpointError(f"it is damaged: its part {damaged} does not have its checksum")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling errors, damaged archives, sizes that do not fit
        raise CheckpointError(f"{what} cannot be read as tensors: {error}") from error
