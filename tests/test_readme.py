"""Run the commands of the README and the docs as a new user would, with smaller numbers."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.unit.conversion.huggingface.folders import make_folder

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--training.steps",
    "4",
    "--training.eval_interval",
    "2",
    "--training.eval_steps",
    "1",
    "--training.global_batch_size",
    "4",
    "--training.micro_batch_size",
    "2",
    "--data.seq_length",
    "32",
    "--optimizer.warmup_steps",
    "2",
    "--logging.interval",
    "1",
    "--model.hidden_size",
    "48",
]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(page: str = "README.md") -> list[list[str]]:
    return [shlex.split(line) for block in blocks(page, "bash") for line in block.splitlines()]


def run(arguments: list[str], folder: Path) -> str:
    # Under test, the environment is made already: scripts use it as it is.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"EE_LLM_SYSTEM": "1", "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_two_commands_come_first():
    assert [command[0] for command in commands()] == [
        "./scripts/quickstart.sh",
        "./scripts/test.sh",
        "source",
        "./examples/llama.sh",  # tested by tests/unit/conversion/test_example_llama.py
    ]


def test_quickstart(tmp_path):
    output = tmp_path / "run"
    text = run([*commands()[0], "--output", str(output), *SMALL], ROOT)
    assert (output / "losses.png").stat().st_size > 10_000
    assert re.search(r"unigram entropy", text)
    for name in ("exit 2", "exit 4", "final exit"):
        assert re.search(rf"^{name}\s+\d\s+\d+\.\d{{3}}", text, re.MULTILINE), text
    assert re.search(r"mean depth \d\.\d\d of 8 layers", text)
    # The next commands that it names work.
    for line in re.findall(r"^  ee-llm (generate .*)$", text, re.MULTILINE):
        run(["ee-llm", *shlex.split(line), "--max-tokens", "2"], tmp_path)


def test_test_script_checks_and_collects():
    text = run([*commands()[1], "--collect-only", "-q", "tests/test_readme.py"], ROOT)
    assert "All checks passed" in text
    assert "test_quickstart" in text


def test_first_model_tutorial_and_generate_page(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, path in enumerate(sorted((ROOT / "ee_llm").rglob("*.py"))):
        (texts / f"{number}.txt").write_text(path.read_text())
    source, *tutorial = commands("docs/tutorials/first-model.md")
    assert source == ["source", ".venv/bin/activate"]
    assert [command[0] for command in tutorial] == ["ee-llm"] * 4
    for command in tutorial:
        small = SMALL if command[1] == "train" else []
        if command[1] == "generate":
            small = ["--max-tokens", "4"]
        command = ["1024" if word == "4096" else word for word in command]
        text = run([*command, *small], tmp_path)
    assert "mean depth" in text
    (tmp_path / "prompts.jsonl").write_text(*blocks("docs/how-to/generate.md", "json"))
    assert len(commands("docs/how-to/generate.md")) == 6
    for command in commands("docs/how-to/generate.md"):
        small = ["--max-tokens", "4"] if command[1] == "generate" else []
        text = run([*command, *small], tmp_path)
    assert "certificate: 3 generations" in text
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {record["id"] for record in written} == {"first", "2", "3"}


def test_ten_lines_of_python(tmp_path):
    """The README's Python block runs on a tiny Llama, with two steps of tuning."""
    folder = make_folder(tmp_path / "models" / "llama", num_hidden_layers=18)
    texts = "\n".join(json.dumps({"text": f"def main({i}): pass"}) for i in range(200))
    (tmp_path / "texts.jsonl").write_text(texts)
    prepare = ["ee-llm", "data", "prepare", "--inputs", "texts.jsonl", "--output", "data/corpus"]
    run([*prepare, "--tokenizer", str(folder / "tokenizer.json")], tmp_path)
    (code,) = blocks("README.md", "python")
    small = 'training={"steps": 2, "micro_batch_size": 2, "global_batch_size": 2}'
    assert code.count('data=["data/corpus"])') == 1
    code = code.replace('data=["data/corpus"])', f'data=["data/corpus"], {small})')
    text = run([sys.executable, "-c", f"{code}\nassert llm.verify(outputs).passed"], tmp_path)
    assert re.search(r", (8|16|18)\)", text)
