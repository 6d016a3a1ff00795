"""Sizes: integers, or sympy expressions over the graph's size symbols."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, reduce
from typing import Any, TypeAlias

import sympy
from torch.utils._sympy.functions import CleanDiv, FloorDiv

# Stands for every size symbol of which no value is known where alternatives are compared.
TYPICAL_SIZE = 1024


class SizeSymbol(sympy.Symbol):  # type: ignore[misc]
    """A size symbol that knows a value: the one of the example that the graph was captured with.

    Alternatives are compared by it. Symbols of one name with different values are different ones.
    """

    __slots__ = ("typical",)
    typical: int

    def __new__(cls, name: str, typical: int, **assumptions: bool) -> SizeSymbol:
        symbol: SizeSymbol = sympy.Symbol.__xnew__(cls, name, **assumptions)
        symbol.typical = typical
        return symbol

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, bool]]:
        arguments, assumptions = super().__getnewargs_ex__()
        return (*arguments, self.typical), assumptions

    def _hashable_content(self) -> tuple[Any, ...]:
        return (*super()._hashable_content(), self.typical)


# A size known when the kernel is generated, or an expression over the graph's size symbols.
Size: TypeAlias = int | sympy.Expr


def product(sizes: Iterable[Size]) -> Size:
    return reduce(lambda a, b: a * b, sizes, 1)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are provably equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a == b or _expand(a - b) == 0


def broadcasts(shape: Sequence[Size], wanted: Sequence[Size]) -> bool:
    """Whether a shape provably expands to another one."""
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    return len(shape) <= len(wanted) and all(same(old, 1) or same(old, new) for old, new in pairs)


def divides(divisor: Size, size: Size) -> Size | None:
    """size / divisor where that is provably an integer, else None."""
    if isinstance(divisor, int) and isinstance(size, int):
        return size // divisor if divisor and size % divisor == 0 else None
    if same(divisor, 1):
        return size
    quotient = _expand(size / sympy.sympify(divisor))
    if quotient.is_Integer:
        return int(quotient)
    return quotient if quotient.is_integer else None


@lru_cache(maxsize=4096)
def _expand(expression: sympy.Expr) -> sympy.Expr:
    # Inner divisions first, both kinds at once: halfway, torch refuses a division by what is no integer.
    return sympy.expand(expression.replace(lambda e: isinstance(e, FloorDiv), _quotient))


def _quotient(division: FloorDiv) -> sympy.Expr:
    size, divisor = division.args
    quotient = size / divisor
    # torch marks a floor division that it has guarded to have no remainder.
    return quotient if isinstance(division, CleanDiv) or quotient.is_integer else division


def matching_groups(a: Sequence[Size], b: Sequence[Size]) -> list[tuple[list[int], list[int]]] | None:
    """Splits two shapes of one element count into the shortest runs of dimensions with equal products.

    Returns pairs (indices into a, indices into b), in order; None where the products never meet.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        left: list[int] = []
        right: list[int] = []
        size_a: Size = 1
        size_b: Size = 1
        while True:
            if (not left or not same(size_a, size_b)) and i < len(a) and (not left or _behind(size_a, size_b)):
                size_a, left, i = size_a * a[i], [*left, i], i + 1
            elif (not right or not same(size_a, size_b)) and j < len(b):
                size_b, right, j = size_b * b[j], [*right, j], j + 1
            elif same(size_a, size_b):
                break
            elif i < len(a):
                size_a, left, i = size_a * a[i], [*left, i], i + 1
            else:
                return None
        groups.append((left, right))
    return groups


def _behind(a: Size, b: Size) -> bool:
    """Whether a divides b: the run of a has to grow to meet that of b."""
    return divides(a, b) is not None


def evaluate(size: Size | float, sizes: Mapping[sympy.Symbol, int]) -> int | float:
    """Returns the value of `size` with every symbol replaced. Raises KeyError for a symbol without a value."""
    if not isinstance(size, sympy.Expr):
        return size
    value = size.xreplace({s: sympy.Integer(sizes[s]) for s in size.free_symbols})
    return int(value) if value.is_integer else float(value)


def evaluate_typical(size: Size) -> float:
    """A number to compare sizes by: the size with every symbol's typical value."""
    symbols = size.free_symbols if isinstance(size, sympy.Expr) else ()
    return float(evaluate(size, {s: getattr(s, "typical", TYPICAL_SIZE) for s in symbols}))
