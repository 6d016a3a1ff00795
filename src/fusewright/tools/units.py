"""Quantities as a person reads them."""

from __future__ import annotations


def counted(count: int, one: str, several: str) -> str:
    """Such as "1 launch" and "2 launches"."""
    return f"{count} {one if count == 1 else several}"


def size(count: int) -> str:
    """Bytes, in decimal units."""
    return _scaled(count, "B", "kB", "MB", "GB", "TB")


def flop(count: int) -> str:
    """Operations; nothing for none."""
    return _scaled(count, "FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP") if count else ""


def operations(count: float) -> str:
    """A number of them, before that word."""
    return _scaled(count, "", "thousand", "million", "G", "T")


def time(seconds: float) -> str:
    """Milliseconds from a tenth of one on."""
    if seconds < 1e-9:
        return "under 1 ns"
    return _scaled(seconds * 1e3, "ms", "s") if seconds >= 1e-4 else _scaled(seconds * 1e9, "ns", "µs")


def times(ratio: float) -> str:
    """Such as "1.25×"; one that is far off keeps no digits that say nothing."""
    return f"{ratio:.2f}×" if ratio < 1000 else f"{ratio:.3g}×"


def _scaled(value: float, *units: str) -> str:
    """Three digits, in the smallest of the units, each a thousand of the one before, that needs no exponent."""
    while value >= 999.5 and len(units) > 1:  # what rounds to 1000
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}".strip()
