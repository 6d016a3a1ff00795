"""The settings that a user can change, and the one table of environment names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from fusewright.chip import chip_for
from fusewright.errors import InvalidSetting, UnknownSetting
from fusewright.tuned import parse

# environment name → what it sets
ENVIRONMENT = {
    "FUSEWRIGHT_CACHE_DIR": "folder of compiled kernels and tuning results (default ~/.cache/fusewright)",
    "FUSEWRIGHT_TRACEBACK": "1: the command line shows the traceback of an internal error",
}


@dataclass(frozen=True)
class Settings:
    """Options of one compilation; every default is the careful one.

    library: let cuBLAS compete for matrix products, on a GPU. simulate: run the kernels on the CPU in the simulator.
    schedules: with `simulate`, how many orders of its threads each launch tries. arch: with `simulate`, the chip to
    compile for; None means sm_90a. On a GPU it is that GPU. cuda_graphs: replay what a call launches as one CUDA graph.
    freeze: parameters and buffers never change, so what is made of them (fp16 halves of float32 weights) is kept from
    one call to the next, in as much memory again; refuses gradients. `fusewright.thaw()` forgets it.
    tuned: programs to run without measuring, as `fusewright cache tuned` lists them; what it does not name is measured.
    """

    library: bool = True
    simulate: bool = False
    schedules: int = 1
    arch: str | None = None
    cuda_graphs: bool = False
    freeze: bool = False
    tuned: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any] | None, also: Sequence[str] = ()) -> Settings:
        """Builds settings from a user's mapping. also: what else may be named where the user names settings.

        Raises UnknownSetting for a name that is not one of ours, UnknownArch for a chip that we do not know,
        InvalidSetting for a value of another type or form and for settings that exclude each other.
        """
        types = get_type_hints(cls)
        for name, value in (options or {}).items():
            if name not in types:
                raise UnknownSetting(_unknown(name, [*types, *also]))
            if not _has_type(value, types[name]):
                wanted = getattr(types[name], "__name__", types[name])
                raise InvalidSetting(f"setting {name!r} takes {wanted}, not {value!r}")
        settings = cls(**(options or {}))
        if settings.schedules < 1:
            raise InvalidSetting(f"setting 'schedules' takes 1 or more, not {settings.schedules}")
        if settings.simulate and settings.cuda_graphs:
            raise InvalidSetting("cuda_graphs needs a GPU, and simulate runs on the CPU; set one of them")
        if settings.arch is not None:
            chip_for(settings.arch)
        parse(settings.tuned or "")
        return settings


def _unknown(name: str, known: Sequence[str]) -> str:
    closest = get_close_matches(str(name), known, 1)
    hint = f"did you mean {closest[0]!r}? " if closest else ""
    return f"unknown setting {name!r}; {hint}the settings are {', '.join(known)}"


def _has_type(value: Any, type: Any) -> bool:
    return isinstance(value, type) and not (isinstance(value, bool) and type is int)


def tf32_allowed() -> bool:
    """Whether torch's flags, under their old names or new, let products of float32 round operands to TF32.

    Dynamo compiles again when the answer changes.
    """
    import torch  # here, for the cache and the command line start without it

    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def cache_dir() -> Path:
    """The folder that holds compiled kernels; created by whoever writes to it. Raises InvalidSetting."""
    given = os.environ.get("FUSEWRIGHT_CACHE_DIR") or "~/.cache/fusewright"
    try:
        return Path(given).expanduser()
    except RuntimeError:  # no such user, or one without a home
        raise InvalidSetting(
            f"the cache cannot be in {given}: there is no such home folder; set FUSEWRIGHT_CACHE_DIR to a folder"
        ) from None
