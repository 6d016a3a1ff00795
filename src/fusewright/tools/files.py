"""Files that a command writes: looked at before the work, and written whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fusewright.errors import OutputNotWritable


def check_output(out: Path, inputs: Iterable[Path] = (), option: str = "-o") -> None:
    """Raises OutputNotWritable before any work is done. option: what names `out` on the command line."""
    if str(out) == "-":
        raise OutputNotWritable(f"standard output has what the command prints; name a file with {option}")
    try:
        if any(out.exists() and path.exists() and out.samefile(path) for path in inputs):
            raise OutputNotWritable(f"{out} is the input itself; choose another name with {option}")
        if out.is_dir():
            raise OutputNotWritable(f"{out} is a folder; name the file to write with {option}")
        if not out.parent.is_dir():
            raise OutputNotWritable(f"there is no folder {out.parent} to write {out.name} in; create it first")
        why = "permission denied" if out.exists() and not os.access(out, os.W_OK) else ""
        if not _is_stream(out):
            with tempfile.TemporaryFile(dir=out.resolve().parent):  # os.access says yes of /proc, and of a full disk
                pass
    except OSError as error:  # of the looking too, where a name is too long
        why = (error.strerror or str(error)).lower()
    except RuntimeError:  # of `resolve`, before Python 3.13
        why = "its links lead in a circle"
    if why:
        raise OutputNotWritable(f"{out} cannot be written: {why}; choose another place with {option}")


def write(path: Path, contents: str | bytes) -> None:
    """Writes the file whole or not at all: beside it first, then renamed; a file that is there keeps its permissions.

    Raises OutputNotWritable.
    """
    data = contents.encode() if isinstance(contents, str) else contents
    target = path.resolve()  # a link stays one
    temporary = target.parent / f".fusewright-{secrets.token_hex(8)}"
    try:
        if _is_stream(path):
            path.write_bytes(data)
            return
        with temporary.open("xb") as stream:
            stream.write(data)
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        temporary.replace(target)
    except OSError as error:
        raise OutputNotWritable(f"{path} cannot be written ({error.strerror}); choose another place") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _is_stream(path: Path) -> bool:
    """A pipe or a device, or a link to one, such as /dev/stdout: nothing can be renamed into its place."""
    return path.exists() and not path.is_file()
