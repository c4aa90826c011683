"""Saving under one layout and loading under another, optimizer included; and what must fail."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from ee_llm import platform
from ee_llm.checkpoint import directory
from ee_llm.checkpoint.load import load
from ee_llm.checkpoint.read import CheckpointError, TensorReader
from ee_llm.checkpoint.save import save
from ee_llm.checkpoint.sharded import leaves, model_state
from ee_llm.checkpoint.state import TrainState
from ee_llm.config import Config, load_config
from ee_llm.training.optimizer import (
    build_optimizer,
    set_learning_rate,
    take_step,
    wrap_stages,
)
from tests.distributed.harness import run_ranks
from tests.unit.checkpoint.checkpoints import Payload, accept_sizes

platform.enable_megatron()
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    get_cuda_rng_tracker,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default

NUM_LAYERS, HIDDEN, FFN, VOCAB = 4, 8, 12, 16


class Layer(MegatronModule):
    """A norm, a SwiGLU's two projections and a bias: every way in which a tensor is split."""

    def __init__(self, config):
        super().__init__(config)
        plain = {"config": config, "init_method": torch.nn.init.zeros_, "skip_bias_add": False}
        self.norm = torch.nn.RMSNorm(HIDDEN, dtype=config.params_dtype)
        self.fc1 = ColumnParallelLinear(HIDDEN, 2 * FFN, bias=False, **plain)
        self.fc2 = RowParallelLinear(FFN, HIDDEN, bias=True, input_is_parallel=True, **plain)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = {}
        for name, module in self.named_children():
            group = parallel_state.get_tensor_model_parallel_group()
            state |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=group
            )
        weight = f"{prefix}fc1.weight"
        factory = apply_swiglu_sharded_factory(state[weight], sharded_offsets)
        if ".1." in prefix:  # its parts are no views of the parameter, which factories may do
            build = factory.build_fn
            factory.build_fn = lambda *given: [
                replace(part, data=part.data.clone()) for part in build(*given)
            ]
        state[weight] = factory
        return state


class Toy(MegatronModule):
    """A pipeline stage of layers; the word embedding is on the first and, tied, on the last."""

    def __init__(self, config, grid):
        super().__init__(config)
        self.is_copy = grid.pipeline_rank > 0
        share = NUM_LAYERS // grid.pipeline_size
        first = 1 + share * grid.pipeline_rank
        self.layers = torch.nn.ModuleDict(
            {str(n): Layer(config) for n in range(first, first + share)}
        )
        if grid.pipeline_rank in (0, grid.pipeline_size - 1):
            self.word = VocabParallelEmbedding(
                VOCAB, HIDDEN, init_method=torch.nn.init.zeros_, config=config
            )
            self.word.weight.shared = self.is_copy

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = {}
        for n, layer in self.layers.items():
            state |= layer.sharded_state_dict(f"{prefix}layers.{n}.", sharded_offsets, metadata)
        if hasattr(self, "word"):
            state |= self.word.sharded_state_dict("embedding.word.", sharded_offsets, metadata)
            shard = state["embedding.word.weight"]
            shard.replica_id = (int(self.is_copy), *shard.replica_id[1:])
        return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def make_config(output, **overrides) -> Config:
    return load_config(
        None,
        {
            "output": str(output),
            "model.num_layers": NUM_LAYERS,
            "model.hidden_size": HIDDEN,
            "model.num_heads": 2,
            "model.vocab_size": 256,
            "checkpoint.keep_last": 2,
            "optimizer.clip_grad": 0.05,
            "optimizer.lr": 1e-2,
        }
        | overrides,
    )


