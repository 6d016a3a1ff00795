"""What a kernel family is: it says which regions it can compute on a chip, and how, best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fusewright.chip import Chip
from fusewright.codegen.functor import Functor
from fusewright.codegen.launch import LaunchSpec
from fusewright.fusion.plan import Buffer, Encode, Matrix, Region, View


@dataclass(frozen=True)
class LibraryCall:
    """A product that torch's library computes into buffer `result`, plus a row vector where `bias` is given."""

    a: Matrix
    b: Matrix
    bias: View | None
    result: str


@dataclass(frozen=True)
class Program:
    """One way to compute a region or an encoding: launches in order, and the memory they need besides the plan's.

    cost: predicted seconds, for ranking. library: runs before the launches. variant: which of its family's tiles.
    """

    family: str
    region: Region | Encode
    launches: tuple[LaunchSpec, ...]
    workspaces: tuple[Buffer, ...] = ()
    cost: float = 0.0
    library: LibraryCall | None = None
    variant: str = ""


@dataclass(frozen=True)
class Refused:
    """A family's no, and why."""

    family: str
    reason: str


class Family(Protocol):
    """A kernel family. Stateless; programs are ranked best first."""

    @property
    def name(self) -> str: ...

    def supports(self, region: Region, chip: Chip) -> Refused | None: ...

    def programs(self, region: Region, chip: Chip) -> Sequence[Program]: ...


# What the text of a kernel names → the header that has it.
_SYSTEM = {"__half": "cuda_fp16.h", "__nv_bfloat16": "cuda_bf16.h"}
_OURS = {
    "fusewright::from_one::": "division.cuh",
    "fusewright::integer::": "integer.cuh",
    "fusewright::special::": "special.cuh",
    "fusewright::launch_": "launch.cuh",
    "fusewright::narrow::": "narrow.cuh",
}

# How the body of a kernel begins whose launch may overlap with the one before it.
WAIT = "fusewright::launch_before_wait();"


def translation_unit(headers: Sequence[str], functor: Functor, alias: str, kernel: str) -> str:
    """Includes, the functor, the named instantiation of the hand-written code, and the kernel."""
    text = functor.text + alias + kernel
    system = [f"#include <{h}>" for name, h in _SYSTEM.items() if name in text]
    includes = [*system, *(f'#include "{h}"' for h in (*headers, *(h for name, h in _OURS.items() if name in text)))]
    return "\n".join([*includes, "", functor.text, "", alias, "", kernel, ""])


def initialiser(functor: Functor) -> str:
    return "Epilogue{" + ", ".join(p.name for p in functor.parameters) + "}"


def boolean(value: bool) -> str:
    """As C++."""
    return "true" if value else "false"


def comment(region: Region) -> str:
    """The operators of a region, as a kernel's comment."""
    return ", ".join(region.operators) or "copy"


__all__ = [
    "WAIT",
    "Family",
    "LibraryCall",
    "Program",
    "Refused",
    "boolean",
    "comment",
    "initialiser",
    "translation_unit",
]
