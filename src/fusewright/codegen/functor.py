"""A region's expressions → the `struct Epilogue` that every kernel family's device code calls.

The functor computes V consecutive columns of a row. The contract that device code relies on is at the top of
`gemm_simt.cuh`, `pointwise.cuh` and `column_sum.cuh`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
import torch

from fusewright.codegen.bounds import lower_bounds
from fusewright.codegen.launch import Arg, BufferArg, FloatArg, SizeArg
from fusewright.codegen.scalar import C_TYPES, literal, scalar
from fusewright.fusion.expression import (
    Access,
    Accumulator,
    Apply,
    ColumnSum,
    Constant,
    Expression,
    Load,
    Store,
    walk,
)
from fusewright.fusion.plan import Region
from fusewright.ir.size import Size, divides


@dataclass(frozen=True)
class Parameter:
    """A member of the functor and a parameter of its kernel: C++ type, name, and the launch's argument."""

    type: str
    name: str
    arg: Arg

    @property
    def declaration(self) -> str:
        return f"{self.type}{'' if self.type.endswith('__ ') else ' '}{self.name}"


@dataclass(frozen=True)
class Functor:
    """text: the struct. parameters: its members, in the order of its initialiser. aligned: it uses wide accesses."""

    text: str
    parameters: tuple[Parameter, ...]
    aligned: bool


def functor(region: Region, width: int, *, wide: bool, partial: bool = False, prefetch: bool = False) -> Functor:
    """Prints the functor of `region` for `width` columns a thread.

    wide: use accesses of several elements where strides allow, which binds the pointers to an alignment.
    partial: column sums are stored in float, one row for each split of the rows.
    prefetch: with a method that prefetches the vectors that all rows read.
    """
    return _Printer(region, width, wide, partial, prefetch).print()


