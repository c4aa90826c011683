"""Bad checkpoints of Megatron-LM's are refused: the file, the key, what was expected."""

import argparse
import math
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from ee_llm.convert.open_source import NewExits, open_source
from ee_llm.errors import CheckpointError
from tests.unit.convert.huggingface.folders import make_tokenizer
from tests.unit.convert.huggingface.test_convert_exits import refusal
from tests.unit.convert.megatron.megatron_files import Writer, save
from tests.unit.convert.megatron.test_megatron_ranks import make

FILE = r"mp_rank_{}/model_optim_rng.pt"
QKV = "layers.0.self_attention.query_key_value.weight"
NORM = "layers.0.input_norm.weight"
WHERE = r"the arguments in .*/mp_rank_00_000/model_optim_rng.pt"


class Edited(Writer):
    """A checkpoint with something wrong in the files of one tensor rank, or of all."""

    def __init__(self, change, only=None, **options):
        model = {name: options.pop(name) for name in list(options) if name in MODEL}
        config, tensors = make(**model)
        super().__init__(config, tensors, 2, 2, **options)
        self.change, self.only = change, only

    def content(self, t, p):
        content = super().content(t, p)
        if self.only in (None, (t, p)):
            self.change(content)
        return content


MODEL = ("output", "tie_embeddings", "boundaries", "head", "placement", "family")


def layers(content):
    return content["model"]["language_model"]["encoder"]


def _nothing(content):
    pass


def _set(key, value):
    return lambda content: layers(content).__setitem__(key, value)


def _rename_layer(content):
    of_model = layers(content)
    for key in [key for key in of_model if key.startswith("layers.1.")]:
        of_model[key.replace("layers.1.", "layers.2.")] = of_model.pop(key)


def _drop(key):
    return lambda content: layers(content).pop(key)


def _add_output(content):
    content["model"]["language_model"]["output_layer"] = {"weight": torch.ones(144, 32)}


def _change_copy(content):
    content["model"]["word_embeddings_for_head"]["weight"][3, 3] += 1


