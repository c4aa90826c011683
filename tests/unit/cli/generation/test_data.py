"""Test `ee-llm data generate` from a checkpoint to prepared data."""

import io
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ee_llm
from ee_llm.checkpoint.read import TensorReader
from ee_llm.cli.generation.data import generate_data
from ee_llm.cli.generation.options import DataGenerateOptions
from ee_llm.cli.main import main
from ee_llm.data.indexed import IndexedTokens
from ee_llm.data.prepare import check_tokenizer
from ee_llm.data.tokenization.tokenizer import load_tokenizer
from ee_llm.errors import RunError, UserError
from ee_llm.inference.corpus.sampling import sample_documents
from ee_llm.inference.llm import LLM
from ee_llm.inference.text.prompt_encoder import EncodedPrompt
from tests.unit.inference.models import random_tensors, save_model, tiny_config

pytestmark = pytest.mark.thorough

# More rows than the byte tokenizer's 257 tokens, as after padding for tensor parallelism.
CONFIG = tiny_config("gpt", vocab_size=264, max_seq_length=48)
EOS = 256


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    tensors = random_tensors(CONFIG, dtype=torch.float32)
    # Make the end token likely enough that some documents end with it.
    tensors["exits.4.norm.bias"] += tensors["output.weight"][EOS]
    save_model(output, CONFIG, tensors)
    return output


def options(run: Path, output: Path, **given: Any) -> DataGenerateOptions:
    defaults: dict[str, Any] = {"num_tokens": 200, "max_tokens": 20, "dtype": "float64"}
    return DataGenerateOptions(run, output=output, **(defaults | given))


def documents(prefix: Path) -> list[list[int]]:
    found = IndexedTokens(prefix)
    return [found.tokens[a:b].tolist() for a, b in pairwise(found.bounds.tolist())]


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".meta.json")]


def sampled(
    run: Path, prompts: Sequence[Sequence[int]], count: int, **params: Any
) -> list[list[int]]:
    """Return the documents that `LLM.generate` gives for the same prompts and seeds."""
    params = {"temperature": 1.0, "max_tokens": 20} | params
    sampling = ee_llm.SamplingParams(**params, n=count).samples()
    with LLM(run, dtype="float64") as llm:
        given = [list(prompts[i % len(prompts)]) for i in range(count)]
        outputs = llm.generate(given, list(sampling), strategy="full")
    return [list(output.token_ids) for output in outputs]


