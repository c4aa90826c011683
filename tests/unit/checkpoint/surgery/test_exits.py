"""Adding, moving and removing exits changes no other bit of a checkpoint."""

import pytest
import torch

from ee_llm.architecture.initial_values import initial_value
from ee_llm.architecture.partition import exit_stage
from ee_llm.architecture.tensors import tensor_shapes
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.surgery.rewrite import with_options
from ee_llm.checkpoint.tensors import load_reference
from ee_llm.checkpoint.write import TensorSpec, write_checkpoint
from ee_llm.config import Config
from tests.unit.checkpoint.surgery.sources import (
    HEADS,
    KINDS,
    all_tensors,
    assert_resumes_alike,
    assert_same,
    refusal,
    run,
    save,
    save_tuned,
    tiny,
)
from tests.unit.inference.stages import TOKENS

pytestmark = pytest.mark.thorough


def logits(reader: TensorReader) -> dict[int, torch.Tensor]:
    return load_reference(reader).forward(TOKENS)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_adding_and_removing_restores_the_checkpoint(tmp_path, family, head):
    """This includes optimizer state, generators, the data position and other files."""
    source = save(
        tmp_path / "source", tiny(family, boundaries=(1, 3), temperatures=(2.0, 0.5), **HEADS[head])
    )
    run("add-exits", source.path, "--exits", 2, "--output", tmp_path / "more")
    run("remove-exits", tmp_path / "more", "--exits", 2, "--output", tmp_path / "back")
    more, back = TensorReader(tmp_path / "more"), TensorReader(tmp_path / "back")
    assert more.config().exits.boundaries == (1, 2, 3)
    assert more.config().exits.temperatures == (2.0, 1.0, 0.5)
    assert back.config().exits == source.config().exits
    assert back.config().model == source.config().model
    assert_same(all_tensors(back), all_tensors(source))
    for found in (more, back):
        assert_resumes_alike(found, source)
    before, after = logits(source), logits(more)
    assert after.keys() == before.keys() | {2}
    for boundary, expected in before.items():
        assert torch.equal(after[boundary], expected)


@pytest.mark.parametrize("head", HEADS)
def test_added_exits_have_weights_and_optimizer_state(tmp_path, head):
    source = save(tmp_path / "source", tiny(boundaries=(1,), **HEADS[head]))
    run("add-exits", source.path, "--exits", 3, "--output", tmp_path / "more")
    more = TensorReader(tmp_path / "more")
    assert more.names() == sorted(tensor_shapes(more.config()))
    new = sorted(set(more.names()) - set(source.names()))
    assert len(more.names(optimizer=True)) == len(KINDS) * len(more.names())
    for name in new:
        assert more.dtype(name) == torch.bfloat16
        for kind in KINDS:
            moment = more.tensor(f"optimizer.state.{kind}.{name}")
            assert moment.dtype == torch.float32
            if kind == "fp32_param":
                assert torch.equal(moment.bfloat16(), more.tensor(name))
            else:
                assert not moment.any()


def test_a_copied_exit_equals_the_models_head(tmp_path):
    """An exit with an MLP copied from its layer equals the plain exit."""
    dense = save(tmp_path / "dense", tiny(boundaries=()), dtype=torch.float32)
    run("add-exits", dense.path, "--exits", 2, 3, "--output", tmp_path / "plain")
    run(
        *("add-exits", dense.path, "--exits", 2, "--head", "mlp", "norm", "--exit-output", "own"),
        *("--output", tmp_path / "mlp"),
    )
    plain, mlp = TensorReader(tmp_path / "plain"), TensorReader(tmp_path / "mlp")
    assert plain.config().exits.output == "shared"
    assert torch.equal(plain.tensor("exits.3.norm.weight"), dense.tensor("exits.4.norm.weight"))
    assert torch.equal(mlp.tensor("exits.2.output.weight"), dense.tensor("output.weight"))
    torch.testing.assert_close(logits(mlp)[2], logits(plain)[2])
    assert torch.equal(logits(mlp)[4], logits(dense)[4])


