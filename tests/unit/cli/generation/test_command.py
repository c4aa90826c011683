"""Test `ee-llm generate` in one process, from a checkpoint to its output and files."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from ee_llm import distributed
from ee_llm.architecture.reference import ReferenceModel
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import load_reference
from ee_llm.cli import generate as command_line
from ee_llm.cli import main
from ee_llm.cli.generation import command
from ee_llm.cli.generation.batch_file import append
from ee_llm.cli.generation.command import generate
from ee_llm.cli.generation.options import GenerateOptions
from ee_llm.inference.engine import Engine
from ee_llm.inference.text.records import from_record
from ee_llm.inference.verification.certificate import verify_trace
from ee_llm.inference.verification.reference_decoding import generate_reference
from ee_llm.inference.verification.verify import Verifier
from tests.unit.inference.models import random_tensors, save_model, tiny_config

pytestmark = pytest.mark.thorough

# More rows than the byte tokenizer's 257 tokens, as after padding for tensor parallelism.
CONFIG = tiny_config("gpt", vocab_size=264, max_seq_length=48)
Record = dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    save_model(output, CONFIG, random_tensors(CONFIG, dtype=torch.float32))
    return output


@pytest.fixture(scope="module")
def model(run: Path) -> ReferenceModel:
    return load_reference(TensorReader(run), torch.float64)


def test_json_output_is_one_object_that_passes_the_certificate(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = GenerateOptions(
        run,
        "a prompt",
        thresholds=(0.3, "off"),
        temperature=0.8,
        top_k=250,
        top_p=0.999,
        min_p=0.01,
        repetition_penalty=1.2,
        seed=3,
        dtype="float64",
        json=True,
    )
    generate(options)
    record = json.loads(capsys.readouterr().out)
    assert record["prompt_token_ids"] == list(b"a prompt")
    assert len(record["token_ids"]) == 48 + 1 - 8  # to the end of the context
    assert record["finish_reason"] == "context"
    assert record["policy"]["thresholds"] == {"1": 0.3, "2": None}
    assert set(record["exits"]) == {1, 4}
    assert any(token > 256 for token in record["token_ids"]), "the test needs an id without text"
    assert record["sampling_params"] == {
        "n": 1,
        "temperature": 0.8,
        "top_k": 250,
        "top_p": 0.999,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "seed": 3,
        "max_tokens": 64,
        "min_tokens": 0,
        "stop": [],
        "stop_token_ids": [],
        "ignore_eos": False,
        "logprobs": None,
    }
    made, dtype = from_record(record, "standard output")
    assert dtype == "float64"
    assert verify_trace(load_reference(TensorReader(run), torch.float64), made) == []


def test_output_has_text_legend_and_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(GenerateOptions(run, "a prompt", max_tokens=5))
    plain = capsys.readouterr().out
    assert plain.startswith("a prompt")
    assert "final exit" in plain
    assert "of 4 layers, 5 tokens" in plain
    assert "max_probability" not in plain
    generate(GenerateOptions(run, "a prompt", max_tokens=5, show_confidence=True))
    assert "max_probability" in capsys.readouterr().out


def test_generation_stops_at_the_end_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors(CONFIG, dtype=torch.float32)
    tensors["exits.4.norm.bias"] = 50 * tensors["output.weight"][256]
    save_model(tmp_path, CONFIG, tensors)
    generate(GenerateOptions(tmp_path, "a prompt", strategy="full", json=True))
    record = json.loads(capsys.readouterr().out)
    assert record["token_ids"] == [256]
    assert record["text"] == ""
    assert record["finish_reason"] == "eos"


@pytest.mark.parametrize("strategy", ["exact", "full", "self-speculative", "propagate"])
def test_generated_tokens_equal_the_reference(
    run: Path, model: ReferenceModel, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0.7, "seed": 3}
    if strategy != "full":
        options["thresholds"] = (0.3,)
    generate(
        GenerateOptions(run, "a prompt", strategy=strategy, dtype="float64", json=True, **options)
    )
    made, _ = from_record(json.loads(capsys.readouterr().out), "standard output")
    assert made.sampling_params.max_tokens == 20
    assert made.eos_token_ids == (256,)
    wanted = generate_reference(
        model, made.prompt_token_ids, made.policy, made.sampling_params, made.strategy, (256,)
    )
    assert (made.token_ids, made.exits) == (wanted.token_ids, wanted.exits)
    assert (made.num_drafted > 0) == (strategy == "self-speculative")


def test_the_default_precision_depends_on_the_device(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for fast in ("float32", "bfloat16"):
        monkeypatch.setattr(
            distributed.devices, "fast_dtype", lambda fast=fast: distributed.DTYPES[fast]
        )
        generate(GenerateOptions(run, "a prompt", max_tokens=1, json=True))
        assert json.loads(capsys.readouterr().out)["dtype"] == fast
    generate(GenerateOptions(run, "a prompt", max_tokens=1, json=True, dtype="float32"))
    assert json.loads(capsys.readouterr().out)["dtype"] == "float32"


def test_text_ends_before_a_stop_string(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This holds for --json and the terminal. The record has all tokens, for verification."""
    options: Record = {"max_tokens": 30, "dtype": "float64", "temperature": 1.0, "seed": 1}
    generate(GenerateOptions(run, "a prompt", json=True, **options))
    whole = json.loads(capsys.readouterr().out)
    text = whole["text"]
    places = [
        i for i in range(8, 20) if text[i : i + 2].isascii() and text[i : i + 2].isprintable()
    ]
    stop = text[places[0] : places[0] + 2]
    stops = ("none of these", stop)
    generate(GenerateOptions(run, "a prompt", json=True, verify=True, stop=stops, **options))
    cut = json.loads(capsys.readouterr().out)
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == text[: text.index(stop)]
    assert cut["token_ids"] == whole["token_ids"][: len(cut["token_ids"])]
    assert len(cut["token_ids"]) < len(whole["token_ids"])
    assert "".join(whole["pieces"]) == whole["text"]
    assert "".join(cut["pieces"]) == cut["text"]
    assert len(cut["pieces"]) == len(cut["token_ids"])
    generate(GenerateOptions(run, "a prompt", stop=stops, **options))
    shown = capsys.readouterr().out.split("───")[0]
    assert stop not in shown.removeprefix("a prompt")


