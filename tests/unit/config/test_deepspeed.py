"""DeepSpeed's options: what goes together, and the package that may not be there."""

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

CHOSEN = {"parallel.engine": "deepspeed"}
PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown engine": (
        {"parallel.engine": "fsdp"},
        "parallel.engine: must be one of 'megatron' or 'deepspeed', got \"fsdp\"",
    ),
    "an unknown stage": ({"deepspeed.zero_stage": 4}, "deepspeed.zero_stage: must be "),
    "no stage": ({"deepspeed.zero_stage": 0}, "deepspeed.zero_stage: must be "),
    "gradients split in a pipeline": (
        {"parallel.pipeline": 2, "deepspeed.zero_stage": 3},
        "parallel.pipeline = 2 with parallel.engine = deepspeed and deepspeed.zero_stage = 3, "
        "which splits gradients during each backward pass, while a pipeline still adds those of "
        "other microbatches to them and sums weights that several stages share; set "
        "parallel.pipeline to 1, or parallel.engine to megatron",
    ),
    "a pipeline": (
        {"parallel.pipeline": 2, "deepspeed.zero_stage": 1},
        "deepspeed.zero_stage = 1, which runs the whole model forward and backward on each process",
    ),
    "tensor parallel": (
        {"parallel.tensor": 2},
        "parallel.tensor = 2 with parallel.engine = deepspeed, which is data parallel alone",
    ),
    "float64": (
        {"training.dtype": "float64"},
        "training.dtype = float64 with parallel.engine = deepspeed, whose optimizers compute in",
    ),
    "bfloat16 under stage 1": (
        {"training.dtype": "bfloat16", "deepspeed.zero_stage": 1},
        "deepspeed.zero_stage = 1 with training.dtype = bfloat16, for which DeepSpeed has an",
    ),
    "a trace": (
        {"logging.trace_steps": (1,)},
        "logging.trace_steps = [1] traces the actions of a pipeline, and with parallel.engine = ",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems(case: str) -> None:
    options, expected = PROBLEMS[case]
    assert expected in message(CHOSEN | options)


def test_the_section_may_stay_where_the_engine_is_changed() -> None:
    """One option decides, so that the same file serves both."""
    options = {"parallel.pipeline": 2, "deepspeed.zero_stage": 3, "training.dtype": "float64"}
    config = load_config(None, {"model.shape": "llama-tiny"} | options)
    assert config.parallel.engine == "megatron"


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let deepspeed be a package that is not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name)
    )


NEEDS = "parallel.engine = deepspeed needs the package deepspeed, which is not installed; pip insta"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch)
    with pytest.raises(ValueError, match=NEEDS) as caught:
        distributed.deepspeed()
    assert 'pip install "ee-llm[deepspeed]"' in str(caught.value)


def test_a_package_that_can_not_be_imported_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for a CUDA toolkit on import where it finds a GPU, and raises errors of its own."""

    def broken(name: str) -> types.ModuleType:
        raise RuntimeError("CUDA_HOME does not exist")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(ValueError, match=r"imported \(RuntimeError: CUDA_HOME does not exist\)"):
        distributed.deepspeed()


def test_training_without_the_package_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    hide(monkeypatch)
    config = make_config(tmp_path / "run", write_corpus(tmp_path / "corpus"), **CHOSEN)
    with pytest.raises(RankFailed, match=NEEDS):
        run_ranks(1, train, config)


def _imports_by(config: Config) -> set[str]:
    before = set(sys.modules)
    train(config)
    return set(sys.modules) - before


def test_training_by_megatron_does_not_import_it(tmp_path: Any) -> None:
    options = {"training.steps": 1}
    config = make_config(tmp_path / "run", write_corpus(tmp_path / "corpus"), **options)
    [imported] = run_ranks(1, _imports_by, config)
    assert "deepspeed" not in imported


def test_the_precision_of_a_checkpoint_is_checked_as_well(tmp_path: Any) -> None:
    """training.dtype = auto takes it from the checkpoint, after the configuration was checked."""
    corpus = write_corpus(tmp_path / "corpus")
    steps = {"training.steps": 1, "training.dtype": "float64"}
    run_ranks(1, train, make_config(tmp_path / "a", corpus, **steps))
    options = {"checkpoint.initial": str(tmp_path / "a"), "training.dtype": "auto"}
    with pytest.raises(RankFailed, match=r"training\.dtype = float64 with parallel\.engine = deep"):
        run_ranks(1, train, make_config(tmp_path / "b", corpus, **CHOSEN | options))
