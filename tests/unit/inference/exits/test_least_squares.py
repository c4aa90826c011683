"""Least-squares translators against a ridge regression in NumPy, through the reference model."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ee_llm.architecture.tensors import tensor_shapes
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import load_reference
from ee_llm.cli.main import main
from ee_llm.inference.exits.least_squares import RIDGE
from tests.unit.checkpoint.surgery.sources import all_tensors, refusal, run, save, tiny
from tests.unit.inference.exits.test_class_means import DOCUMENTS, LENGTH, TOKENS, write_data
from tests.unit.inference.models import Residuals

pytestmark = pytest.mark.thorough


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_data(tmp_path / "data", DOCUMENTS)


def add(source: Path, output: Path, *options: object) -> TensorReader:
    method = ("--initialization", "least-squares", "--seq-length", LENGTH)
    run("add-exits", source, *method, "--output", output, *options)
    return TensorReader(output)


def normalized(hidden: torch.Tensor, eps: float) -> np.ndarray:
    x = hidden.double().numpy()
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps)


def expected_translator(reader: TensorReader, boundary: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight and the bias from all windows at once."""
    config, eps = reader.config(), reader.config().model.norm_eps
    tensors = {name: reader.tensor(name) for name in tensor_shapes(config)}
    model = Residuals(config, tensors, torch.float64)
    inputs, outputs = [], []
    for start in range(0, len(TOKENS) - 1, LENGTH):
        window = torch.tensor(TOKENS[start : start + LENGTH + 1][:-1])
        hidden = dict(model.walk(window))
        inputs.append(normalized(hidden[boundary], eps))
        outputs.append(normalized(hidden[model.num_layers], eps))
    x = np.concatenate(inputs)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    gram = x.T @ x
    gram += RIDGE * gram.diagonal().mean() * np.eye(len(gram))
    solution = np.linalg.solve(gram, x.T @ np.concatenate(outputs))
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_the_translator_is_the_ridge_regression(tmp_path: Path, data: str, family: str) -> None:
    dense = save(tmp_path / "dense", tiny(family, boundaries=()), dtype=torch.float32)
    options = ("--data", data, "--exits", 1, 3)
    found = add(dense.path, tmp_path / "more", *options)
    assert found.config().exits.head == ("translator", "norm")
    assert found.config().exits.output == "shared"
    for boundary in (1, 3):
        weight, bias = expected_translator(found, boundary)
        name = f"exits.{boundary}.translator"
        np.testing.assert_allclose(found.tensor(f"{name}.weight"), weight, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.tensor(f"{name}.bias"), bias, rtol=1e-3, atol=1e-4)
    again = add(dense.path, tmp_path / "again", *options)
    for name, tensor in all_tensors(found).items():
        assert torch.equal(again.tensor(name), tensor), "not the same twice"


