"""DoLa: divergences worked by hand, and a plain definition of the contrast."""

import math

import pytest
import torch
from torch import Tensor

from ee_llm.inference.decoding.contrast import contrast_logits
from ee_llm.inference.decoding.dola import contrast, jensen_shannon
from ee_llm.inference.decoding.settings import DoLa


def _log(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_divergence_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/4, 3/4): the mean is uniform, and both divergences from it are

    3/4 log(3/2) + 1/4 log(1/2) = 3/4 log 3 - log 2. Disjoint distributions reach log 2.
    """
    p, q = _log(3 / 4, 1 / 4), _log(1 / 4, 3 / 4)
    expected = 3 / 4 * math.log(3.0) - math.log(2.0)
    found = jensen_shannon(p[None], torch.stack([q, p])[None])[0]
    torch.testing.assert_close(found, torch.tensor([expected, 0.0], dtype=torch.float64))
    apart = torch.tensor([[0.0, -800.0]], dtype=torch.float64)
    found = jensen_shannon(apart, apart.flip(-1)[:, None])
    torch.testing.assert_close(found, torch.tensor([[math.log(2.0)]], dtype=torch.float64))


def test_contrast_by_hand() -> None:
    """p = (8, 4, 1, ...) / 16 with a static layer q = (4, 8, 2, 2) / 16, and alpha = 1/4.

    Tokens 0 and 1 have at least a quarter of the highest probability: log(8/4) and log(4/8).
    """
    p, q = _log(8 / 16, 4 / 16, 1 / 16, 3 / 16), _log(4 / 16, 8 / 16, 2 / 16, 2 / 16)
    found = contrast(p[None] + 5.0, q[None, None] - 3.0, DoLa(alpha=0.25))[0]
    low = math.log(1 / 16) - 1000.0
    expected = [math.log(2.0), -math.log(2.0), low, math.log(3 / 2)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    found = contrast(p[None], q[None, None], DoLa(alpha=0.4))[0]
    assert (found > -100).tolist() == [True, True, False, False]


def test_shallowest_layer_is_contrasted_among_equally_divergent_ones() -> None:
    """q = (1/4, 3/4) and (3/4, 1/4) have equal divergences from a uniform p."""
    p, q = _log(1 / 2, 1 / 2), _log(1 / 4, 3 / 4)
    expected = torch.tensor([math.log(2.0), math.log(2 / 3)], dtype=torch.float64)
    for early in (q, q.flip(0)):
        found = contrast(p[None], torch.stack([early, early.flip(0)])[None], DoLa())[0]
        torch.testing.assert_close(found, expected if early is q else expected.flip(0))


def _plain(final: list[float], early: list[list[float]], alpha: float) -> list[float]:
    """Return DoLa's logits of one row from the definition, without tensors."""

    def softmax(logits: list[float]) -> list[float]:
        powers = [math.exp(logit - max(logits)) for logit in logits]
        return [power / sum(powers) for power in powers]

    def divergence(p: list[float], q: list[float]) -> float:
        return sum(
            a / 2 * math.log(2 * a / (a + b)) + b / 2 * math.log(2 * b / (a + b))
            for a, b in zip(p, q, strict=True)
        )

    p = softmax(final)
    q = max((softmax(one) for one in early), key=lambda q: divergence(p, q))
    return [
        math.log(a / b) if a >= alpha * max(p) else math.log(a) - 1000
        for a, b in zip(p, q, strict=True)
    ]


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0])
def test_each_row_is_contrasted_with_its_own_layer(alpha: float, num_layers: int) -> None:
    """As the plain definition, and bit for bit as alone: no average over the batch."""
    generator = torch.Generator().manual_seed(num_layers)
    final = torch.randn(16, 12, generator=generator, dtype=torch.float64) * 2
    early = torch.randn(16, num_layers, 12, generator=generator, dtype=torch.float64) * 2
    settings = DoLa(alpha=alpha)
    found = contrast_logits(final, early, [settings] * 16)
    plain = [_plain(f, e, alpha) for f, e in zip(final.tolist(), early.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(plain, dtype=torch.float64))
    for row in range(16):
        alone = contrast(final[[row]], early[[row]], settings)[0]
        assert torch.equal(found[row], alone)
    chosen = jensen_shannon(final.log_softmax(-1), early.log_softmax(-1)).argmax(-1)
    assert len(set(chosen.tolist())) == num_layers
