"""Checkpoints and data of version 0.1.0 still load, with the names that options had then.

The checkpoint was written by version 0.1.0 on two pipeline ranks, with data.mask_after_eod on; the
tokens below are what that version generated from it.
"""

import json
import tarfile
from pathlib import Path

import pytest

from ee_llm.checkpoint.read import TensorReader
from ee_llm.cli.main import main
from ee_llm.data.indexed import IndexedTokens
from ee_llm.data.prepare import check_tokenizer
from ee_llm.data.tokenization.tokenizer import BytesTokenizer
from ee_llm.inference.llm import LLM
from ee_llm.inference.sampling.params import SamplingParams

ARCHIVE = Path(__file__).with_name("data") / "checkpoint-0.1.0.tar.xz"
TOKENS = (20, 252, 84, 56, 53, 69, 55, 148, 49, 205, 98, 11)
EXITS = (1, 4, 1, 4, 4, 4, 1, 4, 4, 4, 1, 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"


def test_the_option_has_its_new_name(run: Path) -> None:
    reader = TensorReader(run)
    assert "mask_after_eod = true" in (reader.path / "config.toml").read_text()
    config = reader.config()
    assert config.data.mask_after_eos
    assert "mask_after_eos = true" in config.to_toml()


def test_it_generates_what_version_0_1_0_did(run: Path) -> None:
    with LLM(run, dtype="float64", exits=0.0047) as llm:
        (output,) = llm.generate("The quick", SamplingParams(max_tokens=12))
        assert (output.token_ids, output.exits) == (TOKENS, EXITS)
        assert llm.verify(output).passed


def test_its_files_are_verified(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "info", str(run), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3


def test_data_with_the_old_key_are_taken(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some text")
    prefix = tmp_path / "corpus"
    arguments = ["--inputs", str(text), "--output", str(prefix), "--tokenizer", "bytes"]
    assert main(["data", "prepare", *arguments]) == 0
    meta = Path(f"{prefix}.meta.json")
    found = json.loads(meta.read_text())
    found["eod"] = found.pop("eos_token_id")
    meta.write_text(json.dumps(found))
    check_tokenizer(prefix, BytesTokenizer())
    assert IndexedTokens(prefix).num_tokens == 10
