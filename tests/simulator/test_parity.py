"""The simulator against the GPU: the same source, the same bits; transcendental functions within a few ulps.

Here for single operations (arithmetic.py); tests/cuda compares the shipped kernels.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from arithmetic import CLOSE, DTYPES, Difference, compare, differences, of_dtype, simulated

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "parity.json"
SPARE = 1  # ulps more than were measured: for another CUDA or another C library


@functools.cache
def measured(dtype: str) -> dict[str, Difference]:
    exact, close = of_dtype(DTYPES[dtype])
    return differences({**exact, **close}, DTYPES[dtype])


@pytest.fixture(scope="module")
def bounds() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())["functions"]
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "name"), [(d, n) for d in DTYPES for n in of_dtype(DTYPES[d])[0]])
def test_same_bits(dtype: str, name: str) -> None:
    assert measured(dtype)[name].same == 1, measured(dtype)[name]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CLOSE)
def test_few_ulps(dtype: str, name: str, bounds: dict[str, Any]) -> None:
    """As few as benchmarks/parity.py measured."""
    found = measured(dtype)[name]
    assert found.ulps <= bounds[dtype][name]["ulps"] + SPARE, found
    assert not found.nans, found


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_all_operations_run_in_the_simulator(dtype: torch.dtype) -> None:
    exact, close = of_dtype(dtype)
    expressions = {**exact, **close}
    for name, out in zip(expressions, simulated(expressions, dtype, 4096, fill=torch.inf), strict=True):
        assert out[-1].isinf(), name
        assert not out[1::4].isinf().all(), name


def test_distances() -> None:
    x = torch.tensor([1.0, -1.0, 0.0, 2.0**-149, 3.0, 0.0] * 16)
    y = x.clone()
    assert compare("exp", x, y).same == 1 and compare("exp", x, y).ulps == 0
    y[4] = torch.nextafter(torch.nextafter(x[4], y[4] + 9), y[4] + 9)
    y[3] = -x[3]
    assert compare("exp", x, y).ulps == 2
    assert compare("lgamma", x, y).ulps == 2
    y[4] = torch.nan
    found = compare("exp", x, y)
    assert (found.ulps, found.nans) == (2, 1)
    y = x.clone()
    y[2] = -0.0
    found = compare("exp", x, y)
    assert found.ulps == 0 and found.same < 1
    wide = x.double()
    assert compare("exp", wide, torch.nextafter(wide, wide + 9)).ulps == 1
