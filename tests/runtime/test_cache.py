from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusewright.runtime import cache as cache_module
from fusewright.runtime.cache import MANIFEST, Cache, fingerprint, included

FORK = multiprocessing.get_context("fork")
FILES = {"kernel.cubin": b"\x7fELF" * 100, "compile.log": b"ptxas info"}


def never() -> dict[str, bytes]:
    raise AssertionError("the entry should have come from the cache")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache("cubin", tmp_path / "root")


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    cache_module._warn_once.cache_clear()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def run(*targets: Callable[[], None]) -> list[int | None]:
    """Runs each target in a process of its own, all at once. Returns their exit codes."""
    processes = [FORK.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_built_once_then_loaded(cache: Cache) -> None:
    built = cache.fetch("key", lambda: FILES)
    loaded = Cache("cubin", cache.folder.parent).fetch("key", never)
    assert built.files == loaded.files == FILES
    assert loaded.path("kernel.cubin").read_bytes() == FILES["kernel.cubin"]
    assert cache.fetch("other", lambda: {"a": b""}).files == {"a": b""}


def test_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSEWRIGHT_CACHE_DIR", str(tmp_path / "mine"))
    Cache("cubin").fetch("key", lambda: FILES)
    assert (tmp_path / "mine" / "cubin" / "key" / "kernel.cubin").is_file()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "kernel.cubin").write_bytes(b"\x7fELF" * 99 + b"\x7fELG"),
        lambda folder: os.truncate(folder / "kernel.cubin", 7),
        lambda folder: (folder / "compile.log").unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: os.truncate(folder / MANIFEST, 20),
        lambda folder: (folder / MANIFEST).write_text("[1, 2]"),
        lambda folder: (folder / MANIFEST).write_text('{"kernel.cubin": 5}'),
        lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\x00"),
    ],
)
def test_damaged_entry_is_rebuilt(cache: Cache, damage: Callable[[Path], object]) -> None:
    folder = cache.fetch("key", lambda: FILES).folder
    assert folder is not None
    damage(folder)
    assert cache.fetch("key", lambda: {"new": b"contents"}).files == {"new": b"contents"}
    assert cache.fetch("key", never).files == {"new": b"contents"}
    assert sorted(os.listdir(folder)) == [MANIFEST, "new"]


def test_failed_build_passes_through_and_stores_nothing(cache: Cache) -> None:
    def fails() -> dict[str, bytes]:
        raise OSError("no compiler")

    with pytest.raises(OSError, match="no compiler"), warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.fetch("key", fails)
    assert cache.fetch("key", lambda: FILES).files == FILES  # the lock is free again


