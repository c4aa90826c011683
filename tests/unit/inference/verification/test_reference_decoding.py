"""Test the reference generator, and the certificate that checks its output."""

import dataclasses

import pytest
import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.inference.exits.confidence import OF_LOGITS
from ee_llm.inference.exits.policy import ExitPolicy, make_exit_policy
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.sampling.sampler import sample
from ee_llm.inference.strategies import STRATEGIES
from ee_llm.inference.verification.certificate import verify_trace
from ee_llm.inference.verification.reference_decoding import generate_reference
from tests.unit.inference.models import random_tokens, tiny_config, tiny_model

pytestmark = pytest.mark.thorough

PROMPT = random_tokens(5, seed=3).tolist()
GREEDY = SamplingParams()
SETTINGS = {field.name for field in dataclasses.fields(SamplingParams)}
DRAWN = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, seed=4)
PENALISED = SamplingParams(temperature=0.7, min_p=0.05, repetition_penalty=1.4, seed=2)


def _generate(
    model: ReferenceModel, policy: ExitPolicy, sampling: SamplingParams = GREEDY, **options
) -> RequestOutput:
    settings = {"max_tokens": 20} | {name: options.pop(name) for name in SETTINGS & {*options}}
    return generate_reference(
        model, PROMPT, policy, dataclasses.replace(sampling, **settings), **options
    )


def _balanced_policy(model: ReferenceModel, measure: str) -> ExitPolicy:
    """Return a policy whose thresholds about half of the rows reach."""
    logits = model.forward(random_tokens(32, seed=8))
    medians = [float(OF_LOGITS[measure](logits[boundary]).median()) for boundary in (1, 2)]
    return make_exit_policy((1, 2), medians, measure)


@pytest.mark.parametrize("measure", OF_LOGITS)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, PENALISED])
@pytest.mark.parametrize("head", [("norm",), ("block", "mlp", "norm")])
def test_tokens_and_exits_match_the_definition(
    measure: str, sampling: SamplingParams, head: tuple[str, ...]
) -> None:
    """The test implements the definition again, with one forward pass over the sequence."""
    model = tiny_model(tiny_config(head=head, temperatures=(1.0, 0.7)))
    policy = _balanced_policy(model, measure)
    lowest = dict(zip(policy.boundaries, policy.thresholds, strict=True))
    made = _generate(model, policy, sampling)
    logits = model.forward(torch.tensor([*made.prompt_token_ids, *made.token_ids])[:-1])
    for index, token in enumerate(made.token_ids):
        row = len(PROMPT) - 1 + index
        first, second = (float(policy.confidence(logits[b][row])) for b in (1, 2))
        exit = 1 if first >= lowest[1] else 2 if second >= lowest[2] else 4
        assert made.exits[index] == exit
        history = [*made.prompt_token_ids, *made.token_ids][: row + 1]
        assert token == sample(logits[exit][row], sampling, row, history)
        confidence = float(policy.confidence(logits[exit][row]))
        assert made.confidences[index] == pytest.approx(confidence, abs=1e-9)
        logprob = float(logits[exit][row].log_softmax(dim=0)[token])
        assert made.logprobs[index] == pytest.approx(logprob, abs=1e-9)
    assert len(set(made.exits)) == 3, "the test needs tokens at every exit"
    assert made.mean_depth == sum(made.exits) / 20


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_thresholds_above_every_confidence_equal_full(sampling: SamplingParams) -> None:
    model = tiny_model()
    full = _generate(model, make_exit_policy((1, 2), [0.01]), sampling, strategy="full")
    for thresholds in ([1.0], [None], [None, 1.0]):
        exact = _generate(model, make_exit_policy((1, 2), thresholds), sampling)
        assert exact.token_ids == full.token_ids
        assert exact.exits == full.exits == (4,) * 20
        assert exact.confidences == full.confidences
        assert exact.logprobs == full.logprobs


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_self_speculative_is_full_by_definition(sampling: SamplingParams) -> None:
    model, policy = tiny_model(), make_exit_policy((1, 2), [0.1])
    full = _generate(model, policy, sampling, strategy="full")
    made = _generate(model, policy, sampling, strategy="self-speculative")
    assert made == dataclasses.replace(full, strategy="self-speculative")
    assert set(made.exits) == {4}
    (found,) = verify_trace(model, dataclasses.replace(made, exits=(1, *made.exits[1:])))
    assert (found.index, found.expected, found.margin) == (0, 4, float("inf"))


