"""Bad checkpoints of Megatron-LM raise, naming the file, the key and what was expected."""

import argparse
import math
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch

from ee_llm.conversion.open_source import NewExits, open_source
from ee_llm.errors import CheckpointError
from tests.unit.conversion.huggingface.folders import make_tokenizer
from tests.unit.conversion.huggingface.test_convert_exits import refusal
from tests.unit.conversion.megatron.megatron_files import Writer
from tests.unit.conversion.megatron.test_megatron_ranks import make

FILE = r"mp_rank_{}/model_optim_rng.pt"
QKV = "layers.0.self_attention.query_key_value.weight"
NORM = "layers.0.input_norm.weight"
WHERE = r"the arguments in .*/mp_rank_00_000/model_optim_rng.pt"


class Edited(Writer):
    """Writes a checkpoint with an error in the files of one rank, or of all."""

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
# Name: the change, the rank with the change, options, the expected error.
FILES = {
    "extra key": (
        _set("layers.0.surprise.weight", torch.ones(2, 3)),
        None,
        {},
        rf"{FILE.format('00_000')}: encoder.layers.0.surprise.weight \[2, 3\] is not a tensor of "
        rf"the llama that {WHERE} describes \(and 1 more\)",
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
        rf"{FILE.format('01_001')}: language_model.encoder.{QKV} is missing, but .*"
        rf"{FILE.format('00_001')} has it",
    ),
    "layers with a gap": (
        _rename_layer,
        None,
        {},
        rf"{FILE.format('00_000')}: the layers of its stage are \[0, 2\]",
    ),
    "wrong shape": (
        _set(NORM, torch.ones(31)),
        None,
        {},
        rf"{FILE.format('00_000')}: encoder.{NORM} has shape \[31\], expected \[32\] from {WHERE}",
    ),
    "ranks of different shapes": (
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
        rf"{NORM} has dtype int8. Expected float64",
    ),
    "no tensor": (
        _set(NORM, "norm"),
        None,
        {},
        rf"language_model.encoder.{NORM} has type str, expected a tensor",
    ),
    "no tensor but numbers": (_set(NORM, [1.0]), None, {}, rf"{NORM} has type list"),
    "the same key twice": (
        _set("layers.0.input_layernorm.weight", torch.ones(32)),
        None,
        {},
        r"input_layernorm.weight occurs twice: .* has language_model.encoder."
        rf"{NORM}",
    ),
    "another iteration": (
        lambda content: content.update(iteration=7),
        (0, 1),
        {},
        rf"{FILE.format('00_001')} has iteration 7 and format 3.0, but .*00_000.* has iteration 12",
    ),
    "an iteration that is a list": (
        lambda content: content.update(iteration=[[12]]),
        None,
        {},
        rf"{FILE.format('00_000')}: iteration has type list, expected a number of steps",
    ),
    "a version that is not a number": (
        lambda content: content.update(checkpoint_version=math.nan),
        None,
        {},
        rf"{FILE.format('00_000')}: checkpoint_version is not a version of the format",
    ),
    "more layers than tensors": (
        lambda content: setattr(content["args"], "num_layers", 9_999),
        None,
        {},
        rf"{WHERE}: num_layers = 9999, but there are only \d+ tensors, and each layer has several",
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
        r"decoder.layers.0.* is not a tensor of the llama",
    ),
    "stated to be untied, without an output": (
        _nothing,
        None,
        {"boundaries": (), **TIED, UNTIE: True},
        rf"word_embeddings_for_head.weight is a copy .* but {UNTIE} is True",
    ),
    "stated to be untied, without a copy": (
        lambda content: content["model"].pop("word_embeddings_for_head", None),
        None,
        {"boundaries": (), **TIED, UNTIE: True},
        rf"output_layer.weight is missing: expected .*. Check {UNTIE} = True in",
    ),
    "stated to be tied, with an output": (
        _nothing,
        None,
        {"boundaries": (), UNTIE: False},
        rf"output_layer.weight differs from embedding.word_embeddings.weight, but {UNTIE} in .* "
        r"is False.* Set it to True",
    ),
    "copy that differs": (
        _change_copy,
        (1, 1),
        TIED,
        rf"{FILE.format('01_001')}: word_embeddings_for_head.weight differs from "
        r"language_model.embedding.word_embeddings.weight of .*01_000",
    ),
    "exit without tensors": (
        _nothing,
        None,
        {"head": (), "use_exit_norm": True},
        r"encoder.layers.0.exit_norm.weight is missing: expected \[32\] for exits.1.norm.weight",
    ),
    "exit with a head that was not stated": (
        _nothing,
        None,
        {"use_exit_norm": False},
        r"exit_norm.weight \[32\] is not a tensor of the llama",
    ),
    "output weight of no exit": (
        lambda content: (
            content["model"]["language_model"]
            .setdefault("exit_output_layer", {})
            .update({"7.weight": torch.ones(144, 32)})
        ),
        (0, 0),
        {},
        r"exit_output_layer.7.weight is missing, but",
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
        r"exit_output_layer.2.weight belongs to no exit: exit_layer_nums has \[1, 2\] on this",
    ),
}


