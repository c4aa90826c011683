"""The metrics of every exit against a loop over single distributions, and refused input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ee_llm
from ee_llm.errors import CheckpointError, DataError, RequestError, RunError, UserError
from ee_llm.evaluation import measure as measure_module
from ee_llm.evaluation.result import EvaluationResult
from ee_llm.inference.execution.stage import Projection
from tests.unit.evaluation.models import (
    EOS,
    TEXTS,
    TOKENS,
    by_hand,
    make_config,
    reference,
    save,
    write_data,
    write_texts,
)
from tests.unit.inference.models import random_tensors, save_model

pytestmark = pytest.mark.thorough

LENGTH = 16  # tokens of a window


def evaluate(checkpoint: Path, **arguments: Any) -> EvaluationResult:
    defaults: dict[str, Any] = {"seq_length": LENGTH, "dtype": "float64"}
    return ee_llm.evaluate(checkpoint, **{**defaults, **arguments})


def assert_equal(result: EvaluationResult, expected: dict[int, dict[str, float]]) -> None:
    assert [one.boundary for one in result.exits] == sorted(expected)
    assert [one.is_final for one in result.exits] == [*[False] * (len(expected) - 1), True]
    for one in result.exits:
        found = {
            "loss": one.loss,
            "agreement": one.agreement,
            "kl": one.kl_to_final,
            "confidence": one.confidence,
        }
        assert found == pytest.approx(expected[one.boundary], rel=1e-11, abs=1e-13)


MODELS: dict[str, dict[str, Any]] = {
    "shared": {"temperatures": (1.5, 0.5)},
    "own": {"output": "own", "head": ("mlp", "norm")},
    "tied": {"output": "tied", "tie_embeddings": True, "head": ()},
    "block": {"output": "own", "head": ("block", "mlp", "norm")},
    "gpt": {"family": "gpt"},
    "no exits": {"boundaries": ()},
}


@pytest.mark.parametrize("model", MODELS)
def test_metrics_equal_those_by_hand(tmp_path: Path, model: str) -> None:
    config = make_config(**MODELS[model])
    result = evaluate(save(tmp_path / "run", config), data=write_data(tmp_path / "data"))
    assert_equal(result, by_hand(reference(config), TOKENS, LENGTH))
    assert result.num_tokens == len(TOKENS) - 1
    assert (result.dtype, result.seq_length) == ("float64", LENGTH)
    assert result.final.agreement == 1.0
    assert result.final.kl_to_final == 0.0
    if result.exits[:-1]:
        assert 0 < result.exits[0].agreement < 1, "the test would not notice a wrong agreement"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "run", make_config())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.mark.parametrize("num_tokens", [None, 40])
@pytest.mark.parametrize("seq_length", [7, 32])
def test_text_files_equal_prepared_data(
    tmp_path: Path, checkpoint: Path, data: str, seq_length: int, num_tokens: int | None
) -> None:
    options = {"num_tokens": num_tokens, "seq_length": seq_length}
    text = evaluate(checkpoint, text=write_texts(tmp_path / "texts"), **options)
    assert text.exits == evaluate(checkpoint, data=[data], **options).exits
    assert text.num_tokens == (num_tokens or len(TOKENS) - 1)


@pytest.mark.parametrize("is_masked", [False, True])
def test_tokens_after_an_end_token_count_unless_masked(
    tmp_path: Path, data: str, is_masked: bool
) -> None:
    """data.mask_after_eos: no token of another document predicts the first of a document."""
    config = make_config(mask_after_eos=is_masked)
    result = evaluate(save(tmp_path / "run", config), data=data)
    expected = by_hand(reference(config), TOKENS, LENGTH, eos=EOS if is_masked else None)
    assert_equal(result, expected)
    assert result.num_tokens == len(TOKENS) - 1 - is_masked * (len(TEXTS) - 1)


@pytest.mark.parametrize("rows", [1, 5])
def test_result_does_not_depend_on_the_size_of_chunks(
    checkpoint: Path, data: str, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Only as many logits are alive at once as a chunk has."""
    whole = evaluate(checkpoint, data=data)
    sizes = []
    project = Projection.__call__

    def record(self: Projection, features: torch.Tensor) -> torch.Tensor:
        sizes.append(len(features))
        return project(self, features)

    monkeypatch.setattr(Projection, "__call__", record)
    monkeypatch.setattr(measure_module.measure, "__defaults__", (None, None, None, 264 * rows))
    chunked = evaluate(checkpoint, data=data)
    assert max(sizes) == rows
    for one, other in zip(chunked.exits, whole.exits, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-13)
        assert one.kl_to_final == pytest.approx(other.kl_to_final, rel=1e-11)
        assert one.agreement == other.agreement


def test_windows_see_nothing_before_their_start(tmp_path: Path, checkpoint: Path) -> None:
    """Keys and values of the previous window in the cache must not be read."""
    first = evaluate(checkpoint, data=write_data(tmp_path / "a", [[9] * LENGTH, [*range(40, 60)]]))
    other = evaluate(checkpoint, data=write_data(tmp_path / "b", [[9] * LENGTH, [*range(40, 44)]]))
    config = make_config()
    tokens = [*[9] * LENGTH, *range(40, 60)]
    assert_equal(first, by_hand(reference(config), tokens, LENGTH))
    assert_equal(other, by_hand(reference(config), tokens[: LENGTH + 4], LENGTH))


