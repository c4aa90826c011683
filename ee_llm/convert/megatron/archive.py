"""Reads what torch.save wrote: plain values at once, tensors one at a time, and runs nothing.

An archive is a zip file with a pickle and a record of bytes per storage. Whatever the pickle names
is refused unless it is on a list, and what is on the list becomes a stand-in (`inert`).
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
    # States of random generators, and what optimizers count with.
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": _NUMPY,
    "numpy._core.multiarray": _NUMPY,
    "_codecs": ("encode",),
    "_io": ("BytesIO",),
    "signal": ("Signals",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
}
# Classes of Megatron's own whose values are among the arguments or the state of a run.
_OF_MEGATRON = frozenset(
    """
    AttnBackend AttnMaskType AttnType CudaGraphScope DynamicGradScaler ConstantGradScaler
    LayerType ModelType RerunDiagnostic RerunMode RerunState
    """.split()  # noqa: SIM905
)


class Stored(NamedTuple):
    """A tensor of an archive: what it is, and where its bytes are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    record: str
    offset: int


class _Unpickler(StubUnpickler):
    allowed = _CLASSES

    def is_allowed(self, module: str, name: str) -> bool:
        """Return whether it is on the list, or an enumeration of Megatron's."""
        if module.partition(".")[0] == "megatron":
            return name in _OF_MEGATRON
        return super().is_allowed(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """Return what the pickle says of a storage; its bytes are not looked at."""
        return pid


class Record(NamedTuple):
    """The bytes of a storage, or of the pickle: where they are in the archive, and their CRC-32."""

    begin: int
    size: int
    crc32: int


class Archive:
    """An archive of torch.save: `content` is plain values and stand-ins, tensors are read later."""

    def __init__(self, path: Path) -> None:
        """Open an archive; raises CheckpointError if it is missing, damaged, or names a class."""
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
                f"{path} is refused: {error}, and only tensors and plain values are read"
            ) from None
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise CheckpointError(f"{path} can not be read as an archive: {error!r}") from None

    def stored(self, value: Any, key: str) -> Stored | None:
        """Return the tensor that a value of the content is, None if it is none.

        Raises CheckpointError naming `key` if it does not lie within its record, or is of a type
        that weights do not have.
        """
        try:
            found = _as_stored(value)
        except Exception as error:  # passive objects, but of any shape
            raise CheckpointError(f"{self.path}: {key} is not a tensor: {error!r}") from None
        if found is None:
            return None
        if found.record not in self._records:
            raise CheckpointError(f"{self.path}: the bytes of {key} are missing in the archive")
        size = self._records[found.record].size
        span = _span(found)
        if math.prod(found.shape) > span:
            raise CheckpointError(f"{self.path}: elements of {key} share bytes; expected none to")
        if (found.offset + span) * found.dtype.itemsize > size:
            raise CheckpointError(
                f"{self.path}: {key} {list(found.shape)} of {found.dtype} does not lie within the "
                f"{size} bytes that the archive has of it"
            )
        return found

    def tensor(self, stored: Stored) -> Tensor:
        """Return a tensor, read from the file now; raises CheckpointError if it is damaged."""
        record = self._records[stored.record]
        data = bytearray(_span(stored) * stored.dtype.itemsize)
        with open(self.path, "rb") as file:
            if len(data) < record.size and stored.record not in self._verified:
                # The checksum is that of the whole record, which several tensors may be parts of.
                self._verify(stored.record, _pieces(file, record))
            file.seek(record.begin + stored.offset * stored.dtype.itemsize)
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
                f"{self._records[name].crc32:08x}; copy or download it once more"
            )
        self._verified.add(name)

    def _unpickle(self, file: BinaryIO) -> Any:
        if "byteorder" in self._records:
            record = self._records["byteorder"]
            file.seek(record.begin)
            if file.read(record.size) != b"little":
                raise CheckpointError(f"{self.path} was written by a big-endian machine")
        if "data.pkl" not in self._records:
            raise CheckpointError(f"{self.path} has no data.pkl: expected an archive of torch.save")
        with zipfile.ZipFile(file) as archive:
            (name,) = (n for n in archive.namelist() if n.partition("/")[2] == "data.pkl")
            with archive.open(name) as part:
                return _Unpickler(part).load()


def namespace(value: Any) -> dict[str, Any] | None:
    """Return the arguments that a namespace holds by name, None if it is none."""
    if not isinstance(value, Stub) or type(value).__name__ not in ("Namespace", "SimpleNamespace"):
        return None
    return {name: _flat(item) for name, item in vars(value).items() if isinstance(name, str)}


def iteration_of(content: Mapping[str, Any], path: Path) -> int | None:
    """Return the iteration that a checkpoint is of; raises CheckpointError for anything else."""
    found = content.get("iteration")
    if found is not None and not (type(found) is int and 0 <= found < 2**63):
        kind = type(found).__name__
        raise CheckpointError(f"{path}: iteration is of type {kind}; expected a number of steps")
    return found


def _flat(value: Any) -> Any:
    """Return a value, or the name of its type if it is lists of lists.

    These can hold each other, and be longer to print than any memory; no argument of ours is one.
    """
    items = value if isinstance(value, list | tuple) else [value]
    is_flat = all(isinstance(item, str | int | float | None) for item in items)
    return value if is_flat else f"<{type(value).__name__}>"


def _pieces(file: BinaryIO, record: Record) -> Iterator[bytes]:
    file.seek(record.begin)
    for at in range(0, record.size, _PIECE_BYTES):
        yield file.read(min(_PIECE_BYTES, record.size - at))


def _records(file: BinaryIO) -> dict[str, Record]:
    """Return the records of an archive by name."""
    if file.read(4) != b"PK\x03\x04":
        raise CheckpointError(
            f"{file.name} is no zip archive as torch.save writes it since torch 1.6; load it with "
            "the software that wrote it, on a machine that you would trust it with, and save it "
            "again"
        )
    found = {}
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            # Deflated records, which torch never writes, could be a thousand times larger.
            if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
                raise CheckpointError(f"{file.name}: {part.filename} is compressed")
            file.seek(part.header_offset + 26)
            name_size, extra_size = (int.from_bytes(file.read(2), "little") for _ in range(2))
            begin = part.header_offset + 30 + name_size + extra_size
            if begin + part.file_size > size:
                raise CheckpointError(f"{file.name} is truncated in {part.filename}")
            found[part.filename.partition("/")[2]] = Record(begin, part.file_size, part.CRC)
    return found


def _as_stored(value: Any) -> Stored | None:
    if isinstance(value, Stub) and type(value).__name__ in _PARAMETER:
        value = value.args[0]  # once: a pickle can make a parameter that holds itself
    if not isinstance(value, Stub) or type(value).__name__ != _REBUILD:
        return None
    (kind, storage_type, record, _, _), offset, shape, stride = value.args[:4]
    sizes = (offset, *shape, *stride)
    if kind != "storage" or len(shape) != len(stride):
        raise ConversionError("it is no storage")
    if not all(type(size) is int and 0 <= size < 2**48 for size in sizes):
        raise ConversionError("a size is not a count")
    dtype = _STORAGES[storage_type.__name__]
    return Stored(dtype, tuple(shape), tuple(stride), f"data/{record}", offset)


def _span(stored: Stored) -> int:
    """Return how many elements lie from the first to the last of a tensor."""
    if 0 in stored.shape:
        return 0
    steps = zip(stored.shape, stored.stride, strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)