class Run:
    """The tiny model in one layout, trained on gradients that are a function of (name, step)."""

    def __init__(self, output, layout, dtype=torch.float32, **overrides):
        tensor, pipeline = layout
        self.grid = platform.initialize(tensor=tensor, pipeline=pipeline, timeout_s=20, seed=5)
        self.config = make_config(output, **overrides)
        self.dtype = dtype
        transformer = TransformerConfig(
            num_layers=NUM_LAYERS,
            hidden_size=HIDDEN,
            num_attention_heads=2,
            tensor_model_parallel_size=tensor,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_cpu_initialization=True,
            calculate_per_token_loss=True,
            gradient_accumulation_fusion=False,
        )
        self.toy = Toy(transformer, self.grid)
        self.shards = model_state([self.toy])
        for shard in self.shards.values():
            _assign(shard, shard.data, "weight")
        self.stages = wrap_stages(
            [self.toy], transformer, data_size=self.grid.data_size, dtype=dtype
        )
        self.optimizer = build_optimizer(
            self.stages, self.config.optimizer, data_size=self.grid.data_size, dtype=dtype
        )

    def train(self, first, last):
        norms = []
        for step in range(first, last + 1):
            self.stages[0].zero_grad_buffer()
            self.optimizer.zero_grad()
            for shard in self.shards.values():
                _assign(shard, shard.data.main_grad, f"gradient {step}")
            set_learning_rate(self.optimizer, 1e-2 / step)
            norms.append(take_step(self.optimizer, clip_grad=0.05).grad_norm)
        return norms

    def save(self, step):
        state = TrainState(step=step, consumed_samples=8 * step, extra={"note": "é"})
        return save(self.config.output, [self.toy], self.optimizer, state, self.config)

    def load(self, path=None, optimizer=True):
        return load(
            path or self.config.output,
            [self.toy],
            self.optimizer if optimizer else None,
            self.config,
        )

    def weights(self):
        """The digest of every local shard, by name and place in the whole."""
        found = {}
        for shard in self.shards.values():
            for part in _parts(shard):
                place = (part.key, part.global_offset, part.local_shape)
                found[place] = part.data.detach().to(torch.float64).clone()
        return found


def _parts(shard):
    return [leaf.value for leaf in leaves(shard.build())] if hasattr(shard, "build") else [shard]


def _whole(name, shape, purpose):
    seed = int.from_bytes(hashlib.sha256(f"{name} {purpose}".encode()).digest()[:7], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _assign(shard, target, purpose):
    """Fill a local tensor with its part of a global one that depends on name and purpose alone."""
    parts = [
        _whole(part.key, part.global_shape, purpose)[part.global_slice()] for part in _parts(shard)
    ]
    with torch.no_grad():
        target.copy_(torch.cat(parts))


def _save_run(output, layout, dtype=torch.float32, step=3):
    run = Run(output, layout, dtype)
    run.train(1, step)
    run.save(step)
    return run.train(step + 1, step + 2), run.weights()


def _load_run(output, layout, dtype=torch.float32, step=3):
    run = Run(output, layout, dtype)
    with torch.no_grad():
        for shard in run.shards.values():
            shard.data.fill_(7.0)
    state = run.load()
    assert state == TrainState(step=step, consumed_samples=8 * step, extra={"note": "é"})
    return run.train(step + 1, step + 2), run.weights()


def _union(results):
    """Every shard of every rank assembled into whole tensors; replicas must agree bit for bit."""
    wholes = {}
    for _, shards in results:
        for (name, offset, shape), data in shards.items():
            wholes.setdefault(name, {}).setdefault((offset, shape), data)
            assert torch.equal(wholes[name][offset, shape], data), f"replicas of {name} differ"
    assembled = {}
    for name, shards in wholes.items():
        size = [max(o[d] + s[d] for o, s in shards) for d in range(len(next(iter(shards))[0]))]
        whole = torch.full(size, torch.nan, dtype=torch.float64)
        for (offset, shape), data in shards.items():
            whole[tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))] = data
        assembled[name] = whole
    return assembled


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    run_ranks(2, _save_run, output, (1, 2))
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 2, 4), (1, 1, 1)),
        ((1, 1, 1), (2, 2, 4)),
        ((1, 1, 2), (1, 1, 1)),
        ((1, 2, 4), (2, 1, 2)),
        ((2, 1, 2), (1, 1, 4)),
    ],
    ids=lambda layout: "tp{}pp{}world{}".format(*layout),
)
def test_goes_on_alike_under_another_layout(tmp_path, before, after, dtype):
    """Guards the whole way: shards, masters, moments, step counts, tied copies, all optimizers."""
    saved = run_ranks(before[2], _save_run, tmp_path, before[:2], dtype)
    loaded = run_ranks(after[2], _load_run, tmp_path, after[:2], dtype)
    assert loaded[0][0] == pytest.approx(saved[0][0], rel=1e-5)
    ours, theirs = _union(saved), _union(loaded)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-5, atol=1e-6, msg=name)


