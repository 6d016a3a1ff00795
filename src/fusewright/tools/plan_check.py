"""Checks planned graphs against the model: by the reference implementations in float64, and in the simulator."""

from __future__ import annotations

import ast
import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright.capture.model import CapturedModel, OutputIndex, Saved, capture
from fusewright.chip import Chip
from fusewright.fusion import reference
from fusewright.ir.graph import TensorType
from fusewright.ir.size import evaluate
from fusewright.runtime.executable import Executable
from fusewright.runtime.target import SimulatorTarget
from fusewright.tools.comparison import classes
from fusewright.tools.planned import Planned, plan_model, variants_of
from fusewright.tools.small import Small
from fusewright.tools.trial import in_double
from fusewright.tools.variations import copy_of, map_floating

Runner = Callable[..., Sequence[Any]]

# Relative. The plan in float64 differs from the model in float64 by the order of summation alone.
PLAN_TOLERANCE = 1e-11
# Error against float64, as a ratio to eager's, that a different order of summation may have.
RATIO = 1.25


@dataclass(frozen=True)
class Outcome:
    """worst: the largest relative error (Frobenius; where TF32 is allowed, of the median) over all results and
    gradients, or its ratio to eager's (see `_floor`), and where it is."""

    passed: bool
    worst: float
    where: str
    checked: int


@dataclass(frozen=True)
class PlanCheck:
    """plan: the plan by its reference in float64. kernels: the simulated kernels' error as a ratio to eager's; None
    where the model is too large to simulate."""

    sizes: str
    plan: Outcome
    kernels: Outcome | None

    @property
    def wrong(self) -> Outcome | None:
        """The first that failed. What was not simulated did not."""
        return next((o for o in (self.plan, self.kernels) if o is not None and not o.passed), None)


@dataclass(frozen=True)
class _Always:
    """Every product that can read halves does: small ones too, as the large ones do that they stand for.

    rounded: and rounds its right operand in registers where it can. tf32: those that can read floats as they lie do so.
    """

    planes: int
    rounded: bool
    tf32: bool

    def gain(self, m: float, n: float, k: float, direct: int) -> float:
        return -1.0 if not self.planes or (self.tf32 and direct) else 1.0

    def registers(self, m: float, n: float, k: float) -> float:
        return 0.0 if self.rounded else math.inf

    def split(self, elements: float) -> float:
        return 1e-6


def check(small: Small, chip: Chip, shipped: Sequence[Planned], schedules: int) -> PlanCheck:
    """Runs inference, forward and backward of a small model both ways, by the kernels of `shipped` as far as they
    take these sizes. schedules: how many orders of its threads the simulator tries for each kernel; 0 simulates
    nothing."""
    target = SimulatorTarget(chip, max(1, schedules))
    planes = [r.halves.planes for p in shipped for e in p.plan.encodes for r in e.results if target.tensor_maps]
    direct = any(r.gemm is not None and r.gemm.tf32 for p in shipped for r in p.plan.regions)
    always = _Always(max(planes, default=0), 0 in planes, direct) if planes or direct else None
    captured = capture(small.model, small.inputs, capabilities=always)
    planned = plan_model(captured, chip, library=False, variants=variants_of(shipped), tensor_maps=target.tensor_maps)
    inputs = _signed(small.inputs)
    tf32 = direct or (bool(planes) and min(planes) < 2)
    trial = _Trial(captured, small.model, inputs, _RoundsToTF32() if tf32 else nullcontext())  # type: ignore[no-untyped-call]
    exact = [_reference(p) for p in planned]
    plan = _judge(trial.oracle, trial.run(exact), None)
    kernels = None
    if schedules:
        runners = [Executable(p.plan, p.programs, target, torch.device("cpu")) for p in planned]
        depth = max((_depth(p) for p in planned), default=1)
        kernels = _judge(trial.oracle, trial.run(runners), trial.eager, depth, _bulk if tf32 else _distance)
    return PlanCheck(small.sizes, plan, kernels)


def _reference(planned: Planned) -> Runner:
    return lambda *arguments: reference.run(planned.plan, arguments, widen=True)


def _depth(planned: Planned) -> int:
    """The longest sum of products."""
    depths = [r.gemm.a.shape[1] for r in planned.plan.regions if r.gemm is not None]
    return max((int(evaluate(d, planned.sizes)) for d in depths), default=1)


