"""LayerSkip's released models convert with exits that use their own head, and draft for themselves.

Tiny random models stand in for them, with the settings of the released ones, or for those that
continue the training of CodeLlama, with the settings of CodeLlama.
"""

import json

import pytest
import torch

from ee_llm.checkpoint.read import TensorReader
from ee_llm.inference.llm import LLM
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.strategies import SelfSpeculation
from tests.unit.conversion.huggingface.folders import VOCABULARY, make_tokenizer, randomize
from tests.unit.conversion.huggingface.real_configs import REAL, shrunk
from tests.unit.conversion.huggingface.test_convert_round_trip import run
from tests.unit.inference.peers import make_precise

NAMES = [name for name in REAL if "layerskip" in name or "CodeLlama" in name]
LAYERS = 6
PROMPT = list(range(20, 32))
CASES = [(name, (2, 4)) for name in NAMES] + [(NAMES[0], tuple(range(1, LAYERS)))]


def make_model(path, name):
    """Write a folder without any parameter of an exit, and return its model in float64."""
    transformers = pytest.importorskip("transformers")
    settings = shrunk(REAL[name]) | {"num_hidden_layers": LAYERS, "torch_dtype": "float32"}
    path.mkdir()
    config = transformers.AutoConfig.for_model(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomize(model)
    with torch.no_grad():  # layers 3 to 6 change little, so that some drafts of exit 2 are right
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight *= 0.4
            layer.mlp.down_proj.weight *= 0.4
    model.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(settings))
    make_tokenizer(path / "tokenizer.json", VOCABULARY)
    model.double()
    make_precise(model)
    return model


@torch.no_grad()
def greedy(model, boundary, tokens):
    """Return the most probable next token of LayerSkip's exit, the model's own norm and output."""
    hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[boundary]
    if boundary < LAYERS:  # transformers applies the norm to the last hidden state
        hidden = model.model.norm(hidden)
    return model.lm_head(hidden)[0, -1].argmax().item()


def test_untied_tied_and_scaled_models_are_tested():
    sizes = ("layerskip-llama2-7B", "layerskip-llama3-8B", "layerskip-llama3.2-1B")
    assert ["codellama/CodeLlama-7b-hf", *(f"facebook/{size}" for size in sizes)] == NAMES
    tied = [name for name in NAMES if REAL[name]["tie_word_embeddings"]]
    assert tied == ["facebook/layerskip-llama3.2-1B"]
    assert REAL[tied[0]]["rope_scaling"]["rope_type"] == "llama3"


@pytest.mark.parametrize(("name", "boundaries"), CASES)
def test_a_converted_model_drafts_with_its_own_head(tmp_path, name, boundaries):
    """Tokens are those of the whole model, and drafts those of LayerSkip's exit."""
    model = make_model(tmp_path / "theirs", name)
    ours = tmp_path / "ours"
    run(tmp_path / "theirs", "--output", ours, "--exits", *boundaries, "--strict")
    reader = TensorReader(ours)
    assert reader.config().exits.boundaries == boundaries
    assert reader.config().model.tie_embeddings == REAL[name]["tie_word_embeddings"]
    exits = {tensor for tensor in reader.names() if tensor.startswith("exits.")}
    norms = {f"exits.{boundary}.norm.weight" for boundary in (*boundaries, LAYERS)}
    assert exits == norms
    final = reader.tensor(f"exits.{LAYERS}.norm.weight")
    assert all(torch.equal(reader.tensor(norm), final) for norm in norms)

    drafter, length = 2, 3
    with LLM(ours, dtype="float64") as llm:
        params = SamplingParams(max_tokens=16, ignore_eos=True)
        [output] = llm.generate([PROMPT], params, strategy=SelfSpeculation(drafter, length))
    tokens = list(PROMPT)
    for _ in range(16):
        tokens.append(greedy(model, LAYERS, tokens))
    assert list(output.token_ids) == tokens[len(PROMPT) :]
    drafted, accepted = expected_drafts(model, drafter, length, tokens)
    assert (output.num_drafted, output.num_accepted) == (drafted, accepted)
    assert 0 < accepted < drafted


def expected_drafts(model, boundary, length, tokens):
    """Return how many tokens LayerSkip's algorithm drafts and accepts for the text `tokens`."""
    position, drafted, accepted = len(PROMPT), 0, 0
    while position < len(tokens):
        drafts = list(tokens[:position])
        while len(drafts) < min(position + length, len(tokens) - 1):
            drafts.append(greedy(model, boundary, drafts))
        count = len(drafts) - position
        right = 0
        while right < count and drafts[position + right] == tokens[position + right]:
            right += 1
        drafted, accepted, position = drafted + count, accepted + right, position + right + 1
    return drafted, accepted