def test_verify_passes_and_fails(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = GenerateOptions(run, "a prompt", max_tokens=5, verify=True)
    generate(options)
    assert "certificate: 1 generations, 5 tokens, 0 divergences" in capsys.readouterr().err
    save_model(tmp_path, CONFIG, random_tensors(CONFIG, seed=1, dtype=torch.float32))
    other = Verifier(TensorReader(tmp_path))
    monkeypatch.setattr(command, "Verifier", lambda *_: other)
    with pytest.raises(ValueError, match="tokens or exits differ"):
        generate(options)
    assert "beyond rounding" in capsys.readouterr().err


LINES = [
    {"prompt": f"prompt {number}", "strategy": strategy, "max_tokens": 6 + 3 * number}
    for number, strategy in enumerate(
        ("exact", "full", "self-speculative", "propagate", "exact", "exact")
    )
]
LINES[0] |= {"id": "first", "stop": "q"}
LINES[4] |= {"thresholds": ["off", 0.2], "temperature": 0.8, "seed": 11}


def _batch(run: Path, folder: Path, lines: list[Record] = LINES, **more: Any) -> GenerateOptions:
    file = folder / "batch.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given: Record = {"thresholds": (0.3,), "dtype": "float64", "max_num_seqs": 3, "deferral": "off"}
    given |= {"batch_file": file, "output": folder / "out.jsonl"}
    return GenerateOptions(run, **(given | more))


def _written(options: GenerateOptions) -> dict[str, Record]:
    assert options.output
    found = [json.loads(line) for line in options.output.read_text().splitlines()]
    assert len({record["id"] for record in found}) == len(found)
    return {record["id"]: record for record in found}


def _assert_equal(found: dict[str, Record], expected: dict[str, Record]) -> None:
    """Assert that records are equal up to rounding, which depends on the rest of the batch."""
    assert found.keys() == expected.keys()
    for id, record in expected.items():
        for name, value in record.items():
            if name in ("confidences", "logprobs"):
                value = pytest.approx(value, abs=1e-9)
            if name not in ("num_drafted", "num_accepted"):
                assert found[id][name] == value, (id, name)


def test_a_batch_equals_its_prompts_one_by_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = _batch(run, tmp_path, verify=True)
    generate(options)
    out, err = capsys.readouterr()
    assert out == ""
    assert "6 prompts, 0 of them from an earlier run" in err
    assert "certificate: 6 generations" in err
    found = _written(options)
    assert list(found) != sorted(found), "the test needs a batch that does not finish in order"
    singles = {}
    for number, line in enumerate(LINES, start=1):
        own = {key: value for key, value in line.items() if key not in ("id", "prompt")}
        if line["strategy"] != "full":
            own["thresholds"] = tuple(own.get("thresholds", (0.3,)))
        own["stop"] = (own["stop"],) if "stop" in own else ()
        one = GenerateOptions(run, line["prompt"], dtype="float64", json=True, **own)
        generate(one)
        record = json.loads(capsys.readouterr().out)
        del record["pieces"], record["speed"]
        singles[line.get("id", str(number))] = record
    for record in found.values():
        del record["id"]
    _assert_equal(found, singles)


def test_a_batch_cannot_be_resumed_with_another_model(run: Path, tmp_path: Path) -> None:
    """The other model has the same shape and the same directory name."""
    config = TensorReader(run).config()
    other = tmp_path / "other"
    save_model(other, config, random_tensors(config, seed=9, dtype=torch.float32))
    mine, yours = TensorReader(run), TensorReader(other)
    assert (mine.path.name, mine.config()) == (yours.path.name, yours.config())
    options = _batch(run, tmp_path, LINES[:2])
    generate(options)
    before = options.output.read_bytes()
    with pytest.raises(ValueError, match="was generated with another 'model'"):
        generate(replace(options, checkpoint=other))
    assert options.output.read_bytes() == before


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full"])
def test_the_error_names_an_output_that_is_not_a_file(run: Path, tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match=f"--output {path} is not a regular file"):
        generate(_batch(run, tmp_path, output=Path(path)))


@pytest.mark.parametrize("num_kept", [0, 2, 5])
def test_a_killed_batch_can_be_resumed(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    num_kept: int,
) -> None:
    """Only missing and truncated records are generated, and the result is as if in one run."""
    (tmp_path / "a").mkdir()
    generate(in_one_run := _batch(run, tmp_path / "a"))
    options = _batch(run, tmp_path)

    def truncate(file: Any, record: Record) -> None:
        if (file.tell() and len(_written(options)) == num_kept) or num_kept == 0:
            file.write(json.dumps(record).encode()[:50])
            raise KeyboardInterrupt
        append(file, record)

    monkeypatch.setattr(command, "append", truncate)
    with pytest.raises(KeyboardInterrupt):
        generate(options)
    monkeypatch.undo()
    assert options.output
    assert not options.output.read_bytes().endswith(b"\n")
    before = options.output.read_bytes().rpartition(b"\n")
    begun: list[str] = []
    monkeypatch.setattr(
        Engine,
        "_step_output",
        lambda self, one, output=Engine._step_output: (
            begun.append(one.request.id) or output(self, one)
        ),
    )
    capsys.readouterr()
    generate(options)
    assert options.output.read_bytes().startswith(before[0] + before[1])
    done = {json.loads(line)["id"] for line in before[0].splitlines()}
    assert len(done) == num_kept
    made = {id for id in begun if not id.endswith(" again")}  # the others measure the speed
    assert made == _written(options).keys() - done
    assert f"6 prompts, {num_kept} of them from an earlier run" in capsys.readouterr().err
    _assert_equal(_written(options), _written(in_one_run))
    once = options.output.read_bytes()
    generate(options)
    assert options.output.read_bytes() == once
    assert "6 prompts, 6 of them from an earlier run; 0 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x" * 49}, "line 2: .* 49 tokens, more than model.max_seq_length = 48"),
        ({"prompt": "a", "thresholds": 0}, r"line 2: thresholds: 0.0 is not in \(0, 1\]"),
        ({"prompt": "a", "thresholds": [0.5] * 3}, "line 2: thresholds: 3 given for 2 exits"),
        ({"prompt": "a", "thresholds": []}, "line 2: thresholds: 0 given for 2 exits"),
        ({"prompt": "a", "temperature": -1}, "line 2: temperature = -1.0"),
        ({"prompt": "a", "seed": 2**64}, "line 2: seed = 18446744073709551616"),
        ({"prompt": "a", "stop": ""}, r"line 2: stop = \('',\)"),
        (
            {"prompt": "a", "strategy": "self-speculative", "draft_exit": 0},
            "line 2: draft_exit = 0 ",
        ),
        (
            {"prompt": "a", "strategy": "self-speculative", "draft_length": 64},
            "line 2: draft_length = 64 .* max_pending = 64",
        ),
        ({"prompt": "a" * 40, "max_tokens": 0}, "line 2: max_tokens = 0 "),
        ({"prompt": "a", "colour": 1}, "line 2: 'colour' is unknown"),
    ],
)
def test_an_invalid_line_gets_an_error_record_and_other_lines_are_generated(
    run: Path, tmp_path: Path, line: Record, message: str
) -> None:
    """One invalid prompt among ten thousand must not discard the others."""
    options = _batch(run, tmp_path, [{"prompt": "fine"}, line, {"prompt": "fine"}], verify=True)
    with pytest.raises(RuntimeError, match=rf"1 of 3 prompts failed; .*batch.jsonl, {message}"):
        generate(options)
    found = _written(options)
    assert list(found)[-1] == "2"
    assert found["2"].keys() == {"id", "error"}
    assert re.search(f"batch.jsonl, {message}", found["2"]["error"]["message"])
    assert len(found["1"]["token_ids"]) == len(found["3"]["token_ids"]) > 0


