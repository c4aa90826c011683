"""Test the evaluation of decoded text, the choice of thresholds, controls and transformers."""

from dataclasses import replace

import pytest
import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.verification.certificate import tolerance
from ee_llm.inference.verification.reference_decoding import generate_reference
from tests.unit.inference.models import random_tensors, random_tokens, tiny_config
from tools.bench.decode_model import Model, Weights, count_weights, excerpts, nearest_exit, truncate
from tools.bench.decode_peers import Peer
from tools.bench.decode_quality import (
    Choices,
    Control,
    Dense,
    all_controls,
    calibrate,
    common_prefix,
    controls,
    depth_of,
    exit_choices,
)

POLICY = make_exit_policy((1, 2), (0.3,))


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens)


def three_exits() -> Choices:
    """Ten rows. Exit 1 is correct for 5 of them, exit 2 for 8; the final exit is at 4."""
    dense = torch.zeros(10, dtype=torch.int64)
    first, second = dense.clone(), dense.clone()
    first[5:], second[8:] = 1, 1
    falling = torch.arange(10, 0, -1) / 10.0  # 1.0, 0.9, .. 0.1
    return Choices({1: first, 2: second, 4: dense}, {1: falling, 2: falling.roll(1), 4: falling})


def test_controls_compare_exits_at_one_mean_depth():
    # Rows 0 to 5 exit at 1 (row 5 is wrong), and rows 6 to 8 at 2 (row 8 is wrong).
    found = {
        c.name: c for c in controls(three_exits(), make_exit_policy((1, 2), (0.5, 0.3)), "a text")
    }
    assert found["exits by confidence"].mean_depth == pytest.approx((6 * 1 + 3 * 2 + 4) / 10)
    assert found["exits by confidence"].agreement == pytest.approx(0.8)
    random = found["exits at random rows"]
    assert random.mean_depth == found["exits by confidence"].mean_depth
    assert random.agreement == pytest.approx(0.6 * 0.5 + 0.3 * 0.8 + 0.1)
    assert found["all at exit 1"] == Control("all at exit 1", "a text", 1.0, 0.5)
    assert found["all at exit 2"] == Control("all at exit 2", "a text", 2.0, 0.8)


def test_calibration_finds_the_cheapest_policy_with_enough_agreement():
    weights = Weights(layer=10, heads={1: 1, 2: 1, 4: 1})
    # From 0.51 on, rows 0 to 4 exit at 1 and row 5 at 2, all of them correct, at a cost of 24.9.
    # Exit 1 alone costs 26.5. Exit 2 alone is correct from 0.31 on and costs 27.3.
    assert calibrate(three_exits(), weights, min_agreement=1.0).thresholds == (0.51, 0.51)
    costly = Weights(layer=10, heads={1: 1, 2: 10, 4: 1})
    assert calibrate(three_exits(), costly, min_agreement=1.0).thresholds == (0.51, None)
    costly = Weights(layer=10, heads={1: 10, 2: 1, 4: 1})
    assert calibrate(three_exits(), costly, min_agreement=1.0).thresholds == (None, 0.31)
    assert calibrate(three_exits(), weights, min_agreement=0.5).thresholds == (0.01, None)
    # A head that costs more than the layers above it is not used.
    costly = Weights(layer=10, heads={1: 100, 2: 100, 4: 1})
    assert calibrate(three_exits(), costly, min_agreement=0.5).thresholds == (None, None)


def test_depths_are_rounded_to_whole_layers():
    assert [depth_of(Control("", "", depth, 1.0)) for depth in (0.2, 2.49, 2.5, 6.6)] == [
        1,
        2,
        3,
        7,
    ]


def test_common_prefix_ends_at_the_first_difference():
    assert common_prefix((1, 2, 3, 4), (1, 2, 9, 4)) == 2
    assert common_prefix((1, 2), (1, 2)) == 2
    assert common_prefix((1,), (2,)) == 0


@pytest.fixture(scope="module")
def model() -> Model:
    config = tiny_config()
    return Model(config, random_tensors(config), random_tokens(400, seed=5).tolist())


def test_agreement_is_with_the_dense_models_choice_after_the_recorded_text(model):
    dense = Dense(model)
    prompt = tuple(model.text[:5])
    own = generate_reference(dense.reference, prompt, POLICY, greedy(8), "full").token_ids
    assert dense.agreement(prompt, own) == 1.0
    # A wrong token counts once. Later tokens are compared given this token.
    changed = (*own[:3], (own[3] + 1) % 40)
    after = generate_reference(dense.reference, (*prompt, *changed), POLICY, greedy(4), "full")
    assert dense.agreement(prompt, (*changed, *after.token_ids)) == 7 / 8


def test_the_certificate_counts_divergences(model):
    dense = Dense(model)
    prompt = tuple(model.text[:5])
    good = generate_reference(dense.reference, prompt, POLICY, greedy(6), "exact")
    wrong = replace(good, token_ids=(*good.token_ids[:5], (good.token_ids[5] + 1) % 40))
    within = replace(tolerance(torch.float64), token=1e9)
    for limits, passed in ((tolerance(torch.float64), 1), (within, 2)):
        found = dense.certify([good, wrong], limits)
        assert (found.num_tokens, found.num_divergent, found.num_generations) == (12, 1, 2)
        assert found.num_passed == passed
        assert found.largest_token > 0
        assert found.largest_exit == 0


