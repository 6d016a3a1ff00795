"""A compiled plan, ready to be called: buffers from torch's allocator, launches in order, no wait for the device.

What depends on sizes alone (grids, size arguments, the shapes of buffers) is computed once for each set of sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import sympy
import torch

from fusewright.codegen.launch import BufferArg, LaunchSpec, TensorMapArg
from fusewright.fusion.plan import Buffer, Encode, Fallback, FusionPlan, Matrix, Region, Step, View
from fusewright.ir import reference
from fusewright.ir.size import Size, evaluate
from fusewright.kernels.base import LibraryCall, Program
from fusewright.runtime import frozen
from fusewright.runtime.target import BACKGROUND, Run, Target

Sizes = Mapping[sympy.Symbol, int]
Environment = dict[str, Any]  # tensors
# One thing to do: reads and writes tensors of the environment.
Action = Callable[[Environment], None]

# torch.empty_strided on the current GPU, by what Inductor's own code calls: no dispatch, so it takes less time.
_EMPTY_ON_THIS_GPU = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)

# Distinct sets of sizes whose prepared launches are kept.
_PREPARED = 64


class Executable:
    """Runs a plan. Called with the graph's arguments in order; returns its outputs as a list."""

    def __init__(
        self,
        plan: FusionPlan,
        programs: Mapping[str, Program],
        target: Target,
        device: torch.device,
        rivals: Iterable[Program] = (),
    ) -> None:
        """programs: by region name. rivals: programs that may take their place.

        Compiles every launch, together and in the background: the forward's kernels compile while the backward is
        still being planned. The first call waits, and raises what the compiler raised.
        """
        self.plan = plan
        self.programs = dict(programs)
        self.target = target
        self.device = device
        launches = dict.fromkeys(launch for p in (*programs.values(), *rivals) for launch in p.launches)
        self._loading = BACKGROUND.submit(_load, target, list(launches))
        self.symbols = _symbols(plan)
        self.prepare = lru_cache(maxsize=_PREPARED)(self._prepare)

    @cached_property
    def loaded(self) -> dict[tuple[str, str], Run]:
        """How to run each launch, by its kernel's name and source."""
        return self._loading.result()

    def __call__(self, *arguments: Any) -> list[Any]:
        prepared = self.prepare(tuple([_size_of(arguments, place) for _, place in self.symbols]))
        environment = self.environment(arguments)
        for action in prepared.actions:
            action(environment)
        return [output(environment) for output in prepared.outputs]

    def environment(self, arguments: Sequence[Any]) -> Environment:
        """The tensors that the arguments bind, by buffer name."""
        return {n: a for n, a in zip(self.plan.inputs, arguments, strict=True) if isinstance(n, str)}

    def sizes(self, arguments: Sequence[Any]) -> Sizes:
        return {symbol: _size_of(arguments, place) for symbol, place in self.symbols}

    def outputs(self, sizes: Sizes, environment: Environment) -> list[Any]:
        return [_output(o, sizes)(environment) for o in self.plan.outputs]

    def load(self, program: Program) -> None:
        """Compiles the launches of a program that was not among the first choices."""
        missing = [s for s in program.launches if (s.kernel, s.source) not in self.loaded]
        if missing:
            self.loaded |= _load(self.target, missing)

    def use(self, region: str, program: Program) -> None:
        """Changes the program of a region; callers clear `prepare`'s cache."""
        self.load(program)
        self.programs[region] = program

    def _prepare(self, values: tuple[int, ...]) -> _Prepared:
        sizes = {symbol: value for (symbol, _), value in zip(self.symbols, values, strict=True)}
        actions: list[Action] = []
        for step, dead in zip(self.plan.steps, _last_uses(self.plan), strict=True):
            actions += self.actions(step, sizes)
            if dead:
                actions.append(_release(dead))
        return _Prepared(actions, [_output(o, sizes) for o in self.plan.outputs])

    def actions(self, step: Step, sizes: Sizes, program: Program | None = None) -> list[Action]:
        """What one step does at these sizes, by `program` or by the one chosen for its region."""
        if isinstance(step, Fallback):
            return [_fallback(step, self.plan.buffers, sizes)]
        if isinstance(step, Encode) and step.kept:
            return [_kept(step, sizes, self._actions(step, sizes, self.programs[step.name]))]
        return self._actions(step, sizes, program or self.programs[step.name])

    def _actions(self, step: Region | Encode, sizes: Sizes, program: Program) -> list[Action]:
        buffers = [self.plan.buffers[name] for name in dict.fromkeys(step.writes())]
        actions: list[Action] = [_allocate([*buffers, *program.workspaces], sizes, self.device)]
        if program.library:
            actions.append(_library(program.library, sizes))
        actions += [self.launch(launch, sizes) for launch in program.launches]
        if program.workspaces:
            actions.append(_release([w.name for w in program.workspaces]))
        return actions

    def launch(self, spec: LaunchSpec, sizes: Sizes) -> Action:
        grid = tuple(int(evaluate(g, sizes)) for g in spec.grid)
        if 0 in grid:
            return lambda environment: None
        target, run, device = self.target, self.loaded[spec.kernel, spec.source], self.device.index or 0
        template: list[Any] = []
        pointers = []
        for i, arg in enumerate(spec.args):
            if isinstance(arg, BufferArg | TensorMapArg):
                offset = int(evaluate(arg.offset, sizes)) * arg.dtype.itemsize
                encode = target.tensor_map(arg.at(sizes)) if isinstance(arg, TensorMapArg) else None
                pointers.append((i, arg.buffer, offset, arg.alignment, encode))
                template.append(None)
            else:
                template.append(evaluate(arg.value, sizes))

        def act(environment: Environment) -> None:
            arguments = template.copy()
            for slot, name, offset, alignment, encode in pointers:
                pointer = target.pointer(environment[name], offset)
                if alignment > 1 and target.address(pointer) % alignment:
                    self.unaligned(spec, sizes)(environment)
                    return
                arguments[slot] = encode(pointer) if encode else pointer
            run(arguments, grid, device)  # type: ignore[arg-type]

        return act

    def unaligned(self, spec: LaunchSpec, sizes: Sizes) -> Action:
        """The launch for pointers that are not aligned, compiled when it is first needed."""
        assert spec.unaligned is not None, f"{spec.kernel} asks for an alignment and has no other launch"
        if (spec.unaligned.kernel, spec.unaligned.source) not in self.loaded:
            self.loaded |= _load(self.target, [spec.unaligned])
        return self.launch(spec.unaligned, sizes)