def test_documents_are_those_of_the_full_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each document is sampled after an end token, with its own seed, and ends with one."""
    prefix = tmp_path / "new" / "own"
    generate_data(options(run, prefix, seed=3, top_k=200, json=True))
    report = json.loads(capsys.readouterr().out)
    found = documents(prefix)
    expected = sampled(run, [[EOS]], len(found), seed=3, top_k=200)
    num_ended = sum(tokens[-1] == EOS for tokens in expected)
    assert 0 < num_ended < len(found), "the test needs documents of both kinds"
    assert found == [tokens if tokens[-1] == EOS else [*tokens, EOS] for tokens in expected]
    lengths = [len(tokens) for tokens in expected]
    assert sum(lengths[:-1]) < 200 <= sum(lengths)
    assert report["num_documents"] == len(found)
    assert report["num_generated"] == sum(lengths)
    assert report["num_tokens"] == sum(map(len, found))
    assert report["num_ended"] == num_ended
    assert report["ended_share"] == num_ended / len(found)
    assert report["tokens_per_second"] > 0


def test_prefix_has_a_description(run: Path, tmp_path: Path) -> None:
    generate_data(options(run, tmp_path / "own", seed=7, num_tokens=30))
    check_tokenizer(tmp_path / "own", load_tokenizer("bytes"))
    description = json.loads((tmp_path / "own.meta.json").read_bytes())
    assert description["generated_by"]["fingerprint"] == TensorReader(run).fingerprint()
    assert description["generated_by"]["sampling_params"]["seed"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"own{suffix}" for suffix in (".bin", ".idx", ".meta.json")
    ]


def test_output_depends_on_the_seed_but_not_on_the_batch_size(run: Path, tmp_path: Path) -> None:
    for name, given in {
        "first": {},
        "one": {"max_num_seqs": 1},
        "many": {"max_num_seqs": 64, "cache_tokens": 48},
        "other": {"seed": 1},
    }.items():
        generate_data(options(run, tmp_path / name, num_tokens=100, **given))
    first = content(tmp_path / "first")
    assert content(tmp_path / "one") == first
    assert content(tmp_path / "many") == first
    assert content(tmp_path / "other")[0] != first[0]


def test_short_documents_are_not_preferred(run: Path) -> None:
    """With many sequences at a time, short documents end first, but none is skipped."""
    prompts = [EncodedPrompt("", (EOS,))]
    params = ee_llm.SamplingParams(temperature=1.0, max_tokens=40)
    with LLM(run, dtype="float64") as llm:
        found = [
            [
                document.request_id
                for document in sample_documents(
                    llm, prompts, params, num_tokens=100, max_num_seqs=count
                )
            ]
            for count in (1, 50)
        ]
        assert not llm.engine.has_work  # Documents that are not needed were aborted.
    assert found[0] == found[1] == [str(number) for number in range(len(found[0]))]


def test_documents_that_the_context_ends_are_expected_to_be_short(run: Path) -> None:
    """Whatever `max_tokens` is, each has 11 tokens at most, so ten are started at once."""
    prompts = [EncodedPrompt("", tuple(range(38)))]
    params = ee_llm.SamplingParams(temperature=1.0, max_tokens=1024)
    with LLM(run, dtype="float64") as llm:
        started: list[str] = []
        num_started: list[int] = []  # after each step
        add = llm.engine.add
        llm.engine.add = lambda request: started.append(request.id) or add(request)
        for _ in sample_documents(
            llm,
            prompts,
            params,
            num_tokens=100,
            max_num_seqs=50,
            on_step=lambda *_: num_started.append(len(started)),
        ):
            pass
    assert num_started[0] == 10


def test_text_prompts_are_continued_once(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("ab\r\n\ncde")
    given = {"prompts": tmp_path / "prompts.txt", "num_tokens": None}
    generate_data(options(run, tmp_path / "own", **given, temperature=0, jsonl=True))
    expected = sampled(run, [b"ab", b"cde"], 2, temperature=0)
    made = [[*prompt, *new] for prompt, new in zip((b"ab", b"cde"), expected, strict=True)]
    assert documents(tmp_path / "own") == [t if t[-1] == EOS else [*t, EOS] for t in made]
    lines = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    texts = [bytes(t for t in tokens if t < EOS).decode(errors="replace") for tokens in made]
    assert [line["text"] for line in lines] == texts
    assert {line["finish_reason"] for line in lines} <= {"eos", "length"}


def test_json_prompts_are_repeated_until_there_are_enough_tokens(run: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "ab", "id": "1"}, {"prompt_token_ids": [EOS, 99]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    generate_data(options(run, tmp_path / "own", prompts=tmp_path / "prompts.jsonl"))
    found = documents(tmp_path / "own")
    assert len(found) > 4
    expected = sampled(run, [b"ab", [EOS, 99]], len(found))
    # The end token of the second prompt is not stored: the document before ends with it.
    prompts = [b"ab", [99]] * len(found)
    for tokens, prompt, new in zip(found, prompts, expected, strict=False):
        assert tokens[: len(prompt) + len(new)] == [*prompt, *new]
    assert found[0] != found[2]


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ('\n{"prompt": "ab"}\n{"prompt_token_ids": [99]}\n', [b"ab", b"c"]),
        ('ab\n{"prompt": "c"}\n', [b"ab", b'{"prompt": "c"}']),
        ('{"ab": 1}\n', [b'{"ab": 1}']),
    ],
)
def test_first_line_of_standard_input_decides_what_lines_are(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    prompts: list[bytes],
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    generate_data(options(run, tmp_path / "own", prompts=Path("-"), num_tokens=None))
    found = documents(tmp_path / "own")
    for tokens, prompt in zip(found, prompts, strict=True):
        assert bytes(tokens[: len(prompt)]) == prompt


def test_training_reads_the_data(run: Path, tmp_path: Path) -> None:
    """It has exactly one end token per document."""
    generate_data(options(run, tmp_path / "own", num_tokens=60))
    found = IndexedTokens(tmp_path / "own")
    assert int(np.sum(found.tokens == EOS)) == found.num_documents
    result = ee_llm.evaluate(run, data=tmp_path / "own", seq_length=32, progress=False)
    assert result.num_tokens == found.num_tokens - 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_tokens": 0}, "--num-tokens 0 is out of range. Use 1 or more."),
        ({"num_tokens": None}, "--num-tokens is missing. Give it, or --prompts, or both."),
        ({"temperature": 0.0}, "--temperature 0 .* --num-tokens would repeat the same documents"),
        ({"top_k": 1}, "--top-k 1 always gives the same text, so --num-tokens would repeat"),
        ({"temperature": -1.0}, "temperature = -1.0 must be"),
        ({"max_tokens": 0}, "max_tokens = 0 must be"),
        ({"max_num_seqs": 0}, "--max-num-seqs 0 is out of range"),
        ({"tensor": 3}, "tensor = 3 does not divide"),
        ({"bos": "on"}, "has no beginning-of-sequence token"),
        ({"prompts": Path("absent.txt")}, "--prompts absent.txt cannot be read"),
    ],
)
def test_invalid_options(run: Path, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate_data(options(run, tmp_path / "own", **given))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "is empty. Give one prompt per line."),
        ("a.txt", f"ab\n{'c' * 49}\n", "line 2: The prompt has 49 tokens, more than"),
        ("a.jsonl", "ab", "line 1 is not valid JSON"),
        ("a.jsonl", '{"prompt": "a", "temperature": 2}', "line 1: 'temperature' is unknown"),
        ("a.jsonl", '{"prompt": "a", "messages": []}', "line 1: the line has prompt and messages"),
        ("a.jsonl", '{"prompt_token_ids": [1, "a"]}', 'line 1: "prompt_token_ids" is'),
        ("a.jsonl", '{"prompt_token_ids": [264]}', "line 1: Token id 264 in the prompt is outside"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "has no chat template"),
    ],
)
def test_invalid_prompts(run: Path, tmp_path: Path, name: str, text: str, message: str) -> None:
    """They are found before anything is generated or written."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        generate_data(options(run, tmp_path / "own", prompts=tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".meta.json", ".jsonl"])
