"""Files besides tensors: none from outside the source, none overwritten."""

import json
import os
import threading
from pathlib import Path

import pytest
import tokenizers
import torch

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.write import TensorSpec, write_checkpoint
from ee_llm.cli.main import main
from ee_llm.config import Config
from ee_llm.conversion.huggingface import export
from ee_llm.data.tokenization.tokenizer import load_tokenizer
from ee_llm.errors import CheckpointError
from tests.unit.checkpoint.checkpoints import reseal
from tests.unit.conversion.huggingface.folders import (
    edit_tensors,
    make_folder,
    make_tokenizer,
    tensors_of,
)
from tests.unit.conversion.huggingface.test_convert_exits import ours, refusal, save_ours
from tests.unit.conversion.huggingface.test_convert_round_trip import assert_same, run
from tests.unit.inference.models import tiny_config


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def plant(checkpoint: Path, name: str, content: bytes) -> None:
    """Add a file to huggingface/ and to the manifest, as an attacker would."""
    (checkpoint / "huggingface").mkdir(exist_ok=True)
    (checkpoint / "huggingface" / name).write_bytes(content)
    reseal(checkpoint)


def test_the_dtype_in_the_settings_is_that_of_the_tensors(tmp_path):
    """Regression: after training in another precision the settings had the original dtype."""
    folder = make_folder(tmp_path / "theirs")
    run(folder, "--output", tmp_path / "wide")
    reader = TensorReader(tmp_path / "wide")
    specs = {name: TensorSpec(tuple(reader.shape(name)), torch.bfloat16) for name in reader.names()}
    files = {
        f"huggingface/{path.name}": path.read_bytes()
        for path in (reader.path / "huggingface").iterdir()
    }
    write_checkpoint(
        tmp_path / "narrow",
        reader.config(),
        specs,
        lambda name: reader.tensor(name).bfloat16(),
        tokenizer_file=reader.tokenizer(),
        files=files,
    )
    run(tmp_path / "narrow", "--to", "hf", "--output", tmp_path / "back")
    assert settings_of(folder)["dtype"] == "float32"
    assert settings_of(tmp_path / "back")["dtype"] == "bfloat16"


def test_only_known_files_are_exported(tmp_path):
    reader = ours(tmp_path / "ours")
    for name in ("model.safetensors", "modeling.py"):
        plant(reader.path, name, b"anything")
    plant(reader.path, "chat_template.jinja", b"{{ messages }}")
    (reader.path / "huggingface" / "added_tokens.json").symlink_to("/etc/hostname")
    run(reader.path, "--to", "hf", "--output", tmp_path / "back")
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {"config.json", "model.safetensors", "chat_template.jinja"}
    assert tensors_of(tmp_path / "back")


def test_files_next_to_the_output_are_not_changed(tmp_path):
    reader = ours(tmp_path / "ours")
    (tmp_path / "back.partial").mkdir()
    (tmp_path / "back.partial" / "mine").write_text("mine")
    run(reader.path, "--to", "hf", "--output", tmp_path / "back")
    assert (tmp_path / "back.partial" / "mine").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"ours", "back", "back.partial"}


