"""Reads unsharded tensors from checkpoints of Megatron-LM and EE-LLM with one file per rank.

Each tensor and pipeline rank has a directory mp_rank_TT, or mp_rank_TT_PPP with several pipeline
ranks. Its file has the layers of its stage, counted from 0. With virtual stages it has several
stages: layers pass through the first stage of every rank, then through the second.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ee_llm.architecture.tensor_parallel import TensorSplit
from ee_llm.checkpoint.write import TensorSpec
from ee_llm.config import ModelConfig
from ee_llm.conversion.megatron.archive import Archive, Stored, iteration_of, namespace
from ee_llm.conversion.megatron.tables import HEAD, current_name, is_core, is_neutral
from ee_llm.errors import CheckpointError

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(_\d{3,})?")
_MAX_DEPTH = 4  # model, language_model, embedding, word_embeddings


class Piece(NamedTuple):
    """One rank's part of a tensor, and its key in the rank's file."""

    archive: Archive
    key: str
    stored: Stored


class RankFiles:
    """The files of all ranks: the arguments, and the pieces of every tensor by tensor rank.

    Keys number layers, and output weights of exits, over the whole model.
    """

    def __init__(self, path: Path) -> None:
        """Read the arguments; raises CheckpointError naming a missing or invalid file."""
        self.path = path
        self._files = _find_files(path)
        self.arguments_file = self._files[min(self._files)]
        self.arguments, self.iteration, self.version = _facts(Archive(self.arguments_file))
        self._check_grid(self._files)
        self.pieces: dict[str, list[Piece]] = {}
        self.copies: list[list[Piece]] = []
        """The copies of the word embedding on other stages than the first."""
        self.is_core = False

    def open(self, exits: list[int]) -> None:
        """Find the pieces in all files.

        `exits` are the layers with exits, in the order of the arguments. Raises CheckpointError
        naming the file and the key that does not fit.
        """
        stages = self._stages(self._files)
        self.is_core = is_core(stages[0][0])
        first_layer = 0
        for stage in stages:
            first_layer += self._add_stage(stage, first_layer, exits)

    def _check_grid(self, files: Mapping[tuple[int, int], Path]) -> None:
        # Before format 3, tensor parallelism was the only kind and had another name.
        older = self.arguments.get("model_parallel_size", 1)
        sizes = []
        for name, default in (
            ("tensor_model_parallel_size", older),
            ("pipeline_model_parallel_size", 1),
        ):
            size = self.arguments.get(name, default)
            if type(size) is not int or not 1 <= size <= 10**4:
                raise CheckpointError(f"{self.arguments_file}: {name} is {size!r}: expected a size")
            sizes.append(size)
        self.size, num_stages = sizes
        grid = [(t, p) for t in range(self.size) for p in range(num_stages)]
        what = (
            f"{self.size} tensor and {num_stages} pipeline ranks, as {self.arguments_file} states"
        )
        for t, p in grid:
            if (t, p) not in files:
                name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if num_stages > 1 else "")
                raise CheckpointError(f"{self.path / name / FILE} is missing: expected {what}")
        for rank in files.keys() - set(grid):
            raise CheckpointError(f"{files[rank]} is not expected: expected {what}")

    def _stages(self, files: Mapping[tuple[int, int], Path]) -> list[list[dict[str, Piece]]]:
        """Return, for every stage in the order of the layers, the pieces by tensor rank."""
        num_stages = len(files) // self.size
        ranks: list[list[list[dict[str, Piece]]]] = []
        for p in range(num_stages):
            shards = [self._read(files[t, p]) for t in range(self.size)]
            if len({len(chunks) for chunks in shards}) > 1:
                raise CheckpointError(
                    f"{files[0, p]}: its tensor ranks have different virtual stages"
                )
            ranks.append([list(chunk) for chunk in zip(*shards, strict=True)])
        if len({len(chunks) for chunks in ranks}) > 1:
            raise CheckpointError(f"{self.path}: pipeline ranks have different numbers of stages")
        return [stage for chunk in zip(*ranks, strict=True) for stage in chunk]

    def _read(self, file: Path) -> list[dict[str, Piece]]:
        """Return the pieces in a file by key, for each virtual stage."""
        archive = Archive(file)
        _, iteration, version = _facts(archive)
        if (iteration, version) != (self.iteration, self.version):
            raise CheckpointError(
                f"{file} has iteration {iteration} and format {version}, but {self.arguments_file} "
                f"has iteration {self.iteration} and format {self.version}. Expected files of one "
                "checkpoint."
            )
        content, chunks = archive.content, []
        names = ["model"] if "model" in content else [f"model{i}" for i in range(len(content))]
        for name in names:
            if name in content:
                flat = _flat(archive, content[name], ())
                chunks.append({key: Piece(archive, key, stored) for key, stored in flat})
        if not chunks:
            raise CheckpointError(f"{file} has no model: expected an entry model or model0")
        return chunks

    def _add_stage(
        self, shards: list[dict[str, Piece]], first_layer: int, exit_layers: list[int]
    ) -> int:
        """Add the tensors of a stage, and return its number of layers."""
        for shard in shards[1:]:
            for key in shards[0].keys() ^ shard.keys():
                having, lacking = (shards[0], shard) if key in shards[0] else (shard, shards[0])
                file = next(iter(lacking.values())).archive.path if lacking else self.path
                raise CheckpointError(
                    f"{file}: {key} is missing, but {having[key].archive.path} has it"
                )
        names = {key: current_name(key, self.is_core) for key in shards[0]}
        layers = {int(match[2]) for name in names.values() if (match := _LAYER.match(name))}
        if layers != set(range(len(layers))):
            raise CheckpointError(
                f"{next(iter(shards[0].values())).archive.path}: the layers of its stage are "
                f"{sorted(layers)}, expected consecutive numbers from 0"
            )
        exits = [
            number for number in exit_layers if first_layer < number <= first_layer + len(layers)
        ]
        for key, name in names.items():
            pieces = [shard[key] for shard in shards]
            if name == HEAD:
                self.copies.append(pieces)
                continue
            name = _LAYER.sub(lambda m: f"{m[1]}{int(m[2]) + first_layer}.", name)
            if match := re.match(r"exit_output_layer\.(\d+)\.", name):
                place = exit_layers.index(_exit_of(pieces[0], int(match[1]), exits))
                name = f"exit_output_layer.{place}.weight"
            if name in self.pieces:
                raise CheckpointError(
                    f"{pieces[0].archive.path}: {key} occurs twice: "
                    f"{self.pieces[name][0].archive.path} has {self.pieces[name][0].key}"
                )
            self.pieces[name] = pieces
        return len(layers)


class MergedTensors:
    """The unsharded tensors of all ranks, each merged on access."""

    def __init__(
        self, ranks: RankFiles, splits: Mapping[str, TensorSplit | None], model: ModelConfig
    ) -> None:
        self.path = ranks.path
        self._ranks, self._splits, self._model = ranks, splits, model
        self.files = {key: pieces[0].archive.path for key, pieces in ranks.pieces.items()}
        self.specs = {key: self._spec(key) for key in ranks.pieces}

    def tensor(self, key: str) -> Tensor:
        """Return a tensor; raises CheckpointError if replicas on ranks differ."""
        pieces, split = self._ranks.pieces[key], self._splits[key]
        first, *others = pieces
        if split is None:
            tensor = first.archive.tensor(first.stored)
            for piece in others:
                if not torch.equal(piece.archive.tensor(piece.stored), tensor):
                    raise CheckpointError(
                        f"{piece.archive.path}: {piece.key} differs from the replica in "
                        f"{first.archive.path}"
                    )
            return tensor
        tensor = torch.empty(self.specs[key].shape, dtype=self.specs[key].dtype)
        for rank, piece in enumerate(pieces):  # only one shard at a time is in memory
            split.write_shard(tensor, self._shard(key, piece), rank, len(pieces))
        return tensor

    def check_copies(self, words: str) -> None:
        """Raise CheckpointError unless the word embedding of every stage equals the first one's."""
        for copy in self._ranks.copies:
            for piece, own in zip(copy, self._ranks.pieces.get(words, copy), strict=True):
                if not torch.equal(*(p.archive.tensor(p.stored) for p in (piece, own))):
                    raise CheckpointError(
                        f"{piece.archive.path}: {piece.key} differs from {own.key} of "
                        f"{own.archive.path}, to which it is tied"
                    )

    def _shard(self, key: str, piece: Piece) -> Tensor:
        """Return a rank's shard, with fused queries, keys and values in the current order.

        Versions before 2 had two other orders, which `architecture.tensor_parallel` does not cover.
        """
        tensor, version = piece.archive.tensor(piece.stored), self._ranks.version
        is_fused = ".query_key_value." in key or ".linear_qkv." in key
        if (
            version >= 2 or not is_fused or self._ranks.is_core
        ):  # the order in megatron-core never changed
            return tensor
        if self._model.num_kv_heads != self._model.num_heads:
            raise CheckpointError(
                f"{piece.archive.path}: checkpoint_version {version} has no grouped queries, but"
                f" {piece.key} has {self._model.num_kv_heads} groups of {self._model.num_heads}"
                " heads. Expected version 2 or later."
            )
        heads, rest = tensor.shape[0] // (3 * self._model.head_dim), tensor.shape[1:]
        if version >= 1:  # heads, width, three
            return tensor.view(heads, self._model.head_dim, 3, *rest).transpose(1, 2).flatten(0, 2)
        return tensor.view(3, heads, self._model.head_dim, *rest).transpose(0, 1).flatten(0, 2)

    def _spec(self, key: str) -> TensorSpec:
        first, *others = self._ranks.pieces[key]
        shape, dtype = first.stored.shape, first.stored.dtype
        for piece in others:
            if (piece.stored.shape, piece.stored.dtype) != (shape, dtype):
                raise CheckpointError(
                    f"{piece.archive.path}: {piece.key} is {piece.stored.dtype} "
                    f"{list(piece.stored.shape)}, expected {dtype} {list(shape)} as in "
                    f"{first.archive.path}"
                )
        split = self._splits.get(key)
        if split is not None and split.dim < len(shape):
            shape = split.unsharded_shape(shape, 1 + len(others))
        return TensorSpec(shape, dtype)