def _draws():
    """One number of every random generator that a run may use."""
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return (
        torch.rand(1).item(),
        tracked,
        float(np.random.rand()),
        np.random.randn(),
        random.random(),
    )


def _straight(output, layout, dtype):
    run = Run(output, layout, dtype)
    _draws()
    run.train(1, 2)
    run.save(2)
    return run.train(3, 4), _draws(), run.weights()


def _resumed(output, layout, dtype):
    run = Run(output, layout, dtype)
    run.load()
    steps = {group["step"] for group in run.optimizer.param_groups if group["params"]}
    assert steps == {2}
    return run.train(3, 4), _draws(), run.weights()


@pytest.mark.parametrize(
    ("world", "layout", "dtype"),
    [
        (1, (1, 1), torch.float32),
        (1, (1, 1), torch.bfloat16),
        (1, (1, 1), torch.float64),
        (2, (1, 1), torch.float32),
        (2, (1, 1), torch.float64),
        (4, (1, 2), torch.bfloat16),
        (4, (2, 2), torch.float32),
    ],
)
def test_resuming_is_bit_identical(tmp_path, world, layout, dtype):
    """Guards step counts (torch's AdamW loses them), masters, and all random generators."""
    straight = run_ranks(world, _straight, tmp_path, layout, dtype)
    resumed = run_ranks(world, _resumed, tmp_path, layout, dtype)
    for one, other in zip(straight, resumed, strict=True):
        assert one[:2] == other[:2]
        for place, data in one[2].items():
            assert torch.equal(other[2][place], data), place


def _save_before_the_first_step(output):
    run = Run(output, (1, 1))
    run.save(0)
    run.load()
    assert run.train(1, 1) == [pytest.approx(run.train(1, 1)[0])]


def test_a_run_can_be_saved_before_its_first_step(tmp_path):
    """Adam has no moments yet; a checkpoint without them would not load."""
    run_ranks(1, _save_before_the_first_step, tmp_path)


def _parameters_only(output):
    run = Run(output, (1, 1), torch.bfloat16)
    before = run.weights()
    run.train(1, 1)
    run.save(1)
    trained = run.weights()
    run.train(2, 3)
    run.load(optimizer=False)
    assert [group["step"] for group in run.optimizer.param_groups] == [3, 3]
    for place, data in run.weights().items():
        assert torch.equal(data, trained[place])
    assert any(not torch.equal(before[place], data) for place, data in trained.items())


def test_parameters_alone(tmp_path):
    run_ranks(1, _parameters_only, tmp_path)


def test_reader_assembles_whole_tensors(tmp_path):
    """Tensors of four ranks, gate and up of SwiGLU included, as one process would hold them."""
    saved = run_ranks(4, _save_twice, tmp_path, (2, 2))
    reader = TensorReader(tmp_path)
    wholes = _union(saved)
    assert reader.names() == sorted(wholes)
    for name, whole in wholes.items():
        assert torch.equal(reader.tensor(name).double(), whole), name
    weight = reader.tensor("layers.2.fc1.weight")
    assert torch.equal(
        weight.double(), _whole("layers.2.fc1.weight", (2 * FFN, HIDDEN), "weight").float().double()
    )
    masters = {name for name in reader.names(optimizer=True) if "exp_avg" not in name}
    assert masters == set()  # float32 parameters are their own


def _save_twice(output, layout):
    run = Run(output, layout)
    run.save(1)
    return None, run.weights()


