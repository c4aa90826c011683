"""The fit of all boundaries at once against `least_squares`."""

from pathlib import Path

import pytest
import torch

from ee_llm.checkpoint.read import TensorReader
from ee_llm.data.windows import Windows
from ee_llm.evaluation.probe.backbone import Backbone, probed_config
from ee_llm.evaluation.probe.measure import fit
from ee_llm.inference.exits.least_squares import least_squares
from tests.unit.evaluation.models import make_config, save, write_data
from tests.unit.evaluation.probe.models import FIT, LENGTH, documents

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_translators_are_those_of_least_squares(tmp_path: Path, family: str) -> None:
    reader = TensorReader(save(tmp_path / "dense", make_config(family, boundaries=())))
    windows = Windows([write_data(tmp_path / "data", documents(FIT))], LENGTH, None)
    config, boundaries = reader.config(), (1, 2, 3)
    expected = least_squares(reader, probed_config(config, boundaries), boundaries, windows)
    model = config.model
    num_tokens: list[int] = []
    found = fit(
        Backbone(reader, boundaries, LENGTH), boundaries, windows, model.vocab_size,
        model.hidden_size, model.norm_eps, num_tokens.append,
    )  # fmt: skip
    assert sum(num_tokens) == windows.num_tokens
    for boundary, (weight, bias) in found.items():
        name = f"exits.{boundary}.translator"
        torch.testing.assert_close(weight, expected[f"{name}.weight"], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(bias, expected[f"{name}.bias"], rtol=1e-8, atol=1e-10)