@dataclass
class _Printer:
    region: Region
    width: int
    wide: bool
    partial: bool
    prefetch: bool
    parameters: dict[tuple[str, str], Parameter] = field(default_factory=dict)
    names: dict[Expression, str] = field(default_factory=dict)
    aligned: bool = False

    def print(self) -> Functor:
        region = self.region
        loads, body, stores = self.body()
        lines = []
        if len(region.rows) > 1 and (loads or stores):
            lines += self.row_indices()
        lines += loads
        outputs = [
            f"{C_TYPES[s.value.dtype]} result{i}[V];" for i, s in enumerate(region.sinks) if isinstance(s, Store)
        ]
        lines += outputs
        lines += ["#pragma unroll", "for (int i = 0; i < V; ++i) {", *("    " + line for line in body), "}", *stores]
        sums = [s for s in region.sinks if isinstance(s, ColumnSum)]
        members = [f"{p.declaration};" for p in self.parameters.values()] if not sums else []
        text: list[str] = []
        call = self.method(lines, sums)
        more = [*(self.finish(sums) if sums else []), *(self.prefetching() if self.prefetch else [])]
        members = [f"{p.declaration};" for p in self.parameters.values()]
        if sums:
            members.insert(0, f"static constexpr int kColumnSums = {len(sums)};")
        text = ["struct Epilogue {", *_indent(members), "", *_indent(call)]
        if more:
            text += ["", *_indent(more)]
        return Functor("\n".join([*text, "};"]), tuple(self.parameters.values()), self.aligned)

    def method(self, lines: list[str], sums: list[ColumnSum]) -> list[str]:
        extra = ""
        if self.region.gemm:
            extra = f", const {C_TYPES[self.region.gemm.accumulator]} (&accumulator)[V]"
        if sums:
            extra = f", {C_TYPES[sums[0].value.dtype]} (&sums)[kColumnSums][V]"
        return [
            "template <int V>",
            f"__device__ __forceinline__ void operator()(int64_t m, int64_t n, int count{extra}) const {{",
            *_indent(lines),
            "}",
        ]

    # ---- addresses

    def pointer(self, access: Access, written: bool) -> str:
        """The parameter through which `access` reads or writes."""
        offset = access.offset if not access.bits else divides(8, access.offset) if access.in_bytes else 0
        assert offset is not None
        key = (access.buffer, f"{offset}{written}")
        if key not in self.parameters:
            alignment = 1
            if self.vectorised(access):
                self.aligned = True
                alignment = min(16, self.width * access.dtype.itemsize)
            const = "" if written else "const "
            taken = {p.name for p in self.parameters.values()}
            name = access.buffer if access.buffer not in taken else f"{access.buffer}_{len(taken)}"
            arg = BufferArg(access.buffer, access.dtype, offset, written, alignment)
            self.parameters[key] = Parameter(f"{const}{C_TYPES[access.dtype]}* __restrict__ ", name, arg)
        found = self.parameters[key]
        if self.vectorised(access):
            self.aligned = True
            alignment = max(found.arg.alignment, min(16, self.width * access.dtype.itemsize))  # type: ignore[union-attr]
            arg = BufferArg(access.buffer, access.dtype, found.arg.offset, written, alignment)  # type: ignore[union-attr]
            self.parameters[key] = Parameter(found.type, found.name, arg)
        return self.parameters[key].name

    def vectorised(self, access: Access) -> bool:
        """Whether V columns of a row are one aligned piece of memory whenever the base is aligned."""
        if not self.wide or access.bits or access.strides[-1] != 1:
            return False
        return all(s == 0 or divides(self.width, s) is not None for s in access.strides[:-1])

    def size(self, value: Size) -> str:
        """A size as C++: a literal, or a parameter."""
        if not isinstance(value, sympy.Expr):
            return str(value)
        key = ("size", str(value))
        if key not in self.parameters:
            name = str(value) if value.is_Symbol else f"size{sum(k[0] == 'size' for k in self.parameters)}"
            self.parameters[key] = Parameter("int64_t", name, SizeArg(value))
        return self.parameters[key].name

    def number(self, value: sympy.Expr, dtype: torch.dtype) -> str:
        """A value computed from sizes on the host."""
        if value.is_integer:
            return f"{C_TYPES[dtype]}({self.size(value)})"
        key = ("number", str(value))
        if key not in self.parameters:
            name = f"number{sum(k[0] == 'number' for k in self.parameters)}"
            self.parameters[key] = Parameter(C_TYPES[dtype], name, FloatArg(value, dtype))
        return self.parameters[key].name

    def row_indices(self) -> list[str]:
        """m as one index for each row axis: m0, m1, …"""
        lines = ["int64_t rest = m;"]
        for axis in reversed(range(1, len(self.region.rows))):
            size = self.size(self.region.rows[axis])
            lines += [f"const int64_t m{axis} = rest % {size};", f"rest /= {size};"]
        return [*lines, "const int64_t m0 = rest;"]

    def row(self, access: Access) -> str:
        """The offset of row m as `name + …`, without the column."""
        scale = 8 if access.bits and access.in_bytes else 1
        terms = []
        for axis, stride in enumerate(access.strides[:-1]):
            index = "m" if len(self.region.rows) == 1 else f"m{axis}"
            step = divides(scale, stride)
            assert step is not None
            if step != 0:
                terms.append(index if step == 1 else f"{index} * {self.size(step)}")
        return "".join(f" + {t}" for t in terms)

    # ---- the parts of operator()

    def body(self) -> tuple[list[str], list[str], list[str]]:
        """(loads before the loop over V, the loop's lines, stores after it)."""
        loads: list[str] = []
        lines: list[str] = []
        bounds = lower_bounds(s.value for s in self.region.sinks)
        for expression in walk(s.value for s in self.region.sinks):
            if isinstance(expression, Load):
                loads += self.load(expression, len(self.names))
            elif isinstance(expression, Accumulator):
                self.names[expression] = "accumulator[i]"
            elif isinstance(expression, Constant):
                value = expression.value
                self.names[expression] = (
                    self.number(value, expression.dtype)
                    if isinstance(value, sympy.Expr)
                    else literal(value, expression.dtype)
                )
            else:
                lines.append(self.apply(expression, bounds[expression.operands[-1]]))
        stores = []
        sum_index = 0
        for i, sink in enumerate(self.region.sinks):
            value = self.names[sink.value]
            if isinstance(sink, ColumnSum):
                lines.append(f"if (i < count) sums[{sum_index}][i] += {value};")
                sum_index += 1
            else:
                lines.append(f"result{i}[i] = {value};")
                stores.append(self.store(sink.access, f"result{i}"))
        return loads, lines, stores

    def load(self, expression: Load, index: int) -> list[str]:
        access = expression.access
        name = f"{access.buffer}_v"
        if name in {n.removesuffix("[i]") for n in self.names.values()}:
            name = f"{name}{index}"
        type = C_TYPES[expression.dtype]
        column = access.strides[-1]
        if access.bits and not access.in_bytes:
            self.names[expression] = f"{name}[i]"
            bit = f"{self.size(access.offset)}{self.row(access)} + n * {self.size(column)}"
            mask = self.pointer(access, written=False)
            return [f"{type} {name}[V];", f"fusewright::load_bits({name}, {mask}, {bit}, {self.size(column)}, count);"]
        row = self.pointer(access, written=False) + self.row(access)
        if column == 0:
            self.names[expression] = name
            return [f"const {type} {name} = count > 0 ? *({row}) : {type}(0);"]
        self.names[expression] = f"{name}[i]"
        declare = f"{type} {name}[V];"
        if access.bits:
            return [declare, f"fusewright::load_bits({name}, {row}, n, count);"]
        if self.vectorised(access):
            return [declare, f"fusewright::load_vector({name}, {row} + n, count);"]
        stride = self.size(column)
        at = "n" if column == 1 else f"n * {stride}"
        return [declare, f"fusewright::load({name}, {row} + {at}, {stride}, count);"]

    def store(self, access: Access, value: str) -> str:
        row = self.pointer(access, written=True) + self.row(access)
        column = access.strides[-1]
        if access.bits:
            return f"fusewright::store_bits({row}, n, {value}, count);"
        if self.vectorised(access):
            return f"fusewright::store_vector({row} + n, {value}, count);"
        stride = self.size(column)
        at = "n" if column == 1 else f"n * {stride}"
        return f"fusewright::store({row} + {at}, {stride}, {value}, count);"

    def apply(self, expression: Apply, lower_bound: float) -> str:
        name = f"v{sum(n.startswith('v') and n[1:].isdigit() for n in self.names.values())}"
        text = scalar(expression, [self.names[o] for o in expression.operands], lower_bound)
        self.names[expression] = name
        comment = f"  // {', '.join(expression.origin)}" if expression.origin else ""
        return f"const {C_TYPES[expression.dtype]} {name} = {text};{comment}"

    def prefetching(self) -> list[str]:
        loads = (e.access for e in walk(s.value for s in self.region.sinks) if isinstance(e, Load))
        vectors = [a for a in loads if not a.bits and a.strides[-1] == 1 and all(s == 0 for s in a.strides[:-1])]
        pointers = dict.fromkeys(self.pointer(a, written=False) for a in vectors)
        return [
            "__device__ __forceinline__ void prefetch(int64_t n, int count) const {",
            *_indent([f"if (count > 0) fusewright::prefetch({p} + n);" for p in pointers]),
            "}",
        ]

    def finish(self, sums: list[ColumnSum]) -> list[str]:
        type = C_TYPES[sums[0].value.dtype]
        lines = []
        for k, sink in enumerate(sums):
            if self.partial:
                key = (f"partial{k}", "")
                arg = BufferArg(f"partial{k}", sink.value.dtype, 0, True, 1)
                self.parameters[key] = Parameter(f"{type}* __restrict__ ", f"partial{k}", arg)
                columns = self.size(self.region.columns)
                lines.append(f"fusewright::store(partial{k} + split * {columns} + n, 1, sums[{k}], count);")
                continue
            pointer = self.pointer(sink.access, written=True)
            stride, stored = self.size(sink.access.strides[-1]), C_TYPES[sink.access.dtype]
            at = f"{pointer} + n" if stride == "1" else f"{pointer} + n * {stride}"
            if stored == type:
                lines.append(f"fusewright::store({at}, {stride}, sums[{k}], count);")
            else:
                lines += [
                    f"{stored} rounded{k}[V];",
                    "#pragma unroll",
                    f"for (int i = 0; i < V; ++i) rounded{k}[i] = {stored}(sums[{k}][i]);",
                    f"fusewright::store({at}, {stride}, rounded{k}, count);",
                ]
        return [
            "template <int V>",
            "__device__ __forceinline__ void finish(int64_t split, int64_t n, int count, "
            f"const {type} (&sums)[kColumnSums][V]) const {{",
            *_indent(lines),
            "}",
        ]


def _indent(lines: list[str]) -> list[str]:
    return ["" if not line else line if line.startswith("#") else "    " + line for line in lines]