def test_of_two_exports_to_one_output_one_wins(tmp_path, monkeypatch):
    reader = ours(tmp_path / "ours")
    both, ends = threading.Barrier(2), []
    publish = export._publish

    def meet(*paths: Path) -> None:
        both.wait(60)
        publish(*paths)

    def go() -> None:
        try:
            model = export.full_model(reader.config())
            ends.append(str(export.export_folder(reader, model, tmp_path / "back")))
        except CheckpointError as error:
            ends.append(str(error))

    monkeypatch.setattr(export, "_publish", meet)
    threads = [threading.Thread(target=go) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted("hoose another --output" in end for end in ends) == [False, True]
    assert len(tensors_of(tmp_path / "back")) > 5
    assert {p.name for p in tmp_path.iterdir()} == {"ours", "back"}


def test_an_output_without_a_name_is_refused(tmp_path, capsys, monkeypatch):
    reader = ours(tmp_path / "ours")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = refusal(capsys, reader.path, "--to", "hf", "--output", ".")
    assert "--output . is the current directory" in found
    (tmp_path / "file").write_text("")
    found = refusal(capsys, reader.path, "--to", "hf", "--output", tmp_path / "file" / "x")
    assert f"the directory '{tmp_path / 'file'}' cannot be written to" in found


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_links_out_of_the_folder_are_refused(tmp_path, capsys, name):
    folder = make_folder(tmp_path / "theirs")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    found = refusal(capsys, folder, "--output", tmp_path / "ours")
    assert f"theirs/{name} is a link to" in found


def test_links_in_the_cache_of_the_hub_are_read(tmp_path):
    folder = make_folder(tmp_path / "models--a--b" / "snapshots" / "0123")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(os.path.join("..", "..", "blobs", path.name))
    run(folder, "--output", tmp_path / "ours")
    run(tmp_path / "ours", "--to", "hf", "--output", tmp_path / "back")
    assert_same(tmp_path / "back", folder)


def test_small_files_have_a_maximum_size(tmp_path, capsys):
    folder = make_folder(tmp_path / "theirs")
    with (folder / "generation_config.json").open("ab") as file:
        file.truncate(17 * 2**20)
    found = refusal(capsys, folder, "--output", tmp_path / "ours")
    assert "generation_config.json has 17825792 bytes. Expected at most 16777216" in found


def test_a_single_file_has_priority_over_an_index(tmp_path):
    """As in transformers: the index may belong to an older model in the same folder."""
    folder = make_folder(tmp_path / "theirs", max_shard_size="20KB")
    other = make_folder(tmp_path / "other", dtype=torch.bfloat16)
    (other / "model.safetensors").rename(folder / "model.safetensors")
    run(folder, "--output", tmp_path / "ours")
    assert TensorReader(tmp_path / "ours").dtype("embedding.word.weight") == torch.bfloat16


def test_another_tokenizer_replaces_all_files_of_the_original(tmp_path):
    folder = make_folder(tmp_path / "theirs")
    run(folder, "--tokenizer", "bytes", "--output", tmp_path / "ours")
    kept = {path.name for path in (TensorReader(tmp_path / "ours").path / "huggingface").iterdir()}
    assert kept == {"config.json", "generation_config.json"}


@pytest.mark.parametrize("head", [(), ("mlp",)], ids=["bare", "mlp"])
def test_heads_without_a_norm_pass_the_check(tmp_path, capsys, head):
    """transformers has no exits of this kind to compare with."""
    folder = make_folder(tmp_path / "theirs")
    run(folder, "--exits", 2, "--head", *head, "--check", "--output", tmp_path / "ours")
    shown = " ".join(capsys.readouterr().out.split())
    assert "The exits after layers 2 were not compared" in shown
    assert TensorReader(tmp_path / "ours").config().exits.head == head


def test_weights_of_several_dtypes_pass_the_check(tmp_path):
    """By default transformers rounds all of them to the dtype in the settings."""
    folder = make_folder(tmp_path / "theirs", dtype=torch.bfloat16)

    def widen(tensors):
        for key in tensors:
            if "norm" in key:
                tensors[key] = tensors[key].float() * 1.003

    edit_tensors(folder, widen)
    run(folder, "--check", "--output", tmp_path / "ours")


def test_a_read_error_is_not_reported_as_a_write_error(tmp_path):
    config: Config = tiny_config("llama", vocab_size=260)
    specs = {"a": TensorSpec((1,), torch.float32)}

    def get(name: str) -> torch.Tensor:
        raise OSError("the source is gone")

    with pytest.raises(OSError, match=r"^the source is gone$"):
        write_checkpoint(tmp_path / "ours", config, specs, get)
    assert save_ours(tmp_path / "ours", config).is_dir()  # the first attempt left nothing


def test_a_second_conversion_reads_the_tokenizer_again(tmp_path):
    """In one process, the second conversion must not store the tokenizer that the first read."""
    folder = make_folder(tmp_path / "theirs")
    for size in (300, 299):
        make_tokenizer(folder / "tokenizer.json", size)
        output = tmp_path / f"ours {size}"
        assert main(["convert", str(folder), "--output", str(output)]) == 0
        stored = Path(TensorReader(output).tokenizer())
        assert stored.read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_gpt2s_mask_of_older_versions_is_ignored(tmp_path, dtype):
    """It is a buffer without weights, saved as bytes, Booleans or floats."""
    folder = make_folder(tmp_path / "theirs", "gpt2", torch.float16)
    mask = torch.ones(1, 1, 48, 48).tril().to(dtype)
    edit_tensors(folder, lambda tensors: tensors.update({"transformer.h.0.attn.bias": mask}))
    assert main(["convert", str(folder), "--output", str(tmp_path / "ours")]) == 0
    reader = TensorReader(tmp_path / "ours")
    assert {reader.dtype(name) for name in reader.names()} == {torch.float16}


def test_weights_that_are_not_finite_are_noted(tmp_path, capsys):
    folder = make_folder(tmp_path / "theirs")

    def damage(tensors):
        tensors["model.layers.1.self_attn.k_proj.weight"][0, :3] = float("nan")
        tensors["model.norm.weight"][0] = float("inf")

    edit_tensors(folder, damage)
    options = ["--output", str(tmp_path / "ours"), "--json", "--exits", "2"]
    assert main(["convert", str(folder), *options]) == 0
    [note] = json.loads(capsys.readouterr().out)["notes"]
    assert note.startswith(
        "2 tensors have weights that are infinite or NaN: model.layers.1.self_attn.k_proj.weight "
        "(3 of 576), model.norm.weight (1 of 36). The model's outputs will not be finite"
    )


def test_a_padding_token_without_a_row_does_not_stop_a_conversion(tmp_path, capsys):
    make_folder(tmp_path / "in")
    path = tmp_path / "in" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(path))
    assert main(["convert", str(tmp_path / "in"), "--output", str(tmp_path / "ours")]) == 0
    assert "no row (vocab_size = 300). They are omitted: <pad>" in capsys.readouterr().out
    assert load_tokenizer(TensorReader(tmp_path / "ours").tokenizer()).vocab_size == size