TIED = {"output": "tied", "tie_embeddings": True}
UNTIE = "untie_embeddings_and_output_weights"
# Name: what is wrong, in the files of which rank, options, what is said.
FILES = {
    "extra key": (
        _set("layers.0.surprise.weight", torch.ones(2, 3)),
        None,
        {},
        rf"{FILE.format('00_000')}: encoder.layers.0.surprise.weight \[2, 3\] is no tensor of the "
        rf"llama that {WHERE} describes \(and 1 more\)",
    ),
    "missing key": (
        _drop(QKV),
        None,
        {},
        r"iter_0000012: encoder.layers.0.self_attention.query_key_value.weight is missing: expected"
        r" \[64, 32\] for layers.1.self_attention.linear_qkv.weight \(and 1 more\)",
    ),
    "key that one rank lacks": (
        _drop(QKV),
        (1, 1),
        {},
        rf"{FILE.format('01_001')}: language_model.encoder.{QKV} is missing, and .*"
        rf"{FILE.format('00_001')} has it",
    ),
    "layers with a hole": (
        _rename_layer,
        None,
        {},
        rf"{FILE.format('00_000')}: its stage has the layers \[0, 2\], which a stage counts from 0",
    ),
    "wrong shape": (
        _set(NORM, torch.ones(31)),
        None,
        {},
        rf"{FILE.format('00_000')}: encoder.{NORM} has shape \[31\], expected \[32\] from {WHERE}",
    ),
    "ranks of unlike shapes": (
        _set(QKV, torch.ones(16, 32)),
        (1, 0),
        {},
        rf"{FILE.format('01_000')}: language_model.encoder.{QKV} is torch.float32 \[16, 32\], "
        r"expected torch.float32 \[32, 32\] as in .*00_000",
    ),
    "integers": (
        _set(NORM, torch.ones(32, dtype=torch.int8)),
        None,
        {},
        rf"{NORM} is of type int8; expected float64",
    ),
    "no tensor": (
        _set(NORM, "norm"),
        None,
        {},
        rf"language_model.encoder.{NORM} is of type str; expected a tensor",
    ),
    "no tensor but numbers": (_set(NORM, [1.0]), None, {}, rf"{NORM} is of type list"),
    "the same key twice": (
        _set("layers.0.input_layernorm.weight", torch.ones(32)),
        None,
        {},
        r"input_layernorm.weight is there a second time: .* has language_model.encoder."
        rf"{NORM}",
    ),
    "another iteration": (
        lambda content: content.update(iteration=7),
        (0, 1),
        {},
        rf"{FILE.format('00_001')} is of iteration 7, format 3.0, and .*00_000.* of iteration 12",
    ),
    "an iteration that is none": (
        lambda content: content.update(iteration=[[12]]),
        None,
        {},
        rf"{FILE.format('00_000')}: iteration is of type list; expected a number of steps",
    ),
    "a version that is none": (
        lambda content: content.update(checkpoint_version=math.nan),
        None,
        {},
        rf"{FILE.format('00_000')}: checkpoint_version is no version of the format",
    ),
    "more layers than tensors": (
        lambda content: setattr(content["args"], "num_layers", 9_999),
        None,
        {},
        rf"{WHERE}: num_layers = 9999, but there are \d+ tensors, and each layer has several",
    ),
    "no arguments": (
        lambda content: content.pop("args"),
        None,
        {},
        rf"{FILE.format('00_000')} has no args: expected the arguments of the run",
    ),
    "no model": (
        lambda content: content.pop("model"),
        None,
        {},
        r"has no model: expected an entry model or model0",
    ),
    "layers of another name": (
        lambda content: content["model"]["language_model"].update(decoder=layers(content)),
        None,
        {},
        r"decoder.layers.0.* is no tensor of the llama",
    ),
    "said to be untied, and has no output": (
        _nothing,
        None,
        {"boundaries": (), **TIED, UNTIE: True},
        rf"word_embeddings_for_head.weight is a copy .* but {UNTIE} is True",
    ),
    "said to be untied, and has not even a copy": (
        lambda content: content["model"].pop("word_embeddings_for_head", None),
        None,
        {"boundaries": (), **TIED, UNTIE: True},
        rf"output_layer.weight is missing: expected .*; or is {UNTIE} = True in .* wrong\?",
    ),
    "said to be tied, and has an output": (
        _nothing,
        None,
        {"boundaries": (), UNTIE: False},
        rf"output_layer.weight is not embedding.word_embeddings.weight, but {UNTIE} in .* is False "
        r".*; set it to True",
    ),
    "copy that is none": (
        _change_copy,
        (1, 1),
        TIED,
        rf"{FILE.format('01_001')}: word_embeddings_for_head.weight is not "
        r"language_model.embedding.word_embeddings.weight of .*01_000",
    ),
    "exit without tensors": (
        _nothing,
        None,
        {"head": (), "use_exit_norm": True},
        r"encoder.layers.0.exit_norm.weight is missing: expected \[32\] for exits.1.norm.weight",
    ),
    "exit with a head that was not said": (
        _nothing,
        None,
        {"use_exit_norm": False},
        r"exit_norm.weight \[32\] is no tensor of the llama",
    ),
    "output weight of no exit": (
        lambda content: (
            content["model"]["language_model"]
            .setdefault("exit_output_layer", {})
            .update({"7.weight": torch.ones(144, 32)})
        ),
        (0, 0),
        {},
        r"exit_output_layer.7.weight is missing, and",
    ),
    "output weights of one exit too many": (
        lambda content: (
            content["model"]["language_model"]["exit_output_layer"].update(
                {"2.weight": torch.ones(144, 32)}
            )
            if "exit_output_layer" in content["model"]["language_model"]
            else None
        ),
        None,
        {},
        r"exit_output_layer.2.weight is of no exit: exit_layer_nums has \[1, 2\] on this stage",
    ),
}


