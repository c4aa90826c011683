"""Logits equal those of transformers at every exit, on one process and over ranks."""

import pytest
import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.checkpoint.read import TensorReader
from ee_llm.conversion.open_source import NewExits, open_source
from tests.unit.conversion.huggingface.folders import MODELS, make_folder
from tests.unit.conversion.huggingface.test_convert_round_trip import run
from tests.unit.inference.peers import make_precise
from tests.unit.inference.stages import TOKENS, Ranks, stage_logits

BOUNDARIES = (1, 3, 4)


def converted(folder, dtype: torch.dtype):
    """Return the configuration and tensors of a folder with LayerSkip's exits."""
    source = open_source(folder, NewExits(BOUNDARIES))
    return source.config, {name: source.tensor(name).to(dtype) for name in source.specs}


def theirs(folder, dtype: torch.dtype) -> dict[int, Tensor]:
    """Return transformers' logits [s, v] by boundary, with its final norm and output at each."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    assert model.dtype == dtype
    if dtype == torch.float64:
        make_precise(model)
    norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
    with torch.no_grad():
        outputs = model(TOKENS[None], output_hidden_states=True)
        found = {b: model.lm_head(norm(outputs.hidden_states[b]))[0] for b in BOUNDARIES}
    return found | {len(outputs.hidden_states) - 1: outputs.logits[0]}


def assert_close(found: dict[int, Tensor], expected: dict[int, Tensor], tolerance: float) -> None:
    assert list(found) == list(expected)
    for boundary, logits in expected.items():
        assert logits.abs().max() > 1
        scale = logits.abs().max().item()
        torch.testing.assert_close(found[boundary], logits, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", MODELS)
def test_every_exit_equals_transformers(tmp_path, name):
    folder = make_folder(tmp_path, name)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        config, tensors = converted(folder, dtype)
        found = ReferenceModel(config, tensors, dtype).forward(TOKENS)
        assert_close(found, theirs(folder, dtype), tolerance)


@pytest.mark.parametrize("name", ["llama 3", "qwen2", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_stages_and_shards_equal_transformers(tmp_path, name, num_stages, size):
    folder = make_folder(tmp_path, name)
    config, tensors = converted(folder, torch.float64)
    shards = Ranks(size).run(
        lambda shard: stage_logits(config, tensors, num_stages=num_stages, shard=shard)
    )
    found = {b: torch.cat([part[b] for part in shards], dim=-1) for b in shards[0]}
    assert_close(found, theirs(folder, torch.float64), 1e-10)


@pytest.mark.parametrize("name", ["llama 3", "gpt2", "qwen3"])
def test_copied_heads_equal_plain_ones(tmp_path, name):
    """An mlp is copied from its layer, a block from the next layer."""
    expected = theirs(make_folder(tmp_path, name), torch.float64)
    for head, output, moved in (
        (("mlp", "norm"), "own", 0),
        (("block", "norm"), "shared", 1),
    ):
        source = open_source(tmp_path, NewExits(BOUNDARIES, head, output))
        tensors = {name: source.tensor(name) for name in source.specs}
        found = ReferenceModel(source.config, tensors, torch.float64).forward(TOKENS)
        for boundary in BOUNDARIES:
            if (other := boundary + moved) in expected:
                scale = expected[other].abs().max()
                error = (found[boundary] - expected[other]).abs().max() / scale
                assert error < 1e-10


def test_a_written_checkpoint_has_the_same_tensors(tmp_path):
    folder = make_folder(tmp_path / "theirs", "qwen3")
    run(folder, "--output", tmp_path / "ours", "--exits", 1, 3, 4, "--check", "--text", "a b c")
    reader = TensorReader(tmp_path / "ours")
    assert reader.config().exits.boundaries == BOUNDARIES
    source = open_source(folder, NewExits(BOUNDARIES))
    for name in reader.names():
        assert torch.equal(reader.tensor(name), source.tensor(name))
