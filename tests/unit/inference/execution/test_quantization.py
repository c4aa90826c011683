"""8-bit weights are within half a step of the originals, and clear errors where unsupported."""

import json
import sys

import pytest
import torch

from ee_llm.cli.main import main
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.execution.linear import Linear
from ee_llm.inference.execution.quantization import Int8Linear
from tests.unit.inference.models import random_tensors, save_model, tiny_config

CONFIG = tiny_config("gpt", vocab_size=264, max_seq_length=48)


@pytest.fixture
def run(tmp_path):
    save_model(tmp_path / "run", CONFIG, random_tensors(CONFIG, dtype=torch.float32))
    return tmp_path / "run"


def generated(capsys, run, *options: str) -> dict:
    how = ["--checkpoint", str(run), "--prompt", "a prompt", "--json", "--dtype", "float32"]
    assert main(["generate", *how, *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_at_most_half_a_step_per_input(dtype):
    """A step is 1 / 127 of the largest weight of the same output, not of the whole layer."""
    pytest.importorskip("torchao")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 64, generator=generator) * torch.logspace(-3, 2, 40)[:, None]
    bias = torch.randn(40, generator=generator)
    x = torch.randn(9, 64, generator=generator)
    weight, bias, x = weight.to(dtype), bias.to(dtype), x.to(dtype)
    found = Int8Linear(weight, bias)(x)
    exact = x.double() @ weight.double().t() + bias.double()
    step = weight.double().abs().amax(dim=1) / 127
    limit = 0.5 * step * x.double().abs().sum(dim=1, keepdim=True)
    rounding = 0.01 if dtype == torch.float32 else 0.6
    assert found.dtype == dtype
    error = (found.double() - exact).abs()
    assert bool((error <= limit * (1 + rounding) + exact.abs() * torch.finfo(dtype).eps * 2).all())
    assert bool((error > 0).any())
    assert ExecutionConfig(quantize="int8").linear is Int8Linear
    assert ExecutionConfig().linear is Linear


def test_generations_are_close_and_marked_as_quantized(run, capsys, tmp_path):
    pytest.importorskip("torchao")
    plain = generated(capsys, run, "--max-tokens", "1")
    found = generated(capsys, run, "--max-tokens", "1", "--quantize", "int8")
    assert found["quantize"] == "int8"
    assert "quantize" not in plain
    assert found["confidences"] == pytest.approx(plain["confidences"], rel=0.2)
    assert found["confidences"] != plain["confidences"]
    (tmp_path / "made.jsonl").write_text(json.dumps(found) + "\n")
    assert main(["verify", str(tmp_path / "made.jsonl"), "--checkpoint", str(run)]) == 2
    assert "quantize = 'int8'" in " ".join(capsys.readouterr().err.split())


def test_missing_torchao_is_an_error(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    how = ["--checkpoint", str(run), "--prompt", "x", "--quantize", "int8", "--dtype", "float32"]
    assert main(["generate", *how]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "quantize = 'int8' needs torchao" in error
    assert "pip install 'ee-llm[quantize]'" in error


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--dtype", "float64"), "--quantize int8 with --dtype float64"),
        (("--dtype", "float32", "--verify"), "--verify checks generations"),
    ],
)
def test_incompatible_options_are_refused(run, capsys, options, expected):
    pytest.importorskip("torchao")
    how = ["--checkpoint", str(run), "--prompt", "x", "--quantize", "int8"]
    assert main(["generate", *how, *options]) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