def test_a_copied_block_is_the_next_layer(tmp_path):
    """With the final norm, an exit after layer 3 of 4 then equals the model."""
    dense = save(tmp_path / "dense", tiny(boundaries=()), dtype=torch.float32)
    head = ("--head", "block", "norm")
    run("add-exits", dense.path, "--exits", 3, *head, "--output", tmp_path / "more")
    found = logits(TensorReader(tmp_path / "more"))
    torch.testing.assert_close(found[3], found[4])


def test_random_exits_equal_those_of_a_new_model(tmp_path):
    source = save(tmp_path / "source", tiny(boundaries=(1,), **HEADS["block"]), dtype=torch.float32)
    how = ("--exits", 2, "--initialization", "random")
    run("add-exits", source.path, *how, "--output", tmp_path / "more")
    more = TensorReader(tmp_path / "more")
    new = [name for name in more.names() if name.startswith("exits.2.")]
    assert {"exits.2.output.weight", "exits.2.mlp.linear_fc2.weight"} < set(new)
    for name in new:
        expected = initial_value(name, more.shape(name), source.config())
        assert torch.equal(more.tensor(name), expected)


@pytest.mark.parametrize("initialization", ["copy", "random"])
def test_an_added_shared_norm_equals_the_final_norm(tmp_path, initialization):
    """Also in its optimizer state; otherwise the next steps would drive the norms apart."""
    source = save(
        tmp_path / "source", with_options(tiny(boundaries=(1,)), exits={"norm": "shared"})
    )
    options = ("--exits", 3, "--initialization", initialization)
    run("add-exits", source.path, *options, "--output", tmp_path / "more")
    found = all_tensors(TensorReader(tmp_path / "more"))
    for prefix in ("", *(f"optimizer.state.{kind}." for kind in KINDS)):
        added, final = (found[f"{prefix}exits.{b}.norm.weight"] for b in (3, 4))
        assert torch.equal(added, final), prefix


BY_DEPTH = {
    "output": "shared",
    "norm": "shared",
    "weighting": "depth",
    "depth_scale": 0.2,
    "curriculum": "rotational",
    "rotation_interval": 3,
}


@pytest.mark.parametrize(
    ("gone", "changed"),
    [
        ((1,), {}),
        ((1, 2), {"curriculum": "none", "rotation_interval": 1}),
        (
            (2, 3),
            {
                "weighting": "weights",
                "depth_scale": 1,
                "curriculum": "none",
                "rotation_interval": 1,
            },
        ),
        (
            (1, 2, 3),
            {"weighting": "weights", "depth_scale": 1, "curriculum": "none", "rotation_interval": 1}
            | {"norm": "own"},
        ),
    ],
)
def test_options_that_fewer_exits_cannot_have_are_reset(tmp_path, capsys, gone, changed):
    """A model of LayerSkip has an exit after every layer, of which one or two are used."""
    source = save(tmp_path / "source", with_options(tiny(boundaries=(1, 2, 3)), exits=BY_DEPTH))
    run("remove-exits", source.path, "--exits", *gone, "--output", tmp_path / "fewer")
    exits = TensorReader(tmp_path / "fewer").config().exits
    assert {name: getattr(exits, name) for name in BY_DEPTH} == BY_DEPTH | changed
    notes = " ".join(capsys.readouterr().out.split())
    for name, value in changed.items():
        assert f"exits.{name} = {value}" in notes
    assert ("for training with fewer exits" in notes) == bool(changed)


def test_partial_optimizer_state_is_omitted(tmp_path, capsys):
    """A run that tuned exits has only their moments; the others cannot be reconstructed."""
    source = save(tmp_path / "source")
    kept = {n: t for n, t in all_tensors(source).items() if ".layers." not in n}
    assert len(kept) < len(all_tensors(source))
    from ee_llm.checkpoint.write import TensorSpec, write_checkpoint

    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in kept.items()}
    part = write_checkpoint(tmp_path / "part", source.config(), specs, kept.__getitem__)
    run("add-exits", part, "--exits", 3, "--output", tmp_path / "more")
    assert "it covers only a part of the parameters" in capsys.readouterr().out
    more = TensorReader(tmp_path / "more")
    assert more.names(optimizer=True) == []
    assert more.path.name == "step-00000000"


