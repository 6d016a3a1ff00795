"""Functions compiled as far as their fusion plan, which runs in torch: for tests of the stages before code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from functorch.compile import aot_function, make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from fusewright import compiler
from fusewright.capture.backend import decompositions
from fusewright.capture.fx import from_fx
from fusewright.capture.joint import partition_joint
from fusewright.fusion import reference as plan_reference
from fusewright.fusion.plan import FusionPlan
from fusewright.ir import reference, rules
from fusewright.ir.graph import Graph
from fusewright.passes.format import Capabilities


@dataclass
class Planned:
    """What was compiled, in order: the forward graph, then the backward graph where there is one.

    Calls check the plan against its graph, then return what the plan gives. capabilities: of the format stage.
    """

    capabilities: Capabilities | None = None
    graphs: list[Graph] = field(default_factory=list)
    plans: list[FusionPlan] = field(default_factory=list)

    def compile(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], capabilities: Capabilities | None = None
    ) -> Callable[..., Any]:
        graph = from_fx(module)
        rules.check(graph)
        plan = compiler.plan(graph, (), capabilities)
        # The plan keeps values in float32 that the graph rounds.
        narrow = {torch.float16, torch.bfloat16} & {n.type.dtype for n in graph.nodes() if n.type is not None}
        self.graphs.append(graph)
        self.plans.append(plan)

        def call(*arguments: Any) -> list[Any]:
            random = torch.get_rng_state()
            expected = reference.run(graph, arguments)
            torch.set_rng_state(random)
            results = plan_reference.run(plan, arguments, widen=False)
            for result, value in zip(results, expected, strict=True):
                if isinstance(result, torch.Tensor):
                    tolerance = 6e-2 if narrow else 1e-9 if result.dtype == torch.float64 else 1e-4
                    torch.testing.assert_close(result, value, rtol=tolerance, atol=tolerance, equal_nan=True)
            return results

        return make_boxed_func(call)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "fw_compiler": self.compile,
            "bw_compiler": self.compile,
            "inference_compiler": partial(self.compile, capabilities=self.capabilities),
            "partition_fn": partial(partition_joint, capabilities=self.capabilities),
            "decompositions": decompositions(),
        }

    @property
    def fallbacks(self) -> list[str]:
        return [f"{f.name}: {f.reason}" for p in self.plans for f in p.fallbacks]


def planned(
    function: Callable[..., Any], capabilities: Capabilities | None = None
) -> tuple[Callable[..., Any], Planned]:
    """`function` of tensors through AOTAutograd alone: quick, static shapes."""
    record = Planned(capabilities)
    return aot_function(function, **record.options), record


def planned_module(module: nn.Module | Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], Planned]:
    """`torch.compile` of a module or function, as far as its plan."""
    record = Planned()
    torch._dynamo.reset()
    return torch.compile(module, backend=aot_autograd(**record.options), **options), record


def gradients(result: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Gradients of a fixed random weighting of the results."""
    tensors = [r for r in (result if isinstance(result, (tuple, list)) else [result]) if r.requires_grad]
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in tensors]
    return list(torch.autograd.grad(tensors, [i for i in inputs if i.requires_grad], weights, allow_unused=True))


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Values, dtype, shape and stride."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, check_stride=False)


def check(
    function: Callable[..., Any],
    *inputs: torch.Tensor,
    tolerance: float = 1e-9,
    capabilities: Capabilities | None = None,
) -> Planned:
    """Compiles `function` and compares results, layouts and gradients with eager. Returns what was compiled."""
    run, record = planned(function, capabilities)
    expected, actual = function(*inputs), run(*inputs)
    assert_same(actual, expected, tolerance)
    for a, e in zip(_tensors(actual), _tensors(expected), strict=True):
        assert a.stride() == e.stride() or a.numel() == 0, f"strides {a.stride()}, eager gives {e.stride()}"
    shared = [_shared([*inputs, *_tensors(result)]) for result in (actual, expected)]
    assert shared[0] == shared[1], "other tensors share memory than in eager"
    if any(i.requires_grad for i in inputs):
        assert_same(gradients(actual, inputs), gradients(expected, inputs), tolerance)
    return record


def _tensors(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _shared(tensors: Sequence[torch.Tensor]) -> list[list[bool]]:
    """Which tensors share memory."""
    addresses = [t.untyped_storage().data_ptr() for t in tensors]
    return [[a == b for b in addresses] for a in addresses]
