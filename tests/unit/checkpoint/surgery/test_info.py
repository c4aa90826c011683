"""The description of a checkpoint, as text and as JSON."""

import json

from ee_llm.checkpoint.state import TrainState
from tests.unit.checkpoint.surgery.sources import refusal, run, save, tiny


def test_as_json(tmp_path, capsys):
    source = save(tmp_path / "run", tiny(temperatures=(0.5, 1.0), output="own"))
    run("info", tmp_path / "run", "--json", "--tensors")
    facts = json.loads(capsys.readouterr().out)
    assert facts["path"] == str(source.path)
    assert (facts["step"], facts["skipped_steps"], facts["consumed_tokens"]) == (7, 1, 56 * 32)
    num = sum(source.tensor(name).numel() for name in source.names())
    assert facts["parameters"] == num
    assert facts["bytes_by_dtype"] == {"bfloat16": 2 * num}
    assert facts["optimizer"] == {
        "steps": 6,
        "tensors": 3 * len(source.names()),
        "bytes": 12 * num,
        "parameters": len(source.names()),
    }
    assert [row["boundary"] for row in facts["exits"]] == [1, 2, 4]
    assert facts["exits"][0] == {
        "boundary": 1,
        "stage": 0,
        "head": ["norm"],
        "output_weight": "exits.1.output.weight",
        "temperature": 0.5,
        "gate": None,
        "parameters": 260 * 32 + 32,
    }
    assert facts["exits"][2]["output_weight"] == "output.weight"
    assert facts["saved_by"]["pipeline"] == 2
    assert facts["bytes_on_disk"] == sum(
        path.stat().st_size
        for path in source.path.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    )
    assert facts["checkpoints_of_the_run"] == ["step-00000007"]
    output = {"name": "output.weight", "dtype": "bfloat16", "shape": [260, 32]}
    assert output in facts["all_tensors"]


def test_as_text(tmp_path, capsys):
    save(tmp_path / "run")
    run("info", tmp_path / "run", "--tensors")
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "step 7, 1 of them skipped: 56 sequences, 1,792 tokens",
        "llama, 4 layers, hidden 32, 4 heads (2 of keys and values), ffn 48, 260 tokens",
        "optimizer 6 steps",
        "saved by 2 ranks",
        "layer 2 0 norm output.weight 1 - 32",
        "layer 4 (final)",
        "exits.1.norm.weight bfloat16 [32]",
    ):
        assert expected in text


def test_a_converted_model_has_no_steps(tmp_path, capsys):
    save(tmp_path / "run", optimizer=False, state=TrainState())
    run("info", tmp_path / "run")
    text = " ".join(capsys.readouterr().out.split())
    assert "step 0: 0 sequences, 0 tokens" in text
    assert "none: weights only; training cannot be resumed" in text


def test_missing_and_damaged_checkpoints(tmp_path, capsys):
    assert "does not exist: expected a run directory" in refusal(capsys, "info", tmp_path / "x")
    source = save(tmp_path / "run")
    (source.path / "state.json").unlink()
    assert "state.json is missing" in refusal(capsys, "info", source.path)
