"""A disk cache of build products: cubins here, shared objects in the simulator, anything that is named files of bytes.

An entry is a folder that appears whole, by one rename. It is verified by checksums each time it is loaded; one that
is corrupt, truncated or half-written counts as missing and is built again. Any number of processes and threads may
share a cache, and any of them may be killed at any moment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from fusewright.errors import InvalidSetting, OutputNotWritable
from fusewright.settings import cache_dir

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial"  # ends the name of a folder that is being written
_ENTRY = re.compile(rf"[0-9a-f]{{64}}({re.escape(PARTIAL)})?")

KINDS = ("cubin", "simulator", "tuning")  # of what fusewright keeps

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Entry:
    """The verified files of one entry: file name → contents.

    folder: where they lie; None when the cache could not store them.
    """

    key: str
    files: Files
    folder: Path | None

    def path(self, name: str) -> Path:
        """Returns a path at which file `name` can be opened, for consumers such as `dlopen`. Raises OSError."""
        if self.folder is not None and (self.folder / name).exists():  # not if the cache was cleared meanwhile
            return self.folder / name
        path = _private_folder() / self.key / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            whole = path.with_name(f"{name}.{threading.get_ident()}")
            whole.write_bytes(self.files[name])
            whole.replace(path)  # not written over: a library that is loaded would change under its users
        return path


class Cache:
    """The entries of one kind, such as "cubin", in one folder."""

    def __init__(self, kind: str, root: Path | None = None) -> None:
        self.folder = (root or cache_dir()) / kind

    def fetch(self, key: str, build: Callable[[], Files]) -> Entry:
        """Returns the entry for `key`, calling `build` for its files when there is none.

        Of several processes that want the same key at once, one builds and the others wait for it. Whatever `build`
        raises passes through and stores nothing. Where the disk is read-only or full, a warning is given once and
        the entry is built each time.
        """
        if entry := self.find(key):
            return entry
        with self._lock(key) as locked:
            if entry := self.find(key):
                return entry
            files = build()
            return Entry(key, files, self._store(key, files) if locked else None)

    def entries(self) -> list[Entry]:
        """Those that are whole, the oldest first. Raises InvalidSetting where the folder cannot be read."""
        found = [entry for folder in _entries(self.folder) if (entry := self.find(folder.name))]
        return sorted(found, key=lambda entry: _written(entry.folder))

    def find(self, key: str) -> Entry | None:
        """Returns the entry for `key` if it is there and whole."""
        folder = self.folder / key
        try:
            digests = json.loads((folder / MANIFEST).read_bytes())
            files = {name: (folder / name).read_bytes() for name in dict(digests)}
        except (OSError, ValueError, TypeError):
            return None
        if any(_digest(contents) != digests[name] for name, contents in files.items()):
            return None
        return Entry(key, files, folder)

    def _store(self, key: str, files: Files) -> Path | None:
        """Writes an entry; the caller holds its lock, so that leftovers under these names belong to nobody."""
        final, partial = self.folder / key, self.folder / f"{key}{PARTIAL}"
        try:
            for leftover in (final, partial):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
            for name, contents in files.items():
                (partial / name).write_bytes(contents)
            digests = {name: _digest(contents) for name, contents in files.items()}
            (partial / MANIFEST).write_text(json.dumps(digests, indent=1))
            partial.rename(final)
        except OSError as error:
            self._warn(error)
            return None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return final

    @contextmanager
    def _lock(self, key: str) -> Iterator[bool]:
        """Holds the lock of `key`; yields False where there can be none. The system frees it when its holder dies."""
        from filelock import FileLock  # costs 30 ms, and a cache hit does not need it

        lock = FileLock(self.folder / f"{key}.lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            self._warn(error)
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _warn(self, error: BaseException) -> None:
        _warn_once(
            f"fusewright works without its cache, so everything is compiled anew in each process: {self.folder} "
            f"cannot be written ({error}). Set FUSEWRIGHT_CACHE_DIR to a folder that can."
        )


@dataclass(frozen=True)
class Stored:
    """What the cache holds of one kind. bytes: of all files, half-written entries of killed processes included."""

    kind: str
    entries: int
    bytes: int


@dataclass(frozen=True)
class Cleared:
    """What `clear` removed. in_use: entries that another process is building, which stay."""

    entries: int
    bytes: int
    in_use: int


def stored(root: Path | None = None) -> list[Stored]:
    """What the cache holds, by kind. Raises InvalidSetting where it cannot be read."""
    found = []
    for kind in _kinds(root or cache_dir()):
        entries = list(_entries(kind))
        whole = [entry for entry in entries if entry.suffix != PARTIAL]
        found.append(Stored(kind.name, len(whole), sum(map(_bytes, entries))))
    return found


def clear(root: Path | None = None, kinds: Collection[str] = ()) -> Cleared:
    """Removes entries, of all kinds or of these, while other processes use the cache. Raises OutputNotWritable,
    or InvalidSetting where they cannot be read.

    Each goes under its lock, so that nobody's half-built entry is touched; a process that is reading one takes it as
    missing and builds it again. What is not an entry stays. So do the lock files, which are empty: a process may be
    waiting for one.
    """
    from filelock import FileLock, Timeout

    removed, size, in_use = 0, 0, 0
    for kind in _kinds(root or cache_dir()):
        if kinds and kind.name not in kinds:
            continue
        for entry in _entries(kind):
            try:
                with FileLock(kind / f"{entry.stem}.lock", timeout=0):
                    freed = _bytes(entry)
                    _remove(entry)
            except Timeout:
                in_use += 1
            except FileNotFoundError:
                continue  # another process was faster
            except OSError as error:
                raise OutputNotWritable(f"{entry} cannot be removed ({error.strerror})") from None
            else:
                removed += entry.suffix != PARTIAL
                size += freed
    return Cleared(removed, size, in_use)


def _remove(entry: Path) -> None:
    """Takes an entry away by one rename, so that no reader sees a part of it; the caller holds its lock."""
    partial = entry.with_suffix(PARTIAL)
    if entry != partial:
        shutil.rmtree(partial, ignore_errors=True)
        entry.rename(partial)
    shutil.rmtree(partial)


def _kinds(root: Path) -> list[Path]:
    return sorted(_folders(root))


def _entries(kind: Path) -> list[Path]:
    """Entries, the half-written ones first. They are named by fingerprints: nothing else there is ours to remove."""
    found = (path for path in _folders(kind) if _ENTRY.fullmatch(path.name))
    return sorted(found, key=lambda path: (path.suffix != PARTIAL, path.name))


def _folders(folder: Path) -> list[Path]:
    """Those in a folder; none where there is no folder."""
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InvalidSetting(
            f"the cache cannot be read: {folder} ({error.strerror}); set FUSEWRIGHT_CACHE_DIR to a folder that can be"
        ) from None


def _written(folder: Path | None) -> float:
    """When; 0 for one that another process has just removed."""
    try:
        return (folder / MANIFEST).stat().st_mtime if folder else 0.0
    except OSError:
        return 0.0


def _bytes(folder: Path) -> int:
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # another process may just have removed it
                total += os.stat(os.path.join(base, name)).st_size
    return total


def fingerprint(**parts: object) -> str:
    """Returns the key of an entry that depends on `parts`, on this package's version and on the cache's format.

    Parts are None, bool, int, float, str, bytes, or tuples, lists, mappings and dataclasses of these. Anything else
    raises TypeError: what cannot be told apart must not be cached.
    """
    return _digest(_encode({**parts, "fusewright": _version(), "format": FORMAT_VERSION}))


def included(source: str, folder: Path) -> dict[str, bytes]:
    """Returns name → contents of every file of `folder` that `source` includes, directly or through another.

    Guards are not evaluated, so it may return more than a compiler reads. `#include <name>` of what is not in
    `folder` is left to the caller, as a part of the compiler. `#include "name"` of such a file, and an include of a
    macro, raise ValueError.
    """
    found: dict[str, bytes] = {}
    pending = [source]
    while pending:
        for name in _names_included(pending.pop()):
            file = name[1:-1]
            path = f"{folder}/{file}"
            if not os.path.isfile(path):
                if name[0] != "<":
                    raise ValueError(f"cannot tell what `#include {name}` includes: it is no file of {folder}")
            elif file not in found:
                found[file] = Path(path).read_bytes()
                pending.append(found[file].decode())
    return found


@lru_cache(maxsize=256)
def _names_included(text: str) -> list[str]:
    return _INCLUDE.findall(text)


_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include\b[ \t]*(\S+)", re.MULTILINE)


def _encode(value: object) -> bytes:
    """Encodes a value so that different values have different encodings (every piece carries its type and length)."""
    if value is None or isinstance(value, bool | int | float | str):
        body = repr(value).encode()
    elif isinstance(value, bytes):
        body = value
    elif isinstance(value, tuple | list):
        body = b"".join(map(_encode, value))
    elif isinstance(value, Mapping):
        body = b"".join(sorted(_encode(item) for item in value.items()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        body = b"".join(_encode((field.name, getattr(value, field.name))) for field in dataclasses.fields(value))
    else:
        raise TypeError(f"cannot fingerprint a {type(value).__qualname__}: {value!r}")
    return f"{type(value).__qualname__} {len(body)} ".encode() + body


def _digest(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


@cache
def _version() -> str:
    try:
        return importlib.metadata.version("fusewright")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from a source tree; the texts that matter are parts of each key anyway


@cache
def _private_folder() -> Path:
    """A folder of this process alone, removed when it ends."""
    folder = tempfile.TemporaryDirectory(prefix="fusewright-")
    _keep_alive.append(folder)
    return Path(folder.name)


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=5)


_keep_alive: list[object] = []
