"""Reads archives of torch.save without executing code: plain values at once, tensors on access.

An archive is a zip file with a pickle and one record of bytes per storage. The pickle may only name
classes of an allow-list, and a stub replaces each of them (`checkpoint.format.stub_unpickler`).
"""

import math
import pickle
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ee_llm.checkpoint.format.stub_unpickler import Stub, StubUnpickler
from ee_llm.errors import CheckpointError, ConversionError

_PIECE_BYTES = 16 * 2**20
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = {str(dtype).removeprefix("torch.") for dtype in _STORAGES.values()}
_REBUILD, _PARAMETER = "_rebuild_tensor_v2", ("_rebuild_parameter", "_rebuild_parameter_with_state")
_NUMPY = ("_reconstruct", "scalar")

_CLASSES = {
    "torch": (*_STORAGES, *_DTYPES, "Size", "device"),
    "torch._utils": (_REBUILD, *_PARAMETER),
    "collections": ("OrderedDict", "defaultdict", "deque"),
    "builtins": ("dict", "list", "set", "frozenset", "slice", "bytearray", "complex"),
    "__builtin__": ("dict", "list", "set", "frozenset", "slice", "bytearray", "complex"),
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    # In the states of random generators and optimizers.
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": _NUMPY,
    "numpy._core.multiarray": _NUMPY,
    "_codecs": ("encode",),
    "_io": ("BytesIO",),
    "signal": ("Signals",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
}
# Classes of Megatron-LM in the arguments or the state of a run.
_MEGATRON_CLASSES = frozenset(
    """
    AttnBackend AttnMaskType AttnType CudaGraphScope DynamicGradScaler ConstantGradScaler
    LayerType ModelType RerunDiagnostic RerunMode RerunState
    """.split()  # noqa: SIM905
)


class Stored(NamedTuple):
    """The layout of a tensor in an archive, and the position of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    record: str
    offset: int


class _Unpickler(StubUnpickler):
    allowed = _CLASSES

    def is_allowed(self, module: str, name: str) -> bool:
        """Return whether a class is on the allow-list or is one of Megatron-LM's."""
        if module.partition(".")[0] == "megatron":
            return name in _MEGATRON_CLASSES
        return super().is_allowed(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """Return the description of a storage, without reading its bytes."""
        return pid


class Record(NamedTuple):
    """The position, the size and the CRC-32 of the bytes of a storage or of the pickle."""

    start: int
    size: int
    crc32: int


class Archive:
    """An archive of torch.save: `content` has plain values and stubs, tensors are read later."""

    def __init__(self, path: Path) -> None:
        """Open an archive; raises CheckpointError if it is missing, damaged or unsafe."""
        self.path = path
        self._verified: set[str] = set()
        try:
            with open(path, "rb") as file:
                self._records = _records(file)
                self.content = self._unpickle(file)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: expected an archive of torch.save") from None
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} is rejected: {error}. Only tensors and plain values are read."
            ) from None
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise CheckpointError(f"{path} cannot be read as an archive: {error!r}") from None

    def stored(self, value: Any, key: str) -> Stored | None:
        """Return the layout of a value of the content if it is a tensor, else None.

        Raises CheckpointError naming `key` if the tensor does not lie within its record, or has a
        dtype that weights do not have.
        """
        try:
            found = _as_stored(value)
        except Exception as error:  # inert objects, but of any structure
            raise CheckpointError(f"{self.path}: {key} is not a tensor: {error!r}") from None
        if found is None:
            return None
        if found.record not in self._records:
            raise CheckpointError(f"{self.path}: the bytes of {key} are missing from the archive")
        size = self._records[found.record].size
        span = _span(found)
        if math.prod(found.shape) > span:
            raise CheckpointError(
                f"{self.path}: elements of {key} share bytes, which is not supported"
            )
        if (found.offset + span) * found.dtype.itemsize > size:
            raise CheckpointError(
                f"{self.path}: {key} {list(found.shape)} of {found.dtype} does not lie within the "
                f"{size} bytes of its record"
            )
        return found

    def tensor(self, stored: Stored) -> Tensor:
        """Read a tensor from the file; raises CheckpointError if it is damaged."""
        record = self._records[stored.record]
        data = bytearray(_span(stored) * stored.dtype.itemsize)
        with open(self.path, "rb") as file:
            if len(data) < record.size and stored.record not in self._verified:
                # The checksum covers the whole record, which several tensors may share.
                self._verify(stored.record, _pieces(file, record))
            file.seek(record.start + stored.offset * stored.dtype.itemsize)
            if file.readinto(data) != len(data):
                raise CheckpointError(f"{self.path} is truncated")
        if len(data) == record.size:
            self._verify(stored.record, [data])
        if not data:
            return torch.empty(stored.shape, dtype=stored.dtype)
        flat = torch.frombuffer(data, dtype=stored.dtype)
        return flat.as_strided(stored.shape, stored.stride)

    def _verify(self, name: str, pieces: Iterable[bytes | bytearray]) -> None:
        crc32 = 0
        for piece in pieces:
            crc32 = zlib.crc32(piece, crc32)
        if crc32 != self._records[name].crc32:
            raise CheckpointError(
                f"{self.path} is damaged: its part {name} has the checksum {crc32:08x}, expected "
                f"{self._records[name].crc32:08x}. Copy or download it again."
            )
        self._verified.add(name)

    def _unpickle(self, file: BinaryIO) -> Any:
        if "byteorder" in self._records:
            record = self._records["byteorder"]
            file.seek(record.start)
            if file.read(record.size) != b"little":
                raise CheckpointError(f"{self.path} was written by a big-endian machine")
        if "data.pkl" not in self._records:
            raise CheckpointError(f"{self.path} has no data.pkl: expected an archive of torch.save")
        with zipfile.ZipFile(file) as archive:
            (name,) = (n for n in archive.namelist() if n.partition("/")[2] == "data.pkl")
            with archive.open(name) as part:
                return _Unpickler(part).load()