def _read_by_megatron(output):
    platform.initialize()
    path = directory.find_latest(output) / directory.TENSORS
    return dist_checkpointing.load_plain_tensors(str(path))


def test_megatron_core_reads_it_too(checkpoint):
    """The format is torch_dist, so that other tools for it work."""
    [tensors] = run_ranks(1, _read_by_megatron, checkpoint)
    reader = TensorReader(checkpoint)
    assert sorted(tensors) == sorted(reader.names() + reader.names(optimizer=True))
    for name, tensor in tensors.items():
        assert torch.equal(tensor, reader.tensor(name)), name


@pytest.mark.parametrize("fact", ["tokenizer", "optimizer_steps", "layout"])
def test_manifest_without_a_fact(checkpoint, tmp_path, fact):
    output = tmp_path / "run"
    shutil.copytree(checkpoint, output)
    path = directory.find_latest(output) / directory.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest[fact]
    path.write_text(json.dumps(manifest))
    [message] = run_ranks(1, _load_errors, output, {})
    assert f"manifest.json: expected {fact} " in message


def _no_process_left(output):
    run = Run(output, (1, 1))
    sys.modules["psutil"] = None
    filesystem_async.HAVE_PSUTIL = False
    start = time.monotonic()
    run.save(1)
    assert time.monotonic() - start < 10
    assert multiprocessing.active_children() == []
    children = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    ).stdout
    assert [line for line in children.splitlines() if "ps -o" not in line] == []


def test_saving_starts_no_process_and_needs_no_psutil(tmp_path):
    """megatron-core's own writer starts a manager, and without psutil waits for ever."""
    run_ranks(1, _no_process_left, tmp_path, timeout_s=30)


# What fails on one rank fails on all, soon, and leaves what was there.


def _expect_failure(run, step, match):
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=match):
        run.save(step)
    assert time.monotonic() - start < 10, "the ranks waited for each other"
    checkpoints = run.config.output + "/checkpoints"
    platform.synchronize()
    torch.distributed.barrier()  # rank 0 clears up after it has told the others
    assert sorted(os.listdir(checkpoints)) == ["latest", "step-00000001"]
    assert directory.find_latest(run.config.output).name == "step-00000001"
    run.load()


def _disk_full(output, failing_rank, limit):
    run = Run(output, (1, 2))
    run.save(1)
    rank = run.grid.rank
    if rank == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    _expect_failure(run, 2, r"can not save .*step-00000002: .*(large|Errno 27|fail)")
    if rank == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert run.save(2).name == "step-00000002"


@pytest.mark.parametrize(
    ("failing_rank", "limit"), [(0, 100), (0, 1200), (0, 20_000), (1, 100), (1, 9_000)]
)
def test_disk_full_while_saving(tmp_path, failing_rank, limit):
    """From the header's first bytes to the last of the tensors, on either rank."""
    run_ranks(2, _disk_full, tmp_path, failing_rank, limit)


def _full_file_system(output):
    run = Run(output, (1, 2))
    run.save(1)
    if run.grid.rank == 0:
        filler = f"{output}/filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
    torch.distributed.barrier()
    _expect_failure(run, 2, r"can not save .*step-00000002: .* \(\d\.\d MiB are free there\)")
    torch.distributed.barrier()
    if run.grid.rank == 0:
        os.unlink(filler)
    torch.distributed.barrier()
    run.save(2)