def test_rounding_does_not_explain_a_wrong_exit(model):
    dense = Dense(model)
    made = generate_reference(dense.reference, tuple(model.text[:5]), POLICY, greedy(6), "exact")
    moved = tuple(4 if exit != 4 else 1 for exit in made.exits)
    found = dense.certify([replace(made, exits=moved)], tolerance(torch.float32))
    assert (found.num_passed, found.num_divergent) == (0, 6)
    assert found.largest_exit > tolerance(torch.float32).exit


def test_choices_are_those_of_the_rows_after_the_prompt(model):
    reference = Dense(model).reference
    texts = [model.text[:12], model.text[20:32]]
    choices = exit_choices(reference, texts, num_prompt=4)
    logits = [reference.forward(torch.tensor(text[:-1])) for text in texts]
    for boundary in (1, 2, 4):
        expected = torch.cat([one[boundary][3:].argmax(-1) for one in logits])
        assert choices.tokens[boundary].tolist() == expected.tolist()
        confidences = torch.cat([one[boundary][3:].softmax(-1).amax(-1) for one in logits])
        assert torch.allclose(choices.confidences[boundary], confidences)


@pytest.mark.parametrize("output", ["shared", "own"])
def test_a_model_truncated_at_an_exit_equals_that_exit(output):
    config = tiny_config(output=output, tie_embeddings=True)
    model = Model(config, random_tensors(config), [])
    tokens = random_tokens(12)
    whole = ReferenceModel(config, model.tensors, torch.float64).forward(tokens)
    for depth in (1, 2, 4):
        shorter = truncate(model, depth)
        truncated = ReferenceModel(shorter.config, shorter.tensors, torch.float64)
        assert torch.equal(truncated.forward(tokens)[depth], whole[depth])
    assert nearest_exit(config, 3) == 4  # as near as exit 2, but deeper
    deepest = truncate(model, 3)
    assert torch.equal(deepest.tensors["exits.3.norm.weight"], model.tensors["exits.4.norm.weight"])


def test_the_truncated_control_is_evaluated_on_the_same_rows(model):
    reference = Dense(model).reference
    texts = {"a": [model.text[:20], model.text[40:60]], "b": [model.text[80:100]]}
    # All rows exit at 2, so the model is truncated to 2 layers.
    found = all_controls(
        model, reference, make_exit_policy((1, 2), (None, 1e-9)), texts, num_prompt=4
    )
    of_a, of_b = found[:5], found[5:]
    for text, own in (("a", of_a), ("b", of_b)):
        assert {control.text for control in own} == {text}
        by_name = {control.name: control.agreement for control in own}
        assert by_name["truncated to 2 layers"] == by_name["all at exit 2"]
    assert of_a[0].agreement != of_b[0].agreement
    full = all_controls(model, reference, make_exit_policy((1, 2), (None,)), texts, num_prompt=4)
    assert full[4] == Control("truncated to 4 layers", "a", 4.0, 1.0)


def test_weights_are_counted_from_the_tensors():
    config = tiny_config(output="own")
    found = count_weights(Model(config, random_tensors(config), []))
    qkv, proj, mlp = 32 * 64, 32 * 32, 3 * 32 * 48
    assert found.layer == qkv + proj + mlp + 2 * 32
    assert found.heads == dict.fromkeys((1, 2, 4), 40 * 32 + 32)


def test_excerpts_are_evenly_spaced():
    text = list(range(100))
    assert [excerpt[0] for excerpt in excerpts(text, 4, 10)] == [0, 30, 60, 90]
    assert excerpts(text, 1, 10) == [tuple(range(10))]
    with pytest.raises(ValueError, match="into the 100 tokens"):
        excerpts(text, 11, 10)


@pytest.mark.parametrize("output", ["shared", "own"])
def test_transformers_generates_the_same_text_with_and_without_drafts(output):
    pytest.importorskip("transformers")
    config = tiny_config(output=output)
    model = Model(config, random_tensors(config), [])
    reference = ReferenceModel(config, model.tensors, torch.float64)
    prompt = tuple(random_tokens(6).tolist())
    expected = generate_reference(reference, prompt, POLICY, greedy(12), "full").token_ids
    peer = Peer(model, torch.float64)
    assert peer.decode([prompt, prompt], 12).tokens == [expected, expected]
    peer.draft_at(model, 2)
    depths = []
    norm = peer._model.model.norm
    norm.register_forward_hook(lambda *_: depths.append(norm._config.num_hidden_layers))
    for length in (None, 3):
        depths.clear()
        assert peer.decode_assisted(prompt, 12, 2, length).tokens == [expected]
        assert set(depths) == {2, 4}
    assert depths[:4] == [2, 2, 2, 4]
    # While drafting, it equals our exit up to the rotary factors, which it computes in float32.
    peer._model.model.config.num_hidden_layers = 2
    logits = peer._model(torch.tensor([prompt])).logits[0]
    assert torch.allclose(logits, reference.forward(torch.tensor(prompt))[2], atol=1e-4)


def test_models_that_transformers_does_not_support_are_refused():
    config = tiny_config("gpt")
    with pytest.raises(ValueError, match="--no-peers"):
        Peer(Model(config, random_tensors(config), []), torch.float32)
