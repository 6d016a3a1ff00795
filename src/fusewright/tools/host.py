"""A plan → the C++ function that a written file calls: allocate, launch, return. The launches are those of the plan."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import sympy
import torch

from fusewright.codegen.launch import Arg, BufferArg, FloatArg, LaunchSpec, SizeArg, TensorMapArg, map_type
from fusewright.codegen.scalar import C_TYPES
from fusewright.codegen.text import call
from fusewright.errors import NoKernel
from fusewright.fusion.plan import Buffer, Fallback, FusionPlan, Matrix, Step, View
from fusewright.ir.graph import Operand
from fusewright.ir.size import Size, divides, product
from fusewright.kernels.base import LibraryCall, Program

AT_TYPES = {
    torch.float32: "at::kFloat",
    torch.float64: "at::kDouble",
    torch.float16: "at::kHalf",
    torch.bfloat16: "at::kBFloat16",
    torch.bool: "at::kBool",
    torch.uint8: "at::kByte",
    torch.int8: "at::kChar",
    torch.int16: "at::kShort",
    torch.int32: "at::kInt",
    torch.int64: "at::kLong",
}


def cxx(size: Size) -> str:
    """A size expression as C++ over variables named like its symbols. Division rounds down; sizes are not negative."""
    if not isinstance(size, sympy.Expr) or size.is_Integer:
        return str(int(size))
    if size.is_Symbol:
        return str(size)
    if isinstance(size, (sympy.Min, sympy.Max)):
        name = "std::min" if isinstance(size, sympy.Min) else "std::max"
        text = cxx(size.args[0])
        for other in size.args[1:]:
            text = f"{name}<int64_t>({text}, {cxx(other)})"
        return text
    if isinstance(size, sympy.floor):
        top, bottom = sympy.fraction(sympy.together(size.args[0]))
        return f"{_factor(top)} / {_factor(bottom)}"
    if type(size).__name__ in ("FloorDiv", "CleanDiv"):
        return f"{_factor(size.args[0])} / {_factor(size.args[1])}"
    if type(size).__name__ in ("Mod", "PythonMod"):
        return f"{_factor(size.args[0])} % {_factor(size.args[1])}"
    if size.is_Add:
        return " + ".join(cxx(a) for a in sorted(size.args, key=lambda a: a.is_number))
    if size.is_Mul:
        # A division comes first: it has to round before its result is multiplied.
        return " * ".join(_factor(a) for a in sorted(size.args, key=lambda a: not isinstance(a, sympy.floor)))
    if size.is_Pow and size.exp.is_Integer and size.exp > 0:
        return " * ".join([cxx(size.base)] * int(size.exp))
    raise NoKernel(f"a size of the model, {size}, cannot be written as C++")


def _factor(size: Size) -> str:
    text = cxx(size)
    return text if re.fullmatch(r"\w+", text) else f"({text})"


def braces(sizes: Sequence[Size]) -> str:
    return "{" + ", ".join(cxx(s) for s in sizes) + "}"


@dataclass
class Kernels:
    """The kernels of a file, each once and in a namespace of its own, by the function that is first to launch it.

    declarations: of the kernels, as the host's compiler takes them. headers: the `.cuh` files that they need;
    includes: the system headers; operators: the headers of ATen's operators that the functions call.
    """

    names: dict[tuple[str, str], str] = field(default_factory=dict)  # by kernel and source
    texts: dict[str, list[str]] = field(default_factory=dict)  # by function
    declarations: list[str] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    includes: list[str] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)

    def name(self, launch: LaunchSpec, function: str) -> str:
        """The kernel's name with its namespace."""
        key = (launch.kernel, launch.source)
        if key not in self.names:
            first = f"{function.removeprefix('fusewright_')}_{launch.kernel.removeprefix('fused_')}"
            names = chain([first], (f"{first}_{i}" for i in count(2)))
            taken = {name.split("::")[0] for name in self.names.values()}
            namespace = next(n for n in names if n not in taken)
            self.names[key] = f"{namespace}::{launch.kernel}"
            kernel = self.kernel(launch)
            text = f"namespace {namespace} {{\n\n{kernel}\n\n}}  // namespace {namespace}"
            self.texts.setdefault(function, []).append(text)
            self.declarations.append(declaration(namespace, launch.kernel, kernel))
        return self.names[key]

    def kernel(self, launch: LaunchSpec) -> str:
        """The functor, the instantiation and the kernel."""
        lines = []
        for line in launch.source.split("\n"):
            include = re.match(r'#include (["<])(\S+)[">]', line)
            if include:
                (self.headers if include[1] == '"' else self.includes).append(include[2])
            else:
                lines.append(line.removeprefix('extern "C" '))
        return "\n".join(lines).strip()