@dataclass(frozen=True)
class _Prepared:
    actions: list[Action]
    outputs: list[Callable[[Environment], Any]]


def _load(target: Target, launches: Sequence[LaunchSpec]) -> dict[tuple[str, str], Run]:
    return {(s.kernel, s.source): run for s, run in zip(launches, target.load(launches), strict=True)}


def _symbols(plan: FusionPlan) -> list[tuple[sympy.Symbol, tuple[int, int | None]]]:
    """Where each size symbol is read: (argument, dimension), or (argument, None) for a size argument."""
    found: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for index, name in enumerate(plan.inputs):
        if isinstance(name, sympy.Symbol):
            found.setdefault(name, (index, None))
    for index, name in enumerate(plan.inputs):
        if isinstance(name, str):
            for dim, size in enumerate(plan.buffers[name].shape):
                if isinstance(size, sympy.Symbol):
                    found.setdefault(size, (index, dim))
    return list(found.items())


def _size_of(arguments: Sequence[Any], place: tuple[int, int | None]) -> int:
    index, dim = place
    return int(arguments[index] if dim is None else arguments[index].shape[dim])


def _last_uses(plan: FusionPlan) -> list[list[str]]:
    """For each step the temporary buffers that nothing reads after it."""
    dead: list[list[str]] = []
    seen: set[str] = set()
    for step in reversed(plan.steps):
        names = {n for n in (*step.reads(), *step.writes()) if plan.temporary(n)} - seen
        seen |= names
        dead.append(sorted(names))
    return dead[::-1]


