"""No stage imports a later one: what it must know of that reaches it as a value."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "fusewright"

# From the first. What drives the stages comes after them: capture, which torch calls back, the doors, and the tools.
LAYERS = (
    {"errors", "chip", "tuned", "settings"},
    {"ir"},
    {"passes"},
    {"fusion"},
    {"codegen"},
    {"kernels"},
    {"runtime", "simulator"},
    {"compiler"},
    {"capture"},
    {"doors"},
    {"tools"},
    {"cli"},
)
PLACE = {name: place for place, names in enumerate(LAYERS) for name in names}


def imported(file: Path) -> Iterator[str]:
    """The parts of fusewright that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "fusewright":
            names = [f"fusewright.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("fusewright."))


def test_no_stage_imports_a_later_one() -> None:
    for file in SOURCE.rglob("*.py"):
        part = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part != "__init__":  # which imports the doors when they are used
            later = {name for name in imported(file) if PLACE.get(name, 0) > PLACE[part]}
            assert not later, f"{file.relative_to(SOURCE)} imports {', '.join(sorted(later))}"
