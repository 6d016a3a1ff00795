"""The options that commands share, and what their values mean. torch is imported by those who need it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusewright.chip import CHIPS, DEFAULT_ARCH, Chip, arch_of, chip_for
from fusewright.errors import UnsupportedDtype

if TYPE_CHECKING:
    import torch

DTYPES = ("float16", "bfloat16", "float32", "float64")


def flag(*names: str, help: str) -> Any:
    """An option without a value; some versions of typer would show `<bool>` for one."""
    return typer.Option(*names, metavar="", help=help)


def _archs() -> list[str]:
    return list(CHIPS)


def _dtypes() -> list[str]:
    return list(DTYPES)


def modes() -> list[str]:
    return ["forward", "backward", "both"]


File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A model file: class Model, get_inputs() and get_init_inputs().")
]
Reference = Annotated[Path, typer.Argument(metavar="REFERENCE", help="The model file that is right.")]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar="ARCH",
        autocompletion=_archs,
        help=f"Compile for this chip: {', '.join(CHIPS)}. Default: the GPU here, else {DEFAULT_ARCH}.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        autocompletion=_dtypes,
        help=f"Cast floating parameters and inputs to {', '.join(DTYPES)}. Default: as the file.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Replace a module constant of the file, such as batch_size=64; repeatable."
    ),
]
Schedules = Annotated[
    int,
    typer.Option(
        "--schedules",
        min=1,
        metavar="SCHEDULES",
        show_default=False,
        help="Where kernels are simulated: how many orders of their threads to try. Default: 1.",
    ),
]
Library = Annotated[
    bool, flag("--allow-library", help="Let torch's own library compute products and missing operators.")
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="PATH",
        allow_dash=True,
        help="Write the result as JSON to this file too; - for standard output, text then going to standard error.",
    ),
]


def chip(arch: str | None) -> Chip:
    """The chip that the user names, or the GPU here, or the default. Raises UnknownArch."""
    import torch

    if arch is not None:
        return chip_for(arch)
    return chip_for(arch_of(torch.cuda.get_device_capability()) if torch.cuda.is_available() else DEFAULT_ARCH)


def dtype(name: str | None) -> torch.dtype | None:
    """Raises UnsupportedDtype."""
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        raise UnsupportedDtype(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}")
    return getattr(torch, name)  # type: ignore[no-any-return]


def settings(pairs: list[str] | None) -> dict[str, object]:
    """Raises UnknownSetting."""
    from fusewright.capture.model_file import parse_setting

    return dict(parse_setting(pair) for pair in pairs or [])