def declaration(namespace: str, name: str, kernel: str) -> str:
    """Of a kernel. On the host its name is that of the function which nvcc writes for it, and the runtime launches."""
    head = re.search(rf"__global__ void(?: __launch_bounds__\([^)]*\))?\s+{name}\((.*?)\) \{{", kernel, re.DOTALL)
    assert head, f"{name} is not defined in its source"
    plain = re.sub(r"\s+", " ", re.sub(r" __restrict__|const __grid_constant__ ", "", head[1]))
    parameters = [p.strip() for p in plain.split(",")]
    return "\n".join(call(f"namespace {namespace} {{ void {name}", parameters, "; }"))


@dataclass
class HostPrinter:
    """Prints one plan as function `name` of its tensor inputs.

    kernels: takes the kernels that it launches. conditional: the function takes `wanted`, one number for each result,
    computes only what the wanted ones need, and returns those.
    """

    name: str
    plan: FusionPlan
    programs: Mapping[str, Program]
    kernels: Kernels
    conditional: bool = False

    def print(self) -> str:
        """The function, after one that checks its arguments."""
        inputs = tensor_inputs(self.plan)
        results = [o for o in self.plan.outputs if isinstance(o, View)]
        lines = [
            checked(self.name, inputs),
            f"const c10::cuda::CUDAGuard guard({inputs[0].name}_.device());",
            *size_variables(inputs, "int64_t", "size"),
            *(f"const at::Tensor {b.name} = ready({b.name}_, {braces(b.stride)});" for b in inputs),
            f"const at::TensorOptions options = {inputs[0].name}.options();",
        ]
        made = [n for s in self.plan.steps for n in dict.fromkeys(s.writes())]
        if made:
            lines.append(f"at::Tensor {', '.join(made)};")
        for step in self.plan.steps:
            lines += ["", *self.step(step, results)]
        values = [self.view(r.view) + (f".clone({r.format})" if r.shared else "") for r in own_memory(self.plan)]
        lines += ["", *returns(values, self.conditional)]
        text = definition(self.name, inputs, len(results), self.conditional, lines)
        return f"{check_function(self.name, inputs)}\n\n{text}"

    def step(self, step: Step, results: Sequence[View]) -> list[str]:
        lines = self.fallback(step) if isinstance(step, Fallback) else self.region(self.programs[step.name], step)
        condition = ""
        if self.conditional:
            needed = [i for i, r in enumerate(results) if step in self.needs(r.buffer)]
            condition = f"if ({' || '.join(f'wanted[{i}]' for i in needed)}) "
        return [f"{condition}{{  // {', '.join(step.operators) or 'copy'}", *(f"    {line}" for line in lines), "}"]

    def needs(self, buffer: str) -> list[Step]:
        """The steps that have to run for a buffer to be written."""
        found: list[Step] = []
        pending = [buffer]
        while pending:
            name = pending.pop()
            for step in self.plan.steps:
                if name in step.writes() and step not in found:
                    found.append(step)
                    pending += step.reads()
        return found

    def region(self, program: Program, step: Step) -> list[str]:
        lines = [f"{n} = {self.allocate(self.plan.buffers[n])};" for n in dict.fromkeys(step.writes())]
        lines += [f"at::Tensor {w.name} = {self.allocate(w)};" for w in program.workspaces]
        if program.library:
            lines.append(self.library(program.library))
        maps: dict[TensorMapArg, str] = {}
        for launch in program.launches:
            if 0 not in launch.grid:  # it has nothing to do at any size
                lines += self.launch(permitted(launch), maps)
        return lines

    def allocate(self, buffer: Buffer) -> str:
        shape, stride = braces(buffer.shape), braces(buffer.stride)
        return f"at::empty_strided({shape}, {stride}, options.dtype({AT_TYPES[buffer.dtype]}))"

    def library(self, call: LibraryCall) -> str:
        a, b = self.view(call.a), self.view(call.b)
        self.kernels.operators.append("ATen/ops/mm.h" if call.bias is None else "ATen/ops/addmm.h")
        if call.bias is not None:
            return f"at::addmm_out({call.result}, {self.view(call.bias)}, {a}, {b});"
        return f"at::mm_out({call.result}, {a}, {b});"

    def launch(self, launch: LaunchSpec, maps: dict[TensorMapArg, str]) -> list[str]:
        """The call, after the tensor maps that it takes. maps: the names of those that are there, which it adds to."""
        if launch.cluster[1:] != (1, 1) or launch.block[1:] != (1, 1):
            raise NoKernel(f"{launch.kernel} has blocks or clusters of several dimensions, which are not written")
        name = self.kernels.name(launch, self.name)
        shape = [*(cxx(g) for g in launch.grid), str(launch.block[0]), str(launch.shared_bytes)]
        # What reads ahead relies on the step before, which a backward may leave out.
        early = launch.early and not launch.ahead
        if not early or launch.cluster[0] > 1:
            shape += ["true" if early else "false", str(launch.cluster[0])]
        lines = []
        for arg in launch.args:
            if isinstance(arg, TensorMapArg) and arg not in maps:
                taken = {*self.plan.buffers, *maps.values()}
                names = chain([f"{arg.buffer}_map"], (f"{arg.buffer}_map{i}" for i in count(2)))
                maps[arg] = next(n for n in names if n not in taken)
                lines += tensor_map(maps[arg], arg)
        arguments = [maps[a] if isinstance(a, TensorMapArg) else argument(a) for a in launch.args]
        return [*lines, *call("launch", [name, f"{{{', '.join(shape)}}}", *arguments], ";")]

    def view(self, view: View | Matrix) -> str:
        buffer = self.plan.buffers.get(view.buffer)
        if buffer and (buffer.shape, buffer.stride, 0) == (tuple(view.shape), tuple(view.stride), view.offset):
            return view.buffer
        start = f"{view.buffer}.storage_offset() + {cxx(view.offset)}"
        return f"{view.buffer}.as_strided({braces(view.shape)}, {braces(view.stride)}, {start})"

    def fallback(self, step: Fallback) -> list[str]:
        """The operator itself, through its typed entry in ATen."""
        inputs = [self.view(i) if isinstance(i, View) else cxx(i) if i is not None else "" for i in step.inputs]
        node = step.node
        if node.op == "sum":
            self.kernels.operators.append("ATen/ops/sum.h")
            return [f"{step.results[0]} = at::sum({inputs[0]}, at::IntArrayRef{braces(node.attribute('dims'))});"]
        if node.op != "aten":
            raise NoKernel(f"{step.name} has no kernel ({step.reason}) and cannot be written as a library call")
        schema = step.schema
        given = dict(zip((a.name for a in schema.arguments), node.attribute("args"), strict=False))
        given |= dict(node.attribute("kwargs"))
        arguments = [at_argument(a, given.get(a.name, a.default_value), inputs) for a in schema.arguments]
        name = schema.name.split("::")[1] + (f"_{schema.overload_name}" if schema.overload_name else "")
        self.kernels.operators.append(f"ATen/ops/{schema.name.split('::')[1]}_ops.h")
        call = f"at::_ops::{name}::call({', '.join(arguments)})"
        if len(schema.returns) == 1:
            return [f"{step.results[0]} = {call};"]
        taken = [f"{r} = std::get<{i}>(parts);" for i, r in enumerate(step.results) if r]
        return [f"auto parts = {call};", *taken]


