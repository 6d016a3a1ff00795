"""What makes a graph legal, as one rule a node kind. Checked after every pass."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusewright.ir.encoding import Halves
from fusewright.ir.graph import Graph, Node, untransposed
from fusewright.ir.primitives import PRIMITIVES
from fusewright.ir.size import product, same


def check(graph: Graph) -> None:
    """Raises AssertionError that names the first node which breaks a rule."""
    seen: set[Node] = set()
    for node in graph.nodes():
        for source in node.inputs:
            assert source in seen, f"{node.op} is used before its input {source.op}"
        seen.add(node)
        broken = _RULES.get(node.op, _primitive)(node)
        assert broken is None, f"{node.op} {node.attributes} {node.type}: {broken}"


def _primitive(node: Node) -> str | None:
    row = PRIMITIVES.get(node.op)
    if row is None:
        return "unknown operation"
    if len(node.inputs) != row.arity:
        return f"takes {row.arity} operands"
    for source in node.inputs:
        if source.op != "constant" and source.tensor.shape != node.tensor.shape:
            return f"an operand has shape {source.tensor.shape}"
    dtypes = {i.tensor.dtype for i in (node.inputs[1:] if node.op == "where" else node.inputs)}
    if len(dtypes) != 1:
        return f"operands of different dtypes {dtypes}"
    if node.op == "where" and node.inputs[0].tensor.dtype != torch.bool:
        return "the condition is not boolean"
    wanted = torch.bool if row.boolean else dtypes.pop()
    if node.op != "cast" and node.tensor.dtype != wanted:
        return f"the result should be {wanted}"
    if node.op not in ("cast", "copy") and not row.boolean and wanted in (torch.float16, torch.bfloat16):
        return "computes in a 16-bit float"
    return None


def _reshape(node: Node) -> str | None:
    before, after = product(node.inputs[0].tensor.shape), product(node.tensor.shape)
    return None if same(before, after) else f"{before} elements become {after}"


def _permute(node: Node) -> str | None:
    shape, dims = node.inputs[0].tensor.shape, node.attribute("dims")
    if sorted(dims) != list(range(len(shape))):
        return "dims are no permutation"
    return None if node.tensor.shape == tuple(shape[d] for d in dims) else "shape does not follow dims"


def _expand(node: Node) -> str | None:
    old, new = node.inputs[0].tensor.shape, node.tensor.shape
    if len(old) > len(new):
        return "drops a dimension"
    wrong = [(a, b) for a, b in zip(reversed(old), reversed(new), strict=False) if a != 1 and not same(a, b)]
    return f"cannot broadcast {wrong}" if wrong else None


def _slice(node: Node) -> str | None:
    shape, dim = node.inputs[0].tensor.shape, node.attribute("dim")
    if any(not same(a, b) for i, (a, b) in enumerate(zip(shape, node.tensor.shape, strict=True)) if i != dim):
        return "changes another dimension"
    if node.attribute("step") < 1:
        return "step is not positive"
    last = node.attribute("start") + (node.tensor.shape[dim] - 1) * node.attribute("step")
    if isinstance(last, int) and isinstance(shape[dim], int) and last >= shape[dim]:
        return "runs past the end"
    return None


def _matmul(node: Node) -> str | None:
    operands, encodings = node.inputs[:2], node.inputs[2:]
    (m, k), (k2, n) = (i.tensor.shape for i in operands)
    if not same(k, k2) or node.tensor.shape != (m, n):
        return "inner dimensions differ"
    tf32 = dict(node.attributes).get("tf32", False)
    if tf32 and (encodings or any(o.tensor.dtype != torch.float32 for o in operands)):
        return "reads what are no floats as TF32"
    if not encodings:
        return None
    if len(encodings) != 2:
        return "one operand is encoded, the other is not"
    planes, transposed, by_line = (node.attribute(n) for n in ("planes", "transposed", "by_line"))
    if not planes[0]:
        return "the left operand is read in registers"
    if any(by and not (full and along) for by, full, along in zip(by_line, planes, _along_k(transposed), strict=True)):
        return "an encoding by line is read across its lines"
    for operand in zip(encodings, operands, transposed, planes, by_line, strict=True):
        broken = _encodes(*operand)
        if broken is not None:
            return broken
    return None


def _along_k(transposed: tuple[bool, bool]) -> tuple[bool, bool]:
    """Whether products sum along the lines of what is encoded: those of a as it is, of b's transpose."""
    a, b = transposed
    return not a, b


def _encodes(encoding: Node, operand: Node, transposed: bool, planes: int, by_line: bool) -> str | None:
    """An encoding that is an input of the graph is known by its size alone, where that is a number."""
    lines, length = reversed(operand.tensor.shape) if transposed else operand.tensor.shape
    found, wanted = encoding.tensor.shape[0], Halves(lines, length, planes, by_line).words
    if isinstance(found, int) and isinstance(wanted, int) and found != wanted:
        return "an encoding has another size than its operand's"
    if encoding.op != "encode":
        return None
    source, turned = untransposed(encoding.inputs[0])
    base, other = untransposed(operand)
    if base is not source or (turned != other) != transposed:
        return "an encoding is not of its operand"
    if encoding.attribute("planes") != planes:
        return "an encoding has another number of planes"
    return None if encoding.attribute("by_line") == by_line else "an encoding has other exponents"


def _encode(node: Node) -> str | None:
    source = node.inputs[0].tensor
    if source.dtype != torch.float32 or len(source.shape) != 2:
        return "encodes something that is no float32 matrix"
    words = Halves.of(source.shape, node.attribute("planes"), node.attribute("by_line")).words
    fits = node.tensor.dtype == torch.int32 and len(node.tensor.shape) == 1 and same(node.tensor.shape[0], words)
    return None if fits else "the buffer has another type or size than the halves need"


def _sum(node: Node) -> str | None:
    dims = node.attribute("dims")
    kept = tuple(s for i, s in enumerate(node.inputs[0].tensor.shape) if i not in dims)
    return None if node.tensor.shape == kept else "shape does not follow dims"


def _pack_bits(node: Node) -> str | None:
    return None if node.inputs[0].tensor.dtype == torch.bool else "packs something that is not boolean"


def _anything(node: Node) -> str | None:
    return None


_RULES: dict[str, Callable[[Node], str | None]] = {
    "input": _anything,
    "size": _anything,
    "constant": _anything,
    "aten": _anything,
    "item": _anything,
    "unpack_bits": _anything,
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "encode": _encode,
    "slice": _slice,
    "matmul": _matmul,
    "sum": _sum,
    "pack_bits": _pack_bits,
}
