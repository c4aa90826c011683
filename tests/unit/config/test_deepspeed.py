"""The DeepSpeed options: conflicts, and the optional package."""

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest

from ee_llm import distributed
from ee_llm.config import Config, load_config
from ee_llm.training.trainer import train
from tests.distributed.harness import RankFailed, run_ranks
from tests.distributed.runs import make_config, write_corpus
from tests.unit.refusals import message

DEEPSPEED = {"parallel.engine": "deepspeed"}
PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown engine": (
        {"parallel.engine": "fsdp"},
        "parallel.engine: must be one of 'megatron' or 'deepspeed', got \"fsdp\"",
    ),
    "an unknown stage": ({"deepspeed.zero_stage": 4}, "deepspeed.zero_stage: must be "),
    "no stage": ({"deepspeed.zero_stage": 0}, "deepspeed.zero_stage: must be "),
    "gradients split in a pipeline": (
        {"parallel.pipeline": 2, "deepspeed.zero_stage": 3},
        "parallel.pipeline = 2 is not possible with parallel.engine = deepspeed and "
        "deepspeed.zero_stage = 3, which shards gradients during each backward pass",
    ),
    "a pipeline": (
        {"parallel.pipeline": 2, "deepspeed.zero_stage": 1},
        "deepspeed.zero_stage = 1, which runs the forward and backward pass of the entire model",
    ),
    "tensor parallel": (
        {"parallel.tensor": 2},
        "parallel.tensor = 2 is not possible with parallel.engine = deepspeed",
    ),
    "float64": (
        {"training.dtype": "float64"},
        "training.dtype = float64 is not possible with parallel.engine = deepspeed",
    ),
    "bfloat16 under stage 1": (
        {"training.dtype": "bfloat16", "deepspeed.zero_stage": 1},
        "deepspeed.zero_stage = 1 is not possible with training.dtype = bfloat16",
    ),
    "a trace": (
        {"logging.trace_steps": (1,)},
        "logging.trace_steps = [1] traces pipeline actions, but parallel.engine = deepspeed",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems(case: str) -> None:
    options, expected = PROBLEMS[case]
    assert expected in message(DEEPSPEED | options)


def test_section_is_ignored_with_another_engine() -> None:
    """Changing parallel.engine alone switches a file between the engines."""
    options = {"parallel.pipeline": 2, "deepspeed.zero_stage": 3, "training.dtype": "float64"}
    config = load_config(None, {"model.shape": "llama-tiny"} | options)
    assert config.parallel.engine == "megatron"


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the package deepspeed appear as not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name)
    )


NEEDS = "parallel.engine = deepspeed needs the package deepspeed"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch)
    with pytest.raises(ValueError, match=NEEDS) as caught:
        distributed.deepspeed()
    assert 'pip install "ee-llm[deepspeed]"' in str(caught.value)


def test_failing_import_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On import with a GPU, deepspeed looks for a CUDA toolkit and may raise its own errors."""

    def broken(name: str) -> types.ModuleType:
        raise RuntimeError("CUDA_HOME does not exist")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(ValueError, match=r"imported \(RuntimeError: CUDA_HOME does not exist\)"):
        distributed.deepspeed()


def test_training_without_the_package_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    hide(monkeypatch)
    config = make_config(tmp_path / "run", write_corpus(tmp_path / "corpus"), **DEEPSPEED)
    with pytest.raises(RankFailed, match=NEEDS):
        run_ranks(1, train, config)


def _imports_by(config: Config) -> set[str]:
    before = set(sys.modules)
    train(config)
    return set(sys.modules) - before


def test_training_with_megatron_does_not_import_deepspeed(tmp_path: Any) -> None:
    options = {"training.steps": 1}
    config = make_config(tmp_path / "run", write_corpus(tmp_path / "corpus"), **options)
    [imported] = run_ranks(1, _imports_by, config)
    assert "deepspeed" not in imported


def test_dtype_of_a_checkpoint_is_checked(tmp_path: Any) -> None:
    """training.dtype = auto is resolved from the checkpoint after the configuration is checked."""
    corpus = write_corpus(tmp_path / "corpus")
    steps = {"training.steps": 1, "training.dtype": "float64"}
    run_ranks(1, train, make_config(tmp_path / "a", corpus, **steps))
    options = {"checkpoint.initial": str(tmp_path / "a"), "training.dtype": "auto"}
    with pytest.raises(
        RankFailed, match=r"training\.dtype = float64 .*parallel\.engine = deepspeed"
    ):
        run_ranks(1, train, make_config(tmp_path / "b", corpus, **DEEPSPEED | options))
