"""Whatever reads a checkpoint detects a damaged byte in any of its files and names the file.

Deliberate changes by a person or an attacker also change the checksums: `reseal` and
`write_manifest`.
"""

import json
import shutil

import pytest
import torch

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.integrity import verify
from ee_llm.checkpoint.read import CheckpointError, TensorReader
from ee_llm.cli.main import main
from tests.unit.checkpoint.checkpoints import forget_checksums, reseal, write_checkpoint
from tests.unit.checkpoint.damage import blocks_of, files_of, flip, flipped, offsets_of
from tests.unit.checkpoint.surgery.sources import save, tiny
from tests.unit.conversion.huggingface.folders import make_folder

pytestmark = pytest.mark.thorough

MANIFEST = directory.MANIFEST


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A checkpoint converted from Hugging Face, with a tokenizer and companions."""
    path = tmp_path_factory.mktemp("converted")
    make_folder(path / "theirs")
    assert main(["convert", str(path / "theirs"), "--output", str(path / "ours"), "--json"]) == 0
    found = TensorReader(path / "ours").path
    assert {"tokenizer/tokenizer.json", "huggingface/config.json"} <= set(files_of(found))
    return found


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory):
    """A checkpoint with optimizer state and generators, in several tensor files."""
    path = tmp_path_factory.mktemp("rewritten")
    save(path / "whole")
    arguments = ["--tensor", "2", "--pipeline", "2", "--output", str(path / "cut"), "--json"]
    assert main(["checkpoint", "reshard", str(path / "whole"), *arguments]) == 0
    found = TensorReader(path / "cut").path
    assert sum(name.endswith(".distcp") for name in files_of(found)) == 4
    return found


def error_of(capsys, *arguments):
    """Return the error of a command, or "" if it succeeds."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    message = " ".join(capsys.readouterr().err.split())
    assert (status == 2) == bool(message), message
    return message


def is_unread(checkpoint, name, offset, is_wanted):
    """Return whether a byte lies only in blocks of tensors that are not wanted."""
    file = name.removeprefix(f"{directory.TENSORS}/")
    blocks = blocks_of(checkpoint, is_wanted).get(file, [])
    return name.endswith(".distcp") and not any(a <= offset < a + n for a, n in blocks)


@pytest.mark.parametrize("kind", ["converted", "rewritten"])
def test_verify_finds_one_flipped_byte_anywhere(kind, request):
    """Checksums cover every byte, including the padding within a block."""
    checkpoint = request.getfixturevalue(kind)
    assert verify(checkpoint).problems == []
    for name in files_of(checkpoint):
        for offset in offsets_of(checkpoint, name):
            with flipped(checkpoint / name, offset):
                if name == MANIFEST:
                    with pytest.raises(CheckpointError, match=r"manifest\.json"):
                        verify(checkpoint)
                    continue
                problems = verify(checkpoint).problems
            assert len(problems) == 1, (name, offset)
            assert str(checkpoint / name) in problems[0], offset
    assert verify(checkpoint).problems == []