_LAYER = re.compile(r"((?:encoder|decoder)\.layers\.)(\d+)\.")


def find_rank_directories(path: Path) -> list[Path]:
    """Return the rank directories in a directory."""
    return sorted(child for child in path.glob("mp_rank_*") if _RANK.fullmatch(child.name))


def _find_files(path: Path) -> dict[tuple[int, int], Path]:
    """Return the files by tensor and pipeline rank."""
    files: dict[tuple[int, int], Path] = {}
    for directory in find_rank_directories(path):
        match = _RANK.fullmatch(directory.name)
        assert match is not None, "the directory was found with this pattern"
        if match[3]:
            raise CheckpointError(f"{directory} belongs to an expert, which cannot be converted")
        rank = int(match[1]), int(match[2] or 0)
        if rank in files:
            raise CheckpointError(
                f"{directory} and {files[rank].parent} belong to the same rank. Remove one of them."
            )
        files[rank] = directory / FILE
    return files


def _facts(archive: Archive) -> tuple[dict[str, Any], int | None, float]:
    """Return the arguments, the iteration and the version of the format."""
    content = archive.content
    if not isinstance(content, dict):
        raise CheckpointError(f"{archive.path}: expected a dictionary with args and model")
    arguments = namespace(content.get("args"))
    if arguments is None:
        raise CheckpointError(
            f"{archive.path} has no args: expected the arguments of the run, which describe the "
            "model"
        )
    version = content.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or not 0 <= version < 100:
        kind = type(version).__name__
        raise CheckpointError(
            f"{archive.path}: checkpoint_version is not a version of the format: its type is {kind}"
        )
    return arguments, iteration_of(content, archive.path), version


def _exit_of(piece: Piece, index: int, exits: list[int]) -> int:
    """Return the layer of an output weight from its index among the exits of its stage."""
    if index >= len(exits):
        raise CheckpointError(
            f"{piece.archive.path}: {piece.key} belongs to no exit: exit_layer_nums has {exits} on "
            "this stage"
        )
    return exits[index]


def _flat(archive: Archive, table: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors in nested dictionaries, with their keys joined by dots."""
    if not isinstance(table, dict) or len(path) > _MAX_DEPTH:
        name = ".".join(path) or "model"
        kind = type(table).__name__
        raise CheckpointError(f"{archive.path}: {name} has type {kind}, expected a tensor")
    for name, value in table.items():
        key = ".".join((*path, str(name)))
        if value is None or is_neutral(key):
            continue
        stored = archive.stored(value, key)
        if stored is not None:
            yield key, stored
        else:
            yield from _flat(archive, value, (*path, str(name)))
