"""Count the bytes of live tensors exactly, on any device, by tracking every operation."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active, count each storage that an operation creates until it is released.

    Storages that existed before, such as parameters and gradient buffers, do not count. `peak` is
    the maximum of live bytes. `marked_peak` is the maximum of those created inside `marked`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.marked_peak = 0
        self._live = self._marked_live = 0
        self._is_marking = False
        self._known: dict[int, weakref.ref] = {}

    @contextmanager
    def marked(self) -> Iterator[None]:
        """Count storages that are created inside also towards `marked_peak`."""
        before, self._is_marking = self._is_marking, True
        try:
            yield
        finally:
            self._is_marking = before

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            # Views and in-place results share a storage with an input.
            if storage._cdata not in inputs and storage._cdata not in self._known:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, key, is_marked = storage.nbytes(), storage._cdata, self._is_marking

        def release(_: weakref.ref) -> None:
            del self._known[key]
            self._live -= size
            self._marked_live -= size * is_marked

        self._known[key] = weakref.ref(storage, release)
        self._live += size
        self._marked_live += size * is_marked
        self.peak = max(self.peak, self._live)
        self.marked_peak = max(self.marked_peak, self._marked_live)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()