def test_repetition_penalty_changes_tokens_but_no_confidence() -> None:
    """Confidence and log probability refer to the exit's own logits, before the penalty."""
    model, policy = tiny_model(), make_exit_policy((1, 2), [0.4])
    plain = _generate(model, policy)
    made = _generate(model, policy, SamplingParams(repetition_penalty=50.0))
    assert len(set(made.token_ids)) > len(set(plain.token_ids))
    first = next(i for i in range(20) if made.token_ids[i] != plain.token_ids[i])
    assert made.exits[: first + 1] == plain.exits[: first + 1]
    assert made.confidences[: first + 1] == plain.confidences[: first + 1]
    assert made.logprobs[first] < plain.logprobs[first]


def test_a_threshold_below_every_confidence_exits_at_the_first_exit() -> None:
    made = _generate(tiny_model(), make_exit_policy((1, 2), [1e-9]))
    assert made.exits == (1,) * 20
    assert made.mean_depth == 1.0


def test_deeper_layers_do_not_affect_an_exited_token() -> None:
    """A model that is broken above the exit generates the same tokens."""
    policy = make_exit_policy((1, 2), [1e-9])
    config = tiny_config()
    expected = _generate(tiny_model(config), policy)
    broken = tiny_model(config)
    broken._tensors["layers.2.mlp.linear_fc2.weight"].fill_(float("nan"))
    assert _generate(broken, policy) == expected
    with pytest.raises(ValueError, match=r"exit at boundary 4 .* not finite"):
        _generate(broken, policy, strategy="full")


def test_a_generation_can_be_continued_from_any_of_its_tokens() -> None:
    """Continuing from a prefix of a generation changes nothing, even with sampling."""
    model, policy = tiny_model(), make_exit_policy((1, 2), [0.4])
    whole = _generate(model, policy, DRAWN)
    torch.manual_seed(0)
    head = _generate(model, policy, DRAWN, max_tokens=7)
    rest = generate_reference(
        model, [*PROMPT, *head.token_ids], policy, dataclasses.replace(DRAWN, max_tokens=13)
    )
    assert head.token_ids + rest.token_ids == whole.token_ids
    assert head.exits + rest.exits == whole.exits
    other = _generate(model, policy, dataclasses.replace(DRAWN, seed=5))
    assert other.token_ids != whole.token_ids


def test_finish_reasons() -> None:
    model, policy = tiny_model(), make_exit_policy((1, 2), [0.4])
    made = _generate(model, policy)
    assert made.finish_reason == "length"
    eos = made.token_ids[6]
    stopped = _generate(model, policy, eos_token_ids=(98, eos))
    assert stopped.finish_reason == "eos"
    assert stopped.token_ids == made.token_ids[: made.token_ids.index(eos) + 1]
    context = _generate(model, policy, max_tokens=1000)
    assert context.finish_reason == "context"
    assert len(PROMPT) + len(context.token_ids) == 32 + 1  # the last token does not run
    stopped = _generate(model, policy, stop_token_ids=(99, eos))
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == made.token_ids[: made.token_ids.index(eos) + 1]
    assert (
        _generate(model, policy, eos_token_ids=[eos], stop_token_ids=[eos]).finish_reason == "eos"
    )
    full_prompt = random_tokens(32).tolist()
    assert len(generate_reference(model, full_prompt, policy, GREEDY).token_ids) == 1


