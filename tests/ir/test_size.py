"""Size symbols that know the value of the example that they come from."""

from __future__ import annotations

import pickle

import sympy
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max

from fusewright.ir.size import TYPICAL_SIZE, SizeSymbol, evaluate, evaluate_typical, same

ASSUMPTIONS = {"integer": True, "positive": True}


def test_a_symbol_stands_for_its_value_where_sizes_are_compared() -> None:
    symbol, plain = SizeSymbol("s0", 16, **ASSUMPTIONS), sympy.Symbol("s1", **ASSUMPTIONS)
    assert evaluate_typical(symbol * 3 + 1) == 49
    assert evaluate_typical(symbol + plain) == 16 + TYPICAL_SIZE
    assert evaluate(symbol * 3, {symbol: 5}) == 15
    assert symbol.is_integer and symbol.is_positive and str(symbol) == "s0"


def test_symbols_of_one_name_keep_their_own_values() -> None:
    """sympy keeps results by operands: equal symbols would take over each other's value."""
    few, many = (SizeSymbol("s0", n, **ASSUMPTIONS) for n in (16, 4096))
    assert few != many and few == SizeSymbol("s0", 16, **ASSUMPTIONS)
    assert [evaluate_typical(s * 2) for s in (few, many)] == [32, 8192]


def test_a_copy_knows_the_value() -> None:
    copied = pickle.loads(pickle.dumps(SizeSymbol("s0", 16, **ASSUMPTIONS) + 1))
    assert evaluate_typical(copied) == 17


def test_a_floor_division_without_a_remainder_is_a_quotient() -> None:
    """As torch writes the rows of x[n, n, k]: n² // n of each n."""
    n, k = (SizeSymbol(name, 16, **ASSUMPTIONS) for name in ("n", "k"))
    assert same(12 * n * FloorDiv(n**2, n), 12 * n**2)
    assert not same(n * FloorDiv(k, n), k)


def test_a_floor_division_within_another_is_a_quotient_too() -> None:
    """As torch writes the strides of x[n, n].reshape(n, -1, 2)."""
    n = SizeSymbol("n", 16, **ASSUMPTIONS)
    half = CleanDiv(n**2, 2 * n)
    assert same(Max(1, FloorDiv(n, half)) * half, n)
