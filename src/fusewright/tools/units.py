"""Quantities as a person reads them."""

from __future__ import annotations


def counted(count: int, one: str, several: str) -> str:
    """Such as "1 launch" and "2 launches"."""
    return f"{count} {one if count == 1 else several}"


def size(count: int) -> str:
    """Bytes, in decimal units."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def flop(count: int) -> str:
    """Operations; nothing for none."""
    return f"{count / 1e9:.3g} GFLOP" if count else ""


def time(seconds: float) -> str:
    """Milli- or microseconds."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"