def test_full_file_system(tmp_path):
    """A real file system without space, where this may be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        run_ranks(2, _full_file_system, tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def _broken_stage(output):
    run = Run(output, (1, 2))
    run.save(1)
    if run.grid.rank == 1:
        working = run.toy.sharded_state_dict

        def broken(**options):
            run.toy.sharded_state_dict = working
            raise RuntimeError("planted")

        run.toy.sharded_state_dict = broken
    _expect_failure(run, 2, "RuntimeError: planted")


def test_an_error_on_one_rank_reaches_all(tmp_path):
    run_ranks(2, _broken_stage, tmp_path)


def _dead_rank(output):
    run = Run(output, (1, 2))
    run.save(1)
    if run.grid.rank == 1:
        torch.distributed.destroy_process_group()  # its connections close, as when it dies
        return None
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        run.save(2)
    return time.monotonic() - start, directory.find_latest(output).name


def test_a_dead_rank_ends_the_wait(tmp_path):
    [survivor, _] = run_ranks(2, _dead_rank, tmp_path)
    assert survivor[0] < 25
    assert survivor[1] == "step-00000001"


# What does not fit is named.


def _load_errors(output, overrides, layout=(1, 1), dtype=torch.float32):
    run = Run(output, layout, dtype, **overrides)
    source = overrides.get("source", output)
    try:
        run.load(source)
    except CheckpointError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model.num_heads": 4}, "model.num_heads is 2 in the checkpoint and 4 in this run"),
        ({"model.rope_theta": 5e5}, "model.rope_theta is 10000.0 in the checkpoint and 500000.0"),
        ({"exits.boundaries": (2,)}, "exits.boundaries is [] in the checkpoint and [2] in"),
    ],
)
def test_another_model_names_the_option_and_both_values(checkpoint, overrides, expected):
    [message] = run_ranks(1, _load_errors, checkpoint, overrides)
    assert expected in message
    assert "config.toml" in message


@pytest.mark.parametrize("overrides", [{"model.dropout": 0.1}, {"optimizer.lr": 1.0}])
def test_options_that_may_change(checkpoint, overrides):
    assert run_ranks(1, _load_errors, checkpoint, overrides) == ["no error"]


def test_another_tokenizer(checkpoint, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text("{}")
    [message] = run_ranks(1, _load_errors, checkpoint, {"data.tokenizer": str(other)})
    assert "is not the tokenizer that" in message
    assert "use 'bytes'" in message


def test_another_precision_says_so(checkpoint):
    messages = run_ranks(2, _load_errors, checkpoint, {}, (1, 2), torch.bfloat16)
    assert len(set(messages)) == 1
    assert "are missing in it: optimizer.state.fp32_param.embedding.word.weight, " in messages[0]
    assert "see training.dtype" in messages[0]


def _load_other_tensors(output):
    run = Run(output, (1, 2))
    if run.grid.rank == 1:
        run.toy.layers.pop("4")
    names = {}
    for change in ("missing", "shape"):
        try:
            load(output, [run.toy], None, run.config)
        except CheckpointError as error:
            names[change] = str(error)
        extra = Layer(run.toy.config)
        if run.grid.rank == 1:
            run.toy.layers["4"] = extra
            extra.norm = torch.nn.RMSNorm(HIDDEN + 1)
    return names


def test_names_and_shapes_that_differ_are_listed(checkpoint):
    for names in run_ranks(2, _load_other_tensors, checkpoint):
        assert "4 tensors in it are not of this run: layers.4.fc1.weight, " in names["missing"]
        assert "layers.4.norm.weight is [8] in it and [9] in this run" in names["shape"]


@pytest.mark.parametrize("place", [".metadata", "common.pt", "rng"])
def test_planted_pickle_is_not_run_when_training_resumes(checkpoint, tmp_path, place):
    """megatron-core and torch would unpickle each of these (the byte entries: see test_safe)."""
    output, marker = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(checkpoint, output)
    step = directory.find_latest(output)
    file = step / "tensors" / place
    if place == "rng":
        file = step / "rng" / "rank-00001.safetensors"
    if place == "common.pt":
        torch.save(Payload(marker), file)
    else:
        file.write_bytes(pickle.dumps(Payload(marker)))
    accept_sizes(step)
    messages = run_ranks(2, _load_errors, output, {}, (1, 2))
    assert any(place in message for message in messages), messages
    assert "no error" not in messages
    assert not marker.exists()


def test_missing_checkpoint(tmp_path):
    messages = run_ranks(2, _load_errors, tmp_path / "none", {}, (1, 2))
    assert all("none does not exist: expected a run directory" in text for text in messages)