def test_on_token_is_called_for_each_token() -> None:
    seen = []
    made = _generate(tiny_model(), make_exit_policy((1, 2), [0.4]), on_token=seen.append)
    assert tuple((d.token_id, d.exit, d.confidence, d.logprob) for d in seen) == tuple(
        zip(made.token_ids, made.exits, made.confidences, made.logprobs, strict=True)
    )


def test_errors_name_invalid_input() -> None:
    model, policy = tiny_model(), make_exit_policy((1, 2), [0.4])
    for prompt, options, message in (
        ([], {}, "prompt is empty"),
        (random_tokens(33).tolist(), {}, r"33 .*model\.max_seq_length = 32"),
        ([40], {}, "vocab_size = 40"),
        ([1], {"strategy": "fast"}, "strategy 'fast'"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_reference(model, prompt, policy, GREEDY, **options)
    with pytest.raises(ValueError, match=r"\[1, 3\].*\[1, 2\]"):
        generate_reference(model, [1], make_exit_policy((1, 3), [0.4]), GREEDY)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, PENALISED])
def test_certificate_passes_generations(sampling: SamplingParams, strategy: str) -> None:
    for family in ("llama", "gpt"):
        model = tiny_model(tiny_config(family, head=("block", "mlp", "norm")))
        made = _generate(model, make_exit_policy((1, 2), [0.4]), sampling, strategy=strategy)
        assert verify_trace(model, made) == []


def _assert_wrong_token_is_found(
    model: ReferenceModel, made: RequestOutput, index: int, token: int
) -> None:
    wrong = (token + 1) % 40
    tokens = (*made.token_ids[:index], wrong, *made.token_ids[index + 1 :])
    found = verify_trace(model, dataclasses.replace(made, token_ids=tokens))
    assert (found[0].index, found[0].kind) == (index, "token")
    assert (found[0].found, found[0].expected) == (wrong, token)
    assert found[0].margin > 0


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_certificate_finds_every_single_change(sampling: SamplingParams) -> None:
    """Each exit and token is replaced in turn; its divergence must be the first reported."""
    model = tiny_model()
    made = _generate(model, make_exit_policy((1, 2), [0.5, 0.3]), sampling)
    for index, (exit, token) in enumerate(zip(made.exits, made.token_ids, strict=True)):
        for wrong in {1, 2, 4, 3} - {exit}:
            exits = (*made.exits[:index], wrong, *made.exits[index + 1 :])
            found = verify_trace(model, dataclasses.replace(made, exits=exits))
            assert (found[0].index, found[0].kind) == (index, "exit")
            assert (found[0].found, found[0].expected) == (wrong, exit)
            assert found[0].margin > (1e10 if wrong == 3 else 0)
            assert {d.index for d in found} == {index}
        _assert_wrong_token_is_found(model, made, index, token)


def test_certificate_finds_another_policy_seed_and_position() -> None:
    model = tiny_model()
    made = _generate(model, make_exit_policy((1, 2), [0.5, 0.3]), DRAWN)
    for change in (
        {"policy": make_exit_policy((1, 2), [0.5, 0.9])},
        {"policy": make_exit_policy((1, 2), [0.5, 0.3], "margin")},
        {"strategy": "full"},
        {"sampling_params": dataclasses.replace(DRAWN, seed=5)},
        {"prompt_token_ids": (1, *made.prompt_token_ids)},
    ):
        assert verify_trace(model, dataclasses.replace(made, **change))


def test_margin_of_an_exit_is_the_distance_to_its_threshold() -> None:
    model = tiny_model()
    made = _generate(model, make_exit_policy((1, 2), [1e-9]), max_tokens=1)
    (confidence,) = made.confidences
    claimed = dataclasses.replace(made, policy=make_exit_policy((1, 2), [confidence + 0.01, None]))
    (found,) = verify_trace(model, claimed)
    assert (found.found, found.expected) == (1, 4)
    assert found.margin == pytest.approx(0.01, abs=1e-9)
    (found, *_) = verify_trace(model, dataclasses.replace(made, exits=(4,)))
    assert (found.found, found.expected) == (4, 1)
    assert found.margin >= confidence - 1e-9


