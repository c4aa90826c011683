"""Test `ee-llm verify`: generated records pass, and tampered records fail."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ee_llm import distributed
from ee_llm.checkpoint.read import TensorReader
from ee_llm.cli import main
from ee_llm.cli.generation.command import generate
from ee_llm.cli.generation.options import GenerateOptions, VerifyOptions
from ee_llm.cli.generation.verify import read_outputs, verify
from ee_llm.inference.verification.verify import Verifier
from tests.unit.inference.models import random_tensors, save_model, tiny_config

pytestmark = pytest.mark.thorough

CONFIG = tiny_config("llama", vocab_size=264, max_seq_length=48)
LINES = [
    {"prompt": "one", "strategy": "exact", "id": "e"},
    {"prompt": "two two", "strategy": "full", "temperature": 0.7},
    {"prompt": "three", "strategy": "self-speculative", "temperature": 1.1, "top_k": 20, "seed": 3},
    {"prompt": "fourth", "strategy": "propagate", "repetition_penalty": 1.3},
    {"prompt": "five", "temperature": 0.9, "top_p": 0.9, "min_p": 0.01, "measure": "margin"},
]
Record = dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    save_model(output, CONFIG, random_tensors(CONFIG, dtype=torch.float32))
    return output


def _records(run: Path, folder: Path, dtype: str) -> list[Record]:
    batch, output = folder / "batch.jsonl", folder / f"{dtype}.jsonl"
    batch.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    generate(
        GenerateOptions(
            run,
            batch_file=batch,
            output=output,
            thresholds=(0.3,),
            max_tokens=20,
            dtype=dtype,
            deferral="off",
        )
    )
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module", params=["float64", "float32", "bfloat16"])
def made(run: Path, tmp_path_factory: pytest.TempPathFactory, request) -> list[Record]:
    return _records(run, tmp_path_factory.mktemp("made"), request.param)


def _write(folder: Path, records: list[Record]) -> Path:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def stderr_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], str]:
    monkeypatch.setattr(distributed.console, "width", 200)
    return lambda: " ".join(capsys.readouterr().err.split())


def test_generated_records_pass(
    run: Path, made: list[Record], tmp_path: Path, stderr_text: Callable[[], str]
) -> None:
    """Every strategy passes in every precision; in bfloat16, rounding explains divergences."""
    assert {record["strategy"] for record in made} == {
        "exact",
        "full",
        "self-speculative",
        "propagate",
    }
    verify(VerifyOptions(_write(tmp_path, made), run))
    text = stderr_text()
    num_tokens = sum(len(record["token_ids"]) for record in made)
    assert f"certificate: 5 generations, {num_tokens} tokens" in text
    assert "0 of them beyond rounding" in text
    if made[0]["dtype"] == "float64":
        assert f"{num_tokens} tokens, 0 divergences" in text


def _another_token(record: Record) -> None:
    record["token_ids"][3] = (record["token_ids"][3] + 1) % 256


def _another_exit(record: Record) -> None:
    sure = max(
        c for c, exit in zip(record["confidences"], record["exits"], strict=True) if exit < 4
    )
    record["exits"][record["confidences"].index(sure)] = 4


def _no_exit(record: Record) -> None:
    record["exits"][3] = 3


def _another_seed(record: Record) -> None:
    record["sampling_params"]["seed"] += 1


def _another_prompt(record: Record) -> None:
    record["prompt_token_ids"][0] += 1


@pytest.mark.parametrize(
    "tamper", [_another_token, _another_exit, _no_exit, _another_seed, _another_prompt]
)
def test_tampered_records_fail_and_show_the_margin(
    run: Path,
    made: list[Record],
    tmp_path: Path,
    stderr_text: Callable[[], str],
    tamper: Callable[[Record], None],
) -> None:
    records = json.loads(json.dumps(made))
    sampled = next(i for i, one in enumerate(records) if one["sampling_params"]["top_p"] == 0.9)
    tamper(records[sampled])
    path = _write(tmp_path, records)
    with pytest.raises(ValueError, match="tokens or exits differ from those"):
        verify(VerifyOptions(path, run))
    assert f"{path}, line {sampled + 1}" in (text := stderr_text())
    assert "beyond rounding" in text.split("certificate:")[0]
    report = Verifier(TensorReader(run)).verify(read_outputs(path, "file"))
    wrong = {finding.request_id for finding in report.findings if not finding.is_explained}
    assert wrong == {f"file, line {sampled + 1}"}
    assert not report.passed


def test_the_command_exits_with_status_2(
    run: Path, made: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(_write(tmp_path, made))
    assert main.main(["verify", path, "--checkpoint", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_generations"] == 5
    assert all(one["is_explained"] for one in report["divergences"])
    records = json.loads(json.dumps(made))
    _no_exit(records[0])
    path = str(_write(tmp_path, records))
    assert main.main(["verify", path, "--checkpoint", str(run), "--json"]) == 2
    out, err = capsys.readouterr()
    wrong = [one for one in json.loads(out)["divergences"] if not one["is_explained"]]
    assert wrong[0] | {"expected": 0} == {
        "generation": f"{path}, line 1",
        "index": 3,
        "kind": "exit",
        "found": 3,
        "expected": 0,
        "margin": None,  # No rounding error explains an exit that does not exist.
        "is_explained": False,
    }
    assert err.splitlines()[-1].startswith("ee-llm: 1 tokens or exits differ from")


def test_records_of_another_model_fail(run: Path, made: list[Record], tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_model(other, CONFIG, random_tensors(CONFIG, seed=1, dtype=torch.float32))
    with pytest.raises(ValueError, match="Check that this checkpoint generated"):
        verify(VerifyOptions(_write(tmp_path, made), other))


def test_every_prefix_of_a_file_passes(run: Path, made: list[Record], tmp_path: Path) -> None:
    """The output of a running batch can be verified at any time."""
    for count in (1, 2):
        verify(VerifyOptions(_write(tmp_path, made[:count]), run))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [1, 2]}, "line 2: 'exits' has 20 entries for 2 tokens"),
        ({"prompt_token_ids": [300]}, "line 2: .*300"),
        ({"prompt_token_ids": [1] * 60}, "line 2: "),
        ({"token_ids": [9] * 19 + [264]}, "line 2: .* 264 .* model.vocab_size = 264"),
        ({"dtype": "int8"}, "line 2: 'dtype' is 'int8'"),
        ({"strategy": "best"}, "line 2: 'strategy' is 'best'"),
    ],
)
def test_the_error_names_a_malformed_record(
    run: Path, made: list[Record], tmp_path: Path, changes: Record, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        verify(VerifyOptions(_write(tmp_path, [made[0], made[1] | changes]), run))


def test_an_empty_or_missing_file_fails(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="records.jsonl contains no generation"):
        verify(VerifyOptions(_write(tmp_path, []), run))
    with pytest.raises(ValueError, match="none can.*read"):
        verify(VerifyOptions(tmp_path / "none", run))


def test_file_names_are_not_parsed_as_markup(run: Path, made: list[Record], tmp_path: Path) -> None:
    records = json.loads(json.dumps(made[:1]))
    _no_exit(records[0])
    path = tmp_path / "[" / "].jsonl"  # Closes a tag that was not opened.
    path.parent.mkdir()
    shutil.copy(_write(tmp_path, records), path)
    with pytest.raises(ValueError, match="tokens or exits differ"):
        verify(VerifyOptions(path, run))
