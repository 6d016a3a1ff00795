"""What the cache holds, and clearing it while other processes use it."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fusewright.errors import InvalidSetting, OutputNotWritable
from fusewright.runtime.cache import PARTIAL, Cache, Cleared, Stored, clear, fingerprint, stored

FORK = multiprocessing.get_context("fork")
FILES = {"kernel.cubin": b"\x7fELF" * 100, "compile.log": b"ptxas info"}


def fill(root: Path, kind: str, count: int) -> list[Path]:
    entries = [Cache(kind, root).fetch(fingerprint(kind=kind, number=i), lambda: FILES) for i in range(count)]
    return [entry.folder for entry in entries if entry.folder is not None]


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*"))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_what_is_stored(tmp_path: Path) -> None:
    assert stored(tmp_path / "missing") == []
    cubins = fill(tmp_path, "cubin", 3)
    fill(tmp_path, "tuning", 1)
    assert stored(tmp_path) == [
        Stored("cubin", 3, sum(map(size_of, cubins))),
        Stored("tuning", 1, size_of(cubins[0])),
    ]


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> None:
        raise PermissionError(13, "Permission denied")  # root may read everything

    assert not stored(Path(__file__)) and not Cache("cubin", Path(__file__)).entries()  # which is no folder
    monkeypatch.setattr(Path, "iterdir", refused)
    for look in (lambda: stored(tmp_path), lambda: clear(tmp_path), Cache("cubin", tmp_path).entries):
        with pytest.raises(InvalidSetting, match=r"cannot be read: .* \(Permission denied\); set FUSEWRIGHT_CACHE_DIR"):
            look()


def test_clear(tmp_path: Path) -> None:
    cubins = fill(tmp_path, "cubin", 3)
    fill(tmp_path, "tuning", 2)
    left = cubins[0].with_suffix(PARTIAL)  # of a process that was killed
    left.mkdir()
    (left / "kernel.cubin").write_bytes(b"1234")
    freed = sum(map(size_of, [*cubins, left]))
    assert clear(tmp_path, ["cubin"]) == Cleared(3, freed, 0)
    assert [(s.kind, s.entries, s.bytes > 0) for s in stored(tmp_path)] == [("cubin", 0, False), ("tuning", 2, True)]
    assert clear(tmp_path).entries == 2 and clear(tmp_path) == Cleared(0, 0, 0)
    assert len(fill(tmp_path, "cubin", 3)) == 3


def test_only_entries_are_removed(tmp_path: Path) -> None:
    """FUSEWRIGHT_CACHE_DIR may name a folder with other things in it."""
    fill(tmp_path, "cubin", 1)
    others = [tmp_path / "notes.txt", tmp_path / "cubin" / "notes.txt", tmp_path / "photos" / "manifest.json"]
    (tmp_path / "photos").mkdir()
    for path in others:
        path.write_text("mine")
    clear(tmp_path)
    assert all(path.read_text() == "mine" for path in others) and stored(tmp_path)[0].entries == 0


def test_what_another_process_is_building_stays(tmp_path: Path) -> None:
    fill(tmp_path, "cubin", 2)
    key, started, go_on = fingerprint(busy=True), tmp_path / "started", tmp_path / "go on"

    def build() -> dict[str, bytes]:
        (tmp_path / "cubin" / f"{key}{PARTIAL}").mkdir()
        started.touch()
        wait_for(go_on.exists)
        return FILES

    process = FORK.Process(target=lambda: Cache("cubin", tmp_path).fetch(key, build))
    process.start()
    wait_for(started.exists)
    cleared = clear(tmp_path)
    assert (cleared.entries, cleared.in_use) == (2, 1) and cleared.bytes > 0
    go_on.touch()
    process.join(30)
    assert process.exitcode == 0 and stored(tmp_path)[0].entries == 1


def test_a_loaded_entry_outlives_the_clearing(tmp_path: Path) -> None:
    entry = Cache("cubin", tmp_path).fetch(fingerprint(a=1), lambda: FILES)
    assert entry.folder is not None and entry.path("compile.log").parent == entry.folder
    clear(tmp_path)
    assert entry.path("compile.log").read_bytes() == FILES["compile.log"]


def test_clearing_beside_users(tmp_path: Path) -> None:
    """Users always get the right contents, however often the cache is cleared under them."""
    keys = [fingerprint(number=i) for i in range(4)]
    stop = tmp_path / "stop"

    def user() -> None:
        while not stop.exists():
            for key in keys:
                entry = Cache("cubin", tmp_path).fetch(key, lambda key=key: {"a": key.encode(), **FILES})  # type: ignore[misc]
                assert entry.files == {"a": key.encode(), **FILES}

    processes = [FORK.Process(target=user) for _ in range(3)]
    for process in processes:
        process.start()
    removed = 0
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        removed += clear(tmp_path).entries
    stop.touch()
    for process in processes:
        process.join(30)
    assert [p.exitcode for p in processes] == [0, 0, 0] and removed > 4


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_cannot_be_removed_is_said(tmp_path: Path) -> None:
    (folder,) = fill(tmp_path, "cubin", 1)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)

    def as_nobody() -> None:
        os.setuid(65534)
        with pytest.raises(OutputNotWritable, match="cannot be removed"):
            clear(tmp_path)

    process = FORK.Process(target=as_nobody)
    process.start()
    process.join(30)
    assert process.exitcode == 0 and folder.exists()