def said_of(path: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(path, tokenizer="bytes", **options)
    return str(caught.value)


@pytest.mark.parametrize("case", FILES)
def test_files_that_do_not_fit(tmp_path, case):
    change, only, options, expected = FILES[case]
    path = Edited(change, only, **options).write(tmp_path)
    assert re.search(expected, said_of(path))


def test_ranks_that_should_have_the_same_and_have_not(tmp_path, capsys):
    """Found while it is read: nothing is left of what was written."""
    path = Edited(_set(NORM, torch.ones(32)), (1, 0)).write(tmp_path / "theirs")
    found = refusal(capsys, path, "--output", tmp_path / "ours", "--tokenizer", "bytes")
    pattern = rf"{FILE.format('01_000')}: language_model.encoder.{NORM} is not the same as in .*00_"
    assert re.search(pattern, found)
    assert not list((tmp_path / "ours").rglob("*.distcp"))


ARGUMENTS = {
    "num_experts": 8,
    "apply_layernorm_1p": True,
    "apply_residual_connection_post_layernorm": True,
    "squared_relu": True,
    "rotary_percent": 0.5,
    "rotary_interleaved": True,
    "multi_latent_attention": True,
    "position_embedding_type": "alibi",
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "num_layers": None,
    "padded_vocab_size": "many",
    "vocab_size": 1000,
    "num_query_groups": 1,
    "rope_scaling_factor": "much",
    "exit_layer_nums": 5,
    "exit_layer_weight": [1.0],
    "pre_exit": "no",
    "tensor_model_parallel_size": 0,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_can_not_be_converted(tmp_path, name):
    extra = {"use_rope_scaling": True} if name.startswith("rope") else {}
    path = Edited(_nothing, **{name: ARGUMENTS[name]}, **extra).write(tmp_path)
    found = said_of(path)
    assert re.search(rf"\b{name}( =|\b.* is| over)", found)
    assert "model_optim_rng.pt" in found


EXITS = {
    "beyond the depth": ({"exit_layer_nums": [1, 9]}, r"exit of layer 9 is at boundary 9"),
    "at the end": ({"exit_layer_nums": [1, 4]}, r"exit of layer 4 is at boundary 4; expected 1..3"),
    "before the first": (
        {"exit_layer_nums": [1, 2], "pre_exit": True},
        r"exit_layer_nums = \[1, 2\] with pre_exit = True: the exit of layer 1 is at boundary 0",
    ),
    "twice": ({"exit_layer_nums": [2, 2]}, r"a layer is there twice"),
    "mlp and block": (
        {"use_exit_mlp": True, "use_exit_block": True},
        r"use_exit_mlp and use_exit_block together can not be converted",
    ),
    "mlp before its layer": (
        {"use_exit_mlp": True, "pre_exit": True, "exit_layer_nums": [2, 3]},
        r"use_exit_mlp with pre_exit",
    ),
    "shared outputs": (
        {"untie_exit_output_weights": False},
        rf"untie_exit_output_weights = False with {UNTIE} = True",
    ),
    "two rope scalings": (
        {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2},
        r"rotary_seq_len_interpolation_factor = 2 and use_rope_scaling are two ways",
    ),
}


@pytest.mark.parametrize("case", EXITS)
def test_arguments_that_contradict_each_other(tmp_path, case):
    changes, expected = EXITS[case]
    path = Edited(_nothing, boundaries=(1, 2), **changes).write(tmp_path)
    assert re.search(rf"{WHERE}: .*{expected}", said_of(path))


def test_directories_that_are_not_whole(tmp_path):
    path = Edited(_nothing).write(tmp_path)
    ranks = path / "iter_0000012"
    moved = ranks / "mp_rank_01_001"
    moved.rename(tmp_path / "away")
    expected = r"mp_rank_01_001/model_optim_rng.pt is missing: expected 2 tensor and 2 pipeline"
    assert re.search(expected, said_of(path))
    assert re.search(expected, said_of(ranks))
    (tmp_path / "away").rename(moved)
    (ranks / "mp_rank_02_000").mkdir()
    assert "mp_rank_02_000/model_optim_rng.pt is one too many" in said_of(path)
    (ranks / "mp_rank_02_000").rename(ranks / "mp_rank_00_000_001")
    assert "is of an expert" in said_of(path)
    (ranks / "mp_rank_00_000_001").rmdir()
    (path / "latest_checkpointed_iteration.txt").write_text("13")
    assert re.search(r"iter_0000013 holds no checkpoint, and .*iteration.txt says", said_of(path))
    (path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    assert "is no iteration" in said_of(path)
    ranks.rename(path / "release")
    (path / "latest_checkpointed_iteration.txt").write_text("release\n")
    open_source(path, tokenizer="bytes")


def test_options_that_do_not_fit(tmp_path, capsys):
    path = Edited(_nothing).write(tmp_path / "theirs")
    output = tmp_path / "ours"
    for options, expected in {
        (): "name a tokenizer, which is no part of the checkpoint (tokenizer_type = 'SentencePiece",
        ("--tokenizer", "bytes", "--check"): "--check compares with transformers",
        ("--tokenizer", "bytes", "--dense"): "--dense has no effect",
        ("--tokenizer", "bytes", "--to", "hf"): "is a Megatron-LM model; convert it",
        ("--tokenizer", "bytes", "--exits", 3): "has exits at [1, 2] already",
    }.items():
        assert expected in refusal(capsys, path, "--output", output, *options)
    make_tokenizer(tmp_path / "tokenizer.json", 300)
    given = ("--tokenizer", tmp_path / "tokenizer.json")
    found = refusal(capsys, path, "--output", output, *given)
    assert "has 300 tokens, but the vocabulary = 272 in the arguments" in found
    assert not output.exists()
    plain = Edited(_nothing, boundaries=(), output="shared").write(tmp_path / "plain")
    assert "outside 1..3" in said_of(plain, new_exits=NewExits((4,)))


class Call:
    """A pickle that calls `function` when it is loaded without care."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


PLANTED = {
    "a command": (lambda m: Call(os.system, f"touch {m}"), "it names posix.system"),
    "eval": (
        lambda m: Call(eval, f"open({str(m)!r}, 'w')"),
        "it names (builtins|__builtin__).eval",
    ),
    "exec": (
        lambda m: Call(exec, f"open({str(m)!r}, 'w')"),
        "it names (builtins|__builtin__).exec",
    ),
    "attributes": (lambda m: Call(getattr, "os", "system"), "names (builtins|__builtin__).getattr"),
    "a file": (lambda m: Call(open, str(m), "w"), "it names io.open"),
    "torch's own loader": (lambda m: Call(torch.load, str(m)), "names torch.serialization.load"),
}


@pytest.mark.parametrize("place", ["args", "model", "optimizer", "args.num_layers"])
@pytest.mark.parametrize("case", PLANTED)
def test_planted_pickles_are_refused_and_not_run(tmp_path, case, place):
    marker = tmp_path / "marker"
    planted, expected = PLANTED[case]

    def change(content):
        if place == "args.num_layers":
            content["args"].num_layers = planted(marker)
        else:
            content[place] = planted(marker)

    path = Edited(change, (1, 1)).write(tmp_path / "theirs")
    found = said_of(path)
    assert re.search(rf"{FILE.format('01_001')} is refused: .*{expected}", found)
    assert "only tensors and plain values are read" in found
    assert not marker.exists()


def named(module: str, name: str) -> bytes:
    """Return a pickle of what has this name; protocol 4 walks along dots."""
    parts = (b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    return b"\x80\x04" + b"".join(parts) + b"\x93."


# Each gets hold of an allowed class and tries to change it or to get away from it.
PROGRAMS = {
    "attribute of a class": b"cargparse\nNamespace\n}(Vargs\nI1\nub.",
    "slot of a class": b"cargparse\nNamespace\n(N}(Vargs\nI1\nutb.",
    "dotted name": named("argparse", "Namespace.__init__.__globals__"),
    "what megatron's modules import": named("megatron.core.enums", "sys"),
    "dotted name of megatron's": named("megatron.core.enums", "ModelType.__class__"),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_no_way_out_of_what_is_allowed(tmp_path, case):
    path = Edited(_nothing).write(tmp_path)
    file = path / "iter_0000012" / "mp_rank_00_000" / "model_optim_rng.pt"
    file.unlink()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", PROGRAMS[case])
    expected = "is refused: it names" if "name" in case or "import" in case else "can not be read"
    assert re.search(rf"00_000/model_optim_rng.pt {expected}", said_of(path))
    assert not hasattr(argparse.Namespace, "args")


def test_arguments_that_hold_each_other_are_named_by_their_type(tmp_path):
    """Printed, this one would be longer than any memory."""
    lists = []
    for _ in range(100):
        lists = [lists, lists]

    def change(content):
        content["args"].window_size = lists

    found = said_of(Edited(change, (0, 0)).write(tmp_path / "theirs"))
    assert "window_size = '<list>' can not be converted" in found


def test_archives_that_lie(tmp_path):
    path = Edited(_nothing).write(tmp_path)
    file = path / "iter_0000012" / "mp_rank_00_000" / "model_optim_rng.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "00_000/model_optim_rng.pt can not be read as an archive" in said_of(path)
    torch.save({}, file, _use_new_zipfile_serialization=False)
    assert "is no zip archive as torch.save writes it since torch 1.6" in said_of(path)
    file.write_bytes(pickle.dumps(Call(os.system, "false")))
    assert "is no zip archive" in said_of(path)
    file.write_bytes(whole)
    for compressed in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        with zipfile.ZipFile(file) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w", compressed) as archive:
            for name, data in parts.items():
                is_big = compressed == zipfile.ZIP_STORED and len(data) > 4000
                archive.writestr(name, data[:100] if is_big and "/data/" in name else data)
        expected = "is compressed" if compressed == zipfile.ZIP_DEFLATED else "does not lie within"
        assert expected in said_of(path)


def test_tensors_that_are_larger_than_their_bytes(tmp_path):
    """A view of one element as many would be made without bytes of its own."""
    path = Edited(_set(NORM, torch.ones(1).expand(10**9))).write(tmp_path)
    assert re.search(rf"elements of language_model.encoder.{NORM} share bytes", said_of(path))


def distributed(path: Path, tensors=None, **content) -> Path:
    """Write a distributed checkpoint as its documentation has it, by torch's own writer."""
    config, ours = make(boundaries=(), output="shared")
    writer = Writer(config, ours, names="core")
    state = {"embedding.word_embeddings.weight": writer.padded(0, "embedding.word.weight")}
    state["output_layer.weight"] = writer.padded(0, "output.weight")
    state["decoder.final_layernorm.weight"] = ours["exits.4.norm.weight"]
    stage = writer.stage(0, 0)
    for key in [key for key in stage if key.startswith("decoder.layers.0.")]:
        rest = key.removeprefix("decoder.layers.0.")
        layers = [stage[f"decoder.layers.{i}.{rest}"] for i in range(4)]
        state[f"decoder.layers.{rest}"] = torch.stack(layers)
    state["optimizer.state.exp_avg.output_layer.weight"] = torch.ones(3)
    state |= tensors or {}
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    save({"args": writer.arguments, "iteration": 12} | content, path / "common.pt")
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return path


def test_a_distributed_checkpoint(tmp_path):
    _, tensors = make(boundaries=(), output="shared")
    source = open_source(distributed(tmp_path), tokenizer="bytes")
    assert source.config.model.num_layers == 4
    for name, tensor in tensors.items():
        assert torch.equal(source.tensor(name), tensor), name


LAYERS = "decoder.layers.mlp.linear_fc2.weight"
DISTRIBUTED = {
    "extra tensor": (
        {"mtp.weight": torch.ones(3)},
        r".metadata: mtp.weight \[3\] is no tensor of the llama that .*common.pt describes",
    ),
    "layers are missing": (
        {LAYERS: torch.ones(3, 32, 48)},
        r"decoder.layers.3.mlp.linear_fc2.weight is missing: expected \[32, 48\] for layers.4",
    ),
    "too many layers": (
        {LAYERS: torch.ones(5, 32, 48)},
        r"decoder.layers.4.mlp.linear_fc2.weight \[32, 48\] is no tensor",
    ),
    "wrong shape": (
        {LAYERS: torch.ones(4, 32, 47)},
        r"decoder.layers.0.mlp.linear_fc2.weight has shape \[32, 47\], expected \[32, 48\]",
    ),
    "empty": ({LAYERS: torch.ones(4, 0)}, r"is empty"),
    "two names of one": (
        {"decoder.layers.pre_mlp_layernorm.weight": torch.ones(4, 32)},
        r"are both decoder.layers.0.pre_mlp_layernorm.weight",
    ),
}


@pytest.mark.parametrize("case", DISTRIBUTED)
def test_distributed_checkpoints_that_do_not_fit(tmp_path, case):
    tensors, expected = DISTRIBUTED[case]
    assert re.search(expected, said_of(distributed(tmp_path, tensors)))


def test_distributed_checkpoints_of_other_kinds(tmp_path):
    path = distributed(tmp_path)
    (path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "sharded_backend is 'zarr'; only 'torch_dist'" in said_of(path)
    path = distributed(tmp_path / "a", args=None)
    assert "common.pt has no args" in said_of(path)
    marker = tmp_path / "marker"
    path = distributed(tmp_path / "b", rerun=Call(os.system, f"touch {marker}"))
    assert re.search(r"common.pt is refused: it names posix.system", said_of(path))
    assert not marker.exists()
    path = distributed(tmp_path / "c")
    next(path.glob("*.distcp")).unlink()
    assert re.search(r"distcp is missing: expected", said_of(path))