def test_few_tokens_are_noted(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = save(tmp_path / "dense", tiny(boundaries=()), dtype=torch.float32)
    add(dense.path, tmp_path / "few", "--data", data, "--exits", 2)
    few = f"{len(TOKENS) - 1} tokens are few for hidden_size = 32. Use 330 or more."
    assert few in " ".join(capsys.readouterr().out.split())
    more = write_data(tmp_path / "more", [[*range(250), 1] * 2])
    add(dense.path, tmp_path / "enough", "--data", more, "--exits", 2)
    assert "are few" not in capsys.readouterr().out


def test_tied_outputs_fit_a_model_with_tied_embeddings(tmp_path: Path, data: str) -> None:
    config = tiny(boundaries=(), tie_embeddings=True)
    dense = save(tmp_path / "dense", config, dtype=torch.float32)
    options = ("--data", data, "--exits", 2, "--exit-output", "tied")
    assert add(dense.path, tmp_path / "more", *options).config().exits.output == "tied"


def test_the_exit_comes_closer_to_the_final_exit(tmp_path: Path, data: str) -> None:
    """The mean squared distance of the normalized states shrinks, at every boundary."""
    dense = save(tmp_path / "dense", tiny(boundaries=()), dtype=torch.float32)
    fitted = add(dense.path, tmp_path / "fitted", "--data", data, "--exits", 1, 2)
    copied = tmp_path / "copied"
    run(
        "add-exits", dense.path, "--exits", 1, 2, "--head", "translator", "norm", "--output", copied
    )
    tokens = torch.tensor(TOKENS[:LENGTH])
    logits = [
        load_reference(r, torch.float64).forward(tokens) for r in (fitted, TensorReader(copied))
    ]
    for boundary in (1, 2):
        near, far = (float((one[boundary] - one[4]).square().mean()) for one in logits)
        assert near < 0.7 * far


def test_a_translator_is_the_identity_unless_it_is_computed(tmp_path: Path) -> None:
    """An exit with it equals one without, whatever the scale of the hidden state."""
    dense = save(tmp_path / "dense", tiny(boundaries=()), dtype=torch.float32)
    tokens = torch.tensor(TOKENS[:LENGTH])
    logits = []
    for name, head in (("plain", ("norm",)), ("translated", ("translator", "norm"))):
        run("add-exits", dense.path, "--exits", 2, "--head", *head, "--output", tmp_path / name)
        model = load_reference(TensorReader(tmp_path / name), torch.float64)
        logits.append(model.forward(tokens)[2])
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_a_translator_follows_an_mlp(tmp_path: Path, data: str) -> None:
    """Its input is the output of the parts before it: here that of the layer itself, by a copy."""
    dense = save(tmp_path / "dense", tiny(boundaries=()), dtype=torch.float32)
    options = ("--data", data, "--exits", 2, "--head")
    plain = add(dense.path, tmp_path / "plain", *options, "translator", "norm")
    behind = add(dense.path, tmp_path / "behind", *options, "mlp", "translator", "norm")
    name = "exits.2.translator.weight"
    torch.testing.assert_close(behind.tensor(name), plain.tensor(name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["least-squares", "class-aware"])
def test_hidden_states_that_are_not_finite_are_an_error(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    dense = save(tmp_path / "dense", tiny(boundaries=()), dtype=torch.float32, scale=math.nan)
    options = ("--exits", 2, "--data", data, "--initialization", method)
    arguments = ("checkpoint", "add-exits", dense.path, *options, "--output", tmp_path / "more")
    assert main([*map(str, arguments)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "hidden states after layer 2 are not finite in float32. Check the checkpoint" in said
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--head", "norm", "--data", "x"), "--head translator norm"),
        (("--head", "translator", "--data", "x"), "which a norm must follow, but the head of"),
        (
            ("--exit-output", "tied", "--data", "x"),
            "(exits.output = tied, model.tie_embeddings = false). Use --exit-output shared",
        ),
        ((), "least-squares needs data"),
        (("--data", "x", "--pipeline", 9), "--pipeline 9 is out of range. Use 1 to 4"),
        (("--data", "x", "--tensor", 3), "--tensor 3 does not divide"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, options, said) -> None:
    dense = save(tmp_path / "dense", tiny(boundaries=()))
    method = ("--exits", 2, "--initialization", "least-squares", "--output", tmp_path / "more")
    assert said in refusal(capsys, "add-exits", dense.path, *method, *options)


def test_only_least_squares_has_pipeline_ranks(tmp_path, capsys) -> None:
    dense = save(tmp_path / "dense", tiny(boundaries=()))
    options = ("--exits", 2, "--output", tmp_path / "more", "--pipeline", 2)
    found = refusal(capsys, "add-exits", dense.path, *options)
    assert "--pipeline has no effect with --initialization copy" in found
    method = ("--initialization", "class-aware", "--data", "x")
    found = refusal(capsys, "add-exits", dense.path, *options, *method)
    assert "--pipeline 2 does not work with --initialization class-aware" in found
