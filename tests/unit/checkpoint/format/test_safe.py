"""No code in a checkpoint is executed, wherever it is planted."""

import builtins
import importlib
import io
import pickle
import pickletools
import zipfile

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.format import safe
from ee_llm.checkpoint.read import CheckpointError, TensorReader
from tests.unit.checkpoint.checkpoints import (
    Payload,
    edit_metadata,
    forget_checksums,
    write_checkpoint,
)

NAME = "embedding.word.weight"


@pytest.fixture
def marker(tmp_path):
    """A path that a payload creates. The fixture first checks that the payload works."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists(), "the payload has no effect, so this test would prove nothing"
    path.unlink()
    return path


def plant_entry(checkpoint, data, is_bytes):
    """Append `data` to a .distcp file and make the index refer to it as `NAME`."""
    tensors = checkpoint / directory.TENSORS
    file = next(tensors.glob("*.distcp"))
    position = file.stat().st_size
    file.write_bytes(file.read_bytes() + data)

    def change(metadata):
        index = next(index for index in metadata.storage_data if index.fqn == NAME)
        if is_bytes:
            metadata.state_dict_metadata[NAME] = BytesStorageMetadata()
            del metadata.storage_data[index]
            index = MetadataIndex(NAME)
        metadata.storage_data[index] = _StorageInfo(file.name, position, len(data))

    edit_metadata(checkpoint, change)


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def read_all(checkpoint):
    reader = TensorReader(checkpoint)
    safe.check_common(checkpoint / directory.TENSORS)
    return [reader.tensor(name) for name in reader.names()]


@pytest.mark.parametrize(
    "place",
    [
        "metadata",
        "metadata_inside",
        "common",
        "common_legacy",
        "tensor",
        "tensor_legacy",
        "tensor_raw",
        "bytes",
    ],
)
def test_planted_pickle_is_refused_and_not_executed(tmp_path, marker, place):
    checkpoint = write_checkpoint(tmp_path / "run")
    tensors = checkpoint / directory.TENSORS
    payload = Payload(marker)
    file = ".metadata"
    if place == "metadata":
        (tensors / ".metadata").write_bytes(pickle.dumps(payload))
    elif place == "metadata_inside":
        edit_metadata(checkpoint, lambda metadata: setattr(metadata, "planner_data", payload))
    elif place.startswith("common"):
        file = "common.pt"
        content = saved(payload, _use_new_zipfile_serialization=place == "common")
        (tensors / "common.pt").write_bytes(content)
    elif place == "bytes":
        plant_entry(checkpoint, saved([payload]), is_bytes=True)
    else:
        file = ".distcp"
        data = {
            "tensor": saved(payload),
            "tensor_legacy": saved(payload, _use_new_zipfile_serialization=False),
            "tensor_raw": pickle.dumps(payload),
        }[place]
        plant_entry(checkpoint, data, is_bytes=False)
    forget_checksums(checkpoint)
    with pytest.raises(CheckpointError, match=file):
        read_all(checkpoint)
    assert not marker.exists()


def test_untouched_checkpoint_is_read(tmp_path):
    """The control of the test above: without planted data, the checkpoint is read."""
    assert len(read_all(write_checkpoint(tmp_path))) == 2


@pytest.mark.parametrize("name", ["Size.__class__", "Size.__init__.__globals__", "load"])
def test_allowed_classes_do_not_lead_to_others(name):
    """A dotted name could reach any object from an allowed class; torch.load unpickles files."""
    program = b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    with pytest.raises(pickle.UnpicklingError, match="it names torch"):
        safe._MetadataUnpickler(io.BytesIO(program)).load()


def build(module, name, attribute):
    """Return a pickle whose BUILD sets an attribute of a class (the "slots" half of a state)."""
    program = b"\x80\x04"
    for text in (module, name):
        program += b"\x8c" + bytes([len(text)]) + text.encode()
    program += b"\x93N}\x8c" + bytes([len(attribute)]) + attribute.encode() + b"\x88s\x86b."
    return program


@pytest.mark.parametrize(
    ("module", "name", "attribute"),
    [
        ("pathlib", "Path", "exists"),
        ("pathlib", "PosixPath", "name"),
        ("collections", "OrderedDict", "planted"),
        ("torch.distributed.checkpoint.metadata", "Metadata", "storage_data"),
    ],
)
def test_classes_of_the_process_cannot_be_changed(tmp_path, module, name, attribute):
    """BUILD is setattr on the top of the stack: here a class that the whole process uses."""
    checkpoint = write_checkpoint(tmp_path)
    program = build(module, name, attribute)
    control = pickletools.genops(program)
    assert [opcode.name for opcode, _, _ in control][-2:] == ["BUILD", "STOP"]
    real = getattr(importlib.import_module(module), name)
    before = dict(vars(real))
    (checkpoint / directory.TENSORS / ".metadata").write_bytes(program)
    forget_checksums(checkpoint)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        TensorReader(checkpoint)
    assert dict(vars(real)) == before
    stub = safe._MetadataUnpickler(io.BytesIO(program)).find_class(module, name)
    assert stub is not real
    with pytest.raises(pickle.UnpicklingError, match=f"it sets 'planted' of the class {name}"):
        stub.planted = True


def test_build_sets_attributes_of_real_classes():
    """The control of the test above: with real classes, such a pickle changes them."""
    name = "Victim"
    globals()[name] = type(name, (), {})
    pickle.loads(build(__name__, name, "planted"))
    assert globals().pop(name).planted is True


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__", "open"])
def test_builtins_are_refused(name):
    with pytest.raises(pickle.UnpicklingError, match=rf"it names \w+\.{name},"):
        safe._MetadataUnpickler(io.BytesIO(pickle.dumps(getattr(builtins, name)))).load()


def nested(depth):
    return b"\x80\x02)" + b"\x85" * depth


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "requires a memo of 2147483647 values"),
        (b"Np2147483647\n.", "requires a memo of 2147483647 values"),
        (b"\x80\x02}" + nested(10**6)[2:] + b"Ns.", "a tuple of 1001 items"),
        (nested(600) + b"q\x00" + b"h\x00" + b"\x85" * 600 + b".", "a tuple of 1001 items"),
        (nested(600) + b"2" + b"\x85" * 600 + b".", "a tuple of 1001 items"),
        (b"\x80\x02((" + nested(600)[2:] + b"Nt" + b"\x85" * 600 + b".", "of 1001 items"),
        (b"\x80\x04((" + nested(600)[2:] + b"\x91t" + b"\x85" * 600 + b".", "of 1001 items"),
        (b"\x80\x02" + b"N" + b"22\x87" * 30 + b".", "a tuple of 1092 items"),  # 3 to the 30th
        (b"\x80\x02(" + b"N" * 1001 + b"t.", "a tuple of 1001 items"),
    ],
)
def test_pickles_that_would_exhaust_the_machine_are_refused(program, expected):
    """The memo is an array of that length; hashing such a key crashes the process or never ends."""
    with pytest.raises(pickle.UnpicklingError, match=expected):
        safe._MetadataUnpickler(io.BytesIO(program))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_unchanged(protocol):
    shared = [1, ("a", (2.5, None))]
    value = {(1, (2, 3)): shared, "b": (shared, {}, (), True), "c": list(range(2000))}
    program = pickle.dumps(value, protocol)
    assert safe._MetadataUnpickler(io.BytesIO(program)).load() == value


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "..", ".", "", "a/b", "a/", "a\0b"])
def test_index_that_points_outside_the_directory_is_refused(tmp_path, path):
    checkpoint = write_checkpoint(tmp_path)

    def change(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = path

    edit_metadata(checkpoint, change)
    with pytest.raises(CheckpointError, match="outside the checkpoint's directory"):
        TensorReader(checkpoint)


def test_nonempty_common_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path)
    torch.save({"args": 1}, checkpoint / directory.TENSORS / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt: expected an empty dictionary"):
        safe.check_common(checkpoint / directory.TENSORS)


def test_entry_of_another_shape_or_type_is_refused(tmp_path):
    for number, content in enumerate([torch.zeros(2, 3), torch.zeros(4, 3).double(), [1.0]]):
        checkpoint = write_checkpoint(tmp_path / str(number))
        plant_entry(checkpoint, saved(content), is_bytes=False)
        with pytest.raises(CheckpointError, match=r"distcp.*expected"):
            TensorReader(checkpoint).tensor(NAME)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.zeros(4, 3, device="meta"), "torch.strided on meta"),
        (torch.zeros(4, 3).to_sparse(), "torch.sparse_coo on cpu"),
    ],
)
def test_entry_without_elements_is_refused(tmp_path, content, found):
    checkpoint = write_checkpoint(tmp_path)
    plant_entry(checkpoint, saved(content), is_bytes=False)
    with pytest.raises(CheckpointError, match=f"distcp.*expected the elements of .*{found}"):
        TensorReader(checkpoint).tensor(NAME)


def test_damaged_index_names_the_file(tmp_path):
    for number, content in enumerate([b"", b"\x80\x04", b"no pickle", pickle.dumps([1, 2])]):
        checkpoint = write_checkpoint(tmp_path / str(number))
        (checkpoint / directory.TENSORS / ".metadata").write_bytes(content)
        forget_checksums(checkpoint)
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            TensorReader(checkpoint)


def test_shape_larger_than_the_file_is_refused(tmp_path):
    """Otherwise 12 EiB would be allocated before anything is read."""
    checkpoint = write_checkpoint(tmp_path)

    def change(metadata):
        entry = metadata.state_dict_metadata[NAME]
        entry.size = entry.chunks[0].sizes = torch.Size([2**40, 3 * 2**20])

    edit_metadata(checkpoint, change)
    with pytest.raises(CheckpointError, match=rf"a block of '{NAME}' has \d+ bytes.* but only"):
        TensorReader(checkpoint)


@pytest.mark.parametrize("field", ["length", "offset"])
def test_length_beyond_the_file_is_refused(tmp_path, field):
    checkpoint = write_checkpoint(tmp_path)

    def change(metadata):
        index = next(index for index in metadata.storage_data if index.fqn == NAME)
        setattr(metadata.storage_data[index], field, 2**62)

    edit_metadata(checkpoint, change)
    entry = safe.read_metadata(checkpoint / directory.TENSORS)[NAME]
    for read in (
        lambda: TensorReader(checkpoint),
        lambda: safe.read_chunk(checkpoint / directory.TENSORS, NAME, entry, entry.chunks[0]),
    ):
        with pytest.raises(CheckpointError, match=rf"is truncated: .* for '{NAME}', found \d+"):
            read()


def test_oversized_integers_are_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path)

    def change(metadata):
        index = next(index for index in metadata.storage_data if index.fqn == NAME)
        metadata.storage_data[index].length = 10**5000

    edit_metadata(checkpoint, change)
    with pytest.raises(CheckpointError, match="not a 64-bit integer"):
        TensorReader(checkpoint)


def test_blocks_that_share_bytes_are_refused(tmp_path):
    """A thousand tensors in the bytes of one would need a thousand times the file's memory."""
    checkpoint = write_checkpoint(tmp_path)

    def change(metadata):
        places = list(metadata.storage_data)
        for index in places[1:]:
            metadata.storage_data[index] = metadata.storage_data[places[0]]

    edit_metadata(checkpoint, change)
    with pytest.raises(CheckpointError, match="shares bytes with another block"):
        TensorReader(checkpoint)


def test_deflated_archive_larger_than_its_file_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path)
    deflated = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(torch.zeros(1 << 16)))) as source,
        zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for part in source.namelist():
            target.writestr(part, source.read(part))
    plant_entry(checkpoint, deflated.getvalue(), is_bytes=False)
    with pytest.raises(CheckpointError, match="larger than the archive"):
        TensorReader(checkpoint).tensor(NAME)
