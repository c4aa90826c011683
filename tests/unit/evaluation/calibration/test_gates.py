"""Gates: their training, their file, and a calibration that trains them."""

import json
from pathlib import Path

import pytest
import torch

import ee_llm
from ee_llm.architecture.gates import gate_logits
from ee_llm.checkpoint.gates import GATES, read_gates, write_gates
from ee_llm.checkpoint.read import TensorReader
from ee_llm.cli.main import main
from ee_llm.errors import CheckpointError, DataError, RequestError
from ee_llm.evaluation.calibration.gate_training import area_under_curve, train_gate
from tests.unit.evaluation.models import make_config, save, write_data
from tests.unit.inference.models import random_gates


def _samples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inputs, labels of which a quarter are 1, and their true probabilities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator) * torch.tensor([9.0] + [1.0] * 7) + 2
    odds = 2 * (x[:, 1] - 2) * (x[:, 2] - 2) - 1.8
    truth = odds.sigmoid()
    return x, (torch.rand(count, generator=generator) < truth).float(), truth


def test_a_gate_learns_the_probability_of_agreement() -> None:
    """The function is not linear, its inputs have different scales, and one class is rarer."""
    x, labels, _ = _samples(20_000, 0)
    gate = train_gate(3, x, labels)
    assert list(gate.tensors) == [
        f"gates.3.linear_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")
    ]
    held_out, held_labels, truth = _samples(5_000, 1)
    found = gate_logits(held_out, *gate.tensors.values()).sigmoid()
    best = area_under_curve(truth, held_labels)
    reached = area_under_curve(found, held_labels)
    assert best is not None
    assert reached is not None
    assert reached > best - 0.02
    assert float((found - truth).abs().mean()) < 0.06, "the output is a probability"
    assert gate.auc == pytest.approx(reached, abs=0.03)
    assert gate.agreement == float(labels.double().mean())
    again = train_gate(3, x, labels)
    assert all(torch.equal(one, again.tensors[name]) for name, one in gate.tensors.items())


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_gate_for_an_exit_that_never_or_always_agrees_is_constant(label: float) -> None:
    x, _, _ = _samples(2_000, 0)
    gate = train_gate(1, x, torch.full((2_000,), label))
    found = gate_logits(x, *gate.tensors.values()).sigmoid()
    assert gate.auc is None
    assert float((found - label).abs().max()) < 1e-3


def test_area_under_the_curve_by_counting_pairs() -> None:
    scores = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.8, 0.9])
    labels = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    pairs = [
        (a > b) + (a == b) / 2
        for a in scores[labels == 1].tolist()
        for b in scores[labels == 0].tolist()
    ]
    assert area_under_curve(scores, labels) == pytest.approx(sum(pairs) / len(pairs))
    assert area_under_curve(scores, torch.ones(6)) is None


def test_too_few_tokens_for_gates() -> None:
    x, labels, _ = _samples(1_000, 0)
    with pytest.raises(DataError, match="1,000 tokens are too few to train gates"):
        train_gate(1, x, labels)