def test_lower_precision_is_close(checkpoint: Path, data: str) -> None:
    exact = evaluate(checkpoint, data=data)
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.05)):
        rounded = evaluate(checkpoint, data=data, dtype=dtype)
        assert rounded.dtype == dtype
        for one, other in zip(rounded.exits, exact.exits, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=tolerance)


def test_default_length_is_that_of_training(checkpoint: Path, data: str) -> None:
    assert evaluate(checkpoint, data=data, seq_length=None).seq_length == 32


def test_a_result_survives_json(checkpoint: Path, data: str) -> None:
    result = evaluate(checkpoint, data=data)
    assert EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


REFUSED: dict[str, tuple[dict[str, Any], type[UserError], str]] = {
    "nothing": ({}, RequestError, "Give data (--data) with the prefixes of prepared data, or text"),
    "both": ({"data": "d", "text": "t"}, RequestError, "data = d and text = t are both given"),
    "no such data": ({"data": "gone"}, DataError, "data gone: gone.idx does not exist"),
    "no such text": ({"text": "gone.txt"}, DataError, "gone.txt: no such file"),
    "no tokens": ({"num_tokens": 0}, RequestError, "num_tokens = 0 is out of range. Use 1 or more"),
    "too long": ({"seq_length": 33}, RequestError, "seq_length = 33 is out of range. Use 1 to 32"),
    "no length": ({"seq_length": 0}, RequestError, "seq_length = 0 is out of range"),
    "tensor": ({"tensor": 3}, RequestError, "tensor = 3 does not divide"),
    "no rank": ({"tensor": 0}, RequestError, "tensor = 0 is out of range"),
    "pipeline": ({"pipeline": 5}, RequestError, "pipeline = 5 is more than num_layers = 4"),
    "timeout": ({"timeout_s": 0.0}, RequestError, "timeout_s = 0.0 is out of range"),
    "dtype": ({"dtype": "float16"}, RequestError, "dtype = 'float16' is unknown. Use one of auto"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_named(checkpoint: Path, data: str, case: str) -> None:
    arguments, kind, expected = REFUSED[case]
    if case != "nothing" and not {"data", "text"} & arguments.keys():
        arguments = {**arguments, "data": data}
    with pytest.raises(kind) as caught:
        evaluate(checkpoint, **arguments)
    assert expected in str(caught.value)


def test_an_open_engine_with_ranks_is_named(
    checkpoint: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process group belongs to the engine."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(RequestError, match="tensor = 2 x pipeline = 1: this process already uses"):
        evaluate(checkpoint, data=data, tensor=2)


def test_no_checkpoint_is_named(tmp_path: Path, data: str) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        evaluate(tmp_path, data=data)


def test_tokens_outside_the_vocabulary_are_named(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(DataError, match=r"token ids 1 to 300, outside model.vocab_size = 264"):
        evaluate(checkpoint, data=write_data(tmp_path / "data", [[1, 2, 300]]))


def test_data_of_another_tokenizer_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    """The ids would be in the vocabulary, and the figures meaningless."""
    prefix = write_data(tmp_path / "data")
    described = {"tokenizer": "sha256:12", "eos_token_id": 2, "num_tokens": len(TOKENS)}
    Path(f"{prefix}.meta.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match="sha256:12"):
        evaluate(checkpoint, data=prefix)


def test_empty_text_is_named(tmp_path: Path, checkpoint: Path) -> None:
    empty, without = tmp_path / "empty.txt", tmp_path / "without.jsonl"
    empty.touch()
    without.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"empty\.txt: empty"):
        evaluate(checkpoint, text=empty)
    with pytest.raises(DataError, match=r"without\.jsonl .*there is nothing to predict"):
        evaluate(checkpoint, text=[without])


def test_data_whose_tokens_are_all_masked(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "run", make_config(mask_after_eos=True))
    with pytest.raises(DataError, match="no token to predict"):
        evaluate(checkpoint, data=write_data(tmp_path / "data", [[EOS] * 5]))


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        ("bfloat16", "Use dtype = float32, and check the checkpoint if it still is not."),
        ("float32", "The weights are damaged. Check the checkpoint."),
        ("float64", "The weights are damaged. Check the checkpoint."),
    ],
)
def test_a_loss_that_is_not_finite_names_the_exit(
    tmp_path: Path, data: str, dtype: str, advice: str
) -> None:
    """A mean over NaN would look like a result."""
    config = make_config(output="own")
    tensors = random_tensors(config)
    tensors["exits.2.output.weight"][5] = float("nan")
    with pytest.raises(RunError, match=f"exit after layer 2 is not finite in {dtype}. {advice}"):
        evaluate(save_model(tmp_path / "run", config, tensors), data=data, dtype=dtype)
