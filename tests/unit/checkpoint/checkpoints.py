"""Checkpoints for tests, written by torch's writer and sealed by ours, without megatron-core."""

import json
import os
import pickle
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp

from ee_llm.atomic_file import replace_text
from ee_llm.checkpoint import directory
from ee_llm.checkpoint.format import safe
from ee_llm.checkpoint.format.checksums import checksums_of, sealed
from ee_llm.checkpoint.read import CONFIG
from ee_llm.config import load_config

TENSORS = {
    "embedding.word.weight": torch.arange(12.0).reshape(4, 3),
    "layers.1.norm.weight": torch.ones(3, dtype=torch.bfloat16),
    "optimizer.state.exp_avg.embedding.word.weight": torch.zeros(4, 3),
}


def write_checkpoint(output: Path, step: int = 7, tensors=None, publish: bool = True) -> Path:
    """Write a complete checkpoint below `output`, or only a sealed partial one."""
    partial = directory.create_partial(output / directory.CHECKPOINTS, step)
    dcp.save(
        dict(TENSORS if tensors is None else tensors),
        storage_writer=dcp.FileSystemWriter(partial / directory.TENSORS),
        no_dist=True,
    )
    torch.save({}, partial / directory.TENSORS / "common.pt")
    config = load_config(None, {"model.shape": "llama-tiny", "output": str(output)})
    replace_text(partial / CONFIG, config.to_toml())
    state = {"step": step, "consumed_samples": 0, "skipped_steps": 0, "extra": {}}
    directory.write_json(partial / "state.json", state)
    facts = {"step": step, "tokenizer": "bytes", "optimizer_steps": step, "layout": {"world": 1}}
    directory.seal(partial, facts, block_checksums(partial))
    return directory.publish(partial, keep_last=0) if publish else partial


def block_checksums(checkpoint: Path) -> dict[str, list[str]]:
    """Return the checksums of every block in the index."""
    tensors, places = checkpoint / directory.TENSORS, {}
    for entry in safe.read_metadata(tensors).values():
        for chunk in entry.chunks:
            places.setdefault(chunk.file, []).append((chunk.position, chunk.length))
    return {
        f"{directory.TENSORS}/{name}": checksums_of(tensors / name, blocks)
        for name, blocks in places.items()
    }


def reseal(checkpoint: Path, change=lambda facts: None) -> None:
    """Write the manifest again for files that a test has changed; `change` edits its facts."""
    facts = json.loads((checkpoint / directory.MANIFEST).read_text())
    for name in ("format", "version", "files", "crc32", "checksum"):
        facts.pop(name, None)
    change(facts)
    directory.seal(checkpoint, facts, block_checksums(checkpoint))


def write_manifest(checkpoint: Path, text: str) -> None:
    """Write a manifest with other content and a matching checksum, as an attacker would."""
    content = sealed(text) if text.endswith("}") else text
    (checkpoint / directory.MANIFEST).write_text(content)


def forget_checksums(checkpoint: Path) -> None:
    """Rewrite the manifest as version 1, which has no checksums, for the current files."""
    path = checkpoint / directory.MANIFEST
    manifest = json.loads(path.read_text())
    for name in ("crc32", "checksum"):
        manifest.pop(name, None)
    manifest["version"] = 1
    manifest["files"] = {name: (checkpoint / name).stat().st_size for name in manifest["files"]}
    path.write_text(json.dumps(manifest))


def edit_metadata(checkpoint: Path, change) -> None:
    """Apply `change` to torch's own metadata object and write it back."""
    path = checkpoint / directory.TENSORS / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    forget_checksums(checkpoint)


class Payload:
    """Creates a file when it is unpickled without restrictions."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)
