"""One damaged byte in any file of a checkpoint is an error that names the file, on every rank.

Each rank verifies the blocks that it reads; all ranks together read every block.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.checkpoint import directory
from ee_llm.checkpoint.integrity import verify
from ee_llm.checkpoint.read import CheckpointError, TensorReader
from ee_llm.checkpoint.warm_start import warm_start
from ee_llm.config import Config
from ee_llm.training.backends import BACKENDS
from tests.distributed.harness import run_ranks
from tests.distributed.runs import layout, make_config, train_ranks
from tests.distributed.tuning_runs import dense_config, tune, tuning_config
from tests.distributed.zero_runs import BACKENDS as ZERO
from tests.distributed.zero_runs import needs_deepspeed
from tests.unit.checkpoint.damage import blocks_of, files_of, flip, offsets_of
from tests.unit.conversion.huggingface.folders import make_tokenizer

ONE_STEP = {"training.steps": 1, "training.dtype": "float32"}
NONE = "nothing was found"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Write a tokenizer's file with the size of the model's vocabulary."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    make_tokenizer(path, 300)
    (path.parent / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    return {"data.tokenizer": str(path), "model.vocab_size": 300}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus, tokenizer):
    """Train on two pipeline ranks and save the optimizer."""
    output = tmp_path_factory.mktemp("trained")
    [end, _] = train_ranks(2, dense_config(output, corpus, **ONE_STEP, **layout(1, 2), **tokenizer))
    assert len({*files_of(Path(end))} & {"tensors/__0_0.distcp", "tensors/__1_0.distcp"}) == 2, end
    return Path(end)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, corpus, tokenizer, trained):
    """Tune two exits of that model on two ranks, which copy the frozen parameters."""
    output = tmp_path_factory.mktemp("tuned")
    return Path(tune(2, tuning_config(output, corpus, trained, **ONE_STEP, **tokenizer)))


def _resume(config: Config, checkpoint: Path, model) -> None:
    BACKENDS[config.parallel.engine].build_optimizer(model, checkpoint)


def _start(config: Config, checkpoint: Path, model) -> None:
    warm_start(checkpoint, model.stages, config)


def _flip_all(config, checkpoint, door, flips):
    """Return the errors of this rank for each flipped byte in turn, and without one."""
    parallel = config.parallel
    grid = distributed.initialize(
        tensor=parallel.tensor, pipeline=parallel.pipeline, timeout_s=30, seed=1
    )
    engine, found = BACKENDS[parallel.engine], []
    for place in (*flips, None):
        model = engine.build_model(config, grid, torch.float32)
        if place and grid.rank == 0:
            flip(checkpoint / place[0], place[1])
        dist.barrier()
        try:
            door(config, checkpoint, model)
            found.append(NONE)
        except CheckpointError as error:
            found.append(str(error))
        dist.barrier()
        if place and grid.rank == 0:
            flip(checkpoint / place[0], place[1])
    return found


def places(checkpoint, reads=lambda name: True):
    """Return files and offsets to damage, only in blocks that are read."""
    blocks = blocks_of(checkpoint, reads)
    for name in files_of(checkpoint):
        ours = blocks.get(name.removeprefix(f"{directory.TENSORS}/"), [])
        for offset in offsets_of(checkpoint, name)[::2]:
            if not name.endswith(".distcp") or any(a <= offset < a + n for a, n in ours):
                yield name, offset


def assert_each_is_found(world_size, config, checkpoint, door, flips):
    assert verify(checkpoint).problems == []
    ranks = run_ranks(world_size, _flip_all, config, checkpoint, door, flips, timeout_s=300)
    for number, (name, offset) in enumerate(flips):
        messages = {rank[number] for rank in ranks}
        named = [str(checkpoint / name) in message for message in messages]
        assert all(named), (name, offset, messages)
    assert {rank[-1] for rank in ranks} == {NONE}
    assert verify(checkpoint).problems == []


def is_of_model(name):
    return not name.startswith("optimizer.")


def test_resuming(tmp_path, corpus, tokenizer, trained):
    """In the layout that saved, the states of random generators are read as well."""
    config = dense_config(tmp_path, corpus, **ONE_STEP, **layout(1, 2), **tokenizer)
    assert_each_is_found(2, config, trained, _resume, list(places(trained)))


def test_resuming_under_another_layout(tmp_path, corpus, tokenizer, trained):
    """Two data-parallel ranks read the same parameters and different shards of the optimizer."""
    config = dense_config(tmp_path, corpus, **ONE_STEP, **tokenizer)
    flips = [place for place in places(trained) if place[0].endswith(".distcp")]
    assert_each_is_found(2, config, trained, _resume, flips)


def test_starting(tmp_path, corpus, tokenizer, trained):
    """Only parameters are read, neither the optimizer nor the states of random generators."""
    config = dense_config(tmp_path, corpus, **ONE_STEP, **layout(1, 2), **tokenizer)
    flips = [place for place in places(trained, is_of_model) if not place[0].startswith("rng/")]
    assert_each_is_found(2, config, trained, _start, flips)


def test_tuning(tmp_path, corpus, tokenizer, trained):
    """Layers that are neither built nor trained are also verified before the first step."""
    options = ONE_STEP | tokenizer | {"exits.boundaries": (2,), "exits.weights": (1.0,)}
    config = tuning_config(tmp_path, corpus, trained, **options)
    flips = [place for place in places(trained, is_of_model) if not place[0].startswith("rng/")]
    unbuilt = blocks_of(trained, lambda name: name.startswith("layers.6."))
    [(file, [(position, length), *_])] = unbuilt.items()
    flips.append((f"tensors/{file}", position + length // 2))
    assert_each_is_found(2, config, trained, _start, flips)


def test_resuming_a_tuning(tmp_path, corpus, tokenizer, trained, tuned):
    config = tuning_config(tmp_path, corpus, trained, **ONE_STEP, **tokenizer)
    assert any("layers.6." in name for name in TensorReader(tuned).names())
    assert_each_is_found(2, config, tuned, _resume, list(places(tuned)))


@needs_deepspeed
@pytest.mark.parametrize("stage", ["zero-1", "zero-3"])
def test_resuming_under_deepspeed(tmp_path, corpus, stage):
    """Rank 0 writes one file, which every rank reads completely."""
    config = make_config(tmp_path, corpus, **ONE_STEP, **ZERO[stage])
    [end, _] = train_ranks(2, config)
    checkpoint = Path(end)
    middle = {name: (checkpoint / name).stat().st_size // 2 for name in files_of(checkpoint)}
    flips = list(middle.items())
    for prefix in ("layers.1.", "optimizer.state.exp_avg.layers.1."):
        [blocks] = blocks_of(checkpoint, lambda name, p=prefix: name.startswith(p)).values()
        flips += [("tensors/__0_0.distcp", at + length // 2) for at, length in blocks[:2]]
    assert_each_is_found(2, config, checkpoint, _resume, flips)
