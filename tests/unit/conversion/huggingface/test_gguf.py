"""GGUF files give the same logits as transformers or raise, and leave no files behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ee_llm.architecture.rotary import inverse_frequencies
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import load_reference
from ee_llm.cli.main import main
from ee_llm.config import ModelConfig
from ee_llm.data.tokenization.tokenizer import load_tokenizer
from tests.unit.conversion.huggingface.gguf_files import make_gguf
from tests.unit.conversion.huggingface.test_convert_exits import refusal

pytest.importorskip("gguf")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

TOKENS = torch.tensor([3, 1, 299, 40, 41, 256, 7, 7, 90])


def converted(path: Path, output: Path, *options: str) -> TensorReader:
    assert main(["convert", str(path), "--output", str(output), *options]) == 0
    return TensorReader(output)


def theirs(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """Return transformers' logits [s, v] in float32, of weights rounded to `dtype`."""
    loading: dict[str, Any] = {"dtype": dtype, "gguf_file": path.name}
    if hasattr(transformers, "GgufConfig"):
        loading["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **loading)
    with torch.no_grad():
        return model.float().eval()(TOKENS[None]).logits[0]


@pytest.mark.parametrize(
    ("kind", "matrices", "expected"),
    [
        ("llama", "F32", torch.float32),
        ("llama", "F16", torch.float16),
        ("llama", "BF16", torch.bfloat16),
        ("llama", "Q8_0", torch.bfloat16),
        ("llama", "Q4_1", torch.bfloat16),
        ("qwen2", "Q4_1", torch.bfloat16),
    ],
)
def test_logits_equal_transformers(tmp_path, kind, matrices, expected):
    path = tmp_path / "in" / "model.gguf"
    path.parent.mkdir()
    weights = make_gguf(path, kind, matrices, tie_word_embeddings=matrices == "Q8_0")
    reader = converted(path, tmp_path / "ours")
    assert reader.config().model.tie_embeddings == (matrices == "Q8_0")
    assert {reader.dtype(name) for name in reader.names()} == {expected}
    found = load_reference(reader, torch.float32).forward(TOKENS)[2]
    logits = theirs(path, expected)
    assert logits.abs().max() > 1
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5 * logits.abs().max().item())
    if matrices in ("F32", "F16", "BF16"):  # the original weights, except for rounding
        norm = reader.tensor("exits.2.norm.weight")
        assert torch.equal(norm, weights["model.norm.weight"].to(expected))
        fc2 = reader.tensor("layers.1.mlp.linear_fc2.weight")
        assert torch.equal(fc2, weights["model.layers.0.mlp.down_proj.weight"].to(expected))
    # The folders of the file and of the output have no other files.
    assert {entry.name for entry in tmp_path.iterdir()} == {"in", "ours"}
    assert {entry.name for entry in (tmp_path / "ours").iterdir()} <= {"checkpoints", "run.lock"}
    assert [entry.name for entry in path.parent.iterdir()] == ["model.gguf"]


def test_tokenizer_chat_template_and_end_token_are_kept(tmp_path):
    make_gguf(tmp_path / "model.gguf", matrices="Q8_0")
    reader = converted(tmp_path / "model.gguf", tmp_path / "ours", "--check")
    tokenizer = load_tokenizer(reader.tokenizer())
    assert tokenizer.encode("the")[-1] == 257  # by the merges
    origin = reader.path / "huggingface"
    assert "special_0" in (origin / "chat_template.jinja").read_text()
    assert json.loads((origin / "config.json").read_text())["eos_token_id"] == 298
    assert main(["generate", "--checkpoint", str(tmp_path / "ours"), "--prompt", "the"]) == 0


def test_tokens_that_transformers_adds_are_removed(tmp_path):
    """Llama 3's vocabulary has no <|endoftext|>: transformers adds it beyond the embedding."""
    make_gguf(tmp_path / "model.gguf", is_odd=True)
    reader = converted(tmp_path / "model.gguf", tmp_path / "ours")
    assert load_tokenizer(reader.tokenizer()).vocab_size == 300


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_dtype_is_an_option(tmp_path, dtype):
    make_gguf(tmp_path / "model.gguf", matrices="Q8_0")
    reader = converted(tmp_path / "model.gguf", tmp_path / "ours", "--dtype", dtype)
    assert {reader.dtype(name) for name in reader.names()} == {getattr(torch, dtype)}


