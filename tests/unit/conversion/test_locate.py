"""Errors name the kind of the source and the files that were expected."""

import shutil
from pathlib import Path

import pytest

from ee_llm.cli.main import main
from tests.unit.conversion.huggingface.folders import make_folder
from tests.unit.conversion.huggingface.test_convert_exits import refusal
from tests.unit.conversion.megatron.megatron_files import Writer
from tests.unit.conversion.megatron.test_megatron_ranks import make

EXPECTED = (
    "has no model: expected config.json and model.safetensors or model.safetensors.index.json "
    "(Hugging Face), latest_checkpointed_iteration.txt or mp_rank_00 (Megatron-LM), or "
    "manifest.json or checkpoints/ (ee-llm). "
)


def convert(capsys: pytest.CaptureFixture[str], source: Path, output: Path) -> str:
    found = refusal(capsys, source, "--output", output)
    assert not output.exists()
    return found


def test_an_empty_folder(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    found = convert(capsys, tmp_path / "in", tmp_path / "out")
    assert found.endswith(f"{tmp_path}/in {EXPECTED}The folder is empty.")


def test_a_folder_of_something_else(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("hello")
    found = convert(capsys, tmp_path / "in", tmp_path / "out")
    assert found.endswith(f"{EXPECTED}Found none of them.")


def test_a_folder_of_pickles_without_settings(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "consolidated.00.pth").write_bytes(b"PK")
    found = convert(capsys, tmp_path / "in", tmp_path / "out")
    assert "consolidated.00.pth is a pickle, and there is no config.json" in found


def test_a_folder_with_a_gguf_file(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    found = convert(capsys, tmp_path / "in", tmp_path / "out")
    assert f"it has GGUF files. Pass one of them, such as {tmp_path}/in/model.Q4_K_M.gguf" in found


def test_a_file_of_weights(tmp_path, capsys):
    folder = make_folder(tmp_path / "in")
    found = convert(capsys, folder / "model.safetensors", tmp_path / "out")
    assert found.endswith(
        f"is not a GGUF file. Pass a GGUF file, or the folder of a model such as {folder}."
    )


def test_a_run_of_megatron_without_its_tracker(tmp_path, capsys):
    checkpoint = tmp_path / "run" / "iter_0000012"
    Writer(*make(), 1, 1).write(tmp_path / "run")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").unlink()
    found = convert(capsys, tmp_path / "run", tmp_path / "out")
    assert "latest_checkpointed_iteration.txt, which names the newest checkpoint" in found
    assert found.endswith(f"Pass one of its checkpoints, such as {checkpoint}.")


def test_nothing_at_all(tmp_path, capsys):
    found = convert(capsys, tmp_path / "none", tmp_path / "out")
    assert (
        "none does not exist: expected a folder with config.json, a GGUF file, the id of" in found
    )


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt", "a", "--checkpoint"),
        ("tune", "--tuning.checkpoint"),
        ("checkpoint", "info"),
    ],
    ids=lambda command: command[0],
)
def test_commands_for_checkpoints_say_how_to_convert(tmp_path, capsys, command):
    folder = make_folder(tmp_path / "theirs")
    assert main([*command, str(folder)]) == 2
    found = capsys.readouterr().err.strip()
    advice = f"Convert it first: ee-llm convert {folder} --output runs/theirs"
    assert found.endswith(f"{folder} is not an ee-llm checkpoint. {advice}")


def test_commands_for_checkpoints_name_convert_for_files_and_hub_ids(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert main(["checkpoint", "info", "model.gguf"]) == 2
    assert "ee-llm convert model.gguf --output runs/model" in capsys.readouterr().err
    assert main(["checkpoint", "info", "org/model"]) == 2
    assert "Convert a model of the Hugging Face Hub first" in capsys.readouterr().err


def test_a_local_folder_has_priority_over_the_hub(tmp_path, capsys, monkeypatch):
    make_folder(tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "org/model", "--output", "ours"]) == 0
    shutil.rmtree("org/model")
    assert main(["convert", "ours", "--output", "other"]) == 2
    assert "is already an ee-llm checkpoint" in capsys.readouterr().err
