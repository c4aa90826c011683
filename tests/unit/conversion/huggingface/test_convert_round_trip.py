"""A round trip keeps tensors bit for bit, settings and files."""

import json
from pathlib import Path

import pytest
import torch

from ee_llm.checkpoint.read import TensorReader
from ee_llm.cli.main import main
from ee_llm.conversion.huggingface import tables
from tests.unit.checkpoint.checkpoints import reseal
from tests.unit.conversion.huggingface.folders import (
    MODELS,
    edit_settings,
    edit_tensors,
    make_folder,
    tensors_of,
)


def run(*arguments: object) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


def there_and_back(folder: Path, *options: str) -> Path:
    """Convert a folder to a checkpoint and back, and return the new folder."""
    checkpoint, back = folder.with_name("ours"), folder.with_name("back")
    run(folder, "--output", checkpoint, "--json")
    run(checkpoint, "--to", "hf", "--output", back, "--json", *options)
    return back


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("name", MODELS)
def test_tensors_settings_and_files_are_kept(tmp_path, name):
    folder = make_folder(tmp_path / "theirs", name)
    back = there_and_back(folder)
    assert_same(back, folder)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            assert json.loads((back / file.name).read_text()) == json.loads(file.read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype(tmp_path, dtype):
    folder = make_folder(tmp_path / "theirs", "qwen3", dtype)
    assert_same(there_and_back(folder), folder)
    assert {t.dtype for t in tensors_of(folder).values()} == {dtype}


def test_dtypes_may_be_mixed(tmp_path):
    folder = make_folder(tmp_path / "theirs", dtype=torch.bfloat16)

    def widen(tensors):
        for key in tensors:
            if "norm" in key:
                tensors[key] = tensors[key].float()

    edit_tensors(folder, widen)
    assert_same(there_and_back(folder), folder)


@pytest.mark.parametrize("size", ["3KB", "20KB"])
def test_sharded_both_ways(tmp_path, size):
    folder = make_folder(tmp_path / "theirs", max_shard_size=size)
    assert (folder / "model.safetensors.index.json").is_file()
    back = there_and_back(folder, "--max-shard-gb", str(int(size[:-2]) / 1e6))
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 2
    assert_same(back, folder)
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(back)
    for key, tensor in tensors_of(folder).items():
        assert torch.equal(theirs.state_dict()[key], tensor)


def test_buffers_and_settings_of_old_versions(tmp_path):
    """Rotary frequencies and masks are dropped; older rope settings and GPT-2 keys are read."""
    old = make_folder(tmp_path / "a" / "theirs", "llama linear")
    new = tensors_of(old)
    edit_settings(
        old,
        rope_parameters=...,
        rope_theta=50.0,
        rope_scaling={"type": "linear", "factor": 3.0},
        tie_word_embeddings=...,
    )
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(old, lambda tensors: tensors.update({buffer: torch.ones(4)}))
    back = there_and_back(old)
    assert tensors_of(back).keys() == new.keys()
    model = TensorReader(tmp_path / "a" / "ours").config().model
    assert (model.rope_scaling, model.rope_factor, model.rope_theta) == ("linear", 3.0, 50.0)
    assert json.loads((back / "config.json").read_text())["rope_scaling"]["factor"] == 3.0

    plain = make_folder(tmp_path / "b" / "theirs", "gpt2")
    new = tensors_of(plain)

    def of_the_hub(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 48, 48)

    edit_tensors(plain, of_the_hub)
    back = tensors_of(there_and_back(plain))
    assert back.keys() == new.keys()
    assert all(torch.equal(back[key], new[key]) for key in new)


def test_a_model_without_original_settings_is_exported(tmp_path):
    """New settings are written, for every family."""
    transformers = pytest.importorskip("transformers")
    for name in MODELS:
        folder = make_folder(tmp_path / name / "theirs", name)
        run(folder, "--output", tmp_path / name / "ours", "--json")
        reader = TensorReader(tmp_path / name / "ours")
        for file in (reader.path / "huggingface").iterdir():
            file.unlink()
        reseal(reader.path)
        back = tmp_path / name / "back"
        run(reader.path, "--to", "hf", "--output", back, "--json")
        assert_same(back, folder)
        tokens = torch.arange(40)[None]
        models = [transformers.AutoModelForCausalLM.from_pretrained(x) for x in (folder, back)]
        with torch.no_grad():
            one, other = (model.eval()(tokens).logits for model in models)
        assert torch.equal(one, other), name


def test_a_window_limits_the_context(tmp_path, capsys):
    folder = make_folder(tmp_path / "theirs", "mistral", sliding_window=16)
    run(folder, "--output", tmp_path / "ours")
    assert "note: model.max_seq_length = 16: beyond sliding_window = 16" in capsys.readouterr().out
    assert TensorReader(tmp_path / "ours").config().model.max_seq_length == 16
    run(tmp_path / "ours", "--to", "hf", "--output", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["sliding_window"] == 16


@pytest.mark.parametrize("table", [tables.LLAMA, tables.GPT2], ids=["llama", "gpt2"])
def test_a_table_has_every_key_once(table):
    keys = [key for row in table.rows for key in row.keys]
    assert len(keys) == len(set(keys))
    assert len({row.name for row in table.rows}) == len(table.rows)