class _Trial:
    """One model, one set of inputs and output gradients; what eager and float64 give for them."""

    def __init__(
        self, captured: CapturedModel, model: nn.Module, inputs: list[Any], precision: AbstractContextManager[Any]
    ) -> None:
        """precision: in which eager runs."""
        self.captured = captured
        self.arguments = [_resolve(e, model, inputs) for e in captured.arguments]
        self.gradients: dict[int, torch.Tensor] = {}  # of the results that have one
        double = copy.deepcopy(model).double()
        for module in double.modules():  # tensors that are neither parameters nor buffers
            for name in [n for n in vars(module) if not n.startswith("_")]:
                setattr(module, name, map_floating(getattr(module, name), torch.Tensor.double))
        wide = map_floating(inputs, torch.Tensor.double)
        with precision:
            self.eager = self._eager(model, inputs)
        with in_double():  # what the model casts itself, too
            self.oracle = self._eager(double, wide)

    def _eager(self, model: nn.Module, inputs: list[Any]) -> dict[str, torch.Tensor]:
        arguments = [_resolve(e, model, inputs) for e in self.captured.arguments]
        trained = self.captured.backward is not None
        leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point()]
        with torch.set_grad_enabled(trained):
            for leaf in leaves if trained else []:
                leaf.requires_grad_(True)
            results = self._outputs(model(*inputs))
        found = {f"result {i}": r.detach() for i, r in enumerate(results)}
        if trained:
            differentiable = {i: r for i, r in enumerate(results) if r.requires_grad}
            if not self.gradients:
                self.gradients = {i: torch.randn_like(r) for i, r in differentiable.items()}
            wanted = [self.gradients[i].to(r.dtype) for i, r in differentiable.items()]
            gradients = torch.autograd.grad(list(differentiable.values()), leaves, wanted, allow_unused=True)
            names = [e for e, a in zip(self.captured.arguments, arguments, strict=True) if any(a is x for x in leaves)]
            found |= {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True) if g is not None}
        for leaf in leaves:
            leaf.requires_grad_(False)
        return found

    def _outputs(self, returned: Any) -> list[torch.Tensor]:
        """The graph's outputs, in order, out of what the model returned."""
        places = pytree.tree_leaves(self.captured.result)
        pairs = zip(places, pytree.tree_leaves(returned), strict=True)
        found = {place.index: leaf for place, leaf in pairs if isinstance(place, OutputIndex)}
        return [found[i] for i in range(self.captured.outputs)]

    def run(self, runners: Sequence[Runner]) -> dict[str, torch.Tensor]:
        """The same results by runners of the inference, forward and backward graphs."""
        captured = self.captured
        arguments = [captured_size(captured, i) if a is None else a for i, a in enumerate(self.arguments)]
        found = {f"result {i}": r for i, r in enumerate(runners[0](*arguments))}
        if len(runners) == 1:
            return found
        kept = runners[1](*arguments)
        found |= {f"result {i} in training": r for i, r in enumerate(kept[: captured.outputs])}
        sources: dict[str, Any] = {"argument": arguments, "output": kept, "gradient": self.gradients}
        assert captured.backward is not None
        planned = captured.backward.inputs

        def given(i: int, saved: Saved) -> Any:
            if saved.kind == "size":
                return captured_size(captured, i, backward=True)
            value = sources[saved.kind][saved.index]
            # a gradient is of any layout; a written file brings it into the one that was planned for
            return _laid_out(value, planned[i].tensor, captured.sizes) if saved.kind == "gradient" else value

        inputs = [given(i, saved) for i, saved in enumerate(captured.saved)]
        for expression, gradient in zip(captured.arguments, runners[2](*inputs), strict=True):
            if gradient is not None and isinstance(gradient, torch.Tensor):
                found[f"gradient of {expression}"] = gradient
        return found


def _laid_out(value: torch.Tensor, type: TensorType, sizes: Mapping[sympy.Symbol, int]) -> torch.Tensor:
    stride = [int(evaluate(s, sizes)) for s in type.stride]
    return torch.empty_strided(value.shape, stride, dtype=value.dtype).copy_(value)


def captured_size(captured: CapturedModel, index: int, *, backward: bool = False) -> int:
    """The value of a size argument."""
    graph = captured.backward if backward else captured.inference
    assert graph is not None
    return int(captured.sizes[graph.inputs[index].attribute("value")])