def divisors(factor: float) -> torch.Tensor:
    """Return llama.cpp's divisors of the rotary frequencies of Llama 3.1 or 3.2."""
    plain = {"num_layers": 1, "hidden_size": 64, "num_heads": 4, "vocab_size": 1}
    scaled = ModelConfig(**plain, rope_scaling="llama3", rope_factor=factor)
    return inverse_frequencies(ModelConfig(**plain)) / inverse_frequencies(scaled)


def test_llama_3_keeps_its_scaled_rotations(tmp_path):
    """transformers' reader ignores the tensor of divisors."""
    tensors = {"rope_freqs.weight": divisors(32.0)}
    make_gguf(tmp_path / "model.gguf", tensors=tensors)
    model = converted(tmp_path / "model.gguf", tmp_path / "ours", "--check").config().model
    assert (model.rope_scaling, model.rope_factor, model.rope_original_length) == (
        "llama3",
        32.0,
        8192,
    )


def test_linear_scaling_is_kept(tmp_path):
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    make_gguf(tmp_path / "model.gguf", extra=extra)
    model = converted(tmp_path / "model.gguf", tmp_path / "ours").config().model
    assert (model.rope_scaling, model.rope_factor) == ("linear", 4.0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "yarn": (
        {"extra": {"llama.rope.scaling.type": "yarn"}},
        "llama.rope.scaling.type = 'yarn' is not supported",
    ),
    "divisors of another kind": (
        {"tensors": {"rope_freqs.weight": torch.linspace(1, 9, 8)}},
        "rope_freqs.weight scales rotary positions in another way than Llama 3",
    ),
    "experts": (
        {"extra": {"llama.expert_count": 8}},
        "the model has a mixture of experts (llama.expert_count)",
    ),
    "a part of a model": ({"extra": {"split.count": 3}}, "is one of 3 parts of a model. Merge"),
    "biases, which transformers would drop": (
        {"tensors": {"blk.0.attn_q.bias": torch.ones(64)}},
        "model.gguf has 22 tensors, but transformers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_would_lose_content_raise(tmp_path, capsys, case):
    given, expected = REFUSED[case]
    make_gguf(tmp_path / "model.gguf", **given)
    found = refusal(capsys, tmp_path / "model.gguf", "--output", tmp_path / "ours")
    assert expected in found
    assert not (tmp_path / "ours").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_a_damaged_file_is_refused(tmp_path, capsys):
    make_gguf(tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    for length in (20, 1000, len(content) // 2, len(content) - 10):
        (tmp_path / "model.gguf").write_bytes(content[:length])
        found = refusal(capsys, tmp_path / "model.gguf", "--output", tmp_path / "ours")
        assert "model.gguf is not a complete GGUF file" in found, length
    (tmp_path / "model.gguf").write_bytes(b"x" + content)
    found = refusal(capsys, tmp_path / "model.gguf", "--output", tmp_path / "ours")
    assert "is not a GGUF file" in found


def test_options_of_other_sources_are_refused(tmp_path, capsys):
    make_gguf(tmp_path / "model.gguf")
    output = ("--output", tmp_path / "ours")
    found = refusal(capsys, tmp_path / "model.gguf", *output, "--revision", "main")
    assert f"--revision has no effect on {tmp_path}/model.gguf, which is a GGUF file" in found


def test_other_files_in_the_folder_are_not_read_or_run(tmp_path):
    path = tmp_path / "in" / "model.gguf"
    path.parent.mkdir()
    make_gguf(path, "llama", "F32")
    expected = load_tokenizer(converted(path, tmp_path / "alone").tokenizer())
    code = {"AutoTokenizer": ["code.Made", None], "AutoConfig": "code.Made"}
    settings = {"tokenizer_class": "Made", "auto_map": code, "chat_template": "another"}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(settings))
    (path.parent / "config.json").write_text(json.dumps({"model_type": "made", "auto_map": code}))
    (path.parent / "tokenizer.json").write_text("{")
    (path.parent / "code.py").write_text("raise RuntimeError('this ran')")
    found = load_tokenizer(converted(path, tmp_path / "beside").tokenizer())
    assert found.fingerprint == expected.fingerprint
    assert found.settings.chat_template == expected.settings.chat_template != "another"