TEXTS = [f"{number} The quick brown fox jumps over the lazy dog. " * 4 for number in range(90)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("run", "other"):
        options = {"rope_theta": 5000.0} if name == "other" else {}
        save(tmp_path / name, make_config(boundaries=(1, 2, 3), output="own", **options))
    write_data(tmp_path / "data", [[*text.encode(), 256] for text in TEXTS])
    return tmp_path


@pytest.mark.thorough
def test_calibration_trains_gates_and_saves_them(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(place / "data"), "--seq-length", "32", "--dtype", "float64"]
    options += ["--risk", "0.3", "--no-progress"]
    command = ["calibrate", str(place / "run"), *options]
    assert main([*command, "--measure", "gate"]) == 2
    message = capsys.readouterr().err
    assert "measure = 'gate' needs a gate for the exit after layer 1" in message
    assert "'ee-llm calibrate --train-gate'" in message
    policy, record = place / "policy.json", place / "record.json"
    outputs = ["--output", str(policy), "--json", str(record)]
    assert main([*command, "--train-gate", "--gate-tokens", "4000", *outputs]) == 0
    assert "gate after layer 1: the exit agrees for" in capsys.readouterr().out
    found = json.loads(record.read_text())
    assert (found["measure"], found["heads"]) == ("gate", 1.0)
    assert [one["boundary"] for one in found["gates"]] == [1, 2, 3]
    assert any(threshold is not None for threshold in found["thresholds"])
    reader = TensorReader(place / "run")
    assert len(read_gates(reader)) == 12
    # The same text and thresholds again, with the gates of the checkpoint.
    again = ee_llm.calibrate(
        place / "run",
        data=place / "data",
        seq_length=32,
        dtype="float64",
        risk=0.3,
        measure="gate",
        progress=False,
    )
    assert again.fingerprint == found["fingerprint"]
    assert again.num_tokens > found["num_tokens"], "the text that trained the gates is not tested"
    params = ee_llm.SamplingParams(max_tokens=8, ignore_eos=True)
    with ee_llm.LLM(place / "run", exits=policy, dtype="float64") as llm:
        outputs = llm.generate(["The quick", "brown fox ju", "lazy"], params)
        assert llm.verify(outputs).passed
        assert {token.exit for one in outputs for token in one.tokens} - {4}
    write_gates(reader, {name: tensor * 0.9 for name, tensor in read_gates(reader).items()})
    with pytest.raises(
        RequestError, match=r"and its gates. This checkpoint .* other gates or none"
    ):
        ee_llm.LLM(place / "run", exits=policy, dtype="float64")


@pytest.mark.thorough
def test_gates_of_another_model_or_a_damaged_file_are_refused(place: Path) -> None:
    path = TensorReader(place / "run").path / GATES
    x, labels, _ = _samples(1_500, 0)
    write_gates(TensorReader(place / "other"), train_gate(1, x, labels).tensors)
    path.write_bytes((TensorReader(place / "other").path / GATES).read_bytes())
    with pytest.raises(CheckpointError, match="the gates were trained for the model with"):
        ee_llm.LLM(place / "run")
    assert main(["checkpoint", "info", str(place / "run"), "--verify"]) == 2
    write_gates(TensorReader(place / "run"), read_gates(TensorReader(place / "other")))
    assert main(["checkpoint", "info", str(place / "run"), "--verify"]) == 0
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(CheckpointError, match=r"gates\.safetensors cannot be read"):
        ee_llm.LLM(place / "run")
    for name, tensor in {
        "layers.1.mlp.linear_fc1.weight": torch.zeros(3, 3),
        "gates.x.linear_1.weight": torch.zeros(3, 3),
        "gates.1.linear_1.weight": torch.zeros(3),
        "gates.1.linear_2.bias": torch.zeros(1, dtype=torch.bfloat16),
    }.items():
        write_gates(TensorReader(place / "run"), {name: tensor})
        with pytest.raises(CheckpointError, match=f"'{name}', .* is not a tensor of a gate"):
            ee_llm.LLM(place / "run")
    # Training replaces a file that cannot be used.
    ee_llm.calibrate(
        place / "run",
        data=place / "data",
        seq_length=32,
        dtype="float64",
        risk=0.3,
        train_gate=True,
        gate_tokens=2000,
        progress=False,
    )
    assert len(read_gates(TensorReader(place / "run"))) == 12


def test_checkpoint_info_lists_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "run", config := make_config(boundaries=(1, 3)))
    reader = TensorReader(tmp_path / "run")

    def shown() -> list[str | None]:
        main(["checkpoint", "info", str(tmp_path / "run"), "--json"])
        return [one["gate"] for one in json.loads(capsys.readouterr().out)["exits"]]

    assert shown() == [None] * 3
    gates = random_gates(config)
    write_gates(reader, {name: one for name, one in gates.items() if name.startswith("gates.3")})
    assert shown() == [None, "trained", None]
    main(["checkpoint", "info", str(tmp_path / "run")])
    assert "trained" in capsys.readouterr().out
    (reader.path / GATES).write_bytes(b"damaged")
    assert shown() == ["not usable", "not usable", None]
