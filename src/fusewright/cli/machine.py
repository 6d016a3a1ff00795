"""The commands that look at this machine."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from fusewright.cli.options import Arch, Json, flag
from fusewright.cli.output import Output
from fusewright.errors import NotConfirmed, UnknownSetting

Kind = Annotated[
    list[str] | None,
    typer.Option("--kind", metavar="KIND", help="Only entries of this kind, as `cache info` names it; repeatable."),
]


def doctor(arch: Arch = None, json_: Json = None) -> None:
    """Say what this machine can do, what is missing, and the command that mends it. Exit code 1: unusable."""
    output = Output("doctor", json_)
    from fusewright.chip import chip_for
    from fusewright.tools.doctor import diagnose

    with output.kept():
        diagnosis = diagnose(arch and chip_for(arch).arch, output.console)
    output.result(diagnosis)
    if not diagnosis.ok:
        raise typer.Exit(1)


def cache_info(json_: Json = None) -> None:
    """Show where the cache is, and how many entries of each kind it holds."""
    from fusewright.runtime.cache import stored
    from fusewright.settings import cache_dir
    from fusewright.tools.units import size

    output = Output("cache info", json_)
    kinds = stored()
    entries, total = sum(k.entries for k in kinds), sum(k.bytes for k in kinds)
    table = Table(title=Text(str(cache_dir())), title_justify="left")
    for column in ("kind", "entries", "size"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for k in kinds:
        table.add_row(k.kind, str(k.entries), size(k.bytes))
    table.add_row("all", str(entries), size(total))
    output.console.print(table)
    output.result({"location": cache_dir(), "entries": entries, "bytes": total, "kinds": kinds})


def cache_tuned(json_: Json = None) -> None:
    """Show what the tuner chose, by GPU, as text that the setting `tuned` takes."""
    from fusewright.runtime.autotune import remembered

    output = Output("cache tuned", json_)
    found = remembered()
    for device, choices in found.items():
        output.console.print(f"# {device}", *map(str, choices), sep="\n", markup=False)
    if not found:
        output.console.print("nothing was tuned yet: the first call of a compiled model on a GPU does it")
    devices = [{"device": device, "choices": list(map(str, choices))} for device, choices in found.items()]
    output.result({"devices": devices})


def cache_clear(
    kind: Kind = None,
    yes: Annotated[bool, flag("--yes", "-y", help="Do not ask.")] = False,
    json_: Json = None,
) -> None:
    """Remove what the cache holds. Programs that use it now go on, and compile again what they need."""
    from fusewright.runtime.cache import KINDS, clear, stored
    from fusewright.settings import cache_dir
    from fusewright.tools.units import counted, size

    output = Output("cache clear", json_)
    everything = stored()
    known = sorted({*KINDS, *(s.kind for s in everything)})
    unknown = [k for k in kind or () if k not in known]
    if unknown:
        raise UnknownSetting(
            f"the cache has no kind {', '.join(map(repr, unknown))}; its kinds are: {', '.join(known)}"
        )
    held = [k for k in everything if not kind or k.kind in kind]
    count = counted(sum(k.entries for k in held), "entry", "entries")
    what = f"{count} ({size(sum(k.bytes for k in held))}) from {cache_dir()}"
    if not yes:
        if not sys.stdin.isatty():
            raise NotConfirmed(f"would remove {what}; say so with --yes where nobody can be asked")
        if not typer.confirm(f"Remove {what}?", err=True):
            raise NotConfirmed("nothing was removed")
    cleared = clear(kinds=kind or ())
    stay = f"; {cleared.in_use} stay, which other processes are building" if cleared.in_use else ""
    count = counted(cleared.entries, "entry", "entries")
    output.console.print(f"removed {count} ({size(cleared.bytes)}){stay}", markup=False)
    output.result(
        {"location": cache_dir(), "removed": cleared.entries, "bytes": cleared.bytes, "in_use": cleared.in_use}
    )
