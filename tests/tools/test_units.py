"""Quantities from the smallest that there are to the largest: three digits and no exponent."""

from __future__ import annotations

import pytest

from fusewright.tools.units import flop, operations, size, time, times


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (size(0), "0 B"),
        (size(999), "999 B"),
        (size(999_700), "1 MB"),
        (size(83_886_080), "83.9 MB"),
        (flop(0), ""),
        (flop(16_384), "16.4 kFLOP"),
        (flop(2 * 1024 * 8192 * 8192), "137 GFLOP"),
        (flop(2 * 8192**3), "1.1 TFLOP"),
        (operations(960), "960"),
        (operations(92_160), "92.2 thousand"),
        (operations(999_999), "1 million"),
        (time(0.0), "under 1 ns"),
        (time(53.8e-9), "53.8 ns"),
        (time(24.66e-6), "24.7 µs"),
        (time(0.173e-3), "0.173 ms"),
        (time(12.0), "12 s"),
        (times(0.994), "0.99×"),
        (times(2346567.8), "2.35e+06×"),
    ],
)
def test_text(text: str, wanted: str) -> None:
    assert text == wanted