def error_of(path: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(path, tokenizer="bytes", **options)
    return str(caught.value)


@pytest.mark.parametrize("case", FILES)
def test_files_that_do_not_fit(tmp_path, case):
    change, only, options, expected = FILES[case]
    path = Edited(change, only, **options).write(tmp_path)
    assert re.search(expected, error_of(path))


def test_replicas_that_differ(tmp_path, capsys):
    """This is found while tensors are written; no output is left."""
    path = Edited(_set(NORM, torch.ones(32)), (1, 0)).write(tmp_path / "theirs")
    found = refusal(capsys, path, "--output", tmp_path / "ours", "--tokenizer", "bytes")
    pattern = (
        rf"{FILE.format('01_000')}: language_model.encoder.{NORM} differs from the replica in .*00_"
    )
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
def test_arguments_that_cannot_be_converted(tmp_path, name):
    extra = {"use_rope_scaling": True} if name.startswith("rope") else {}
    path = Edited(_nothing, **{name: ARGUMENTS[name]}, **extra).write(tmp_path)
    found = error_of(path)
    assert re.search(rf"\b{name}( =|\b.* is| over)", found)
    assert "model_optim_rng.pt" in found


EXITS = {
    "beyond the depth": ({"exit_layer_nums": [1, 9]}, r"exit of layer 9 is at boundary 9"),
    "at the end": (
        {"exit_layer_nums": [1, 4]},
        r"exit of layer 4 is at boundary 4. Expected a boundary from 1 to 3",
    ),
    "before the first": (
        {"exit_layer_nums": [1, 2], "pre_exit": True},
        r"exit_layer_nums = \[1, 2\] with pre_exit = True: the exit of layer 1 is at boundary 0",
    ),
    "twice": ({"exit_layer_nums": [2, 2]}, r"a layer occurs twice"),
    "mlp and block": (
        {"use_exit_mlp": True, "use_exit_block": True},
        r"use_exit_mlp and use_exit_block together cannot be converted",
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
        r"rotary_seq_len_interpolation_factor = 2 and use_rope_scaling both scale",
    ),
}


@pytest.mark.parametrize("case", EXITS)
def test_arguments_that_contradict_each_other(tmp_path, case):
    changes, expected = EXITS[case]
    path = Edited(_nothing, boundaries=(1, 2), **changes).write(tmp_path)
    assert re.search(rf"{WHERE}: .*{expected}", error_of(path))


def test_incomplete_directories(tmp_path):
    path = Edited(_nothing).write(tmp_path)
    ranks = path / "iter_0000012"
    moved = ranks / "mp_rank_01_001"
    moved.rename(tmp_path / "away")
    expected = r"mp_rank_01_001/model_optim_rng.pt is missing: expected 2 tensor and 2 pipeline"
    assert re.search(expected, error_of(path))
    assert re.search(expected, error_of(ranks))
    (tmp_path / "away").rename(moved)
    (ranks / "mp_rank_02_000").mkdir()
    assert "mp_rank_02_000/model_optim_rng.pt is not expected" in error_of(path)
    (ranks / "mp_rank_02_000").rename(ranks / "mp_rank_00_000_001")
    assert "belongs to an expert" in error_of(path)
    (ranks / "mp_rank_00_000_001").rmdir()
    (path / "latest_checkpointed_iteration.txt").write_text("13")
    assert re.search(
        r"iter_0000013, which .*iteration.txt names, has no checkpoint", error_of(path)
    )
    (path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    assert "expected a number or 'release'" in error_of(path)
    ranks.rename(path / "release")
    (path / "latest_checkpointed_iteration.txt").write_text("release\n")
    open_source(path, tokenizer="bytes")


def test_options_that_do_not_fit(tmp_path, capsys):
    path = Edited(_nothing).write(tmp_path / "theirs")
    output = tmp_path / "ours"
    for options, expected in {
        (): "does not contain the tokenizer that",
        ("--tokenizer", "bytes", "--check"): "--check compares with transformers",
        ("--tokenizer", "bytes", "--dense"): "--dense has no effect",
        ("--tokenizer", "bytes", "--to", "hf"): "is a Megatron-LM model. Convert it",
        ("--tokenizer", "bytes", "--exits", 3): "already has exits at [1, 2]",
    }.items():
        assert expected in refusal(capsys, path, "--output", output, *options)
    make_tokenizer(tmp_path / "tokenizer.json", 300)
    given = ("--tokenizer", tmp_path / "tokenizer.json")
    found = refusal(capsys, path, "--output", output, *given)
    assert "has 300 tokens, but the vocabulary = 272 in the arguments" in found
    assert not output.exists()
    plain = Edited(_nothing, boundaries=(), output="shared").write(tmp_path / "plain")
    assert "outside 1..3" in error_of(plain, new_exits=NewExits((4,)))


class Call:
    """A pickle that calls `function` when it is loaded without restrictions."""

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
    found = error_of(path)
    assert re.search(rf"{FILE.format('01_001')} is rejected: .*{expected}", found)
    assert "Only tensors and plain values are read" in found
    assert not marker.exists()


def named(module: str, name: str) -> bytes:
    """Return a pickle of the object with this name. Protocol 4 allows dots."""
    parts = (b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    return b"\x80\x04" + b"".join(parts) + b"\x93."


# Each uses an allowed class and tries to change it or to reach another object from it.
PROGRAMS = {
    "attribute of a class": b"cargparse\nNamespace\n}(Vargs\nI1\nub.",
    "slot of a class": b"cargparse\nNamespace\n(N}(Vargs\nI1\nutb.",
    "dotted name": named("argparse", "Namespace.__init__.__globals__"),
    "what megatron's modules import": named("megatron.core.enums", "sys"),
    "dotted name of megatron's": named("megatron.core.enums", "ModelType.__class__"),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_allowed_classes_do_not_lead_to_others(tmp_path, case):
    path = Edited(_nothing).write(tmp_path)
    file = path / "iter_0000012" / "mp_rank_00_000" / "model_optim_rng.pt"
    file.unlink()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", PROGRAMS[case])
    expected = "is rejected: it names" if "name" in case or "import" in case else "cannot be read"
    assert re.search(rf"00_000/model_optim_rng.pt {expected}", error_of(path))
    assert not hasattr(argparse.Namespace, "args")


def test_nested_arguments_are_shown_by_their_type(tmp_path):
    """Printing this one would exhaust the memory."""
    lists = []
    for _ in range(100):
        lists = [lists, lists]

    def change(content):
        content["args"].window_size = lists

    found = error_of(Edited(change, (0, 0)).write(tmp_path / "theirs"))
    assert "window_size = '<list>' cannot be converted" in found


def test_damaged_archives(tmp_path):
    path = Edited(_nothing).write(tmp_path)
    file = path / "iter_0000012" / "mp_rank_00_000" / "model_optim_rng.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "00_000/model_optim_rng.pt cannot be read as an archive" in error_of(path)
    torch.save({}, file, _use_new_zipfile_serialization=False)
    assert "is not a zip archive, which torch.save writes since torch 1.6" in error_of(path)
    file.write_bytes(pickle.dumps(Call(os.system, "false")))
    assert "is not a zip archive" in error_of(path)
    file.write_bytes(whole)
    for compressed in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        with zipfile.ZipFile(file) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w", compressed) as archive:
            for name, data in parts.items():
                is_big = compressed == zipfile.ZIP_STORED and len(data) > 4000
                archive.writestr(name, data[:100] if is_big and "/data/" in name else data)
        expected = "is compressed" if compressed == zipfile.ZIP_DEFLATED else "does not lie within"
        assert expected in error_of(path)


def test_tensors_that_are_larger_than_their_bytes(tmp_path):
    """A view can repeat one element without its own bytes."""
    path = Edited(_set(NORM, torch.ones(1).expand(10**9))).write(tmp_path)
    assert re.search(rf"elements of language_model.encoder.{NORM} share bytes", error_of(path))
