"""`ee-llm generate` from a checkpoint on disk to what it prints."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
import tyro

from ee_llm.checkpoint.read import TensorReader
from ee_llm.inference.certificate import verify_trace
from ee_llm.inference.command import GenerateOptions, generate
from ee_llm.inference.generator import Generation
from ee_llm.inference.policy import make_policy
from ee_llm.inference.reference import load_reference
from ee_llm.inference.sampling import Sampling
from tests.unit.inference.models import random_tensors, save_model, tiny_config

# More rows than the byte tokenizer's 257 tokens, as padding to the tensor-parallel size makes.
CONFIG = tiny_config("gpt", vocab_size=264, max_seq_length=48)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    save_model(output, CONFIG, random_tensors(CONFIG, dtype=torch.float32))
    return output


def _stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_json_is_all_that_is_printed_and_passes_the_certificate(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = GenerateOptions(
        run,
        "a prompt",
        thresholds=(0.3, "off"),
        temperature=0.8,
        min_p=0.01,
        repetition_penalty=1.2,
        seed=3,
        dtype="float64",
        json=True,
    )
    generate(options)
    record = json.loads(capsys.readouterr().out)
    assert record["prompt_tokens"] == list(b"a prompt")
    assert len(record["tokens"]) == 48 + 1 - 8  # to the end of the context
    assert record["finish_reason"] == "context"
    assert record["policy"]["thresholds"] == {"1": 0.3, "2": None}
    assert set(record["exits"]) == {1, 4}
    assert any(token > 256 for token in record["tokens"]), "the test needs an id without text"
    assert record["sampling"]["min_p"] == 0.01
    assert record["sampling"]["repetition_penalty"] == 1.2
    made = Generation(
        prompt=tuple(record["prompt_tokens"]),
        tokens=tuple(record["tokens"]),
        exits=tuple(record["exits"]),
        confidences=tuple(record["confidences"]),
        logprobs=tuple(record["logprobs"]),
        finish_reason=record["finish_reason"],
        policy=make_policy((1, 2), list(record["policy"]["thresholds"].values())),
        sampling=Sampling(**record["sampling"]),
        strategy=record["strategy"],
    )
    assert verify_trace(load_reference(TensorReader(run), torch.float64), made) == []


def test_people_see_text_legend_and_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(GenerateOptions(run, "a prompt", max_new_tokens=5))
    plain = capsys.readouterr().out
    assert plain.startswith("a prompt")
    assert "final exit" in plain
    assert "of 4 layers, 5 tokens" in plain
    assert "max_probability" not in plain
    generate(GenerateOptions(run, "a prompt", max_new_tokens=5, show_confidence=True))
    assert "max_probability" in capsys.readouterr().out


def test_prompt_comes_from_option_file_or_standard_input(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("é\n".encode())
    records = []
    for source in ({"prompt": "é\n"}, {"prompt_file": file}, {}, {"prompt_file": Path("-")}):
        _stdin(monkeypatch, "é\n".encode())
        generate(GenerateOptions(run, **source, max_new_tokens=4, json=True))
        records.append(json.loads(capsys.readouterr().out))
    assert records[0]["prompt_tokens"] == list("é\n".encode())
    assert all(record == records[0] for record in records)


def test_generation_stops_at_the_end_of_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors(CONFIG, dtype=torch.float32)
    tensors["exits.4.norm.bias"] = 50 * tensors["output.weight"][256]
    save_model(tmp_path, CONFIG, tensors)
    generate(GenerateOptions(tmp_path, "a prompt", strategy="full", json=True))
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == [256]
    assert record["text"] == ""
    assert record["finish_reason"] == "eod"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "--prompt is empty"),
        ({"prompt": "x" * 49}, "49 tokens are more than model.max_seq_length = 48"),
        ({"prompt": None}, "standard input is not UTF-8 at byte 1"),
        ({"prompt": "\udcff"}, "--prompt is not UTF-8"),
        ({"prompt_file": Path("x")}, "--prompt and --prompt-file are both given"),
        ({"prompt": None, "prompt_file": Path("/no/such")}, "--prompt-file /no/such can not be"),
        ({"thresholds": (0.0,)}, r"thresholds: 0.0 is not in \(0, 1\]"),
        ({"thresholds": (0.5,) * 3}, r"thresholds: 3 given for 2 exits at boundaries \[1, 2\]"),
        ({"temperature": -1.0}, "temperature -1.0 must be"),
        ({"min_p": 2.0}, r"min_p 2.0 is not in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 must be"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        ({"checkpoint": Path("/no/such/run")}, "/no/such/run does not exist"),
    ],
)
def test_bad_input_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    _stdin(monkeypatch, b"a\xff")
    with pytest.raises(ValueError, match=message):
        generate(GenerateOptions(**{"checkpoint": run, "prompt": "a prompt"} | change))


def test_no_prompt_at_a_terminal_does_not_wait_for_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stdin(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(ValueError, match="no prompt; give --prompt"):
        generate(GenerateOptions(run))


def test_options_on_the_command_line() -> None:
    arguments = "--checkpoint runs/x --prompt hi --thresholds 0.8 off --measure margin --json"
    options = tyro.cli(GenerateOptions, args=arguments.split())
    assert options.thresholds == (0.8, "off")
    assert options.checkpoint == Path("runs/x")
    assert options.json
    assert tyro.cli(GenerateOptions, args=["--checkpoint", "x"]).thresholds == (0.8,)
