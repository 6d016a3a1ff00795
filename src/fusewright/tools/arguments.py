"""Do two model files give the same arguments? Each file is a module of its own, so what it defines is never equal to
the other's: values are compared leaf by leaf, by what can be read of them without running code of the user's."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fusewright.errors import raised

PLAIN = (type(None), bool, int, float, complex, str, bytes, range, torch.dtype, torch.device)
NAMED = (type, FunctionType, BuiltinFunctionType, MethodType)

Leaf = Tensor | np.ndarray[Any, Any] | str  # a text says all that is compared
Leaves = dict[str, Leaf]


def leaves(arguments: Sequence[Any]) -> Leaves:
    """By where it is, such as `[0].width`: each tensor and array, and in words everything else."""
    return dict(_leaves(list(arguments), "", ()))


def difference(found: Leaves, expected: Leaves, again: Leaves) -> str | None:
    """The first leaf that is another one than expected, in words. again: what is expected, drawn once more: where the
    two differ no seed decides. A leaf that one of them lacks is told by what holds it."""
    for place in (p for p in expected if p in found and p in again):
        if _same(expected[place], again[place]) and not _same(found[place], expected[place]):
            what, other = _described(found[place]), _described(expected[place])
            return (
                f"{place} is {what} where the reference's is {other}" if what != other else f"{place} has other values"
            )
    return None


def _leaves(value: Any, place: str, above: tuple[int, ...]) -> Iterator[tuple[str, Leaf]]:
    if isinstance(value, Tensor):
        yield place, _plain(value)
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        yield place, np.asarray(value)
    elif type(value) in PLAIN:
        yield place, repr(value)
    elif isinstance(value, enum.Enum):
        yield place, f"{_name(type(value))}.{value._name_}"
    elif isinstance(value, NAMED):
        yield place, _name(value)
    else:
        parts = dict(_parts(value)) if id(value) not in above else {}  # a value may hold itself
        kind = f"a {_name(type(value))}"
        size = ", ".join(sorted(parts)) if isinstance(value, dict) else len(parts)
        yield place, f"{kind} of {size}" if isinstance(value, list | tuple | dict) else kind
        for step, inner in parts.items():
            yield from _leaves(inner, place + step, (*above, id(value)))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds, by how it is reached; nothing of what is none."""
    if is_dataclass(value):
        yield from ((f".{f.name}", _attribute(value, f.name)) for f in fields(value))
    elif isinstance(value, dict):
        for i, (key, inner) in enumerate(dict.items(value)):
            yield f"[{repr(key) if type(key) in PLAIN else i}]", inner
    elif isinstance(value, np.ndarray):  # of objects
        yield from _parts(value.tolist())
    elif isinstance(value, list | tuple):
        kind: Any = list if isinstance(value, list) else tuple
        yield from ((f"[{i}]", inner) for i, inner in enumerate(kind.__iter__(value)))


def _plain(tensor: Tensor) -> Tensor:
    """Dense, on the CPU, of no class whose methods are the user's."""
    with torch._C.DisableTorchFunctionSubclass():
        tensor = tensor.detach().cpu()
        return (tensor if tensor.layout == torch.strided else tensor.to_dense()).as_subclass(Tensor)


def _attribute(value: Any, name: str) -> Any:
    try:
        return object.__getattribute__(value, name)
    except BaseException as error:  # it was never set, or is a property
        raised(error)
        return None


def _name(value: Any) -> str:
    """A written file calls Model ModelNew, and what the class holds is named after it."""
    return re.sub(r"\bModelNew\b", "Model", value.__qualname__)


def _described(leaf: Leaf) -> str:
    if isinstance(leaf, str):
        return leaf
    return f"{'' if isinstance(leaf, Tensor) else 'array '}{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"


def _same(a: Leaf, b: Leaf) -> bool:
    """Whether nothing is known to differ: what cannot be compared is not."""
    try:
        if isinstance(a, str) or isinstance(b, str):
            return type(a) is type(b) and a == b
        if _described(a) != _described(b):
            return False
        x, y = cast("Any", a), cast("Any", b)
        return bool(((x == y) | ((x != x) & (y != y))).all())  # a NaN equals a NaN
    except (RuntimeError, TypeError):
        return True
