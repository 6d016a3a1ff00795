"""The fenced blocks of a document, and what running them means.

A block's first word is its language, as Markdown has it; the others say what a test does with it:

| block | in a test |
|---|---|
| `sh` | each line runs in the document's folder, one after another, and must succeed |
| `sh gpu`, `python gpu` | the same, where there is a GPU |
| `sh measure` | takes long on a GPU: the programs that it names must exist |
| `sh setup` | sets a machine up: `make` must know each target, the rest is left out |
| `python NAME.py` | saved under that name |
| `python` | runs, in the document's folder |
| `python fragment` | does not stand alone, and must be Python |
| `text` | what the block before it prints: these lines in this order; `…` alone on a line stands for others |
| `cuda NAME` | the same, of a file's text |
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fusewright import cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    words: tuple[str, ...]
    text: str
    line: int

    @property
    def lines(self) -> list[str]:
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [line.split(" # ")[0].rstrip() for line in joined.splitlines() if line.strip()]


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, *words = match[1].split() or [""]
        found.append(Block(language, tuple(words), match[2], text[: match.start()].count("\n") + 1))
    return found


def missing(shown: str, actual: str) -> str | None:
    """The first part of `shown` (parts are split by lines of `…`) that `actual` does not hold after the one before."""
    rest = "\n" + "\n".join(line.rstrip() for line in actual.splitlines()) + "\n"
    for part in re.split(r"^\s*…\s*$", shown, flags=re.MULTILINE):
        wanted = "\n".join(line.rstrip() for line in part.strip("\n").splitlines())
        if not wanted:
            continue
        _, found, rest = rest.partition(f"\n{wanted}\n")
        if not found:
            return wanted
        rest = "\n" + rest
    return None


@dataclass
class Runner:
    """Runs the blocks of one document in an empty folder."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture[str]
    printed: str = ""

    def __post_init__(self) -> None:
        self.monkeypatch.chdir(self.folder)
        self.monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def run(self, block: Block) -> None:
        if "gpu" in block.words and not torch.cuda.is_available():
            self.printed = ""
            return
        if "measure" in block.words:
            assert all((ROOT / name).is_file() for name in re.findall(r"\bpython (\S+)", block.text))
        elif "fragment" in block.words:
            ast.parse(block.text)
        elif block.language == "sh":
            outputs = [self._line(line, "setup" in block.words) for line in block.lines]
            self.printed = "".join(outputs)
        elif block.language == "python" and block.words and block.words[0].endswith(".py"):
            Path(block.words[0]).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            self.printed = self._python(block)
        elif block.language == "text" and self.printed:
            self._compare(block, self.printed)
        elif block.language == "cuda":
            self._compare(block, Path(block.words[0]).read_text(encoding="utf-8"))

    def _compare(self, block: Block, actual: str) -> None:
        absent = missing(block.text, actual)
        assert absent is None, f"line {block.line}: not printed:\n{absent}\nbut:\n{actual}"

    def _line(self, line: str, setup: bool) -> str:
        if setup:
            made = re.fullmatch(r"make (\w+)", line)
            return self._shell(["make", "-n", "-C", str(ROOT), made[1]]) if made else ""
        words = shlex.split(line)
        if "fusewright" not in words[:2] or any(mark in line for mark in "|>;&"):
            return self._shell(["bash", "-euo", "pipefail", "-c", line])
        while "=" in words[0]:
            self.monkeypatch.setenv(*words.pop(0).split("=", 1))
        return self._command(words)

    def _command(self, words: list[str]) -> str:
        """The command line's entry point, in this process: torch is imported already."""
        self.monkeypatch.setattr(sys, "argv", words)
        self.capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = self.capfd.readouterr()
        assert code == 0, f"{shlex.join(words)}: exit code {code}\n{printed.err}"
        return printed.out

    def _python(self, block: Block) -> str:
        """In this process, too, under the names that a script has."""
        script = Path(f"line_{block.line}.py")
        script.write_text(block.text, encoding="utf-8")
        self.capfd.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return self.capfd.readouterr().out

    def _shell(self, command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout
