"""Output files: whole or not at all, and refused before the work where they cannot be written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fusewright.errors import OutputNotWritable
from fusewright.tools.files import check_output, write


def test_write_is_whole_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out.py"
    write(target, "one\n")
    write(target, "two\n")
    assert target.read_text() == "two\n" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(UnicodeEncodeError):
        write(target, "\ud800")
    assert target.read_text() == "two\n" and list(tmp_path.iterdir()) == [target]
    write(target, b"\xff\0")
    assert target.read_bytes() == b"\xff\0"


def test_write_says_why_not(tmp_path: Path) -> None:
    with pytest.raises(OutputNotWritable, match="choose another place"):
        write(tmp_path / "missing" / "out.py", "")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    target = tmp_path / "out.py"
    write(target, "one\n")
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises((KeyboardInterrupt, OutputNotWritable)):
        write(target, "two\n")
    assert target.read_text() == "one\n" and list(tmp_path.iterdir()) == [target]


def test_a_file_has_the_usual_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "out.py", "")
    finally:
        os.umask(before)
    assert (tmp_path / "out.py").stat().st_mode & 0o777 == 0o640


def test_places_that_cannot_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    if sys.version_info < (3, 13):  # which resolves such a link to itself, and it is replaced
        with pytest.raises(OutputNotWritable, match="b cannot be written: its links lead in a circle"):
            check_output(tmp_path / "b")
    with pytest.raises(
        OutputNotWritable, match="cannot be written: file name too long; choose another place with --json"
    ):
        check_output(tmp_path / ("a" * 300), [tmp_path / "a"], "--json")


def test_a_longest_name(tmp_path: Path) -> None:
    target = tmp_path / ("模" * 84 + ".py")  # 255 bytes, the most that file systems take
    write(target, "")
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_to_the_input_is_the_input(tmp_path: Path) -> None:
    path, link = tmp_path / "model.py", tmp_path / "link.py"
    path.write_text("")
    link.symlink_to(path)
    with pytest.raises(OutputNotWritable, match="the input itself; choose another name with --json"):
        check_output(link, [tmp_path / "missing.py", path], "--json")
    check_output(tmp_path / "new.py", [path])


def test_a_link_stays_one_and_a_file_keeps_its_mode(tmp_path: Path) -> None:
    path, link = tmp_path / "there" / "model.py", tmp_path / "link.py"
    path.parent.mkdir()
    path.write_text("old")
    path.chmod(0o755)
    link.symlink_to(path)
    write(link, "new")
    assert link.is_symlink() and path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o755


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    """As is a device, such as /dev/stdout; neither is replaced."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_output(pipe)
        write(pipe, "text")
        assert os.read(reader, 100) == b"text" and pipe.is_fifo()
    finally:
        os.close(reader)


def test_a_pipe_behind_a_descriptor_is_written_to() -> None:
    """As /dev/stdout is where a command stands before another one's pipe."""
    reader, writer = os.pipe()
    try:
        path = Path(f"/dev/fd/{writer}")
        if not path.exists():
            pytest.skip("there is no /dev/fd")
        check_output(path)
        write(path, "text")
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
        os.close(writer)