def permitted(launch: LaunchSpec) -> LaunchSpec:
    """The launch, or the one that takes its place where an argument is not certainly as aligned as it has to be.

    Tensors of a written file start at multiples of 16 bytes; views of them need not.
    """
    while not all(_aligned(arg) for arg in launch.args):
        assert launch.unaligned is not None, f"{launch.kernel} asks for an alignment and has no other launch"
        launch = launch.unaligned
    return launch


def _aligned(arg: Arg) -> bool:
    if not isinstance(arg, BufferArg | TensorMapArg):
        return True
    return divides(max(1, arg.alignment // arg.dtype.itemsize), arg.offset) is not None


def pointer(arg: BufferArg | TensorMapArg) -> str:
    offset = "" if arg.offset == 0 else f", {cxx(arg.offset)}"
    return f"pointer<{C_TYPES[arg.dtype]}>({arg.buffer}{offset})"


def argument(arg: BufferArg | SizeArg | FloatArg) -> str:
    """One argument of a launch."""
    if isinstance(arg, BufferArg):
        return pointer(arg)
    return cxx(arg.value) if isinstance(arg.value, (int, sympy.Expr)) else repr(arg.value)


def tensor_map(name: str, arg: TensorMapArg) -> list[str]:
    """The definition of variable `name`, which holds the map."""
    start = pointer(arg)
    swizzle = f"CU_TENSOR_MAP_SWIZZLE_{f'{arg.swizzle}B' if arg.swizzle else 'NONE'}"
    layout = [braces(arg.dims), braces(arg.strides), braces(arg.box), swizzle]
    return call(f"const auto {name} = tensor_map", [start, map_type(arg), *layout], ";")


def check_function(name: str, inputs: Sequence[Buffer]) -> str:
    """The function that raises where an argument is not what the kernels take.

    It is called before autograd is entered, by the kernels' function, and by the shape function.
    """
    first = inputs[0].name
    lines = [f'require_gpu({first}_, "{first}");', *size_variables(inputs, "c10::SymInt", "sym_size", ranks=True)]
    for b in inputs:
        what = [f"{b.name}_", f'"{b.name}"', AT_TYPES[b.dtype], braces(b.shape), f"{first}_.device()"]
        lines += call("require", what, ";")
    head = call(f"void {name}_check", [f"const at::Tensor& {b.name}_" for b in inputs], " {")
    return "\n".join([*head, *(f"    {line}" for line in lines), "}"])


def checked(name: str, inputs: Sequence[Buffer]) -> str:
    return f"{name}_check({', '.join(f'{b.name}_' for b in inputs)});"


def at_argument(argument: Any, value: Any, inputs: Sequence[str]) -> str:
    """One argument of an ATen call as C++ of the type that its schema declares. Raises NoKernel for an unusual one."""
    if isinstance(value, Operand):
        return inputs[value.index]
    if value is None:
        return "std::nullopt"
    if isinstance(value, tuple | list):
        items = ", ".join(at_argument(argument, v, inputs) for v in value)
        if any(isinstance(v, Operand) for v in value):
            return f"std::vector<at::Tensor>{{{items}}}"
        return f"std::vector<{'c10::SymInt' if 'SymInt' in str(argument.type) else 'int64_t'}>{{{items}}}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, torch.dtype):
        return AT_TYPES[value]
    if isinstance(value, int | sympy.Expr):
        return f"int64_t({cxx(value)})"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    raise NoKernel(f"argument {argument.name} = {value!r} of a library call cannot be written as C++")


def meta_function(name: str, plan: FusionPlan, *, conditional: bool) -> str:
    """The shape function of a plan: what its results look like, with symbolic sizes."""
    inputs = tensor_inputs(plan)
    lines = [checked(name, inputs), *size_variables(inputs, "c10::SymInt", "sym_size")]
    values = []
    for result in own_memory(plan):
        shape, stride = symbolic(result.view.shape), symbolic(result.stride)
        options = f"{inputs[0].name}_.options().dtype({AT_TYPES[plan.buffers[result.view.buffer].dtype]})"
        values.append(f"at::empty_strided_symint({shape}, {stride}, {options})")
    if len(values) > 1 and not conditional:  # one a line
        return definition(f"{name}_meta", inputs, len(values), conditional, [*lines, *_tuple(values)])
    lines += returns(values, conditional)
    return definition(f"{name}_meta", inputs, len(values), conditional, lines)


@dataclass(frozen=True)
class Result:
    """A result of a plan. shared: it lies in an input's memory or in an earlier result's, and has to be copied."""

    view: View
    shared: bool

    @property
    def dense(self) -> bool:
        return not any(s == 0 and n != 1 for n, s in zip(self.view.shape, self.view.stride, strict=True))

    @property
    def format(self) -> str:
        return "" if self.dense else "at::MemoryFormat::Contiguous"

    @property
    def stride(self) -> tuple[Size, ...]:
        """Of the result, or of its copy: that of an expanded tensor is contiguous."""
        if not self.shared or self.dense:
            return self.view.stride
        return tuple(product(self.view.shape[i + 1 :]) for i in range(len(self.view.shape)))


def own_memory(plan: FusionPlan) -> list[Result]:
    """The results that are tensors. An operator's results may share memory neither with its inputs nor with each other:
    whoever traces it takes them for new tensors."""
    taken: set[Any] = set(plan.inputs)
    results = []
    for output in plan.outputs:
        if isinstance(output, View):
            results.append(Result(output, output.buffer in taken))
            taken.add(output.buffer)
    return results


def _tuple(values: Sequence[str]) -> list[str]:
    return ["return {", *(f"    {v}," for v in values[:-1]), f"    {values[-1]}}};"]


def tensor_inputs(plan: FusionPlan) -> list[Buffer]:
    return [plan.buffers[n] for n in plan.inputs if isinstance(n, str)]


def definition(name: str, inputs: Sequence[Buffer], results: int, conditional: bool, lines: Sequence[str]) -> str:
    parameters = [f"const at::Tensor& {b.name}_" for b in inputs]
    if conditional:
        parameters.append("at::IntArrayRef wanted")
    head = call(f"{result_type(results, conditional)} {name}", parameters, " {")
    return "\n".join([*head, *(f"    {line}" if line else "" for line in lines), "}"])


def result_type(count: int, conditional: bool) -> str:
    if conditional:
        return "std::vector<at::Tensor>"
    return "at::Tensor" if count == 1 else f"std::tuple<{', '.join(['at::Tensor'] * count)}>"


def returns(values: Sequence[str], conditional: bool) -> list[str]:
    if conditional:
        collect = [f"if (wanted[{i}]) results.push_back({v});" for i, v in enumerate(values)]
        return ["std::vector<at::Tensor> results;", *collect, "return results;"]
    return [f"return {values[0]};" if len(values) == 1 else f"return {{{', '.join(values)}}};"]


def size_variables(inputs: Sequence[Buffer], type: str, method: str, *, ranks: bool = False) -> list[str]:
    """Reads each size symbol off the first tensor that has it as a dimension; ranks: checks the rank before."""
    lines: list[str] = []
    known: set[sympy.Symbol] = set()
    for b in inputs:
        for dim, size in enumerate(b.shape):
            if isinstance(size, sympy.Symbol) and size not in known:
                known.add(size)
                if ranks:
                    lines.append(f'require_rank({b.name}_, "{b.name}", {len(b.shape)});')
                lines.append(f"const {type} {size} = {b.name}_.{method}({dim});")
    return list(dict.fromkeys(lines))


def symbolic(sizes: Sequence[Size]) -> str:
    return f"Sizes{braces(sizes)}"
