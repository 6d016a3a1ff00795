"""What a fusion plan means, in torch: index maps over real memory, expressions by the primitives' references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from fusewright.fusion.expression import Access, Accumulator, Apply, Constant, Expression, Load, Sink, Store, walk
from fusewright.fusion.plan import Buffer, Encode, Fallback, FusionPlan, Matrix, Region, View
from fusewright.ir import reference
from fusewright.ir.primitives import PRIMITIVES
from fusewright.ir.size import Size, evaluate

# Fills memory that no step has written, so that an element which a plan forgets shows in the result.
_POISON = 0xA5


def run(plan: FusionPlan, arguments: Sequence[Any], *, widen: bool) -> list[Any]:
    """Evaluates the plan on tensors laid out as the graph's inputs were. Returns its outputs.

    widen: every floating-point value is float64, whatever the plan says. Raises RuntimeError where an index map leaves
    its buffer or writes one element twice, AssertionError where a layout is not what the plan says.
    """
    evaluation = _Evaluation(plan, bind_sizes(plan, arguments), widen)
    for name, argument in zip(plan.inputs, arguments, strict=True):
        if isinstance(name, str):
            evaluation.memory[name] = evaluation.argument(argument, plan.buffers[name])
    for step in plan.steps:
        if isinstance(step, Region):
            evaluation.region(step)
        elif isinstance(step, Encode):
            evaluation.encode(step)
        else:
            evaluation.fallback(step)
    return [evaluation.output(o) for o in plan.outputs]


def bind_sizes(plan: FusionPlan, arguments: Sequence[Any]) -> dict[sympy.Symbol, int]:
    """The value of every size symbol, read off the arguments."""
    sizes: dict[sympy.Symbol, int] = {}
    for name, argument in zip(plan.inputs, arguments, strict=True):
        if isinstance(name, sympy.Symbol):
            sizes[name] = int(argument)
        elif isinstance(name, str):
            buffer = plan.buffers[name]
            declared = (*buffer.shape, *buffer.stride)
            for size, value in zip(declared, (*argument.shape, *argument.stride()), strict=True):
                if isinstance(size, sympy.Symbol):
                    sizes.setdefault(size, int(value))
    return sizes


@dataclass
class _Evaluation:
    plan: FusionPlan
    sizes: Mapping[sympy.Symbol, int]
    widen: bool
    memory: dict[str, torch.Tensor] = field(default_factory=dict)

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if self.widen and dtype.is_floating_point else dtype

    def ints(self, sizes: Sequence[Size]) -> tuple[int, ...]:
        return tuple(int(evaluate(s, self.sizes)) for s in sizes)

    def argument(self, tensor: torch.Tensor, buffer: Buffer) -> torch.Tensor:
        """The tensor in the dtype that it is computed with, its layout kept whatever it is."""
        self.check_layout(tensor, buffer)
        if tensor.dtype == self.dtype(tensor.dtype):
            return tensor
        whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
        wide = whole.to(self.dtype(tensor.dtype))
        return wide.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def check_layout(self, tensor: torch.Tensor, buffer: Buffer) -> None:
        shape, stride = self.ints(buffer.shape), self.ints(buffer.stride)
        assert tensor.shape == shape, f"{buffer.name}: {tuple(tensor.shape)} where the plan says {shape}"
        moved = [i for i, n in enumerate(shape) if n > 1 and tensor.stride(i) != stride[i]]
        assert not (moved and tensor.numel()), f"{buffer.name}: strides {tensor.stride()} where the plan says {stride}"

    def strided(self, view: View | Matrix) -> torch.Tensor:
        return self.at(view.buffer, self.ints(view.shape), view.stride, view.offset)

    def at(self, name: str, shape: tuple[int, ...], strides: Sequence[Size], offset: Size) -> torch.Tensor:
        base = self.memory[name]
        (start,) = self.ints((offset,))
        return base.as_strided(shape, self.ints(strides), base.storage_offset() + start)

    def output(self, output: View | Size | None) -> Any:
        if isinstance(output, View):
            return self.strided(output)
        return None if output is None else evaluate(output, self.sizes)

    def allocate(self, name: str) -> None:
        buffer = self.plan.buffers[name]
        memory = torch.empty_strided(
            self.ints(buffer.shape), self.ints(buffer.stride), dtype=self.dtype(buffer.dtype), device=buffer.device
        )
        self.memory[name] = memory.fill_(float("nan") if memory.is_floating_point() else _POISON)

    # ---- steps

    def region(self, region: Region) -> None:
        shape = self.ints((*region.rows, region.columns))
        for name in dict.fromkeys(region.writes()):
            self.allocate(name)
        values: dict[Expression, torch.Tensor] = {}
        for expression in walk(s.value for s in region.sinks):
            values[expression] = self.expression(expression, values, region, shape)
        for sink in region.sinks:
            self.sink(sink, values[sink.value].expand(shape))

    def encode(self, step: Encode) -> None:
        """As in `ir.reference`: nothing here reads the halves, for a product is that of its operands."""
        for name in step.writes():
            self.allocate(name)
            self.memory[name].zero_()

    def fallback(self, step: Fallback) -> None:
        inputs = [
            self.strided(i) if isinstance(i, View) else None if i is None else evaluate(i, self.sizes)
            for i in step.inputs
        ]
        result = reference.apply(step.node, inputs, self.sizes, self.dtype)
        results = result if isinstance(result, (tuple, list)) else [result]
        for name, value in zip(step.results, results, strict=False):
            if name is not None:
                self.check_layout(value, self.plan.buffers[name])
                self.memory[name] = value

    def expression(
        self, expression: Expression, values: Mapping[Expression, torch.Tensor], region: Region, shape: tuple[int, ...]
    ) -> torch.Tensor:
        dtype = self.dtype(expression.dtype)
        if isinstance(expression, Load):
            access = expression.access
            if access.bits:
                return self.bits(access, shape, _read_bits)
            return self.at(access.buffer, shape, access.strides, access.offset)
        if isinstance(expression, Accumulator):
            assert region.gemm is not None
            a, b = self.strided(region.gemm.a), self.strided(region.gemm.b)
            return (a.to(dtype) @ b.to(dtype)).reshape(shape)
        if isinstance(expression, Constant):
            return torch.tensor(evaluate(expression.value, self.sizes), dtype=dtype)
        return self.apply(expression, [values[o] for o in expression.operands])

    def apply(self, expression: Apply, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        if expression.op == "cast":
            return operands[0].to(self.dtype(expression.dtype))
        result: torch.Tensor = PRIMITIVES[expression.op].reference(*operands)
        assert result.dtype == self.dtype(expression.dtype), f"{expression.op} gives {result.dtype}"
        return result

    def sink(self, sink: Sink, value: torch.Tensor) -> None:
        access = sink.access
        if not isinstance(sink, Store):
            total = value.sum(tuple(range(value.dim() - 1))) if value.dim() > 1 else value
            self.at(access.buffer, total.shape, access.strides[-1:], access.offset).copy_(total)
        elif access.bits:
            self.bits(access, value.shape, lambda memory, index: _write_bits(memory, index, value))
        else:
            self.at(access.buffer, value.shape, access.strides, access.offset).copy_(value)

    def bits(self, access: Access, shape: tuple[int, ...], act: Callable[..., Any]) -> torch.Tensor:
        """Calls act(bytes, index of every element's bit)."""
        memory = self.memory[access.buffer]
        index = torch.full(shape, *self.ints((access.offset,)), dtype=torch.int64, device=memory.device)
        for axis, stride in enumerate(self.ints(access.strides)):
            steps = torch.arange(shape[axis], device=memory.device) * stride
            index += steps.reshape(-1, *[1] * (len(shape) - 1 - axis))
        size = memory.untyped_storage().nbytes() - memory.storage_offset()
        return act(memory.as_strided((size,), (1,)), index)  # type: ignore[no-any-return]


def _read_bits(memory: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return (memory[index // 8] >> (index % 8)).bitwise_and(1).bool()


def _write_bits(memory: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> None:
    """Whole bytes are written: the bits of a byte that no element has are 0."""
    byte = index // 8
    memory[byte] = 0
    memory.index_put_((byte,), value.to(torch.uint8) << (index % 8).to(torch.uint8), accumulate=True)