def test_any_changed_byte_of_a_manifest_is_detected(tmp_path):
    """This includes its last line, which is its own checksum."""
    checkpoint = write_checkpoint(tmp_path)
    path = checkpoint / MANIFEST
    whole = path.read_bytes()
    for offset, byte in enumerate(whole):
        for other in {byte ^ 0xFF, byte ^ 0x01, byte ^ 0x03, byte ^ 0x20}:
            path.write_bytes(whole[:offset] + bytes([other]) + whole[offset + 1 :])
            with pytest.raises(CheckpointError, match=r"manifest\.json"):
                TensorReader(checkpoint)
    for content in (whole[:-1], whole + b"\n", whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            TensorReader(checkpoint)


def generate(path, output):
    return ("generate", "--checkpoint", path, "--prompt", "a", "--max-tokens", 1, "--json")


def export(path, output):
    return ("convert", path, "--to", "hf", "--output", output, "--json")


def to_int8(path, output):
    return ("convert", path, "--to", "int8", "--output", output, "--json")


def move(path, output):
    return ("checkpoint", "move-exits", path, "--placement", "pre", "--output", output, "--json")


def remove(path, output):
    return ("checkpoint", "remove-exits", path, "--exits", 2, "--output", output, "--json")


def info(path, output):
    return ("checkpoint", "info", path, "--verify", "--json")


def is_of_model(name):
    return not name.startswith("optimizer.")


def is_any(name):
    return True


@pytest.mark.parametrize(
    ("kind", "command", "reads"),
    [
        ("converted", generate, is_of_model),
        ("converted", export, is_of_model),
        ("converted", to_int8, is_of_model),
        ("rewritten", generate, is_of_model),
        ("rewritten", move, is_any),
        ("rewritten", remove, is_any),
        ("rewritten", info, is_any),
    ],
)
def test_commands_name_the_file_with_a_flipped_byte(kind, command, reads, request, capsys):
    """Damage to optimizer blocks and generators does not matter to commands that skip them."""
    checkpoint = request.getfixturevalue(kind)
    output = checkpoint.parent / "output"
    for name in files_of(checkpoint):
        if name.startswith("rng/") and reads is is_of_model:
            continue
        for offset in offsets_of(checkpoint, name)[1::3]:
            if is_unread(checkpoint, name, offset, reads):
                continue
            with flipped(checkpoint / name, offset):
                message = error_of(capsys, *command(checkpoint, output))
            assert str(checkpoint / name) in message, (name, offset, message)
            assert not (output / directory.CHECKPOINTS / directory.LATEST).exists()
    assert error_of(capsys, *command(checkpoint, output)) == ""
    shutil.rmtree(output, ignore_errors=True)


@pytest.mark.parametrize("change", ["shortened", "lengthened", "emptied", "removed", "a directory"])
def test_files_of_another_size_are_named(rewritten, tmp_path, change):
    checkpoint = shutil.copytree(rewritten, tmp_path / rewritten.name)
    for name in files_of(checkpoint):
        path = checkpoint / name
        whole = path.read_bytes()
        if change in ("removed", "a directory"):
            path.unlink()
            if change == "a directory":
                path.mkdir()
        else:
            other = {"shortened": whole[:-1], "lengthened": whole + b"\0", "emptied": b""}
            path.write_bytes(other[change])
        with pytest.raises(CheckpointError, match=name):
            TensorReader(checkpoint)
        if name != MANIFEST:
            assert [str(path) in problem for problem in verify(checkpoint).problems] == [True]
        if path.is_dir():
            path.rmdir()
        path.write_bytes(whole)
    assert verify(checkpoint).problems == []


def test_swapped_files_are_named(tmp_path):
    """Two intact files of equal size, for example of two runs or of two ranks of one run."""
    one, other = (save(tmp_path / str(seed), seed=seed).path for seed in (1, 2))
    assert verify(one).problems == verify(other).problems == []
    for name in ("tensors/__0_0.distcp", "config.toml"):
        kept = (one / name).read_bytes()
        assert len(kept) == (other / name).stat().st_size
        shutil.copyfile(other / name, one / name)
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            TensorReader(one).tensor("layers.1.mlp.linear_fc1.weight")
        (one / name).write_bytes(kept)
    assert verify(one).problems == []


def test_swapped_blocks_are_detected(tmp_path):
    """Each block is intact, but not at its position in the index."""
    checkpoint = write_checkpoint(tmp_path, tensors={"a": torch.zeros(4), "b": torch.ones(4)})
    [(file, [first, second])] = blocks_of(checkpoint).items()
    path = checkpoint / directory.TENSORS / file
    content = path.read_bytes()
    assert first[1] == second[1]
    path.write_bytes(content[second[0] :] + content[: second[0]])
    reader = TensorReader(checkpoint)
    for name in "ab":
        with pytest.raises(CheckpointError, match=r"distcp is damaged: the checksum of its bytes"):
            reader.tensor(name)


def test_extra_files_are_reported_and_never_read(rewritten, tmp_path):
    checkpoint = shutil.copytree(rewritten, tmp_path / rewritten.name)
    for name in (".DS_Store", "tensors/__9_0.distcp", "huggingface/notes.txt"):
        (checkpoint / name).write_bytes(b"x")
    report = verify(checkpoint)
    assert report.problems == []
    assert report.extra == [".DS_Store", "huggingface/notes.txt", "tensors/__9_0.distcp"]
    (checkpoint / "huggingface" / "generation_config.json").write_text('{"eos_token_id": 0}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json does not belong"):
        TensorReader(checkpoint)
    [problem] = verify(checkpoint).problems
    assert "generation_config.json" in problem


def test_only_blocks_that_are_read_are_verified(rewritten, tmp_path):
    """A rank verifies only what it reads; damage elsewhere does not stop it."""
    checkpoint = shutil.copytree(rewritten, tmp_path / rewritten.name)
    blocks = blocks_of(checkpoint, lambda name: name == "output.weight")["__3_0.distcp"]
    flip(checkpoint / "tensors" / "__3_0.distcp", blocks[0][0] + 300)
    reader = TensorReader(checkpoint)
    for name in (*reader.names(), *reader.names(optimizer=True)):
        if name != "output.weight":
            assert reader.tensor(name).shape == reader.shape(name)
    with pytest.raises(CheckpointError, match=r"__3_0\.distcp is damaged"):
        reader.tensor("output.weight")


@pytest.mark.parametrize("has_checksums", [True, False])
def test_one_changed_number_changes_the_fingerprint(tmp_path, has_checksums):
    """A fingerprint of samples of each file would miss a small head that was tuned again."""
    path = save(tmp_path, tiny(vocab_size=20_000), optimizer=False).path

    def fingerprint():
        # With checksums of the current content, as a run would write it.
        (reseal if has_checksums else forget_checksums)(path)
        return TensorReader(path).fingerprint()

    kept = fingerprint()
    file = path / "tensors" / "__0_0.distcp"
    assert file.stat().st_size > 2 * 64 * 4096  # larger than a sample
    blocks = blocks_of(path)[file.name]
    offsets = {at + length * part // 7 for at, length in blocks[::3] for part in (3, 4)}
    for offset in offsets:
        with flipped(file, offset):
            assert fingerprint() != kept, offset
    assert fingerprint() == kept


def test_a_checkpoint_without_checksums_is_verified_as_far_as_possible(tmp_path):
    """Version 1 has none, but the archive of a tensor has: of all but padding and headers."""
    checkpoint = write_checkpoint(tmp_path)
    forget_checksums(checkpoint)
    assert (TensorReader(checkpoint).tensor("layers.1.norm.weight") == 1).all()
    report = verify(checkpoint)
    assert (report.problems, report.has_checksums) == ([], False)
    [file] = blocks_of(checkpoint)
    path = checkpoint / "tensors" / file
    content = path.read_bytes()
    at = content.index(torch.arange(12.0).numpy().tobytes())
    with flipped(path, at + 5):
        with pytest.raises(CheckpointError, match=rf"{file}.*damaged: its part archive/data/0"):
            TensorReader(checkpoint).tensor("embedding.word.weight")
        [problem] = verify(checkpoint).problems
        assert file in problem
    state = checkpoint / "state.json"
    state.write_text(state.read_text().replace('"step": 7', '"step": 5'))
    with pytest.raises(CheckpointError, match=r"state\.json: step is 5, but 7 in manifest\.json"):
        TensorReader(checkpoint).state()
    assert len(verify(checkpoint).problems) == 1


def test_info_reports_the_verification(rewritten, tmp_path, capsys):
    arguments = ["checkpoint", "info", str(rewritten), "--verify"]
    assert main(arguments) == 0
    assert "all checksums match" in " ".join(capsys.readouterr().out.split())
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["verification"]["ok"] is True
    assert facts["verification"]["files"] == len(files_of(rewritten)) - 1
    checkpoint = shutil.copytree(rewritten, tmp_path / rewritten.name)
    for name in ("tensors/__1_0.distcp", "rng/rank-00000.safetensors", "config.toml"):
        flip(checkpoint / name, 5)
    (checkpoint / "state.json").unlink()
    assert main(["checkpoint", "info", str(checkpoint), "--verify", "--json"]) == 2
    printed = capsys.readouterr()
    verification = json.loads(printed.out)["verification"]
    assert (verification["ok"], len(verification["problems"])) == (False, 4)
    for name in ("__1_0.distcp", "rank-00000.safetensors", "config.toml", "state.json"):
        assert sum(name in problem for problem in verification["problems"]) == 1
        assert name in printed.err
