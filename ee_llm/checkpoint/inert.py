"""Reads pickles without running anything they name: a stand-in takes the place of each class.

A stand-in holds what the pickle gives the object, and does nothing. Nothing is imported.
"""

import pickle
from collections.abc import Container, Mapping
from typing import Any, ClassVar


class _Sealed(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets {name!r} of the class {cls.__name__}")


class Inert(metaclass=_Sealed):
    """Holds the arguments and the state that a pickle gives an object, and does nothing."""

    args: tuple[Any, ...] = ()

    def __init__(self, *args: Any) -> None:
        vars(self)["args"] = args

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {"state": state})


class InertDict(Inert, dict):
    """The same with the items of a dictionary."""


class InertUnpickler(pickle.Unpickler):
    """Unpickles plain values, and stand-ins for the classes of an allow-list."""

    allowed: ClassVar[Mapping[str, Container[str]]] = {}
    """Names of classes by module."""

    # A pickle can set attributes of whatever it gets hold of, classes included (BUILD): it gets
    # none that anything else knows.
    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._stand_ins: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in, made for this pickle; raises UnpicklingError naming what is refused.

        The stand-in is called as the class is.
        """
        # No dots: "Size.__init__.__globals__" would walk from an allowed class to anything.
        if not self.is_allowed(module, name):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        base = InertDict if name in ("OrderedDict", "defaultdict") else Inert
        return self._stand_ins.setdefault((module, name), _Sealed(name, (base,), {}))

    def is_allowed(self, module: str, name: str) -> bool:
        """Return whether a pickle may name this."""
        return name in self.allowed.get(module, ())
