"""The doors that Python code comes in by: `compile` for a whole model, `linear` for one fused call.

Both are `torch.compile` with our backend: Dynamo traces, guards and caches, and everything after it is as for
`torch.compile(model, backend="fusewright")`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from fusewright.errors import CannotFuse, FusewrightError
from fusewright.fusion.plan import FusionPlan
from fusewright.runtime.frozen import thaw
from fusewright.settings import Settings

__all__ = ["compile", "linear", "thaw"]


def compile(
    model: Callable[..., Any] | None = None, *, fullgraph: bool = False, dynamic: bool | None = None, **settings: Any
) -> Any:
    """Compiles a module or function with fusewright; without `model`, returns a decorator.

    fullgraph, dynamic: as for `torch.compile`. settings: the fields of `fusewright.settings.Settings`. Raises
    UnknownSetting, InvalidSetting; the first call compiles, and raises what the backend raises.
    """
    Settings.of(settings, also=("fullgraph", "dynamic"))
    if model is None:
        return functools.partial(compile, fullgraph=fullgraph, dynamic=dynamic, **settings)
    return torch.compile(model, backend="fusewright", fullgraph=fullgraph, dynamic=dynamic, options=settings)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    epilogue: Callable[..., Any] | None = None,
    operands: Sequence[Any] = (),
    **settings: Any,
) -> Any:
    """`epilogue(x @ weight.T + bias, *operands)` in one kernel, with gradients that are fused as well.

    x: [..., K]. weight: [N, K]. bias: [N]. epilogue: a function of tensors; its first argument is [..., N]. It may use
    further tensors, given as operands or closed over, and gradients flow into all of them. settings: as for `compile`.

    The epilogue is traced at its first call with a layout of weights, and again when what Python does in it changes; a
    second batch size makes the batch dynamic. Inside `torch.compile` the operators join those around the call, and the
    surrounding compiler fuses them. On the CPU Inductor compiles the call, or with `simulate` the simulator runs it.

    Raises CannotFuse, which names the operator, if the epilogue does not fit into the product's kernel;
    UnknownSetting, InvalidSetting, MixedDevices.
    """
    epilogue = _as_it_is if epilogue is None else epilogue
    if torch.compiler.is_compiling():
        return _linear(x, weight, bias, epilogue, operands)
    layout = (x.dim(), x.shape[-1:], x.dtype, x.device, weight.shape, weight.stride(), weight.dtype)
    chosen = Settings.of(settings) if settings else _DEFAULT
    return _compiled(_code(epilogue), layout, chosen)(x, weight, bias, epilogue, operands)


def _as_it_is(y: Tensor) -> Tensor:
    return y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Callable[..., Any], operands: Any) -> Any:
    return epilogue(F.linear(x, weight, bias), *operands)


# By what stays when an epilogue is made anew for each call, such as a lambda in `forward`: its code.
_kept: WeakKeyDictionary[Any, dict[Hashable, Callable[..., Any]]] = WeakKeyDictionary()

_DEFAULT = Settings()


def _compiled(code: Any, layout: Hashable, settings: Settings) -> Callable[..., Any]:
    """The compiled call for an epilogue. Each layout of weights has its own, so that only batches become dynamic."""
    calls = _kept.setdefault(code, {})
    call = calls.get((layout, settings))
    if call is None:
        call = calls[layout, settings] = _compile(settings)
    return call


def _compile(settings: Settings) -> Callable[..., Any]:
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported

    from fusewright.capture.backend import fusewright

    # Dynamo keeps what it compiled, and counts it, by code object.
    function = FunctionType(_linear.__code__.replace(), _linear.__globals__, "linear")
    backend = functools.partial(fusewright, check=one_kernel)
    compiled = torch.compile(function, backend=backend, fullgraph=True, options=asdict(settings))

    def call(*arguments: Any) -> Any:
        try:
            return compiled(*arguments)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, FusewrightError):
                raise error.inner_exception from None
            raise
        except Unsupported as error:
            reason = str(error).strip().split("\n\n")[0]
            raise CannotFuse(f"the epilogue is not a function of tensors alone: {reason}") from None

    return call


def _code(function: Any) -> Any:
    """What tells epilogues apart: the code of a Python function, else the object itself."""
    while isinstance(function, functools.partial):
        function = function.func
    code: CodeType | None = getattr(function, "__code__", None)
    return function if code is None else code


def one_kernel(plan: FusionPlan, backward: bool) -> None:
    """Raises CannotFuse if something runs as ATen, or, but in a backward, after the kernel of the product."""
    for fallback in plan.fallbacks:
        raise CannotFuse(_refusal(fallback.operators or [fallback.name], [fallback.reason]))
    if backward:
        return
    made = {name for region in plan.regions if region.gemm for name in region.writes()}
    late: list[str] = []
    for step in plan.steps:
        if made.intersection(step.reads()):
            made.update(step.writes())
            late += step.operators
    if late:
        reasons = [r.reason for r in plan.refusals if set(r.operators) & set(late)]
        raise CannotFuse(_refusal(late, reasons or ["it reads the finished product"]))


def _refusal(operators: Sequence[str], reasons: Sequence[str]) -> str:
    return (
        f"{', '.join(dict.fromkeys(operators))} cannot be fused with the product: {'; '.join(dict.fromkeys(reasons))}. "
        "Apply it to what fusewright.linear returns, or use fusewright.compile, which lets it run apart"
    )
