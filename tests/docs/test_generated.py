"""The tables of docs/settings.md, made from the code. FUSEWRIGHT_UPDATE_GOLDEN=1 writes them anew."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import typer
from blocks import DOCS

from fusewright.chip import CHIPS
from fusewright.cli.app import app
from fusewright.settings import ENVIRONMENT, Settings


def settings() -> str:
    """From the docstring of Settings, which says `name: what it is. name: …`."""
    names = [f.name for f in fields(Settings)]
    text = " ".join((Settings.__doc__ or "").split())
    parts = re.split(rf"\b({'|'.join(names)}): ", text)
    meanings = dict(zip(parts[1::2], parts[2::2], strict=True))
    lines = ["| setting | type | default | |", "|---|---|---|---|"]
    for field in fields(Settings):
        meaning = meanings[field.name].strip()
        kind = str(field.type).replace("|", "or")
        lines.append(f"| `{field.name}` | {kind} | `{field.default}` | {meaning[0].upper()}{meaning[1:]} |")
    return "\n".join(lines)


def environment() -> str:
    return "\n".join(["| variable | |", "|---|---|", *(f"| `{k}` | {v} |" for k, v in ENVIRONMENT.items())])


def commands() -> str:
    parts = []
    root = typer.main.get_command(app)
    for name, command in [("fusewright", root), *sorted(_commands("fusewright", root))]:
        parts += [f"### `{name}`", "", (command.help or "").strip().split("\n\n")[0].replace("\n", " "), ""]
        rows = [row for parameter in command.params if (row := _row(parameter))]
        if rows:
            parts += ["| | |", "|---|---|", *rows, ""]
    return "\n".join(parts).strip()


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
    else:
        for key, value in inner.items():
            yield from _commands(f"{name} {key}", value)


def _row(parameter: Any) -> str | None:
    meaning = (getattr(parameter, "help", None) or "").replace("|", "\\|").replace("<", "&lt;")
    if parameter.param_type_name == "argument":
        return f"| `{parameter.metavar or parameter.name.upper()}` | {meaning} |"
    if {"--help", "--install-completion", "--show-completion"} & {*parameter.opts}:  # typer's, in its own words
        return None
    metavar = parameter.metavar or ("" if parameter.is_flag else parameter.name.upper())
    spelled = ", ".join(f"`{o} {metavar}`".replace(" `", "`") for o in parameter.opts)
    return f"| {spelled} | {meaning} |"


def chips() -> str:
    lines = [
        "| `--arch` | largest part | multiprocessors | shared memory a block | memory |",
        "|---|---|---:|---:|---:|",
    ]
    for chip in CHIPS.values():
        shared = f"{chip.shared_bytes / 1024:.0f} KiB"
        lines.append(
            f"| `{chip.arch}` | {chip.name} | {chip.multiprocessors} | {shared} | {chip.bandwidth / 1e12:.2f} TB/s |"
        )
    return "\n".join(lines)


PARTS = {
    "settings": ("settings.md", settings),
    "environment": ("settings.md", environment),
    "commands": ("settings.md", commands),
    "chips": ("limits.md", chips),
}


@pytest.mark.parametrize("part", PARTS)
def test_is_what_the_code_says(part: str) -> None:
    name, generate = PARTS[part]
    path = DOCS / name
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {part}:begin -->\n", f"\n<!-- {part}:end -->"
    head, _, rest = text.partition(begin)
    shown, _, tail = rest.partition(end)
    assert tail, f"{name} has no place for {part}"
    if os.environ.get("FUSEWRIGHT_UPDATE_GOLDEN") == "1":
        path.write_text(f"{head}{begin}{generate()}{end}{tail}", encoding="utf-8")
    else:
        assert shown == generate(), "run it with FUSEWRIGHT_UPDATE_GOLDEN=1"
