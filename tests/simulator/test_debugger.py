"""The debugger session of docs/debugging-kernels.md, run as it stands there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "debugging-kernels.md"


@pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb")
def test_the_documented_session(tmp_path: Path) -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    example = next(block for block in blocks if "Simulator()" in block)
    (tmp_path / "debug_reverse.py").write_text(example.replace("Simulator()", "Simulator(debug=True)"))
    session = next(block for block in blocks if "(gdb)" in block)
    lines = session.splitlines()[1:]
    (tmp_path / "commands").write_text("".join(f"{line[6:]}\n" for line in lines if line.startswith("(gdb) ")))
    command = ["gdb", "-nx", "-batch", "-x", "commands", "--args", sys.executable, "debug_reverse.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr and "not permitted" in done.stderr:
        pytest.skip("processes may not be traced here")
    rest = done.stdout
    for line in (line for line in lines if not line.startswith("(gdb) ")):
        # gdb names the thread after the interpreter's file.
        pattern = re.escape(line).replace("…", ".*").replace('"python"', '"[^"]*"')
        found = re.search(pattern, rest)
        assert found, f"not printed after the lines before it: {line}\n{done.stdout}{done.stderr}"
        rest = rest[found.end() :]
