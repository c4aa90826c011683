"""Models of the Hugging Face Hub, offline, from a cache in the layout of huggingface_hub."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ee_llm.checkpoint.read import TensorReader
from ee_llm.cli.main import main
from tests.unit.conversion.huggingface.folders import edit_settings, make_folder
from tests.unit.conversion.huggingface.test_convert_exits import refusal

hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

ROOT = Path(__file__).resolve().parents[4]
NAME = "tiny-org/Tiny-Model_1.0"
MAIN, TAGGED = "a" * 40, "b" * 40


def add_to_cache(cache: Path, folder: Path, commit: str = MAIN, ref: str = "main") -> Path:
    """Add a folder to a cache as one commit of a model, and return the model's directory there."""
    model = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = model / "snapshots" / commit
    for directory in (model / "blobs", model / "refs", snapshot):
        directory.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = model / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    (model / "refs" / ref).write_text(commit)
    return model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, used offline from an empty directory."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


@pytest.mark.thorough
def test_a_cached_model_is_converted_offline(tmp_path, cache):
    folder = make_folder(tmp_path / "theirs", max_shard_size="40KB")
    assert len([*folder.glob("*.safetensors")]) > 1
    add_to_cache(cache, folder)
    # In a separate process: libraries that log to standard output must not spoil the result.
    command = [sys.executable, "-m", "ee_llm", "convert", NAME, "--output", "ours"]
    environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--check", "--json"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    result = json.loads(done.stdout)
    assert result["notes"] == [f"{NAME} is at revision {MAIN} of the Hub"]
    assert result["differences"]
    assert main(["convert", str(folder), "--output", "same"]) == 0
    ours, same = TensorReader("ours"), TensorReader("same")
    for name in ours.names():
        assert torch.equal(ours.tensor(name), same.tensor(name))


def test_a_revision_is_a_branch_tag_or_commit(tmp_path, cache):
    add_to_cache(cache, make_folder(tmp_path / "new"))
    add_to_cache(cache, make_folder(tmp_path / "old", rms_norm_eps=0.5), TAGGED, "v1")
    for number, revision in enumerate(("v1", TAGGED)):
        output = f"ours {number}"
        assert main(["convert", NAME, "--output", output, "--revision", revision]) == 0
        assert TensorReader(output).config().model.norm_eps == 0.5


def test_only_known_files_are_downloaded(tmp_path, cache, monkeypatch):
    """No pickles, no code, and no weights in other formats."""
    requested: list[str] = []
    download = hub.snapshot_download

    def record(name: str, **options):
        requested.extend(options["allow_patterns"])
        return download(name, **options)

    monkeypatch.setattr(hub, "snapshot_download", record)
    folder = make_folder(tmp_path / "theirs", max_shard_size="40KB")
    add_to_cache(cache, folder)
    assert main(["convert", NAME, "--output", "ours"]) == 0
    assert {file.name for file in folder.iterdir()} <= set(requested)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling.py"):
        assert not any(Path(name).match(pattern) for pattern in requested)


def test_unknown_names_and_revisions_raise(tmp_path, cache, capsys):
    found = refusal(capsys, NAME, "--output", "ours")
    assert f"{NAME}: there is no such file or folder here, and no such model in the cache" in found
    add_to_cache(cache, make_folder(tmp_path / "theirs"))
    found = refusal(capsys, NAME, "--output", "ours", "--revision", "v9")
    assert "no such model at revision v9 in the cache of the Hugging Face Hub or on the" in found


def test_a_model_without_safetensors(tmp_path, cache, capsys):
    folder = make_folder(tmp_path / "theirs")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    add_to_cache(cache, folder)
    found = refusal(capsys, NAME, "--output", "ours")
    assert f"{NAME} has neither model.safetensors nor model.safetensors.index.json" in found


def test_a_model_of_another_function_is_refused_before_its_weights(tmp_path, cache, capsys):
    folder = make_folder(tmp_path / "theirs")
    edit_settings(folder, model_type="gemma2")
    (folder / "model.safetensors").unlink()
    add_to_cache(cache, folder)
    found = refusal(capsys, NAME, "--output", "ours")
    assert f"{NAME}: model_type = 'gemma2' is not supported" in found


def test_without_the_client(tmp_path, cache, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    found = refusal(capsys, NAME, "--output", "ours")
    assert f"{NAME} does not exist here. To download a model of this name" in found
    assert "pip install 'ee-llm[convert]'" in found


@pytest.mark.parametrize("name", ["../model", "a/b/c", "model.gguf", "/model", "a b/c", ""])
def test_invalid_ids_are_not_looked_up(cache, capsys, name):
    if name:
        assert "does not exist: expected" in refusal(capsys, name, "--output", "ours")
    else:  # It would be the current directory.
        assert "SOURCE has an empty path" in refusal(capsys, name, "--output", "ours")
