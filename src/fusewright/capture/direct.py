"""From Dynamo straight to the compiled graphs, without AOTAutograd's wrappers, where these have nothing to do.

The wrappers undo what tracing did to inputs that are overwritten and to results that share memory with something. A
plain graph has neither, and there they cost the host more than all of a training step's launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo  # before what it imports itself
from torch import Tensor, fx
from torch._functorch._aot_autograd import runtime_wrappers
from torch._functorch._aot_autograd.utils import saved_tensors_hooks_are_inlineable, top_saved_tensors_hooks
from torch.autograd import Function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusewright.capture.arguments import lay_out, tangents

Run = Callable[..., Sequence[Any]]

# By this Dynamo knows in the next graph which sizes of a tensor change; torch 2.13 has a name of its own for it.
_PROPAGATED = hasattr(runtime_wrappers, "mark_dynamo_propagated_dynamic_indices")
_CHANGING_SIZES = "_dynamo_propagated_dynamic_indices" if _PROPAGATED else "_dynamo_weak_dynamic_indices"


class Direct:
    """Runs what AOTAutograd had compiled of one graph: one of inference, or one that leaves what its backward reads
    behind its results. Until its backward is compiled, in the simulator at the first one, the wrappers run."""

    def __init__(self) -> None:
        self._forward: Run | None = None
        self._backward: Run | None = None
        self._results: int | None = None  # of a forward that has a backward
        self._tangents = 0  # gradients that the backward takes
        self._requiring: Sequence[int] = ()  # inputs that require gradients,
        self._unreached: Sequence[int] = ()  # and those that the backward has none for
        self._metadata: Any = None
        self._plain = False
        self.run: Run

    def add_forward(self, run: Run, results: int | None) -> None:
        context = torch._guards.TracingContext.try_get()
        self._forward, self._results, self._metadata = run, results, context and context.fw_metadata

    def add_backward(self, run: Run, graph: fx.GraphModule) -> None:
        tensors = [isinstance(p.meta["val"], Tensor) for p in graph.graph.find_nodes(op="placeholder")]
        assert tensors == sorted(tensors), "a backward takes sizes, then what was saved, then gradients"
        if any(lay_out(t) is None for t in tangents(graph)):
            return  # the wrappers know how
        self._backward, self._tangents = run, len(tangents(graph))
        self._unreached = [i for i, o in enumerate(graph.graph.output_node().args[0]) if o is None]  # type: ignore[arg-type]
        if self._plain:
            self._choose()

    def around(self, wrapped: Run, module: fx.GraphModule, inputs: Sequence[Any]) -> Run:
        """What Dynamo calls. wrapped: AOTAutograd's result."""
        self.run = wrapped
        self._plain = self._metadata is not None and _plain(self._metadata, module, inputs)
        if not self._plain:
            return wrapped
        self._requiring = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
        if self._results is None and self._requiring:
            self._forward = _without_gradients(self._forward)
        self._choose()
        return self.run if self._results is None else lambda *arguments: self.run(*arguments)

    def _choose(self) -> None:
        assert self._forward is not None
        forward = _marking(self._forward, [o.dynamic_dims for o in self._metadata.output_info])
        if self._results is None:
            self.run = forward
            return
        differentiable = [i for i, o in enumerate(self._metadata.output_info) if o.requires_grad]
        if self._backward is not None and len(differentiable) == self._tangents:
            function = _function(forward, self._backward, self._results, differentiable)
            self.run = _with_gradients(function.apply, [i for i in self._requiring if i in self._unreached])


