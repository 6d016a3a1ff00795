"""From Dynamo straight to the compiled graphs, without AOTAutograd's wrappers, where these have nothing to do.

The wrappers undo what tracing did to inputs that are overwritten and to results that share memory with something. A
plain graph has neither, and there they cost the host more than all of a training step's launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Run = Callable[..., Sequence[Any]]
Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and stride


class Direct:
    """Runs what AOTAutograd had compiled of one graph: one of inference, or one that leaves what its backward reads
    behind its results. Until its backward is compiled, in the simulator at the first one, the wrappers run."""

    def __init__(self) -> None:
        self._forward: Run | None = None
        self._backward: Run | None = None
        self._results: int | None = None  # of a forward that has a backward
        self._tangents: Sequence[Layout] = ()  # as the backward was compiled for
        self._metadata: Any = None
        self._plain = False
        self.run: Run

    def add_forward(self, run: Run, results: int | None) -> None:
        context = torch._guards.TracingContext.try_get()
        self._forward, self._results, self._metadata = run, results, context and context.fw_metadata

    def add_backward(self, run: Run, graph: fx.GraphModule) -> None:
        placeholders = graph.graph.find_nodes(op="placeholder")
        tangents = [p.meta["val"] for p in placeholders if "tangents" in p.name]
        self._backward, self._tangents = run, [(t.shape, t.stride()) for t in tangents]
        if self._plain:
            self._choose()

    def around(self, wrapped: Run, module: fx.GraphModule, inputs: Sequence[Any]) -> Run:
        """What Dynamo calls. wrapped: AOTAutograd's result."""
        self.run = wrapped
        self._plain = self._metadata is not None and _plain(self._metadata, module, inputs)
        if not self._plain:
            return wrapped
        if self._results is None and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            self._forward = _without_gradients(self._forward)
        self._choose()
        return self.run if self._results is None else lambda *arguments: self.run(*arguments)

    def _choose(self) -> None:
        assert self._forward is not None
        if self._results is None:
            self.run = self._forward
            return
        differentiable = [i for i, o in enumerate(self._metadata.output_info) if o.requires_grad]
        if self._backward is not None and len(differentiable) == len(self._tangents):
            function = _function(self._forward, self._backward, self._results, differentiable, self._tangents)
            self.run = function.apply


def _plain(metadata: Any, module: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether all that goes in and comes out are tensors of fixed sizes with memory of their own."""
    autocast = torch._C._is_any_autocast_enabled()  # which the wrappers switch off for what runs inside
    return (
        not autocast
        and not any(True for _ in (*module.parameters(), *module.buffers()))
        and all(isinstance(x, Tensor) and not is_traceable_wrapper_subclass(x) for x in inputs)
        and len(inputs) == len(metadata.input_info)
        and all(i.mutation_type.name == "NOT_MUTATED" for i in metadata.input_info)
        and all(_own_memory(o) for o in metadata.output_info)
        and not metadata.num_intermediate_bases
        and not metadata.tokens
        and not getattr(metadata, "num_graphsafe_rng_states", 0)
        and not getattr(metadata, "is_rng_op_functionalized", False)
        and not metadata.num_symints_saved_for_bw
    )


def _without_gradients(run: Run | None) -> Run:
    """Of a graph whose results have no gradients, though its inputs may: torch's operators in it are to make none."""
    assert run is not None

    def call(*arguments: Any) -> Sequence[Any]:
        if not torch.is_grad_enabled():
            return run(*arguments)
        with torch.no_grad():
            return run(*arguments)

    return call


def _own_memory(output: Any) -> bool:
    return (
        output.output_type.name == "non_alias"
        and issubclass(output.raw_type, Tensor)
        and not output.dynamic_dims
        and getattr(output, "requires_grad_for_backward", output.requires_grad) == output.requires_grad
    )


def _function(
    forward: Run, backward: Run, results: int, differentiable: Sequence[int], tangents: Sequence[Layout]
) -> type[Function]:
    """An autograd function of two compiled graphs. differentiable: the results that have gradients, in order."""
    others = [i for i in range(results) if i not in differentiable]

    def gradients(saved: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[Any, ...]:
        laid_out = [_with_layout(given[i], *layout) for i, layout in zip(differentiable, tangents, strict=True)]
        return tuple(backward(*saved, *laid_out))

    class CompiledGraph(Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> tuple[Any, ...]:
            found = forward(*inputs)
            # A view of an input would keep that input's history alive.
            ctx.save_for_backward(*[t.detach() if t._is_view() else t for t in found[results:]])
            if others:
                ctx.mark_non_differentiable(*[found[i] for i in others])
            return tuple(found[:results])

        @staticmethod
        @torch._dynamo.disable  # type: ignore[untyped-decorator]  # it may run inside a frame that Dynamo looks at
        def backward(ctx: Any, *given: Tensor) -> Any:
            if torch.is_grad_enabled():
                connected = torch.empty(0, requires_grad=True)  # what was saved has no history
                arguments = (gradients, len(given), connected, *given, *ctx.saved_tensors)
                return _Once.apply(*arguments)  # type: ignore[no-untyped-call]
            return gradients(ctx.saved_tensors, given)

    return CompiledGraph


class _Once(Function):
    """Gradients that know that they were computed from something, and refuse to be differentiated themselves."""

    @staticmethod
    def forward(ctx: Any, gradients: Callable[..., Any], count: int, connected: Tensor, *tensors: Tensor) -> Any:
        return gradients(tensors[count:], tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "fusewright compiles first derivatives only: a compiled model's gradient cannot be differentiated again; "
            "call the model without torch.compile where a double backward is needed"
        )


def _with_layout(tensor: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    if tensor.stride() == stride and tensor.shape == shape:
        return tensor
    return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