def test_a_prompt_with_non_finite_logits_does_not_end_its_batch(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors(CONFIG, dtype=torch.float32)
    tensors["embedding.word.weight"][ord("X")] = float("nan")
    save_model(damaged := tmp_path / "damaged", CONFIG, tensors)
    options = _batch(damaged, tmp_path, [{"prompt": "a"}, {"prompt": "aX"}, {"prompt": "b"}])
    with pytest.raises(
        RuntimeError, match=r"1 of 3 prompts failed; .*line 2: an exit computed logits"
    ):
        generate(options)
    found = _written(options)
    assert "line 2: an exit computed logits that are not finite" in found["2"]["error"]["message"]
    generate(clean := _batch(run, tmp_path, [{"prompt": "a"}], output=tmp_path / "clean"))
    assert found["1"]["token_ids"] == _written(clean)["1"]["token_ids"]
    arguments = ["generate", "--checkpoint", str(damaged), "--prompt", "aX", "--json"]
    assert main.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("ee-llm: --prompt: an exit computed logits")


def test_failed_lines_are_retried_after_they_are_corrected(run: Path, tmp_path: Path) -> None:
    """Existing generations do not change, and a file may contain only errors."""
    bad = [{"prompt": "", "id": "x"}, {"promt": "b", "id": "y"}]
    options = _batch(run, tmp_path, bad)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="2 of 2 prompts failed"):
            generate(options)
    assert list(_written(options)) == ["x", "y"]
    options = _batch(run, tmp_path, [{"prompt": "a", "id": "x"}, bad[1]])
    with pytest.raises(RuntimeError, match=r"1 of 2 prompts failed; .* 'promt' is unknown"):
        generate(options)
    first = options.output.read_bytes().splitlines(keepends=True)
    options = _batch(run, tmp_path, [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"}])
    generate(options)
    found = _written(options)
    assert options.output.read_bytes().startswith(first[0])
    assert {id: len(record["token_ids"]) > 0 for id, record in found.items()} == {
        "x": True,
        "y": True,
    }


def test_a_batch_with_errors_exits_with_status_1_and_can_be_verified(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = _batch(run, tmp_path, [{"prompt": ""}, {"prompt": "a"}])
    batch = ["--batch-file", str(options.batch_file), "--output", str(options.output)]
    assert main.main(["generate", "--checkpoint", str(run), *batch]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("ee-llm: 1 of 2 prompts failed; ")
    assert main.main(["verify", "--checkpoint", str(run), str(options.output)]) == 0
    assert "certificate: 1 generations" in capsys.readouterr().err


def test_a_batch_larger_than_the_cache_waits_or_is_refused(run: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "a" * 20, "max_tokens": 20} for _ in range(6)]
    generate(options := _batch(run, tmp_path, lines, cache_tokens=64, max_num_seqs=4))
    assert len(_written(options)) == 6
    lines = [{"prompt": "a", "max_tokens": 8}, {"prompt": "a" * 40, "max_tokens": 8}]
    (tmp_path / "b").mkdir()
    with pytest.raises(RuntimeError, match="line 2: .*'2' may grow to 47 positions"):
        generate(_batch(run, tmp_path / "b", lines, cache_tokens=1, max_num_seqs=1))


def test_an_output_with_other_content_is_refused_and_unchanged(run: Path, tmp_path: Path) -> None:
    """A plausible mistake is to give the batch file itself."""
    options = _batch(run, tmp_path)
    content = options.batch_file.read_bytes()
    with pytest.raises(ValueError, match="line 1: .* is missing"):
        generate(_batch(run, tmp_path, output=options.batch_file))
    assert options.batch_file.read_bytes() == content
    generate(options)
    with pytest.raises(ValueError, match="id .* another 'sampling_params.max_tokens'"):
        generate(_batch(run, tmp_path, [line | {"max_tokens": 2} for line in LINES]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "x" * 49}, "49 tokens, more than model.max_seq_length = 48"),
        ({"prompt_file": Path("x")}, "--prompt and --prompt-file are both given"),
        ({"batch_file": Path("x")}, "--prompt and --batch-file are both given"),
        ({"prompt": None, "batch_file": Path("x")}, "--batch-file and --output need each other"),
        ({"output": Path("x")}, "--batch-file and --output need each other"),
        (
            {"prompt": None, "batch_file": Path("x"), "output": Path("y"), "json": True},
            "--json and --show-confidence apply to one prompt",
        ),
        (
            {"prompt": None, "batch_file": Path("/no/such"), "output": Path("y")},
            "--batch-file /no/such ",
        ),
        ({"thresholds": (0.0,)}, r"thresholds: 0.0 is not in \(0, 1\]"),
        ({"thresholds": (float("nan"),)}, r"thresholds: nan is not in \(0, 1\]"),
        ({"thresholds": (0.5,) * 3}, r"thresholds: 3 given for 2 exits at boundaries \[1, 2\]"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"min_p": 2.0}, r"min_p = 2.0 is not in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"max_tokens": 0}, "max_tokens = 0 must be .* at least 1"),
        ({"strategy": "self-speculative", "draft_exit": 0}, "draft_exit = 0 "),
        ({"strategy": "self-speculative", "draft_exit": 4}, "draft_exit = 4 "),
        (
            {"strategy": "self-speculative", "draft_length": 64},
            "draft_length = 64 .* max_pending = 64",
        ),
        ({"stop": ("",)}, r"stop = \('',\)"),
        ({"max_num_seqs": 0}, "--max-num-seqs 0 is out of range. Use 1 to"),
        ({"cache_tokens": 0}, "--cache-tokens 0 is out of range. Use 1 to"),
        ({"tensor": 0}, "--tensor 0 is out of range. Use 1 to"),
        ({"pipeline": -1}, "--pipeline -1 is out of range. Use 1 to"),
        ({"pipeline": 5}, r"pipeline = 5 is more than num_layers = 4\. Use 4 or less\."),
        ({"tensor": 3}, r"tensor = 3 does not divide num_kv_heads = 2\. Use tensor = 1 or 2\."),
        ({"tensor": 10**9}, "--tensor 1000000000 is out of range. Use 1 to 65,536"),
        ({"timeout_s": float("nan")}, "--timeout-s nan is out of range. Use 1 to 1,000,000"),
        ({"timeout_s": 0.0}, "--timeout-s 0.0 is out of range. Use 1 to"),
        ({"timeout_s": 1e10}, "--timeout-s 10000000000.0 is out of range. Use 1 to 1,000,000"),
        ({"timeout_s": float("inf")}, "--timeout-s inf is out of range"),
        ({"max_num_seqs": 10**30}, "--max-num-seqs 10{30} is out of range. Use 1 to 16,384"),
        ({"cache_tokens": 2**64}, "--cache-tokens 18446744073709551616 is out of range. Use 1 to"),
        ({"seed": 2**64 - 1}, r"seed = 18446744073709551615 .* 0 to 2\*\*63 - 1"),
        ({"seed": -1}, "seed = -1 "),
        ({"top_k": -2}, "top_k = -2 must be"),
        ({"max_tokens": -(10**30)}, "max_tokens = -10{30} must be .* at least 1"),
        (
            {"strategy": "self-speculative", "draft_length": 10**30},
            "draft_length = 10{30} .* max_pending = 64",
        ),
        (
            {"strategy": "self-speculative", "draft_exit": 10**30},
            "draft_exit = 10{30} ",
        ),
        ({"checkpoint": Path("/no/such/run")}, "/no/such/run does not exist"),
        ({"policy": Path("p.json"), "thresholds": (0.5,)}, "--policy p.json and --thresholds"),
    ],
)
def test_errors_name_invalid_input(run: Path, change: Record, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(GenerateOptions(**{"checkpoint": run, "prompt": "a prompt"} | change))


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [("2", "do not fit WORLD_SIZE = 2 in"), ("many", "WORLD_SIZE = 'many' in the environment is")],
)
def test_more_ranks_than_the_layout_has_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, world_size: str, expected: str
) -> None:
    """Otherwise, two processes would both print everything."""
    names = {"WORLD_SIZE": world_size, "RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=expected):
        generate(GenerateOptions(run, "a prompt"))


def test_an_impossible_layout_is_refused_before_ranks_start(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(*_: object) -> None:
        raise AssertionError("ranks are started")

    monkeypatch.setattr(command_line, "launch", launch)
    arguments = ["generate", "--checkpoint", str(run), "--prompt", "a", "--tensor", "4"]
    assert main.main(arguments) == 2
    assert capsys.readouterr().err.startswith(
        "ee-llm: tensor = 4 does not divide num_kv_heads = 2. Use"
    )
    with pytest.raises(AssertionError, match="ranks are started"):
        main.main([*arguments[:-1], "2"])


def test_options_on_the_command_line() -> None:
    arguments = "--checkpoint runs/x --prompt hi --thresholds 0.8 off --measure margin --json"
    options = tyro.cli(GenerateOptions, args=[*arguments.split(), "--stop", "\n\n", "def "])
    assert options.thresholds == (0.8, "off")
    assert options.checkpoint == Path("runs/x")
    assert options.stop == ("\n\n", "def ")
    assert options.json
    assert tyro.cli(GenerateOptions, args=["--checkpoint", "x"]) == GenerateOptions(Path("x"))