def test_concurrent_builders_build_once(cache: Cache, tmp_path: Path) -> None:
    log = tmp_path / "builds"

    def build() -> dict[str, bytes]:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return FILES

    def user() -> None:
        assert cache.fetch("key", build).files == FILES

    def user_with_threads() -> None:
        threads = [threading.Thread(target=user) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert run(user, user_with_threads, user, user_with_threads) == [0] * 4
    assert log.read_text() == "built\n"


def test_killed_in_the_middle_of_a_write(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is freed and the half-written folder is neither used nor left."""

    def writer() -> None:
        monkeypatch.setattr(Path, "write_text", lambda *_: time.sleep(60))  # the manifest is written last
        cache.fetch("key", lambda: FILES)

    process = FORK.Process(target=writer)
    process.start()
    partial = cache.folder / "key.partial"
    wait_for(lambda: (partial / "compile.log").exists())
    os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join()
    assert partial.exists()
    assert not (cache.folder / "key").exists()

    assert cache.fetch("key", lambda: {"new": b""}).files == {"new": b""}
    assert not partial.exists()


def test_interrupted_in_the_middle_of_a_write(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", lambda *_: signal.raise_signal(signal.SIGINT))
        cache.fetch("key", lambda: FILES)
    assert [p.suffix for p in cache.folder.iterdir()] in ([], [".lock"])
    assert cache.fetch("key", lambda: FILES).files == FILES


def test_killed_while_building_frees_the_lock(cache: Cache, tmp_path: Path) -> None:
    started = tmp_path / "started"

    def hangs() -> dict[str, bytes]:
        started.touch()
        time.sleep(60)
        return FILES

    process = FORK.Process(target=lambda: cache.fetch("key", hangs))
    process.start()
    wait_for(started.exists)
    os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join()
    assert cache.fetch("key", lambda: FILES).files == FILES


def test_what_is_in_use_is_not_written_over(cache: Cache) -> None:
    """A library that is loaded would change under its users, and end the process."""
    cache.folder.parent.mkdir(parents=True, exist_ok=True)
    cache.folder.write_text("a file where the folder would be")
    with pytest.warns(RuntimeWarning, match="works without its cache"):
        entries = [cache.fetch("in use", lambda contents=contents: {"a": contents}) for contents in (b"1", b"2")]  # type: ignore[misc]
    with entries[0].path("a").open("rb") as used:
        entries[1].path("a")
        assert used.read() == b"1"


def check_works_without_cache(cache: Cache) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entries = [cache.fetch("key", lambda: FILES) for _ in range(2)]
    assert [entry.files for entry in entries] == [FILES, FILES]
    assert entries[0].folder is None
    first = entries[0].path("compile.log")
    assert first.read_bytes() == FILES["compile.log"] and [p.name for p in first.parent.iterdir()] == ["compile.log"]
    (warning,) = caught
    assert str(cache.folder) in str(warning.message)
    assert "FUSEWRIGHT_CACHE_DIR" in str(warning.message)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_works_without_cache(Cache("cubin", tmp_path / "file"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_read_only_folder() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        check_read_only(Cache("cubin", Path(folder)))


def check_read_only(cache: Cache) -> None:
    cache.fetch("stored", lambda: FILES)

    def as_nobody() -> None:
        os.setuid(65534)
        cache_module._private_folder.cache_clear()
        assert cache.fetch("stored", never).files == FILES  # what is there can be used
        check_works_without_cache(cache)

    assert run(as_nobody) == [0]


def test_full_disk(cache: Cache) -> None:
    """A limit on the size of files fails a write in its middle, as a full disk does."""

    def limited() -> None:
        cache.folder.mkdir(parents=True)
        path = cache.fetch("before", lambda: {"a": b"1"}).folder
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.warns(RuntimeWarning, match="File too large"):
            entry = cache.fetch("key", lambda: FILES)
        assert entry.files == FILES
        assert entry.folder is None
        assert path is not None
        assert cache.fetch("before", never).files == {"a": b"1"}

    assert run(limited) == [0]
    assert not (cache.folder / "key").exists()
    assert not (cache.folder / "key.partial").exists()


def test_manifest_names_every_file(cache: Cache) -> None:
    folder = cache.fetch("key", lambda: FILES).folder
    assert folder is not None
    assert set(json.loads((folder / MANIFEST).read_text())) == set(FILES)


@dataclass(frozen=True)
class Options:
    fmad: bool
    level: int


def test_fingerprint_tells_values_apart() -> None:
    values: list[object] = [
        None, True, False, 1, 0, 1.0, -0.0, 0.0, "1", b"1", "", b"", (), [], {}, ("a", "b"), ("ab",), ("a", ("b",)),
        {"a": "b"}, {"b": "a"}, {"a": None}, Options(True, 1), Options(True, 2), Options(False, 1), float("nan"),
    ]  # fmt: skip
    assert len({fingerprint(part=value) for value in values}) == len(values)
    assert fingerprint(a=1) != fingerprint(b=1)
    assert fingerprint(a="1", b="") != fingerprint(a="", b="1")


def test_fingerprint_is_stable() -> None:
    assert fingerprint(a={"x": 1, "y": 2}, b=3) == fingerprint(b=3, a={"y": 2, "x": 1})
    keys = FORK.Queue()
    assert run(lambda: keys.put(fingerprint(a="text"))) == [0]
    assert keys.get(timeout=10) == fingerprint(a="text")


@pytest.mark.parametrize("value", [object(), {1, 2}, len, Options, [object()], {"a": {1}}])
def test_fingerprint_refuses_what_it_cannot_tell_apart(value: object) -> None:
    with pytest.raises(TypeError, match="cannot fingerprint"):
        fingerprint(part=value)


def test_included_follows_our_files_only(tmp_path: Path) -> None:
    (tmp_path / "a.cuh").write_text('#pragma once\n  #  include "b.cuh"\n#include <cuda_fp16.h>\n')
    (tmp_path / "b.cuh").write_text('#include "a.cuh"\n')
    (tmp_path / "unused.cuh").write_text("")
    texts = included('#include "a.cuh"\n#include <cstdint>\n// #include "no"\nint x;', tmp_path)
    assert set(texts) == {"a.cuh", "b.cuh"}
    assert texts["b.cuh"] == b'#include "a.cuh"\n'


@pytest.mark.parametrize("line", ['#include "missing.cuh"', "#include HEADER"])
def test_included_refuses_what_it_cannot_find(tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError, match="cannot tell what"):
        included(line, tmp_path)