def test_existing_outputs_are_not_replaced(run: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"own{suffix}"
    path.write_text("mine")
    with pytest.raises(UserError, match=f"own{suffix} already exists. Choose another --output"):
        generate_data(options(run, tmp_path / "own", jsonl=True))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(tmp_path / "absent"), "--output", str(tmp_path / "own")]
    assert main(["data", "generate", *arguments, "--num-tokens", "5"]) == 2
    assert "absent" in capsys.readouterr().err


def test_a_failure_leaves_no_files(run: Path, tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, dtype=torch.float32)
    tensors["output.weight"][:] = torch.inf
    save_model(tmp_path / "run", CONFIG, tensors)
    with pytest.raises(RunError, match="document 1 failed: "):
        generate_data(options(tmp_path / "run", tmp_path / "own", jsonl=True))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_interruption_leaves_no_files(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InterruptedLLM(LLM):
        def decode(self, token_ids: Sequence[int]) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr("ee_llm.cli.generation.execution.LLM", InterruptedLLM)
    with pytest.raises(KeyboardInterrupt):
        generate_data(options(run, tmp_path / "own", jsonl=True))
    assert list(tmp_path.iterdir()) == []


def test_summary(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(run), "--output", str(tmp_path / "own"), "--max-tokens", "9"]
    assert main(["data", "generate", *arguments, "--num-tokens", "50", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'own'}.bin and .idx: ")
    assert "tokens/s); the model ended" in out


def test_ranks_are_started_after_the_checks(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ee_llm.launch.local.launch", lambda *found: calls.append(found))
    calls: list[Any] = []
    words = ["--checkpoint", str(run), "--output", str(tmp_path / "own"), "--pipeline", "2"]
    assert main(["data", "generate", *words, "--num-tokens", "0"]) == 2
    assert calls == []
    words += ["--num-tokens", "9"]
    assert main(["data", "generate", *words]) == 0
    assert calls == [(2, ["data", "generate", *words])]
