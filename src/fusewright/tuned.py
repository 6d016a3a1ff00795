"""What the tuner chose, as text: the log and `fusewright cache tuned` print it, and the setting `tuned` takes it.

One choice a line, or between semicolons: what is computed, the sizes that it was measured at, and the program. Lines
that start with # are comments.

    fused_addmm_gelu bfloat16 nt 1024x8192x8192: gemm_sm90 128x256x64
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusewright.errors import InvalidSetting

_LINE = re.compile(r"(\w+(?: \w+)*) (\d+(?:x\d+)*) ?: ?(\w+(?: [\w-]+)*)")


@dataclass(frozen=True)
class Choice:
    """region: the kernel's name, what it computes with, the layout of operands. sizes: rows, columns, depth. program:
    its family and variant.
    """

    region: str
    sizes: tuple[int, ...]
    program: str

    def __str__(self) -> str:
        return f"{self.region} {'x'.join(map(str, self.sizes))}: {self.program}"

    @property
    def kernel(self) -> str:
        return self.region.split()[0]

    @property
    def served(self) -> tuple[str, tuple[int, ...]]:
        """The region, and the range of sizes that the choice serves."""
        return self.region, size_range(self.sizes)


def size_range(sizes: Sequence[int]) -> tuple[int, ...]:
    """Equal for sizes that share a choice: between the same powers of two."""
    return tuple(size.bit_length() for size in sizes)


def text(choices: Iterable[Choice]) -> str:
    return "\n".join(map(str, choices))


def parse(given: str) -> tuple[Choice, ...]:
    """Raises InvalidSetting for what is no choice, and where two name different programs for the same."""
    found: dict[object, Choice] = {}
    for line in re.split(r"[;\n]", plain(given)):
        words = " ".join(line.split())
        if not words or words.startswith("#"):
            continue
        match = _LINE.fullmatch(words)
        if match is None:
            raise InvalidSetting(
                f"setting 'tuned' has {words!r}, which is no choice of the tuner; a choice is such as "
                "'fused_mm bfloat16 nt 1024x8192x8192: gemm_sm90 128x256x64', and `fusewright cache tuned` lists them"
            )
        choice = Choice(match[1], tuple(map(int, match[2].split("x"))), match[3])
        other = found.setdefault(choice.served, choice)
        if other.program != choice.program:
            raise InvalidSetting(
                f"setting 'tuned' has two programs for sizes that share one, {str(other)!r} and {str(choice)!r}; "
                "leave one of them"
            )
    return tuple(found.values())


def plain(name: str) -> str:
    """As a terminal and a keyboard have it."""
    return name.replace("×", "x")