def test_moving_exits_changes_the_stage_and_no_bit(tmp_path):
    config = tiny()
    config = Config(**config.model_dump() | {"parallel": {"pipeline": 2}})
    source = save(tmp_path / "source", config)
    run("move-exits", source.path, "--placement", "pre", "--output", tmp_path / "pre")
    run("move-exits", tmp_path / "pre", "--placement", "post", "--output", tmp_path / "post")
    pre, post = TensorReader(tmp_path / "pre"), TensorReader(tmp_path / "post")
    assert [exit_stage(source.config(), b) for b in (1, 2)] == [0, 0]
    assert [exit_stage(pre.config(), b) for b in (1, 2)] == [0, 1]
    assert post.config().exits == source.config().exits
    for found in (pre, post):
        assert_same(all_tensors(found), all_tensors(source))
        assert_resumes_alike(found, source)
        for boundary, expected in logits(source).items():
            assert torch.equal(logits(found)[boundary], expected)


def test_all_exits_may_go(tmp_path):
    source = save(tmp_path / "source", tiny(**HEADS["own outputs"]))
    run("remove-exits", source.path, "--exits", 2, 1, "--output", tmp_path / "dense")
    dense = TensorReader(tmp_path / "dense")
    assert dense.config().exits.boundaries == ()
    assert dense.names() == sorted(tensor_shapes(dense.config()))
    assert torch.equal(logits(dense)[4], logits(source)[4])