def test_certificate_distinguishes_rounding_from_errors() -> None:
    """A float32 generation diverges from float64 only by rounding."""
    config = tiny_config()
    for seed in range(5):
        sampling = dataclasses.replace(DRAWN, seed=seed)
        made = _generate(
            tiny_model(config, dtype=torch.float32), make_exit_policy((1, 2), [0.4]), sampling
        )
        assert all(d.margin < 1e-4 for d in verify_trace(tiny_model(config), made))


def test_an_exit_that_is_off_is_never_evaluated() -> None:
    """It may be untrained or broken, and no token can exit there."""
    model, policy = tiny_model(), make_exit_policy((1, 2), [0.4, None])
    model._tensors["exits.2.norm.weight"].fill_(float("nan"))
    made = _generate(model, policy)
    assert verify_trace(model, made) == []
    at_four = made.exits.index(4)
    exits = (*made.exits[:at_four], 2, *made.exits[at_four + 1 :])
    (found,) = verify_trace(model, dataclasses.replace(made, exits=exits))
    assert (found.index, found.expected, found.margin) == (at_four, 4, float("inf"))


def test_certificate_refuses_invalid_generations() -> None:
    model = tiny_model()
    made = _generate(model, make_exit_policy((1, 2), [0.4]))
    for change in ({"token_ids": ()}, {"exits": made.exits[1:]}, {"prompt_token_ids": ()}):
        with pytest.raises(ValueError, match="not a finished sequence"):
            verify_trace(model, dataclasses.replace(made, **change))
    with pytest.raises(ValueError, match="vocab_size = 40"):
        verify_trace(model, dataclasses.replace(made, token_ids=(*made.token_ids[:-1], 40)))


def test_certificate_ignores_end_tokens_outside_the_vocabulary() -> None:
    """They come from a file, and a record of a generation may claim any."""
    model = tiny_model()
    policy = make_exit_policy((1, 2), [0.4])
    made = _generate(model, policy, min_tokens=4, max_tokens=4, eos_token_ids=[3, 40])
    assert verify_trace(model, made) == []
    assert verify_trace(model, dataclasses.replace(made, eos_token_ids=(3, 2**31 - 1))) == []
    params = dataclasses.replace(made.sampling_params, stop_token_ids=(10**30,))
    assert verify_trace(model, dataclasses.replace(made, sampling_params=params)) == []


def test_certificate_of_propagate_finds_every_single_change() -> None:
    """Later rows read the keys and values of the changed one, so its divergence is first."""
    model = tiny_model(tiny_config(head=("block", "norm")))
    policy = _balanced_policy(model, "max_probability")
    made = _generate(model, policy, DRAWN, strategy="propagate")
    assert set(made.exits) == {1, 2, 4}
    for index, (exit, token) in enumerate(zip(made.exits, made.token_ids, strict=True)):
        for wrong in {0, 1, 2, 3, 4, 9} - {exit}:
            exits = (*made.exits[:index], wrong, *made.exits[index + 1 :])
            found = verify_trace(model, dataclasses.replace(made, exits=exits))
            assert (found[0].index, found[0].kind, found[0].found) == (index, "exit", wrong)
            too_early = wrong in (1, 2) and wrong < exit  # exits in between have the same effect
            assert found[0].expected == (4 if too_early else exit)
            assert (found[0].margin == float("inf")) == (wrong in (0, 3, 9))
        _assert_wrong_token_is_found(model, made, index, token)


def test_certificate_of_propagate_uses_nothing_above_an_exit() -> None:
    """If every token exits at the first exit, the layers above it have no effect."""
    model, policy = tiny_model(), make_exit_policy((1, 2), [1e-9])
    made = _generate(model, policy, DRAWN, strategy="propagate")
    model._tensors["layers.2.mlp.linear_fc2.weight"].fill_(float("nan"))
    assert _generate(model, policy, DRAWN, strategy="propagate") == made
    assert verify_trace(model, made) == []
