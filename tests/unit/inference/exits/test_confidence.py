"""Measures of confidence that need more than the logits of one exit."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ee_llm.architecture.gates import Gate, gate_shapes
from ee_llm.architecture.reference import ReferenceModel
from ee_llm.architecture.tensors import take_tensors
from ee_llm.errors import RequestError, UserError
from ee_llm.inference.choices import MEASURES
from ee_llm.inference.engine import Engine
from ee_llm.inference.execution.head import Projection
from ee_llm.inference.exits.confidence import agreement, candidates, saturation, shortlist
from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.strategies import STRATEGIES, SelfSpeculation, resolve_strategy
from ee_llm.inference.verification.certificate import verify_trace
from ee_llm.inference.verification.confidences import RowConfidences
from ee_llm.inference.verification.reference_decoding import generate_reference
from tests.unit.inference.fuzz import RANGES
from tests.unit.inference.models import random_gates, random_tensors, tiny_config

CONFIG = tiny_config(boundaries=(1, 2, 3))
TENSORS = random_tensors(CONFIG) | random_gates(CONFIG)
MODEL = ReferenceModel(CONFIG, TENSORS, torch.float64)


def test_agreement_is_the_probability_of_the_previous_exits_token() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]] * 3, dtype=torch.float64).log()
    found = agreement(logits, torch.tensor([0, 2, -1]))
    assert found.tolist() == pytest.approx([0.5, 0.25, 0.0])


def test_shortlist_compares_the_best_tokens_of_the_first_exit() -> None:
    first = torch.arange(40.0).flip(0)[None]
    ids = candidates(first)
    assert ids.tolist() == [list(range(16))]
    later = torch.full((1, 40), 5.0, dtype=torch.float64)
    later[0, :16] = torch.tensor([0.75] + [0.25 / 15] * 15, dtype=torch.float64).log()
    assert float(shortlist(later.gather(-1, ids))) == pytest.approx(0.75)


def test_saturation_is_a_cosine_of_at_least_0() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    before = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert saturation(x, before).tolist() == pytest.approx([1.0, math.sqrt(0.5), 0.0])


def test_gate_is_a_small_network_in_float32_at_least() -> None:
    tensors = random_gates(CONFIG, dtype=torch.float32)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gate = Gate(tensors, 2, 1e-5)
    w1, b1, w2, b2 = (tensors[name].double() for name in gate_shapes(2, 32, 6))
    rms = (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    expected = torch.sigmoid(F.silu(x / rms @ w1.T + b1) @ w2[0] + b2)
    torch.testing.assert_close(gate(x), expected, rtol=1e-12, atol=0)
    assert gate(x.bfloat16()).dtype == torch.float32
    served = take_tensors(CONFIG, TENSORS, torch.bfloat16)
    assert served["gates.2.linear_1.weight"].dtype == torch.float32


def test_gates_that_do_not_fit_the_model_are_refused() -> None:
    name = "gates.2.linear_2.weight"
    for wrong in ({name: torch.zeros(1, 5)}, {"gates.4.linear_1.weight": torch.zeros(6, 32)}):
        with pytest.raises(UserError, match=r"gate tensor gates\.. has shape|gate tensor gates"):
            take_tensors(CONFIG, TENSORS | wrong, torch.float32)
    without = {key: value for key, value in TENSORS.items() if key != name}
    with pytest.raises(UserError, match=f"gate tensor {name} has shape None"):
        take_tensors(CONFIG, without, torch.float32)


def _request(measure: str, strategy: str, threshold: float) -> Request:
    draft = None
    if strategy == "self-speculative":
        draft = SelfSpeculation(2, 3, None if measure == "agreement" else threshold)
    policy = make_exit_policy((1, 2, 3), [threshold], measure)
    params = SamplingParams(max_tokens=14)
    contrast = None
    if strategy in ("sled", "dola"):
        _, _, contrast = resolve_strategy(strategy, CONFIG)
    return Request(f"{threshold}", (1, 2, 3), policy, params, strategy, draft, contrast=contrast)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_passes_the_certificate_under_every_strategy(
    measure: str, strategy: str
) -> None:
    lowest, highest = RANGES.get(measure, (0.05, 0.9))
    requests = [
        _request(measure, strategy, lowest + share * (highest - lowest))
        for share in (0.2, 0.5, 0.8)
    ]
    engine = Engine(CONFIG, TENSORS, torch.float64, deferral="off")
    depths = set()
    for output, request in zip(engine.generate(requests), requests, strict=True):
        assert verify_trace(MODEL, output) == []
        depths |= set(output.exits)
        expected = generate_reference(
            MODEL,
            request.prompt_token_ids,
            request.policy,
            request.sampling_params,
            strategy,
            contrast=request.contrast,
        )
        assert (output.token_ids, output.exits) == (expected.token_ids, expected.exits)
        assert output.confidences == pytest.approx(expected.confidences, abs=1e-9)
        if strategy in ("exact", "propagate"):
            wrong = replace(output, exits=tuple(2 if e != 2 else 4 for e in output.exits))
            assert {one.kind for one in verify_trace(MODEL, wrong)} >= {"exit"}
    if strategy in ("exact", "propagate"):
        assert len(depths) >= 2, "the test needs tokens of several exits"


def test_an_exchange_of_almost_equal_tokens_explains_another_agreement() -> None:
    """The confidence jumps if rounding exchanges the two best tokens of the exit before."""
    policy = make_exit_policy((1, 2), [1.0, 0.3], "agreement")
    config = tiny_config(boundaries=(1, 2))
    tensors = random_tensors(config)
    model = ReferenceModel(config, tensors, torch.float64)
    output = generate_reference(model, (5, 6), policy, SamplingParams(max_tokens=20))
    other = replace(output, exits=tuple(4 if e == 2 else 2 for e in output.exits))
    logits = model.forward(torch.tensor([5, 6, *output.token_ids[:-1]]))
    found = {one.index: one.margin for one in verify_trace(model, other) if one.kind == "exit"}
    assert len(found) == 20
    for index, margin in found.items():
        first, second = (logits[b][1 + index].softmax(-1) for b in (1, 2))
        (one, two), (best, runner_up) = logits[1][1 + index].topk(2)
        gap = float(one - two) / 4
        sign = 1 if output.exits[index] == 2 else -1
        direct = sign * (float(second[best]) - 0.3)
        exchanged = max(gap, sign * (float(second[runner_up]) - 0.3))
        assert margin == pytest.approx(max(0.0, min(direct, exchanged)), abs=1e-12)
        assert first.argmax() == best


def test_an_exchange_at_the_end_of_the_shortlist_explains_another_confidence() -> None:
    """The 16th and the 17th token may be almost equal at the first exit and differ deeper."""
    first = torch.arange(40, dtype=torch.float64).flip(0)[None] * 0.1
    first[0, 16] = first[0, 15] - 1e-9
    later = torch.zeros(1, 40, dtype=torch.float64)
    later[0, 16] = 9.0
    rows = RowConfidences("shortlist", 1, MODEL.gate)
    row, x = torch.tensor([0]), torch.zeros(1, 32, dtype=torch.float64)
    rows.at(1, x, x, row, first)
    [found] = rows.at(2, x, x, row, later)
    assert found.value == pytest.approx(1 / 16)
    assert found.other > 0.99
    assert found.error == pytest.approx(1e-9 / 4, rel=1e-3)


def test_a_gate_decides_before_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that declines an exit by its gate does not compute the exit's logits."""
    counted: list[int] = []
    call = Projection.__call__

    def count(self: Projection, features: torch.Tensor) -> torch.Tensor:
        counted.append(len(features))
        return call(self, features)

    monkeypatch.setattr(Projection, "__call__", count)
    engine = Engine(CONFIG, TENSORS, torch.float64, deferral="off")
    output = engine.generate([_request("gate", "exact", 0.5)])[0]
    assert len(set(output.exits)) > 1
    assert sum(counted) == len(output.token_ids)


REFUSED = {
    "missing gate": ("gate", SelfSpeculation(2, 2, 0.5), "needs a gate for the exit after layer 2"),
    "one exit": ("agreement", SelfSpeculation(2, 2, 0.5), "'agreement' compares two exits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_measures_that_cannot_work_are_refused(case: str) -> None:
    measure, draft, message = REFUSED[case]
    engine = Engine(CONFIG, random_tensors(CONFIG), deferral="off")
    policy = make_exit_policy((1, 2, 3), [0.5], measure)
    with pytest.raises(RequestError, match=message):
        engine.add(Request("a", (1,), policy, SamplingParams(), "self-speculative", draft))
    if measure == "gate":
        with pytest.raises(RequestError, match="after layer 1, .* --train-gate"):
            engine.add(Request("a", (1,), policy))
        engine.add(Request("a", (1,), policy, strategy="full"))
