"""A captured model's graphs, planned: what `explain` describes, `emit` writes and `optimize` checks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from fusewright import compiler
from fusewright.capture.model import CapturedModel
from fusewright.chip import Chip
from fusewright.fusion.plan import FusionPlan
from fusewright.ir.graph import Graph, substitute
from fusewright.ir.size import TYPICAL_SIZE, SizeSymbol
from fusewright.kernels.base import Program
from fusewright.kernels.choose import candidates


@dataclass(frozen=True)
class Planned:
    """One graph of the model (`fused` is inference): its plan, the program of each region, and example sizes."""

    name: str
    graph: Graph
    plan: FusionPlan
    programs: dict[str, Program]
    sizes: Mapping[sympy.Symbol, int]


def plan_model(
    captured: CapturedModel,
    chip: Chip,
    *,
    library: bool,
    variants: Mapping[str, str] | None = None,
    tensor_maps: bool = True,
) -> tuple[Planned, ...]:
    """Plans inference, and forward and backward where the model trains, with readable buffer names.

    library: let torch compute products. variants: by region name, the tile to use rather than the cost model's choice.
    tensor_maps: launches may take tensor maps, as they do in written files.
    """
    names = argument_names(captured)
    graphs = [("fused", captured.inference, names)]
    if captured.forward is not None and captured.backward is not None:
        graphs.append(("forward", captured.forward, names))
        graphs.append(("backward", captured.backward, _saved_names(captured, names)))
    planned = []
    for name, graph, inputs in graphs:
        renamed = _size_names(graph, inputs, captured.sizes)
        graph = substitute(graph, renamed)
        plan = compiler.plan(graph, inputs, captured.capabilities if name == "fused" else None)
        programs = {
            region: _choice(found, library, (variants or {}).get(f"{name}.{region}"))
            for region, found in candidates(plan, chip, library=library, tensor_maps=tensor_maps).items()
        }
        sizes = {renamed.get(symbol, symbol): value for symbol, value in captured.sizes.items()}
        planned.append(Planned(name, graph, plan, programs, sizes))
    return tuple(planned)


def variants_of(planned: Sequence[Planned]) -> dict[str, str]:
    """Which tile each region uses, to use the same at other sizes."""
    return {f"{p.name}.{region}": program.variant for p in planned for region, program in p.programs.items()}


def _choice(found: Sequence[Program], library: bool, variant: str | None) -> Program:
    if library:
        return next((p for p in found if p.library), found[0])
    return next((p for p in found if p.variant == variant), found[0])


# Words that the generated code uses for something else.
_RESERVED = {"a", "b", "m", "n", "M", "N", "K", "i", "count", "out", "rows", "cols", "rest", "split", "sums", "options"}
_RESERVED |= {"accumulator", "wanted", "results", "guard", "batch", "default", "float", "double", "int", "register"}


def argument_names(captured: CapturedModel) -> list[str | None]:
    """A C++ identifier for each argument: the last word of its expression, or more of it where that is not unique."""
    names: list[str | None] = []
    for expression in captured.arguments:
        names.append(None if expression is None else _identifier(expression, names))
    return names


def _identifier(expression: str, taken: Sequence[str | None]) -> str:
    words = [w for w in re.split(r"\W+", expression) if w and w != "self"]
    for count in range(1, len(words) + 1):
        name = "_".join(words[-count:]).lstrip("_0123456789")
        if name and name not in taken and name not in _RESERVED:
            return name
    return f"input{len(taken)}"


def _saved_names(captured: CapturedModel, names: Sequence[str | None]) -> list[str | None]:
    """Names for the backward's inputs: arguments keep theirs; masks, activations and gradients are numbered."""
    assert captured.forward is not None
    result: list[str | None] = []
    for saved in captured.saved:
        if saved.kind == "argument":
            result.append(names[saved.index])
        elif saved.kind == "gradient":
            result.append("grad" if captured.outputs == 1 else f"grad{saved.index}")
        elif saved.kind == "output":
            node = captured.forward.outputs[saved.index]
            kind = "mask" if node is not None and node.op == "pack_bits" else "saved"
            result.append(kind if kind not in result else f"{kind}{saved.index}")
        else:
            result.append(None)
    return result


def _size_names(
    graph: Graph, names: Sequence[str | None], sizes: Mapping[sympy.Symbol, int]
) -> dict[sympy.Symbol, sympy.Symbol]:
    """Readable names for size symbols: `batch` for the first, else tensor and dimension. sizes: the example's."""
    found: dict[sympy.Symbol, sympy.Symbol] = {}
    for node, name in zip(graph.inputs, names, strict=True):
        for dim, size in enumerate(node.type.shape if node.type is not None else ()):
            if isinstance(size, sympy.Symbol) and size not in found:
                text = "batch" if not found else f"{name}_size{dim}"
                typical = max(1, sizes.get(size, TYPICAL_SIZE))
                found[size] = SizeSymbol(text, typical, integer=True, nonnegative=True)
    return found