def _judge(
    oracle: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    eager: Mapping[str, torch.Tensor] | None,
    depth: int = 1,
    distance: Callable[[torch.Tensor, torch.Tensor], float] | None = None,
) -> Outcome:
    worst, where, passed = 0.0, "", True
    for name, value in found.items():
        expected = oracle.get(name.removesuffix(" in training"))
        if expected is None:
            continue
        theirs = None if eager is None else eager[name.removesuffix(" in training")]
        passed = passed and (theirs is None or value.dtype == theirs.dtype)
        error = _error(value, expected, theirs, depth, distance or _distance)
        limit = PLAN_TOLERANCE if eager is None else RATIO
        passed = passed and error <= limit
        if not (error <= worst or math.isnan(worst)):
            worst, where = error, name
    return Outcome(passed and bool(found), worst, where, len(found))


def _floor(dtype: torch.dtype, depth: int) -> float:
    """The least error that counts as eager's: of one rounding of the result, and of plain sums of `depth` terms.

    A CPU library may sum in far shorter chains than any GPU. In one chain, roundings (0.21·eps, rms) of partial sums
    that grow like √i come to 0.15·eps·√depth; a quarter is what three such sums leave, one upon the other, as in a
    gradient.
    """
    if not dtype.is_floating_point:
        return 1.0
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return max(float(torch.finfo(dtype).eps) / 2, float(torch.finfo(accumulator).eps) * math.sqrt(depth) / 4)


def _error(
    value: torch.Tensor,
    expected: torch.Tensor,
    eager: torch.Tensor | None,
    depth: int,
    distance: Callable[[torch.Tensor, torch.Tensor], float],
) -> float:
    """The distance to what is expected, as a ratio to eager's if given, over the elements that are finite; infinite
    where shapes differ, or where an element is NaN, Inf or −Inf and it is so neither in eager nor in the oracle."""
    if value.shape != expected.shape:
        return math.inf
    ours, right = classes(value), classes(expected.to(value.dtype))
    theirs = right if eager is None else classes(eager)
    if bool(((ours != theirs) & (ours != right)).any()):
        return math.inf
    finite = (ours == 0) & (right == 0)
    error = distance(value[finite], expected[finite])
    if eager is None:
        return error
    finite = (theirs == 0) & (right == 0)
    return error / max(distance(eager[finite], expected[finite]), _floor(eager.dtype, depth))


def _distance(value: torch.Tensor, expected: torch.Tensor) -> float:
    """‖value − expected‖ / ‖expected‖."""
    difference, size = (value.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / size.clamp_min(1e-300))


def _bulk(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The median error over the rms value. A coarse sum near an activation's kink takes the wrong side of it, in eager
    as here: a few elements of a gradient are then off by their whole size."""
    if not expected.numel():
        return 0.0
    difference, size = (value.double() - expected.double()).abs().median(), expected.double().square().mean().sqrt()
    return float(difference / size.clamp_min(1e-300))


class _RoundsToTF32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products of float32 read operands of TF32's ten bits, as a GPU's do where TF32 is allowed; a CPU's never do."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.PRODUCTS:
            factors = args[-2:]
            args = (*args[:-2], *(_rounded_to_tf32(x) for x in factors))
        return func(*args, **(kwargs or {}))


def _rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).view(x.shape)


def _signed(inputs: list[Any]) -> list[Any]:
    """Normal values in the place of floating ones: `torch.rand` alone never reaches the negative side of a ReLU."""
    generator = torch.Generator().manual_seed(0)

    def draw(value: torch.Tensor) -> torch.Tensor:
        copy = copy_of(value)  # keeps the strides, which the plan is for; so all of its storage is drawn
        storage = torch.empty(0, dtype=copy.dtype).set_(copy.untyped_storage())
        storage.copy_(torch.randn(storage.shape, generator=generator, dtype=torch.float32))
        return copy

    return map_floating(inputs, draw)


def _resolve(expression: str | None, model: nn.Module, inputs: Sequence[Any]) -> Any:
    """The value of an expression such as `self.gemm.weight` or `x`, by walking it."""
    if expression is None:
        return None
    values = inspect.signature(type(model).forward).bind(model, *inputs).arguments

    def walk(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return values[node.id] if node.id in values else _global(model, node.id)
        if isinstance(node, ast.Attribute):
            return getattr(walk(node.value), node.attr)
        assert isinstance(node, ast.Subscript), f"cannot follow {expression}"
        return walk(node.value)[ast.literal_eval(node.slice)]

    return walk(ast.parse(expression, mode="eval").body)


def _global(model: nn.Module, name: str) -> Any:
    return vars(inspect.getmodule(type(model)))[name]
