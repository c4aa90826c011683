"""Run megatron-core on a CPU by replacing the name `torch` in its own modules.

megatron-core 0.16 hard-codes device="cuda" and torch.cuda.*. After the execution of a
`megatron.core` module, its global `torch` is replaced by a proxy whose factories map "cuda" to the
CPU and whose `torch.cuda` does nothing. The user's own torch is unchanged, with one exception that
lasts only while megatron-core's optimizers run: they compare `Tensor.type()` with
'torch.cuda.FloatTensor'.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (  # noqa: SIM905 (a list of strings is longer and no clearer)
    "arange as_tensor empty empty_like eye full full_like linspace ones ones_like rand rand_like "
    "randint randn tensor zeros zeros_like"
).split()


def install() -> None:
    """Adapt every megatron.core module, whether it is loaded already or later."""
    if any(isinstance(finder, _AdaptAfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AdaptAfterImport())
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and module is not None:
            _adapt(module)


class _AdaptAfterImport(importlib.abc.MetaPathFinder):
    """Adapts each megatron.core module right after its execution, lazily imported ones included."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                _adapt(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _adapt(module: types.ModuleType) -> None:
    if module.__dict__.get("torch") is torch:
        module.torch = _PROXY  # type: ignore[attr-defined]
    if adapt := _BY_NAME.get(module.__name__):
        adapt(module)


class _Stream:
    """Stands in for a CUDA stream on a CPU, where all work is synchronous."""

    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _Event(_Stream):
    """Stands in for a CUDA event; reads the wall clock."""

    seconds = 0.0

    def record(self, *args: Any) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return 1e3 * (end.seconds - self.seconds)


class _CudaNamespace(types.ModuleType):
    """Stands in for `torch.cuda` on a CPU: the CPU's generator, no streams, no memory figures."""

    Stream = _Stream
    Event = _Event

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        no_op = lambda *args, **kwargs: None  # noqa: E731
        for name in ("synchronize", "empty_cache", "set_device", "ipc_collect"):
            setattr(self, name, no_op)
        for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
            setattr(self, name, lambda *args, **kwargs: 0)
        self.is_available = lambda: False
        self.device_count = lambda: 1
        self.current_device = lambda: _CPU
        self.memory_stats = lambda *args: dict[str, int]()
        self.manual_seed = lambda seed: torch.manual_seed(seed)
        self.get_rng_state = lambda device=None: torch.get_rng_state()
        self.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
        self.random = types.SimpleNamespace(
            get_rng_state=self.get_rng_state, set_rng_state=self.set_rng_state
        )
        self.nvtx = types.SimpleNamespace(range_push=no_op, range_pop=no_op)
        self.stream = lambda stream: contextlib.nullcontext()
        self.current_stream = self.default_stream = lambda *args: _Stream()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchProxy(types.ModuleType):
    """Stands in for `torch` in megatron-core's modules on a CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaNamespace()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    @staticmethod
    def autocast(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return torch.autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if isinstance(device, int) or str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Make `tensor.type()` return the name of the CUDA type, such as 'torch.cuda.FloatTensor'."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return call


def _adapt_jit(module: Any) -> None:
    """Disable torch.compile, which is slow to import and not needed on a CPU."""
    module.disable_jit_fuser()


def _adapt_random(module: Any) -> None:
    module._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # megatron-core warns when the CPU generator advances inside a CUDA region. Here both are the
    # same generator.
    logging.getLogger(module.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _adapt_optimizer(module: Any) -> None:
    module.clip_grad_by_total_norm_fp32 = _with_cuda_type_names(module.clip_grad_by_total_norm_fp32)
    mixed_precision = module.Float16OptimizerWithFloat16Params
    mixed_precision.__init__ = _with_cuda_type_names(mixed_precision.__init__)


def _adapt_distributed_optimizer(module: Any) -> None:
    optimizer = module.DistributedOptimizer
    optimizer.__init__ = _with_cuda_type_names(optimizer.__init__)


_PROXY = _TorchProxy()
_BY_NAME: dict[str, Callable[[Any], None]] = {
    "megatron.core.jit": _adapt_jit,
    "megatron.core.tensor_parallel.random": _adapt_random,
    "megatron.core.optimizer.optimizer": _adapt_optimizer,
    "megatron.core.optimizer.distrib_optimizer": _adapt_distributed_optimizer,
}