def _release(names: Sequence[str]) -> Action:
    def act(environment: Environment) -> None:
        for name in names:
            environment.pop(name, None)

    return act


def _allocate(buffers: Sequence[Buffer], sizes: Sizes, device: torch.device) -> Action:
    shapes = [(b.name, (_values(b.shape, sizes), _values(b.stride, sizes), b.dtype)) for b in buffers]
    index = (device.index or 0) if device.type == "cuda" else None

    def anywhere(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    def act(environment: Environment) -> None:
        here = index is not None and torch._C._cuda_getDevice() == index
        empty = _EMPTY_ON_THIS_GPU if here and _EMPTY_ON_THIS_GPU else anywhere
        for name, layout in shapes:
            environment[name] = empty(*layout)

    return act


def _values(sizes: Sequence[Size], values: Sizes) -> tuple[int, ...]:
    return tuple(int(evaluate(s, values)) for s in sizes)


def _strided(view: View | Matrix, sizes: Sizes) -> Callable[[Environment], Any]:
    shape, stride, offset = _values(view.shape, sizes), _values(view.stride, sizes), int(evaluate(view.offset, sizes))
    name = view.buffer

    def get(environment: Environment) -> Any:
        tensor = environment[name]
        if tensor is None:  # torch passes none for a token that orders effects
            return tensor
        if offset == 0 and tensor.shape == shape and tensor.stride() == stride:
            return tensor
        return tensor.as_strided(shape, stride, tensor.storage_offset() + offset)

    return get


def _kept(step: Encode, sizes: Sizes, make: Sequence[Action]) -> Action:
    """Takes what an earlier call made of the same memory, if one did."""
    (matrix,), (result,) = step.matrices, step.results
    read = _strided(matrix, sizes)
    layout = (_values((*matrix.shape, *matrix.stride), sizes), result.halves.planes, result.halves.by_line)

    def act(environment: Environment) -> None:
        def made() -> torch.Tensor:
            for action in make:
                action(environment)
            halves: torch.Tensor = environment[result.buffer]
            return halves

        environment[result.buffer] = frozen.kept(read(environment), layout, made)

    return act


def _output(output: View | Size | None, sizes: Sizes) -> Callable[[Environment], Any]:
    if isinstance(output, View):
        return _strided(output, sizes)
    value = None if output is None else evaluate(output, sizes)
    return lambda environment: value


def _fallback(step: Fallback, buffers: Mapping[str, Buffer], sizes: Sizes) -> Action:
    inputs = [_strided(i, sizes) if isinstance(i, View) else None for i in step.inputs]
    plain = [None if isinstance(i, View) or i is None else evaluate(i, sizes) for i in step.inputs]
    strides = {name: _values(buffers[name].stride, sizes) for name in step.writes()}

    def act(environment: Environment) -> None:
        values = [get(environment) if get else value for get, value in zip(inputs, plain, strict=True)]
        found = reference.apply(step.node, values, sizes, lambda dtype: dtype)
        for name, value in zip(step.results, found if isinstance(found, (tuple, list)) else [found], strict=False):
            if name is not None:
                environment[name] = value if value is None else _with_stride(value, strides[name])

    return act


def _with_stride(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """The tensor as it was planned. An operator may lay its result out in another way than it promised in tracing."""
    if tensor.stride() == stride or tensor.numel() == 0:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _library(call: LibraryCall, sizes: Sizes) -> Action:
    a, b = _strided(call.a, sizes), _strided(call.b, sizes)
    bias = _strided(call.bias, sizes) if call.bias else None
    name = call.result

    def act(environment: Environment) -> None:
        out = environment[name]
        if bias is not None:
            torch.addmm(bias(environment), a(environment), b(environment), out=out)
        elif out.dtype == call.a.dtype:
            torch.mm(a(environment), b(environment), out=out)
        else:
            torch.mm(a(environment), b(environment), out_dtype=out.dtype, out=out)

    return act
