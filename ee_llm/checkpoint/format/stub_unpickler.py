"""Reads pickles without executing code: an inert stub replaces every class.

A stub stores the values that the pickle gives an object and has no behaviour. Nothing is imported.
"""

import io
import pickle
import pickletools
from collections.abc import Container, Mapping
from typing import IO, Any, ClassVar

_MAX_ITEMS = 1000  # in a tuple, counting nested ones; real checkpoints have some tens


class _Sealed(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets {name!r} of the class {cls.__name__}")


class Stub(metaclass=_Sealed):
    """Stores the arguments and the state that a pickle gives an object."""

    args: tuple[Any, ...] = ()

    def __init__(self, *args: Any) -> None:
        vars(self)["args"] = args

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {"state": state})


class StubDict(Stub, dict):
    """A stub that also stores the items of a dictionary."""


class StubUnpickler(pickle.Unpickler):
    """Unpickles plain values, and stubs for the classes of an allow-list.

    Raises UnpicklingError, before creating any object, for a pickle that would exhaust the machine.
    """

    allowed: ClassVar[Mapping[str, Container[str]]] = {}
    """Names of classes by module."""

    # A pickle can set attributes of any object that it reaches, classes included (BUILD), so the
    # stub classes belong to this unpickler only.
    def __init__(self, file: IO[bytes]) -> None:
        program = file.read()
        _check_bounds(program)
        super().__init__(io.BytesIO(program))
        self._stubs: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return a stub class of the same name; raises UnpicklingError for a class not allowed."""
        # Names with dots are not allowed: "Size.__init__.__globals__" would reach any object.
        if not self.is_allowed(module, name):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        base = StubDict if name in ("OrderedDict", "defaultdict") else Stub
        return self._stubs.setdefault((module, name), _Sealed(name, (base,), {}))

    def is_allowed(self, module: str, name: str) -> bool:
        """Return whether a pickle may name this class."""
        return name in self.allowed.get(module, ())


def _check_bounds(program: bytes) -> None:
    """Raise UnpicklingError for a memo larger than the pickle or a tuple with too many items.

    The memo is an array as long as its largest index. Hashing a tuple visits all nested items, and
    a shared nested tuple once per occurrence, so hashing can take exponential time in the size of a
    pickle. This function counts nested items on a stack like that of the pickle machine. Lists and
    dictionaries have no hash.
    """
    stack: list[int | None] = []  # the number of nested items of each value; None is a mark
    memo: dict[int, int] = {}
    for operation, argument, position in pickletools.genops(program):
        name = operation.name
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(memo) if argument is None else int(argument)
            if index > len(program):
                raise pickle.UnpicklingError(f"byte {position} requires a memo of {index} values")
            memo[index] = stack[-1] or 0
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            taken = _take(stack, operation)
            is_tuple = name.startswith("TUPLE") or name == "FROZENSET"
            items = len(taken) + sum(taken) if is_tuple else 0
            if items > _MAX_ITEMS:
                raise pickle.UnpicklingError(f"byte {position} makes a tuple of {items} items")
            for kind in operation.stack_after:
                stack.append(None if kind is pickletools.markobject else items)


def _take(stack: list[int | None], operation: pickletools.OpcodeInfo) -> list[int]:
    """Remove the operands of an operation from the stack and return their item counts."""
    kinds, taken = list(operation.stack_before), []
    if pickletools.markobject in kinds:
        while (items := stack.pop()) is not None:
            taken.append(items)
        kinds = kinds[: kinds.index(pickletools.markobject)]
    return taken + [stack.pop() or 0 for _ in kinds]
