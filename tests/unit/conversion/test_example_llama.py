"""examples/llama.sh, from a Hugging Face folder and back, with a tiny random model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ee_llm.checkpoint.read import TensorReader
from tests.unit.conversion.huggingface.folders import make_folder

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "examples" / "llama.sh"


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
    )


def test_a_llama_gets_exits_and_is_exported(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_folder(tmp_path / "llama", bos_token_id=7, eos_token_id=9)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text(f"The quick brown fox number {number}. " * 40)
    tune = ["--training.steps", 4, "--training.micro_batch_size", 2]
    tune += ["--training.global_batch_size", 4]
    failed = _run(folder, texts, tmp_path / "out", 1, 3, *tune, "--training.steps", "none")
    assert failed.returncode != 0
    assert (tmp_path / "out" / "data" / "corpus.idx").is_file()
    (tmp_path / "out" / "hf" / "of-an-earlier-run").mkdir(parents=True)
    done = _run(folder, texts, tmp_path / "out", 1, 3, *tune)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The " in done.stdout
    assert "certificate: 1 generation" in done.stderr
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf")
    source = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in source.state_dict().items():
        assert back.state_dict()[name].equal(weight), name
    config = TensorReader(tmp_path / "out" / "tuned").config()
    assert config.data.seq_length == 48  # the model's context
    # Training keeps the companion files.
    settings = json.loads((tmp_path / "out" / "hf" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (7, 9)
    files = {path.name for path in (tmp_path / "out" / "hf").iterdir()}
    assert files == {path.name for path in folder.iterdir()}
    assert {"generation_config.json", "tokenizer_config.json"} <= files


def test_usage() -> None:
    done = _run("folder")
    assert done.returncode == 2
    assert "./examples/llama.sh FOLDER TEXTS OUTPUT EXIT..." in done.stdout
