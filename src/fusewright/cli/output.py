"""Where a command writes: text for people, JSON for programs, progress on a terminal."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from fusewright import __version__
from fusewright.errors import OutputNotWritable

SCHEMA = 1  # of docs/json.md; grows when a key changes its meaning or goes


class Output:
    """One command's output.

    Text goes to standard output, with a spinner while work goes on if that is a terminal. `--json PATH` writes a file
    besides. With `--json -` JSON stands alone on standard output; the text, and what the user's files print, go to
    standard error.
    """

    def __init__(
        self, command: str, path: Path | None = None, inputs: Sequence[Path] = (), outputs: Sequence[Path] = ()
    ) -> None:
        """inputs, outputs: files that must not be overwritten. Raises OutputNotWritable where `path` cannot be written,
        or is one of these."""
        self._command, self._path = command, path
        self._alone = str(path) == "-"
        if path is not None and not self._alone:
            from fusewright.tools.files import check_output

            check_output(path, inputs, "--json")
            if any(path.resolve() == other.resolve() for other in outputs):
                raise OutputNotWritable(f"{path} is to hold something else; choose another name with --json")
        stream = sys.stderr if self._alone else sys.stdout
        self.console = Console(highlight=False, soft_wrap=not stream.isatty(), stderr=self._alone)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Shows on a terminal that torch is being imported, which takes seconds."""
        with self.console.status("loading torch"):
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within it whatever prints leaves standard output to JSON, a compiler that a user's file starts too."""
        if not self._alone:
            yield
            return
        sys.stdout.flush()
        kept = os.dup(1)
        try:
            os.dup2(2, 1)
            with redirect_stdout(sys.stderr):
                yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)

    def result(self, data: object) -> None:
        """Writes the JSON that was asked for, if any. data: a dataclass or a mapping."""
        if self._path is None:
            return
        content = {"schema": SCHEMA, "fusewright": __version__, "command": self._command, **plain(data)}
        text = json.dumps(content, indent=2, allow_nan=False)
        if self._alone:
            typer.echo(text)
        else:
            from fusewright.tools.files import write

            write(self._path, text + "\n")


def plain(value: Any) -> Any:
    """The value as JSON can hold it: a number that is not finite is null, a path its text."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