REFUSED = {
    "beyond the depth": (("add-exits", "--exits", 4), "4 layers. Choose layers from 1 to 3."),
    "zero": (("add-exits", "--exits", 0), "--exits 0:"),
    "there already": (("add-exits", "--exits", 2), "already has exits at [1, 2]"),
    "twice": (("add-exits", "--exits", 3, 3), "--exits 3 3: pass each exit once"),
    "another head": (
        ("add-exits", "--exits", 3, "--head", "mlp"),
        "have norm, and all exits must be alike",
    ),
    "another output": (
        ("add-exits", "--exits", 3, "--exit-output", "own"),
        "--exit-output own: the exits of",
    ),
    "data for a copy": (
        ("add-exits", "--exits", 3, "--data", "x"),
        "--data has no effect with --initialization copy",
    ),
    "no output of its own": (
        ("add-exits", "--exits", 3, "--initialization", "class-aware"),
        "(exits.output = shared). Use --exit-output own",
    ),
    "no exit there": (("remove-exits", "--exits", 3), "has no exit there, only at [1, 2]"),
    "the final exit": (("remove-exits", "--exits", 4), "--exits 4 is the final exit"),
    "placed so": (("move-exits", "--placement", "post"), "already have this placement"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_user_mistakes_raise_and_leave_nothing(tmp_path, capsys, case):
    (command, *options), expected = REFUSED[case]
    source = save(tmp_path / "source")
    found = refusal(capsys, command, source.path, *options, "--output", tmp_path / "made")
    assert expected in found
    assert not (tmp_path / "made").exists()


def test_an_mlp_cannot_be_a_pre_exit(tmp_path, capsys):
    source = save(tmp_path / "source", tiny(**HEADS["mlp"]))
    made = ("--placement", "pre", "--output", tmp_path / "made")
    assert "exits.placement = pre" in refusal(capsys, "move-exits", source.path, *made)


def test_a_model_without_exits_has_none_to_move(tmp_path, capsys):
    source = save(tmp_path / "source", tiny(boundaries=()))
    made = ("--placement", "pre", "--output", tmp_path / "made")
    assert "has no exits to move" in refusal(capsys, "move-exits", source.path, *made)


def test_a_missing_checkpoint_and_a_used_output(tmp_path, capsys):
    gone = refusal(capsys, "remove-exits", tmp_path / "x", "--exits", 1, "--output", tmp_path / "y")
    assert "x does not exist: expected a run directory or a checkpoint" in gone
    source = save(tmp_path / "source")
    full = ("add-exits", source.path, "--exits", 3, "--output", tmp_path / "source")
    assert "already exists. Choose another --output" in refusal(capsys, *full)


def test_an_interruption_leaves_no_checkpoint(tmp_path, monkeypatch):
    source = save(tmp_path / "source")
    read = TensorReader.tensor

    def stop(self, name):
        if name.startswith("layers.3."):
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(TensorReader, "tensor", stop)
    from ee_llm.cli.main import main

    command = ["checkpoint", "remove-exits", str(source.path), "--exits", "1"]
    assert main([*command, "--output", str(tmp_path / "made")]) == 130
    assert list((tmp_path / "made" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"pipeline": 2, "layer_split": (2, 1)}])
def test_a_tuned_model_loses_its_optimizer_and_layout(tmp_path, capsys, parallel):
    """Both cover only the layers up to the last tuned exit, so no other run can use them."""
    source = save_tuned(tmp_path / "tuned", **parallel)
    for number, (command, expected) in enumerate(
        {
            ("remove-exits", "--exits", 1): (3,),
            ("add-exits", "--exits", 2): (1, 2, 3),
            ("reshard", "--tensor", 2, "--pipeline", 4): (1, 3),
        }.items()
    ):
        name, *options = command
        run(name, source.path, *options, "--output", tmp_path / str(number))
        assert "covers only a part of the parameters" in capsys.readouterr().out
        found = TensorReader(tmp_path / str(number))
        assert found.names(optimizer=True) == []
        assert not found.config().is_tuning
        assert found.config().exits.boundaries == expected
        assert found.config().parallel.pipeline == (4 if name == "reshard" else 1)
        for tensor in {*found.names()} & {*source.names()}:
            assert torch.equal(found.tensor(tensor), source.tensor(tensor))


def test_copies_keep_the_dtype(tmp_path):
    """Norms are float32 and other weights bfloat16."""
    source = save(tmp_path / "source", tiny(boundaries=()), optimizer=False)
    tensors = all_tensors(source)
    norms = {n: torch.randn(t.shape) for n, t in tensors.items() if n.endswith("norm.weight")}
    tensors |= norms
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    mixed = write_checkpoint(tmp_path / "mixed", source.config(), specs, tensors.__getitem__)
    run("add-exits", mixed, "--exits", 2, "--output", tmp_path / "more")
    more = TensorReader(tmp_path / "more")
    assert torch.equal(more.tensor("exits.2.norm.weight"), norms["exits.4.norm.weight"])


@pytest.mark.parametrize("name", ["add-exits", "remove-exits"])
def test_exits_must_be_given_once(tmp_path, capsys, name):
    source = save(tmp_path / "source", tiny(boundaries=(1,)))
    output = ("--output", tmp_path / "made")
    assert "--exits is empty" in refusal(capsys, name, source.path, "--exits", *output)
    exits = ("--exits", 1, 1) if name == "remove-exits" else ("--exits", 2, 2)
    assert "pass each exit once" in refusal(capsys, name, source.path, *exits, *output)


def test_only_files_of_the_checkpoint_are_copied(tmp_path):
    """A link in a downloaded checkpoint could point to any file of this machine."""
    source = save(tmp_path / "source")
    (tmp_path / "secret").write_text("TOP SECRET")
    (source.path / "huggingface" / "evil").symlink_to(tmp_path / "secret")
    (source.path / "huggingface" / "vocab.json").symlink_to(tmp_path / "secret")
    (source.path / "rng" / "evil").symlink_to(tmp_path / "secret")
    run("remove-exits", source.path, "--exits", 1, "--output", tmp_path / "less")
    found = TensorReader(tmp_path / "less").path
    assert sorted(p.name for p in (found / "huggingface").iterdir()) == ["config.json"]
    assert sorted(p.name for p in (found / "rng").iterdir()) == ["rank-00000.safetensors"]