def namespace(value: Any) -> dict[str, Any] | None:
    """Return the arguments in a namespace by name, or None for another object."""
    if not isinstance(value, Stub) or type(value).__name__ not in ("Namespace", "SimpleNamespace"):
        return None
    return {name: _flat(item) for name, item in vars(value).items() if isinstance(name, str)}


def iteration_of(content: Mapping[str, Any], path: Path) -> int | None:
    """Return the iteration of a checkpoint, if stated; raises CheckpointError for other types."""
    found = content.get("iteration")
    if found is not None and not (type(found) is int and 0 <= found < 2**63):
        kind = type(found).__name__
        raise CheckpointError(f"{path}: iteration has type {kind}, expected a number of steps")
    return found


def _flat(value: Any) -> Any:
    """Return a value, or the name of its type if it is nested.

    Nested lists can contain each other, so that printing them could exhaust the memory. No argument
    that conversion reads is nested.
    """
    items = value if isinstance(value, list | tuple) else [value]
    is_flat = all(isinstance(item, str | int | float | None) for item in items)
    return value if is_flat else f"<{type(value).__name__}>"


def _pieces(file: BinaryIO, record: Record) -> Iterator[bytes]:
    file.seek(record.start)
    for at in range(0, record.size, _PIECE_BYTES):
        yield file.read(min(_PIECE_BYTES, record.size - at))


def _records(file: BinaryIO) -> dict[str, Record]:
    """Return the records of an archive by name."""
    if file.read(4) != b"PK\x03\x04":
        raise CheckpointError(
            f"{file.name} is not a zip archive, which torch.save writes since torch 1.6. Load it "
            "with the software that wrote it, on a machine where that is safe, and save it again."
        )
    records = {}
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            # torch never writes deflated records. They could be a thousand times larger.
            if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
                raise CheckpointError(f"{file.name}: {part.filename} is compressed")
            file.seek(part.header_offset + 26)
            name_size, extra_size = (int.from_bytes(file.read(2), "little") for _ in range(2))
            start = part.header_offset + 30 + name_size + extra_size
            if start + part.file_size > size:
                raise CheckpointError(f"{file.name} is truncated in {part.filename}")
            records[part.filename.partition("/")[2]] = Record(start, part.file_size, part.CRC)
    return records


def _as_stored(value: Any) -> Stored | None:
    if isinstance(value, Stub) and type(value).__name__ in _PARAMETER:
        value = value.args[0]  # not repeatedly: a parameter in a pickle can contain itself
    if not isinstance(value, Stub) or type(value).__name__ != _REBUILD:
        return None
    (kind, storage_type, record, _, _), offset, shape, stride = value.args[:4]
    sizes = (offset, *shape, *stride)
    if kind != "storage" or len(shape) != len(stride):
        raise ConversionError("it is not a storage")
    if not all(type(size) is int and 0 <= size < 2**48 for size in sizes):
        raise ConversionError("a size is not a count")
    dtype = _STORAGES[storage_type.__name__]
    return Stored(dtype, tuple(shape), tuple(stride), f"data/{record}", offset)


def _span(stored: Stored) -> int:
    """Return the number of elements from the first to the last one of a tensor."""
    if 0 in stored.shape:
        return 0
    steps = zip(stored.shape, stored.stride, strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)
