"""The text of a model file with class Model replaced: everything else stays as its author wrote it."""

from __future__ import annotations

import ast
import io
import tokenize
from dataclasses import dataclass

from fusewright.errors import CannotCapture


@dataclass(frozen=True)
class ModelSource:
    """A model file's text, in which `Model` is called `ModelNew`, without what `forward` computes.

    before: up to the class. head: the class up to the end of `forward`'s signature and docstring. tail: the rest of the
    class. after: what follows it. outer, indent: before `def forward`, and of its statements. line: where `forward` or
    its first decorator stands. arguments: the names that it takes, `self` first.
    """

    before: str
    head: str
    tail: str
    after: str
    outer: str
    indent: str
    line: int
    arguments: tuple[str, ...]


def split(source: str, tree: ast.Module) -> ModelSource:
    """Cuts the text at class Model and at the body of its `forward`. Raises CannotCapture where it has none."""
    place = max((i for i, n in enumerate(tree.body) if isinstance(n, ast.ClassDef) and n.name == "Model"), default=None)
    if place is None:
        raise CannotCapture("Model is not defined by a `class Model` at the top level of the file; define it there")
    source = rename(source)
    model = ast.parse(source).body[place]
    assert isinstance(model, ast.ClassDef)
    methods = [n for n in model.body if isinstance(n, ast.FunctionDef) and n.name == "forward"]
    if not methods:
        raise CannotCapture("class Model has no forward of its own; define it in the class")
    forward = methods[-1]
    lines = _lines(source)
    start, stop = _first_line(model) - 1, model.end_lineno or model.lineno
    cut, signature, indent = _signature(forward, lines)
    end = forward.end_lineno or forward.lineno
    head = "".join(lines[start:cut]) + signature
    taken = forward.args
    names = [*taken.posonlyargs, *taken.args, taken.vararg, *taken.kwonlyargs, taken.kwarg]
    arguments = tuple(a.arg for a in names if a is not None)
    before, tail, after = ("".join(part) for part in (lines[:start], lines[end:stop], lines[stop:]))
    outer = _indent(lines[forward.lineno - 1])
    return ModelSource(before, head, tail, after, outer, indent, _first_line(forward), arguments)


def _signature(forward: ast.FunctionDef, lines: list[str]) -> tuple[int, str, str]:
    """How many lines to keep whole, what to keep of the next, and the indentation of the body."""
    first = forward.body[0]
    documented = ast.get_docstring(forward) is not None
    line = lines[first.lineno - 1].encode()
    opening, indent = line[: first.col_offset].decode(), _indent(lines[first.lineno - 1])
    if not opening.strip():  # the body has lines of its own
        if not documented:
            return _first_line(first) - 1, "", opening
        end = (first.end_lineno or first.lineno) - 1
        return end, f"{lines[end].encode()[: first.end_col_offset].decode()}\n", opening
    indent = _indent(lines[forward.lineno - 1])
    indent += "\t" if "\t" in indent else "    "
    docstring = ast.get_source_segment("".join(lines), first) if documented else None
    return first.lineno - 1, f"{opening.rstrip()}\n" + (f"{indent}{docstring}\n" if docstring else ""), indent


def _lines(text: str) -> list[str]:
    """As Python counts them: `str.splitlines` ends lines at form feeds, U+2028 and others too."""
    return list(io.StringIO(text))


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _first_line(node: ast.stmt) -> int:
    """The line of a definition's first decorator, or of the statement itself."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)])


def rename(text: str) -> str:
    """Replaces the name `Model` by `ModelNew`, in code alone: not in comments, texts or as an attribute."""
    lines = _lines(text)
    edits: list[tuple[int, int]] = []
    previous = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and token.string == "Model" and previous != ".":
            edits.append(token.start)
        previous = token.string
    for row, column in reversed(edits):
        line = lines[row - 1]
        lines[row - 1] = line[:column] + "ModelNew" + line[column + len("Model") :]
    return "".join(lines)
