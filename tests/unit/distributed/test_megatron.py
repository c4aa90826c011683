"""Enabling megatron-core: version checks, warnings, and the user's torch, which must not change."""

import importlib
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

import ee_llm
from ee_llm import distributed
from ee_llm.distributed import megatron
from tests.distributed.harness import run_ranks
from tests.distributed.test_traps import make_batches, make_config

distributed.enable_megatron()
from ee_llm.training.optimizer import build_optimizer, take_step
from ee_llm.training.parallel import ParallelModel


def test_missing_psutil_is_an_error(monkeypatch):
    """Without psutil a save by megatron-core never ends, so the error must come before training."""
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ImportError):
        importlib.import_module("psutil")
    monkeypatch.setattr(megatron, "_enabled", False)
    with pytest.raises(RuntimeError, match="pip install psutil"):
        distributed.enable_megatron()


GOOD = {"python": "3.11.7", "torch": "2.13.0+cpu", "megatron-core": "0.16.1"}


@pytest.mark.parametrize(
    ("name", "version", "fix"),
    [
        ("python", "3.10.14", "Use another interpreter"),
        ("python", "3.13.0", "Use another interpreter"),
        ("torch", "2.2.0+cu121", 'pip install "torch>='),
        ("torch", "2.14.0a0+git1", 'pip install "torch>='),
        ("megatron-core", "0.15.3", 'pip install "megatron-core>=0.16.1,<0.17"'),
        ("megatron-core", "0.17.0rc0", 'pip install "megatron-core>=0.16.1,<0.17"'),
    ],
)
def test_error_names_an_untested_version_and_the_fix(name, version, fix):
    with pytest.raises(RuntimeError) as caught:
        megatron.check_versions(GOOD | {name: version})
    message = str(caught.value)
    assert message.startswith(f"{name} {version} is outside the tested range")
    assert fix in message
    assert "\n" not in message


def test_installed_versions_and_vendor_builds_are_in_range():
    megatron.check_versions(GOOD)
    megatron.check_versions(GOOD | {"torch": "2.12.0a0+5228986c39.nv25.06", "python": "3.12.3"})


def test_enabling_checks_the_installed_versions(monkeypatch):
    monkeypatch.setattr(megatron, "_enabled", False)
    monkeypatch.setattr(torch, "__version__", "2.4.1")
    with pytest.raises(RuntimeError, match=r"torch 2\.4\.1 is outside"):
        distributed.enable_megatron()
    monkeypatch.setenv("EE_LLM_UNTESTED_VERSIONS", "1")
    distributed.enable_megatron()


def test_error_names_the_fix_for_missing_megatron_core(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(megatron, "_enabled", False)
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(RuntimeError, match="megatron-core is not installed.*pip install"):
        distributed.enable_megatron()


def _is_ours(value: object) -> bool:
    if isinstance(value, types.MethodType | classmethod | staticmethod):
        value = value.__func__
    if isinstance(value, types.FunctionType):
        return value.__code__.co_filename.startswith(str(Path(ee_llm.__file__).parent))
    return type(value).__module__.startswith("ee_llm")


def _changes_in_torch() -> list[str]:
    """Train a step that uses every adaptation, then return the names in torch that changed."""
    config = make_config(training__dtype="bfloat16")
    grid = distributed.initialize(timeout_s=20)
    model = ParallelModel(config, grid, torch.bfloat16)
    optimizer = build_optimizer(model.chunks, config.optimizer, data_size=1, dtype=torch.bfloat16)
    model.forward_backward(make_batches(), step=0)
    assert take_step(optimizer, clip_grad=1e-3).updated

    user = importlib.import_module("torch")
    assert user is torch
    spaces = [
        user,
        user.Tensor,
        user.cuda,
        user.cuda.random,
        user.nn.Module,
        user.nn.functional,
        user.autograd.Function,
        user.distributed,
        user.optim,
    ]
    found = [
        f"{space.__name__}.{name}"
        for space in spaces
        for name, value in vars(space).items()
        if _is_ours(value)
    ]
    base = user.Tensor.__mro__[1]
    for name in ("type", "cuda", "to"):
        if getattr(user.Tensor, name) is not getattr(base, name):
            found.append(f"Tensor.{name}")
    for name in ("empty", "zeros", "tensor", "arange", "randn"):
        if not isinstance(getattr(user, name), type(user._C._VariableFunctions.empty)):
            found.append(name)
    if user.cuda.__spec__ is None or user.cuda.__spec__.origin is None:
        found.append("cuda")
    return found


def test_the_users_torch_is_unchanged():
    [found] = run_ranks(1, _changes_in_torch)
    assert found == []


def test_megatrons_torch_is_adapted_without_cuda():
    import megatron.core.optimizer.optimizer as adapted

    if distributed.has_cuda():
        assert adapted.torch is torch
        return
    assert adapted.torch.empty(1, device="cuda").device.type == "cpu"
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|cuda"):
        torch.empty(1, device="cuda")
    assert torch.ones(1).type() == "torch.FloatTensor"


def _warnings_of_imports(quiet: bool) -> list[str]:
    """Return the warnings of a second import of deprecated modules that megatron-core imports."""
    noisy = ("megatron.core.transformer.custom_layers.transformer_engine", "torch.utils.mkldnn")
    modules = [importlib.import_module(name) for name in noisy]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if quiet:
            megatron._quieten()
        for module in modules:
            importlib.reload(module)
        warnings.warn("from user code", DeprecationWarning, stacklevel=1)
    return [str(warning.message) for warning in caught]


def test_only_the_warnings_of_megatron_are_silenced():
    assert len(run_ranks(1, _warnings_of_imports, False)[0]) > 2
    assert run_ranks(1, _warnings_of_imports, True) == [["from user code"]]
