"""Checkpoints with 8-bit weights: their content, their function and their limits."""

import json

import pytest
import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.checkpoint.format.quantized import is_quantizable
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import load_reference
from ee_llm.checkpoint.write import TensorSpec, write_checkpoint
from ee_llm.cli.main import main
from tests.unit.conversion.huggingface.folders import make_folder
from tests.unit.conversion.huggingface.test_convert_exits import ours, refusal
from tests.unit.conversion.huggingface.test_convert_round_trip import run
from tests.unit.inference.stages import TOKENS


@pytest.fixture(params=["llama", "gpt"])
def made(tmp_path, request):
    """Return a checkpoint and its 8-bit version."""
    source = ours(tmp_path / "source", request.param, head=("block", "mlp", "norm"), output="own")
    run(source.path, "--to", "int8", "--output", tmp_path / "small")
    return source, TensorReader(tmp_path / "small")


def test_each_weight_is_the_nearest_multiple_of_its_outputs_scale(made):
    source, small = made
    scales = [name for name in small.names() if name not in source]
    assert sorted(scales) == [f"{n}.scale" for n in source.names() if is_quantizable(n)]
    assert "embedding.word.weight.scale" not in scales
    assert {"output.weight.scale", "exits.2.block.mlp.linear_fc1.weight.scale"} < set(scales)
    for name in source.names():
        weight = source.tensor(name)
        if f"{name}.scale" not in scales:
            assert torch.equal(small.tensor(name), weight)
            continue
        values, scale = small.tensor(name), small.tensor(f"{name}.scale")
        assert values.dtype == torch.int8
        torch.testing.assert_close(scale, weight.abs().amax(dim=1) / 127)
        error = (values.float() * scale[:, None] - weight).abs()
        assert bool((error <= scale[:, None] * 0.5001).all())


def test_weights_that_are_not_finite_raise(tmp_path, capsys):
    folder = make_folder(tmp_path / "theirs")
    run(folder, "--output", tmp_path / "ours")
    source = TensorReader(tmp_path / "ours")
    tensors = {name: source.tensor(name) for name in source.names()}
    name = "layers.2.mlp.linear_fc2.weight"
    tensors[name][1, 1] = torch.nan
    specs = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    bad = write_checkpoint(
        tmp_path / "bad", source.config(), specs, tensors.__getitem__, tokenizer_file="bytes"
    )
    found = refusal(capsys, bad, "--to", "int8", "--output", tmp_path / "small")
    assert f"{name} has weights that are not finite" in found


def test_inference_uses_the_stored_weights(made, capsys):
    """This holds for the reference, and for the engine, whose tokens pass the certificate."""
    source, small = made
    tensors = {name: source.tensor(name) for name in source.names()}
    for name in tensors:
        if is_quantizable(name):
            scale = small.tensor(f"{name}.scale")[:, None]
            tensors[name] = (tensors[name] / scale).round() * scale
    expected = ReferenceModel(source.config(), tensors).forward(TOKENS)
    for boundary, found in load_reference(small).forward(TOKENS).items():
        torch.testing.assert_close(found, expected[boundary])
    capsys.readouterr()
    how = ["--prompt", "ab", "--max-tokens", "4", "--dtype", "float64", "--verify", "--json"]
    assert main(["generate", "--checkpoint", str(small.path), *how]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["token_ids"]) > 0
    assert "0 divergences" in err


def test_8_bit_checkpoints_serve_inference_only(made, tmp_path, capsys):
    _, small = made
    for options in (("--to", "hf"), ("--dense",), ("--to", "int8")):
        found = refusal(capsys, small.path, *options, "--output", tmp_path / "made")
        assert "has 8-bit weights" in found
    command = ["checkpoint", "remove-exits", str(small.path), "--exits", "1"]
    assert main([*command, "--output", str(tmp_path / "made")]) == 2
    assert "has 8-bit weights" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "made").exists()
    assert main(["checkpoint", "info", str(small.path)]) == 0
    assert "of int8" in capsys.readouterr().out


def test_a_folder_of_transformers_must_be_converted_first(tmp_path, capsys):
    folder = make_folder(tmp_path / "theirs")
    found = refusal(capsys, folder, "--to", "int8", "--output", tmp_path / "made")
    assert f"--to int8: {folder} is a Hugging Face model" in found


def test_quantization_of_zeros(tmp_path):
    from ee_llm.checkpoint.format.quantized import quantize

    values, scale = quantize(torch.zeros(2, 3))
    assert not values.any()
    assert bool((scale > 0).all())
