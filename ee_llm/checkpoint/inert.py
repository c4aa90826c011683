"""Reads pickles without running anything they name: a stand-in takes the place of each class.

A stand-in holds what the pickle gives the object, and does nothing. Nothing is imported.
"""

import io
import pickle
import pickletools
from collections.abc import Container, Mapping
from typing import IO, Any, ClassVar

_MAX_NESTING = 32  # tuples in tuples; real ones have three


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
    """Unpickles plain values, and stand-ins for the classes of an allow-list.

    Raises UnpicklingError, before anything is made, for a pickle that would exhaust the machine.
    """

    allowed: ClassVar[Mapping[str, Container[str]]] = {}
    """Names of classes by module."""

    # A pickle can set attributes of whatever it gets hold of, classes included (BUILD): it gets
    # none that anything else knows.
    def __init__(self, file: IO[bytes]) -> None:
        program = file.read()
        _check_bounds(program)
        super().__init__(io.BytesIO(program))
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


def _check_bounds(program: bytes) -> None:
    """Raise UnpicklingError for a memo larger than the pickle, and for tuples nested too deep.

    The memo is an array as long as its largest index; a tuple's hash recurses in C with no limit.
    The depth of tuples is followed on a stack as the pickle machine has it, where anything else
    has the depth 0: lists and dictionaries have no hash.
    """
    stack: list[int | None] = []  # the depth of each value; None is a mark
    memo: dict[int, int] = {}
    for operation, argument, position in pickletools.genops(program):
        name = operation.name
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(memo) if argument is None else int(argument)
            if index > len(program):
                raise pickle.UnpicklingError(f"byte {position} asks for a memo of {index} values")
            memo[index] = stack[-1] or 0
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            depth = max(_take(stack, operation), default=0)
            if depth > _MAX_NESTING:
                raise pickle.UnpicklingError(f"byte {position} nests tuples {depth} deep")
            is_tuple = name.startswith("TUPLE") or name == "FROZENSET"
            for kind in operation.stack_after:
                is_mark = kind is pickletools.markobject
                stack.append(None if is_mark else depth + 1 if is_tuple else 0)


def _take(stack: list[int | None], operation: pickletools.OpcodeInfo) -> list[int]:
    """Remove what an operation takes from the stack, and return the depths of it."""
    kinds, taken = list(operation.stack_before), []
    if pickletools.markobject in kinds:
        while (depth := stack.pop()) is not None:
            taken.append(depth)
        kinds = kinds[: kinds.index(pickletools.markobject)]
    return taken + [stack.pop() or 0 for _ in kinds]
