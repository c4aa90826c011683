"""`sled` and `dola` against NumPy formulas on the hidden states of transformers.

Nothing here uses our model, engine or formulas, except for the side that is tested.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ee_llm import LLM, SLED, DoLa, SamplingParams, convert
from tests.unit.conversion.huggingface.folders import make_folder
from tests.unit.inference.models import random_tokens
from tests.unit.inference.peers import make_precise

NUM_TOKENS = 12
PROMPTS = [random_tokens(length, seed=length).tolist() for length in (3, 7, 12)]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def sled(
    final: np.ndarray,
    early: list[np.ndarray],
    rate: float,
    scale: int,
    tau: float = 1.0,
    is_released: bool = False,
) -> np.ndarray:
    """Return logits by algorithm 1 of arXiv 2411.02433, or with the differences of its code."""
    top = np.argsort(-final, kind="stable")[:scale]
    own = np.arange(len(final)) if is_released else top
    p = softmax(final / tau)
    similarities = np.zeros((len(early), scale))
    for n, logits in enumerate(early):
        q = softmax(logits / tau)
        for j, token in enumerate(top):
            a, b = (logits - final)[own], (q - np.eye(len(final))[token])[own]
            similarities[n, j] = max(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), 0.0)
    if is_released:
        similarities **= 2
    target = similarities.sum(axis=0) / similarities.sum()
    evolved = np.full_like(final, -np.inf)
    evolved[top] = final[top] - rate / tau * (p[top] - target)
    return evolved


def dola(final: np.ndarray, early: list[np.ndarray], alpha: float = 0.1) -> np.ndarray:
    """Return logits by the formulas of arXiv 2309.03883."""
    p, candidates = softmax(final), [softmax(logits) for logits in early]

    def divergence(q: np.ndarray) -> float:
        m = (p + q) / 2
        return float((p * np.log(p / m)).sum() / 2 + (q * np.log(q / m)).sum() / 2)

    q = max(candidates, key=divergence)
    return np.where(p >= alpha * p.max(), np.log(p) - np.log(q), -np.inf)


# Strategy, the boundaries that it should read, whether they pass the final norm, and the formula.
CASES: dict[str, tuple[Any, tuple[int, ...], bool, Callable[..., np.ndarray]]] = {
    "sled": ("sled", (1, 2, 3, 4), True, lambda f, e: sled(f, e, 1.0, 10)),
    "sled, high rate": (
        SLED(rate=8.0, scale=20, tau=0.5),
        (1, 2, 3, 4),
        True,
        lambda f, e: sled(f, e, 8.0, 20, tau=0.5),
    ),
    "sled, two layers": (
        SLED(rate=5.0, scale=5, layers=(0, 3)),
        (0, 3),
        True,
        lambda f, e: sled(f, e, 5.0, 5),
    ),
    "sled as released": (
        SLED(rate=6.0, variant="released"),
        (0, 1, 2, 3, 4),
        False,
        lambda f, e: sled(f, e, 6.0, 10, is_released=True),
    ),
    "dola, static": (DoLa(layers=2), (2,), True, dola),
    "dola, high": (DoLa(layers="high"), (2, 4), True, dola),
    "dola, all layers": (
        DoLa(layers=(0, 1, 2, 3, 4), alpha=0.02),
        (0, 1, 2, 3, 4),
        True,
        lambda f, e: dola(f, e, 0.02),
    ),
    "dola, without the norm": (DoLa(layers=(1, 3), head="raw"), (1, 3), False, dola),
}


def decode(
    model: Any,
    prompt: list[int],
    layers: tuple[int, ...],
    has_norm: bool,
    formula: Callable[..., np.ndarray],
) -> tuple[int, ...]:
    """Return the greedy continuation with a model of transformers, without a cache."""
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            output = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
            rows = [output.hidden_states[layer][0, -1] for layer in layers]
            early = [model.lm_head(model.model.norm(x) if has_norm else x).numpy() for x in rows]
        logits = formula(output.logits[0, -1].numpy(), early)
        second, first = np.sort(logits)[-2:]
        assert first - second > 1e-6  # rounding does not decide the token
        tokens.append(int(logits.argmax()))
    return tuple(tokens[len(prompt) :])


@pytest.fixture(scope="module", params=["llama 3", "llama 3 tied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a random Llama of transformers, and the converted model, in float64."""
    transformers = pytest.importorskip("transformers")
    path: Path = tmp_path_factory.mktemp("llama")
    folder = make_folder(path / "hub", request.param)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    make_precise(theirs.eval())
    convert(str(folder), output=path / "ours")
    with LLM(path / "ours", dtype="float64") as ours:
        yield theirs, ours


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_those_of_transformers_hidden_states(pair: Any, name: str) -> None:
    theirs, ours = pair
    strategy, layers, has_norm, formula = CASES[name]
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    made = ours.generate(PROMPTS, params, strategy=strategy)
    plain = [output.token_ids for output in ours.generate(PROMPTS, params, strategy="full")]
    expected = [decode(theirs, prompt, layers, has_norm, formula) for prompt in PROMPTS]
    assert [output.token_ids for output in made] == expected
    # A default rate of 1 may leave every greedy token of these models as it is.
    assert expected != plain or strategy == "sled"
