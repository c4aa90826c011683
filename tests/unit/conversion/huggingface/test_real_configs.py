"""The config.json files of published models are converted, or raise with the reason."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.conversion.huggingface.settings import read_settings
from ee_llm.conversion.open_source import open_source
from ee_llm.errors import CheckpointError
from tests.unit.conversion.huggingface.folders import randomize
from tests.unit.conversion.huggingface.real_configs import OTHERS, REAL, shrunk

TOKENS = torch.tensor([5, 299, 0, 17, 17, 3, 140, 9, 250, 11, 1, 2, 77, 88, 99, 111, 122, 133])


@pytest.mark.parametrize("name", REAL)
def test_conversion_keeps_the_function(tmp_path, name):
    """With `is_strict`, so that no key is unknown."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(shrunk(REAL[name])))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomize(model)
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_source(tmp_path, tokenizer="bytes", is_strict=True)
    tensors = {name: source.tensor(name) for name in source.specs}
    ours = ReferenceModel(source.config, tensors, torch.float32).forward(TOKENS)[3]
    with torch.no_grad():
        theirs = model(TOKENS[None]).logits[0]
    scale = theirs.abs().max().item()
    assert scale > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * scale)
    length = getattr(config, "n_positions", None) or config.max_position_embeddings
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    assert source.config.model.max_seq_length == min(length, window or length)


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_another_function_raise(tmp_path, name):
    config, expected = OTHERS[name]
    (tmp_path / "config.json").write_text(json.dumps(shrunk(config)))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as found:
        open_source(tmp_path, tokenizer="bytes")
    assert re.search(rf"config\.json: .*{expected}", str(found.value)), found.value


def test_defaults_equal_transformers(tmp_path):
    """A missing key has the value that transformers assumes."""
    transformers = pytest.importorskip("transformers")
    for kind in ("llama", "mistral", "qwen2", "qwen3", "gpt2"):
        theirs = transformers.AutoConfig.for_model(kind)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        sizes += ("num_attention_heads", "n_layer", "n_embd", "n_head")
        given = {name: getattr(theirs, name) for name in sizes if hasattr(theirs, name)}
        found = read_settings({"model_type": kind, **given}).options
        assert found["max_seq_length"] == min(
            theirs.max_position_embeddings, getattr(theirs, "sliding_window", None) or 2**30
        )
        if kind == "gpt2":
            continue
        assert found["num_kv_heads"] == theirs.num_key_value_heads
        head_dim = getattr(theirs, "head_dim", None) or 128
        assert found.get("head_dim", theirs.hidden_size // theirs.num_attention_heads) == head_dim
        assert found["rope_theta"] == theirs.rope_parameters["rope_theta"]