def _plain(metadata: Any, module: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether sizes and tensors go in, tensors with memory of their own come out, and nothing else changes."""
    autocast = torch._C._is_any_autocast_enabled()  # which the wrappers switch off for what runs inside
    return (
        not autocast
        and metadata.grad_enabled_mutation is None
        and not saved_tensors_hooks_are_inlineable(top_saved_tensors_hooks())  # they are in the graph
        and not any(True for _ in (*module.parameters(), *module.buffers()))
        and all(isinstance(x, (int, torch.SymInt)) or _is_tensor(x) for x in inputs)
        and len(inputs) == len(metadata.input_info)
        and all(i.mutation_type.name == "NOT_MUTATED" for i in metadata.input_info)
        and all(_own_memory(o) for o in metadata.output_info)
        and not metadata.num_intermediate_bases
        and not metadata.tokens
        and not getattr(metadata, "num_graphsafe_rng_states", 0)
        and not getattr(metadata, "is_rng_op_functionalized", False)
    )


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) and not is_traceable_wrapper_subclass(x)


def _without_gradients(run: Run | None) -> Run:
    """Of a graph whose results have no gradients, though its inputs may: torch's operators in it are to make none."""
    assert run is not None

    def call(*arguments: Any) -> Sequence[Any]:
        if not torch.is_grad_enabled():
            return run(*arguments)
        with torch.no_grad():
            return run(*arguments)

    return call


def _with_gradients(run: Run, unreached: Sequence[int]) -> Run:
    """Of a graph that has gradients wherever it is called: it may switch them on itself. unreached: inputs whose
    history is none of this call's; a backward would walk it, and free it."""

    def call(*arguments: Any) -> Sequence[Any]:
        if unreached:
            arguments = tuple(a.detach() if i in unreached else a for i, a in enumerate(arguments))
        if torch.is_grad_enabled():
            return run(*arguments)
        with torch.enable_grad():
            return run(*arguments)

    return call


def _own_memory(output: Any) -> bool:
    return (
        output.output_type.name == "non_alias"
        and issubclass(output.raw_type, Tensor)
        and getattr(output, "requires_grad_for_backward", output.requires_grad) == output.requires_grad
    )


def _marking(run: Run, changing: Sequence[set[int] | None]) -> Run:
    """changing: for each result, the dimensions whose sizes are not fixed."""
    marks = [(i, dims) for i, dims in enumerate(changing) if dims]
    if not marks:
        return run

    def marked(*arguments: Any) -> Sequence[Any]:
        found = run(*arguments)
        for i, dims in marks:
            setattr(found[i], _CHANGING_SIZES, set(dims))
        return found

    return marked


def _function(forward: Run, backward: Run, results: int, differentiable: Sequence[int]) -> type[Function]:
    """An autograd function of two compiled graphs. differentiable: the results that have gradients."""
    others = [i for i in range(results) if i not in differentiable]

    def gradients(sizes: Sequence[int], saved: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[Any, ...]:
        return tuple(backward(*sizes, *saved, *[given[i] for i in differentiable]))

    class CompiledGraph(Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:
            found = forward(*inputs)
            saved = [t for t in found[results:] if isinstance(t, Tensor)]
            # A view of an input would keep that input's history alive.
            ctx.save_for_backward(*[t.detach() if t._is_view() else t for t in saved])
            ctx.sizes = [s for s in found[results:] if not isinstance(s, Tensor)]
            if others:
                ctx.mark_non_differentiable(*[found[i] for i in others])
                ctx._materialize_non_diff_grads = False  # nobody reads them
            return tuple(found[:results])

        @staticmethod
        @torch._dynamo.disable  # type: ignore[untyped-decorator]  # it may run inside a frame that Dynamo looks at
        def backward(ctx: Any, *given: Tensor) -> Any:
            if torch.is_grad_enabled():
                connected = torch.empty(0, requires_grad=True)  # what was saved has no history
                arguments = (gradients, ctx.sizes, len(given), connected, *given, *ctx.saved_tensors)
                return _Once.apply(*arguments)  # type: ignore[no-untyped-call]
            return gradients(ctx.sizes, ctx.saved_tensors, given)

    return CompiledGraph


class _Once(Function):
    """Gradients that know that they were computed from something, and refuse to be differentiated themselves."""

    @staticmethod
    def forward(
        ctx: Any, gradients: Callable[..., Any], sizes: Sequence[int], count: int, connected: Tensor, *tensors: Tensor
    ) -> Any:
        return gradients(sizes, tensors[count:], tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "fusewright compiles first derivatives only: a compiled model's gradient cannot be differentiated again; "
            "call the model without torch.compile where a double backward is needed"
        )
