"""What the compiler knows of a chip: the limits that a launch must keep and the rates that a floor is made of."""

from __future__ import annotations

from dataclasses import dataclass

from fusewright.errors import UnknownArch


@dataclass(frozen=True)
class Chip:
    """A GPU architecture. Rates are the vendor's datasheet figures for the largest part of that architecture.

    shared_bytes: most shared memory that one block can have, in bytes.
    bandwidth: device memory, bytes per second. fp32, fp16: dense FLOP per second.
    """

    arch: str
    name: str
    multiprocessors: int
    shared_bytes: int
    bandwidth: float
    fp32: float
    fp16: float
    fp64: float


CHIPS: dict[str, Chip] = {
    chip.arch: chip
    for chip in (
        Chip("sm_80", "A100", 108, 166_912, 2.04e12, 19.5e12, 312e12, 9.7e12),
        Chip("sm_86", "A40", 84, 101_376, 0.70e12, 37.4e12, 150e12, 0.58e12),
        Chip("sm_89", "L40S", 142, 101_376, 0.86e12, 91.6e12, 362e12, 1.43e12),
        Chip("sm_90a", "H200", 132, 232_448, 4.8e12, 66.9e12, 989e12, 33.5e12),
        Chip("sm_100a", "B200", 148, 232_448, 8.0e12, 75e12, 2250e12, 37e12),
        Chip("sm_120a", "RTX PRO 6000 Blackwell", 188, 101_376, 1.79e12, 125e12, 500e12, 1.95e12),
    )
}

DEFAULT_ARCH = "sm_90a"


def chip_for(arch: str) -> Chip:
    """Returns the chip named `arch`, such as "sm_90a". Raises UnknownArch with the list of known names."""
    try:
        return CHIPS[arch]
    except KeyError:
        raise UnknownArch(f"unknown architecture {arch!r}; choose one of {', '.join(CHIPS)}") from None


def can_overlap(arch: str) -> bool:
    """Whether a launch may begin while the one before it still ends, as from compute capability 9.0 on."""
    return int(arch.removeprefix("sm_").rstrip("a")) >= 90


def arch_of(capability: tuple[int, int]) -> str:
    """Returns the architecture for a compute capability, such as (9, 0) → "sm_90a". Raises UnknownArch."""
    major, minor = capability
    for arch in (f"sm_{major}{minor}a", f"sm_{major}{minor}"):
        if arch in CHIPS:
            return arch
    if capability >= (8, 0):
        # A chip of a known generation runs the code of an earlier minor version.
        older = [c for c in CHIPS if c == f"sm_{major}0"]
        if older:
            return older[0]
    raise UnknownArch(f"this GPU has compute capability {major}.{minor}; fusewright has kernels for {', '.join(CHIPS)}")
