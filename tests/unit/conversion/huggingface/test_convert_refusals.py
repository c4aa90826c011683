"""Bad input raises before anything is written, naming the file, the key and what was expected."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ee_llm.checkpoint.read import TensorReader
from ee_llm.cli.main import main
from tests.unit.conversion.huggingface.folders import (
    edit_settings,
    edit_tensors,
    make_folder,
)
from tests.unit.conversion.huggingface.test_convert_exits import ours, refusal

Q, NORM = "model.layers.2.self_attn.q_proj.weight", "model.norm.weight"


def _remove(folder: Path) -> None:
    next(folder.glob("model-00002-of-*")).unlink()


def _unlist(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][Q]
    index.write_text(json.dumps(content))


def _escape(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][Q] = "../model.safetensors"
    index.write_text(json.dumps(content))


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _tensors(**changes: torch.Tensor | None):
    def edit(folder: Path) -> None:
        def change(tensors):
            for key, value in changes.items():
                if value is None:
                    del tensors[key]
                else:
                    tensors[key] = value

        edit_tensors(folder, change)

    return edit


def _larger_vocabulary(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["zz"] = 300
    path.write_text(json.dumps(tokenizer))


def _settings(**changes):
    return lambda folder: edit_settings(folder, **changes)


# Name: arguments of make_folder, a change, options, the expected error.
CASES = {
    "missing shard": (
        {"max_shard_size": "20KB"},
        _remove,
        (),
        r"/model-00002-of-\d+.safetensors is missing: expected model.* in it",
    ),
    "key that the index does not list": (
        {"max_shard_size": "20KB"},
        _unlist,
        (),
        rf"safetensors has {Q}, which contradicts model.safetensors.index.json",
    ),
    "shard outside the folder": (
        {"max_shard_size": "20KB"},
        _escape,
        (),
        rf"index.json: {Q} is in '../model.safetensors', outside the folder",
    ),
    "truncated file": (
        {},
        _truncate,
        (),
        r"model.safetensors is not a complete safetensors file: ",
    ),
    "pickle": ({}, _pickle, (), r"pytorch_model.bin is a pickle, which can execute any code"),
    "missing key": (
        {},
        _tensors(**{Q: None}),
        (),
        rf"model.safetensors: {Q} is missing: expected \[48, 36\] for "
        r"layers.3.self_attention.linear_qkv.weight",
    ),
    "extra key": (
        {},
        _tensors(extra=torch.ones(2, 3)),
        (),
        r"model.safetensors: extra \[2, 3\] is not a tensor of the llama that .*config.json",
    ),
    "biases that the settings do not have": (
        {},
        _tensors(**{Q.replace("weight", "bias"): torch.ones(48)}),
        (),
        r"q_proj.bias \[48\] is not a tensor of the llama",
    ),
    "wrong shape": (
        {},
        _tensors(**{NORM: torch.ones(35)}),
        (),
        rf"model.safetensors: {NORM} has shape \[35\], expected \[36\] from .*config.json",
    ),
    "wrong dtype": (
        {},
        _tensors(**{NORM: torch.ones(36, dtype=torch.int8)}),
        (),
        rf"{NORM} has dtype int8. Expected float64, .* or bfloat16",
    ),
    "dtypes that differ within a fused tensor": (
        {},
        _tensors(**{Q: torch.ones(48, 36, dtype=torch.float16)}),
        (),
        rf"combines tensors of several dtypes: {Q} torch.float16, .*k_proj.weight torch.float32",
    ),
    "wrong family": (
        {},
        _settings(model_type="gpt2", n_layer=5, n_embd=36, n_head=6, n_positions=48),
        (),
        r"the tensors are not those of a gpt2, which .*config.json describes: \d+ of \d+ keys are "
        r"missing, the first is transformer.wte.weight",
    ),
    "unknown family": (
        {},
        _settings(model_type="mamba"),
        (),
        r"config.json: model_type = 'mamba' is not supported, because it computes another "
        r"function: it has state-space layers. Supported: llama, mistral",
    ),
    "tied, but with its own output": (
        {},
        _settings(tie_word_embeddings=True),
        (),
        r"model.safetensors: lm_head.weight differs from model.embed_tokens.weight, but "
        r"tie_word_embeddings in .*config.json is true",
    ),
    "untied, but without an output": (
        {"name": "llama 3 tied"},
        _settings(tie_word_embeddings=False),
        (),
        r"lm_head.weight is missing: expected \[300, 36\] for output.weight. Check "
        r"tie_word_embeddings = false in .*config.json",
    ),
    "exit beyond the depth": (
        {},
        lambda folder: None,
        ("--exits", 2, 5),
        r"config.json: exits.boundaries = \[2, 5\]: boundary 5 is outside 1..4 \(model.num_layers "
        r"= 5",
    ),
    "vocabulary that is not the tokenizer's": (
        {},
        _larger_vocabulary,
        (),
        r"tokenizer.json has 301 tokens, but vocab_size = 300 in .*config.json. Use the "
        r"tokenizer with which the model was trained",
    ),
    "no tokenizer": (
        {},
        lambda folder: (folder / "tokenizer.json").unlink(),
        (),
        r"tokenizer.json is missing: expected the model's tokenizer. Pass another path, or "
        r"'bytes', with --tokenizer",
    ),
    "another activation": ({}, _settings(hidden_act="gelu"), (), r"hidden_act = 'gelu'. Convert"),
    "biases of the output projection": (
        {},
        _settings(attention_bias=True),
        (),
        r"computes another function than ee-llm's llama: attention_bias = True. Convert a model",
    ),
    "another scaling of rotations": (
        {},
        _settings(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        (),
        r"another function than ee-llm's llama: rope_parameters of type 'yarn' \(YaRN\). Convert",
    ),
    "rotations of a part": (
        {},
        _settings(partial_rotary_factor=0.5),
        (),
        r"another function than ee-llm's llama: partial_rotary_factor = 0.5. Convert",
    ),
    "everything that makes another function at once": (
        {},
        _settings(
            logit_scale=0.5, num_experts=8, quantization_config={"quant_method": "awq", "bits": 4}
        ),
        (),
        r"another function than ee-llm's llama: logit_scale = 0.5; num_experts = 8; weights "
        r"quantized with 'awq' \(quantization_config\). Convert a model without these settings",
    ),
    "size that is not a number": (
        {},
        _settings(num_hidden_layers="5"),
        (),
        r"config.json: num_hidden_layers is '5': expected a count",
    ),
    "no settings": (
        {},
        lambda folder: (folder / "config.json").unlink(),
        (),
        r"config.json is missing: expected a JSON object in it",
    ),
    "scaled attention of gpt2": (
        {"name": "gpt2"},
        _settings(scale_attn_by_inverse_layer_idx=True),
        (),
        r"ee-llm's gpt2: scale_attn_by_inverse_layer_idx = True. Convert",
    ),
    "option of the other direction": (
        {},
        lambda folder: None,
        ("--dense",),
        r"--dense has no effect on .*theirs, which is a Hugging Face model",
    ),
    "to its own kind": (
        {},
        lambda folder: None,
        ("--to", "hf"),
        r"--to hf: .*theirs is already a Hugging Face model",
    ),
    "unknown settings, strictly": (
        {},
        _settings(is_rotated=False, note=["by", "hand"]),
        ("--strict",),
        r"unknown settings is_rotated = false, note = \[\"by\", \"hand\"\], which --strict rejects",
    ),
    "attention to later tokens": (
        {},
        _settings(is_causal=False),
        (),
        r"config.json: the model computes another function .*: is_causal = False. Convert",
    ),
    "rotations of three kinds": (
        {},
        _settings(use_mrope=True),
        (),
        r"config.json: the model computes another function .*: use_mrope = True. Convert",
    ),
    "two tables of rotations": (
        {},
        _settings(rope_scaling={"type": "linear", "factor": 2.0}),
        (),
        r"rope_parameters = .* and rope_scaling = .* differ. Remove the one",
    ),
    "model type that is a list": ({}, _settings(model_type=["llama"]), (), r"model_type = \['ll"),
    "layer types that are a number": (
        {},
        _settings(layer_types=5),
        (),
        r"config.json: layer_types is 5: expected a list",
    ),
    "width beyond any model": (
        {},
        _settings(hidden_size=2**62),
        (),
        rf"config.json: hidden_size is {2**62}: expected a count of at most",
    ),
    "heads beyond any model": (
        {},
        _settings(head_dim=2**27, hidden_size=2**28),
        (),
        r"config.json: head_dim = 134217728 with num_attention_heads = 6 is too large",
    ),
    "number that is infinite": (
        {},
        _settings(rms_norm_eps=float("inf")),
        (),
        r"config.json: expected a JSON object: Infinity is not a JSON number",
    ),
    "number beyond floats": (
        {},
        _settings(rms_norm_eps=10**400),
        (),
        r"rms_norm_eps is 10+: expected a finite number",
    ),
    "flag that is a word": (
        {},
        _settings(tie_word_embeddings="no"),
        (),
        r"tie_word_embeddings is 'no': expected true or false",
    ),
    "heads that are a word": (
        {},
        _settings(num_key_value_heads="two"),
        (),
        r"num_key_value_heads is 'two': expected a count",
    ),
    "activation that is a list": (
        {"name": "gpt2"},
        _settings(activation_function=["gelu"]),
        (),
        r"ee-llm's gpt2: activation_function = \['gelu'\]",
    ),
    "more layers than tensors": (
        {},
        _settings(num_hidden_layers=2**27, layer_types=...),
        (),
        r"num_hidden_layers = 134217728, but there are only \d+ tensors",
    ),
    "no tensors": (
        {},
        lambda folder: edit_tensors(folder, dict.clear),
        (),
        r"theirs: its safetensors files have no tensors",
    ),
    "shards of no size": (
        {},
        lambda folder: None,
        ("--max-shard-gb", "2"),
        r"--max-shard-gb has no effect on .*theirs",
    ),
    "text without a check": (
        {},
        lambda folder: None,
        ("--text", "a"),
        r"--text has no effect without --check",
    ),
    "head of no exits": ({}, lambda folder: None, ("--head", "mlp"), r"--head .*--exits"),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_name_the_file_the_key_and_what_was_expected(tmp_path, capsys, case):
    made, spoil, options, expected = CASES[case]
    folder = make_folder(tmp_path / "theirs", **made)
    spoil(folder)
    found = refusal(capsys, folder, "--output", tmp_path / "ours", *options)
    assert re.search(expected, found), found
    assert not list(tmp_path.glob("ours/checkpoints/*"))


@pytest.mark.parametrize("size", ["nan", "inf", "0"])
def test_shards_must_have_a_size(tmp_path, capsys, size):
    source = ours(tmp_path / "ours").path
    output = ("--output", tmp_path / "x")
    found = refusal(capsys, source, "--to", "hf", "--max-shard-gb", size, *output)
    assert re.search(rf"--max-shard-gb {float(size)} .* 1,000,000", found)
    found = refusal(capsys, source, "--dense", "--max-shard-gb", 2, *output)
    assert "--max-shard-gb 2.0 has no effect with --to ee-llm" in found


def test_neutral_settings_are_accepted(tmp_path):
    folder = make_folder(tmp_path / "theirs")
    edit_settings(folder, is_causal=True, use_mrope=False, nothing=None, empty={}, none=[])
    assert main(["convert", str(folder), "--output", str(tmp_path / "ours")]) == 0


ALL, WINDOWED = ["full_attention"] * 5, ["full_attention"] * 4 + ["sliding_attention"]
ON = {"use_sliding_window": True, "sliding_window": 16, "layer_types": ...}
# Name: the model, settings, the context length that is expected.
WINDOWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mistral, where the switch has no effect": (
        "mistral",
        {"sliding_window": 16, "use_sliding_window": False, "layer_types": ALL},
        16,
    ),
    "mistral by default": ("mistral", {"sliding_window": ...}, 4096),
    "qwen2 without a size": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": ..., "layer_types": WINDOWED},
        4096,
    ),
    "qwen3 without a window": ("qwen3", {"use_sliding_window": True, "sliding_window": None}, 5000),
    "qwen2 switched off": ("qwen2", {"use_sliding_window": False, "sliding_window": 16}, 5000),
    "qwen2, all layers full": ("qwen2", ON | {"layer_types": ALL}, 5000),
    "qwen2, the first layers full": ("qwen2", ON | {"max_window_layers": 5}, 5000),
    "qwen3, all but the last full": ("qwen3", ON | {"max_window_layers": 4}, 16),
    "qwen3 by default has 28 full layers": ("qwen3", ON | {"max_window_layers": ...}, 5000),
    "llama, which has no window": ("llama 3", {"sliding_window": 16}, 5000),
    "llama with windowed layers": (
        "llama 3",
        {"sliding_window": 16, "layer_types": WINDOWED},
        16,
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_apply_as_in_transformers(tmp_path, case):
    name, changes, expected = WINDOWS[case]
    folder = make_folder(tmp_path / "theirs", name, max_position_embeddings=5000)
    edit_settings(folder, **changes)
    assert main(["convert", str(folder), "--output", str(tmp_path / "ours")]) == 0
    assert TensorReader(tmp_path / "ours").config().model.max_seq_length == expected


def test_unknown_settings_are_listed_in_one_note_and_kept(tmp_path, capsys):
    folder = make_folder(tmp_path / "theirs")
    unknown = {"unknown_remark": "by hand", "is_rotated": False, "sizes": list(range(99))}
    edit_settings(folder, **unknown, _private=1, unsloth_fixed=True)
    output = ["--output", str(tmp_path / "ours"), "--json"]
    assert main(["convert", str(folder), *output]) == 0
    [note] = json.loads(capsys.readouterr().out)["notes"]
    assert note.startswith(
        f'{folder}/config.json has settings of unknown meaning: unknown_remark = "by hand", '
        "is_rotated = false, sizes = [0, 1, 2,"
    )
    assert note.endswith(
        "--check compares the logits with those of transformers; --strict rejects such settings."
    )
    assert "_private" not in note
    options = ["--to", "hf", "--output", str(tmp_path / "back")]
    assert main(["convert", str(tmp_path / "ours"), *options]) == 0
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert settings.items() >= unknown.items()


def test_a_failed_check_names_the_boundary(tmp_path, capsys, monkeypatch):
    """Here the reference is wrong; otherwise the tables would be."""
    from ee_llm.architecture.reference import ReferenceModel

    folder = make_folder(tmp_path / "theirs")
    right = ReferenceModel.logits
    monkeypatch.setattr(
        ReferenceModel, "logits", lambda self, b, x: right(self, b, x) * (1.01 if b == 3 else 1)
    )
    found = refusal(capsys, folder, "--output", tmp_path / "ours", "--exits", 1, 3, "--check")
    assert "boundary 3: the logits of" in found
    assert "Expected at most 1e-04" in found
    path = TensorReader(tmp_path / "ours").path
    assert found.endswith(f"Do not use {path}: remove it.")


def test_existing_outputs_are_not_overwritten(tmp_path, capsys):
    folder = make_folder(tmp_path / "theirs")
    for _ in range(2):
        status = main(["convert", str(folder), "--output", str(tmp_path / "ours")])
    assert status == 2
    assert "already exists. Choose another --output" in capsys.readouterr().err
    found = refusal(capsys, tmp_path / "ours", "--to", "hf", "--output", folder)
    assert re.search("theirs .*another --output", found)
    found = refusal(capsys, tmp_path / "ours", "--output", tmp_path / "x")
    assert re.search("ours is already an ee-llm checkpoint.*--to hf, --to int8, --dense", found)


@pytest.mark.thorough
@pytest.mark.parametrize("to", ["ee-llm", "hf"])
def test_a_killed_conversion_leaves_no_output(tmp_path, to):
    folder = make_folder(tmp_path / "theirs")
    source, options = folder, ["--output", str(tmp_path / "result"), "--to", to]
    if to == "hf":
        source = tmp_path / "ours"
        assert main(["convert", str(folder), "--output", str(source)]) == 0
    code = (
        "import os, signal, sys; from ee_llm.cli import main\n"
        "from ee_llm.conversion.huggingface import folder\n"
        "from ee_llm.checkpoint.read import TensorReader\n"
        "def patched(kind):\n"
        "    original = kind.tensor\n"
        "    def tensor(self, name):\n"
        "        if 'norm' in name and '3' in name: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return original(self, name)\n"
        "    kind.tensor = tensor\n"
        "patched(folder.Folder); patched(TensorReader)\n"
        "main.main(sys.argv[1:])\n"
    )
    arguments = ["convert", str(source), *options]
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=os.environ, timeout=100, check=False
    )
    assert run.returncode == -signal.SIGKILL
    if to == "hf":
        assert not (tmp_path / "result").exists()
    else:
        assert not list((tmp_path / "result" / "checkpoints").glob("step-????????"))
    assert main(arguments) == 0
    assert not list(tmp_path.rglob("*.partial"))
